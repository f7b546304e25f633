// Vectors of bytes, quarter by quarter: what attention over an int8 cache takes with instructions
// that multiply bytes.

#pragma once
#include "tiles.h"

#if defined(__AVX512VNNI__)

namespace {

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

}  // namespace

#endif
