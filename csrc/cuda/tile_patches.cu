// Cutting frames into patches, with conversion. A thread stores the same few elements of one patch
// after another: where in a patch they lie it finds once, of a patch only where its corner lies. So
// stores are coalesced and wide whatever the strides of the frames.
#include <numeric>

#include "common.cuh"

namespace fastalps::cuda {
namespace {

struct TileArguments {
  const void* frames;
  void* output;
  const int64_t* kept;  // (frame, patch) pairs, or null for every patch of every frame.
  int64_t frame_stride;
  int32_t channel_stride, row_stride, column_stride;
  int32_t stride_height, stride_width, last_row, last_column;
  int64_t patch_elements;
  uint32_t patches;
  // Of one patch, and of a group of patches that begins at a multiple of what a warp stores; so
  // many blocks share a group.
  Divider stores;
  uint32_t group_patches, group_stores;
  Divider blocks_per_group;
  uint32_t groups;
  uint32_t together;  // Groups that a block takes at once: the most, or one.
  Divider patch_width, patch_height, count, columns;
  float scale, shift;
};

// Patches that a thread reads before it stores the first of them, by its reads of each.
template <int kReads>
constexpr int kAtOnce = kReads == 4 ? 2 : 4;

// The offset of a patch's corner in the frames.
__device__ __forceinline__ int64_t corner(const TileArguments& arguments, uint32_t patch) {
  int64_t frame;
  if (arguments.kept != nullptr) {
    frame = arguments.kept[2 * static_cast<int64_t>(patch)];
    patch = static_cast<uint32_t>(arguments.kept[2 * static_cast<int64_t>(patch) + 1]);
  } else {
    frame = arguments.count.split(patch);
  }
  const uint32_t row = arguments.columns.split(patch);
  const int32_t top = min(static_cast<int32_t>(row) * arguments.stride_height, arguments.last_row);
  const int32_t left =
      min(static_cast<int32_t>(patch) * arguments.stride_width, arguments.last_column);
  return frame * arguments.frame_stride + top * arguments.row_stride +
         left * arguments.column_stride;
}

template <typename Out, typename In>
__device__ __forceinline__ Out convert(const TileArguments& arguments, In value) {
  return narrow<Out>(add(multiply(widen(value), arguments.scale), arguments.shift));
}

// One thread's elements of a patch in each of kCount groups, at these offsets from their corners.
template <int kCount, typename In, typename Out, int kStored, int kRead>
__device__ __forceinline__ void tile(const TileArguments& arguments,
                                     const int32_t (&offset)[kStored / kRead], uint32_t patch,
                                     Out* patches) {
  Pack<In, kRead> read[kCount][kStored / kRead];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const In* const source = static_cast<const In*>(arguments.frames) +
                             corner(arguments, patch + i * arguments.group_patches);
#pragma unroll
    for (int k = 0; k < kStored / kRead; ++k) {
      read[i][k] = Pack<In, kRead>::load(source + offset[k]);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Pack<Out, kStored> output;
#pragma unroll
    for (int k = 0; k < kStored; ++k) {
      output.value[k] = convert<Out>(arguments, read[i][k / kRead].value[k % kRead]);
    }
    output.store(patches + (patch + i * arguments.group_patches) * arguments.patch_elements);
  }
}

// A thread stores kStored elements at once, and reads them kRead at a time: neighbours in a row, at
// a multiple of their size.
template <typename In, typename Out, int kStored, int kRead>
__global__ void __launch_bounds__(kThreads) tile_patches_kernel(TileArguments arguments) {
  constexpr int kReads = kStored / kRead, kMost = kAtOnce<kReads>;
  uint32_t part = blockIdx.x;
  const uint32_t group = arguments.blocks_per_group.split(part);
  uint32_t store = part * blockDim.x + threadIdx.x;
  if (store >= arguments.group_stores) return;
  const uint32_t place = arguments.stores.split(store);

  int32_t offset[kReads];
  uint32_t x = store * kStored;
  uint32_t y = arguments.patch_width.split(x);
  uint32_t channel = arguments.patch_height.split(y);
#pragma unroll
  for (int k = 0; k < kReads; ++k) {
    offset[k] = static_cast<int32_t>(channel) * arguments.channel_stride +
                static_cast<int32_t>(y) * arguments.row_stride +
                static_cast<int32_t>(x) * arguments.column_stride;
    x += kRead;
    if (x == arguments.patch_width.divisor) {
      x = 0;
      ++y;
    }
    if (y == arguments.patch_height.divisor) {
      y = 0;
      ++channel;
    }
  }

  Out* const patches = static_cast<Out*>(arguments.output) + static_cast<int64_t>(store) * kStored;
  // Beyond the last patch nothing is read, rather than not stored: reads that a condition guards
  // are put off until it is known.
  const uint32_t apart = arguments.group_patches, together = arguments.together;
  for (uint32_t first = group * together * apart; first < arguments.patches;
       first += arguments.groups * together * apart) {
    uint32_t patch = first + place;
    if (together == kMost && patch + (kMost - 1) * apart < arguments.patches) {
      tile<kMost, In, Out, kStored, kRead>(arguments, offset, patch, patches);
      continue;
    }
    for (uint32_t k = 0; k < together && patch < arguments.patches; ++k, patch += apart) {
      tile<1, In, Out, kStored, kRead>(arguments, offset, patch, patches);
    }
  }
}

struct WideTileArguments {
  const void* frames;
  void* patches;
  const int64_t* kept;
  int64_t frame_stride, channel_stride, row_stride, column_stride;
  WideDivider patch_width, patch_height, channels, count, columns;
  int64_t stride_height, stride_width, last_row, last_column;
  int64_t total;
  double scale, shift;
  DType input, output;
};

// Every dtype and size, in 64-bit arithmetic: for float64, and where 32-bit indices do not reach.
__global__ void __launch_bounds__(kThreads) tile_patches_any_kernel(WideTileArguments arguments) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       index < arguments.total; index += step) {
    int64_t rest = index;
    const auto split = [&rest](const WideDivider& divider) {
      int64_t remainder = rest;
      rest = divider.split(remainder);
      return remainder;
    };
    const int64_t x = split(arguments.patch_width);
    const int64_t y = split(arguments.patch_height);
    const int64_t channel = split(arguments.channels);
    int64_t frame, patch;
    if (arguments.kept != nullptr) {
      frame = arguments.kept[2 * rest];
      patch = arguments.kept[2 * rest + 1];
    } else {
      patch = split(arguments.count);
      frame = rest;
    }
    int64_t column = patch;
    const int64_t row = arguments.columns.split(column);
    const int64_t top = min(row * arguments.stride_height, arguments.last_row);
    const int64_t left = min(column * arguments.stride_width, arguments.last_column);
    const double value =
        load_any(arguments.frames, arguments.input,
                 frame * arguments.frame_stride + channel * arguments.channel_stride +
                     (top + y) * arguments.row_stride + (left + x) * arguments.column_stride);
    if (arguments.input == DType::kFloat64) {
      store_any(arguments.patches, arguments.output, index,
                add(multiply(value, arguments.scale), arguments.shift));
    } else {
      store_any(arguments.patches, arguments.output, index,
                add(multiply(static_cast<float>(value), static_cast<float>(arguments.scale)),
                    static_cast<float>(arguments.shift)));
    }
  }
}

