// Registers the CUDA kernels with torch, as bindings.cpp does the CPU kernels: the stable ABI only,
// so one build serves every torch from 2.10 on. Nothing here waits for the device, so a CUDA graph
// captures every op but active_patches, whose shapes depend on the data.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "arguments.h"
#include "cuda/launchers.h"

namespace fastalps {
namespace {

// The CUDA device that every tensor is on.
template <typename... Tensors>
int32_t device_of(const Tensor& first, const Tensors&... others) {
  const int32_t device = first.get_device_index();
  STD_TORCH_CHECK(
      first.is_cuda() && (... && (others.is_cuda() && others.get_device_index() == device)),
      "fastalps: expected every tensor on the same CUDA device");
  return device;
}

// Makes the tensors' device current and holds its current stream.
class Launch {
 public:
  template <typename... Tensors>
  explicit Launch(const Tensors&... tensors) : guard_(device_of(tensors...)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_of(tensors...), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void check_launch(cudaError_t status, const char* op) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

cuda::PatchGrid grid_of(int64_t height, int64_t width, const Sizes& patch, const Sizes& stride,
                        bool cover) {
  check_grid(height, width, patch, stride);
  return cuda::make_patch_grid(height, width, patch[0], patch[1], stride[0], stride[1], cover);
}

// Pixels are found by 32-bit coordinates, and within a patch by one 32-bit number.
void check_sides(const cuda::PatchGrid& grid, const char* op) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(grid.height <= kMost && grid.width <= kMost, op,
                  ": expected frames of less than 2^31 pixels a side");
}

void check_area(const cuda::PatchGrid& grid, const char* op) {
  STD_TORCH_CHECK(grid.patch_pixels() <= std::numeric_limits<int32_t>::max(), op,
                  ": expected patches of less than 2^31 pixels");
}

cuda::Matrix matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

cuda::Matrix samples_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), 1};
}

