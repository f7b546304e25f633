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

// The least and the largest number of a row, and the largest size as bits; 0 is always among them.
struct Range {
  Floats low = {}, high = {};
  Ints largest = {};

  void look(Floats v) {
    low = least(v, low);
    high = most(v, high);
    const Ints size = (Ints)v & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  template <class T>
  void look(const T* x, int64_t n) {
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) look(load(x + i));
    if (whole < n) look(load_part(x + whole, n - whole));
  }
  void join(const Range& other) {
    low = least(other.low, low);
    high = most(other.high, high);
    largest = other.largest > largest ? other.largest : largest;
  }
};

// How the numbers of a range become bytes. Not finite: a NaN or an infinity is among them, the step
// is NaN, and all bytes are 0.
struct Steps {
  Row row;
  float inverse;
  bool finite;

  explicit Steps(const Range& range) {
    const float bottom = least_of(range.low), top = most_of(range.high);
    finite = most_of(range.largest) < 0x7f800000;
    row = {bits<float>(0x7fc00000), 0};
    if (!finite) return;
    const float step = top * (1.0f / 255) - bottom * (1.0f / 255);
    row.step = step < SMALLEST ? SMALLEST : step;
    inverse = 1.0f / row.step;
    row.zero = bits<int32_t>(-bottom * inverse + SHIFT) - bits<int32_t>(SHIFT);
  }

  // 16 bytes, each in a lane.
  Ints bytes_of(Floats v) const {
    Ints whole_steps = (Ints)(v * inverse + SHIFT) - bits<int32_t>(SHIFT) + row.zero;
    whole_steps = whole_steps < 0 ? 0 : whole_steps;
    return whole_steps > 255 ? 255 : whole_steps;
  }
  template <class T>
  void put(const T* x, int64_t n, uint8_t* q) const {
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store_bytes(bytes_of(load(x + i)), q + i, LANES);
    const int64_t left = n - whole;
    if (left) store_bytes(bytes_of(load_part(x + whole, left)), q + whole, left);
  }

  // Adding it rounds to the nearest integer, half to even.
  static constexpr float SHIFT = 0x1.8p23f;
};

// The same of 16 ranges at once, one in each lane. All is computed as in Steps, so the bits are the
// same; the bytes of a range that is not finite are any.
struct SideBySide {
  Floats step, inverse;
  Ints zero;

  explicit SideBySide(const Range& ranges) {
    step = ranges.high * (1.0f / 255) - ranges.low * (1.0f / 255);
    step = step < SMALLEST ? Floats{} + SMALLEST : step;
    inverse = 1.0f / step;
    zero = (Ints)(-ranges.low * inverse + Steps::SHIFT) - bits<int32_t>(Steps::SHIFT);
    const Ints finite = ranges.largest < 0x7f800000;
    step = finite ? step : Floats{} + bits<float>(0x7fc00000);
    zero = finite ? zero : Ints{};
  }
  Row row(int lane) const { return {step[lane], zero[lane]}; }

  Ints bytes_of(Floats v) const {
    Ints whole_steps = (Ints)(v * inverse + Steps::SHIFT) - bits<int32_t>(Steps::SHIFT) + zero;
    whole_steps = whole_steps < 0 ? 0 : whole_steps;
    return whole_steps > 255 ? 255 : whole_steps;
  }
};

// q: bytes up to `padded`. A row with a NaN or an infinity gets a step of NaN.
template <class T>
Row quantize_row(const T* x, int64_t n, int64_t padded, uint8_t* q) {
  Range range;
  range.look(x, n);
  const Steps steps(range);
  const int64_t from = steps.finite ? n / LANES * LANES : 0;
  memset(q + from, 0, padded - from);
  if (steps.finite) steps.put(x, n, q);
  return steps.row;
}

}  // namespace
