// The engine in bf16 and int8. A word of 32 bits holds the same pixel's next channels of one patch,
// two in bf16 and four in int8; the rest is as in fp32: words of many patches side by side, a
// broadcast word of weights times three vectors of them. Direct convolutions: sums of inputs would
// need more bits. Sums are int32 (exact) or float32.
//
// Without instructions for it (AVX512-VNNI, AVX-VNNI, AVX512-BF16) the same sums come from those
// that there are, slower; with tile registers (AMX), the layers with many channels are products of
// matrices.

// Round to nearest, ties to even, of numbers from 0 to 2**22: the bits below the exponent.
inline VecUInt rounded(Vec x) { return bits_of<VecUInt>(x + 12582912.0f) & 0x3fffffu; }

inline Vec clamp_byte(Vec x) {
#if defined(FASTALPS_AVX512)
  const __m512 low = _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), bits_of<__m512>(x));
  return bits_of<Vec>(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(255.0f), low));
#elif defined(FASTALPS_AVX2)
  const __m256 low = _mm256_max_ps(_mm256_setzero_ps(), bits_of<__m256>(x));
  return bits_of<Vec>(_mm256_min_ps(_mm256_set1_ps(255.0f), low));
#else
  x = x > 0.0f ? x : splat(0.0f);
  return x < 255.0f ? x : splat(255.0f);
#endif
}

// Whole numbers nearest to four vectors' (ties to even), clamped to 0 to 255, as the bytes of a
// word. The instructions that narrow numbers clamp them, too, but for those beyond 32 bits.
#if defined(FASTALPS_AVX512) && !defined(FASTALPS_EMULATED)
#define FASTALPS_NARROWS
inline VecUInt nearest_bytes(const Vec* x) {
  __m512i whole[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 most = _mm512_set1_ps(255.0f);
    whole[i] =
        _mm512_maskz_cvtps_epi32(0xffff, _mm512_maskz_min_ps(0xffff, most, bits_of<__m512>(x[i])));
  }
  const __m512i shorts[] = {_mm512_packs_epi32(whole[0], whole[1]),
                            _mm512_packs_epi32(whole[2], whole[3])};
  // Now four lanes of one vector lie before those of the next.
  const __m512i order = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  return bits_of<VecUInt>(_mm512_shuffle_epi8(_mm512_packus_epi16(shorts[0], shorts[1]), order));
}
#elif defined(FASTALPS_AVX2)
#define FASTALPS_NARROWS
inline VecUInt nearest_bytes(const Vec* x) {
  __m256i whole[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    whole[i] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(255.0f), bits_of<__m256>(x[i])));
  }
  const __m256i shorts[] = {_mm256_packs_epi32(whole[0], whole[1]),
                            _mm256_packs_epi32(whole[2], whole[3])};
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400));
  return bits_of<VecUInt>(_mm256_shuffle_epi8(_mm256_packus_epi16(shorts[0], shorts[1]), order));
}
#endif

inline VecUInt splat_word(uint32_t word) { return word - VecUInt{}; }
inline VecUInt load_words(const uint32_t* from) { return read<VecUInt>(from); }

