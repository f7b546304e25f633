// The two sums of attention over an int8 cache, in integers.
//
// A query is rounded to 16 bits with one step, and so is what the positions of a chunk weigh, times
// the scales of their values; each is multiplied as two bytes. So both sums are exact, whichever
// instructions add them up, and a position costs a vector of bytes instead of four of floats.

#pragma once
#include "int4.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t CHUNK = 256;  // positions; 2^16 * 127 * CHUNK fits 32 bits
constexpr int64_t WIDE = 64;    // bytes of a vector

// Asks for rows that are read next: a chunk is too short for the CPU to notice by itself where it
// goes on.
template <class T>
inline void fetch(const T* rows, int64_t count, int64_t d) {
  for (int64_t i = 0; i < count * d * int64_t(sizeof(T)); i += 64)
    __builtin_prefetch((const char*)rows + i);
}

// The largest size; NaN if there is a NaN or an infinity, whose rounded form must not look like a
// number.
inline float largest(const float* x, int64_t n) {
  float most = 0, nan = 0;
#pragma omp simd reduction(max : most) reduction(+ : nan)
  for (int64_t i = 0; i < n; i++) {
    most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    nan += x[i] * 0;
  }
  return most + nan;
}

// Numbers of up to `most` steps; NaN as a step, and zeros, for those that aren't finite.
struct Rounding {
  float step, inverse;

