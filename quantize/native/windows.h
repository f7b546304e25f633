// Steps in float32: each channel by itself under a moving window, as a weighted sum or as the
// largest number; and images from one order to the other.

#pragma once
#include "gemm.h"
#include "planes.h"
#include "steps.h"

namespace {

// A window that moves over images of float32. Sums add the products of a window's places in their
// order, one rounded operation at a time, so both orders of channels give the same bits.
struct Windows {
  const Layer& layer;
  const Step& step;
  const float* x;
  float* y;
  int64_t thread, threads;
  int64_t plane, pixels, full[3];

  Windows(const Step& step, const Run& run, int64_t thread)
      : layer(*step.layer),
        step(step),
        x(run.numbers(step.x)),
        y(run.numbers(step.y)),
        thread(thread),
        threads(run.threads) {
    plane = step.size[0] * step.size[1] * step.size[2];
    pixels = step.out[0] * step.out[1] * step.out[2];
    for (int d = 0; d < 3; d++) full[d] = layer.before[d] + step.size[d] + layer.after[d];
  }

  // Numbers behind a padded channel, so that whole vectors can be read at its end.
  static int64_t room(const Layer& layer) { return (2 + layer.stride[2]) * LANES; }

  // Bytes that a thread needs.
  static int64_t bytes(const Step& step) {
    const Layer& layer = *step.layer;
    int64_t volume = 1, places = 1;
    for (int d = 0; d < 3; d++) {
      volume *= layer.before[d] + step.size[d] + layer.after[d];
      places *= layer.kernel[d];
    }
    return up((volume + room(layer)) * sizeof(float) + places * sizeof(int64_t), 64);
  }

  // ----------------------------------------------------------------------------- channels last

  // Where the lines of a window start that belong to an output line: pixels, -1 in the padding.
  void lines_of(int64_t depth, int64_t height, int64_t* found) const {
    for (int64_t d = 0; d < layer.kernel[0]; d++)
      for (int64_t h = 0; h < layer.kernel[1]; h++) {
        const int64_t z = depth * layer.stride[0] - layer.before[0] + d * layer.dilation[0];
        const int64_t v = height * layer.stride[1] - layer.before[1] + h * layer.dilation[1];
        const bool inside = z >= 0 && z < step.size[0] && v >= 0 && v < step.size[1];
        *found++ = inside ? (z * step.size[1] + v) * step.size[2] : -1;
      }
  }

  template <bool LARGEST_OF>
  Floats window(const float* image, const int64_t* lines, int64_t first, int64_t c,
                int64_t many) const {
    const int64_t width = up(layer.channels, LANES), rows = layer.kernel[0] * layer.kernel[1];
    const float* weight = layer.weights + c;
    Floats result = LARGEST_OF ? Floats{} - INFINITY : Floats{};
    for (int64_t line = 0; line < rows; line++)
      for (int64_t w = 0; w < layer.kernel[2]; w++, weight += width) {
        const int64_t u = first + w * layer.dilation[2];
        if (lines[line] < 0 || u < 0 || u >= step.size[2]) continue;
        const Floats v = load_some(image + (lines[line] + u) * layer.channels + c, many);
        if (LARGEST_OF)
          result = (v > result) | (v != v) ? v : result;
        else
          result = result + v * load(weight);
      }
    return result;
  }

  template <bool LARGEST_OF>
  void line_last(const float* image, const int64_t* lines, float* to) const {
    for (int64_t at = 0; at < step.out[2]; at++, to += layer.channels) {
      const int64_t first = at * layer.stride[2] - layer.before[2];
      for (int64_t c = 0; c < layer.channels; c += LANES) {
        const int64_t many = least_of(layer.channels - c, LANES);
        Floats result = window<LARGEST_OF>(image, lines, first, c, many);
        if (!LARGEST_OF && layer.bias) result = result + load(layer.bias + c);
        store(step.limits.cut(result), to + c, many);
      }
    }
  }

