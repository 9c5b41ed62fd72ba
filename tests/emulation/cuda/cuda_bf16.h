// bfloat16 of CUDA's header: the upper half of a float32, rounded to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 half) {
  const uint32_t bits = static_cast<uint32_t>(half.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Rounded once: an inexact float32 on the way is made odd, so that it is no tie of bfloat16.
inline __nv_bfloat16 __double2bfloat16(double value) {
  float near = static_cast<float>(value);
  if (std::isfinite(near) && near != value) {
    uint32_t bits;
    std::memcpy(&bits, &near, 4);
    if (std::fabs(near) > std::fabs(value)) --bits;
    bits |= 1;
    std::memcpy(&near, &bits, 4);
  }
  return __float2bfloat16_rn(near);
}
