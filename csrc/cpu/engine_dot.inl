// The engine in bf16 or int8 alone, by instructions of its own; included by engine_avx*.cpp and
// engine_amx_*.cpp, which set FASTALPS_BLOCK to its name and FASTALPS_PRECISION to BFloat or Int8.
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace fastalps {
namespace {

// clang-format off
#include "vec.h"
#include "engine_transforms.inl"
#include "engine_products.inl"
#include "engine.inl"
#include "engine_narrow.inl"
// clang-format on

}  // namespace

void FASTALPS_BLOCK(const EngineArguments& a, int64_t first, int64_t count, int vectors,
                    float* scratch) {
  narrow_block<FASTALPS_PRECISION>(a, first, count, vectors, scratch);
}

}  // namespace fastalps