  template <bool LARGEST_OF>
  void run_last(int64_t* lines) const {
    const int64_t each = step.out[0] * step.out[1], all = step.samples * each;
    const int64_t end = all * (thread + 1) / threads;
    for (int64_t at = all * thread / threads; at < end; at++) {
      lines_of(at % each / step.out[1], at % step.out[1], lines);
      const float* image = x + at / each * plane * layer.channels;
      line_last<LARGEST_OF>(image, lines, y + at * step.out[2] * layer.channels);
    }
  }

  // ----------------------------------------------------------------------------- planes

  // A channel with its padding.
  void pad(const float* from, float* to) const {
    const int64_t volume = full[0] * full[1] * full[2];
    memset(to, 0, (volume + room(layer)) * sizeof(float));
    for (int64_t z = 0; z < step.size[0]; z++)
      for (int64_t v = 0; v < step.size[1]; v++) {
        const int64_t line = (z + layer.before[0]) * full[1] + v + layer.before[1];
        memcpy(to + line * full[2] + layer.before[2], from, step.size[2] * sizeof(float));
        from += step.size[2];
      }
  }

  // 16 numbers that are `apart` from each other.
  static Floats load_apart(const float* from, int64_t apart) {
    if (apart == 1) return load(from);
    if (apart == 2) {
      const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
      return __builtin_shuffle(load(from), load(from + LANES), even);
    }
    Floats found;
    for (int i = 0; i < LANES; i++) found[i] = from[i * apart];
    return found;
  }

  Floats sum(const float* from, int64_t channel) const {
    const int64_t width = up(layer.channels, LANES);
    const float* weight = layer.weights + channel;
    Floats total = {};
    for (int64_t d = 0; d < layer.kernel[0]; d++)
      for (int64_t h = 0; h < layer.kernel[1]; h++) {
        const int64_t line = d * layer.dilation[0] * full[1] + h * layer.dilation[1];
        for (int64_t w = 0; w < layer.kernel[2]; w++, weight += width) {
          const float* v = from + line * full[2] + w * layer.dilation[2];
          total = total + load_apart(v, layer.stride[2]) * *weight;
        }
      }
    return total;
  }

  void run_planes(float* padded) const {
    const int64_t all = step.samples * layer.channels, end = all * (thread + 1) / threads;
    for (int64_t at = all * thread / threads; at < end; at++) {
      const int64_t channel = at % layer.channels;
      pad(x + at * plane, padded);
      float* to = y + at * pixels;
      for (int64_t d = 0; d < step.out[0]; d++)
        for (int64_t h = 0; h < step.out[1]; h++, to += step.out[2]) {
          const int64_t line = d * layer.stride[0] * full[1] + h * layer.stride[1];
          channel_line(padded + line * full[2], channel, to);
        }
    }
  }

  void channel_line(const float* from, int64_t channel, float* to) const {
    for (int64_t w = 0; w < step.out[2]; w += LANES) {
      Floats result = sum(from + w * layer.stride[2], channel);
      if (layer.bias) result = result + layer.bias[channel];
      store(step.limits.cut(result), to + w, least_of(step.out[2] - w, LANES));
    }
  }
};

// A step that is no product. memory: of this thread, `Windows::bytes`.
inline void run_window(const Step& step, const Run& run, int64_t thread, uint8_t* memory) {
  const Windows windows(step, run, thread);
  const int64_t channels = step.layer->channels, many = channels * windows.plane;
  for (int64_t s = 0; s < step.samples; s++) {
    if (step.kind == TO_LAST)
      turn_all(windows.x + s * many, channels, windows.plane, windows.y + s * many, thread,
               run.threads);
    if (step.kind == TO_PLANES)
      turn_all(windows.x + s * many, windows.plane, channels, windows.y + s * many, thread,
               run.threads);
  }
  if (step.kind == LARGEST) windows.run_last<true>((int64_t*)memory);
  if (step.kind == DEPTHWISE)
    step.x_last ? windows.run_last<false>((int64_t*)memory) : windows.run_planes((float*)memory);
}

}  // namespace
