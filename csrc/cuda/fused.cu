// The fused scoring kernels and their launches: frames to errors by five kernels a chunk.
#include <map>
#include <mutex>

#include "device.h"
#include "fused.h"
#include "fused_decoder.cuh"
#include "fused_dense.cuh"
#include "fused_encoder.cuh"
#include "fused_expand.cuh"
#include "fused_latent.cuh"

namespace fastalps::cuda {
namespace {

using namespace fused;

extern __shared__ uint4 fused_memory[];

__device__ __forceinline__ unsigned char* shared_bytes() {
  return reinterpret_cast<unsigned char*>(fused_memory);
}

// Shared memory of a multiprocessor: of compute capability 8.0, or of 9.0 and 10.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSharedInAll = 164 * 1024;
#else
constexpr int kSharedInAll = 228 * 1024;
#endif

// Blocks that a multiprocessor has to hold: what its shared memory leaves room for (each takes 1
// KiB more than it asks for), at most three. Not told, ptxas trims registers to reach the next step
// of occupancy, and spills to get there.
template <class S>
constexpr int kResident = std::max(1, std::min(3, kSharedInAll / (S::kSharedBytes + 1024)));

// Of wide networks M's forms with two tiles fit 9.0 and 10.0 only, see `Stages::prepare`: others do
// not compile them.
template <class S>
constexpr bool kFits = S::kSharedBytes + 1024 <= kSharedInAll;

// Of the dense layer two fit everywhere; 8.0's code would spill at two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kDenseResident = 1;
#else
constexpr int kDenseResident = 2;
#endif

template <class S>
__global__ void __launch_bounds__(kBlock, kResident<S>)
    fused_encode_kernel(const __grid_constant__ Work work, const uint2* __restrict__ weights,
                        const float* __restrict__ biases) {
  encode<S>(work, weights, biases, shared_bytes());
}

template <class S>
__global__ void __launch_bounds__(kBlock, std::min(2, kResident<S>))
    fused_latent_kernel(const __grid_constant__ Work work, const uint2* __restrict__ weights,
                        const float* __restrict__ biases) {
  if constexpr (kFits<S>) make_latents<S>(work, weights, biases, shared_bytes());
}

template <class S>
__global__ void __launch_bounds__(kBlock, kDenseResident)
    fused_dense_kernel(const __grid_constant__ Work work, const uint2* __restrict__ weights,
                       const float* __restrict__ biases) {
  make_starts<S>(work, weights, biases, shared_bytes());
}

template <class S>
__global__ void __launch_bounds__(kBlock, 1)
    fused_expand_kernel(const __grid_constant__ Work work, const uint2* __restrict__ weights,
                        const float* __restrict__ biases) {
  if constexpr (kFits<S>) expand<S>(work, weights, biases, shared_bytes());
}

// Two, whatever the shared memory leaves: the narrow networks' D would spill at three.
template <class S>
__global__ void __launch_bounds__(kBlock, std::min(2, kResident<S>))
    fused_decode_kernel(const __grid_constant__ Work work, const uint2* __restrict__ weights,
                        const float* __restrict__ biases) {
  decode<S>(work, weights, biases, shared_bytes());
}

using Kernel = void (*)(Work, const uint2*, const float*);

// A kernel, where its weights and biases are, and how many blocks of it the device holds.
struct Stage {
  Kernel kernel;
  int shared;
  int64_t weights_at, bias_at;
  int tasks = 1;   // Of a block at a time.
  int groups = 1;  // Blocks for all columns of a task.
  int resident = 0;
  bool dependent = false;  // Whether it may start while the one before it ends.

  // More than 48 KiB of shared memory has to be asked for. Neither call is of a stream, so a graph
  // may be captured meanwhile.
  cudaError_t prepare(bool early) {
    cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
    int per_multiprocessor = 0;
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kBlock,
                                                           static_cast<size_t>(shared));
    if (status != cudaSuccess) return status;
    resident = std::max(1, per_multiprocessor) * multiprocessors();
    // Blocks that wait take room from those that work, where there is some left: measured on an
    // H100, wide networks gain 3% and narrow ones lose 4%.
    dependent = early && device_attribute<cudaDevAttrComputeCapabilityMajor>() >= 9;
    return cudaSuccess;
  }

  cudaError_t launch(const Work& work, int64_t blocks, cudaStream_t stream) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, resident)));
    config.blockDim = dim3(kBlock);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    // See `await_previous`.
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = dependent ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, work, work.weights + weights_at * kLanes,
                              work.biases + bias_at);
  }
};

constexpr size_t kStages = 5, kMiddle = 3;

// The launches of a network, and M's with more tiles a block: less traffic from L2, for launches
// that still fill the device.
struct Stages {
  std::array<Stage, kStages> stages;
  std::array<Stage, kMiddle> wide;

  cudaError_t prepare(bool early) {
    cudaError_t status;
    for (Stage& stage : stages) {
      if ((status = stage.prepare(early)) != cudaSuccess) return status;
    }
    const int most_shared = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
    for (Stage& stage : wide) {
      if (stage.shared > most_shared) continue;
      if ((status = stage.prepare(early)) != cudaSuccess) return status;
    }
    return cudaSuccess;
  }
};

