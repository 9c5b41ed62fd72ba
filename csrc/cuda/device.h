// What the kernels share on the host side: device facts and grid sizes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>

namespace fastalps::cuda {

constexpr int kThreads = 256;

inline int64_t ceil_divide(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// An attribute of the current device, from 1 up; asked of the driver once a device.
template <cudaDeviceAttr kAttribute>
inline int device_attribute() {
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  const bool cached = device < static_cast<int>(known.size());
  int found = cached ? known[device].load(std::memory_order_relaxed) : 0;
  if (found > 0) return found;
  if (cudaDeviceGetAttribute(&found, kAttribute, device) != cudaSuccess) return 1;
  if (cached) known[device].store(found, std::memory_order_relaxed);
  return found;
}

inline int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// Blocks for a grid-stride loop: enough waves to balance the tail, few enough to amortise setup.
inline int grid_blocks(int64_t wanted) {
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, int64_t{64} * multiprocessors()));
}

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace fastalps::cuda
