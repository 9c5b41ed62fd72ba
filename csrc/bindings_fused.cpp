// Registers the fused scoring kernels with torch: the stable ABI only. The schema is defined in
// fastalps/fused/. Nothing here allocates or waits for the device, so a CUDA graph captures it.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cuda/fused.h"

namespace fastalps {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kAlignment = 16;
constexpr int64_t kMostPatches = std::numeric_limits<int32_t>::max() / 2;

void check_cuda(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "fused_errors: ", cudaGetErrorString(status));
}

void check_buffer(const Tensor& tensor, ScalarType type, int64_t least, int32_t device,
                  const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device &&
                      tensor.scalar_type() == type && tensor.is_contiguous() &&
                      tensor.numel() >= least,
                  "fused_errors: ", name, " has the wrong device, dtype, layout or size");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0,
                  "fused_errors: ", name, " is not aligned to 16 bytes");
}

// Networks whose kernels were built at run time, by their libraries' functions; their shapes'
// numbers begin here.
constexpr int64_t kFirstLoaded = 1000;
struct LoadedNetwork {
  bool (*sizes)(cuda::FusedSizes*);
  cudaError_t (*errors)(const cuda::FusedCall*, cudaStream_t);
};
std::mutex loaded_mutex;
std::vector<LoadedNetwork> loaded_networks;

LoadedNetwork loaded_network(int64_t shape) {
  const std::lock_guard<std::mutex> lock(loaded_mutex);
  const auto number = static_cast<size_t>(shape - kFirstLoaded);
  return number < loaded_networks.size() ? loaded_networks[number] : LoadedNetwork{};
}

bool sizes_of(int64_t shape, cuda::FusedSizes* sizes) {
  if (shape < kFirstLoaded) return cuda::fused_sizes(shape, sizes);
  const LoadedNetwork network = loaded_network(shape);
  return network.sizes != nullptr && network.sizes(sizes);
}

cudaError_t errors_of(const cuda::FusedCall& call, cudaStream_t stream) {
  if (call.shape < kFirstLoaded) return cuda::fused_errors(call, stream);
  return loaded_network(call.shape).errors(&call, stream);
}

void check_options(const Tensor& frames, int64_t bound, int64_t smoothing, bool normal,
                   bool perturbed, int64_t chunk) {
  STD_TORCH_CHECK(
      frames.is_cuda() && frames.dim() == 3 &&
          (frames.scalar_type() == ScalarType::Byte || frames.scalar_type() == ScalarType::Float),
      "fused_errors: expected uint8 or float32 frames (N, H, W) on a CUDA device");
  STD_TORCH_CHECK(normal || perturbed, "fused_errors: expected a pass to run");
  STD_TORCH_CHECK(bound >= 0 && bound <= 2, "fused_errors: there is no bound ", bound);
  STD_TORCH_CHECK(smoothing >= 1 && smoothing <= 31 && smoothing % 2 == 1,
                  "fused_errors: expected an odd smoothing from 1 to 31");
  STD_TORCH_CHECK(chunk > 0 && chunk <= kMostPatches,
                  "fused_errors: expected a chunk of 1 to 2^30 patches");
}

// Finds the patches that differ from the background, and asks for these only. `flags`: a byte a
// patch; `places`: offsets of the tiles of flags, then pairs of frame and patch.
void mark_active(const Tensor& frames, const Tensor& background, double threshold,
                 const MaybeTensor& flags, const MaybeTensor& places, cuda::FusedCall* call,
                 cudaStream_t stream) {
  STD_TORCH_CHECK(flags && places, "fused_errors: a background needs flags and places");
  check_activity(frames, background);
  const int32_t device = frames.get_device_index();
  STD_TORCH_CHECK(background.is_cuda() && background.get_device_index() == device,
                  "fused_errors: the background is on another device");
  const cuda::PatchGrid& grid = call->grid;
  const int64_t total = frames.size(0) * grid.count();
  const int64_t tiles = cuda::active_tiles(total);
  check_buffer(*flags, ScalarType::Byte, total, device, "flags");
  check_buffer(*places, ScalarType::Long, tiles + 1 + 2 * total, device, "places");
  auto* const marked = static_cast<uint8_t*>(flags->mutable_data_ptr());
  auto* const offsets = static_cast<int64_t*>(places->mutable_data_ptr());
  int64_t* const pairs = offsets + tiles + 1;
  const cuda::Matrix still = {background.const_data_ptr(), background.stride(0),
                              background.stride(1)};
  check_cuda(cuda::active_flags(call->frames, still, grid,
                                activity_limit(threshold, grid.patch_pixels()), marked, offsets,
                                stream));
  check_cuda(cuda::active_index(marked, offsets, total, grid.count(), pairs, stream));
  call->index = pairs;
  call->count = offsets + tiles;
}