struct Int8 {
  static constexpr int kGroup = 4;
  typedef VecInt Sum;

#if defined(FASTALPS_VNNI)
  typedef VecUInt Values, Weights;
  static Values values(VecUInt words) { return words; }
  static Weights weights(uint32_t word) { return splat_word(word); }
  static Sum add(Sum sum, Values x, Weights w) {
#if defined(FASTALPS_AVX512)
    return bits_of<Sum>(
        _mm512_dpbusd_epi32(bits_of<__m512i>(sum), bits_of<__m512i>(x), bits_of<__m512i>(w)));
#else
    return bits_of<Sum>(
        _mm256_dpbusd_avx_epi32(bits_of<__m256i>(sum), bits_of<__m256i>(x), bits_of<__m256i>(w)));
#endif
  }
#if defined(FASTALPS_AMX)
  // Signed bytes (weights) by unsigned ones; registers are part of an instruction.
  static void multiply_tile_0() { _tile_dpbsud(0, 3, 4); }
  static void multiply_tile_1() { _tile_dpbsud(1, 3, 5); }
  static void multiply_tile_2() { _tile_dpbsud(2, 3, 6); }
#endif
#elif defined(__SSE2__)
  // Bytes of even and of odd place, as 16 bits each.
  typedef int16_t Short __attribute__((vector_size(4 * kLanes)));
  struct Values {
    VecUInt even, odd;
  };
  struct Weights {
    Short even, odd;
  };
  static Values values(VecUInt words) { return {words & 0xff00ffu, (words >> 8) & 0xff00ffu}; }
  static Weights weights(uint32_t word) {
    const Short both = bits_of<Short>(splat_word(word));
    return {(both << 8) >> 8, both >> 8};
  }
  static Sum pairs(VecUInt x, Short w) {
#if defined(FASTALPS_AVX512)
    return bits_of<Sum>(_mm512_madd_epi16(bits_of<__m512i>(x), bits_of<__m512i>(w)));
#elif defined(FASTALPS_AVX2)
    return bits_of<Sum>(_mm256_madd_epi16(bits_of<__m256i>(x), bits_of<__m256i>(w)));
#else
    return bits_of<Sum>(_mm_madd_epi16(bits_of<__m128i>(x), bits_of<__m128i>(w)));
#endif
  }
  static Sum add(Sum sum, const Values& x, const Weights& w) {
    return sum + (pairs(x.even, w.even) + pairs(x.odd, w.odd));
  }
#else
  struct Values {
    VecInt byte[4];
  };
  struct Weights {
    VecInt byte[4];
  };
  static Values values(VecUInt words) {
    Values x;
    for (int i = 0; i < 4; ++i) x.byte[i] = bits_of<VecInt>((words >> (8 * i)) & 0xffu);
    return x;
  }
  static Weights weights(uint32_t word) {
    Weights w;
    for (int i = 0; i < 4; ++i) w.byte[i] = static_cast<int8_t>(word >> (8 * i)) - VecInt{};
    return w;
  }
  static Sum add(Sum sum, const Values& x, const Weights& w) {
    for (int i = 0; i < 4; ++i) sum += x.byte[i] * w.byte[i];
    return sum;
  }
#endif

  static Vec sum_to_float(Sum sum) { return __builtin_convertvector(sum, Vec); }
  static VecUInt encode(const Vec* x, const Coding& coding) {
#if defined(FASTALPS_NARROWS)
    Vec coded[kGroup];
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) coded[i] = x[i] * coding.factor + coding.zero;
    return nearest_bytes(coded);
#else
    VecUInt word = {};
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      word |= rounded(clamp_byte(x[i] * coding.factor + coding.zero)) << (8 * i);
    }
    return word;
#endif
  }
  // The sum of bytes of `count` words at `distance` words, at most 256.
  static void pool(const uint32_t* in, const int32_t* pixels, int count, int64_t distance,
                   Vec* sums) {
    VecUInt even = {}, odd = {};
    for (int i = 0; i < count; ++i) {
      const VecUInt words = load_words(in + pixels[i] * distance);
      even += words & 0xff00ffu;
      odd += (words >> 8) & 0xff00ffu;
    }
    sums[0] = __builtin_convertvector(even & 0xffffu, Vec);
    sums[1] = __builtin_convertvector(odd & 0xffffu, Vec);
    sums[2] = __builtin_convertvector(even >> 16, Vec);
    sums[3] = __builtin_convertvector(odd >> 16, Vec);
  }
};

