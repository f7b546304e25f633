// Number formats, and sixteen numbers at a time. Every function has a plain form that runs anywhere.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(Brain x) { return bits<float>(uint32_t(x.bits) << 16); }
inline float widen(Half x) {  // exact for every finite number: the product moves exponents from a bias of 15 to 127
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
    if (size < 0x38800000) return {uint16_t(sign | uint32_t(nearbyintf(bits<float>(size) * 0x1p24f)))};
    return {uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13)};
}

inline float exponential(float x) {  // exp to 2e-7 of its size, in a form that vectorizes; NaN stays NaN
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

// ------------------------------------------------------------------------------------------- sixteen at a time

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

inline Ints load_bytes(const uint8_t *p) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    struct { __m256i low, high; } both = {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
    return bits<Ints>(both);
#else
    Ints r;
    for (int i = 0; i < LANES; i++) r[i] = p[i];
    return r;
#endif
}

inline Ints load_words(const uint16_t *p) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    struct { __m256i low, high; } both = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)))};
    return bits<Ints>(both);
#else
    Ints r;
    for (int i = 0; i < LANES; i++) r[i] = p[i];
    return r;
#endif
}

inline Floats load(const float *p) {
    typedef float Anywhere __attribute__((vector_size(64), aligned(4), may_alias));
    return *(const Anywhere *)p;
}
inline Floats load(const Brain *p) { return (Floats)(load_words(&p->bits) << 16); }
inline Floats load(const int8_t *p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    return __builtin_convertvector((load_bytes((const uint8_t *)p) ^ 128) - 128, Floats);
#endif
}
inline Floats load(const Half *p) {
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

// Exact sums of products of int8 weights w and uint8 inputs x, STEP of them at a time.
struct Exact {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    static constexpr int64_t STEP = 64;
    __m512i total = _mm512_setzero_si512();
    void add(const int8_t *w, const uint8_t *x) { total = _mm512_dpbusd_epi32(total, _mm512_loadu_si512(x), _mm512_loadu_si512(w)); }
    int32_t sum() const { return _mm512_reduce_add_epi32(total); }
#elif defined(__AVX2__)
    static constexpr int64_t STEP = 16;
    __m256i total = _mm256_setzero_si256();
    void add(const int8_t *w, const uint8_t *x) {  // through 16 bits: the product of bytes saturates
        __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)), b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)x));
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
    void add(const int8_t *w, const uint8_t *x) {
        for (int64_t i = 0; i < STEP; i++) total += int32_t(w[i]) * x[i];
    }
    int32_t sum() const { return total; }
#endif
};

// 16 bytes of two 4-bit codes each, low half first, and their products with 32 int16 inputs: those that meet the low halves, then
// the others. Sums that belong to one group are left in eight lanes, and `scale` times them is added to a total.
struct Codes {
#if defined(__AVX2__)
    typedef __m256 Total;
    __m256i low, high;
    explicit Codes(const uint8_t *p) {
        __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
        low = _mm256_and_si256(pairs, _mm256_set1_epi16(15));
        high = _mm256_srli_epi16(pairs, 4);
    }
    void add(const int16_t *x, float scale, Total &total) const {
        const __m256i *v = (const __m256i *)x;
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        __m256i products = _mm256_dpwssd_epi32(_mm256_setzero_si256(), low, _mm256_loadu_si256(v));
        products = _mm256_dpwssd_epi32(products, high, _mm256_loadu_si256(v + 1));
#else
        __m256i products = _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_loadu_si256(v)), _mm256_madd_epi16(high, _mm256_loadu_si256(v + 1)));
#endif
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(scale), total);
    }
    static float sum(Total total) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
#else
    typedef float Total;
    const uint8_t *pairs;
    explicit Codes(const uint8_t *p) : pairs(p) {}
    void add(const int16_t *x, float scale, Total &total) const {
        int32_t products = 0;
        for (int i = 0; i < 16; i++) products += (pairs[i] & 15) * x[i] + (pairs[i] >> 4) * x[i + 16];
        total += float(products) * scale;
    }
    static float sum(Total total) { return total; }
#endif
};
