// Flagging the patches that differ from a background by sums of absolute differences.
#include "common.cuh"

namespace fastalps::cuda {
namespace {

// Rows of a patch that a thread reads before it needs the first of them.
template <int kUnit>
constexpr uint32_t kRows = kUnit == 1 ? 8 : 10;

// Wider units than bytes are for rows of adjacent pixels, and for sizes that fit 32 bits.
template <int kUnit>
struct DifferenceArguments {
  using Index = std::conditional_t<kUnit == 1, int64_t, uint32_t>;
  using Division = std::conditional_t<kUnit == 1, WideDivider, Divider>;

  const uint8_t* frames;
  const uint8_t* background;
  Index patches;
  int64_t frame_stride;
  Index frame_row_stride, frame_column_stride;
  Index background_row_stride, background_column_stride;
  Index stride_height, stride_width, last_row, last_column;
  uint32_t patch_height, patch_width;
  Division rows, columns;  // Of patches in a frame.
  // Threads side by side for the width of a patch, and all of a patch; these share a team of
  // so many warps, a power of two, with the threads of other patches.
  Divider lanes, threads;
  uint32_t warps;
  int64_t limit;
};

// Bytes in words of four, and which of them belong to a patch.
template <int kUnit>
struct Unit {
  using Word = typename WordOf<kUnit>::Type;
  static constexpr int kWords = kUnit < 4 ? 1 : kUnit / 4;

  uint32_t word[kWords] = {};

  Unit() = default;

  __device__ __forceinline__ explicit Unit(const Word& read) {
    if constexpr (kUnit < 4) {
      word[0] = read;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = reinterpret_cast<const uint32_t*>(&read)[i];
    }
  }

  __device__ __forceinline__ static Unit load(const uint8_t* source) {
    return Unit(__ldg(reinterpret_cast<const Word*>(source)));
  }

  // Of pixels that few threads read, which should not drive the background from the cache.
  __device__ __forceinline__ static Unit load_once(const uint8_t* source) {
    return Unit(__ldcs(reinterpret_cast<const Word*>(source)));
  }

