// The two sums of attention over an int8 cache, in integers.
//
// A query is rounded to 16 bits with one step, and so is what the positions of a chunk weigh, times
// the scales of their values; each is multiplied as two bytes. So both sums are exact, whichever
// instructions add them up, and a position costs a vector of bytes instead of four of floats.

#pragma once
#include "int4.h"
#include "quads.h"
#include "words.h"

#include <algorithm>
#include <vector>

namespace {

// The first of LANES numbers; zeros for those that aren't there.
inline Floats load_first(const float* x, int64_t many) {
  if (many >= LANES) return load(x);
  return many > 0 ? load_part(x, many) : Floats{};
}

// The largest size; NaN if there is a NaN or an infinity, whose rounded form must not look like a
// number.
inline float largest(const float* x, int64_t n) {
  Ints sizes = {};
  for (int64_t i = 0; i < n; i += LANES) {
    const Ints size = (Ints)load_first(x + i, n - i) & 0x7fffffff;
    sizes = choose(size > sizes, size, sizes);
  }
  const int32_t found = largest_of(sizes), infinite = 0x7f800000;
  return bits<float>(found < infinite ? found : 0x7fc00000);
}

// Numbers of up to `most` steps; NaN as a step, and zeros, for those that aren't finite.
struct Rounding {
  float step, inverse;

  Rounding(const float* x, int64_t n, float most) : step(largest(x, n) / most) {
    step = step < SMALLEST ? SMALLEST : step;
    inverse = step == step ? 1 / step : 0;
  }
  Ints count(Floats x) const {
    const float shift = 0x1.8p23f;  // adding it rounds to the nearest integer, half to even
    const Floats usable = inverse == 0 ? Floats{} : x;
    return (Ints)(usable * inverse + shift) - bits<int32_t>(shift);
  }
};

// M queries in 16 bits; for instructions that multiply bytes, each as two: 256 upper + lower.
// Behind the d of a row lie zeros up to whole vectors.
template <int M>
struct Rounded {
  const int64_t apart;
  float step[M];
  Ints sum[M] = {};  // in each lane, of some

  Rounded(const float* const* q, int64_t d) : apart((d + WIDE - 1) / WIDE * WIDE) {
    bytes().resize(2 * M * apart);
    const float most = d <= 256 ? 127 * 256 : 127 * 65536 / d;  // sums fit 32 bits
    for (int m = 0; m < M; m++) {
      const Rounding rounding(q[m], d, most);
      step[m] = rounding.step;
      for (int64_t i = 0; i < apart; i += LANES) {
        const Ints value = rounding.count(load_first(q[m] + i, d - i));
#if defined(__AVX512VNNI__)
        store_lowest(value, lower(m) + i);
        store_lowest((value + 128) >> 8, upper(m) + i);
        sum[m] += value;
#else
        store_words(value, words(m) + i);
#endif
      }
    }
  }
  int16_t* words(int64_t m) const { return (int16_t*)bytes().data() + m * apart; }
  int8_t* lower(int64_t m) const { return bytes().data() + m * apart; }
  int8_t* upper(int64_t m) const { return lower(M + m); }

  // Of this thread, so that a chunk doesn't wait for memory to be allocated.
  static std::vector<int8_t>& bytes() {
    static thread_local std::vector<int8_t> kept;
    return kept;
  }
  void store(int m, Ints exact, float* s) const { store_vector(to_floats(exact) * step[m], s); }
};

#if defined(QUANTIZE_TILES)

// Scores as below, by tiles.
template <int M>
inline void score_tiles(const Rounded<M>& q, const int8_t* k, const int8_t* next, int64_t n,
                        int64_t d, float (*s)[CHUNK]) {
  static thread_local std::vector<int8_t> columns, rest;
  columns.resize(TILE * d);
  for (int m = 0; m < M; m += 4) {
    const int8_t *lower[4] = {}, *upper[4] = {};
    for (int i = 0; i < 4 && m + i < M; i++) lower[i] = q.lower(m + i), upper[i] = q.upper(m + i);
    fill_columns(lower, 2 * m, d, columns.data());
    fill_columns(upper, 2 * m + 4, d, columns.data());
  }
  for (int64_t p = 0; p < n; p += WIDE) {
    const int8_t* rows = k + p * d;
    if (n - p < WIDE) {  // what follows them may not be there
      rest.resize(WIDE * d);
      memcpy(rest.data(), rows, (n - p) * d);
      rows = rest.data();
    }
    alignas(64) int32_t sums[WIDE][TILE];
    tile_scores(columns.data(), rows, d, sums);
    for (int64_t i = 0; i < WIDE; i += TILE) {
      if (i % (2 * TILE) == 0) fetch(next + (p + i) / 2 * d, TILE, d);
      for (int m = 0; m < M; m += 4) {
        __m512i exact[4];
        join_columns(sums + i, 2 * m, exact);
        for (int j = 0; j < 4 && m + j < M; j++) q.store(m + j, (Ints)exact[j], s[m + j] + p + i);
      }
    }
  }
}

#endif

// s[m] = the scores of n rows of k [n, d] for query m. next: rows that are read after them, of
// which half are asked for.
template <int M>
inline void score(const float* const* x, const int8_t* k, const int8_t* next, int64_t n, int64_t d,
                  float (*s)[CHUNK]) {
  const Rounded<M> q(x, d);
#if defined(QUANTIZE_TILES)
  if (attends_by_tiles(d)) return score_tiles<M>(q, k, next, n, d, s);
#endif
#if defined(__AVX512VNNI__)
  int32_t shift[M];
  for (int m = 0; m < M; m++) shift[m] = 128 * _mm512_reduce_add_epi32((__m512i)q.sum[m]);
  for (int64_t p = 0; p < n; p += LANES) {
    const int8_t* row[LANES];
    for (int64_t j = 0; j < LANES; j++) row[j] = k + (p + j < n ? p + j : n - 1) * d;
    fetch(next + p / 2 * d, LANES / 2, d);
    __m512i total[2 * M][4];
    shifted_products<2 * M>(q.lower(0), q.apart, row, d, total);
    for (int m = 0; m < M; m++) {
      const Ints low = (Ints)quarter_sums(total[m]);
      const Ints high = (Ints)quarter_sums(total[M + m]);
      q.store(m, high * 256 + low - shift[m], s[m] + p);
    }
  }
#else
  constexpr int TOGETHER = M % 3 == 0 ? 3 : M % 2 == 0 ? 2 : 1;  // whose sums fit the registers
  for (int64_t p = 0; p < n; p += 4) {
    const int8_t* row[4];
    for (int64_t j = 0; j < 4; j++) row[j] = k + (p + j < n ? p + j : n - 1) * d;
    fetch(next + p / 2 * d, 2, d);
    int32_t exact[M][4];
    for (int m = 0; m < M; m += TOGETHER)
      multiply_words<TOGETHER>(q.words(m), q.apart, row, d, exact + m);
    for (int m = 0; m < M; m++)
      for (int j = 0; j < 4; j++) s[m][p + j] = float(exact[m][j]) * q.step[m];
  }
#endif
}

// What n positions weigh for M queries, in 16 bits: the lower bytes of all, then the upper ones. Or
// as words that have a sign, less 2^15, which times the sum of all values gives that back.
template <int M>
struct Shares {
#if defined(__AVX512VNNI__)
  alignas(64) uint8_t bytes[TILE][CHUNK];
#else
  int16_t words[M][CHUNK];
#endif
  float step[M];

