// What conv.cpp is told: layers, and the steps of a program that runs them one after the other.

#pragma once
#include "elementary.h"
#include "rows.h"

enum Kind : int64_t {
  CONVOLUTION,
  DEPTHWISE,  // a convolution of each channel by itself, in float32
  LARGEST,    // the largest number of each window
  TO_LAST,    // channels as planes to channels last
  TO_PLANES,  // and back
  MEAN,       // of each channel of an image, channels last: of lines, and of their sums
};

struct Layer {
  // of depth, height and width; a dimension that the input doesn't have is 1
  int64_t kernel[3], stride[3], dilation[3], before[3], after[3];  // before, after: the padding
  int64_t channels, outputs, groups;
  int64_t taps;               // channels that a row holds of each place: of a group, perhaps more
  const int8_t* packed;       // [groups] weights of [panels of a group], rows [taps] of every place
  const int32_t* sums;        // of the weights of an output [groups][16 panels]
  const float *scale, *bias;  // [groups][16 panels]; bias may be null
  const float* weights;       // of a depthwise layer [places][channels filled up to 16]
};

// Numbers below `low` become low, those above `high` become high.
struct Limits {
  float low, high;
  Floats cut(Floats y) const { return least(Floats{} + high, most(Floats{} + low, y)); }
};

// Where a tensor lies: bytes from the start of the arena, or one of these.
constexpr int64_t INPUT = -1, OUTPUT = -2, NOWHERE = -3;

struct Step {
  const Layer* layer;
  int64_t kind, samples, size[3], out[3];
  int64_t together;  // steps from this one on that run line by line; see Chain
  int64_t x, y;
  int64_t other;             // channels last: is added to what `ended` gives, then `last_limits`
  int64_t gate;              // [samples][channels]: times pixels of x, channels last
  int64_t x_last, y_last;    // are channels their last dimension?
  int64_t x_range, y_range;  // [threads][samples] Range of x, of y; may be NOWHERE
  int64_t activation;        // of the results, before they are cut off; see elementary.h
  const float* tails;        // of GELU
  Limits limits, last_limits;

  [[gnu::always_inline]] Floats ended(Floats y) const {
    return limits.cut(activated(y, activation, tails));
  }
};

// One turn of a program.
struct Run {
  const float* input;
  float* output;
  uint8_t* arena;
  int64_t threads;

  float* numbers(int64_t at) const {
    if (at == INPUT) return const_cast<float*>(input);
    if (at == OUTPUT) return output;
    return at == NOWHERE ? nullptr : (float*)(arena + at);
  }
  Range* ranges(int64_t at) const { return at == NOWHERE ? nullptr : (Range*)(arena + at); }
};

// A call: turns of a program, for some samples after the other. apart: numbers from the input, or
// the output, of a turn to the next one's.
struct Turns {
  int64_t turns, threads, x_apart, y_apart;
  const float* input;
  float* output;
  uint8_t* arena;
};