// Where the blocks that share a row leave their sums: rows for each split.
Tensor partials_for(const cuda::RowPlan& plan, int64_t rows, const Tensor& values) {
  const bool is_double = values.scalar_type() == ScalarType::Double;
  return empty(values, {plan.splits == 1 ? 0 : plan.splits * rows},
               is_double ? ScalarType::Double : ScalarType::Float);
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* mutable_floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

Tensor tile_patches(Tensor frames, Sizes patch_size, Sizes stride, bool cover, ScalarType dtype,
                    double scale, double shift) {
  check_tile(frames);
  const auto size = frames.sizes();
  const auto strides = frames.strides();
  const auto grid = grid_of(size[2], size[3], patch_size, stride, cover);
  const Launch launch(frames);
  Tensor patches =
      empty(frames, {size[0], grid.count(), size[1], patch_size[0], patch_size[1]}, dtype);
  check_floating(patches);
  const cuda::FrameView view = {frames.const_data_ptr(),
                                dtype_of(frames),
                                size[0],
                                size[1],
                                strides[0],
                                strides[1],
                                strides[2],
                                strides[3]};
  check_launch(cuda::tile_patches(view, grid, patches.mutable_data_ptr(), dtype_of(dtype), scale,
                                  shift, nullptr, 0, launch.stream()),
               "tile_patches");
  return patches;
}

Tensor tile_patches_backward(Tensor grad, Sizes frame_size, Sizes patch_size, Sizes stride,
                             bool cover, ScalarType dtype, double scale) {
  check_tile_backward(grad, frame_size);
  const auto grid = grid_of(frame_size[0], frame_size[1], patch_size, stride, cover);
  check_sides(grid, "tile_patches_backward");
  const int64_t n = grad.size(0), channels = grad.size(2);
  STD_TORCH_CHECK(grad.size(1) == grid.count() && grad.size(3) == grid.patch_height &&
                      grad.size(4) == grid.patch_width,
                  "tile_patches_backward: wrong number or size of patches");
  const Launch launch(grad);
  grad = torch::stable::contiguous(grad);
  Tensor frames = empty(grad, {n, channels, frame_size[0], frame_size[1]}, dtype);
  check_floating(frames);
  check_launch(cuda::tile_patches_backward(grad.const_data_ptr(), dtype_of(grad), n, channels, grid,
                                           frames.mutable_data_ptr(), dtype_of(dtype), scale,
                                           launch.stream()),
               "tile_patches_backward");
  return frames;
}

Tensor fold_scores(Tensor scores, Sizes frame_size, Sizes patch_size, Sizes stride, bool cover,
                   bool maximum) {
  check_fold(scores, frame_size);
  const auto grid = grid_of(frame_size[0], frame_size[1], patch_size, stride, cover);
  check_sides(grid, "fold_scores");
  const int64_t n = scores.size(0);
  STD_TORCH_CHECK(scores.size(1) == grid.count(), "fold_scores: wrong number of patches");
  const Launch launch(scores);
  Tensor heatmap = empty(scores, {n, frame_size[0], frame_size[1]}, ScalarType::Float);
  check_launch(cuda::fold_scores(matrix_of(scores), dtype_of(scores), n, grid, maximum,
                                 mutable_floats(heatmap), launch.stream()),
               "fold_scores");
  return heatmap;
}

Tensor fold_scores_backward(Tensor grad, Tensor scores, Sizes patch_size, Sizes stride, bool cover,
                            bool maximum) {
  check_fold_backward(grad, scores);
  const auto grid = grid_of(grad.size(1), grad.size(2), patch_size, stride, cover);
  check_sides(grid, "fold_scores_backward");
  check_area(grid, "fold_scores_backward");
  const int64_t n = scores.size(0);
  STD_TORCH_CHECK(scores.size(1) == grid.count(), "fold_scores_backward: wrong patches");
  const Launch launch(grad, scores);
  grad = torch::stable::contiguous(grad);
  Tensor result = empty(scores, {n, scores.size(1)}, scores.scalar_type());
  check_launch(
      cuda::fold_scores_backward(floats(grad), matrix_of(scores), dtype_of(scores), n, grid,
                                 maximum, result.mutable_data_ptr(), launch.stream()),
      "fold_scores_backward");
  return result;
}

std::tuple<Tensor, Tensor> perturb_latent(Tensor latent, Tensor perturbation, double strength) {
  check_perturb(latent, perturbation);
  const int64_t n = latent.size(0), size = latent.size(1);
  const Launch launch(latent, perturbation);
  const auto plan = cuda::plan_rows(n, size);
  Tensor perturbed = empty(latent, {n, size}, latent.scalar_type());
  Tensor energy = empty(latent, {n}, ScalarType::Float);
  Tensor partials = partials_for(plan, n, latent);
  check_launch(
      cuda::perturb_latent(plan, matrix_of(latent), matrix_of(perturbation), dtype_of(latent),
                           strength, perturbed.mutable_data_ptr(), mutable_floats(energy),
                           partials.mutable_data_ptr(), launch.stream()),
      "perturb_latent");
  return {perturbed, energy};
}

Tensor perturb_latent_backward(Tensor grad_output, Tensor grad_energy, Tensor perturbation,
                               double strength) {
  check_perturb_backward(grad_output, grad_energy, perturbation);
  const int64_t n = perturbation.size(0), size = perturbation.size(1);
  const Launch launch(grad_output, grad_energy, perturbation);
  grad_energy = torch::stable::contiguous(grad_energy);
  Tensor result = empty(perturbation, {n, size}, perturbation.scalar_type());
  check_launch(cuda::perturb_latent_backward(cuda::plan_rows(n, size), matrix_of(grad_output),
                                             floats(grad_energy), matrix_of(perturbation),
                                             dtype_of(perturbation), strength,
                                             result.mutable_data_ptr(), launch.stream()),
               "perturb_latent_backward");
  return result;
}

cuda::ErrorPair error_pair(const Pair& pair, bool sigmoid) {
  return {samples_of(pair.values),           dtype_of(pair.values),
          samples_of(pair.target),           dtype_of(pair.target),
          static_cast<int32_t>(pair.passes), sigmoid};
}

template <int64_t Passes, bool Sigmoid>
Tensor squared_error(Tensor values, Tensor target) {
  const Launch launch(values, target);
  const Pair pair = paired(values, target, Passes);
  const auto plan = cuda::plan_rows(pair.n, pair.size);
  const Sizes shape = Passes == 1 ? Sizes{pair.n} : Sizes{Passes, pair.n};
  Tensor errors = empty(target, shape, ScalarType::Float);
  Tensor partials = partials_for(plan, Passes * pair.n, values);
  check_launch(cuda::squared_error(plan, error_pair(pair, Sigmoid), mutable_floats(errors),
                                   partials.mutable_data_ptr(), launch.stream()),
               "squared_error");
  return errors;
}

Tensor squared_error_backward(Tensor grad, Tensor values, Tensor target, bool sigmoid) {
  const Launch launch(grad, values, target);
  const Pair pair = paired_backward(grad, values, target);
  STD_TORCH_CHECK(pair.passes <= 2, "squared_error_backward: expected one or two passes");
  grad = torch::stable::contiguous(grad);
  Tensor result = empty(values, sizes_of(values), values.scalar_type());
  check_launch(
      cuda::squared_error_backward(cuda::plan_rows(pair.n, pair.size), error_pair(pair, sigmoid),
                                   floats(grad), result.mutable_data_ptr(), launch.stream()),
      "squared_error_backward");
  return result;
}

// So many pairs take 4 MiB.
constexpr int64_t kEarlyPatches = int64_t{1} << 18;

std::tuple<Tensor, Tensor> active_patches(Tensor frames, Tensor background, Sizes patch_size,
                                          Sizes stride, bool cover, ScalarType dtype, double scale,
                                          double shift, double threshold) {
  check_activity(frames, background);
  const auto grid = grid_of(frames.size(1), frames.size(2), patch_size, stride, cover);
  check_area(grid, "active_patches");
  const Launch launch(frames, background);
  const cuda::FrameView view = {
      frames.const_data_ptr(), DType::kUInt8,   frames.size(0), 1, frames.stride(0), 0,
      frames.stride(1),        frames.stride(2)};
  const int64_t patches = frames.size(0) * grid.count();
  const int64_t tiles = cuda::active_tiles(patches);
  // The flags, and behind them what has to be aligned to 8 bytes.
  const int64_t flag_bytes = (patches + 15) / 16 * 16;
  constexpr int64_t kPlaceBytes = sizeof(int64_t);
  Tensor scratch = empty(frames, {flag_bytes + kPlaceBytes * (tiles + 1)}, ScalarType::Byte);
  auto* flags = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  auto* offsets = reinterpret_cast<int64_t*>(flags + flag_bytes);
  // Where it costs little memory, pairs are written while the host waits for their number, to a
  // tensor with room for all patches.
  const bool early = patches <= kEarlyPatches;
  Tensor index = empty(frames, {early ? patches : 0, 2}, ScalarType::Long);
  auto* pairs = static_cast<int64_t*>(index.mutable_data_ptr());
  int64_t kept = 0;
  check_launch(cuda::active_count(view, matrix_of(background), grid,
                                  activity_limit(threshold, grid.patch_pixels()), flags, offsets,
                                  early ? pairs : nullptr, &kept, launch.stream()),
               "active_patches");
  Tensor cut = empty(frames, {kept, 1, patch_size[0], patch_size[1]}, dtype);
  check_floating(cut);
  // Without a patch to keep, `pairs` may be a null pointer, which would stand for all patches.
  if (kept == 0) return {cut, empty(frames, {0, 2}, ScalarType::Long)};
  if (!early) {
    index = empty(frames, {kept, 2}, ScalarType::Long);
    pairs = static_cast<int64_t*>(index.mutable_data_ptr());
    check_launch(cuda::active_index(flags, offsets, patches, grid.count(), pairs, launch.stream()),
                 "active_patches");
  }
  check_launch(cuda::tile_patches(view, grid, cut.mutable_data_ptr(), dtype_of(dtype), scale, shift,
                                  pairs, kept, launch.stream()),
               "active_patches");
  return {cut, early ? torch::stable::narrow(index, 0, 0, kept) : index};
}

}  // namespace
}  // namespace fastalps

STABLE_TORCH_LIBRARY_IMPL(fastalps, CUDA, m) {
  m.impl("tile_patches", TORCH_BOX(&fastalps::tile_patches));
  m.impl("tile_patches_backward", TORCH_BOX(&fastalps::tile_patches_backward));
  m.impl("fold_scores", TORCH_BOX(&fastalps::fold_scores));
  m.impl("fold_scores_backward", TORCH_BOX(&fastalps::fold_scores_backward));
  m.impl("perturb_latent", TORCH_BOX(&fastalps::perturb_latent));
  m.impl("perturb_latent_backward", TORCH_BOX(&fastalps::perturb_latent_backward));
  m.impl("per_sample_mse", TORCH_BOX((&fastalps::squared_error<1, false>)));
  m.impl("paired_mse", TORCH_BOX((&fastalps::squared_error<2, false>)));
  m.impl("sigmoid_mse", TORCH_BOX((&fastalps::squared_error<1, true>)));
  m.impl("paired_sigmoid_mse", TORCH_BOX((&fastalps::squared_error<2, true>)));
  m.impl("squared_error_backward", TORCH_BOX(&fastalps::squared_error_backward));
  m.impl("active_patches", TORCH_BOX(&fastalps::active_patches));
}
