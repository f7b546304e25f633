// The two sums of attention over an int8 cache, in integers.
//
// A query is rounded to 16 bits with one step, and so is what the positions of a chunk weigh, times
// the scales of their values; each is multiplied as two bytes. So both sums are exact, whichever
// instructions add them up, and a position costs a vector of bytes instead of four of floats.

#pragma once
#include "int4.h"
#include "tiles.h"

#include <algorithm>
#include <vector>

namespace {

// Asks for rows that are read later, for the second level of cache: a chunk is too short for the
// CPU to notice by itself where it goes on.
template <class T>
inline void fetch(const T* rows, int64_t count, int64_t d) {
  for (int64_t i = 0; i < count * d * int64_t(sizeof(T)); i += 64)
    __builtin_prefetch((const char*)rows + i, 0, 2);
}

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

#if defined(__AVX512VNNI__)

inline __m512i four_times(const uint8_t* from) {  // 4 bytes, in every lane
  int32_t four;
  memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

inline __mmask64 first_bytes(int64_t n) {
  return n >= WIDE ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
}

// Quarter i of each of four vectors, for every i.
inline void turn_quarters(const __m512i* x, __m512i* y) {
  const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xee);
  const __m512i d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  y[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  y[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  y[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  y[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// The sums of the quarters of four vectors: quarter i of the result has those of every quarter i.
inline __m512i quarter_sums(const __m512i* x) {
  const __m512i a =
      _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  const __m512i b =
      _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// total[m][i], quarter j: parts of q[m] . (k + 128) for row 4 j + i, as the instruction's left side
// has no sign. q: M rows of bytes, `apart` from each other.
template <int M>
inline void shifted_products(const int8_t* q, int64_t apart, const int8_t* const* k, int64_t d,
                             __m512i (*total)[4]) {
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int64_t at = 0; at < d; at += WIDE) {
    const __mmask64 mask = first_bytes(d - at);
    for (int i = 0; i < 4; i++) {
      __m512i row[4], keys[4];
      for (int j = 0; j < 4; j++)
        row[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, k[4 * j + i] + at), sign);
      turn_quarters(row, keys);
      for (int m = 0; m < M; m++) {
        const __m128i* query = (const __m128i*)(q + m * apart + at);
        __m512i sum = at ? total[m][i] : _mm512_setzero_si512();
        for (int j = 0; j < 4; j++)
          sum =
              _mm512_dpbusd_epi32(sum, keys[j], _mm512_broadcast_i32x4(_mm_loadu_si128(query + j)));
        total[m][i] = sum;
      }
    }
  }
}

#endif

// M queries in 16 bits, each as two bytes: 256 upper + lower. Behind the d of a row lie zeros up to
// whole vectors.
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
      int8_t *low = lower(m), *high = upper(m);
      for (int64_t i = 0; i < apart; i += LANES) {
        const Ints value = rounding.count(load_first(q[m] + i, d - i));
        store_lowest(value, low + i);
        store_lowest((value + 128) >> 8, high + i);
        sum[m] += value;
      }
    }
  }
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
  for (int64_t p = 0; p < n; p++)
    for (int m = 0; m < M; m++) {
      const int8_t *low = q.lower(m), *high = q.upper(m);
      int32_t exact = 0;
      for (int64_t i = 0; i < d; i++) exact += (256 * high[i] + low[i]) * int16_t(k[p * d + i]);
      s[m][p] = float(exact) * q.step[m];
    }
#endif
}

// What n positions weigh for M queries, in 16 bits: the lower bytes of all, then the upper ones.
template <int M>
struct Shares {
  alignas(64) uint8_t bytes[TILE][CHUNK];
  float step[M];

  Shares(const float (*s)[CHUNK], int64_t n) {
    for (int m = 0; m < M; m++) {
      const Rounding rounding(s[m], n, 65535);
      step[m] = rounding.step;
      for (int64_t p = 0; p < (n + WIDE - 1) / WIDE * WIDE; p += LANES) {
        const Ints count = rounding.count(load_first(s[m] + p, n - p));
        store_lowest(count, bytes[m] + p);
        store_lowest(count >> 8, bytes[M + m] + p);
      }
    }
  }
};

#if defined(__AVX512VNNI__)

// Up to WIDE columns of WIDE rows, the bytes of every four rows side by side: in vector i of them,
// quarter by quarter, those of columns 16 quarter + 4 i and the three after it.
struct Quads {
  alignas(64) int8_t bytes[WIDE / 4][4][WIDE];

  // The first n rows of v, d apart, the last one repeated. left: columns that are used. next: rows
  // that are asked for meanwhile, or null.
  void fill(const int8_t* v, const int8_t* next, int64_t n, int64_t d, int64_t left) {
    const __mmask64 mask = first_bytes(left);
    for (int64_t p = 0; p < WIDE; p += 4) {
      __m512i row[4];
      for (int64_t j = 0; j < 4; j++)
        row[j] = _mm512_maskz_loadu_epi8(mask, v + (p + j < n ? p + j : n - 1) * d);
      if (next) fetch(next + p * d, 4, d);
      const __m512i first = _mm512_unpacklo_epi8(row[0], row[1]);
      const __m512i second = _mm512_unpacklo_epi8(row[2], row[3]);
      const __m512i third = _mm512_unpackhi_epi8(row[0], row[1]);
      const __m512i fourth = _mm512_unpackhi_epi8(row[2], row[3]);
      int8_t (*to)[WIDE] = bytes[p / 4];
      _mm512_store_si512(to[0], _mm512_unpacklo_epi16(first, second));
      _mm512_store_si512(to[1], _mm512_unpackhi_epi16(first, second));
      _mm512_store_si512(to[2], _mm512_unpacklo_epi16(third, fourth));
      _mm512_store_si512(to[3], _mm512_unpackhi_epi16(third, fourth));
    }
  }

  // total[i] += the sums of vector i, each row times its weight.
  void add_to(const uint8_t* weights, int32_t (*total)[TILE][TILE], int row) const {
    __m512i sums[4];
    for (int i = 0; i < 4; i++) sums[i] = _mm512_load_si512(total[i][row]);
    for (int64_t p = 0; p < WIDE; p += 4) {
      const __m512i four = four_times(weights + p);
      for (int i = 0; i < 4; i++)
        sums[i] = _mm512_dpbusd_epi32(sums[i], four, _mm512_load_si512(bytes[p / 4][i]));
    }
    for (int i = 0; i < 4; i++) _mm512_store_si512(total[i][row], sums[i]);
  }
};

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
  std::vector<int32_t> exact(d);
  for (int m = 0; m < M; m++) {
    std::fill(exact.begin(), exact.end(), 0);
    for (int64_t p = 0; p < n; p++) {
      const int32_t weight = shares.bytes[M + m][p] * 256 + shares.bytes[m][p];
      for (int64_t i = 0; i < d; i++) exact[i] += weight * v[p * d + i];
    }
    for (int64_t i = 0; i < d; i++) y[m][i] = float(exact[i]) * shares.step[m];
  }
#endif
}

}  // namespace
