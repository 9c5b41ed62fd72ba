// Which instruction set the kernels use, decided once, by what this processor has.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

namespace fastalps {

extern const Kernels kernels_default;
#if defined(FASTALPS_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
void engine_int8_vnni(const EngineArguments&, int64_t, int64_t, int, float*);
void engine_bf16_dot(const EngineArguments&, int64_t, int64_t, int, float*);
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

bool has_dot(Precision precision) {
#if defined(FASTALPS_X86)
  if (&kernels() != &kernels_avx512) return false;
  if (precision == Precision::kInt8) return __builtin_cpu_supports("avx512vnni");
  if (precision == Precision::kBf16) return __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

EngineBlock engine_block(Precision precision) {
#if defined(FASTALPS_X86)
  if (has_dot(precision)) {
    return precision == Precision::kInt8 ? engine_int8_vnni : engine_bf16_dot;
  }
#endif
  if (precision == Precision::kBf16) return kernels().engine_bf16;
  return precision == Precision::kInt8 ? kernels().engine_int8 : kernels().engine_fp32;
}

const char* kernels_description() {
  static const std::string text = [] {
    std::string words = kernels().name;
    if (has_dot(Precision::kBf16)) words += " avx512_bf16";
    if (has_dot(Precision::kInt8)) words += " avx512_vnni";
    return words;
  }();
  return text.c_str();
}

}  // namespace fastalps
