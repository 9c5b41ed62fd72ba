// Cutting frames into patches, with conversion: threads follow the output, so stores are coalesced
// and wide whatever the strides of the frames.
#include "common.cuh"

namespace fastalps::cuda {
namespace {

struct TileArguments {
  const void* frames;
  void* patches;
  const int64_t* kept;  // (frame, patch) pairs, or null for every patch of every frame.
  int64_t frame_stride;
  int32_t channel_stride, row_stride, column_stride;
  int32_t stride_height, stride_width, last_row, last_column;
  uint32_t total;
  Divider patch_width, patch_height, channels, count, columns;
  float scale, shift;
};

// The offset in the frames of the output element `index`, and its column and row within the patch.
struct Place {
  int64_t offset;
  uint32_t column, row;
};

__device__ __forceinline__ Place place_of(const TileArguments& arguments, uint32_t index) {
  uint32_t x = index;
  uint32_t y = arguments.patch_width.split(x);
  uint32_t channel = arguments.patch_height.split(y);
  uint32_t patch = arguments.channels.split(channel);
  int64_t frame;
  if (arguments.kept != nullptr) {
    frame = arguments.kept[2 * static_cast<int64_t>(patch)];
    patch = static_cast<uint32_t>(arguments.kept[2 * static_cast<int64_t>(patch) + 1]);
  } else {
    frame = arguments.count.split(patch);
  }
  uint32_t column = patch;
  const uint32_t row = arguments.columns.split(column);
  const int32_t top = min(static_cast<int32_t>(row) * arguments.stride_height, arguments.last_row);
  const int32_t left =
      min(static_cast<int32_t>(column) * arguments.stride_width, arguments.last_column);
  const int32_t inside = static_cast<int32_t>(channel) * arguments.channel_stride +
                         (top + static_cast<int32_t>(y)) * arguments.row_stride +
                         (left + static_cast<int32_t>(x)) * arguments.column_stride;
  return Place{frame * arguments.frame_stride + inside, x, y};
}

template <typename In, typename Out>
__device__ __forceinline__ Out convert(const TileArguments& arguments, In value) {
  return narrow<Out>(add(multiply(widen(value), arguments.scale), arguments.shift));
}

// How a thread reads the kVector elements that it stores at once.
enum class Read {
  kAligned,   // They never cross a row's end and are aligned: one wide load.
  kSegments,  // Unit column stride; they cross at most one row's end.
  kElements,  // Anything else: one element a thread.
};

template <typename In, typename Out, int kVector, Read kRead>
__global__ void __launch_bounds__(kThreads) tile_patches_kernel(TileArguments arguments) {
  const In* frames = static_cast<const In*>(arguments.frames);
  Out* patches = static_cast<Out*>(arguments.patches);
  const uint32_t step = gridDim.x * blockDim.x * kVector;
  for (uint32_t index = (blockIdx.x * blockDim.x + threadIdx.x) * kVector; index < arguments.total;
       index += step) {
    const Place place = place_of(arguments, index);
    Pack<Out, kVector> output;
    if constexpr (kRead == Read::kElements) {
      output.value[0] = convert<In, Out>(arguments, __ldg(frames + place.offset));
    } else if constexpr (kRead == Read::kAligned) {
      const auto input = Pack<In, kVector>::load(frames + place.offset);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        output.value[k] = convert<In, Out>(arguments, input.value[k]);
      }
    } else {
      const uint32_t room =
          min(arguments.patch_width.divisor - place.column, arguments.total - index);
      const In* here = frames + place.offset;
      // Where elements 0.. of the next row would start if that row went on to the left.
      const In* next = here;
      if (room < kVector && index + room < arguments.total) {
        // Mostly of the same patch, so that nothing has to be divided again.
        next = place.row + 1 < arguments.patch_height.divisor
                   ? here - (place.column + room) + arguments.row_stride
                   : frames + (place_of(arguments, index + room).offset - int64_t{room});
      }
      const uint32_t valid = min(static_cast<uint32_t>(kVector), arguments.total - index);
#pragma unroll
      for (uint32_t k = 0; k < kVector; ++k) {
        const In* source = k < room ? here : next;
        output.value[k] =
            k < valid ? convert<In, Out>(arguments, __ldg(source + k)) : narrow<Out>(0.0f);
      }
      if (valid < kVector) {
#pragma unroll
        for (uint32_t k = 0; k < kVector; ++k) {
          if (k < valid) patches[index + k] = output.value[k];
        }
        continue;
      }
    }
    output.store(patches + index);
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

// Some slack, so that no index of a grid-stride loop wraps around.
constexpr int64_t kLargestLaunch = int64_t{1} << 30;

template <typename In>
bool reads_aligned(const FrameView& frames, const PatchGrid& grid, int64_t vector) {
  const int64_t last_column = grid.width - grid.patch_width;
  const bool moved_back = (grid.columns - 1) * grid.stride_width > last_column;
  const int64_t bytes = std::min<int64_t>(16, vector * static_cast<int64_t>(sizeof(In)));
  return frames.column_stride == 1 && grid.patch_width % vector == 0 &&
         (grid.columns == 1 || grid.stride_width % vector == 0) &&
         (!moved_back || last_column % vector == 0) && frames.row_stride % vector == 0 &&
         (frames.channels == 1 || frames.channel_stride % vector == 0) &&
         (frames.frames == 1 || frames.frame_stride % vector == 0) && aligned(frames.data, bytes);
}

template <typename In, typename Out>
cudaError_t launch_tiles(const FrameView& frames, const PatchGrid& grid,
                         const TileArguments& arguments, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(Out);
  const auto launch = [&](auto kernel, int64_t vector) {
    const int64_t threads = ceil_divide(arguments.total, vector);
    kernel<<<grid_blocks(ceil_divide(threads, kThreads)), kThreads, 0, stream>>>(arguments);
    return cudaGetLastError();
  };
  if (reads_aligned<In>(frames, grid, kVector)) {
    return launch(tile_patches_kernel<In, Out, kVector, Read::kAligned>, kVector);
  }
  if (frames.column_stride == 1 && grid.patch_width >= kVector) {
    return launch(tile_patches_kernel<In, Out, kVector, Read::kSegments>, kVector);
  }
  return launch(tile_patches_kernel<In, Out, 1, Read::kElements>, 1);
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
  // Launches cover whole units: a frame, or with `kept` a patch.
  const int64_t units = kept != nullptr ? kept_count : frames.frames;
  const int64_t unit = (kept != nullptr ? 1 : grid.count()) * frames.channels * grid.patch_pixels();
  if (units * unit == 0) return cudaSuccess;
  const int64_t extent = (frames.channels - 1) * frames.channel_stride +
                         (grid.height - 1) * frames.row_stride +
                         (grid.width - 1) * frames.column_stride;
  // A multiple of 16 units keeps every launch's first store aligned.
  const int64_t units_per_launch =
      units * unit <= kLargestLaunch ? units : kLargestLaunch / unit / 16 * 16;
  const bool is_double = frames.dtype == DType::kFloat64 || patch_dtype == DType::kFloat64;
  const int64_t largest_stride =
      std::max({frames.channel_stride, frames.row_stride, frames.column_stride});
  if (is_double || units_per_launch == 0 || extent > kReach || largest_stride > kReach ||
      grid.height > kReach / 2 || grid.width > kReach / 2 || grid.count() > kReach) {
    return tile_patches_any(frames, grid, patches, patch_dtype, scale, shift, kept, units * unit,
                            stream);
  }
  const int64_t input_bytes = element_size(frames.dtype);
  const int64_t output_bytes = element_size(patch_dtype);
  for (int64_t start = 0; start < units; start += units_per_launch) {
    const int64_t count = std::min(units_per_launch, units - start);
    const int64_t first_frame = kept != nullptr ? 0 : start;
    const TileArguments arguments{
        static_cast<const char*>(frames.data) + first_frame * frames.frame_stride * input_bytes,
        static_cast<char*>(patches) + start * unit * output_bytes,
        kept != nullptr ? kept + 2 * start : nullptr,
        frames.frame_stride,
        static_cast<int32_t>(frames.channel_stride),
        static_cast<int32_t>(frames.row_stride),
        static_cast<int32_t>(frames.column_stride),
        static_cast<int32_t>(std::min(grid.stride_height, grid.height)),
        static_cast<int32_t>(std::min(grid.stride_width, grid.width)),
        static_cast<int32_t>(grid.height - grid.patch_height),
        static_cast<int32_t>(grid.width - grid.patch_width),
        static_cast<uint32_t>(count * unit),
        Divider(grid.patch_width),
        Divider(grid.patch_height),
        Divider(frames.channels),
        Divider(grid.count()),
        Divider(grid.columns),
        static_cast<float>(scale),
        static_cast<float>(shift)};
    const cudaError_t status = launch_tiles(frames, grid, patch_dtype, arguments, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace fastalps::cuda
