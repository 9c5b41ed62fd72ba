// Registers the whole-network engine with torch. Schemas are defined in
// fastalps/engine/__init__.py.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/engine_plan.h"
#include "cpu/kernels.h"

namespace fastalps {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Bytes of activations a thread: blocks of fewer patches where the network's maps are large.
constexpr int64_t kScratchBytes = int64_t{8} << 20;

// The patches to score: where each begins, and its place in the result.
struct Patches {
  std::vector<int64_t> origins, positions;
};

EnginePlan read_plan(const Tensor& plan, const Tensor& weights, const Tensor& words) {
  STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Long && plan.is_contiguous() &&
                      weights.scalar_type() == ScalarType::Float && weights.is_contiguous() &&
                      words.scalar_type() == ScalarType::Int && words.is_contiguous(),
                  "engine: expected a contiguous int64 plan, float32 weights and int32 words");
  return EnginePlan(static_cast<const int64_t*>(plan.const_data_ptr()), plan.numel(),
                    static_cast<const float*>(weights.const_data_ptr()), weights.numel(),
                    static_cast<const int32_t*>(words.const_data_ptr()), words.numel());
}

const float* noise_of(const MaybeTensor& noise, int64_t positions, int64_t latent) {
  if (!noise) return nullptr;
  STD_TORCH_CHECK(noise->scalar_type() == ScalarType::Float && noise->is_contiguous() &&
                      noise->numel() == positions * latent,
                  "engine: expected contiguous float32 noise, a latent vector for each patch");
  return static_cast<const float*>(noise->const_data_ptr());
}

// Threads take blocks of patches in turn, so that none waits for a slower one. A block's result
// depends neither on the thread nor on the block's size: lanes never meet.
void run_engine(const EngineArguments& a, const Patches& patches, const Tensor& like) {
  const int64_t count = static_cast<int64_t>(patches.origins.size());
  if (count == 0) return;
  const int64_t lanes = kernels().lanes;
  const int64_t vectors = (count + lanes - 1) / lanes;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), vectors);
  const int64_t lane_bytes = a.network->scratch() * static_cast<int64_t>(sizeof(float));
  int64_t width = std::min<int64_t>(kBlockVectors, (vectors + threads - 1) / threads);
  while (width > 1 && width * lanes * lane_bytes > kScratchBytes) --width;
  const int64_t blocks = (vectors + width - 1) / width;
  // Of torch's allocator, which keeps its memory from call to call; aligned to cache lines.
  const int64_t room = width * lanes * a.network->scratch() + 16;
  Tensor scratch = empty(like, {threads, room}, ScalarType::Float);
  float* const memory = static_cast<float*>(scratch.mutable_data_ptr());

  const EngineBlock run_block = engine_block(a.network->precision);
  std::atomic<int64_t> next_block{0}, next_thread{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      float* mine = memory + next_thread++ * room;
      mine += (64 - reinterpret_cast<uintptr_t>(mine) % 64) % 64 / sizeof(float);
      for (int64_t block = next_block++; block < blocks; block = next_block++) {
        const int64_t first = block * width * lanes;
        const int64_t taken = std::min(width * lanes, count - first);
        run_block(a, first, taken, static_cast<int>((taken + lanes - 1) / lanes), mine);
      }
    }
  });
}

EngineArguments arguments_of(const Network& network, const Tensor& pixels, const Patches& patches,
                             const MaybeTensor& noise, bool normal, bool perturbed, Tensor& errors,
                             int64_t positions) {
  const DType type = dtype_of(pixels);
  STD_TORCH_CHECK(type == DType::kUInt8 || type == DType::kFloat32,
                  "engine: expected uint8 or float32 pixels");
  STD_TORCH_CHECK(pixels.size(1) == network.channels, "engine: wrong number of channels");
  STD_TORCH_CHECK(normal || perturbed, "engine: expected a pass to run");
  STD_TORCH_CHECK(!perturbed || noise || network.perturbs(),
                  "engine: expected noise for a network without a distorter");
  return {&network,
          pixels.const_data_ptr(),
          type,
          patches.origins.data(),
          patches.positions.data(),
          pixels.stride(1),
          pixels.stride(2),
          pixels.stride(3),
          noise_of(noise, positions, network.latent),
          normal,
          perturbed,
          static_cast<float*>(errors.mutable_data_ptr()),
          positions};
}

