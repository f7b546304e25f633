// Number formats, and sixteen numbers at a time. Every function has a plain form that runs
// anywhere.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include "neon.h"
#endif

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(Brain x) { return bits<float>(uint32_t(x.bits) << 16); }
inline float widen(Half x) {  // exact for every finite number: the product moves exponents from a
                              // bias of 15 to 127
  float size = bits<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  return bits<float>(bits<uint32_t>(size) | uint32_t(x.bits & 0x8000) << 16);
}

inline Brain to_brain(float x) {  // to nearest even; NaN stays NaN
  uint32_t b = bits<uint32_t>(x);
  return {uint16_t(x != x ? 0x7fc0 : (b + 0x7fff + (b >> 16 & 1)) >> 16)};
}

inline Half to_half(float x) {  // to nearest even; too large becomes infinity
  uint32_t b = bits<uint32_t>(x), size = b & 0x7fffffff, sign = b >> 16 & 0x8000;
  if (size >= 0x47800000) return {uint16_t(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00))};
  if (size < 0x38800000)
    return {uint16_t(sign | uint32_t(nearbyintf(bits<float>(size) * 0x1p24f)))};
  return {uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13)};
}

inline float exponential(
    float x) {  // exp to 2e-7 of its size, in a form that vectorizes; NaN stays NaN
  x = x > 88 ? 88 : x;
  x = x < -87 ? -87 : x;
  float n = nearbyintf(x * 1.44269504f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1) * bits<float>(uint32_t(int32_t(n) + 127) << 23);
}

// -------------------------------------------------------------------------------------------
// sixteen at a time

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

// The smaller, or the larger, of two numbers; b where one is NaN.
inline Floats least(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}
inline Floats most(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline Floats exponential(Floats x) {  // as of one number, bit for bit
  x = most(Floats{} - 87, least(Floats{} + 88, x));
  const float shift = 0x1.8p23f;  // adding it rounds to the nearest integer, half to even
  const Floats shifted = x * 1.44269504f + shift;
  const Floats n = shifted - shift;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Ints power = ((Ints)shifted - bits<int32_t>(shift) + 127) << 23;
  return (p * r * r + r + 1) * (Floats)power;
}

inline Ints load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  struct {
    __m256i low, high;
  } both = {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
  return bits<Ints>(both);
#else
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  Bytes bytes;
  memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Ints);
#endif
}

inline Ints load_words(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  struct {
    __m256i low, high;
  } both = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
  return bits<Ints>(both);
#else
  typedef uint16_t Words __attribute__((vector_size(32)));
  Words words;
  memcpy(&words, p, sizeof words);
  return __builtin_convertvector(words, Ints);
#endif
}

inline Floats load(const float* p) {
  typedef float Anywhere __attribute__((vector_size(64), aligned(4), may_alias));
  return *(const Anywhere*)p;
}
inline Floats load(const Brain* p) { return (Floats)(load_words(&p->bits) << 16); }
inline Floats load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  return __builtin_convertvector((load_bytes((const uint8_t*)p) ^ 128) - 128, Floats);
#endif
}
inline Floats load(const Half* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  Ints b = load_words(&p->bits);
  Floats size = (Floats)((b & 0x7fff) << 13) * 0x1p112f;
  return (Floats)((Ints)size | (b & 0x8000) << 16);
#endif
}

inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s[LANES];
  memcpy(s, &x, sizeof s);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
#endif
}

// The four sums at once; not in the order of `sum`, but in the same one on all instruction sets.
inline void sum4(const Floats* x, float* y) {
#if defined(__AVX512F__)
  __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                              _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < 4; i++) {
    const Floats v = x[i];
    float part[4];
    for (int j = 0; j < 4; j++) part[j] = (v[4 * j] + v[4 * j + 2]) + (v[4 * j + 1] + v[4 * j + 3]);
    y[i] = (part[0] + part[2]) + (part[1] + part[3]);
  }
#endif
}
