#include "cpu/conv/conv.h"
#if __has_include("cpu/conv/winograd.h")
#include "cpu/conv/winograd.h"
#endif

namespace fastsr::cpu {

constinit const Algorithm kWinogradAvx512[kWinogradForms] = {
#if __has_include("cpu/conv/winograd.h")
    kWinograd43Algorithm, kWinograd23Algorithm, kWinograd63Algorithm, kWinograd25Algorithm,
    kWinograd35Algorithm, kWinograd42Algorithm, kWinograd32Algorithm,
#endif
};

}  // namespace fastsr::cpu