// Tasks of the launches: patches, of both networks or one, or rows.
template <class S>
Stages stages_of() {
  using Latent = typename S::template LatentOf<2>;
  using Dense = typename S::template DenseOf<4>;
  using Expand = typename S::template ExpandOf<2>;
  return {{{{fused_encode_kernel<typename S::Encode>, S::Encode::kSharedBytes, 0, 0},
            {fused_latent_kernel<typename S::Latent>, S::Latent::kSharedBytes, S::kLatentAt,
             S::kLatentBias, S::Latent::kPatches},
            {fused_dense_kernel<typename S::Dense>, S::Dense::kSharedBytes, S::kDenseAt,
             S::kDenseBias, S::Dense::kRows, S::Dense::kGroups},
            {fused_expand_kernel<typename S::Expand>, S::Expand::kSharedBytes, S::kExpandAt,
             S::kExpandBias, S::Expand::kRows},
            {fused_decode_kernel<typename S::Decode>, S::Decode::kSharedBytes, S::kDecodeAt,
             S::kDecodeBias}}},
          {{{fused_latent_kernel<Latent>, Latent::kSharedBytes, S::kLatentAt, S::kLatentBias,
             Latent::kPatches},
            {fused_dense_kernel<Dense>, Dense::kSharedBytes, S::kDenseAt, S::kDenseBias,
             Dense::kRows, Dense::kGroups},
            {fused_expand_kernel<Expand>, Expand::kSharedBytes, S::kExpandAt, S::kExpandBias,
             Expand::kRows}}}};
}

// The same, prepared for the current device: once, since for a call of few patches all the
// questions would take the host longer than the launches. An error is not kept.
template <class S>
cudaError_t prepared_stages(const Stages** prepared) {
  static std::mutex mutex;
  static std::map<int, Stages> known;  // By device; what it holds stays where it is.
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) {
    Stages stages = stages_of<S>();
    // Two blocks of E fill a multiprocessor.
    status = stages.prepare(kResident<typename S::Encode> <= 2);
    if (status != cudaSuccess) return status;
    found = known.emplace(device, stages).first;
  }
  *prepared = &found->second;
  return cudaSuccess;
}

Work work_of(const FusedCall& call) {
  const PatchGrid& grid = call.grid;
  Work work{};
  work.source = {call.frames.data,
                 call.frames.dtype == DType::kUInt8,
                 call.frames.frame_stride,
                 call.frames.row_stride,
                 call.frames.column_stride,
                 Divisor(static_cast<uint32_t>(grid.count())),
                 Divisor(static_cast<uint32_t>(grid.columns)),
                 std::min(grid.stride_height, grid.height),
                 std::min(grid.stride_width, grid.width),
                 grid.height - grid.patch_height,
                 grid.width - grid.patch_width,
                 call.frames.frames * grid.count(),
                 call.index,
                 call.count};
  work.networks = call.perturbed ? 2 : 1;
  work.passes = call.normal && call.perturbed ? 2 : 1;
  work.first_perturbed = !call.normal;
  work.bound = static_cast<Bound>(call.bound);
  work.slope = call.slope;
  work.strength = call.strength;
  work.reach = call.smoothing / 2;
  work.weights = static_cast<const uint2*>(call.weights);
  work.biases = call.biases;
  work.maps = static_cast<unsigned char*>(call.maps);
  work.patches = static_cast<Patch*>(call.patches);
  static_assert(sizeof(Patch) == kPatchBytes);
  work.latents = static_cast<float*>(call.latents);
  work.errors = call.errors;
  return work;
}

cudaError_t run_stages(const FusedCall& call, const Stages& network, cudaStream_t stream) {
  Work work = work_of(call);
  const int64_t total = work.source.total;
  if (total == 0) return cudaSuccess;
  cudaError_t status;
  if (call.index != nullptr) {
    const size_t bytes = static_cast<size_t>(work.passes * total) * sizeof(float);
    if ((status = cudaMemsetAsync(call.errors, 0, bytes, stream)) != cudaSuccess) return status;
  }
  for (; work.begin < total; work.begin += call.chunk) {
    work.size = static_cast<int32_t>(std::min(call.chunk, total - work.begin));
    const int64_t rows = int64_t{work.size} * work.passes;
    const int64_t tasks[] = {work.size, work.size * int64_t{work.networks}, rows, rows, rows};
    for (size_t i = 0; i < kStages; ++i) {
      const auto blocks_of = [&](const Stage& stage) {
        return ceil_divide(tasks[i], int64_t{stage.tasks}) * stage.groups;
      };
      const Stage* stage = &network.stages[i];
      if (i >= 1 && i <= kMiddle) {
        const Stage& wider = network.wide[i - 1];
        if (wider.resident > 0 && blocks_of(wider) >= multiprocessors()) stage = &wider;
      }
      if ((status = stage->launch(work, blocks_of(*stage), stream)) != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

}  // namespace

bool fused_sizes(int64_t shape, FusedSizes* sizes) {
  return with_shape(shape, [&](auto named) {
    using S = decltype(named);
    *sizes = {S::Encode::kSize, S::kFragments, S::kBiases, 2 * S::kMapValues,
              4 * S::Latent::kLatent};
  });
}

cudaError_t fused_errors(const FusedCall& call, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  with_shape(call.shape, [&](auto named) {
    const Stages* network = nullptr;
    status = prepared_stages<decltype(named)>(&network);
    if (status == cudaSuccess) status = run_stages(call, *network, stream);
  });
  return status;
}

}  // namespace fastalps::cuda

#if defined(FASTALPS_FUSED_SHAPE)
// What csrc/bindings_fused.cpp finds in a library that was built at run time.
#define FASTALPS_EXPORT extern "C" __attribute__((visibility("default")))

FASTALPS_EXPORT bool fastalps_fused_sizes(fastalps::cuda::FusedSizes* sizes) {
  return fastalps::cuda::fused_sizes(0, sizes);
}

FASTALPS_EXPORT cudaError_t fastalps_fused_errors(const fastalps::cuda::FusedCall* call,
                                                  cudaStream_t stream) {
  fastalps::cuda::FusedCall mine = *call;
  mine.shape = 0;
  return fastalps::cuda::fused_errors(mine, stream);
}
#endif
