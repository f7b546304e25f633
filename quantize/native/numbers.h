// Number formats, and sixteen numbers at a time. Every function has a plain form that runs
// anywhere.

#pragma once
#include "vectors.h"

#include <cmath>

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#if defined(__SSE2__)
struct Quarters {  // of a vector: what the least of these machines has
  __m128i part[4];
};
#endif

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

// The smaller, or the larger, of two numbers; b where one is NaN.
inline Floats least(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return {_mm256_min_ps(a.part[0], b.part[0]), _mm256_min_ps(a.part[1], b.part[1])};
#else
  return choose(a < b, a, b);
#endif
}
inline Floats most(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return {_mm256_max_ps(a.part[0], b.part[0]), _mm256_max_ps(a.part[1], b.part[1])};
#else
  return choose(a > b, a, b);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256 least(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
inline __m256 most(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
#endif

// a b + c, rounded once. Not inlined where each number of the sixteen is a call of its own.
#if defined(__SSE2__) && !defined(__FMA__)
[[gnu::noinline]]
#endif
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return {_mm256_fmadd_ps(a.part[0], b.part[0], c.part[0]),
          _mm256_fmadd_ps(a.part[1], b.part[1], c.part[1])};
#else
  for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
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

#if defined(__SSE2__) && !defined(__AVX2__)
// Words without a sign.
inline Ints widened(__m128i low, __m128i high) {
  const __m128i none = _mm_setzero_si128();
  return bits<Ints>(Quarters{{_mm_unpacklo_epi16(low, none), _mm_unpackhi_epi16(low, none),
                              _mm_unpacklo_epi16(high, none), _mm_unpackhi_epi16(high, none)}});
}

// The lower half of each in two vectors.
inline void narrow(Ints numbers, __m128i* words) {
  const Quarters all = bits<Quarters>((numbers << 16) >> 16);  // with a sign, as packing takes them
  words[0] = _mm_packs_epi32(all.part[0], all.part[1]);
  words[1] = _mm_packs_epi32(all.part[2], all.part[3]);
}
#endif

inline Ints load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return {(Ints::Part)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          (Ints::Part)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
#elif defined(__SSE2__)
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p), none = _mm_setzero_si128();
  return widened(_mm_unpacklo_epi8(bytes, none), _mm_unpackhi_epi8(bytes, none));
#else
  Ints found;
  for (int i = 0; i < LANES; i++) found[i] = p[i];
  return found;
#endif
}

inline Ints load_words(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return {(Ints::Part)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          (Ints::Part)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
#elif defined(__SSE2__)
  const __m128i* words = (const __m128i*)p;
  return widened(_mm_loadu_si128(words), _mm_loadu_si128(words + 1));
#else
  Ints found;
  for (int i = 0; i < LANES; i++) found[i] = p[i];
  return found;
#endif
}

inline Floats load(const float* p) { return load_vector<Floats>(p); }
inline Floats load(const Brain* p) { return (Floats)(load_words(&p->bits) << 16); }
inline Floats load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  return to_floats((load_bytes((const uint8_t*)p) ^ 128) - 128);
#endif
}
inline Floats load(const Half* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
#else
  Ints b = load_words(&p->bits);
  Floats size = (Floats)((b & 0x7fff) << 13) * 0x1p112f;
  return (Floats)((Ints)size | (b & 0x8000) << 16);
#endif
}

inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
  const __m256 eight = _mm256_add_ps(x.part[0], x.part[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float s[LANES];
  memcpy(s, &x, sizeof s);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
#endif
}

inline int32_t sum(Ints x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#elif defined(__AVX2__)
  const __m256i eight = _mm256_add_epi32((__m256i)x.part[0], (__m256i)x.part[1]);
  const __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#else
  int32_t found = 0;
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 8; i++) found += x.part[half][i];
  return found;
#endif
}

// Over all lanes; no number is NaN.
inline float largest_of(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
  const __m256 eight = _mm256_max_ps(x.part[0], x.part[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float found = x[0];
  for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
  return found;
#endif
}
inline int32_t largest_of(Ints x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#elif defined(__AVX2__)
  const __m256i eight = _mm256_max_epi32((__m256i)x.part[0], (__m256i)x.part[1]);
  const __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#else
  int32_t found = x[0];
  for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
  return found;
#endif
}

// Whether a mask is set in all lanes.
inline bool all_of(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)(mask.part[0] & mask.part[1])) == -1;
#else
  int32_t found = -1;
  for (int i = 0; i < LANES; i++) found &= mask[i];
  return found;
#endif
}

// The lower half of each.
inline void store_words(Ints numbers, void* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)numbers));
#elif defined(__AVX2__)
  const Ints low = numbers & 0xffff;
  const __m256i words = _mm256_packus_epi32((__m256i)low.part[0], (__m256i)low.part[1]);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(words, 0xd8));
#elif defined(__SSE2__)
  __m128i words[2];
  narrow(numbers, words);
  memcpy(to, words, sizeof words);
#else
  for (int i = 0; i < LANES; i++) ((uint16_t*)to)[i] = uint16_t(numbers[i]);
#endif
}
// The lowest byte of each.
inline void store_lowest(Ints numbers, void* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)numbers));
#elif defined(__AVX2__)
  const Ints low = numbers & 0xff;
  const __m256i words = _mm256_packus_epi32((__m256i)low.part[0], (__m256i)low.part[1]);
  const __m256i all = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i first = _mm256_castsi256_si128(all), last = _mm256_extracti128_si256(all, 1);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(first, last));
#elif defined(__SSE2__)
  __m128i words[2];
  narrow(numbers & 0xff, words);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(words[0], words[1]));
#else
  for (int i = 0; i < LANES; i++) ((uint8_t*)to)[i] = uint8_t(numbers[i]);
#endif
}
// Rounded as `to_brain` rounds.
inline void store(Floats x, Brain* to) {
  const Ints all = (Ints)x, rounded = (all + 0x7fff + (all >> 16 & 1)) >> 16;
  store_words(choose(x != x, Ints{} + 0x7fc0, rounded), to);
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
#elif defined(__AVX2__)
  __m256 half[2];
  for (int i = 0; i < 2; i++) {
    const __m256 a = x[0].part[i], b = x[1].part[i], c = x[2].part[i], d = x[3].part[i];
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    half[i] = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  }
  const __m256 all = _mm256_add_ps(half[0], half[1]);
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int i = 0; i < 4; i++) {
    const Floats v = x[i];
    float part[4];
    for (int j = 0; j < 4; j++) part[j] = (v[4 * j] + v[4 * j + 2]) + (v[4 * j + 1] + v[4 * j + 3]);
    y[i] = (part[0] + part[2]) + (part[1] + part[3]);
  }
#endif
}