  Rounding(const float* x, int64_t n, float most) : step(largest(x, n) / most) {
    step = step < SMALLEST ? SMALLEST : step;
    inverse = step == step ? 1 / step : 0;
  }
  int32_t count(float x) const { return inverse == 0 ? 0 : int32_t(nearbyintf(x * inverse)); }
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

// Each row of `apart` numbers as two: x = 256 upper + lower, with the lower bytes first.
inline std::vector<int8_t> split_bytes(const int16_t* x, int64_t rows, int64_t apart) {
  std::vector<int8_t> bytes(2 * rows * apart);
  for (int64_t row = 0; row < rows; row++) {
    int8_t *lower = bytes.data() + 2 * row * apart, *upper = lower + apart;
    for (int64_t i = 0; i < apart; i++) {
      const int16_t value = x[row * apart + i];
      lower[i] = int8_t(value);
      upper[i] = int8_t((value + 128) >> 8);
    }
  }
  return bytes;
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

// s[m] = the scores of n rows of k [n, d] for query m. next: rows that are read after them.
template <int M>
inline void score(const float* const* q, const int8_t* k, const int8_t* next, int64_t n, int64_t d,
                  float (*s)[CHUNK]) {
  const int64_t apart = (d + WIDE - 1) / WIDE * WIDE;
  std::vector<int16_t> rounded(M * apart);
  float step[M];
  int32_t sum[M] = {};
  for (int m = 0; m < M; m++) {
    const Rounding rounding(q[m], d, d <= 256 ? 127 * 256 : 127 * 65536 / d);  // sums fit 32 bits
    step[m] = rounding.step;
    int16_t* to = rounded.data() + m * apart;
    for (int64_t i = 0; i < d; i++) to[i] = int16_t(rounding.count(q[m][i]));
    for (int64_t i = 0; i < d; i++) sum[m] += to[i];
  }
#if defined(__AVX512VNNI__)
  const std::vector<int8_t> bytes = split_bytes(rounded.data(), M, apart);
  for (int64_t p = 0; p < n; p += LANES) {
    const int8_t* row[LANES];
    for (int64_t j = 0; j < LANES; j++) row[j] = k + (p + j < n ? p + j : n - 1) * d;
    fetch(next + p * d, LANES, d);
    __m512i total[2 * M][4];
    shifted_products<2 * M>(bytes.data(), apart, row, d, total);
    for (int m = 0; m < M; m++) {
      const Ints low = (Ints)quarter_sums(total[2 * m]);
      const Ints high = (Ints)quarter_sums(total[2 * m + 1]);
      const Ints exact = high * 256 + low - 128 * sum[m];
      const Floats scores = __builtin_convertvector(exact, Floats) * step[m];
      memcpy(s[m] + p, &scores, sizeof scores);
    }
  }
#else
  for (int64_t p = 0; p < n; p++)
    for (int m = 0; m < M; m++) {
      const int16_t* left = rounded.data() + m * apart;
      int32_t exact = 0;
      for (int64_t i = 0; i < d; i++) exact += left[i] * int16_t(k[p * d + i]);
      s[m][p] = float(exact) * step[m];
    }
#endif
}

// What n positions weigh, in 16 bits.
struct Shares {
  alignas(64) uint8_t high[CHUNK] = {}, low[CHUNK] = {};
  float step;

  void round(const float* s, int64_t n) {
    const Rounding rounding(s, n, 65535);
    step = rounding.step;
    for (int64_t p = 0; p < n; p++) {
      const int32_t count = rounding.count(s[p]);
      high[p] = uint8_t(count >> 8);
      low[p] = uint8_t(count);
    }
  }
};

#if defined(__AVX512VNNI__)

// Up to WIDE columns of up to CHUNK rows, the bytes of every four rows side by side: in vector i of
// them, quarter by quarter, those of columns 16 quarter + 4 i and the three after it.
struct Quads {
  alignas(64) int8_t bytes[CHUNK / 4][4][WIDE];

  // v: rows d apart, of which `left` columns are used.
  void fill(const int8_t* v, int64_t n, int64_t d, int64_t left) {
    const __mmask64 mask = first_bytes(left);
    for (int64_t p = 0; p < n; p += 4) {
      __m512i row[4];
      for (int64_t j = 0; j < 4; j++)
        row[j] = _mm512_maskz_loadu_epi8(mask, v + (p + j < n ? p + j : n - 1) * d);
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

  // Sums of `left` columns over n rows. next: rows that are asked for meanwhile, or null.
  void weigh(const Shares& shares, const int8_t* next, int64_t n, int64_t d, int64_t left,
             float* y) const {
    __m512i high[4] = {}, low[4] = {};
    for (int64_t p = 0; p < n; p += 4) {
      if (next) fetch(next + p * d, 4, d);
      const __m512i upper = four_times(shares.high + p), lower = four_times(shares.low + p);
      for (int i = 0; i < 4; i++) {
        const __m512i four = _mm512_load_si512(bytes[p / 4][i]);
        high[i] = _mm512_dpbusd_epi32(high[i], upper, four);
        low[i] = _mm512_dpbusd_epi32(low[i], lower, four);
      }
    }
    alignas(64) float sums[4][4][4];  // [vector][quarter][column]
    for (int i = 0; i < 4; i++) {
      const __m512i exact = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]);
      const __m512 step = _mm512_set1_ps(shares.step);
      _mm512_store_ps(sums[i][0], _mm512_mul_ps(_mm512_cvtepi32_ps(exact), step));
    }
    for (int64_t i = 0; i < left; i++) y[i] = sums[i / 4 % 4][i / 16][i % 4];
  }
};

#endif

// y[m] = the sum of n rows of v [n, d], each times its weight s[m]. next: rows that are read after
// them.
template <int M>
inline void weigh(const float (*s)[CHUNK], const int8_t* v, const int8_t* next, int64_t n,
                  int64_t d, float* const* y) {
  Shares shares[M];
  for (int m = 0; m < M; m++) shares[m].round(s[m], n);
#if defined(__AVX512VNNI__)
  Quads quads;
  for (int64_t i = 0; i < d; i += WIDE) {
    const int64_t left = d - i < WIDE ? d - i : WIDE;
    quads.fill(v + i, n, d, left);
    for (int m = 0; m < M; m++)
      quads.weigh(shares[m], i + m == 0 ? next : nullptr, n, d, left, y[m] + i);
  }
#else
  std::vector<int32_t> exact(d);
  for (int m = 0; m < M; m++) {
    std::fill(exact.begin(), exact.end(), 0);
    for (int64_t p = 0; p < n; p++) {
      const int32_t weight = shares[m].high[p] * 256 + shares[m].low[p];
      for (int64_t i = 0; i < d; i++) exact[i] += weight * v[p * d + i];
    }
    for (int64_t i = 0; i < d; i++) y[m][i] = float(exact[i]) * shares[m].step;
  }
#endif
}

}  // namespace