constexpr int64_t kReach = (int64_t{1} << 31) - 1;

// Whether `unit` elements at a time, none of which leaves its row, are read from aligned addresses.
template <typename In>
bool reads_units(const FrameView& frames, const PatchGrid& grid, int64_t unit) {
  const int64_t last_column = grid.width - grid.patch_width;
  const bool moved_back = (grid.columns - 1) * grid.stride_width > last_column;
  const int64_t bytes = std::min<int64_t>(16, unit * static_cast<int64_t>(sizeof(In)));
  return frames.column_stride == 1 && grid.patch_width % unit == 0 &&
         (grid.columns == 1 || grid.stride_width % unit == 0) &&
         (!moved_back || last_column % unit == 0) && frames.row_stride % unit == 0 &&
         (frames.channels == 1 || frames.channel_stride % unit == 0) &&
         (frames.frames == 1 || frames.frame_stride % unit == 0) && aligned(frames.data, bytes);
}

template <typename In, typename Out, int kStored, int kRead>
cudaError_t launch_groups(TileArguments arguments, cudaStream_t stream) {
  const int64_t stores = arguments.patch_elements / kStored;
  int64_t group_patches = 32 / std::gcd<int64_t>(stores, 32);
  group_patches *= std::max<int64_t>(kThreads / (group_patches * stores), 1);
  if (group_patches * stores > kReach) group_patches = 1;
  const int64_t group_stores = group_patches * stores;
  const int64_t blocks = ceil_divide(group_stores, kThreads);
  const int64_t threads = ceil_divide(group_stores, blocks * 32) * 32;
  // One by one, where that leaves more multiprocessors something to do.
  constexpr int64_t kMost = kAtOnce<kStored / kRead>;
  int64_t groups = ceil_divide(arguments.patches, group_patches);
  const int64_t together = groups * blocks > kMost * multiprocessors() ? kMost : 1;
  groups = ceil_divide(groups, together);
  groups = std::max<int64_t>(grid_blocks(groups * blocks) / blocks, 1);
  arguments.stores = Divider(stores);
  arguments.group_patches = static_cast<uint32_t>(group_patches);
  arguments.group_stores = static_cast<uint32_t>(group_stores);
  arguments.blocks_per_group = Divider(blocks);
  arguments.groups = static_cast<uint32_t>(groups);
  arguments.together = static_cast<uint32_t>(together);
  tile_patches_kernel<In, Out, kStored, kRead>
      <<<static_cast<unsigned>(groups * blocks), static_cast<unsigned>(threads), 0, stream>>>(
          arguments);
  return cudaGetLastError();
}

