// Patch scores to heatmaps and back.

template <typename C>
inline C greater(C a, C b) {
  // NaN wins: an unknown score must show.
  return (b > a || b != b) ? b : a;
}

template <typename T>
void fold_scores_of(const FoldArguments& a, int64_t begin, int64_t end) {
  typedef Compute<T> C;
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  // Which patches of a row of patches cover each column of pixels.
  int64_t* first = static_cast<int64_t*>(__builtin_malloc(2 * sizeof(int64_t) * columns.size));
  int64_t* holders = first + columns.size;
  for (int64_t x = 0; x < columns.size; ++x) {
    first[x] = columns.first(x);
    holders[x] = columns.holders(x);
  }
  C* merged = static_cast<C*>(__builtin_malloc(sizeof(C) * columns.count));
  float* line = static_cast<float*>(__builtin_malloc(sizeof(float) * columns.size));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / a.band_count, band = task % a.band_count;
    const int64_t top = a.bands[band], bottom = a.bands[band + 1];
    const int64_t r0 = rows.first(top), r1 = r0 + rows.holders(top);
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
      const int64_t c0 = first[x], c1 = c0 + holders[x];
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
  __builtin_free(first);
  if (a.stream) stream_end();
}

void fold_scores(const FoldArguments& a, int64_t begin, int64_t end) {
  with_floating(a.scores_type,
                [&](auto t) { fold_scores_of<typename decltype(t)::type>(a, begin, end); });
}

template <typename T>
void fold_scores_backward_of(const FoldBackwardArguments& a, int64_t begin, int64_t end) {
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  const int64_t patches = a.grid.patches();
  double* total = static_cast<double*>(__builtin_malloc(sizeof(double) * patches));
  for (int64_t n = begin; n < end; ++n) {
    const T* scores = static_cast<const T*>(a.scores) + n * patches;
    const float* grad = a.grad + n * rows.size * columns.size;
    for (int64_t p = 0; p < patches; ++p) total[p] = 0;
    for (int64_t y = 0; y < rows.size; ++y) {
      const int64_t r0 = rows.first(y), r1 = r0 + rows.holders(y);
      for (int64_t x = 0; x < columns.size; ++x, ++grad) {
        const int64_t c0 = columns.first(x), c1 = c0 + columns.holders(x);
        const double share = *grad / static_cast<double>((r1 - r0) * (c1 - c0));
        int64_t owner = -1;
        float best = 0;
        for (int64_t r = r0; r < r1; ++r) {
          for (int64_t c = c0; c < c1; ++c) {
            const int64_t p = r * columns.count + c;
            if (!a.maximum) {
              total[p] += share;
              continue;
            }
            const float value = static_cast<float>(get(scores + p));
            if (value != value) {  // the maximum is NaN: nobody owns the pixel
              owner = -1;
              r = r1;
              break;
            }
            if (owner < 0 || value > best) {
              owner = p;
              best = value;
            }
          }
        }
        if (owner >= 0) total[owner] += *grad;
      }
    }
    T* result = static_cast<T*>(a.result) + n * patches;
    for (int64_t p = 0; p < patches; ++p) put(result + p, total[p]);
  }
  __builtin_free(total);
}

void fold_scores_backward(const FoldBackwardArguments& a, int64_t begin, int64_t end) {
  with_floating(
      a.type, [&](auto t) { fold_scores_backward_of<typename decltype(t)::type>(a, begin, end); });
}
