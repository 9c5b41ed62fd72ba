// Gradient of tile_patches: every pixel gathers from the patches that cover it, without atomics.
#include "common.cuh"

namespace fastalps::cuda {
namespace {

struct GatherArguments {
  const void* grad;
  void* output;
  int64_t frames;
  int32_t channels;
  Axis vertical, horizontal;
  WideDivider by_height, by_channels;
  double scale;
  DType output_dtype;
};

// A warp for each row of pixels: what depends on the row alone is computed once. The sum goes over
// patches in ascending order, so the result is the same in every run.
template <typename T, typename Sum>
__global__ void __launch_bounds__(kThreads)
    tile_patches_backward_kernel(GatherArguments arguments) {
  const Axis& vertical = arguments.vertical;
  const Axis& horizontal = arguments.horizontal;
  const T* grad = static_cast<const T*>(arguments.grad);
  const int64_t patch_pixels = static_cast<int64_t>(vertical.patch) * horizontal.patch;
  const int64_t patch_step = arguments.channels * patch_pixels;
  const int64_t frame_step = patch_step * vertical.count * horizontal.count;
  const int64_t lines = arguments.frames * arguments.channels * vertical.size;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const Sum scale = static_cast<Sum>(arguments.scale);
  for (int64_t line = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; line < lines;
       line += step) {
    int64_t inside = line;
    int64_t channel = arguments.by_height.split(inside);
    const int32_t y = static_cast<int32_t>(inside);
    const int64_t frame = arguments.by_channels.split(channel);
    const T* source = grad + frame * frame_step + channel * patch_pixels;
    const int32_t first_row = vertical.first(y), last_row = vertical.last(y);
    for (int32_t x = static_cast<int32_t>(threadIdx.x); x < horizontal.size; x += 32) {
      const int32_t first_column = horizontal.first(x), last_column = horizontal.last(x);
      Sum sum = 0;
      for (int32_t row = first_row; row <= last_row; ++row) {
        const T* in_row = source + static_cast<int64_t>(row) * horizontal.count * patch_step +
                          static_cast<int64_t>(y - vertical.origin(row)) * horizontal.patch + x;
        for (int32_t column = first_column; column <= last_column; ++column) {
          sum += static_cast<Sum>(
              widen(__ldg(in_row + column * patch_step - horizontal.origin(column))));
        }
      }
      store_any(arguments.output, arguments.output_dtype, line * horizontal.size + x,
                multiply(sum, scale));
    }
  }
}

}  // namespace

cudaError_t tile_patches_backward(const void* grad, DType grad_dtype, int64_t frames,
                                  int64_t channels, const PatchGrid& grid, void* output,
                                  DType output_dtype, double scale, cudaStream_t stream) {
  const int64_t lines = frames * channels * grid.height;
  if (lines * grid.width == 0) return cudaSuccess;
  const GatherArguments arguments{
      grad,
      output,
      frames,
      static_cast<int32_t>(channels),
      Axis(grid.height, grid.patch_height, grid.stride_height, grid.rows),
      Axis(grid.width, grid.patch_width, grid.stride_width, grid.columns),
      WideDivider(grid.height),
      WideDivider(channels),
      scale,
      output_dtype};
  const dim3 block(32, kThreads / 32);
  const int blocks = grid_blocks(ceil_divide(lines, block.y));
  return with_floating(grad_dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (!std::is_same_v<T, double>) {
      if (output_dtype != DType::kFloat64) {
        tile_patches_backward_kernel<T, float><<<blocks, block, 0, stream>>>(arguments);
        return cudaGetLastError();
      }
    }
    tile_patches_backward_kernel<T, double><<<blocks, block, 0, stream>>>(arguments);
    return cudaGetLastError();
  });
}

}  // namespace fastalps::cuda