// `scratch` (bytes): the maps, latents and places of `chunk` patches. With a background: `flags`
// (uint8) and `places` (int64), see mark_active.
void fused_errors(Tensor frames, MaybeTensor background, double threshold, Sizes stride, bool cover,
                  int64_t shape, Tensor weights, Tensor biases, int64_t bound, double slope,
                  double strength, int64_t smoothing, bool normal, bool perturbed, int64_t chunk,
                  Tensor scratch, MaybeTensor flags, MaybeTensor places, Tensor errors) {
  cuda::FusedSizes sizes{};
  STD_TORCH_CHECK(sizes_of(shape, &sizes), "fused_errors: there is no shape ", shape);
  check_options(frames, bound, smoothing, normal, perturbed, chunk);
  const Sizes patch = {sizes.side, sizes.side};
  check_grid(frames.size(1), frames.size(2), patch, stride);
  const auto grid = cuda::make_patch_grid(frames.size(1), frames.size(2), sizes.side, sizes.side,
                                          stride[0], stride[1], cover);
  const int64_t passes = normal && perturbed ? 2 : 1;
  const int64_t total = frames.size(0) * grid.count();
  STD_TORCH_CHECK(total <= kMostPatches, "fused_errors: expected less than 2^30 patches");

  const int32_t device = frames.get_device_index();
  const int64_t map_bytes = chunk * sizes.map_bytes;
  check_buffer(weights, ScalarType::BFloat16, 128 * sizes.fragments, device, "weights");
  check_buffer(biases, ScalarType::Float, sizes.biases, device, "biases");
  const int64_t latent_bytes = chunk * (perturbed ? 2 : 1) * sizes.latent_bytes;
  check_buffer(scratch, ScalarType::Byte, map_bytes + latent_bytes + chunk * cuda::kPatchBytes,
               device, "scratch");
  check_buffer(errors, ScalarType::Float, passes * total, device, "errors");
  STD_TORCH_CHECK(weights.numel() == 128 * sizes.fragments && biases.numel() == sizes.biases &&
                      errors.numel() == passes * total,
                  "fused_errors: weights, biases or errors are of another shape");
  if (total == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  const cuda::FrameView view = {
      frames.const_data_ptr(), dtype_of(frames), frames.size(0), 1, frames.stride(0), 0,
      frames.stride(1),        frames.stride(2)};
  auto* const maps = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  cuda::FusedCall call = {view,
                          grid,
                          nullptr,
                          nullptr,
                          shape,
                          weights.const_data_ptr(),
                          static_cast<const float*>(biases.const_data_ptr()),
                          static_cast<int32_t>(bound),
                          static_cast<float>(slope),
                          static_cast<float>(strength),
                          static_cast<int32_t>(smoothing),
                          normal,
                          perturbed,
                          chunk,
                          maps,
                          maps + map_bytes,
                          maps + map_bytes + latent_bytes,
                          static_cast<float*>(errors.mutable_data_ptr())};
  if (background) mark_active(frames, *background, threshold, flags, places, &call, stream);
  check_cuda(errors_of(call, stream));
}

}  // namespace

// See fastalps_load_fused.
int64_t load_fused(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return -1;
  LoadedNetwork network{};
  *reinterpret_cast<void**>(&network.sizes) = dlsym(library, "fastalps_fused_sizes");
  *reinterpret_cast<void**>(&network.errors) = dlsym(library, "fastalps_fused_errors");
  if (network.sizes == nullptr || network.errors == nullptr) return -1;
  const std::lock_guard<std::mutex> lock(loaded_mutex);
  loaded_networks.push_back(network);
  return kFirstLoaded + static_cast<int64_t>(loaded_networks.size()) - 1;
}

}  // namespace fastalps

// Loads what fastalps/fused/build.py built; called by it. Returns the number of the library's
// network for `fused_errors`, or -1.
extern "C" __attribute__((visibility("default"))) int64_t fastalps_load_fused(const char* path) {
  return fastalps::load_fused(path);
}

STABLE_TORCH_LIBRARY_IMPL(fastalps, CUDA, m) {
  m.impl("fused_errors", TORCH_BOX(&fastalps::fused_errors));
}
