// Registers the CPU kernels with torch. Only the stable ABI is used: one build serves every torch
// from 2.10 on, and no Python. Schemas are defined in fastalps/ops.py, which also validates; what
// is checked here guards direct calls of the raw ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace fastalps {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Results above this many bytes are written past the caches. Tuned on a 2-core EPYC (32 MiB L3)
// with `python bench/run.py ops`: below it, the next op finds the result in the cache.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;
// Elements of a sample that one task sums; fixed, so that results do not depend on the threads.
constexpr int64_t kChunk = 1 << 16;

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "fastalps: expected uint8 or a floating dtype");
  }
}

DType dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

void check_floating(const Tensor& tensor) {
  STD_TORCH_CHECK(dtype_of(tensor) != DType::kUInt8, "fastalps: expected a floating dtype");
}

Tensor empty(const Tensor& like, const Sizes& size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}

int64_t elements(const Sizes& size) {
  int64_t count = 1;
  for (const int64_t part : size) count *= part;
  return count;
}

bool streams(int64_t bytes) { return bytes > kStreamBytes; }

Grid grid_of(int64_t height, int64_t width, const Sizes& patch, const Sizes& stride, bool cover) {
  STD_TORCH_CHECK(patch.size() == 2 && stride.size() == 2, "fastalps: expected pairs of sizes");
  STD_TORCH_CHECK(patch[0] > 0 && patch[1] > 0 && stride[0] > 0 && stride[1] > 0,
                  "fastalps: patch and stride must be positive");
  STD_TORCH_CHECK(patch[0] <= height && patch[1] <= width,
                  "fastalps: the patch is larger than the frame");
  return {Axis(height, patch[0], stride[0], cover), Axis(width, patch[1], stride[1], cover)};
}

// Runs kernel(arguments, begin, end) over `tasks` of `cost` elements each.
template <typename Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments,
         int64_t tasks, int64_t cost) {
  const int64_t grain = cost > 0 && cost < kGrain ? kGrain / cost : 1;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    kernel(arguments, begin, end);
  });
}

Tensor tile_patches(Tensor frames, Sizes patch_size, Sizes stride, bool cover, ScalarType dtype,
                    double scale, double shift) {
  STD_TORCH_CHECK(frames.dim() == 4, "tile_patches: expected (N, C, H, W)");
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
  STD_TORCH_CHECK(grad.dim() == 5 && frame_size.size() == 2,
                  "tile_patches_backward: expected (N, P, C, ph, pw)");
  grad = torch::stable::contiguous(grad);
  const Grid grid = grid_of(frame_size[0], frame_size[1], patch_size, stride, cover);
  const auto size = grad.sizes();
  STD_TORCH_CHECK(size[1] == grid.patches(), "tile_patches_backward: wrong number of patches");
  const Sizes shape = {size[0], size[2], frame_size[0], frame_size[1]};
  Tensor frames = empty(grad, shape, dtype);
  check_floating(grad);
  check_floating(frames);
  const TileBackwardArguments a = {grad.const_data_ptr(), dtype_of(grad),  size[2], grid,
                                   frames.mutable_data_ptr(), dtype_of(dtype), scale};
  run(kernels().tile_patches_backward, a, size[0] * size[2] * frame_size[0], frame_size[1]);
  return frames;
}

// First pixel rows of the bands that the same rows of patches cover, and the height last.
Sizes bands_of(const Axis& rows) {
  Sizes bands;
  int64_t first = -1, holders = -1;
  for (int64_t y = 0; y < rows.size; ++y) {
    if (rows.first(y) != first || rows.holders(y) != holders) {
      first = rows.first(y);
      holders = rows.holders(y);
      bands.push_back(y);
    }
  }
  bands.push_back(rows.size);
  return bands;
}

Tensor fold_scores(Tensor scores, Sizes frame_size, Sizes patch_size, Sizes stride, bool cover,
                   bool maximum) {
  STD_TORCH_CHECK(scores.dim() == 2 && frame_size.size() == 2, "fold_scores: expected (N, P)");
  check_floating(scores);
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
  STD_TORCH_CHECK(grad.dim() == 3 && scores.dim() == 2 && grad.size(0) == scores.size(0) &&
                      grad.scalar_type() == ScalarType::Float,
                  "fold_scores_backward: expected float32 (N, H, W) and (N, P)");
  check_floating(scores);
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
  run(kernels().fold_scores_backward, a, scores.size(0), grad.size(1) * grad.size(2));
  return result;
}

