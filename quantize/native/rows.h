// Rows of floats in 8 bits, as quantize/nn/int8_kernels.py says: a step and a zero point for each.

#pragma once
#include "numbers.h"

namespace {

constexpr float SMALLEST = 1e-30f;  // step of a row of zeros

struct Row {
  float step;
  int32_t zero;
};

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

// Over all lanes.
inline float least_of(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps((__m512)x);
#else
  float found = x[0];
  for (int i = 1; i < LANES; i++) found = x[i] < found ? x[i] : found;
  return found;
#endif
}
inline float most_of(Floats x) { return -least_of(-x); }
inline int32_t most_of(Ints x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t found = x[0];
  for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
  return found;
#endif
}

template <class T>
inline Floats load_part(const T* x, int64_t n) {  // zeros after the first n
  T some[LANES] = {};
  memcpy(some, x, n * sizeof(T));
  return load(some);
}

inline void store_bytes(Ints q, uint8_t* to, int64_t n) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const Bytes bytes = __builtin_convertvector(q, Bytes);
  memcpy(to, &bytes, n);
}

// q: bytes up to `padded`. A row with a NaN or an infinity gets a step of NaN.
template <class T>
Row quantize_row(const T* x, int64_t n, int64_t padded, uint8_t* q) {
  Floats low = {}, high = {};
  Ints largest = {};
  const int64_t whole = n / LANES * LANES;
  auto look = [&](Floats v) {
    low = least(v, low);
    high = most(v, high);
    const Ints size = (Ints)v & 0x7fffffff;
    largest = size > largest ? size : largest;
  };
  for (int64_t i = 0; i < whole; i += LANES) look(load(x + i));
  if (whole < n) look(load_part(x + whole, n - whole));
  const float bottom = least_of(low), top = most_of(high);
  const int32_t size = most_of(largest);
  memset(q + whole, 0, padded - whole);
  if (size >= 0x7f800000) {
    memset(q, 0, whole);
    return {bits<float>(0x7fc00000), 0};
  }
  float step = top * (1.0f / 255) - bottom * (1.0f / 255);
  step = step < SMALLEST ? SMALLEST : step;
  const float inverse = 1.0f / step,
              shift = 0x1.8p23f;  // adding it rounds to the nearest integer, half to even
  const int32_t unshift = bits<int32_t>(shift);
  const int32_t zero = bits<int32_t>(-bottom * inverse + shift) - unshift;
  auto put = [&](Floats v, int64_t i, int64_t many) {
    Ints whole_steps = (Ints)(v * inverse + shift) - unshift + zero;
    whole_steps = whole_steps < 0 ? 0 : whole_steps;
    whole_steps = whole_steps > 255 ? 255 : whole_steps;
    store_bytes(whole_steps, q + i, many);
  };
  for (int64_t i = 0; i < whole; i += LANES) put(load(x + i), i, LANES);
  if (whole < n) put(load_part(x + whole, n - whole), whole, n - whole);
  return {step, zero};
}

}  // namespace