struct BFloat {
  static constexpr int kGroup = 2;
  typedef Vec Sum;

#if defined(FASTALPS_BF16)
  typedef VecUInt Values, Weights;
  static Values values(VecUInt words) { return words; }
  static Weights weights(uint32_t word) { return splat_word(word); }
  static Sum add(Sum sum, Values x, Weights w) {
    return bits_of<Sum>(
        _mm512_dpbf16_ps(bits_of<__m512>(sum), bits_of<__m512bh>(x), bits_of<__m512bh>(w)));
  }
#if defined(FASTALPS_AMX)
  static void multiply_tile_0() { _tile_dpbf16ps(0, 3, 4); }
  static void multiply_tile_1() { _tile_dpbf16ps(1, 3, 5); }
  static void multiply_tile_2() { _tile_dpbf16ps(2, 3, 6); }
#endif
#else
  struct Values {
    Vec even, odd;
  };
  typedef Values Weights;
  static Values values(VecUInt words) {
    return {bits_of<Vec>(words << 16), bits_of<Vec>(words & 0xffff0000u)};
  }
  static Weights weights(uint32_t word) { return values(splat_word(word)); }
  static Sum add(Sum sum, const Values& x, const Weights& w) {
    sum += x.even * w.even;
    return sum + x.odd * w.odd;
  }
#endif

  static Vec sum_to_float(Sum sum) { return sum; }
  // Round to nearest, ties to even; of finite numbers.
  static VecUInt bits(Vec x) {
    const VecUInt whole = bits_of<VecUInt>(x);
    return whole + 0x7fffu + ((whole >> 16) & 1u);
  }
  static VecUInt encode(const Vec* x, const Coding& coding) {
    return (bits(x[0] * coding.factor) >> 16) | (bits(x[1] * coding.factor) & 0xffff0000u);
  }
  static void pool(const uint32_t* in, const int32_t* pixels, int count, int64_t distance,
                   Vec* sums) {
    sums[0] = sums[1] = Vec{};
    for (int i = 0; i < count; ++i) {
      const VecUInt words = load_words(in + pixels[i] * distance);
      sums[0] += bits_of<Vec>(words << 16);
      sums[1] += bits_of<Vec>(words & 0xffff0000u);
    }
  }
};

inline int64_t groups_of(int64_t channels, int group) { return (channels + group - 1) / group; }

// Floats of `pixels` pixels (pixel, channel, patch) to words. The last channel also fills what is
// left of its word, where weights may hold what rounding took from its own (narrow.py).
template <typename P, int V>
void encode_pixels(const float* from, int64_t pixels, int64_t channels, const Coding& coding,
                   uint32_t* to) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; c += P::kGroup) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vec x[P::kGroup];
        for (int i = 0; i < P::kGroup; ++i) {
          const int64_t channel = c + i < channels ? c + i : channels - 1;
          x[i] = load(from + ((p * channels + channel) * V + v) * kLanes);
        }
        write(to, P::encode(x, coding));
        to += kLanes;
      }
    }
  }
}

// `Rows` output channels of V vectors, from sums to words or floats.
template <typename P, int V, int Rows>
__attribute__((always_inline)) inline void finish_narrow(const NarrowLayer& layer,
                                                         const typename P::Sum (*sums)[V],
                                                         int64_t bias_class, int64_t first,
                                                         void* to) {
  // Read once: for all that the compiler knows, what is written here could be the layer.
  const bool plain = layer.plain;
  const Coding coding = layer.coding;
  const Vec slope = splat(layer.slope);
  Vec bias[Rows], scale[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    bias[r] = splat(layer.bias[bias_class * layer.out_channels + first + r]);
    scale[r] = splat(layer.scale[first + r]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    Vec x[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      x[r] = leaky(P::sum_to_float(sums[r][v]) * scale[r] + bias[r], slope);
    }
    if (plain) {
      float* at = static_cast<float*>(to) + (first * V + v) * kLanes;
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) store(at + r * V * kLanes, x[r]);
    } else {
      uint32_t* at = static_cast<uint32_t*>(to) + (first / P::kGroup * V + v) * kLanes;
#pragma GCC unroll 2
      for (int g = 0; g * P::kGroup < Rows; ++g) {
        write(at + g * V * kLanes, P::encode(x + g * P::kGroup, coding));
      }
    }
  }
}

