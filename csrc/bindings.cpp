// Registers the CPU kernels with torch. Only the stable ABI is used: one build serves every torch
// from 2.10 on, and no Python. Schemas are defined in fastalps/ops.py, which also validates; what
// is checked here guards direct calls of the raw ops.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"

namespace fastalps {
namespace {

// Results above this many bytes are written past the caches. Tuned on a 2-core EPYC (32 MiB L3)
// with `python bench/run.py ops`: below it, the next op finds the result in the cache.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;
// Elements of a sample that one task sums; fixed, so that results do not depend on the threads.
constexpr int64_t kChunk = 1 << 16;

bool streams(int64_t bytes) { return bytes > kStreamBytes; }

Grid grid_of(int64_t height, int64_t width, const Sizes& patch, const Sizes& stride, bool cover) {
  check_grid(height, width, patch, stride);
  return {Axis(height, patch[0], stride[0], cover), Axis(width, patch[1], stride[1], cover)};
}

// Runs kernel(arguments, begin, end) over `tasks` of `cost` elements each.
template <typename Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments,
         int64_t tasks, int64_t cost) {
  const int64_t grain = cost > 0 && cost < kGrain ? kGrain / cost : 1;
  torch::stable::parallel_for(0, tasks, grain,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

Tensor tile_patches(Tensor frames, Sizes patch_size, Sizes stride, bool cover, ScalarType dtype,
                    double scale, double shift) {
  check_tile(frames);
  const auto size = frames.sizes();
  const auto strides = frames.strides();
  const Grid grid = grid_of(size[2], size[3], patch_size, stride, cover);
  const Sizes shape = {size[0], grid.patches(), size[1], patch_size[0], patch_size[1]};
  Tensor patches = empty(frames, shape, dtype);
  check_floating(patches);
  TileArguments a = {frames.const_data_ptr(),
                     dtype_of(frames),
                     size[1],
                     {strides[0], strides[1], strides[2], strides[3]},
                     grid,
                     patches.mutable_data_ptr(),
                     dtype_of(dtype),
                     scale,
                     shift,
                     false};
  a.stream = streams(elements(shape) * element_size(a.patches_type));
  if (elements(shape) == 0) return patches;
  run(kernels().tile_patches, a, size[0] * grid.rows.count,
      elements(shape) / (size[0] * grid.rows.count));
  return patches;
}

Tensor tile_patches_backward(Tensor grad, Sizes frame_size, Sizes patch_size, Sizes stride,
                             bool cover, ScalarType dtype, double scale) {
  check_tile_backward(grad, frame_size);
  grad = torch::stable::contiguous(grad);
  const Grid grid = grid_of(frame_size[0], frame_size[1], patch_size, stride, cover);
  const auto size = grad.sizes();
  STD_TORCH_CHECK(size[1] == grid.patches(), "tile_patches_backward: wrong number of patches");
  const Sizes shape = {size[0], size[2], frame_size[0], frame_size[1]};
  Tensor frames = empty(grad, shape, dtype);
  check_floating(frames);
  const TileBackwardArguments a = {grad.const_data_ptr(),     dtype_of(grad),  size[2], grid,
                                   frames.mutable_data_ptr(), dtype_of(dtype), scale};
  run(kernels().tile_patches_backward, a, size[0] * size[2] * frame_size[0], frame_size[1]);
  return frames;
}

// First pixel rows of the bands that the same rows of patches cover, and the height last.
Sizes bands_of(const Axis& rows) {
  Sizes bands;
  int64_t first = 0, last = 0;
  for (int64_t y = 0; y < rows.size; ++y) {
    const int64_t first_before = first, last_before = last;
    rows.advance(y, first, last);
    if (y == 0 || first != first_before || last != last_before) bands.push_back(y);
  }
  bands.push_back(rows.size);
  return bands;
}

Tensor fold_scores(Tensor scores, Sizes frame_size, Sizes patch_size, Sizes stride, bool cover,
                   bool maximum) {
  check_fold(scores, frame_size);
  scores = torch::stable::contiguous(scores);
  const Grid grid = grid_of(frame_size[0], frame_size[1], patch_size, stride, cover);
  const int64_t n = scores.size(0);
  STD_TORCH_CHECK(scores.size(1) == grid.patches(), "fold_scores: wrong number of patches");
  const Sizes shape = {n, frame_size[0], frame_size[1]};
  Tensor heatmap = empty(scores, shape, ScalarType::Float);
  const Sizes bands = bands_of(grid.rows);
  const int64_t count = static_cast<int64_t>(bands.size()) - 1;
  const FoldArguments a = {scores.const_data_ptr(),
                           dtype_of(scores),
                           grid,
                           bands.data(),
                           count,
                           static_cast<float*>(heatmap.mutable_data_ptr()),
                           maximum,
                           streams(elements(shape) * 4)};
  run(kernels().fold_scores, a, n * count, frame_size[0] * frame_size[1] / count);
  return heatmap;
}

Tensor fold_scores_backward(Tensor grad, Tensor scores, Sizes patch_size, Sizes stride, bool cover,
                            bool maximum) {
  check_fold_backward(grad, scores);
  grad = torch::stable::contiguous(grad);
  scores = torch::stable::contiguous(scores);
  const Grid grid = grid_of(grad.size(1), grad.size(2), patch_size, stride, cover);
  STD_TORCH_CHECK(scores.size(1) == grid.patches(), "fold_scores_backward: wrong patches");
  Tensor result = empty(scores, {scores.size(0), scores.size(1)}, scores.scalar_type());
  const FoldBackwardArguments a = {static_cast<const float*>(grad.const_data_ptr()),
                                   scores.const_data_ptr(),
                                   dtype_of(scores),
                                   grid,
                                   result.mutable_data_ptr(),
                                   maximum};
  run(kernels().fold_scores_backward, a, scores.size(0) * grid.rows.count,
      patch_size[0] * grad.size(2));
  return result;
}

// (N, D) whose rows are dense; the rows may be any distance apart.
Tensor dense_rows(const Tensor& tensor) {
  if (tensor.size(1) <= 1 || tensor.stride(1) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

std::tuple<Tensor, Tensor> perturb_latent(Tensor latent, Tensor perturbation, double strength) {
  check_perturb(latent, perturbation);
  latent = dense_rows(latent);
  perturbation = dense_rows(perturbation);
  const int64_t n = latent.size(0), size = latent.size(1);
  Tensor perturbed = empty(latent, {n, size}, latent.scalar_type());
  Tensor energy = empty(latent, {n}, ScalarType::Float);
  const PerturbArguments a = {latent.const_data_ptr(),
                              perturbation.const_data_ptr(),
                              dtype_of(latent),
                              latent.stride(0),
                              perturbation.stride(0),
                              size,
                              strength,
                              perturbed.mutable_data_ptr(),
                              static_cast<float*>(energy.mutable_data_ptr()),
                              streams(n * size * element_size(dtype_of(latent)))};
  run(kernels().perturb_latent, a, n, size);
  return {perturbed, energy};
}

Tensor perturb_latent_backward(Tensor grad_output, Tensor grad_energy, Tensor perturbation,
                               double strength) {
  check_perturb_backward(grad_output, grad_energy, perturbation);
  grad_output = dense_rows(grad_output);
  perturbation = dense_rows(perturbation);
  grad_energy = torch::stable::contiguous(grad_energy);
  const int64_t n = perturbation.size(0), size = perturbation.size(1);
  Tensor result = empty(perturbation, {n, size}, perturbation.scalar_type());
  const PerturbBackwardArguments a = {grad_output.const_data_ptr(),
                                      static_cast<const float*>(grad_energy.const_data_ptr()),
                                      perturbation.const_data_ptr(),
                                      dtype_of(perturbation),
                                      grad_output.stride(0),
                                      perturbation.stride(0),
                                      size,
                                      strength,
                                      result.mutable_data_ptr(),
                                      streams(n * size * element_size(dtype_of(perturbation)))};
  run(kernels().perturb_latent_backward, a, n, size);
  return result;
}

int64_t chunks_of(int64_t size) { return size > kChunk ? (size + kChunk - 1) / kChunk : 1; }

template <int64_t Passes, bool Sigmoid>
Tensor squared_error(Tensor values, Tensor target) {
  const Pair pair = paired(values, target, Passes);
  const Sizes shape = Passes == 1 ? Sizes{pair.n} : Sizes{Passes, pair.n};
  Tensor result = empty(target, shape, ScalarType::Float);
  const int64_t chunks = chunks_of(pair.size);
  std::vector<double> partial(Passes * pair.n * chunks);
  const SquaredErrorArguments a = {pair.values.const_data_ptr(),
                                   pair.target.const_data_ptr(),
                                   dtype_of(pair.values),
                                   dtype_of(pair.target),
                                   pair.values.stride(0),
                                   pair.target.stride(0),
                                   pair.n,
                                   pair.size,
                                   Passes,
                                   kChunk,
                                   chunks,
                                   Sigmoid,
                                   partial.data()};
  run(kernels().squared_error, a, pair.n * chunks, pair.size / chunks);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t row = 0; row < Passes * pair.n; ++row) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[row * chunks + chunk];
    to[row] = static_cast<float>(total / static_cast<double>(pair.size));
  }
  return result;
}

Tensor squared_error_backward(Tensor grad, Tensor values, Tensor target, bool sigmoid) {
  const Pair pair = paired_backward(grad, values, target);
  const int64_t n = pair.n;
  Tensor result = empty(values, sizes_of(values), values.scalar_type());
  grad = torch::stable::contiguous(grad);
  const int64_t chunks = chunks_of(pair.size);
  const int64_t rows = pair.passes * n;
  const SquaredErrorBackwardArguments a = {
      static_cast<const float*>(grad.const_data_ptr()),
      pair.values.const_data_ptr(),
      pair.target.const_data_ptr(),
      dtype_of(pair.values),
      dtype_of(pair.target),
      pair.values.stride(0),
      pair.target.stride(0),
      n,
      pair.size,
      kChunk,
      chunks,
      sigmoid,
      result.mutable_data_ptr(),
      streams(rows * pair.size * element_size(dtype_of(pair.values)))};
  run(kernels().squared_error_backward, a, rows * chunks, pair.size / chunks);
  return result;
}

std::tuple<Tensor, Tensor> active_patches(Tensor frames, Tensor background, Sizes patch_size,
                                          Sizes stride, bool cover, ScalarType dtype, double scale,
                                          double shift, double threshold) {
  check_activity(frames, background);
  background = torch::stable::contiguous(background);
  const int64_t n = frames.size(0);
  const Grid grid = grid_of(frames.size(1), frames.size(2), patch_size, stride, cover);
  const int64_t area = patch_size[0] * patch_size[1];
  std::vector<uint8_t> active(n * grid.patches());
  const ActivityArguments activity = {static_cast<const uint8_t*>(frames.const_data_ptr()),
                                      {frames.stride(0), frames.stride(1), frames.stride(2)},
                                      static_cast<const uint8_t*>(background.const_data_ptr()),
                                      grid,
                                      activity_limit(threshold, area),
                                      active.data()};
  run(kernels().activity, activity, n * grid.rows.count, grid.columns.count * area);

  int64_t kept = 0;
  for (const uint8_t one : active) kept += one;
  Tensor index = empty(frames, {kept, 2}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(index.mutable_data_ptr());
  for (int64_t i = 0; i < static_cast<int64_t>(active.size()); ++i) {
    if (!active[i]) continue;
    *to++ = i / grid.patches();
    *to++ = i % grid.patches();
  }
  Tensor patches = empty(frames, {kept, 1, patch_size[0], patch_size[1]}, dtype);
  check_floating(patches);
  GatherArguments gather = {{frames.const_data_ptr(),
                             DType::kUInt8,
                             1,
                             {frames.stride(0), 0, frames.stride(1), frames.stride(2)},
                             grid,
                             patches.mutable_data_ptr(),
                             dtype_of(dtype),
                             scale,
                             shift,
                             false},
                            static_cast<const int64_t*>(index.const_data_ptr())};
  gather.tile.stream = streams(kept * area * element_size(gather.tile.patches_type));
  run(kernels().gather, gather, kept, area);
  return {patches, index};
}

}  // namespace
}  // namespace fastalps

STABLE_TORCH_LIBRARY_IMPL(fastalps, CPU, m) {
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

// Which instruction set runs, and which of the engine's own, for reports: called by ctypes.
extern "C" __attribute__((visibility("default"))) const char* fastalps_cpu_capability() {
  return fastalps::kernels_description();
}
