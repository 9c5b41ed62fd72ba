// The element types that the kernels of every device know.
#pragma once

#include <cstdint>

namespace fastalps {

enum class DType : int32_t { kUInt8, kFloat16, kBFloat16, kFloat32, kFloat64 };

constexpr int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return 1;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    default:
      return 2;
  }
}

}  // namespace fastalps