  Shares(const float (*s)[CHUNK], int64_t n) {
    for (int m = 0; m < M; m++) {
      const Rounding rounding(s[m], n, 65535);
      step[m] = rounding.step;
      for (int64_t p = 0; p < (n + WIDE - 1) / WIDE * WIDE; p += LANES) {
        const Ints count = rounding.count(load_first(s[m] + p, n - p));
#if defined(__AVX512VNNI__)
        store_lowest(count, bytes[m] + p);
        store_lowest(count >> 8, bytes[M + m] + p);
#else
        store_words(count - 0x8000, words[m] + p);
#endif
      }
    }
  }
};

#if defined(__AVX512VNNI__)

// total[i][row]: exact sums of vector i of Quads for each row of shares, over n rows of v.
template <int M>
inline void sum_quads(const Shares<M>& shares, const int8_t* v, const int8_t* next, int64_t n,
                      int64_t d, int64_t left, int32_t (*total)[TILE][TILE]) {
  Quads quads;
  const bool tiles = attends_by_tiles(d);
#if defined(QUANTIZE_TILES)
  if (tiles) clear_sums();
#endif
  if (!tiles) memset(total, 0, 4 * sizeof *total);
  for (int64_t p = 0; p < n; p += WIDE) {
    quads.fill(v + p * d, next ? next + p * d : nullptr, n - p, d, left);

#if defined(QUANTIZE_TILES)
    if (tiles) add_to_sums(shares.bytes[0] + p, quads.bytes);
#endif
    if (tiles) continue;
    for (int row = 0; row < 2 * M; row++) quads.add_to(shares.bytes[row] + p, total, row);
  }
#if defined(QUANTIZE_TILES)
  if (tiles) store_sums(total);
#endif
}

#endif

// y[m] = the sum of n rows of v [n, d], each times its weight s[m]. next: rows that are read after
// them.
template <int M>
inline void weigh(const float (*s)[CHUNK], const int8_t* v, const int8_t* next, int64_t n,
                  int64_t d, float* const* y) {
  const Shares<M> shares(s, n);
#if defined(__AVX512VNNI__)
  alignas(64) int32_t total[4][TILE][TILE];
  for (int64_t i = 0; i < d; i += WIDE) {
    const int64_t left = d - i < WIDE ? d - i : WIDE;
    sum_quads<M>(shares, v + i, i ? nullptr : next, n, d, left, total);
    for (int m = 0; m < M; m++) {
      __m512i exact[4], columns[4];
      for (int j = 0; j < 4; j++) {
        const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(total[j][M + m]), 8);
        exact[j] = _mm512_add_epi32(upper, _mm512_load_si512(total[j][m]));
      }
      turn_quarters(exact, columns);
      for (int64_t j = 0; j < left; j += LANES) {
        const Ints some = (Ints)columns[j / LANES];
        const Floats sums = to_floats(some) * shares.step[m];
        memcpy(y[m] + i + j, &sums, std::min(left - j, LANES) * sizeof(float));
      }
    }
  }
#else
  for (int64_t i = 0; i < d; i += LANES) {
    const int64_t many = d - i < LANES ? d - i : LANES;
    int32_t exact[M + 1][LANES];
    const auto ask = [&](int64_t p) {
      if (i == 0) fetch(next + p * d, 2, d);
    };
    add_columns<M>(shares.words[0], CHUNK, v + i, n, d, many, exact, ask);
    const Ints shift = load_vector<Ints>(exact[M]) << 15;
    for (int m = 0; m < M; m++) {
      const Floats found = to_floats(load_vector<Ints>(exact[m]) + shift) * shares.step[m];
      if (many == LANES)
        store_vector(found, y[m] + i);
      else
        memcpy(y[m] + i, &found, many * sizeof(float));
    }
  }
#endif
}

}  // namespace