Tensor engine_images(Tensor images, Tensor plan, Tensor weights, Tensor words, MaybeTensor noise,
                     bool normal, bool perturbed) {
  STD_TORCH_CHECK(images.dim() == 4, "engine_images: expected (N, C, H, W)");
  const EnginePlan engine = read_plan(plan, weights, words);
  const Network& network = engine.network;
  STD_TORCH_CHECK(images.size(2) == network.height && images.size(3) == network.width,
                  "engine_images: wrong size of the images");
  const int64_t n = images.size(0);
  Tensor errors = empty(images, {normal + perturbed, n}, ScalarType::Float);
  Patches patches;
  for (int64_t i = 0; i < n; ++i) {
    patches.origins.push_back(i * images.stride(0));
    patches.positions.push_back(i);
  }
  run_engine(arguments_of(network, images, patches, noise, normal, perturbed, errors, n), patches,
             images);
  return errors;
}

// Which patches differ from the background: (N, P) bytes, 0 or 1.
std::vector<uint8_t> moving(const Tensor& frames, const Tensor& background, const Grid& grid,
                            double threshold) {
  STD_TORCH_CHECK(frames.size(1) == 1 && frames.scalar_type() == ScalarType::Byte &&
                      background.scalar_type() == ScalarType::Byte && background.dim() == 2 &&
                      background.size(0) == frames.size(2) && background.size(1) == frames.size(3),
                  "engine_frames: expected uint8 (N, 1, H, W) and (H, W) for the gate");
  const Tensor dense = torch::stable::contiguous(background);
  const int64_t tasks = frames.size(0) * grid.rows.count;
  std::vector<uint8_t> active(frames.size(0) * grid.patches());
  const ActivityArguments a = {static_cast<const uint8_t*>(frames.const_data_ptr()),
                               {frames.stride(0), frames.stride(2), frames.stride(3)},
                               static_cast<const uint8_t*>(dense.const_data_ptr()),
                               grid,
                               activity_limit(threshold, grid.rows.patch * grid.columns.patch),
                               active.data()};
  torch::stable::parallel_for(
      0, tasks, 1, [&](int64_t begin, int64_t end) { kernels().activity(a, begin, end); });
  return active;
}

std::tuple<Tensor, Tensor> engine_frames(Tensor frames, MaybeTensor background, double threshold,
                                         Sizes stride, bool cover, Tensor plan, Tensor weights,
                                         Tensor words, MaybeTensor noise, bool normal,
                                         bool perturbed) {
  STD_TORCH_CHECK(frames.dim() == 4, "engine_frames: expected (N, C, H, W)");
  const EnginePlan engine = read_plan(plan, weights, words);
  const Network& network = engine.network;
  const Sizes patch = {network.height, network.width};
  check_grid(frames.size(2), frames.size(3), patch, stride);
  const Grid grid = {Axis(frames.size(2), patch[0], stride[0], cover),
                     Axis(frames.size(3), patch[1], stride[1], cover)};
  const int64_t n = frames.size(0), positions = n * grid.patches();
  Tensor errors = empty(frames, {normal + perturbed, n, grid.patches()}, ScalarType::Float);
  Tensor kept = empty(frames, {n, grid.patches()}, ScalarType::Bool);
  if (positions == 0) return {errors, kept};
  // What the gate drops scores 0.
  std::memset(errors.mutable_data_ptr(), 0, errors.numel() * sizeof(float));
  uint8_t* keep = static_cast<uint8_t*>(kept.mutable_data_ptr());
  if (background) {
    const std::vector<uint8_t> active = moving(frames, *background, grid, threshold);
    std::memcpy(keep, active.data(), active.size());
  } else {
    std::memset(keep, 1, positions);
  }
  Patches patches;
  for (int64_t i = 0; i < positions; ++i) {
    if (!keep[i]) continue;
    const int64_t p = i % grid.patches();
    patches.origins.push_back(i / grid.patches() * frames.stride(0) +
                              grid.rows.origin(p / grid.columns.count) * frames.stride(2) +
                              grid.columns.origin(p % grid.columns.count) * frames.stride(3));
    patches.positions.push_back(i);
  }
  run_engine(arguments_of(network, frames, patches, noise, normal, perturbed, errors, positions),
             patches, frames);
  return {errors, kept};
}

}  // namespace
}  // namespace fastalps

STABLE_TORCH_LIBRARY_IMPL(fastalps, CPU, m) {
  m.impl("engine_images", TORCH_BOX(&fastalps::engine_images));
  m.impl("engine_frames", TORCH_BOX(&fastalps::engine_frames));
}
