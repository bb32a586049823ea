#include "cpu/conv/winograd.h"

namespace fastsr::cpu {

constinit const Algorithm kWinogradAvx512Bf16[kWinogradForms] = {
    kWinograd43Algorithm, kWinograd23Algorithm, kWinograd63Algorithm, kWinograd25Algorithm,
    kWinograd35Algorithm, kWinograd42Algorithm, kWinograd32Algorithm,
};

}  // namespace fastsr::cpu
