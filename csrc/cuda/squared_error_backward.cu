// Gradient of the per-sample mean squared errors; the target is read once for both passes.
#include "squared_error.cuh"

namespace fastalps::cuda {
namespace {

template <typename A, typename T, bool kSigmoid>
__global__ void __launch_bounds__(kThreads)
    squared_error_backward_kernel(ErrorArguments arguments, int32_t passes,
                                  const float* __restrict__ grad, A* __restrict__ output) {
  using Value = Compute<A>;
  const int64_t n = arguments.n;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * arguments.chunk;
  const int32_t count = static_cast<int32_t>(min(arguments.m - begin, arguments.chunk));
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const Value factor = static_cast<Value>(2 * arguments.inverse);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < n;
       row += step) {
    const A* values = static_cast<const A*>(arguments.values) + begin;
    const T* target =
        static_cast<const T*>(arguments.target) + begin + row * arguments.target_stride;
    const Value factors[2] = {factor * grad[row], passes == 2 ? factor * grad[n + row] : 0};
    with_vector<A, T>(arguments.vector, [&](auto width) {
      constexpr int kVector = decltype(width)::value;
      for (int32_t i = static_cast<int32_t>(threadIdx.x) * kVector; i < count;
           i += static_cast<int32_t>(blockDim.x) * kVector) {
        const auto goal = Pack<T, kVector>::load(target + i);
#pragma unroll
        for (int pass = 0; pass < 2; ++pass) {
          if (pass == passes) break;
          const int64_t sample = pass * n + row;
          auto pack = Pack<A, kVector>::load(values + sample * arguments.values_stride + i);
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            Value value = widen(pack.value[k]);
            Value slope = 1;
            if constexpr (kSigmoid) {
              value = logistic(value);
              slope = value * (1 - value);
            }
            const Value difference = value - static_cast<Value>(widen(goal.value[k]));
            pack.value[k] = narrow<A>(factors[pass] * difference * slope);
          }
          pack.store(output + sample * arguments.m + begin + i);
        }
      }
    });
  }
}

}  // namespace

cudaError_t squared_error_backward(const RowPlan& plan, const ErrorPair& pair, const float* grad,
                                   void* output, cudaStream_t stream) {
  if (plan.n == 0 || plan.m == 0) return cudaSuccess;
  return with_error_types(pair, [&](auto a, auto t) {
    using A = decltype(a);
    using T = decltype(t);
    const auto arguments = error_arguments<A, T>(plan, pair);
    const auto launch = [&](auto kernel) {
      kernel<<<row_grid(plan), row_block(plan), 0, stream>>>(arguments, pair.passes, grad,
                                                             static_cast<A*>(output));
      return cudaGetLastError();
    };
    return pair.sigmoid ? launch(squared_error_backward_kernel<A, T, true>)
                        : launch(squared_error_backward_kernel<A, T, false>);
  });
}

}  // namespace fastalps::cuda
