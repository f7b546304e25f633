// erf, and the activations made of it and of exp, sixteen numbers at a time: one IEEE operation
// after the other, so that quantize/nn/elementary.py gives the same bits in PyTorch.

#pragma once
#include "numbers.h"

namespace {

// NaN stays NaN.
inline Floats clamped(Floats x, float limit) {
  const Floats most = Floats{} + limit;
  x = x > most ? most : x;
  return x < -most ? -most : x;
}

// exp as far as 80: no result is denormal.
inline Floats limited_exponential(Floats x) { return exponential(clamped(x, 80)); }
inline Floats sigmoid(Floats x) { return 1 / (limited_exponential(-x) + 1); }
inline Floats hyperbolic(Floats x) { return 1 / (limited_exponential(x * -2) + 1) * 2 - 1; }

// erf to 5e-7, by polynomials in x^2, never above 1.
inline Floats error_function(Floats x) {
  x = clamped(x, 3.8325069f);
  const Floats s = x * x;
  Floats p = s * 2.2905066e-4f + 3.4082910e-3f;
  p = p * s + 5.0955696e-2f;
  p = p * s + 1.8520832e-1f;
  p = p * s + 1.1283791f;
  Floats q = s * -1.1791603e-7f + 2.3547966e-5f;
  q = q * s + 1.0179626e-3f;
  q = q * s + 1.4070470e-2f;
  q = q * s + 1.1098505e-1f;
  q = q * s + 4.9746925e-1f;
  q = q * s + 1;
  return clamped(x * p / q, 1);
}

enum Activation : int64_t { NONE, RELU, GELU, GELU_TANH, SILU };

inline Floats activated(Floats x, int64_t activation) {
  switch (activation) {
    case RELU:
      return x < 0 ? Floats{} : x;
    case GELU:
      return x * 0.5f * (error_function(x * 0.70710678f) + 1);
    case GELU_TANH:
      return x * sigmoid((x * x * 0.071354816f + 1.5957691f) * x);
    case SILU:
      return x * sigmoid(x);
    default:
      return x;
  }
}

}  // namespace