template <typename P, int V, int Rows>
__attribute__((always_inline)) inline void multiply_narrow(const NarrowLayer& layer,
                                                           const NarrowPixel& pixel,
                                                           const uint32_t* in, int64_t groups,
                                                           int64_t first, void* to) {
  typename P::Sum sums[Rows][V] = {};
  for (int t = 0; t < pixel.count; ++t) {
    const uint32_t* x = in + pixel.terms[t].index * groups * V * kLanes;
    const uint32_t* w = layer.words + (pixel.terms[t].factor * layer.out_channels + first) * groups;
    for (int64_t g = 0; g < groups; ++g) {
      typename P::Values value[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) value[v] = P::values(load_words(x + v * kLanes));
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const typename P::Weights weight = P::weights(w[r * groups + g]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = P::add(sums[r][v], value[v], weight);
      }
      x += V * kLanes;
    }
  }
  finish_narrow<P, V, Rows>(layer, sums, pixel.bias_class, first, to);
}

// One output channel of kTile pixels that have the same filters.
template <typename P, int V>
inline void multiply_narrow_pixels(const NarrowLayer& layer, const NarrowPixel* pixels,
                                   const uint32_t* in, int64_t groups, float* to) {
  typename P::Sum sums[kTile][V] = {};
  for (int t = 0; t < pixels[0].count; ++t) {
    const uint32_t* x[kTile];
    for (int p = 0; p < kTile; ++p) x[p] = in + pixels[p].terms[t].index * groups * V * kLanes;
    const uint32_t* w = layer.words + pixels[0].terms[t].factor * groups;
    for (int64_t g = 0; g < groups; ++g) {
      const typename P::Weights weight = P::weights(w[g]);
#pragma GCC unroll 4
      for (int p = 0; p < kTile; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const typename P::Values value = P::values(load_words(x[p] + (g * V + v) * kLanes));
          sums[p][v] = P::add(sums[p][v], value, weight);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kTile; ++p) {
    finish_narrow<P, V, 1>(layer, sums + p, pixels[p].bias_class, 0, to + p * V * kLanes);
  }
}

#if defined(FASTALPS_AMX)
#include "engine_tiles.inl"
#endif

template <typename P, int V>
void run_narrow_layer(const NarrowLayer& layer, const uint32_t* in, void* out, uint32_t* pooled) {
  constexpr int64_t kValue = V * kLanes;
  const int64_t groups = groups_of(layer.in_channels, P::kGroup);
  if (layer.sum_count > 0) {
    for (int64_t s = 0; s < layer.sum_count; ++s) {
      const NarrowSum& sum = layer.sums[s];
      const Coding coding = {layer.pool_factor, layer.pool_zeros[s]};
      for (int64_t i = 0; i < groups * V; ++i) {
        Vec sums[P::kGroup];
        P::pool(in + i * kLanes, sum.pixels, sum.count, groups * kValue, sums);
        write(pooled + (s * groups * V + i) * kLanes, P::encode(sums, coding));
      }
    }
    in = pooled;
  }
  const int64_t words = groups_of(layer.out_channels, P::kGroup);
  const int64_t out_size = (layer.plain ? layer.out_channels : words) * kValue;
#if defined(FASTALPS_AMX)
  if (run_tiled_layer<P, V>(layer, in, out, groups, out_size)) return;
#endif
  for (int64_t p = 0; p < layer.pixel_count; ++p) {
    const NarrowPixel& pixel = layer.pixels[p];
    uint32_t* to = static_cast<uint32_t*>(out) + p * out_size;
    if (layer.out_channels == 1 && layer.plain && p + kTile <= layer.pixel_count) {
      bool same = true;
      for (int i = 1; i < kTile; ++i) same &= layer.pixels[p + i].bias_class == pixel.bias_class;
      if (same) {
        multiply_narrow_pixels<P, V>(layer, &pixel, in, groups,
                                     static_cast<float*>(out) + p * kValue);
        p += kTile - 1;
        continue;
      }
    }
    int64_t first = 0;
    for (; first + kTile <= layer.out_channels; first += kTile) {
      multiply_narrow<P, V, kTile>(layer, pixel, in, groups, first, to);
    }
    const int64_t rest = layer.out_channels - first;
    if (rest == 1) multiply_narrow<P, V, 1>(layer, pixel, in, groups, first, to);
    if (rest == 2) multiply_narrow<P, V, 2>(layer, pixel, in, groups, first, to);
    if (rest == 3) multiply_narrow<P, V, 3>(layer, pixel, in, groups, first, to);
  }
}

// All layers in turn, between two buffers; returns the floats that the last one wrote.
template <typename P, int V>
const float* run_narrow_layers(const NarrowLayer* layers, int64_t count, const uint32_t* in,
                               uint32_t* ping, uint32_t* pong, uint32_t* pooled) {
  for (int64_t i = 0; i < count; ++i) {
    run_narrow_layer<P, V>(layers[i], in, ping, pooled);
    in = ping;
    ping = pong;
    pong = const_cast<uint32_t*>(in);
  }
  return reinterpret_cast<const float*>(in);
}

template <typename P, int V>
void narrow_block_of(const EngineArguments& a, int64_t first, int64_t count, float* scratch) {
  constexpr int64_t kValue = V * kLanes;
  const Network& network = *a.network;
  float* images = scratch;
  float* ping = images + network.pixels() * kValue;
  float* pong = ping + network.activation * kValue;
  float* latent = pong + network.activation * kValue;
  float* perturbation = latent + network.latent * kValue;
  float* zeros = perturbation + network.latent * kValue;
  float* working = zeros + network.widest * kValue;
  // Behind the working memory: the pixels as words.
  uint32_t* const pixels = reinterpret_cast<uint32_t*>(working + network.working * kValue);
  uint32_t* const ping_words = reinterpret_cast<uint32_t*>(ping);
  uint32_t* const pong_words = reinterpret_cast<uint32_t*>(pong);
  uint32_t* const pooled = reinterpret_cast<uint32_t*>(working);
  const int64_t latent_bytes = network.latent * kValue * sizeof(float);
  const int64_t maps = network.height * network.width;
  float* errors = a.errors;

  if (a.type == DType::kUInt8) {
    load_block<V, uint8_t>(a, first, count, images);
  } else {
    load_block<V, float>(a, first, count, images);
  }
  encode_pixels<P, V>(images, maps, network.channels, {255.0f, 0.0f}, pixels);
  const auto encoder = [&](const NarrowLayer* layers, int64_t number, float* to) {
    __builtin_memcpy(
        to, run_narrow_layers<P, V>(layers, number, pixels, ping_words, pong_words, pooled),
        latent_bytes);
  };
  const auto decode = [&] {
    // The dense layer in fp32, by far the smallest: the latent's range is wide, its digits count.
    run_layer<V>(*network.dense, latent, ping, zeros, working);
    const NarrowLayer& next = network.narrow_decoder[0];
    encode_pixels<P, V>(ping, network.dense->out_channels / next.in_channels, next.in_channels,
                        network.dense_coding, pong_words);
    float* logits = const_cast<float*>(
        run_narrow_layers<P, V>(network.narrow_decoder, network.narrow_decoder_layers, pong_words,
                                ping_words, pong_words, pooled));
    store_errors<V>(a, first, count, logits, images, logits == ping ? pong : ping, errors);
    errors += a.error_count;
  };
  encoder(network.narrow_encoder, network.narrow_encoder_layers, latent);
  if (a.normal) decode();
  if (!a.perturbed) return;
  if (a.noise) {
    load_noise<V>(a, first, count, perturbation);
  } else {
    encoder(network.narrow_distorter, network.narrow_distorter_layers, perturbation);
  }
  perturb<V>(network, latent, perturbation);
  decode();
}

template <typename P>
void narrow_block(const EngineArguments& a, int64_t first, int64_t count, int vectors,
                  float* scratch) {
  if (vectors == 1) return narrow_block_of<P, 1>(a, first, count, scratch);
  if (vectors == 2) return narrow_block_of<P, 2>(a, first, count, scratch);
  return narrow_block_of<P, 3>(a, first, count, scratch);
}
