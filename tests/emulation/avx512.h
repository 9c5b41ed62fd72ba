// The AVX-512, AVX-VNNI and AMX instructions that csrc/cpu uses, as functions on vectors of gcc and
// clang, for processors without them: `make emulate` builds the library with this in front of each
// source that needs them. Written from Intel's descriptions of the operations.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

template <typename To, typename From>
inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline float widened(uint16_t bfloat) { return cast<float>(static_cast<uint32_t>(bfloat) << 16); }

inline __m512i cvtepu8_epi32(__mmask16 mask, __m128i bytes) {
  uint8_t byte[16];
  std::memcpy(byte, &bytes, sizeof(byte));
  Ints result = {};
  for (int i = 0; i < 16; ++i) result[i] = mask >> i & 1 ? byte[i] : 0;
  return cast<__m512i>(result);
}

inline __m512 cvtepi32_ps(__mmask16 mask, __m512i words) {
  const Ints word = cast<Ints>(words);
  Floats result = {};
  for (int i = 0; i < 16; ++i) result[i] = mask >> i & 1 ? static_cast<float>(word[i]) : 0.0f;
  return cast<__m512>(result);
}

inline __m512 loadu_ps(__mmask16 mask, const void* from) {
  Floats result = {};
  for (int i = 0; i < 16; ++i) {
    float value = 0;
    if (mask >> i & 1) std::memcpy(&value, static_cast<const float*>(from) + i, sizeof(value));
    result[i] = value;
  }
  return cast<__m512>(result);
}

// The second where either is NaN, as the instructions.
inline __m512 max_ps(__mmask16 mask, __m512 left, __m512 right) {
  const Floats a = cast<Floats>(left), b = cast<Floats>(right);
  Floats result = {};
  for (int i = 0; i < 16; ++i) result[i] = mask >> i & 1 ? (a[i] > b[i] ? a[i] : b[i]) : 0.0f;
  return cast<__m512>(result);
}

inline __m512 min_ps(__mmask16 mask, __m512 left, __m512 right) {
  const Floats a = cast<Floats>(left), b = cast<Floats>(right);
  Floats result = {};
  for (int i = 0; i < 16; ++i) result[i] = mask >> i & 1 ? (a[i] < b[i] ? a[i] : b[i]) : 0.0f;
  return cast<__m512>(result);
}

inline void stream_ps(float* to, __m512 value) {
  if (reinterpret_cast<uintptr_t>(to) % 64) std::abort();  // as the instruction faults
  std::memcpy(to, &value, sizeof(value));
}

inline __m512i madd_epi16(__m512i left, __m512i right) {
  int16_t a[32], b[32];
  std::memcpy(a, &left, sizeof(a));
  std::memcpy(b, &right, sizeof(b));
  Ints result = {};
  for (int i = 0; i < 32; ++i) result[i / 2] += int32_t{a[i]} * b[i];
  return cast<__m512i>(result);
}

inline __m512i dpbusd(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  Ints sum = cast<Ints>(sums);
  uint8_t a[64];
  int8_t b[64];
  std::memcpy(a, &unsigned_bytes, sizeof(a));
  std::memcpy(b, &signed_bytes, sizeof(b));
  for (int i = 0; i < 64; ++i) sum[i / 4] += int32_t{a[i]} * b[i];
  return cast<__m512i>(sum);
}

inline __m256i dpbusd_avx(__m256i sums, __m256i unsigned_bytes, __m256i signed_bytes) {
  int32_t sum[8];
  uint8_t a[32];
  int8_t b[32];
  std::memcpy(sum, &sums, sizeof(sum));
  std::memcpy(a, &unsigned_bytes, sizeof(a));
  std::memcpy(b, &signed_bytes, sizeof(b));
  for (int i = 0; i < 32; ++i) sum[i / 4] += int32_t{a[i]} * b[i];
  return cast<__m256i>(sum);
}

inline __m512 dpbf16(__m512 sums, __m512bh left, __m512bh right) {
  Floats sum = cast<Floats>(sums);
  uint16_t a[32], b[32];
  std::memcpy(a, &left, sizeof(a));
  std::memcpy(b, &right, sizeof(b));
  // The odd product is added first.
  for (int i = 0; i < 16; ++i) {
    sum[i] = __builtin_fmaf(widened(a[2 * i + 1]), widened(b[2 * i + 1]), sum[i]);
    sum[i] = __builtin_fmaf(widened(a[2 * i]), widened(b[2 * i]), sum[i]);
  }
  return cast<__m512>(sum);
}

// Tile registers of a thread. What the hardware would refuse ends the program.
struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
};

struct Tiles {
  bool configured = false;
  Tile tile[8];
};