template <typename In, typename Out>
cudaError_t launch_tiles(const FrameView& frames, const PatchGrid& grid,
                         const TileArguments& arguments, cudaStream_t stream) {
  constexpr int kWidest = 16 / sizeof(Out);
  if (reads_units<In>(frames, grid, kWidest)) {
    return launch_groups<In, Out, kWidest, kWidest>(arguments, stream);
  }
  if (arguments.patch_elements % 4 != 0) return launch_groups<In, Out, 1, 1>(arguments, stream);
  // Bytes are so small that a load of one moves next to nothing.
  if constexpr (sizeof(In) == 1) {
    if (reads_units<In>(frames, grid, 2)) return launch_groups<In, Out, 4, 2>(arguments, stream);
  }
  return launch_groups<In, Out, 4, 1>(arguments, stream);
}

template <typename In>
cudaError_t launch_tiles(const FrameView& frames, const PatchGrid& grid, DType patch_dtype,
                         const TileArguments& arguments, cudaStream_t stream) {
  switch (patch_dtype) {
    case DType::kFloat32:
      return launch_tiles<In, float>(frames, grid, arguments, stream);
    case DType::kFloat16:
      return launch_tiles<In, __half>(frames, grid, arguments, stream);
    case DType::kBFloat16:
      return launch_tiles<In, __nv_bfloat16>(frames, grid, arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_tiles(const FrameView& frames, const PatchGrid& grid, DType patch_dtype,
                         const TileArguments& arguments, cudaStream_t stream) {
  switch (frames.dtype) {
    case DType::kUInt8:
      return launch_tiles<uint8_t>(frames, grid, patch_dtype, arguments, stream);
    case DType::kFloat32:
      return launch_tiles<float>(frames, grid, patch_dtype, arguments, stream);
    case DType::kFloat16:
      return launch_tiles<__half>(frames, grid, patch_dtype, arguments, stream);
    case DType::kBFloat16:
      return launch_tiles<__nv_bfloat16>(frames, grid, patch_dtype, arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t tile_patches_any(const FrameView& frames, const PatchGrid& grid, void* patches,
                             DType patch_dtype, double scale, double shift, const int64_t* kept,
                             int64_t total, cudaStream_t stream) {
  const WideTileArguments arguments{frames.data,
                                    patches,
                                    kept,
                                    frames.frame_stride,
                                    frames.channel_stride,
                                    frames.row_stride,
                                    frames.column_stride,
                                    WideDivider(grid.patch_width),
                                    WideDivider(grid.patch_height),
                                    WideDivider(frames.channels),
                                    WideDivider(grid.count()),
                                    WideDivider(grid.columns),
                                    std::min(grid.stride_height, grid.height),
                                    std::min(grid.stride_width, grid.width),
                                    grid.height - grid.patch_height,
                                    grid.width - grid.patch_width,
                                    total,
                                    scale,
                                    shift,
                                    frames.dtype,
                                    patch_dtype};
  const int blocks = grid_blocks(ceil_divide(total, kThreads));
  tile_patches_any_kernel<<<blocks, kThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t tile_patches(const FrameView& frames, const PatchGrid& grid, void* patches,
                         DType patch_dtype, double scale, double shift, const int64_t* kept,
                         int64_t kept_count, cudaStream_t stream) {
  const int64_t patches_total = kept != nullptr ? kept_count : frames.frames * grid.count();
  const int64_t patch_elements = frames.channels * grid.patch_pixels();
  if (patches_total * patch_elements == 0) return cudaSuccess;
  const int64_t extent = (frames.channels - 1) * frames.channel_stride +
                         (grid.height - 1) * frames.row_stride +
                         (grid.width - 1) * frames.column_stride;
  const bool is_double = frames.dtype == DType::kFloat64 || patch_dtype == DType::kFloat64;
  const int64_t largest_stride =
      std::max({frames.channel_stride, frames.row_stride, frames.column_stride});
  // Some slack, so that no number of a patch wraps around in a loop over the grid.
  if (is_double || extent > kReach || largest_stride > kReach || grid.height > kReach / 2 ||
      grid.width > kReach / 2 || grid.count() > kReach || patch_elements > kReach / 2 ||
      patches_total > kReach / 2) {
    return tile_patches_any(frames, grid, patches, patch_dtype, scale, shift, kept,
                            patches_total * patch_elements, stream);
  }
  const TileArguments arguments{frames.data,
                                patches,
                                kept,
                                frames.frame_stride,
                                static_cast<int32_t>(frames.channel_stride),
                                static_cast<int32_t>(frames.row_stride),
                                static_cast<int32_t>(frames.column_stride),
                                static_cast<int32_t>(std::min(grid.stride_height, grid.height)),
                                static_cast<int32_t>(std::min(grid.stride_width, grid.width)),
                                static_cast<int32_t>(grid.height - grid.patch_height),
                                static_cast<int32_t>(grid.width - grid.patch_width),
                                patch_elements,
                                static_cast<uint32_t>(patches_total),
                                Divider(1),
                                0,
                                0,
                                Divider(1),
                                0,
                                0,
                                Divider(grid.patch_width),
                                Divider(grid.patch_height),
                                Divider(grid.count()),
                                Divider(grid.columns),
                                static_cast<float>(scale),
                                static_cast<float>(shift)};
  return launch_tiles(frames, grid, patch_dtype, arguments, stream);
}

}  // namespace fastalps::cuda
