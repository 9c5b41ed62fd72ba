// Patch scores to heatmaps and back.

template <typename C>
inline C greater(C a, C b) {
  // NaN wins: an unknown score must show.
  return (b > a || b != b) ? b : a;
}

// For each pixel along an axis, the patches [first, last) that hold it.
struct Holders {
  int64_t *first, *last;

  explicit Holders(const Axis& axis)
      : first(static_cast<int64_t*>(__builtin_malloc(2 * sizeof(int64_t) * axis.size))),
        last(first + axis.size) {
    int64_t from = 0, to = 0;
    for (int64_t at = 0; at < axis.size; ++at) {
      axis.advance(at, from, to);
      first[at] = from;
      last[at] = to;
    }
  }
  ~Holders() { __builtin_free(first); }
  Holders(const Holders&) = delete;

  int64_t count(int64_t at) const { return last[at] - first[at]; }
  bool same(int64_t a, int64_t b) const { return first[a] == first[b] && last[a] == last[b]; }
};

template <typename T>
void fold_scores_of(const FoldArguments& a, int64_t begin, int64_t end) {
  typedef Compute<T> C;
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  const Holders held_rows(rows), held(columns);
  C* merged = static_cast<C*>(__builtin_malloc(sizeof(C) * columns.count));
  float* line = static_cast<float*>(__builtin_malloc(sizeof(float) * columns.size));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / a.band_count, band = task % a.band_count;
    const int64_t top = a.bands[band], bottom = a.bands[band + 1];
    const int64_t r0 = held_rows.first[top], r1 = held_rows.last[top];
    const T* scores = static_cast<const T*>(a.scores) + n * a.grid.patches();
    for (int64_t c = 0; c < columns.count; ++c) {
      C value = r0 < r1 ? static_cast<C>(get(scores + r0 * columns.count + c)) : C(0);
      for (int64_t r = r0 + 1; r < r1; ++r) {
        const C other = get(scores + r * columns.count + c);
        value = a.maximum ? greater(value, other) : value + other;
      }
      merged[c] = value;
    }
    for (int64_t x = 0; x < columns.size; ++x) {
      if (x > 0 && held.same(x, x - 1)) {
        line[x] = line[x - 1];
        continue;
      }
      const int64_t c0 = held.first[x], c1 = held.last[x];
      if (c0 == c1 || r0 == r1) {
        line[x] = 0;
        continue;
      }
      C value = merged[c0];
      for (int64_t c = c0 + 1; c < c1; ++c) {
        value = a.maximum ? greater(value, merged[c]) : value + merged[c];
      }
      if (!a.maximum) value /= static_cast<C>((c1 - c0) * (r1 - r0));
      line[x] = static_cast<float>(value);
    }
    float* to = a.heatmap + (n * rows.size + top) * columns.size;
    for (int64_t y = top; y < bottom; ++y, to += columns.size) {
      map(to, columns.size, a.stream,
          [&](int64_t x, int64_t lanes) { return load_lanes(line + x, lanes); });
    }
  }
  __builtin_free(line);
  __builtin_free(merged);
  if (a.stream) stream_end();
}

void fold_scores(const FoldArguments& a, int64_t begin, int64_t end) {
  with_floating(a.scores_type,
                [&](auto t) { fold_scores_of<typename decltype(t)::type>(a, begin, end); });
}

// Sums rows of pixels into one row, in float: few enough that no digits are lost.
inline void sum_rows(const float* from, int64_t count, int64_t size, float* to) {
  map(to, size, false, [&](int64_t x, int64_t lanes) {
    Vec total = load_lanes(from + x, lanes);
    for (int64_t y = 1; y < count; ++y) total += load_lanes(from + y * size + x, lanes);
    return total;
  });
}

// The owner of the pixels that the patches [r0, r1) x [c0, c1) cover, as the index of its row and
// column of patches: the first one of those with the largest score. No owner if one is NaN.
struct Owner {
  int64_t row, column;
};
template <typename T>
inline Owner owner_of(const T* scores, int64_t columns, int64_t r0, int64_t r1, int64_t c0,
                      int64_t c1) {
  Owner owner = {-1, -1};
  float best = 0;
  for (int64_t r = r0; r < r1; ++r) {
    for (int64_t c = c0; c < c1; ++c) {
      const float value = static_cast<float>(get(scores + r * columns + c));
      if (value != value) return {-1, -1};
      if (owner.row < 0 || value > best) {
        owner = {r, c};
        best = value;
      }
    }
  }
  return owner;
}

template <typename T>
void fold_scores_backward_of(const FoldBackwardArguments& a, int64_t begin, int64_t end) {
  // A float64 result keeps the digits of every addition.
  constexpr int64_t kRows = sizeof(T) == 8 ? 1 : 16;
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  const Holders held_rows(rows), held(columns);
  float* sums = static_cast<float*>(__builtin_malloc(sizeof(float) * columns.size));
  double* total =
      static_cast<double*>(__builtin_malloc(sizeof(double) * (columns.count + 2 * columns.size)));
  double* line = total + columns.count;
  double* share = line + columns.size;
  for (int64_t x = 0; x < columns.size; ++x) {
    share[x] = held.count(x) ? 1.0 / static_cast<double>(held.count(x)) : 0.0;
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / rows.count, r = task % rows.count;
    const T* scores = static_cast<const T*>(a.scores) + n * a.grid.patches();
    const float* grad = a.grad + n * rows.size * columns.size;
    for (int64_t c = 0; c < columns.count; ++c) total[c] = 0;
    for (int64_t x = 0; x < columns.size; ++x) line[x] = 0;
    const int64_t last = rows.origin(r) + rows.patch;
    for (int64_t y = rows.origin(r), bottom; y < last; y = bottom) {
      bottom = y + 1;
      while (bottom < last && bottom - y < kRows && held_rows.same(bottom, y)) ++bottom;
      sum_rows(grad + y * columns.size, bottom - y, columns.size, sums);
      if (!a.maximum) {
        const double part = 1.0 / static_cast<double>(held_rows.count(y));
        for (int64_t x = 0; x < columns.size; ++x) line[x] += part * sums[x];
        continue;
      }
      Owner owner = {-1, -1};
      for (int64_t x = 0; x < columns.size; ++x) {
        if (x == 0 || !held.same(x, x - 1)) {
          owner = owner_of(scores, columns.count, held_rows.first[y], held_rows.last[y],
                           held.first[x], held.last[x]);
        }
        if (owner.row == r) total[owner.column] += sums[x];
      }
    }
    T* result = static_cast<T*>(a.result) + n * a.grid.patches() + r * columns.count;
    for (int64_t c = 0; c < columns.count; ++c) {
      const int64_t origin = columns.origin(c);
      for (int64_t x = origin; x < origin + columns.patch; ++x) total[c] += share[x] * line[x];
      put(result + c, total[c]);
    }
  }
  __builtin_free(total);
  __builtin_free(sums);
}

void fold_scores_backward(const FoldBackwardArguments& a, int64_t begin, int64_t end) {
  with_floating(
      a.type, [&](auto t) { fold_scores_backward_of<typename decltype(t)::type>(a, begin, end); });
}
