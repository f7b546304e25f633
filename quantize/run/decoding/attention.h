// Softmax attention over a cache, in chunks that begin at multiples of CHUNK of a text.
//
// A query's chunks give unnormalized sums, each with its largest score and its total; they are
// joined in the order of the text. Padding moves a text in the cache and no chunk in the text, so a
// query gets the same bits alone and in a batch, one at a time and with a whole prompt.

#pragma once
#include "int8_attention.h"

namespace {

// Vectors of sums that the registers have room for.
#if defined(__AVX512F__)
constexpr int MOST_SUMS = 24;
#else
constexpr int MOST_SUMS = 6;
#endif

// C vectors of columns of `weigh`.
template <int M, int C, class T>
inline void weigh_columns(const float (*s)[CHUNK], const T* v, const T* next, int64_t n, int64_t d,
                          float* const* y, int64_t i) {
  Floats t[M][C] = {};
  for (int64_t p = 0; p < n; p++) {
    if (i == 0) fetch(next + p * d, 1, d);
#pragma GCC unroll 4
    for (int j = 0; j < C; j++) {
      const Floats x = load(v + p * d + i + j * LANES);
#pragma GCC unroll 6
      for (int m = 0; m < M; m++) t[m][j] = multiply_add(Floats{} + s[m][p], x, t[m][j]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < C; j++) store_vector(t[m][j], y[m] + i + j * LANES);
}

// y[m] = the sum of n rows of v [n, d], each times its weight s[m]. next: rows that are read after
// them.
template <int M, class T>
inline void weigh(const float (*s)[CHUNK], const T* v, const T* next, int64_t n, int64_t d,
                  float* const* y) {
  constexpr int MOST = MOST_SUMS / M, C = MOST > 4 ? 4 : MOST;
  int64_t i = 0;
  for (; i + C * LANES <= d; i += C * LANES) weigh_columns<M, C>(s, v, next, n, d, y, i);
  for (; i + LANES <= d; i += LANES) weigh_columns<M, 1>(s, v, next, n, d, y, i);
  for (; i < d; i++)
    for (int m = 0; m < M; m++) {
      y[m][i] = 0;
      for (int64_t p = 0; p < n; p++) y[m][i] += s[m][p] * widen(v[p * d + i]);
    }
}

// s[m] = the scores of four rows of keys for M queries q.
template <int M, class T>
inline void score_four(const float* const* q, const T* const* row, int64_t d, float (*s)[CHUNK],
                       int64_t p) {
  Floats t[M][4] = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    Floats keys[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) keys[j] = load(row[j] + i);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const Floats x = load(q[m] + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) t[m][j] = multiply_add(keys[j], x, t[m][j]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++) sum4(t[m], s[m] + p);
  for (; i < d; i++)
    for (int m = 0; m < M; m++)
      for (int j = 0; j < 4; j++) s[m][p + j] += q[m][i] * widen(row[j][i]);
}

// s[m] = the scores of n rows of k [n, d] for query m: q[m] . k, which don't depend on n. next:
// rows that are read after them, of which half are asked for.
template <int M, class T>
inline void score(const float* const* q, const T* k, const T* next, int64_t n, int64_t d,
                  float (*s)[CHUNK]) {
  constexpr int TOGETHER = 4 * M <= MOST_SUMS ? M : 1;
  for (int64_t p = 0; p < n; p += 4) {
    const T* row[4];
    for (int64_t j = 0; j < 4; j++) row[j] = k + (p + j < n ? p + j : n - 1) * d;
    fetch(next + p / 2 * d, 2, d);
    for (int m = 0; m < M; m += TOGETHER) score_four<TOGETHER>(q + m, row, d, s + m, p);
  }
}

// What some heads' queries found in a part of a text.
struct Found {
  float *sums, *peak, *total;  // unnormalized [heads, d]; largest score; sum of weights [heads]

  Found of(int64_t head, int64_t d) const { return {sums + head * d, peak + head, total + head}; }
};

// A head's query over the first n of some positions.
struct Query {
  const float* x;
  int64_t n;
  Found to;
};

template <class T>
struct Keys {  // positions of one head of keys and values; the scales may be null
  const T *k, *v;
  const Brain *k_scale, *v_scale;
};

constexpr int64_t MOST_QUERIES = 6;  // at once

// s[p] becomes factor s[p], times the position's scale if there are any. Returns the largest.
inline float scale_by(float* s, int64_t n, float factor, const Brain* scales) {
  Floats tops = Floats{} - INFINITY;
  int64_t p = 0;
  for (; p + LANES <= n; p += LANES) {
    const Floats by = scales ? factor * load(scales + p) : Floats{} + factor;
    const Floats found = load(s + p) * by;
    store_vector(found, s + p);
    tops = most(found, tops);
  }
  float top = largest_of(tops);
  for (; p < n; p++) {
    s[p] *= scales ? factor * widen(scales[p]) : factor;
    top = s[p] > top ? s[p] : top;
  }
  return top;
}

// s[p] becomes exp(s[p] - top), times the position's scale if there are any. Returns the sum
// without scales.
inline float exponentials(float* s, int64_t n, float top, const Brain* scales) {
  Floats sums = {};
  int64_t p = 0;
  for (; p + LANES <= n; p += LANES) {
    const Floats found = exponential(load(s + p) - top);
    const Floats scaled = scales ? found * load(scales + p) : found;
    store_vector(scaled, s + p);
    sums += found;
  }
  float total = sum(sums);
  for (; p < n; p++) {
    const float found = exponential(s[p] - top);
    total += found;
    s[p] = scales ? found * widen(scales[p]) : found;
  }
  return total;
}

// M queries over the same positions, up to CHUNK of them.
template <int M, class T>
void attend(const Query* query, const Keys<T>& in, int64_t d) {
  const float factor = 1 / sqrtf(float(d));
  alignas(64) float scores[M][CHUNK];
  const float* x[M];
  float* y[M];
  int64_t n = 0;
  for (int m = 0; m < M; m++) {
    x[m] = query[m].x;
    y[m] = query[m].to.sums;
    n = query[m].n > n ? query[m].n : n;
  }
  if (in.k_scale) fetch(in.k_scale, n, 1);
  if (in.v_scale) fetch(in.v_scale, n, 1);
  score<M>(x, in.k, in.v, n, d, scores);
  const int64_t rest = n - n / 2, part = (rest + M - 1) / M;
  for (int m = 0; m < M; m++) {
    fetch(in.v + (n / 2 + m * part) * d, part, d);  // memory has nothing else to do meanwhile
    float* s = scores[m];
    const int64_t own = query[m].n;
    const float top = scale_by(s, own, factor, in.k_scale);
    *query[m].to.peak = top;
    *query[m].to.total = exponentials(s, own, top, in.v_scale);
    for (int64_t p = own; p < n; p++) s[p] = 0;
  }
  weigh<M>(scores, in.v, in.k + n * d, n, d, y);
}

template <class T>
void attend_all(const Query* query, int64_t many, const Keys<T>& in, int64_t d) {
  for (; many >= MOST_QUERIES; query += MOST_QUERIES, many -= MOST_QUERIES)
    attend<MOST_QUERIES>(query, in, d);
  if (many >= 4) {
    attend<4>(query, in, d);
    query += 4;
    many -= 4;
  }
  if (many == 3) attend<3>(query, in, d);
  if (many == 2) attend<2>(query, in, d);
  if (many == 1) attend<1>(query, in, d);
}

// Add to what was found before it in the text.
inline void join(Found all, Found part, int64_t heads, int64_t d) {
  for (int64_t head = 0; head < heads; head++) {
    const float before = all.peak[head], here = part.peak[head];
    const float peak = here > before ? here : before;
    const float old = exponential(before - peak), own = exponential(here - peak);
    all.peak[head] = peak;
    all.total[head] = all.total[head] * old + part.total[head] * own;
    float *to = all.sums + head * d, *from = part.sums + head * d;
    for (int64_t i = 0; i < d; i++) to[i] = to[i] * old + from[i] * own;
  }
}

}  // namespace