// (N, D) whose rows are dense; the rows may be any distance apart.
Tensor dense_rows(const Tensor& tensor) {
  if (tensor.size(1) <= 1 || tensor.stride(1) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

std::tuple<Tensor, Tensor> perturb_latent(Tensor latent, Tensor perturbation, double strength) {
  STD_TORCH_CHECK(latent.dim() == 2 && perturbation.dim() == 2 &&
                      latent.size(0) == perturbation.size(0) &&
                      latent.size(1) == perturbation.size(1) &&
                      latent.scalar_type() == perturbation.scalar_type(),
                  "perturb_latent: expected two (N, D) of one dtype");
  check_floating(latent);
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
  STD_TORCH_CHECK(grad_output.dim() == 2 && perturbation.dim() == 2 &&
                      grad_output.size(0) == perturbation.size(0) &&
                      grad_output.size(1) == perturbation.size(1) &&
                      grad_output.scalar_type() == perturbation.scalar_type() &&
                      grad_energy.numel() == perturbation.size(0) &&
                      grad_energy.scalar_type() == ScalarType::Float,
                  "perturb_latent_backward: expected two (N, D) of one dtype and float32 (N,)");
  check_floating(perturbation);
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

// Whether the elements of each sample fill one block of memory, in any order of the dimensions.
bool dense_samples(const Tensor& tensor) {
  const auto size = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t dims = tensor.dim();
  int64_t expected = 1;
  std::vector<bool> seen(dims, false);
  for (int64_t round = 1; round < dims; ++round) {
    int64_t found = -1;
    for (int64_t d = 1; d < dims && found < 0; ++d) {
      if (!seen[d] && (size[d] == 1 || strides[d] == expected)) found = d;
    }
    if (found < 0) return false;
    seen[found] = true;
    expected *= size[found];
  }
  return true;
}

bool same_order(const Tensor& a, const Tensor& b) {
  for (int64_t d = 1; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

struct Pair {
  Tensor values, target;
  int64_t n, size, passes;
};

// Both tensors such that a sample of each can be read as one flat run in the same order.
Pair paired(Tensor values, Tensor target, int64_t passes) {
  STD_TORCH_CHECK(values.dim() == target.dim() && target.dim() >= 1 &&
                      values.size(0) == passes * target.size(0),
                  "fastalps: expected (S * N, ...) and (N, ...)");
  int64_t size = 1;
  for (int64_t d = 1; d < target.dim(); ++d) {
    STD_TORCH_CHECK(values.size(d) == target.size(d), "fastalps: sizes of the samples differ");
    size *= target.size(d);
  }
  check_floating(values);
  check_floating(target);
  STD_TORCH_CHECK((dtype_of(values) == DType::kFloat64) == (dtype_of(target) == DType::kFloat64),
                  "fastalps: float64 goes with float64 only");
  if (!same_order(values, target) || !dense_samples(values) || !dense_samples(target)) {
    values = torch::stable::contiguous(values);
    target = torch::stable::contiguous(target);
  }
  const int64_t n = target.size(0);
  return {std::move(values), std::move(target), n, size, passes};
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
  STD_TORCH_CHECK(target.dim() >= 1 && grad.dim() == 1 && grad.scalar_type() == ScalarType::Float,
                  "squared_error_backward: expected float32 (S * N,)");
  const int64_t n = target.size(0);
  STD_TORCH_CHECK(values.dim() >= 1 && grad.size(0) == values.size(0) &&
                      (n == 0 || values.size(0) % n == 0),
                  "squared_error_backward: expected a gradient for each sample");
  const auto size = values.sizes();
  Tensor result = empty(values, Sizes(size.begin(), size.end()), values.scalar_type());
  if (n == 0) return result;
  // The result is contiguous, so the inputs are read in that order.
  const Pair pair = paired(torch::stable::contiguous(values), torch::stable::contiguous(target),
                           values.size(0) / n);
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
  STD_TORCH_CHECK(frames.dim() == 3 && background.dim() == 2 &&
                      frames.size(1) == background.size(0) &&
                      frames.size(2) == background.size(1) &&
                      frames.scalar_type() == ScalarType::Byte &&
                      background.scalar_type() == ScalarType::Byte,
                  "active_patches: expected uint8 (N, H, W) and (H, W)");
  background = torch::stable::contiguous(background);
  const int64_t n = frames.size(0);
  const Grid grid = grid_of(frames.size(1), frames.size(2), patch_size, stride, cover);
  const int64_t area = patch_size[0] * patch_size[1];
  std::vector<uint8_t> active(n * grid.patches());
  const ActivityArguments activity = {
      static_cast<const uint8_t*>(frames.const_data_ptr()),
      {frames.stride(0), frames.stride(1), frames.stride(2)},
      static_cast<const uint8_t*>(background.const_data_ptr()),
      grid,
      static_cast<int64_t>(std::floor(threshold * static_cast<double>(area))),
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
  GatherArguments gather = {
      {frames.const_data_ptr(),
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

// Which instruction set runs, for reports: called by ctypes.
extern "C" __attribute__((visibility("default"))) const char* fastalps_cpu_capability() {
  return fastalps::kernels().name;
}
