// All CPU kernels for one instruction set; included by kernels_*.cpp, which set it.
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace fastalps {
namespace {

#include "vec.h"
// The order matters: what a file uses stands before it.
// clang-format off
#include "squared_error.inl"
#include "latent.inl"
#include "tiling.inl"
#include "folding.inl"
#include "engine_transforms.inl"
#include "engine_products.inl"
#include "engine.inl"
#include "engine_narrow.inl"
// clang-format on

}  // namespace

extern const Kernels FASTALPS_TABLE;
const Kernels FASTALPS_TABLE = {
    FASTALPS_NAME,
    tile_patches,
    tile_patches_backward,
    fold_scores,
    fold_scores_backward,
    perturb_latent,
    perturb_latent_backward,
    squared_error,
    squared_error_backward,
    activity,
    gather,
    kLanes,
    engine_block_fp32,
    narrow_block<BFloat>,
    narrow_block<Int8>,
};

}  // namespace fastalps
