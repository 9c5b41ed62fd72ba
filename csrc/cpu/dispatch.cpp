// Which instruction set the kernels use, decided once, by what this processor has.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

#if defined(FASTALPS_WITH_AVX_VNNI) || defined(FASTALPS_WITH_AMX)
#include <cpuid.h>
#endif
#if defined(FASTALPS_WITH_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// A build for tests, whose wide instructions are functions (tests/emulation/avx512.h), runs
// anywhere.
#if defined(FASTALPS_EMULATED)
#define FASTALPS_SUPPORTS(feature) true
#else
#define FASTALPS_SUPPORTS(feature) __builtin_cpu_supports(feature)
#endif

namespace fastalps {

extern const Kernels kernels_default;
#if defined(FASTALPS_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
void engine_int8_vnni(const EngineArguments&, int64_t, int64_t, int, float*);
void engine_bf16_dot(const EngineArguments&, int64_t, int64_t, int, float*);
#endif
#if defined(FASTALPS_WITH_AVX_VNNI)
void engine_int8_avx_vnni(const EngineArguments&, int64_t, int64_t, int, float*);
#endif
#if defined(FASTALPS_WITH_AMX)
void engine_int8_amx(const EngineArguments&, int64_t, int64_t, int, float*);
void engine_bf16_amx(const EngineArguments&, int64_t, int64_t, int, float*);
#endif

namespace {

[[maybe_unused]] const char* wish() {
  const char* name = std::getenv("FASTALPS_CPU");
  return name == nullptr ? "" : name;
}

[[maybe_unused]] bool anything_goes() { return *wish() == '\0'; }

const Kernels& choose() {
#if defined(FASTALPS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && FASTALPS_SUPPORTS("avx512f") && FASTALPS_SUPPORTS("avx512bw") &&
                      FASTALPS_SUPPORTS("avx512dq") && FASTALPS_SUPPORTS("avx512vl");
  if (avx512 && (anything_goes() || std::strcmp(wish(), "avx512") == 0)) return kernels_avx512;
  if (avx2 && (anything_goes() || std::strcmp(wish(), "default") != 0)) return kernels_avx2;
#endif
  return kernels_default;
}

bool has_dot(Precision precision) {
#if defined(FASTALPS_X86)
  if (&kernels() != &kernels_avx512) return false;
  if (precision == Precision::kInt8) return FASTALPS_SUPPORTS("avx512vnni");
  if (precision == Precision::kBf16) return FASTALPS_SUPPORTS("avx512bf16");
#endif
  return false;
}

// int8 in vectors of AVX2, as most processors without AVX-512 have it that are sold now.
bool has_avx_vnni() {
#if !defined(FASTALPS_WITH_AVX_VNNI)
  return false;
#elif defined(FASTALPS_EMULATED)
  return &kernels() == &kernels_avx2;
#else
  if (&kernels() != &kernels_avx2 || !anything_goes()) return false;
  // clang's and older gcc's __builtin_cpu_supports do not know it.
  unsigned last = 0, features = 0, b, c, d;
  if (!__get_cpuid_count(7, 0, &last, &b, &c, &d) || last < 1) return false;
  return __get_cpuid_count(7, 1, &features, &b, &c, &d) && (features & 1u << 4) != 0;
#endif
}

#if defined(FASTALPS_WITH_AMX) && !defined(FASTALPS_EMULATED)
// The bits of cpuid that say what of AMX there is and granted; clang's __builtin_cpu_supports does
// not know them.
unsigned tile_features() {
  unsigned a, b, c, features = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &features)) return 0;
  // Linux gives a process the tile registers when it asks for them, if it has them to give.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? features : 0;
}
#endif

bool has_tiles(Precision precision) {
#if !defined(FASTALPS_WITH_AMX)
  (void)precision;
  return false;
#elif defined(FASTALPS_EMULATED)
  return has_dot(precision) && anything_goes();
#else
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22;
  if (!has_dot(precision) || !anything_goes()) return false;
  static const unsigned features = tile_features();
  const unsigned needed = kTiles | (precision == Precision::kInt8 ? kInt8 : kBf16);
  return (features & needed) == needed;
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

EngineBlock engine_block(Precision precision) {
#if defined(FASTALPS_WITH_AMX)
  if (has_tiles(precision)) {
    return precision == Precision::kInt8 ? engine_int8_amx : engine_bf16_amx;
  }
#endif
#if defined(FASTALPS_X86)
  if (has_dot(precision)) {
    return precision == Precision::kInt8 ? engine_int8_vnni : engine_bf16_dot;
  }
#endif
#if defined(FASTALPS_WITH_AVX_VNNI)
  if (precision == Precision::kInt8 && has_avx_vnni()) return engine_int8_avx_vnni;
#endif
  if (precision == Precision::kBf16) return kernels().engine_bf16;
  return precision == Precision::kInt8 ? kernels().engine_int8 : kernels().engine_fp32;
}

const char* kernels_description() {
  static const std::string text = [] {
    std::string words = kernels().name;
    if (has_dot(Precision::kBf16)) words += " avx512_bf16";
    if (has_dot(Precision::kInt8)) words += " avx512_vnni";
    if (has_avx_vnni()) words += " avx_vnni";
    if (has_tiles(Precision::kBf16)) words += " amx_bf16";
    if (has_tiles(Precision::kInt8)) words += " amx_int8";
    return words;
  }();
  return text.c_str();
}

}  // namespace fastalps
