// Vectors of float for one instruction set, and conversions of the other dtypes to and from them.
// Included once per instruction set (see kernels_*.cpp), inside an anonymous namespace: nothing
// here may become a shared symbol, or the linker could hand AVX-512 code to an older processor.
// No standard-library templates for the same reason.

#if defined(FASTALPS_AVX512)
constexpr int kLanes = 16;
#elif defined(FASTALPS_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecUInt __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecShort __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VecByte __attribute__((vector_size(kLanes)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename V>
inline V read(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
inline void write(void* to, const V& value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

inline Vec splat(float value) { return value - Vec{}; }

// Bitwise select: `mask` lanes are all ones or all zeros.
inline VecUInt pick(VecUInt mask, VecUInt yes, VecUInt no) { return (mask & yes) | (~mask & no); }

// IEEE half to float: shift the exponent into place and rescale, which also normalises subnormals.
inline Vec half_to_float(VecShort half) {
  const VecUInt bits = __builtin_convertvector(half, VecUInt);
  const VecUInt sign = (bits & 0x8000u) << 16;
  const VecUInt magnitude = (bits & 0x7fffu) << 13;
  const Vec scaled = bits_of<Vec>(magnitude) * 0x1p112f;
  const VecUInt special = (VecUInt)(magnitude >= 0x0f800000u);
  const VecUInt value = pick(special, magnitude | 0x7f800000u, bits_of<VecUInt>(scaled));
  return bits_of<Vec>(value | sign);
}

// Float to IEEE half, round to nearest even.
inline VecShort float_to_half(Vec value) {
  const VecUInt bits = bits_of<VecUInt>(value);
  const VecUInt sign = bits & 0x80000000u;
  const VecUInt magnitude = bits ^ sign;
  // Subnormal results: adding 0.5 lets the float adder do the rounding.
  const VecUInt small = bits_of<VecUInt>(bits_of<Vec>(magnitude) + splat(0.5f)) - 0x3f000000u;
  const VecUInt odd = (magnitude >> 13) & 1u;
  const VecUInt normal = (magnitude + 0xc8000fffu + odd) >> 13;
  const VecUInt is_small = (VecUInt)(magnitude < 0x38800000u);
  const VecUInt is_large = (VecUInt)(magnitude >= 0x47800000u);
  const VecUInt is_nan = (VecUInt)(magnitude > 0x7f800000u);
  VecUInt result = pick(is_small, small, normal);
  result = pick(is_large, pick(is_nan, VecUInt{} + 0x7e00u, VecUInt{} + 0x7c00u), result);
  return __builtin_convertvector(result | (sign >> 16), VecShort);
}

inline VecShort float_to_bfloat16(Vec value) {
  const VecUInt bits = bits_of<VecUInt>(value);
  const VecUInt rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecUInt is_nan = (VecUInt)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector(pick(is_nan, VecUInt{} + 0x7fc0u, rounded), VecShort);
}

inline Vec load(const float* from) { return read<Vec>(from); }
// By intrinsics: gcc 12 widens bytes to words one at a time (tiling took three times as long).
#if defined(FASTALPS_AVX512)
inline Vec load(const uint8_t* from) {
  return bits_of<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(read<__m128i>(from))));
}
#elif defined(FASTALPS_AVX2)
inline Vec load(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return bits_of<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
}
#else
inline Vec load(const uint8_t* from) {
  return __builtin_convertvector(__builtin_convertvector(read<VecByte>(from), VecInt), Vec);
}
#endif
inline Vec load(const Half* from) { return half_to_float(read<VecShort>(from)); }
inline Vec load(const BFloat16* from) {
  return bits_of<Vec>(__builtin_convertvector(read<VecShort>(from), VecUInt) << 16);
}

inline void store(float* to, Vec value) { write(to, value); }
inline void store(Half* to, Vec value) { write(to, float_to_half(value)); }
inline void store(BFloat16* to, Vec value) { write(to, float_to_bfloat16(value)); }

