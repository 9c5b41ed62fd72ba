// latent + strength * perturbation with the perturbation's energy, and the gradient.
#include "common.cuh"

namespace fastalps::cuda {
namespace {

struct LatentArguments {
  Matrix left, perturbation;
  int64_t n, m, chunk;
  double strength;
  double inverse;  // 1 / m: infinite for empty rows, whose energy is 0 * inf = NaN.
};

template <typename T>
bool wide(const RowPlan& plan, const Matrix& matrix) {
  constexpr int64_t kVector = 16 / sizeof(T);
  return plan.m % kVector == 0 && matrix.column_stride == 1 && matrix.row_stride % kVector == 0 &&
         aligned(matrix.data, 16);
}

// Calls body(left, perturbation, place) for each vector of a row's chunk: packs, and the column
// where they start.
template <typename T, int kVector, typename Body>
__device__ __forceinline__ void for_each_pack(const LatentArguments& arguments, int64_t row,
                                              Body&& body) {
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * arguments.chunk;
  const int32_t count = static_cast<int32_t>(min(arguments.m - begin, arguments.chunk));
  const Matrix& left = arguments.left;
  const Matrix& right = arguments.perturbation;
  const T* left_row = static_cast<const T*>(left.data) + row * left.row_stride;
  const T* right_row = static_cast<const T*>(right.data) + row * right.row_stride;
#pragma unroll 2
  for (int32_t i = static_cast<int32_t>(threadIdx.x) * kVector; i < count;
       i += static_cast<int32_t>(blockDim.x) * kVector) {
    const int64_t column = begin + i;
    if constexpr (kVector > 1) {
      body(Pack<T, kVector>::load(left_row + column), Pack<T, kVector>::load(right_row + column),
           column);
    } else {
      body(Pack<T, 1>::load(left_row + column * left.column_stride),
           Pack<T, 1>::load(right_row + column * right.column_stride), column);
    }
  }
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    perturb_latent_kernel(LatentArguments arguments, T* __restrict__ output,
                          Compute<T>* __restrict__ partials, float* __restrict__ energy) {
  using Value = Compute<T>;
  const Value strength = static_cast<Value>(arguments.strength);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < arguments.n;
       row += step) {
    Value sum = 0;
    for_each_pack<T, kVector>(
        arguments, row, [&](Pack<T, kVector> latent, Pack<T, kVector> change, int64_t column) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            const Value scaled = multiply(strength, widen(change.value[k]));
            latent.value[k] = narrow<T>(add(widen(latent.value[k]), scaled));
            sum += scaled * scaled;
          }
          latent.store(output + row * arguments.m + column);
        });
    sum = row_sum(sum);
    if (threadIdx.x != 0) continue;
    if (gridDim.y == 1) {
      energy[row] = static_cast<float>(sum * static_cast<Value>(arguments.inverse));
    } else {
      partials[blockIdx.y * arguments.n + row] = sum;
    }
  }
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    perturb_latent_backward_kernel(LatentArguments arguments, const float* __restrict__ grad_energy,
                                   T* __restrict__ output) {
  using Value = Compute<T>;
  const Value strength = static_cast<Value>(arguments.strength);
  const Value factor =
      static_cast<Value>(2 * arguments.strength * arguments.strength * arguments.inverse);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < arguments.n;
       row += step) {
    const Value slope = factor * grad_energy[row];
    for_each_pack<T, kVector>(
        arguments, row, [&](Pack<T, kVector> grad, Pack<T, kVector> change, int64_t column) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            const Value direct = multiply(strength, widen(grad.value[k]));
            grad.value[k] = narrow<T>(add(direct, multiply(slope, widen(change.value[k]))));
          }
          grad.store(output + row * arguments.m + column);
        });
  }
}

LatentArguments latent_arguments(const RowPlan& plan, const Matrix& left,
                                 const Matrix& perturbation, double strength) {
  return LatentArguments{
      left, perturbation, plan.n, plan.m, plan.chunk, strength, 1.0 / static_cast<double>(plan.m)};
}

}  // namespace

cudaError_t perturb_latent(const RowPlan& plan, const Matrix& latent, const Matrix& perturbation,
                           DType dtype, double strength, void* output, float* energy,
                           void* partials, cudaStream_t stream) {
  if (plan.n == 0) return cudaSuccess;
  const auto arguments = latent_arguments(plan, latent, perturbation, strength);
  const cudaError_t status = with_floating(dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto launch = [&](auto kernel) {
      kernel<<<row_grid(plan), row_block(plan), 0, stream>>>(
          arguments, static_cast<T*>(output), static_cast<Compute<T>*>(partials), energy);
      return cudaGetLastError();
    };
    return wide<T>(plan, latent) && wide<T>(plan, perturbation)
               ? launch(perturb_latent_kernel<T, 16 / sizeof(T)>)
               : launch(perturb_latent_kernel<T, 1>);
  });
  if (status != cudaSuccess || plan.splits == 1) return status;
  return reduce_partials(partials, dtype == DType::kFloat64, plan.splits, plan.n, plan.m, energy,
                         stream);
}

cudaError_t perturb_latent_backward(const RowPlan& plan, const Matrix& grad_output,
                                    const float* grad_energy, const Matrix& perturbation,
                                    DType dtype, double strength, void* output,
                                    cudaStream_t stream) {
  if (plan.n == 0 || plan.m == 0) return cudaSuccess;
  const auto arguments = latent_arguments(plan, grad_output, perturbation, strength);
  return with_floating(dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto launch = [&](auto kernel) {
      kernel<<<row_grid(plan), row_block(plan), 0, stream>>>(arguments, grad_energy,
                                                             static_cast<T*>(output));
      return cudaGetLastError();
    };
    return wide<T>(plan, grad_output) && wide<T>(plan, perturbation)
               ? launch(perturb_latent_backward_kernel<T, 16 / sizeof(T)>)
               : launch(perturb_latent_backward_kernel<T, 1>);
  });
}

}  // namespace fastalps::cuda
