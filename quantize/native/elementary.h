// Activations, sixteen numbers at a time: one IEEE operation
// after the other, so that quantize/nn/elementary.py gives the same bits in PyTorch.

#pragma once
#include "numbers.h"

namespace {

// The entries of a table of N, 16 or 32, by the lowest bits of an index.
template <int N>
inline Floats entries(const float* table, Ints index) {
#if defined(__AVX512F__)
  const __m512 low = (__m512)load(table);
  if (N == 16) return (Floats)_mm512_permutexvar_ps((__m512i)index, low);
  return (Floats)_mm512_permutex2var_ps(low, (__m512i)index, (__m512)load(table + N - LANES));
#elif defined(__AVX2__)
  Floats found;
  for (int half = 0; half < 2; half++) {
    const __m256i at = (__m256i)index.part[half];
    const auto eight = [&](int from) {
      return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + from), at);
    };
    const __m256 upper = (__m256)_mm256_slli_epi32(at, 28);  // its sign: bit 3
    __m256 own = _mm256_blendv_ps(eight(0), eight(8), upper);
    if (N == 32) {
      const __m256 others = _mm256_blendv_ps(eight(N - 16), eight(N - 8), upper);
      own = _mm256_blendv_ps(own, others, (__m256)_mm256_slli_epi32(at, 27));
    }
    found.part[half] = own;
  }
  return found;
#else
  Floats found;
  for (int i = 0; i < LANES; i++) found[i] = table[index[i] & (N - 1)];
  return found;
#endif
}

// exp as far as 80, where no result is denormal: 2^(n / 16) from a table, times a polynomial of
// what is left. NaN stays NaN.
inline Floats limited_exponential(Floats x) {
  alignas(64) static constexpr float powers[LANES] = {
      1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
      1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
      1.68179283f, 1.75625217f, 1.83400810f, 1.91520655f};
  x = most(Floats{} - 80, least(Floats{} + 80, x));
  const float shift = 0x1.8p23f;  // adding it rounds to the nearest integer, half to even
  const Floats shifted = x * 23.0831203f + shift;
  const Floats r = x - (shifted - shift) * 0.0433216989f;
  const Floats p = (r * 0.166666672f + 0.5f) * r * r + r;
  const Floats power = entries<16>(powers, (Ints)shifted);
  const Ints scale = (((Ints)shifted & ~15) << 19) + (127 << 23);
  return (power + power * p) * (Floats)scale;
}
inline Floats sigmoid(Floats x) { return 1 / (limited_exponential(-x) + 1); }
inline Floats hyperbolic(Floats x) { return 1 / (limited_exponential(x * -2) + 1) * 2 - 1; }

// relu(x) - |x| tail(|x|); tails: [4][32] as in tails.py.
[[gnu::always_inline]] inline Floats with_tail(Floats x, const float* tails) {
  const float shift = 0x1.8p23f;  // adding it rounds to the nearest integer, half to even
  const Floats size = (Floats)((Ints)x & 0x7fffffff), within = least(size, Floats{} + 5.4f);
  const Floats place = within * 5.7407408f, shifted = place + shift;
  const Floats distance = place - (shifted - shift);
  const Ints point = (Ints)shifted;
  Floats tail = entries<32>(tails + 96, point);
  for (int power = 2; power >= 0; power--)
    tail = tail * distance + entries<32>(tails + 32 * power, point);
  return most(Floats{}, x) - within * tail;
}

enum Activation : int64_t { NONE, RELU, GELU, SILU, SIGMOID };

[[gnu::always_inline]] inline Floats activated(Floats x, int64_t activation, const float* tails) {
  switch (activation) {
    case RELU:
      return most(Floats{}, x);
    case GELU:
      return with_tail(x, tails);
    case SILU:
      return x * sigmoid(x);
    case SIGMOID:
      return sigmoid(x);
    default:
      return x;
  }
}

}  // namespace
