// Per-sample mean squared errors of one or two reconstructions; the target is read once for both.
#include "squared_error.cuh"

namespace fastalps::cuda {
namespace {

template <typename A, typename T, int kPasses, bool kSigmoid>
__global__ void __launch_bounds__(kThreads, kResident<A>)
    squared_error_kernel(ErrorArguments arguments, void* partials, float* errors) {
  using Sum = Compute<A>;
  const int64_t n = arguments.n;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * arguments.chunk;
  const int32_t count = static_cast<int32_t>(min(arguments.m - begin, arguments.chunk));
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < n;
       row += step) {
    const A* values = static_cast<const A*>(arguments.values) + begin;
    const A* first = values + row * arguments.values_stride;
    const A* second = values + (n + row) * arguments.values_stride;
    const T* target =
        static_cast<const T*>(arguments.target) + begin + row * arguments.target_stride;
    Sum sums[kPasses] = {};
    with_vector<A, T>(arguments.vector, [&](auto width) {
      constexpr int kVector = decltype(width)::value;
#pragma unroll(kVector >= 4 ? 2 : 4)
      for (int32_t i = static_cast<int32_t>(threadIdx.x) * kVector; i < count;
           i += static_cast<int32_t>(blockDim.x) * kVector) {
        const auto goal = Pack<T, kVector>::load(target + i);
        Pack<A, kVector> output[kPasses];
        output[0] = Pack<A, kVector>::load(first + i);
        if constexpr (kPasses == 2) output[1] = Pack<A, kVector>::load(second + i);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
#pragma unroll
          for (int pass = 0; pass < kPasses; ++pass) {
            Sum value = widen(output[pass].value[k]);
            if constexpr (kSigmoid) value = logistic(value);
            const Sum difference = value - static_cast<Sum>(widen(goal.value[k]));
            sums[pass] += difference * difference;
          }
        }
      }
    });
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const Sum sum = row_sum(sums[pass]);
      if (threadIdx.x != 0) continue;
      if (gridDim.y == 1) {
        errors[pass * n + row] = static_cast<float>(sum * static_cast<Sum>(arguments.inverse));
      } else {
        static_cast<Sum*>(partials)[(blockIdx.y * kPasses + pass) * n + row] = sum;
      }
    }
  }
}

}  // namespace

cudaError_t squared_error(const RowPlan& plan, const ErrorPair& pair, float* errors, void* partials,
                          cudaStream_t stream) {
  if (plan.n == 0) return cudaSuccess;
  const cudaError_t status = with_error_types(pair, [&](auto a, auto t) {
    using A = decltype(a);
    using T = decltype(t);
    const auto arguments = error_arguments<A, T>(plan, pair);
    const auto launch = [&](auto kernel) {
      kernel<<<row_grid(plan), row_block(plan), 0, stream>>>(arguments, partials, errors);
      return cudaGetLastError();
    };
    if (pair.passes == 1) {
      return pair.sigmoid ? launch(squared_error_kernel<A, T, 1, true>)
                          : launch(squared_error_kernel<A, T, 1, false>);
    }
    return pair.sigmoid ? launch(squared_error_kernel<A, T, 2, true>)
                        : launch(squared_error_kernel<A, T, 2, false>);
  });
  if (status != cudaSuccess || plan.splits == 1) return status;
  return reduce_partials(partials, pair.values_dtype == DType::kFloat64, plan.splits,
                         pair.passes * plan.n, plan.m, errors, stream);
}

}  // namespace fastalps::cuda
