// The instructions that the fused kernels use, on a device. tests/emulation/fused_machine.h has the
// same functions for a host, where kernels run lane by lane.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fused_index.h"

#define FASTALPS_DEVICE __device__ __forceinline__

namespace fastalps::cuda::fused {

FASTALPS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same, but what depends on it is not computed before: outside of a loop, in registers.
FASTALPS_DEVICE int thread_index_anew() {
  int index = thread_index();
  asm volatile("" : "+r"(index));
  return index & 1023;  // As the compiler knows of the first one, too.
}
FASTALPS_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FASTALPS_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
FASTALPS_DEVICE void barrier() { __syncthreads(); }

// Programmatic dependent launch: `allow_next` lets the next kernel of the stream take the room that
// ended blocks leave; all that it does before `await_previous` must not depend on this one, and
// every block has to call that, as the next but one relies on it. Older devices have neither.
FASTALPS_DEVICE void allow_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
FASTALPS_DEVICE void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A 16 x 16 operand A of mma: four pairs of bf16 a lane.
struct Operand {
  uint32_t word[4];
};

// Reads A from shared memory: each lane gives the address of 8 terms, see `Lane`.
FASTALPS_DEVICE Operand load_operand(const unsigned char* chunk) {
  Operand a;
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(chunk));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.word[0]), "=r"(a.word[1]), "=r"(a.word[2]), "=r"(a.word[3])
               : "r"(address)
               : "memory");
  return a;
}

// The same of an operand whose second 8 terms are zeros: half the reads. The addresses of the lanes
// of the second half do not matter.
FASTALPS_DEVICE Operand load_half_operand(const unsigned char* chunk) {
  Operand a = {};
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(chunk));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(a.word[0]), "=r"(a.word[1])
               : "r"(address)
               : "memory");
  return a;
}

// Starts a copy of 16 bytes from global into shared memory, both aligned.
FASTALPS_DEVICE void copy_async(unsigned char* target, const void* source) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
}

// Waits for this thread's copies; a barrier after it makes them everybody's.
FASTALPS_DEVICE void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// sums = start + A * B, bf16 with float32 sums.
FASTALPS_DEVICE void multiply_add(float (&sums)[4], const Operand& a, uint2 b,
                                  const float (&start)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.x), "r"(b.y),
        "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]));
}

// The same of the first 8 terms only.
FASTALPS_DEVICE void multiply_add_half(float (&sums)[4], const Operand& a, uint2 b,
                                       const float (&start)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(b.x), "f"(start[0]), "f"(start[1]), "f"(start[2]),
        "f"(start[3]));
}

// Whether four 8 x 8 matrices of bf16, each a result's pair a lane, can be stored at once: each
// lane gives the address of a row, of matrix `index` / 8 the row `index` % 8.
FASTALPS_DEVICE constexpr bool stores_matrices() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}
FASTALPS_DEVICE void store_matrices(bool stored, unsigned char* row, const uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %0, 0;\n"
      " @p stmatrix.sync.aligned.m8n8.x4.shared.b16 [%1], {%2, %3, %4, %5};\n}" ::"r"(
          static_cast<int>(stored)),
      "r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
#endif
}

// Whether four warps, a group, can multiply matrices that lie in shared memory: wgmma of sm_90a.
FASTALPS_DEVICE constexpr bool multiplies_by_groups() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  return true;
#else
  return false;
#endif
}

// A matrix of 16 terms for `multiply_group`, in parts of 8 rows by 8 terms: a part is 128 bytes,
// row by row. `across`: bytes from the first 8 terms' parts to the others', `down`: from 8 rows to
// the next ones (PTX ISA, "Matrix Descriptor Format", without swizzling).
struct Matrix {
  uint32_t lower, upper;

  FASTALPS_DEVICE Matrix(const unsigned char* first, int across, int down) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(first));
    asm volatile("" : "+r"(address));  // Else those of all products are kept in registers.
    lower = (address & 0x3ffff) >> 4 | static_cast<uint32_t>(across >> 4) << 16;
    upper = static_cast<uint32_t>(down >> 4);
  }
  // The same, so many bytes behind it.
  FASTALPS_DEVICE Matrix at(int bytes) const {
    Matrix other = *this;
    other.lower += bytes >> 4;
    return other;
  }
};

// What this thread has written to shared memory is seen by `multiply_group`, after a barrier.
FASTALPS_DEVICE void publish() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Products of a group that are started between these are done behind them; the compiler must have
// their sums in registers before, and may read them after: `hold`.
FASTALPS_DEVICE void start_group() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
FASTALPS_DEVICE void finish_group() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}
template <int kTiles>
FASTALPS_DEVICE void hold(float (&sums)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
}

#define FASTALPS_SUMS(tile) \
  "+f"(sums[tile][0]), "+f"(sums[tile][1]), "+f"(sums[tile][2]), "+f"(sums[tile][3])
