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
  // The masked forms, with all lanes: gcc 12 warns of the plain ones.
  const __m512i words = _mm512_maskz_cvtepu8_epi32(0xffff, read<__m128i>(from));
  return bits_of<Vec>(_mm512_maskz_cvtepi32_ps(0xffff, words));
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

// Copies fewer than kLanes elements in pieces of fixed sizes: for a size that it does not know,
// the compiler calls memcpy.
template <typename T>
inline void copy_part(T* to, const T* from, int64_t count) {
#pragma GCC unroll 4
  for (int piece = kLanes / 2; piece > 0; piece /= 2) {
    if (!(count & piece)) continue;
    __builtin_memcpy(to, from, piece * sizeof(T));
    to += piece;
    from += piece;
  }
}

// Loads `count` (fewer than kLanes) elements; the other lanes are zero.
template <typename T>
inline Vec load_part(const T* from, int64_t count) {
  T lanes[kLanes];
  __builtin_memset(lanes, 0, sizeof(lanes));
  copy_part(lanes, from, count);
  return load(lanes);
}
#if defined(FASTALPS_AVX512)
inline Vec load_part(const float* from, int64_t count) {
  return bits_of<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
}
#elif defined(FASTALPS_AVX2)
inline Vec load_part(const float* from, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i filled = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  return bits_of<Vec>(_mm256_maskload_ps(from, filled));
}
#endif
template <typename T>
inline void store_part(T* to, Vec value, int64_t count) {
  T lanes[kLanes];
  store(lanes, value);
  copy_part(to, lanes, count);
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

// NaN passes through both: a comparison with NaN is false, as in the instructions max and min.
#if defined(FASTALPS_AVX512)
inline Vec clamp(Vec x, float limit) {
  const __m512 low = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-limit), bits_of<__m512>(x));
  return bits_of<Vec>(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(limit), low));
}
#elif defined(FASTALPS_AVX2)
inline Vec clamp(Vec x, float limit) {
  const __m256 low = _mm256_max_ps(_mm256_set1_ps(-limit), bits_of<__m256>(x));
  return bits_of<Vec>(_mm256_min_ps(_mm256_set1_ps(limit), low));
}
#else
inline Vec clamp(Vec x, float limit) {
  x = -limit > x ? splat(-limit) : x;
  return limit < x ? splat(limit) : x;
}
#endif

// 1 / (1 + exp(-x)) of `Count` vectors in step, so that their latencies overlap; error up to 2.1e-7
// absolute. exp(-x) = 2**n * 2**f, n whole and |f| <= 0.5. 2**f = (p + f) / (p - f) with p = f /
// tanh(f * ln2 / 2), which is even and nearly flat: two terms of it give 2**f with a relative error
// of 4e-7 in fewer instructions than a polynomial, since the quotient joins the one that is due
// anyway. Inlined by force: gcc calls it once for each vector otherwise.
template <int Count>
__attribute__((always_inline)) inline void sigmoid(Vec* x) {
  const float magic = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  const float to_base_2 = -1.44269504088896341f;
  Vec shifted[Count], f[Count], p[Count];
  // Beyond 87 the exponent of the result would leave its bits.
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) x[i] = clamp(x[i], 87.0f);
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) shifted[i] = x[i] * to_base_2 + magic;
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) f[i] = x[i] * to_base_2 - (shifted[i] - magic);
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) p[i] = (f[i] * f[i]) * 1.152360737e-01f + 2.885408163e+00f;
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    // n stands in the low bits of `shifted`: it is added to the exponent.
    const VecUInt n = bits_of<VecUInt>(shifted[i]) << 23;
    const Vec power = bits_of<Vec>(bits_of<VecUInt>(p[i] + f[i]) + n);
    const Vec below = p[i] - f[i];
    x[i] = below / (below + power);
  }
}

__attribute__((always_inline)) inline Vec sigmoid(Vec x) {
  sigmoid<1>(&x);
  return x;
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
__attribute__((always_inline)) inline void map(T* to, int64_t count, bool streaming, const F& f) {
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
