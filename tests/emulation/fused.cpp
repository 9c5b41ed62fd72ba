// The fused scoring kernels run on a host, for tests/test_fused_emulation.py.
#include "fused_decoder.cuh"
#include "fused_dense.cuh"
#include "fused_encoder.cuh"
#include "fused_expand.cuh"
#include "fused_latent.cuh"

namespace {

using namespace fastalps::cuda::fused;

struct Problem {
  int64_t shape;
  const void* pixels;
  int64_t bytes, frame_stride, row_stride, column_stride;
  int64_t patches_per_frame, columns, stride_height, stride_width, last_row, last_column;
  int64_t total;
  const int64_t* index;
  const int64_t* count;
  int64_t begin, size, networks, passes, first_perturbed, bound;
  double slope, strength;
  int64_t smoothing;
  const uint2* weights;
  const float* biases;
  unsigned char* maps;
  Patch* patches;
  float* latents;
  float* errors;
  int64_t kernel, blocks, descending, architecture;
};

std::string message;
emulation::Counts counts;

template <typename Kernel>
void run_kernel(const Problem& problem, int shared_bytes, Kernel&& kernel) {
  emulation::Machine machine(problem.descending != 0, static_cast<int>(problem.architecture));
  for (int block = 0; block < problem.blocks && message.empty(); ++block) {
    message = machine.run(block, static_cast<int>(problem.blocks), shared_bytes, kernel);
  }
  counts = machine.counts;
}

#if defined(FASTALPS_ONLY_SHAPE)
constexpr int64_t kOnlyShape = FASTALPS_ONLY_SHAPE;
#else
constexpr int64_t kOnlyShape = -1;
#endif

template <class S>
void run_shape(const Problem& problem, const Work& work) {
  const uint2* const weights = problem.weights;
  const float* const biases = problem.biases;
  switch (problem.kernel) {
    case 0:
      return run_kernel(problem, S::Encode::kSharedBytes, [&](unsigned char* shared) {
        encode<typename S::Encode>(work, weights, biases, shared);
      });
    case 1:
      return run_kernel(problem, S::Latent::kSharedBytes, [&](unsigned char* shared) {
        make_latents<typename S::Latent>(work, weights + S::kLatentAt * kLanes,
                                         biases + S::kLatentBias, shared);
      });
    case 2:
      return run_kernel(problem, S::Dense::kSharedBytes, [&](unsigned char* shared) {
        make_starts<typename S::Dense>(work, weights + S::kDenseAt * kLanes, biases + S::kDenseBias,
                                       shared);
      });
    case 3:
      return run_kernel(problem, S::Expand::kSharedBytes, [&](unsigned char* shared) {
        expand<typename S::Expand>(work, weights + S::kExpandAt * kLanes, biases + S::kExpandBias,
                                   shared);
      });
    case 5:
      return run_kernel(problem, S::template LatentOf<2>::kSharedBytes, [&](unsigned char* shared) {
        make_latents<typename S::template LatentOf<2>>(work, weights + S::kLatentAt * kLanes,
                                                       biases + S::kLatentBias, shared);
      });
    case 6:
      return run_kernel(problem, S::template DenseOf<4>::kSharedBytes, [&](unsigned char* shared) {
        make_starts<typename S::template DenseOf<4>>(work, weights + S::kDenseAt * kLanes,
                                                     biases + S::kDenseBias, shared);
      });
    case 7:
      return run_kernel(problem, S::template ExpandOf<2>::kSharedBytes, [&](unsigned char* shared) {
        expand<typename S::template ExpandOf<2>>(work, weights + S::kExpandAt * kLanes,
                                                 biases + S::kExpandBias, shared);
      });
    default:
      return run_kernel(problem, S::Decode::kSharedBytes, [&](unsigned char* shared) {
        decode<typename S::Decode>(work, weights + S::kDecodeAt * kLanes, biases + S::kDecodeBias,
                                   shared);
      });
  }
}

}  // namespace

// Runs one kernel; the empty string, or what it did wrong.
extern "C" const char* fused_emulate(const Problem* problem) {
  const Problem& p = *problem;
  const Source source = {p.pixels,
                         p.bytes != 0,
                         p.frame_stride,
                         p.row_stride,
                         p.column_stride,
                         Divisor(static_cast<uint32_t>(p.patches_per_frame)),
                         Divisor(static_cast<uint32_t>(p.columns)),
                         p.stride_height,
                         p.stride_width,
                         p.last_row,
                         p.last_column,
                         p.total,
                         p.index,
                         p.count};
  const Work work = {source,
                     p.begin,
                     static_cast<int32_t>(p.size),
                     static_cast<int32_t>(p.networks),
                     static_cast<int32_t>(p.passes),
                     p.first_perturbed != 0,
                     static_cast<Bound>(p.bound),
                     static_cast<float>(p.slope),
                     static_cast<float>(p.strength),
                     static_cast<int32_t>(p.smoothing / 2),
                     p.weights,
                     p.biases,
                     p.maps,
                     p.patches,
                     p.latents,
                     p.errors};
  message.clear();
  bool known = false;
  with_numbered_shape(p.shape, [&](auto number, auto shape) {
    if constexpr (kOnlyShape < 0 || number == kOnlyShape) {
      run_shape<decltype(shape)>(p, work);
      known = true;
    }
  });
  if (!known) message = "no such shape";
  return message.c_str();
}

// Of the last run: mma instructions, then those of ldmatrix and the cycles that they take, and of
// stmatrix.
extern "C" void fused_counts(int64_t* found) {
  found[0] = counts.multiplies;
  found[1] = counts.loads;
  found[2] = counts.load_cycles;
  found[3] = counts.stores;
  found[4] = counts.store_cycles;
}

// Sizes of a shape: fragments, biases, scratch and latent values a patch, then the shared memory
// of each kernel. Returns whether there is such a shape.
extern "C" int fused_sizes(int64_t shape, int64_t* found) {
  return with_shape(shape, [&](auto named) {
    using S = decltype(named);
    const int64_t sizes[] = {S::kFragments,           S::kBiases,
                             S::kMapValues,           S::Latent::kLatent,
                             S::Encode::kSharedBytes, S::Latent::kSharedBytes,
                             S::Dense::kSharedBytes,  S::Expand::kSharedBytes,
                             S::Decode::kSharedBytes};
    for (int i = 0; i < 9; ++i) found[i] = sizes[i];
  });
}