#define FASTALPS_WGMMA(columns, registers, a_lower, a_upper, b_lower, b_upper)  \
  "{\n .reg .pred p;\n .reg .b64 a, b;\n setp.ne.b32 p, 1, 0;\n"                \
  " mov.b64 a, {" a_lower ", " a_upper "};\n mov.b64 b, {" b_lower ", " b_upper \
  "};\n"                                                                        \
  " wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" registers  \
  "}, a, b, "                                                                   \
  "p, 1, 1, 0, 0;\n}"
#define FASTALPS_SIXTEEN "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTALPS_MATRICES "r"(a.lower), "r"(a.upper), "r"(b.lower), "r"(b.upper)

// sums += A * B of a group: A has 64 rows, of which warp w has the 16 from 16 w on, as in
// `multiply_add`; B has 8 columns (rows in memory) a tile. Done when `finish_group` is.
template <int kTiles, int kFirst = 0>
FASTALPS_DEVICE void multiply_group(float (&sums)[kTiles][4], const Matrix& a, const Matrix& b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kLeft = kTiles - kFirst;
  if constexpr (kLeft >= 8) {
    asm volatile(FASTALPS_WGMMA("64",
                                FASTALPS_SIXTEEN
                                ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
                                "%28, %29, %30, %31",
                                "%32", "%33", "%34", "%35")
                 : FASTALPS_SUMS(kFirst), FASTALPS_SUMS(kFirst + 1), FASTALPS_SUMS(kFirst + 2),
                   FASTALPS_SUMS(kFirst + 3), FASTALPS_SUMS(kFirst + 4), FASTALPS_SUMS(kFirst + 5),
                   FASTALPS_SUMS(kFirst + 6), FASTALPS_SUMS(kFirst + 7)
                 : FASTALPS_MATRICES);
  } else if constexpr (kLeft >= 4) {
    asm volatile(FASTALPS_WGMMA("32", FASTALPS_SIXTEEN, "%16", "%17", "%18", "%19")
                 : FASTALPS_SUMS(kFirst), FASTALPS_SUMS(kFirst + 1), FASTALPS_SUMS(kFirst + 2),
                   FASTALPS_SUMS(kFirst + 3)
                 : FASTALPS_MATRICES);
  } else if constexpr (kLeft >= 2) {
    asm volatile(FASTALPS_WGMMA("16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11")
                 : FASTALPS_SUMS(kFirst), FASTALPS_SUMS(kFirst + 1)
                 : FASTALPS_MATRICES);
  } else {
    asm volatile(FASTALPS_WGMMA("8", "%0, %1, %2, %3", "%4", "%5", "%6", "%7")
                 : FASTALPS_SUMS(kFirst)
                 : FASTALPS_MATRICES);
  }
  constexpr int kDone = kLeft >= 8 ? 8 : kLeft >= 4 ? 4 : kLeft >= 2 ? 2 : 1;
  if constexpr (kLeft > kDone) {
    multiply_group<kTiles, kFirst + kDone>(sums, a, b.at(kDone * kPartBytes));
  }
#endif
}
#undef FASTALPS_SUMS
#undef FASTALPS_WGMMA
#undef FASTALPS_SIXTEEN
#undef FASTALPS_MATRICES

// Two bf16 in one word, rounded to nearest even, the first in the lower half.
FASTALPS_DEVICE uint32_t round_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// max(x, slope * x) of two bf16, products rounded to bf16.
FASTALPS_DEVICE uint32_t leaky_words(uint32_t pair, uint32_t slopes) {
  uint32_t scaled, result;
  constexpr uint32_t kMinusZeros = 0x80008000;  // What added to a product leaves its sign.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(scaled) : "r"(pair), "r"(slopes), "r"(kMinusZeros));
  asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(scaled));
  return result;
}

// Memory that no thread writes while the kernel runs.
template <typename T>
FASTALPS_DEVICE T read_only(const T* place) {
  return __ldg(place);
}

// Memory that another kernel may have written since this one was launched: not from the L1 cache.
FASTALPS_DEVICE int64_t read_written(const int64_t* place) {
  return __ldcg(reinterpret_cast<const long long*>(place));
}
FASTALPS_DEVICE uint32_t read_written(const uint32_t* place) { return __ldcg(place); }

// Results below float32's normal numbers are 0, which saves __expf's scaling around them.
FASTALPS_DEVICE float exponential(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.4426950408889634f * value));
  return result;
}
FASTALPS_DEVICE float hyperbolic_tangent(float value) { return tanhf(value); }
FASTALPS_DEVICE float reciprocal(float value) { return __fdividef(1.0f, value); }
FASTALPS_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
FASTALPS_DEVICE float inverse_root(float value) { return rsqrtf(value); }
FASTALPS_DEVICE float shuffle_down(float value, int distance) {
  return __shfl_down_sync(0xffffffffu, value, distance);
}

}  // namespace fastalps::cuda::fused
