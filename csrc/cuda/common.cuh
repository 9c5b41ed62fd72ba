// What the kernels share on the device side: conversions, wide loads, division, sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "device.h"
#include "launchers.h"

namespace fastalps::cuda {

// The type that an op computes and accumulates in.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Blocks of kThreads that a multiprocessor has to hold. Not told, ptxas trims registers to reach
// the next step of occupancy, and spills to get there; these kernels wait for memory, and half of
// the threads hide that.
template <typename T>
constexpr int kResident = std::is_same_v<T, double> ? 2 : 4;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(uint8_t value) { return static_cast<float>(value); }

template <typename T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
__device__ __forceinline__ T narrow(double value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __double2half(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __double2bfloat16(value);
  } else {
    return static_cast<T>(value);
  }
}

// Multiplication and addition that are rounded separately, as plain PyTorch does: a fused
// multiply-add would differ from the reference in the last bit.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

// One element of a dtype known at run time, for the rare combinations.
__device__ __forceinline__ double load_any(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[index];
    case DType::kFloat16:
      return widen(static_cast<const __half*>(data)[index]);
    case DType::kBFloat16:
      return widen(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::kFloat64:
      return static_cast<const double*>(data)[index];
    case DType::kUInt8:
      return static_cast<const uint8_t*>(data)[index];
  }
  return 0;
}

template <typename Value>
__device__ __forceinline__ void store_any(void* data, DType dtype, int64_t index, Value value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[index] = narrow<float>(value);
      break;
    case DType::kFloat16:
      static_cast<__half*>(data)[index] = narrow<__half>(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = narrow<__nv_bfloat16>(value);
      break;
    default:
      static_cast<double*>(data)[index] = static_cast<double>(value);
      break;
  }
}

template <int kBytes>
struct WordOf {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<1> {
  using Type = uint8_t;
};

// V elements that move by the widest loads and stores their size allows (16 bytes at most).
template <typename T, int V>
struct Pack {
  using Word = typename WordOf<static_cast<int>(sizeof(T)) * V>::Type;
  static constexpr int kWords = static_cast<int>(sizeof(T) * V / sizeof(Word));

  alignas(sizeof(Word)) T value[V];

  __device__ __forceinline__ static Pack load(const T* source) {
    Pack pack;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      reinterpret_cast<Word*>(&pack)[word] = __ldg(reinterpret_cast<const Word*>(source) + word);
    }
    return pack;
  }

  __device__ __forceinline__ void store(T* target) const {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      reinterpret_cast<Word*>(target)[word] = reinterpret_cast<const Word*>(this)[word];
    }
  }
};

// Division of n < 2^31 by a divisor known at launch, by a multiplication and a shift.
// Granlund and Montgomery, "Division by invariant integers using multiplication" (1994).
struct Divider {
  uint32_t divisor, multiplier, shift;

  explicit Divider(int64_t value) : divisor(static_cast<uint32_t>(value)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * (power - divisor) / divisor + 1);
  }

  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }

  // The quotient; n becomes the remainder.
  __device__ __forceinline__ uint32_t split(uint32_t& n) const {
    const uint32_t quotient = divide(n);
    n -= quotient * divisor;
    return quotient;
  }
};

// The same for n < 2^63. Unlike the division operator it compiles to no subroutine call, around
// which registers would be spilt.
struct WideDivider {
  int64_t divisor;
  uint64_t multiplier;
  uint32_t shift;

  explicit WideDivider(int64_t value) : divisor(value), shift(0) {
    while ((uint64_t{1} << shift) < static_cast<uint64_t>(divisor)) ++shift;
    const unsigned __int128 one = 1;
    const unsigned __int128 gap = (one << shift) - static_cast<uint64_t>(divisor);
    multiplier = static_cast<uint64_t>((gap << 64) / static_cast<uint64_t>(divisor) + 1);
  }

  __device__ __forceinline__ int64_t divide(int64_t n) const {
    const uint64_t high = __umul64hi(static_cast<uint64_t>(n), multiplier);
    return static_cast<int64_t>((high + static_cast<uint64_t>(n)) >> shift);
  }

  // The quotient; n becomes the remainder.
  __device__ __forceinline__ int64_t split(int64_t& n) const {
    const int64_t quotient = divide(n);
    n -= quotient * divisor;
    return quotient;
  }
};

// The patches along one axis, and which of them cover a pixel: a range, since origins ascend.
struct Axis {
  int32_t size, patch, stride, count;
  Divider by_stride;

  Axis(int64_t size, int64_t patch, int64_t stride, int64_t count)
      : size(static_cast<int32_t>(size)),
        patch(static_cast<int32_t>(patch)),
        stride(static_cast<int32_t>(std::min<int64_t>(stride, size))),
        count(static_cast<int32_t>(count)),
        // A stride beyond the axis leaves at most two patches; any stride of at least the axis's
        // size places them alike.
        by_stride(std::min<int64_t>(stride, size)) {}

  __device__ __forceinline__ int32_t origin(int32_t index) const {
    const int64_t place = static_cast<int64_t>(index) * stride;
    return static_cast<int32_t>(min(place, static_cast<int64_t>(size - patch)));
  }

  __device__ __forceinline__ int32_t first(int32_t pixel) const {
    if (pixel < patch) return 0;
    return static_cast<int32_t>(by_stride.divide(static_cast<uint32_t>(pixel - patch))) + 1;
  }

  // Below first() where no patch covers the pixel.
  __device__ __forceinline__ int32_t last(int32_t pixel) const {
    if (pixel >= size - patch) return count - 1;
    return min(static_cast<int32_t>(by_stride.divide(static_cast<uint32_t>(pixel))), count - 1);
  }
};

// Approximate to 2 units in the last place for float: the exact quotient would need a slow path.
__device__ __forceinline__ float quotient(float value, float divisor) {
  return __fdividef(value, divisor);
}
__device__ __forceinline__ double quotient(double value, double divisor) { return value / divisor; }

// The sum over a row's threads (blockDim.x of them: one warp, or the whole block), valid in the
// first. The order is fixed, so the result is the same in every run.
template <typename T>
__device__ __forceinline__ T row_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  if (blockDim.x > 32) {
    __shared__ T warps[kThreads / 32];
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      value = 0;
      for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) value += warps[warp];
    }
  }
  return value;
}

// Calls body(T{}) with the floating type that `dtype` names.
template <typename Body>
cudaError_t with_floating(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(__half{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    case DType::kFloat64:
      return body(double{});
    default:
      return cudaErrorInvalidValue;
  }
}

inline dim3 row_block(const RowPlan& plan) {
  return dim3(static_cast<unsigned>(plan.threads_per_row),
              static_cast<unsigned>(plan.rows_per_block));
}

inline dim3 row_grid(const RowPlan& plan) {
  return dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits));
}

// Adds the partial sums of `splits` blocks in order: (splits, rows) -> rows means of m elements.
cudaError_t reduce_partials(const void* partials, bool is_double, int32_t splits, int64_t rows,
                            int64_t m, float* means, cudaStream_t stream);

}  // namespace fastalps::cuda
