// Which instruction set the kernels use, decided once, by what this processor has.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastalps {

extern const Kernels kernels_default;
#if defined(FASTALPS_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

const Kernels& choose() {
#if defined(FASTALPS_X86)
  const char* wish = std::getenv("FASTALPS_CPU");
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool any = wish == nullptr || *wish == '\0';
  if (avx512 && (any || std::strcmp(wish, "avx512") == 0)) return kernels_avx512;
  if (avx2 && (any || std::strcmp(wish, "default") != 0)) return kernels_avx2;
#endif
  return kernels_default;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastalps
