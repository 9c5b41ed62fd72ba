// What the kernels of csrc/cuda/*.cu use of CUDA, for a host: kernels run block by block and thread
// by thread, each launch to its end before the next. See tests/ops_emulator.py.
//
// Every thread of a block is a fiber, which waits at barriers and shuffles for the others. A launch
// fails, as one on a device would, where threads miss a barrier or lanes a shuffle. Threads take
// turns in ascending order in even blocks and in descending order in odd ones, so that what lacks a
// barrier shows. How memory is used is not checked: compute-sanitizer does that, on a device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // Blocks run one after the other.

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
using cudaStream_t = void*;
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

namespace emulation {

enum class Waits { kNot, kBarrier, kShuffle, kEnded };

// The one that launches run on. Few multiprocessors, so that loops over a grid repeat.
struct Device {
  static constexpr int kMultiprocessors = 2, kMostThreads = 1024, kLanes = 32;

  dim3 grid, size, block;  // Of the launch, of its blocks, and which one runs.
  Fibers fibers{kMostThreads};
  Waits waits[kMostThreads];
  uint64_t given[kMostThreads], taken[kMostThreads];
  int source[kMostThreads];
  cudaError_t error = cudaSuccess;

  static Device& get() {
    static Device device;
    return device;
  }

  dim3 thread() const {
    const auto number = static_cast<unsigned>(fibers.running());
    return {number % size.x, number / size.x % size.y, number / size.x / size.y};
  }

  void wait(Waits what) {
    waits[fibers.running()] = what;
    fibers.pause();
  }

  void run_block(const std::function<void()>& body, bool descending) {
    const int threads = static_cast<int>(size.x * size.y * size.z);
    std::fill_n(waits, threads, Waits::kNot);
    fibers.begin(body);
    while (error == cudaSuccess) {
      for (int i = 0; i < threads; ++i) {
        const int number = descending ? threads - 1 - i : i;
        if (waits[number] == Waits::kNot && fibers.resume(number)) waits[number] = Waits::kEnded;
      }
      bool shuffled = false;
      for (int first = 0; first < threads; first += kLanes) {
        if (waits[first] == Waits::kShuffle) {
          shuffle(first, std::min(first + kLanes, threads));
          shuffled = true;
        }
      }
      if (shuffled) continue;
      for (int i = 1; i < threads; ++i) {
        if (waits[i] != waits[0]) error = cudaErrorLaunchFailure;
      }
      if (waits[0] == Waits::kEnded) return;
      std::fill_n(waits, threads, Waits::kNot);
    }
  }

  // All lanes of a warp have said what they give and whose they take.
  void shuffle(int first, int end) {
    for (int lane = first; lane < end; ++lane) {
      if (waits[lane] != Waits::kShuffle) error = cudaErrorLaunchFailure;
      const bool inside = source[lane] >= first && source[lane] < end;
      taken[lane] = given[inside ? source[lane] : lane];
      waits[lane] = Waits::kNot;
    }
  }
};

template <typename... Arguments>
struct Call {
  dim3 blocks, threads;
  std::tuple<Arguments...> arguments;
};

// kernel<<<blocks, threads, shared, stream>>>(arguments) is rewritten to
// kernel % Launch(blocks, threads, shared, stream)(arguments).
struct Launch {
  dim3 blocks, threads;

  Launch(dim3 blocks_, dim3 threads_, size_t, cudaStream_t) : blocks(blocks_), threads(threads_) {}

  template <typename... Arguments>
  Call<Arguments...> operator()(const Arguments&... arguments) const {
    return {blocks, threads, {arguments...}};
  }
};

template <typename... Parameters, typename... Arguments>
void operator%(void (*kernel)(Parameters...), const Call<Arguments...>& call) {
  Device& device = Device::get();
  const unsigned threads = call.threads.x * call.threads.y * call.threads.z;
  if (threads == 0 || threads > Device::kMostThreads || call.blocks.x == 0 || call.blocks.y == 0 ||
      call.blocks.y > 65535 || call.blocks.z != 1) {
    device.error = cudaErrorInvalidValue;
    return;
  }
  device.grid = call.blocks;
  device.size = call.threads;
  unsigned count = 0;
  for (unsigned y = 0; y < call.blocks.y; ++y) {
    for (unsigned x = 0; x < call.blocks.x && device.error == cudaSuccess; ++x) {
      device.block = {x, y, 0};
      device.run_block([&] { std::apply(kernel, call.arguments); }, count++ % 2 != 0);
    }
  }
}

}  // namespace emulation

#define threadIdx (emulation::Device::get().thread())
#define blockIdx (emulation::Device::get().block)
#define blockDim (emulation::Device::get().size)
#define gridDim (emulation::Device::get().grid)

inline cudaError_t cudaGetLastError() {
  return std::exchange(emulation::Device::get().error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t) { return "the emulated launch failed"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::Device::kMultiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** place, size_t bytes, unsigned) {
  *place = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* place) {
  std::free(place);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// CUDA C++ Programming Guide and CUDA Math API: what each of these computes.
inline void __syncthreads() { emulation::Device::get().wait(emulation::Waits::kBarrier); }

namespace emulation {

template <typename T>
T shuffle(T value, int distance) {
  static_assert(sizeof(T) <= 8);
  Device& device = Device::get();
  const int number = device.fibers.running();
  std::memcpy(&device.given[number], &value, sizeof(T));
  device.source[number] = number + distance;
  device.wait(Waits::kShuffle);
  std::memcpy(&value, &device.taken[number], sizeof(T));
  return value;
}

}  // namespace emulation

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  return emulation::shuffle(value, distance);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  return emulation::shuffle(value, -distance);
}

template <typename T>
T __ldg(const T* place) {
  // A device faults on an unaligned address; a host would not notice.
  if (reinterpret_cast<uintptr_t>(place) % sizeof(T) != 0) {
    emulation::Device::get().error = cudaErrorLaunchFailure;
  }
  return *place;
}
template <typename T>
T __ldcs(const T* place) {
  return __ldg(place);
}

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline uint32_t __vsadu4(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (int shift = 0; shift < 32; shift += 8) {
    sum += static_cast<uint32_t>(
        std::abs(static_cast<int>(a >> shift & 255) - static_cast<int>(b >> shift & 255)));
  }
  return sum;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return std::exp(value); }

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
