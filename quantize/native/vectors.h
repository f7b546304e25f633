// Vectors of 64 bytes: sixteen floats or integers, or 64 bytes.
//
// Compilers keep no vector in registers that is wider than the machine's, so without AVX-512 one
// consists of two. Both forms have the same operators, one IEEE operation for each number.

#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include "neon.h"
#endif

constexpr int64_t LANES = 16;

#if defined(__AVX2__)
// Ends a step of a sum: where registers are scarce, compilers would move steps and spill.
inline void end_step(__m256i& total) { asm volatile("" : "+x"(total)); }
#endif

#if defined(__AVX512F__)

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

inline Ints places_of_lanes() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
// a where the mask is set, else b.
template <class T>
inline T choose(Ints mask, T a, T b) {
  return mask ? a : b;
}
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats everywhere(float x) { return (Floats)_mm512_set1_ps(x); }
template <class V>
inline V load_vector(const void* from) {
  V found;
  memcpy(&found, from, sizeof found);
  return found;
}
template <class V>
inline void store_vector(V x, void* to) {
  memcpy(to, &x, sizeof x);
}
// Of instructions on 32 bytes.
inline __m256i half_of(Bytes x, int half) {
  return half ? _mm512_extracti64x4_epi64((__m512i)x, 1) : _mm512_castsi512_si256((__m512i)x);
}
inline Ints joined(__m256i low, __m256i high) {
  return (Ints)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// The first, or the last, eight numbers of two vectors in turns.
template <class T>
inline T lower(T a, T b) {
  const Ints places = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  return __builtin_shuffle(a, b, places);
}
template <class T>
inline T upper(T a, T b) {
  const Ints places = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return __builtin_shuffle(a, b, places);
}
// Every second one of 32 numbers.
inline Floats evens(Floats a, Floats b) {
  const Ints places = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(a, b, places);
}

#else

typedef int32_t Places __attribute__((vector_size(32)));

template <class T>
struct Vector {
  typedef T Part __attribute__((vector_size(32)));
  Part part[2];

  Vector() = default;
  Vector(const Part& low, const Part& high) : part{low, high} {}
  // A part at a time: compilers copy structs by 16 bytes, which are slow to read again as 32.
  Vector(const Vector& other) : part{other.part[0], other.part[1]} {}
  Vector& operator=(const Vector& other) {
    part[0] = other.part[0], part[1] = other.part[1];
    return *this;
  }

  T operator[](int64_t i) const { return part[i / (32 / sizeof(T))][i % (32 / sizeof(T))]; }
  T& operator[](int64_t i) {
    typedef T Number __attribute__((may_alias));
    return ((Number*)part)[i];
  }
  // The same bits as numbers of another type.
  template <class To>
  explicit operator Vector<To>() const {
    typedef typename Vector<To>::Part Other;
    return {(Other)part[0], (Other)part[1]};
  }
  Vector operator-() const { return {-part[0], -part[1]}; }
  Vector operator~() const { return {~part[0], ~part[1]}; }

#define QUANTIZE_OPERATOR(op)                                                                  \
  friend Vector operator op(const Vector& a, const Vector& b) {                                \
    return {a.part[0] op b.part[0], a.part[1] op b.part[1]};                                   \
  }                                                                                            \
  friend Vector operator op(const Vector& a, T b) { return {a.part[0] op b, a.part[1] op b}; } \
  friend Vector operator op(T a, const Vector& b) { return {a op b.part[0], a op b.part[1]}; } \
  template <class Other>                                                                       \
  Vector& operator op## = (const Other& other) {                                               \
    return *this = *this op other;                                                             \
  }
  QUANTIZE_OPERATOR(+)
  QUANTIZE_OPERATOR(-)
  QUANTIZE_OPERATOR(*)
  QUANTIZE_OPERATOR(/)
  QUANTIZE_OPERATOR(&)
  QUANTIZE_OPERATOR(|)
  QUANTIZE_OPERATOR(^)
  QUANTIZE_OPERATOR(<<)
  QUANTIZE_OPERATOR(>>)
#undef QUANTIZE_OPERATOR

#define QUANTIZE_COMPARISON(op)                                          \
  friend Vector<int32_t> operator op(const Vector& a, const Vector& b) { \
    return {a.part[0] op b.part[0], a.part[1] op b.part[1]};             \
  }                                                                      \
  friend Vector<int32_t> operator op(const Vector& a, T b) {             \
    return {a.part[0] op b, a.part[1] op b};                             \
  }
  QUANTIZE_COMPARISON(<)
  QUANTIZE_COMPARISON(>)
  QUANTIZE_COMPARISON(>=)
  QUANTIZE_COMPARISON(==)
  QUANTIZE_COMPARISON(!=)
#undef QUANTIZE_COMPARISON
};

typedef Vector<float> Floats;
typedef Vector<int32_t> Ints;
typedef Vector<uint8_t> Bytes;

inline Ints places_of_lanes() {
  return {Places{0, 1, 2, 3, 4, 5, 6, 7}, Places{8, 9, 10, 11, 12, 13, 14, 15}};
}
template <class T>
inline T choose(const Ints& mask, const T& a, const T& b) {
  return {mask.part[0] ? a.part[0] : b.part[0], mask.part[1] ? a.part[1] : b.part[1]};
}
inline Floats to_floats(const Ints& x) {
  return {__builtin_convertvector(x.part[0], Floats::Part),
          __builtin_convertvector(x.part[1], Floats::Part)};
}

// A part at a time: a copy of all has an address, and so lies in memory.
template <class V>
inline V load_vector(const void* from) {
  typename V::Part part[2];
  memcpy(&part[0], from, 32);
  memcpy(&part[1], (const char*)from + 32, 32);
  return {part[0], part[1]};
}
template <class V>
inline void store_vector(const V& x, void* to) {
  memcpy(to, &x.part[0], 32);
  memcpy((char*)to + 32, &x.part[1], 32);
}

#if defined(__AVX2__)
inline Floats everywhere(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m256i half_of(const Bytes& x, int half) { return (__m256i)x.part[half]; }
inline Ints joined(__m256i low, __m256i high) { return {(Ints::Part)low, (Ints::Part)high}; }
#else
inline Floats everywhere(float x) { return Floats{} + x; }
#endif

template <class T>
inline T in_turns(const typename T::Part& a, const typename T::Part& b) {
#if defined(__SSE2__) && !defined(__AVX2__)
  __m128i x[2], y[2];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  const __m128i all[] = {_mm_unpacklo_epi32(x[0], y[0]), _mm_unpackhi_epi32(x[0], y[0]),
                         _mm_unpacklo_epi32(x[1], y[1]), _mm_unpackhi_epi32(x[1], y[1])};
  return load_vector<T>(all);
#else
  const Places first = {0, 8, 1, 9, 2, 10, 3, 11}, last = {4, 12, 5, 13, 6, 14, 7, 15};
  return {__builtin_shuffle(a, b, first), __builtin_shuffle(a, b, last)};
#endif
}
template <class T>
inline T lower(const T& a, const T& b) {
  return in_turns<T>(a.part[0], b.part[0]);
}
template <class T>
inline T upper(const T& a, const T& b) {
  return in_turns<T>(a.part[1], b.part[1]);
}
inline Floats evens(const Floats& a, const Floats& b) {
  const Places even = {0, 2, 4, 6, 8, 10, 12, 14};
  return {__builtin_shuffle(a.part[0], a.part[1], even),
          __builtin_shuffle(b.part[0], b.part[1], even)};
}

#endif
