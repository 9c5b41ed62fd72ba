// Per-sample squared error: of one or two passes over the same target, with or without a sigmoid.

// Sums of a run of elements; the target is read once for both passes.
template <typename A, typename B, int Passes, bool Sigmoid>
inline void sum_squares(const A* const* values, const B* target, int64_t count, double* sums) {
  constexpr int kUnroll = 4;  // independent sums hide the latency of the additions
  Vec total[Passes][kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
#pragma GCC unroll 2
    for (int s = 0; s < Passes; ++s) {
      Vec value[kUnroll];
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) value[u] = load(values[s] + i + u * kLanes);
      if (Sigmoid) sigmoid<kUnroll>(value);
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const Vec difference = value[u] - load(target + i + u * kLanes);
        total[s][u] += difference * difference;
      }
    }
  }
  for (; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    const Vec goal = load_lanes(target + i, lanes);
    for (int s = 0; s < Passes; ++s) {
      Vec value = load_lanes(values[s] + i, lanes);
      if (Sigmoid) value = sigmoid(value);
      Vec difference = value - goal;
      if (Sigmoid && lanes < kLanes) {
        // sigmoid(0) is not 0: the lanes past the end must not count.
        float kept[kLanes];
        store(kept, difference);
        difference = load_part(kept, lanes);
      }
      total[s][0] += difference * difference;
    }
  }
  for (int s = 0; s < Passes; ++s) {
    sums[s] = sum_lanes((total[s][0] + total[s][1]) + (total[s][2] + total[s][3]));
  }
}

template <int Passes, bool Sigmoid>
inline void sum_squares_double(const double* const* values, const double* target, int64_t count,
                               double* sums) {
  for (int s = 0; s < Passes; ++s) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double value = Sigmoid ? sigmoid(values[s][i]) : values[s][i];
      total += (value - target[i]) * (value - target[i]);
    }
    sums[s] = total;
  }
}

// Single-precision sums of longer runs lose digits: runs of this length are added up in double.
constexpr int64_t kRun = 4096;

template <typename A, typename B, int Passes, bool Sigmoid>
void squared_error_of(const SquaredErrorArguments& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / a.chunks, chunk = task % a.chunks;
    const int64_t first = chunk * a.chunk;
    const int64_t last = first + a.chunk < a.size ? first + a.chunk : a.size;
    double totals[Passes] = {};
    for (int64_t at = first; at < last; at += kRun) {
      const int64_t count = last - at < kRun ? last - at : kRun;
      const A* values[Passes];
      for (int s = 0; s < Passes; ++s) {
        values[s] = static_cast<const A*>(a.values) + (s * a.n + n) * a.values_stride + at;
      }
      const B* target = static_cast<const B*>(a.target) + n * a.target_stride + at;
      double sums[Passes];
      if constexpr (sizeof(A) == 8) {
        sum_squares_double<Passes, Sigmoid>(values, target, count, sums);
      } else {
        sum_squares<A, B, Passes, Sigmoid>(values, target, count, sums);
      }
      for (int s = 0; s < Passes; ++s) totals[s] += sums[s];
    }
    for (int s = 0; s < Passes; ++s) a.partial[(s * a.n + n) * a.chunks + chunk] = totals[s];
  }
}

template <typename A, typename B>
void squared_error_typed(const SquaredErrorArguments& a, int64_t begin, int64_t end) {
  if (a.passes == 2) {
    if (a.sigmoid) return squared_error_of<A, B, 2, true>(a, begin, end);
    return squared_error_of<A, B, 2, false>(a, begin, end);
  }
  if (a.sigmoid) return squared_error_of<A, B, 1, true>(a, begin, end);
  return squared_error_of<A, B, 1, false>(a, begin, end);
}

void squared_error(const SquaredErrorArguments& a, int64_t begin, int64_t end) {
  if (a.values_type == DType::kFloat64) {
    return squared_error_typed<double, double>(a, begin, end);
  }
  with_small_floating(a.values_type, [&](auto values) {
    with_small_floating(a.target_type, [&](auto target) {
      squared_error_typed<typename decltype(values)::type, typename decltype(target)::type>(
          a, begin, end);
    });
  });
}

template <typename A, typename B, bool Sigmoid>
void squared_error_backward_of(const SquaredErrorBackwardArguments& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / a.chunks, chunk = task % a.chunks;
    const int64_t first = chunk * a.chunk;
    const int64_t last = first + a.chunk < a.size ? first + a.chunk : a.size;
    const A* values = static_cast<const A*>(a.values) + row * a.values_stride + first;
    const B* target = static_cast<const B*>(a.target) + (row % a.n) * a.target_stride + first;
    A* result = static_cast<A*>(a.result) + row * a.size + first;
    const double factor = 2.0 / static_cast<double>(a.size) * a.grad[row];
    if constexpr (sizeof(A) == 8) {
      for (int64_t i = 0; i < last - first; ++i) {
        const double value = Sigmoid ? sigmoid(values[i]) : values[i];
        result[i] = factor * (value - target[i]) * (Sigmoid ? value * (1 - value) : 1.0);
      }
    } else {
      const Vec scale = splat(static_cast<float>(factor));
      map(result, last - first, a.stream, [&](int64_t i, int64_t lanes) {
        Vec value = load_lanes(values + i, lanes);
        const Vec goal = load_lanes(target + i, lanes);
        if (!Sigmoid) return scale * (value - goal);
        value = sigmoid(value);
        return scale * (value - goal) * (value * (1.0f - value));
      });
    }
  }
  if (a.stream) stream_end();
}

void squared_error_backward(const SquaredErrorBackwardArguments& a, int64_t begin, int64_t end) {
  const auto run = [&](auto values, auto target) {
    typedef typename decltype(values)::type A;
    typedef typename decltype(target)::type B;
    if (a.sigmoid) return squared_error_backward_of<A, B, true>(a, begin, end);
    return squared_error_backward_of<A, B, false>(a, begin, end);
  };
  if (a.values_type == DType::kFloat64) return run(Type<double>{}, Type<double>{});
  with_small_floating(a.values_type, [&](auto values) {
    with_small_floating(a.target_type, [&](auto target) { run(values, target); });
  });
}
