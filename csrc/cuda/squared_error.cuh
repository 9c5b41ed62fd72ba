// The squared error of one element and its gradient, and the dispatch over dtypes.
#pragma once

#include "common.cuh"

namespace fastalps::cuda {

// Absolute error about 1e-7: the approximate reciprocal and exponential keep the kernel bound by
// memory rather than by the special function units. exp(-x) = inf gives 0, as it should.
__device__ __forceinline__ float logistic(float value) {
  return __fdividef(1.0f, 1.0f + __expf(-value));
}

// Newton's iteration instead of a division, whose slow path is a subroutine call. The bound on the
// exponent keeps infinities out of it; a NaN passes.
__device__ __forceinline__ double logistic(double value) {
  const double divisor = 1.0 + exp(value < -700.0 ? 700.0 : -value);
  double inverse;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(inverse) : "d"(divisor));
#pragma unroll
  for (int iteration = 0; iteration < 3; ++iteration) {
    inverse = fma(inverse, fma(-divisor, inverse, 1.0), inverse);
  }
  return inverse;
}

struct ErrorArguments {
  const void* values;
  const void* target;
  int64_t values_stride, target_stride;
  int64_t n, m, chunk;
  double inverse;  // 1 / m: infinite for empty samples, whose mean is 0 * inf = NaN.
  int32_t vector;
};

// The widest vector both tensors allow: sample starts and lengths must keep the alignment.
inline int32_t error_vector(const RowPlan& plan, const ErrorPair& pair, int64_t values_bytes,
                            int64_t target_bytes) {
  for (int32_t vector : {8, 4, 2}) {
    if (vector * std::max(values_bytes, target_bytes) > 16) continue;
    const bool fits = plan.m % vector == 0 && pair.values.row_stride % vector == 0 &&
                      pair.target.row_stride % vector == 0 &&
                      aligned(pair.values.data, vector * values_bytes) &&
                      aligned(pair.target.data, vector * target_bytes);
    if (fits) return vector;
  }
  return 1;
}

template <typename A, typename T>
ErrorArguments error_arguments(const RowPlan& plan, const ErrorPair& pair) {
  return ErrorArguments{pair.values.data,
                        pair.target.data,
                        pair.values.row_stride,
                        pair.target.row_stride,
                        plan.n,
                        plan.m,
                        plan.chunk,
                        1.0 / static_cast<double>(plan.m),
                        error_vector(plan, pair, sizeof(A), sizeof(T))};
}

// Calls body(A{}, T{}) for the dtypes of values and target: float64 goes with float64 only.
template <typename Body>
cudaError_t with_error_types(const ErrorPair& pair, Body&& body) {
  if ((pair.values_dtype == DType::kFloat64) != (pair.target_dtype == DType::kFloat64)) {
    return cudaErrorInvalidValue;
  }
  return with_floating(pair.values_dtype, [&](auto a) {
    return with_floating(pair.target_dtype, [&](auto t) {
      using A = decltype(a);
      using T = decltype(t);
      if constexpr (std::is_same_v<A, double> == std::is_same_v<T, double>) {
        return body(a, t);
      } else {
        return cudaErrorInvalidValue;
      }
    });
  });
}

// Calls body with the vector width as a constant; only widths that the dtypes can have exist.
template <typename A, typename T, typename Body>
__device__ __forceinline__ void with_vector(int32_t vector, Body&& body) {
  constexpr int kWidest = 16 / static_cast<int>(sizeof(A) > sizeof(T) ? sizeof(A) : sizeof(T));
  if constexpr (kWidest >= 8) {
    if (vector == 8) return body(std::integral_constant<int, 8>{});
  }
  if constexpr (kWidest >= 4) {
    if (vector == 4) return body(std::integral_constant<int, 4>{});
  }
  if (vector == 2) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 1>{});
}

}  // namespace fastalps::cuda