  // The bytes [from, to) of the unit, not none and at most 8.
  __device__ __forceinline__ static Unit mask(uint32_t from, uint32_t to) {
    const uint64_t bytes = (~uint64_t{0} << (8 * from)) & (~uint64_t{0} >> (64 - 8 * to));
    Unit unit;
#pragma unroll
    for (int i = 0; i < kWords; ++i) unit.word[i] = static_cast<uint32_t>(bytes >> (32 * i));
    return unit;
  }
};

// The sum of absolute differences where `mask` is set.
template <int kUnit>
__device__ __forceinline__ uint32_t differences(const Unit<kUnit>& a, const Unit<kUnit>& b,
                                                const Unit<kUnit>& mask, uint32_t sum) {
#pragma unroll
  for (int i = 0; i < Unit<kUnit>::kWords; ++i) {
    sum += __vsadu4(a.word[i], (b.word[i] & mask.word[i]) | (a.word[i] & ~mask.word[i]));
  }
  return sum;
}

// A patch has so many threads as lie side by side over its width, times so many that share its
// rows. They read whole units of kUnit bytes: what of a unit lies outside of the patch is masked.
template <int kUnit>
__global__ void __launch_bounds__(kThreads, 3)
    patch_differences_kernel(DifferenceArguments<kUnit> arguments, uint8_t* __restrict__ flags) {
  using Index = typename DifferenceArguments<kUnit>::Index;
  constexpr uint32_t kStep = kRows<kUnit>;
  const uint32_t lanes = arguments.lanes.divisor, threads = arguments.threads.divisor;
  const uint32_t phases = arguments.lanes.divide(threads);
  const uint32_t team = 32 * arguments.warps, together = arguments.threads.divide(team);
  uint32_t thread = threadIdx.x % team;
  const uint32_t place = threadIdx.x / team * together + arguments.threads.split(thread);
  // Threads at the end of a team that are left over, whose sum is 0.
  const bool spare = threadIdx.x % team >= together * threads;
  uint32_t lane = thread;
  const uint32_t phase = arguments.lanes.split(lane);
  const uint32_t patches_per_block = kThreads / team * together;
  const Index step = static_cast<Index>(gridDim.x) * patches_per_block;

  for (Index first = static_cast<Index>(blockIdx.x) * patches_per_block; first < arguments.patches;
       first += step) {
    const Index patch = first + place;
    const bool busy = !spare && patch < arguments.patches;
    unsigned long long sum = 0;
    if (busy) {
      Index column = patch;
      Index row = arguments.columns.split(column);
      const Index frame = arguments.rows.split(row);
      const Index top = min(row * arguments.stride_height, arguments.last_row);
      Index left = min(column * arguments.stride_width, arguments.last_column);
      const uint32_t before = static_cast<uint32_t>(left % kUnit);
      const uint32_t end = before + arguments.patch_width;
      left -= before;
      const uint8_t* const pixels = arguments.frames + frame * arguments.frame_stride +
                                    static_cast<int64_t>(top) * arguments.frame_row_stride;
      const uint8_t* const still =
          arguments.background + static_cast<int64_t>(top) * arguments.background_row_stride;
      for (uint32_t x = lane * kUnit; x < end; x += lanes * kUnit) {
        const auto mask =
            Unit<kUnit>::mask(x == 0 ? before : 0, min(end - x, static_cast<uint32_t>(kUnit)));
        const auto offset = static_cast<int64_t>(left + x);
        const uint8_t* const here =
            pixels + offset * (kUnit == 1 ? arguments.frame_column_stride : 1);
        const uint8_t* const there =
            still + offset * (kUnit == 1 ? arguments.background_column_stride : 1);
        for (uint32_t y = phase; y < arguments.patch_height; y += phases * kStep) {
          Unit<kUnit> a[kStep], b[kStep];
#pragma unroll
          for (uint32_t k = 0; k < kStep; ++k) {
            // Below the patch the last row again, which is not counted.
            const auto line = static_cast<int64_t>(min(y + k * phases, arguments.patch_height - 1));
            a[k] = Unit<kUnit>::load_once(here + line * arguments.frame_row_stride);
            b[k] = Unit<kUnit>::load(there + line * arguments.background_row_stride);
          }
          uint32_t part = 0;
#pragma unroll
          for (uint32_t k = 0; k < kStep; ++k) {
            if (y + k * phases < arguments.patch_height) {
              part = differences(a[k], b[k], mask, part);
            }
          }
          sum += part;
        }
      }
    }
    // Each thread's sum becomes that of so many from it on, of twice as many every time.
    const uint32_t width = min(threads, 32u);
    for (uint32_t offset = 1; offset < width; offset *= 2) {
      const unsigned long long other = __shfl_down_sync(0xffffffffu, sum, offset);
      if (thread % 32 + offset < width) sum += other;
    }
    if (arguments.warps > 1) {
      __shared__ unsigned long long sums[kThreads / 32];
      const uint32_t warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) sums[warp] = sum;
      __syncthreads();
      if (busy && thread == 0) {
        for (uint32_t k = 1; k < arguments.warps; ++k) sum += sums[warp + k];
      }
      __syncthreads();
    }
    if (busy && thread == 0) flags[patch] = static_cast<int64_t>(sum) > arguments.limit;
  }
}

// Whether both can be read in units of so many bytes, none of which leaves its row.
bool reads_units(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                 int64_t unit) {
  constexpr int64_t kReach = (int64_t{1} << 31) - 1;
  return frames.column_stride == 1 && background.column_stride == 1 && grid.width % unit == 0 &&
         grid.width <= kReach && grid.height <= kReach && frames.frames * grid.count() <= kReach &&
         frames.row_stride % unit == 0 && frames.row_stride <= kReach &&
         background.row_stride % unit == 0 && background.row_stride <= kReach &&
         (frames.frames == 1 || frames.frame_stride % unit == 0) && aligned(frames.data, unit) &&
         aligned(background.data, unit);
}

template <int kUnit>
cudaError_t launch_differences(const FrameView& frames, const Matrix& background,
                               const PatchGrid& grid, int64_t limit, uint8_t* flags,
                               cudaStream_t stream) {
  // Patches start at multiples of `step`, which is the lowest bit set in any of these.
  const int64_t last_column = grid.width - grid.patch_width;
  const int64_t starts = grid.columns == 1 ? kUnit : kUnit | grid.stride_width | last_column;
  const int64_t step = starts & -starts;
  const int64_t lanes = std::min<int64_t>(ceil_divide(kUnit - step + grid.patch_width, kUnit), 32);
  const int64_t patches = frames.frames * grid.count();
  // As many threads a patch as it takes to fill the device twice, in whole warps or parts of one.
  constexpr int64_t kResidentThreads = 768;
  int64_t phases = std::clamp<int64_t>(
      ceil_divide(2 * kResidentThreads * multiprocessors(), patches * lanes), 1,
      std::min<int64_t>(ceil_divide(grid.patch_height, kRows<kUnit>), kThreads / lanes));
  int64_t warps = 1;
  while (32 * warps < lanes * phases) warps *= 2;
  // As many more as leave the number of patches that share a team, which the kernel finds anew.
  const int64_t together = 32 * warps / (lanes * phases);
  phases = 32 * warps / together / lanes;
  const int64_t per_block = kThreads / (32 * warps) * together;
  using Arguments = DifferenceArguments<kUnit>;
  using Index = typename Arguments::Index;
  const Arguments arguments{static_cast<const uint8_t*>(frames.data),
                            static_cast<const uint8_t*>(background.data),
                            static_cast<Index>(patches),
                            frames.frame_stride,
                            static_cast<Index>(frames.row_stride),
                            static_cast<Index>(frames.column_stride),
                            static_cast<Index>(background.row_stride),
                            static_cast<Index>(background.column_stride),
                            static_cast<Index>(std::min(grid.stride_height, grid.height)),
                            static_cast<Index>(std::min(grid.stride_width, grid.width)),
                            static_cast<Index>(grid.height - grid.patch_height),
                            static_cast<Index>(last_column),
                            static_cast<uint32_t>(grid.patch_height),
                            static_cast<uint32_t>(grid.patch_width),
                            typename Arguments::Division(grid.rows),
                            typename Arguments::Division(grid.columns),
                            Divider(lanes),
                            Divider(lanes * phases),
                            static_cast<uint32_t>(warps),
                            limit};
  patch_differences_kernel<kUnit>
      <<<grid_blocks(ceil_divide(patches, per_block)), kThreads, 0, stream>>>(arguments, flags);
  return cudaGetLastError();
}

}  // namespace

cudaError_t patch_differences(const FrameView& frames, const Matrix& background,
                              const PatchGrid& grid, int64_t limit, uint8_t* flags,
                              cudaStream_t stream) {
  if (frames.frames * grid.count() == 0) return cudaSuccess;
  if (grid.patch_pixels() >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const auto reads = [&](int64_t unit) { return reads_units(frames, background, grid, unit); };
  // Units of 16 bytes would save little: of a patch's narrow rows, they cover more of what is not.
  const auto launch = reads(8)   ? launch_differences<8>
                      : reads(4) ? launch_differences<4>
                      : reads(2) ? launch_differences<2>
                                 : launch_differences<1>;
  return launch(frames, background, grid, limit, flags, stream);
}

}  // namespace fastalps::cuda
