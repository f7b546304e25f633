// Norms and sums of float32 numbers, as torch has them, in an order of their own: the same at every
// instruction set and number of threads and rows.

#pragma once
#include "elementary.h"
#include "planes.h"

// Numbers of each row less their mean (or not, for the norm by root mean square), divided by their
// root mean square, times a weight, plus a bias.
struct Norm {
  int64_t rows, width, centered;
  float epsilon;
};

enum How : int64_t { ALONE, SUM, PRODUCT, DIFFERENCE };

// An activation of each number of x, then its sum with a number of `other`, their product, or what
// is left of it less that number.
struct Each {
  int64_t size[4];
  int64_t x[4], other[4], y[4];  // numbers from one place of a dimension to the next
  int64_t how, activation;       // see elementary.h
  const float* tails;
};

namespace {

// The sum of f(i, n) over a row, where f gives the 16 numbers from i on, zeros after n. Four sums
// at once, joined two by two.
template <class F>
inline float summed(int64_t width, const F& f) {
  Floats part[4] = {};
  for (int64_t i = 0, at = 0; i < width; i += LANES, at = (at + 1) & 3)
    part[at] = part[at] + f(i, least_of(width - i, LANES));
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

// weight, bias: [width], or null.
inline void normalize(const Norm& own, const float* x, const float* weight, const float* bias,
                      float* y) {
  const float width = float(own.width);
  float mean = 0;
  if (own.centered)
    mean = summed(own.width, [&](int64_t i, int64_t n) { return load_some(x + i, n); }) / width;
  const Ints lanes = places_of_lanes();
  const float squares = summed(own.width, [&](int64_t i, int64_t n) {
    Floats distance = load_some(x + i, n) - mean;
    if (n < LANES) distance = choose(lanes < int32_t(n), distance, Floats{});
    return distance * distance;
  });
  const float inverse = 1 / sqrtf(squares / width + own.epsilon);
  for (int64_t i = 0; i < own.width; i += LANES) {
    const int64_t n = least_of(own.width - i, LANES);
    Floats result = (load_some(x + i, n) - mean) * inverse;
    if (weight) result = result * load_some(weight + i, n);
    if (bias) result = result + load_some(bias + i, n);
    store(result, y + i, n);
  }
}

inline void run_norm(const Norm& own, const float* x, const float* weight, const float* bias,
                     float* y, int64_t thread, int64_t threads) {
  const int64_t end = own.rows * (thread + 1) / threads;
  for (int64_t row = own.rows * thread / threads; row < end; row++)
    normalize(own, x + row * own.width, weight, bias, y + row * own.width);
}

inline Floats joined(Floats x, int64_t how, Floats other) {
  switch (how) {
    case SUM:
      return x + other;
    case PRODUCT:
      return x * other;
    case DIFFERENCE:
      return x - other;
    default:
      return x;
  }
}

// 16 numbers of a line, or n, `apart` from each other.
inline Floats gathered(const float* x, int64_t apart, int64_t n) {
  if (apart == 1) return load_some(x, n);
  Floats found = {};
  for (int64_t i = 0; i < n; i++) found[i] = x[i * apart];
  return found;
}

// A thread's part of the lines of the last dimension.
inline void run_each(const Each& own, const float* x, const float* other, float* y, int64_t thread,
                     int64_t threads) {
  const int64_t* size = own.size;
  const int64_t lines = size[0] * size[1] * size[2], end = lines * (thread + 1) / threads;
  for (int64_t line = lines * thread / threads; line < end; line++) {
    const int64_t at[3] = {line / size[2] / size[1], line / size[2] % size[1], line % size[2]};
    int64_t from = 0, more = 0, to = 0;
    for (int d = 0; d < 3; d++)
      from += at[d] * own.x[d], more += at[d] * own.other[d], to += at[d] * own.y[d];
    for (int64_t i = 0; i < size[3]; i += LANES) {
      const int64_t n = least_of(size[3] - i, LANES);
      Floats result = gathered(x + from + i * own.x[3], own.x[3], n);
      result = activated(result, own.activation, own.tails);
      if (own.how != ALONE)
        result =
            joined(result, own.how, gathered(other + more + i * own.other[3], own.other[3], n));
      if (own.y[3] == 1)
        store(result, y + to + i, n);
      else
        for (int64_t j = 0; j < n; j++) y[to + (i + j) * own.y[3]] = result[j];
    }
  }
}

}  // namespace
