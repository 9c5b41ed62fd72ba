// Sums before and after the products of the minimal algorithms, in registers: the matrices B and A
// of fastalps/engine/axes.py as code.

// What is done to a result on its way to memory: nothing, or the bias and the activation.
struct Epilogue {
  const float* bias;  // null: nothing
  float slope;
};

// max(x, slope * x): the leaky ReLU for slopes up to 1.
inline Vec leaky(Vec x, Vec slope) {
  const Vec low = x * slope;
#if defined(FASTALPS_AVX512)
  return bits_of<Vec>(_mm512_maskz_max_ps(0xffff, bits_of<__m512>(x), bits_of<__m512>(low)));
#elif defined(FASTALPS_AVX2)
  return bits_of<Vec>(_mm256_max_ps(bits_of<__m256>(x), bits_of<__m256>(low)));
#else
  return x > low ? x : low;
#endif
}

struct F22 {
  static constexpr int kInputs = 3, kProducts = 3, kResults = 2;
  static void before(const Vec* x, Vec* v) {
    v[0] = x[0] - x[1];
    v[1] = x[1] + x[1];
    v[2] = x[2] - x[1];
  }
  static void after(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1];
    y[1] = m[1] + m[2];
  }
};

struct Points01 {
  static constexpr int kInputs = 4;
  static void before(const Vec* x, Vec* v) {
    v[0] = x[0] - x[2];
    v[1] = x[1] + x[2];
    v[2] = x[2] - x[1];
    v[3] = x[3] - x[1];
  }
};

struct F32 : Points01 {
  static constexpr int kProducts = 4, kResults = 3;
  static void after(const Vec* m, Vec* y) {
    const Vec sum = m[1] + m[2];
    y[0] = m[0] + sum;
    y[1] = m[1] - m[2];
    y[2] = m[3] + sum;
  }
};

struct F32Plus : Points01 {
  static constexpr int kProducts = 5, kResults = 3;
  static void after(const Vec* m, Vec* y) {
    F32::after(m, y);
    y[1] += m[4];
  }
};

struct F23 : Points01 {
  static constexpr int kProducts = 4, kResults = 2;
  static void after(const Vec* m, Vec* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = m[3] + (m[1] - m[2]);
  }
};

struct F43 {
  static constexpr int kInputs = 6, kProducts = 6, kResults = 4;
  static void before(const Vec* x, Vec* v) {
    const Vec a = x[4] - 4.0f * x[2], b = x[3] - 4.0f * x[1];
    const Vec c = x[4] - x[2], d = 2.0f * (x[3] - x[1]);
    v[0] = 4.0f * x[0] + (x[4] - 5.0f * x[2]);
    v[1] = a + b;
    v[2] = a - b;
    v[3] = c + d;
    v[4] = c - d;
    v[5] = 4.0f * x[1] + (x[5] - 5.0f * x[3]);
  }
  static void after(const Vec* m, Vec* y) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    y[0] = (m[0] + sum) + sum2;
    y[1] = difference + 2.0f * difference2;
    y[2] = sum + 4.0f * sum2;
    y[3] = (difference + 8.0f * difference2) + m[5];
  }
};

template <typename F>
inline void with_algorithm(Algorithm algorithm, const F& f) {
  switch (algorithm) {
    case Algorithm::kF22:
      return f(Type<F22>{});
    case Algorithm::kF32:
      return f(Type<F32>{});
    case Algorithm::kF23:
      return f(Type<F23>{});
    case Algorithm::kF43:
      return f(Type<F43>{});
    case Algorithm::kF32Plus:
      return f(Type<F32Plus>{});
  }
}

// Values of a tile of columns, of a sum of `Rows` rows: lines[r][x] is where input x of row r
// begins; factor 1 of the only row if Rows is 1. The values lie `distance` floats apart.
template <typename A, int Rows>
void tile_values(const float* const (*lines)[6], const float* factors, float* to, int64_t distance,
                 int64_t count) {
  Vec factor[Rows];
  for (int r = 0; r < Rows; ++r) factor[r] = splat(factors[r]);
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec x[A::kInputs], v[A::kInputs];
#pragma GCC unroll 6
    for (int n = 0; n < A::kInputs; ++n) {
      x[n] = load(lines[0][n] + i);
      if (Rows > 1) x[n] *= factor[0];
#pragma GCC unroll 4
      for (int r = 1; r < Rows; ++r) x[n] += factor[r] * load(lines[r][n] + i);
    }
    A::before(x, v);
#pragma GCC unroll 6
    for (int n = 0; n < A::kInputs; ++n) store(to + n * distance + i, v[n]);
  }
}

// Results of a tile from its products, which lie `distance` floats apart; `channels` values of V
// vectors each.
template <typename A, int V>
void tile_results(const float* products, int64_t distance, float* const* to, int64_t channels,
                  const Epilogue& epilogue) {
  const Vec slope = splat(epilogue.slope);
  for (int64_t c = 0; c < channels; ++c) {
    const Vec bias = epilogue.bias ? splat(epilogue.bias[c]) : Vec{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = (c * V + v) * kLanes;
      Vec m[A::kProducts], y[A::kResults];
#pragma GCC unroll 6
      for (int n = 0; n < A::kProducts; ++n) m[n] = load(products + n * distance + at);
      A::after(m, y);
#pragma GCC unroll 4
      for (int n = 0; n < A::kResults; ++n) {
        store(to[n] + at, epilogue.bias ? leaky(y[n] + bias, slope) : y[n]);
      }
    }
  }
}

template <int Count>
inline void sum_few(float* to, const float* const* from, const float* factors, int64_t count) {
  Vec factor[Count];
  for (int t = 0; t < Count; ++t) factor[t] = splat(factors[t]);
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec sum = factor[0] * load(from[0] + i);
#pragma GCC unroll 4
    for (int t = 1; t < Count; ++t) sum += factor[t] * load(from[t] + i);
    store(to + i, sum);
  }
}

// to = sum over rows and columns of their factors' product * input, for sums that no tile has.
// `input(y, x)` is where that pixel's `count` floats begin.
template <typename Input>
inline void sum_inputs(float* to, const Sum& rows, const Sum& columns, int64_t count,
                       const Input& input) {
  const float* from[4];
  float factors[4];
  int taken = 0;
  const auto flush = [&] {
    if (taken == 1) sum_few<1>(to, from, factors, count);
    if (taken == 2) sum_few<2>(to, from, factors, count);
    if (taken == 3) sum_few<3>(to, from, factors, count);
    if (taken == 4) sum_few<4>(to, from, factors, count);
    // What there is so far is the first term of the next sum.
    from[0] = to;
    factors[0] = 1.0f;
    taken = 1;
  };
  for (int r = 0; r < rows.count; ++r) {
    for (int c = 0; c < columns.count; ++c) {
      if (taken == 4) flush();
      from[taken] = input(rows.terms[r].index, columns.terms[c].index);
      factors[taken++] = static_cast<float>(rows.terms[r].factor * columns.terms[c].factor);
    }
  }
  flush();
}
