// What the bindings of every device share: the guards of direct calls of the raw ops, and the
// layouts that the kernels read. Only the stable ABI is used, as in the bindings.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "dtype.h"

namespace fastalps {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline DType dtype_of(ScalarType type) {
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

inline DType dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

inline void check_floating(const Tensor& tensor) {
  STD_TORCH_CHECK(dtype_of(tensor) != DType::kUInt8, "fastalps: expected a floating dtype");
}

inline Tensor empty(const Tensor& like, const Sizes& size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}

inline int64_t elements(const Sizes& size) {
  int64_t count = 1;
  for (const int64_t part : size) count *= part;
  return count;
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto size = tensor.sizes();
  return Sizes(size.begin(), size.end());
}

inline void check_grid(int64_t height, int64_t width, const Sizes& patch, const Sizes& stride) {
  STD_TORCH_CHECK(patch.size() == 2 && stride.size() == 2, "fastalps: expected pairs of sizes");
  STD_TORCH_CHECK(patch[0] > 0 && patch[1] > 0 && stride[0] > 0 && stride[1] > 0,
                  "fastalps: patch and stride must be positive");
  STD_TORCH_CHECK(patch[0] <= height && patch[1] <= width,
                  "fastalps: the patch is larger than the frame");
}

inline void check_tile(const Tensor& frames) {
  STD_TORCH_CHECK(frames.dim() == 4, "tile_patches: expected (N, C, H, W)");
}

inline void check_tile_backward(const Tensor& grad, const Sizes& frame_size) {
  STD_TORCH_CHECK(grad.dim() == 5 && frame_size.size() == 2,
                  "tile_patches_backward: expected (N, P, C, ph, pw)");
  check_floating(grad);
}

inline void check_fold(const Tensor& scores, const Sizes& frame_size) {
  STD_TORCH_CHECK(scores.dim() == 2 && frame_size.size() == 2, "fold_scores: expected (N, P)");
  check_floating(scores);
}

inline void check_fold_backward(const Tensor& grad, const Tensor& scores) {
  STD_TORCH_CHECK(grad.dim() == 3 && scores.dim() == 2 && grad.size(0) == scores.size(0) &&
                      grad.scalar_type() == ScalarType::Float,
                  "fold_scores_backward: expected float32 (N, H, W) and (N, P)");
  check_floating(scores);
}

inline void check_perturb(const Tensor& latent, const Tensor& perturbation) {
  STD_TORCH_CHECK(latent.dim() == 2 && perturbation.dim() == 2 &&
                      latent.size(0) == perturbation.size(0) &&
                      latent.size(1) == perturbation.size(1) &&
                      latent.scalar_type() == perturbation.scalar_type(),
                  "perturb_latent: expected two (N, D) of one dtype");
  check_floating(latent);
}

inline void check_perturb_backward(const Tensor& grad_output, const Tensor& grad_energy,
                                   const Tensor& perturbation) {
  STD_TORCH_CHECK(grad_output.dim() == 2 && perturbation.dim() == 2 &&
                      grad_output.size(0) == perturbation.size(0) &&
                      grad_output.size(1) == perturbation.size(1) &&
                      grad_output.scalar_type() == perturbation.scalar_type() &&
                      grad_energy.numel() == perturbation.size(0) &&
                      grad_energy.scalar_type() == ScalarType::Float,
                  "perturb_latent_backward: expected two (N, D) of one dtype and float32 (N,)");
  check_floating(perturbation);
}

// Whether the elements of each sample fill one block of memory, in any order of the dimensions.
inline bool dense_samples(const Tensor& tensor) {
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

inline bool same_order(const Tensor& a, const Tensor& b) {
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
inline Pair paired(Tensor values, Tensor target, int64_t passes) {
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

// `paired` for the gradient of the values, which is contiguous: so the inputs are read in that
// order, and there must be a gradient for each sample.
inline Pair paired_backward(const Tensor& grad, const Tensor& values, const Tensor& target) {
  STD_TORCH_CHECK(target.dim() >= 1 && grad.dim() == 1 && grad.scalar_type() == ScalarType::Float,
                  "squared_error_backward: expected float32 (S * N,)");
  const int64_t n = target.size(0);
  STD_TORCH_CHECK(values.dim() >= 1 && grad.size(0) == values.size(0) &&
                      (n == 0 ? values.size(0) == 0 : values.size(0) % n == 0),
                  "squared_error_backward: expected a gradient for each sample");
  return paired(torch::stable::contiguous(values), torch::stable::contiguous(target),
                n == 0 ? 1 : values.size(0) / n);
}

inline void check_activity(const Tensor& frames, const Tensor& background) {
  STD_TORCH_CHECK(
      frames.dim() == 3 && background.dim() == 2 && frames.size(1) == background.size(0) &&
          frames.size(2) == background.size(1) && frames.scalar_type() == ScalarType::Byte &&
          background.scalar_type() == ScalarType::Byte,
      "active_patches: expected uint8 (N, H, W) and (H, W)");
}

// The sum of absolute differences that an active patch of `area` pixels exceeds.
inline int64_t activity_limit(double threshold, int64_t area) {
  const double most = 255.0 * static_cast<double>(area);
  const double limit = std::floor(threshold * static_cast<double>(area));
  return static_cast<int64_t>(limit < most ? limit : most);
}

}  // namespace fastalps
