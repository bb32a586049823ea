#include "cpu/conv/winograd.h"

namespace fastsr::cpu {

constinit const Algorithm kWinogradAvx2[kWinogradForms] = {
    kWinograd43Algorithm, kWinograd23Algorithm, kWinograd63Algorithm, kWinograd25Algorithm,
    kWinograd35Algorithm, kWinograd42Algorithm, kWinograd32Algorithm,
};

}  // namespace fastsr::cpu
