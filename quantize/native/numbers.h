// Number formats, and sixteen numbers at a time. Every function has a plain form that runs
// anywhere.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
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
  Ints r;
  for (int i = 0; i < LANES; i++) r[i] = p[i];
  return r;
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
  Ints r;
  for (int i = 0; i < LANES; i++) r[i] = p[i];
  return r;
#endif
}

inline Floats load(const float* p) {
  typedef float Anywhere __attribute__((vector_size(64), aligned(4), may_alias));
  return *(const Anywhere*)p;
}
inline Floats load(const Brain* p) { return (Floats)(load_words(&p->bits) << 16); }
inline Floats load_some(const Brain* p, int64_t n) {  // zeros after the first n
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (Floats)_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(uint16_t((1 << n) - 1), p)), 16);
#else
  Brain some[LANES] = {};
  memcpy(some, p, n * sizeof(Brain));
  return load(some);
#endif
}
inline Floats load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  return __builtin_convertvector((load_bytes((const uint8_t*)p) ^ 128) - 128, Floats);
#endif
}
inline Floats load(const Half* p) {
  Ints b = load_words(&p->bits);
  Floats size = (Floats)((b & 0x7fff) << 13) * 0x1p112f;
  return (Floats)((Ints)size | (b & 0x8000) << 16);
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

// The four sums at once.
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
  for (int i = 0; i < 4; i++) y[i] = sum(x[i]);
#endif
}

// Exact sums of products of int8 weights w and uint8 inputs x, STEP of them at a time.
struct Exact {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  static constexpr int64_t STEP = 64;
  __m512i total = _mm512_setzero_si512();
  void add(const int8_t* w, const uint8_t* x) {
    total = _mm512_dpbusd_epi32(total, _mm512_loadu_si512(x), _mm512_loadu_si512(w));
  }
  int32_t sum() const { return _mm512_reduce_add_epi32(total); }
#elif defined(__AVX2__)
  static constexpr int64_t STEP = 16;
  __m256i total = _mm256_setzero_si256();
  void add(const int8_t* w, const uint8_t* x) {  // through 16 bits: the product of bytes saturates
    __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)),
            b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)x));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(a, b));
  }
  int32_t sum() const {
    int32_t s[8], r = 0;
    memcpy(s, &total, sizeof s);
    for (int i = 0; i < 8; i++) r += s[i];
    return r;
  }
#else
  static constexpr int64_t STEP = 16;
  int32_t total = 0;
  void add(const int8_t* w, const uint8_t* x) {
    for (int64_t i = 0; i < STEP; i++) total += int32_t(w[i]) * x[i];
  }
  int32_t sum() const { return total; }
#endif
};

// 32 bytes of two 4-bit codes each, low half first, which belong to two groups of 16 bytes (the
// second may be missing), and their products with 64 inputs of 16 bits, given as their upper and
// lower bytes: those that meet the low halves, then the others. Each group's products count
// scale[group] and scale[group + 1] times.
struct Codes {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  typedef __m512 Total;
  __m512i codes;
  Codes(const uint8_t* p, bool both) {
    __m256i pairs = both ? _mm256_loadu_si256((const __m256i*)p)
                         : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p));
    __m512i twice = _mm512_broadcast_i64x4(pairs);
    codes = _mm512_and_si512(_mm512_mask_srli_epi32(twice, 0xff00, twice, 4), _mm512_set1_epi8(15));
  }
  void add(const int8_t* upper, const int8_t* lower, const Floats& scale, int64_t group,
           Total& total) const {
    const __m512i place = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1);
    __m512i products =
        _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(upper));
    products =
        _mm512_dpbusd_epi32(_mm512_slli_epi32(products, 8), codes, _mm512_loadu_si512(lower));
    __m512 scales = _mm512_permutexvar_ps(_mm512_add_epi32(place, _mm512_set1_epi32(int(group))),
                                          (__m512)scale);
    total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scales, total);
  }
  static float sum(Total total, Floats more) { return ::sum((Floats)total + more); }
#elif defined(__AVX2__)
  typedef __m256 Total;
  __m256i low, high;
  Codes(const uint8_t* p, bool both) {
    __m256i pairs = both ? _mm256_loadu_si256((const __m256i*)p)
                         : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p));
    __m256i mask = _mm256_set1_epi8(15);
    low = _mm256_and_si256(pairs, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask);
  }
  __m256i times(const int8_t* x) const {  // 15 * 128 * 4 fits in 16 bits
    const __m256i* v = (const __m256i*)x;
    __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_loadu_si256(v)),
                                    _mm256_maddubs_epi16(high, _mm256_loadu_si256(v + 1)));
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
  }
  void add(const int8_t* upper, const int8_t* lower, const Floats& scale, int64_t group,
           Total& total) const {
    __m256i products = _mm256_add_epi32(_mm256_slli_epi32(times(upper), 8), times(lower));
    __m256 scales =
        _mm256_insertf128_ps(_mm256_set1_ps(scale[group]), _mm_set1_ps(scale[group + 1]), 1);
    total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scales, total);
  }
  static float sum(Total total, Floats more) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1))) + ::sum(more);
  }
#else
  typedef float Total;
  const uint8_t* pairs;
  int many;
  Codes(const uint8_t* p, bool both) : pairs(p), many(both ? 32 : 16) {}
  void add(const int8_t* upper, const int8_t* lower, const Floats& scale, int64_t group,
           Total& total) const {
    int32_t products[2] = {};
    for (int i = 0; i < many; i++)
      products[i / 16] += (pairs[i] & 15) * (upper[i] * 256 + lower[i]) +
                          (pairs[i] >> 4) * (upper[i + 32] * 256 + lower[i + 32]);
    total += float(products[0]) * scale[group] + float(products[1]) * scale[group + 1];
  }
  static float sum(Total total, Floats more) { return total + ::sum(more); }
#endif
};