inline Tiles& tiles() {
  static thread_local Tiles state;
  return state;
}

inline void demand(bool condition) {
  if (!condition) std::abort();
}

inline Tile& tile(int number) {
  demand(tiles().configured);
  Tile& found = tiles().tile[number];
  demand(found.rows > 0 && found.bytes > 0);
  return found;
}

inline void tile_loadconfig(const void* shapes) {
  uint8_t raw[64];
  std::memcpy(raw, shapes, sizeof(raw));
  demand(raw[0] == 1 && raw[1] == 0);
  for (int i = 2; i < 16; ++i) demand(raw[i] == 0);
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, raw + 16 + 2 * i, sizeof(bytes));
    const int rows = raw[48 + i];
    demand(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0) && (i < 8 || rows == 0));
    if (i < 8) {
      tiles().tile[i].rows = rows;
      tiles().tile[i].bytes = bytes;
      std::memset(tiles().tile[i].data, 0, sizeof(tiles().tile[i].data));
    }
  }
  tiles().configured = true;
}

inline void tile_release() { tiles().configured = false; }

inline void tile_zero(int number) { std::memset(tile(number).data, 0, sizeof(Tile::data)); }

inline void tile_loadd(int number, const void* from, int64_t stride) {
  Tile& to = tile(number);
  std::memset(to.data, 0, sizeof(to.data));
  for (int row = 0; row < to.rows; ++row) {
    std::memcpy(to.data[row], static_cast<const char*>(from) + row * stride, to.bytes);
  }
}

inline void tile_stored(int number, void* to, int64_t stride) {
  const Tile& from = tile(number);
  for (int row = 0; row < from.rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, from.data[row], from.bytes);
  }
}

// A product's shapes: rows x words, words x columns, rows x columns.
inline void demand_shapes(const Tile& sum, const Tile& a, const Tile& b) {
  demand(&sum != &a && &sum != &b && &a != &b);
  demand(a.bytes % 4 == 0 && b.bytes % 4 == 0);
  demand(sum.rows == a.rows && sum.bytes == b.bytes && a.bytes == 4 * b.rows);
}

// Signed bytes of the first by unsigned ones of the second.
inline void tile_dpbsud(int to, int left, int right) {
  Tile &sum = tile(to), &a = tile(left), &b = tile(right);
  demand_shapes(sum, a, b);
  for (int row = 0; row < sum.rows; ++row) {
    for (int column = 0; column < sum.bytes / 4; ++column) {
      int32_t total;
      std::memcpy(&total, &sum.data[row][4 * column], 4);
      for (int k = 0; k < a.bytes; ++k) {
        const int32_t signed_byte = static_cast<int8_t>(a.data[row][k]);
        total += signed_byte * b.data[k / 4][4 * column + k % 4];
      }
      std::memcpy(&sum.data[row][4 * column], &total, 4);
    }
  }
}

inline void tile_dpbf16ps(int to, int left, int right) {
  Tile &sum = tile(to), &a = tile(left), &b = tile(right);
  demand_shapes(sum, a, b);
  const auto value = [](const uint8_t* at) {
    uint16_t bits;
    std::memcpy(&bits, at, sizeof(bits));
    return widened(bits);
  };
  for (int row = 0; row < sum.rows; ++row) {
    for (int column = 0; column < sum.bytes / 4; ++column) {
      // Sums of even and of odd places are added at last.
      float parts[2] = {0, 0};
      for (int k = 0; k < a.bytes / 2; ++k) {
        parts[k % 2] =
            __builtin_fmaf(value(&a.data[row][2 * k]),
                           value(&b.data[k / 2][4 * column + 2 * (k % 2)]), parts[k % 2]);
      }
      float total;
      std::memcpy(&total, &sum.data[row][4 * column], 4);
      total += parts[0] + parts[1];
      std::memcpy(&sum.data[row][4 * column], &total, 4);
    }
  }
}

}  // namespace emulated

#define _mm512_maskz_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_maskz_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_maskz_loadu_ps emulated::loadu_ps
#define _mm512_maskz_max_ps emulated::max_ps
#define _mm512_maskz_min_ps emulated::min_ps
#define _mm512_stream_ps emulated::stream_ps
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_dpbusd_epi32 emulated::dpbusd
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd_avx
#define _mm512_dpbf16_ps emulated::dpbf16
#define _mm512_set1_ps(value) emulated::cast<__m512>((value) - emulated::Floats{})
#define _mm512_setzero_ps() emulated::cast<__m512>(emulated::Floats{})

// Some are macros of the compiler's headers.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbsud emulated::tile_dpbsud
#define _tile_dpbf16ps emulated::tile_dpbf16ps