// Loads `count` (fewer than kLanes) elements; the other lanes are zero.
template <typename T>
inline Vec load_part(const T* from, int64_t count) {
  T lanes[kLanes];
  __builtin_memset(lanes, 0, sizeof(lanes));
  __builtin_memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store_part(T* to, Vec value, int64_t count) {
  T lanes[kLanes];
  store(lanes, value);
  __builtin_memcpy(to, lanes, count * sizeof(T));
}

// One element at a time, in the type that it is computed in.
template <typename T>
struct ComputeType {
  typedef float type;
};
template <>
struct ComputeType<double> {
  typedef double type;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

inline float get(const float* from) { return *from; }
inline double get(const double* from) { return *from; }
inline float get(const uint8_t* from) { return static_cast<float>(*from); }
inline float get(const Half* from) { return load_part(from, 1)[0]; }
inline float get(const BFloat16* from) {
  return bits_of<float>(static_cast<uint32_t>(from->bits) << 16);
}
inline void put(float* to, double value) { *to = static_cast<float>(value); }
inline void put(double* to, double value) { *to = value; }
inline void put(Half* to, double value) { store_part(to, splat(static_cast<float>(value)), 1); }
inline void put(BFloat16* to, double value) { store_part(to, splat(static_cast<float>(value)), 1); }

inline float sum_lanes(Vec value) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

// 1 / (1 + exp(-x)), relative error about 1e-7. exp by range reduction to [-ln2/2, ln2/2] and a
// polynomial (Cephes' coefficients); NaN passes through the comparisons and the arithmetic.
inline Vec sigmoid(Vec x) {
  const Vec limit = splat(87.0f);
  Vec y = -x;
  y = y > limit ? limit : y;
  y = y < -limit ? -limit : y;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
  const Vec shifted = y * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecUInt exponent = (bits_of<VecUInt>(shifted) - 0x4b400000u + 127u) << 23;
  return 1.0f / (1.0f + p * bits_of<Vec>(exponent));
}

inline double sigmoid(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }

// Writing past the caches saves reading the lines first; it pays where the result is larger than
// the last-level cache. `to` is aligned to a vector.
#if defined(FASTALPS_AVX512)
inline void stream(float* to, Vec value) { _mm512_stream_ps(to, bits_of<__m512>(value)); }
inline void stream_short(void* to, VecShort value) {
  _mm256_stream_si256(static_cast<__m256i*>(to), bits_of<__m256i>(value));
}
#elif defined(FASTALPS_AVX2)
inline void stream(float* to, Vec value) { _mm256_stream_ps(to, bits_of<__m256>(value)); }
inline void stream_short(void* to, VecShort value) {
  _mm_stream_si128(static_cast<__m128i*>(to), bits_of<__m128i>(value));
}
#elif defined(__SSE2__)
inline void stream(float* to, Vec value) { _mm_stream_ps(to, bits_of<__m128>(value)); }
inline void stream_short(void* to, VecShort value) {
  _mm_stream_si64(static_cast<long long*>(to), bits_of<long long>(value));
}
#else
inline void stream(float* to, Vec value) { store(to, value); }
inline void stream_short(void* to, VecShort value) { write(to, value); }
#endif
inline void stream(Half* to, Vec value) { stream_short(to, float_to_half(value)); }
inline void stream(BFloat16* to, Vec value) { stream_short(to, float_to_bfloat16(value)); }

inline void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Elements before `to` is aligned for stream(): at most `count`.
template <typename T>
inline int64_t misaligned(const T* to, int64_t count) {
  const uintptr_t width = sizeof(T) * kLanes;
  const uintptr_t over = reinterpret_cast<uintptr_t>(to) % width;
  const int64_t head = over ? static_cast<int64_t>((width - over) / sizeof(T)) : 0;
  return head < count ? head : count;
}

// Applies f to each vector of `count` elements: result[i] = f(i, partial), where `partial` is the
// number of lanes that hold data (kLanes but at the ends), and writes it.
template <typename T, typename F>
inline void map(T* to, int64_t count, bool streaming, const F& f) {
  int64_t i = 0;
  if (streaming) {
    const int64_t head = misaligned(to, count);
    if (head) store_part(to, f(0, head), head);
    for (i = head; i + kLanes <= count; i += kLanes) stream(to + i, f(i, kLanes));
  } else {
    for (; i + kLanes <= count; i += kLanes) store(to + i, f(i, kLanes));
  }
  if (i < count) store_part(to + i, f(i, count - i), count - i);
}

template <typename T>
inline Vec load_lanes(const T* from, int64_t lanes) {
  return lanes == kLanes ? load(from) : load_part(from, lanes);
}

// A type as a value, so that generic lambdas can be instantiated for it.
template <typename T>
struct Type {
  typedef T type;
};

template <typename F>
inline void with_floating(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Type<Half>{});
    case DType::kBFloat16:
      return f(Type<BFloat16>{});
    case DType::kFloat64:
      return f(Type<double>{});
    default:
      return f(Type<float>{});
  }
}

// For dtypes of at most 32 bits: float64 has its own, scalar code.
template <typename F>
inline void with_small_floating(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Type<Half>{});
    case DType::kBFloat16:
      return f(Type<BFloat16>{});
    default:
      return f(Type<float>{});
  }
}
