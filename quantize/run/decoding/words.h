// Exact sums of products of 16-bit numbers and bytes: what attention over an int8 cache takes
// without instructions that multiply bytes.

#pragma once
#include "int4.h"

namespace {

#if defined(__AVX2__)

// The next 16 of `left` bytes, zeros behind them.
inline __m128i next_bytes(const int8_t* from, int64_t left) {
  if (left >= LANES) return _mm_loadu_si128((const __m128i*)from);
  int8_t some[LANES] = {};
  memcpy(some, from, left);
  return _mm_loadu_si128((const __m128i*)some);
}

inline void add_products(__m256i& total, __m256i a, __m256i b) {
  total = _mm256_add_epi32(total, _mm256_madd_epi16(a, b));
  end_step(total);
}

// The sums of four vectors.
inline __m128i four_sums(const __m256i* x) {
  const __m256i a = _mm256_hadd_epi32(x[0], x[1]), b = _mm256_hadd_epi32(x[2], x[3]);
  const __m256i both = _mm256_hadd_epi32(a, b);
  return _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

#endif

// exact[m] = q[m] . k for four rows of d bytes. q: N rows of words, `apart` from each other, zeros
// behind the d of each.
template <int N>
inline void multiply_words(const int16_t* q, int64_t apart, const int8_t* const* k, int64_t d,
                           int32_t (*exact)[4]) {
#if defined(__AVX2__)
  __m256i total[N][4] = {};
  for (int64_t i = 0; i < d; i += LANES) {
    __m256i keys[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) keys[j] = _mm256_cvtepi8_epi16(next_bytes(k[j] + i, d - i));
#pragma GCC unroll 4
    for (int m = 0; m < N; m++) {
      const __m256i words = _mm256_loadu_si256((const __m256i*)(q + m * apart + i));
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) add_products(total[m][j], words, keys[j]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < N; m++) _mm_storeu_si128((__m128i*)exact[m], four_sums(total[m]));
#else
  for (int m = 0; m < N; m++)
    for (int j = 0; j < 4; j++) {
      exact[m][j] = 0;
      for (int64_t i = 0; i < d; i++) exact[m][j] += q[m * apart + i] * k[j][i];
    }
#endif
}

// exact[m] = the sum of n rows of v, d apart, each times its weight, over `many` columns up to 16;
// exact[N] = their sum as they are. n: at most 256, so that this fits 16 bits. weights: N rows of
// words, `apart` from each other. visit(p) is called for every second row. Inlined into a loop,
// whose inner loops compilers unroll before they look for registers.
template <int N, class Visit>
[[gnu::always_inline]] inline void add_columns(const int16_t* weights, int64_t apart,
                                               const int8_t* v, int64_t n, int64_t d, int64_t many,
                                               int32_t (*exact)[LANES], const Visit& visit) {
#if defined(__AVX2__)
  __m256i total[N][2] = {}, plain[2] = {};
  for (int64_t p = 0; p < n; p += 2) {
    visit(p);
    const __m128i a = next_bytes(v + p * d, many);
    const __m128i b = p + 1 < n ? next_bytes(v + (p + 1) * d, many) : __m128i{};
    const __m256i low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
    const __m256i high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
    plain[0] = _mm256_add_epi16(plain[0], low);
    plain[1] = _mm256_add_epi16(plain[1], high);
#pragma GCC unroll 8
    for (int m = 0; m < N; m++) {
      int32_t two;
      memcpy(&two, weights + m * apart + p, sizeof two);
      const __m256i pair = _mm256_set1_epi32(two);
      add_products(total[m][0], low, pair);
      add_products(total[m][1], high, pair);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < N; m++) store_vector(joined(total[m][0], total[m][1]), exact[m]);
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_madd_epi16(plain[0], ones);
  store_vector(joined(low, _mm256_madd_epi16(plain[1], ones)), exact[N]);
#else
  memset(exact, 0, (N + 1) * sizeof *exact);
  for (int64_t p = 0; p < n; p++) {
    if (p % 2 == 0) visit(p);
    for (int64_t i = 0; i < many; i++) {
      const int32_t value = v[p * d + i];
      for (int m = 0; m < N; m++) exact[m][i] += weights[m * apart + p] * value;
      exact[N][i] += value;
    }
  }
#endif
}

}  // namespace
