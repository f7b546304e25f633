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

  // V vectors of channels at once: each waits for its last sum. many: numbers of the last vector.
  template <bool LARGEST_OF, int V>
  void window(const float* image, const int64_t* lines, int64_t first, int64_t c, int64_t many,
              float* to) const {
    const int64_t width = up(layer.channels, LANES), rows = layer.kernel[0] * layer.kernel[1];
    const float* weight = layer.weights + c;
    Floats result[V];
    for (int v = 0; v < V; v++) result[v] = LARGEST_OF ? Floats{} - INFINITY : Floats{};
    for (int64_t line = 0; line < rows; line++)
      for (int64_t w = 0; w < layer.kernel[2]; w++, weight += width) {
        const int64_t u = first + w * layer.dilation[2];
        if (lines[line] < 0 || u < 0 || u >= step.size[2]) continue;
        const float* from = image + (lines[line] + u) * layer.channels + c;
        for (int v = 0; v < V; v++) {
          const Floats x = load_some(from + v * LANES, v + 1 < V ? LANES : many);
          if (LARGEST_OF)
            result[v] = choose((x > result[v]) | (x != x), x, result[v]);
          else
            result[v] = result[v] + x * load(weight + v * LANES);
        }
      }
    for (int v = 0; v < V; v++) {
      Floats y = result[v];
      if (!LARGEST_OF && layer.bias) y = y + load(layer.bias + c + v * LANES);
      store(step.ended(y), to + c + v * LANES, v + 1 < V ? LANES : many);
    }
  }

  // Output pixels of a line from `at` to `end`. A vector of channels at a time, whose weights and
  // windows the nearest cache holds.
  template <bool LARGEST_OF>
  void pixels_of(const float* image, const int64_t* lines, int64_t at, int64_t end,
                 float* to) const {
    int64_t c = 0;
    for (; c + 4 * LANES <= layer.channels; c += 4 * LANES)
      vectors_of<LARGEST_OF, 4>(image, lines, at, end, c, LANES, to);
    for (; c + 2 * LANES <= layer.channels; c += 2 * LANES)
      vectors_of<LARGEST_OF, 2>(image, lines, at, end, c, LANES, to);
    for (; c < layer.channels; c += LANES)
      vectors_of<LARGEST_OF, 1>(image, lines, at, end, c, least_of(layer.channels - c, LANES), to);
  }
  template <bool LARGEST_OF, int V>
  void vectors_of(const float* image, const int64_t* lines, int64_t at, int64_t end, int64_t c,
                  int64_t many, float* to) const {
    for (; at < end; at++)
      window<LARGEST_OF, V>(image, lines, at * layer.stride[2] - layer.before[2], c, many,
                            to + at * layer.channels);
  }

  template <bool LARGEST_OF>
  void line_last(const float* image, const int64_t* lines, float* to) const {
    const int64_t k = layer.kernel[2];
    const bool square = layer.kernel[0] == 1 && layer.kernel[1] == k && layer.dilation[2] == 1;
    if (LARGEST_OF || !square || (k != 3 && k != 5))
      return pixels_of<LARGEST_OF>(image, lines, 0, step.out[2], to);
    // those whose windows lie inside of the lines
    const int64_t stride = layer.stride[2], room = step.size[2] + layer.before[2] - k;
    const int64_t end = room < 0 ? 0 : least_of(room / stride + 1, step.out[2]);
    const int64_t low = least_of((layer.before[2] + stride - 1) / stride, end);
    pixels_of<false>(image, lines, 0, low, to);
    for (int64_t c = 0; c < layer.channels; c += LANES) {
      const bool whole = c + LANES <= layer.channels;
      if (k == 3)
        whole ? inside<3, true>(image, lines, c, low, end, to)
              : inside<3, false>(image, lines, c, low, end, to);
      else
        whole ? inside<5, true>(image, lines, c, low, end, to)
              : inside<5, false>(image, lines, c, low, end, to);
    }
    pixels_of<false>(image, lines, end, step.out[2], to);
  }

  // Sums of a vector of channels (or fewer than 16) whose windows of K x K leave no line at its
  // ends.
  template <int K, bool WHOLE>
  void inside(const float* image, const int64_t* lines, int64_t c, int64_t at, int64_t end,
              float* to) const {
    const int64_t many = WHOLE ? LANES : layer.channels - c, width = up(layer.channels, LANES);
    const int64_t apart = layer.stride[2] * layer.channels;
    const int64_t first = (at * layer.stride[2] - layer.before[2]) * layer.channels + c;
    const float* from[K];
    Floats weight[K][K];
    int rows = 0;
    for (int h = 0; h < K; h++) {
      if (lines[h] < 0) continue;
      from[rows] = image + lines[h] * layer.channels + first;
      for (int w = 0; w < K; w++) weight[rows][w] = load(layer.weights + (h * K + w) * width + c);
      rows++;
    }
    const Floats bias = layer.bias ? load(layer.bias + c) : Floats{};
    for (to += at * layer.channels + c; at < end; at++, to += layer.channels) {
      Floats y = {};
      if (rows == K)
        for (int h = 0; h < K; h++) y = add_row<K>(y, from[h], weight[h], many);
      else
        for (int h = 0; h < rows; h++) y = add_row<K>(y, from[h], weight[h], many);
      for (int h = 0; h < rows; h++) from[h] += apart;
      if (layer.bias) y = y + bias;
      store(step.ended(y), to, many);
    }
  }

  template <int K>
  Floats add_row(Floats y, const float* from, const Floats* weight, int64_t many) const {
    for (int w = 0; w < K; w++) y = y + load_some(from + w * layer.channels, many) * weight[w];
    return y;
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

  // ----------------------------------------------------------------------------- means

  // V vectors of channels of an image: sums of lines, one after the other, then theirs.
  template <int V>
  void mean(const float* image, int64_t c, int64_t many, float* to) const {
    Floats total[V] = {};
    for (int64_t line = 0; line < step.size[0] * step.size[1]; line++) {
      Floats own[V] = {};
      for (int64_t u = 0; u < step.size[2]; u++, image += layer.channels)
        for (int v = 0; v < V; v++)
          own[v] = own[v] + load_some(image + c + v * LANES, v + 1 < V ? LANES : many);
      for (int v = 0; v < V; v++) total[v] = total[v] + own[v];
    }
    const float share = float(1.0 / double(plane));
    for (int v = 0; v < V; v++)
      store(total[v] * share, to + c + v * LANES, v + 1 < V ? LANES : many);
  }

  void run_mean() const {
    const int64_t wide = layer.channels / threads >= 4 * LANES ? 4 * LANES : LANES;
    const int64_t blocks = (layer.channels + wide - 1) / wide, all = step.samples * blocks;
    const int64_t end = all * (thread + 1) / threads;
    for (int64_t at = all * thread / threads; at < end; at++) {
      const float* image = x + at / blocks * plane * layer.channels;
      float* to = y + at / blocks * layer.channels;
      int64_t c = at % blocks * wide;
      const int64_t last = least_of(c + wide, layer.channels);
      if (last - c == 4 * LANES) {
        mean<4>(image, c, LANES, to);
        continue;
      }
      for (; c < last; c += LANES) mean<1>(image, c, least_of(last - c, LANES), to);
    }
  }

  // ----------------------------------------------------------------------------- planes

  // A channel into the middle of its padding, which holds zeros.
  void pad(const float* from, float* to) const {
    for (int64_t z = 0; z < step.size[0]; z++)
      for (int64_t v = 0; v < step.size[1]; v++, from += step.size[2]) {
        const int64_t line = (z + layer.before[0]) * full[1] + v + layer.before[1];
        float* own = to + line * full[2] + layer.before[2];
        for (int64_t u = 0; u < step.size[2]; u += LANES) {
          const int64_t many = least_of(step.size[2] - u, LANES);
          store(load_some(from + u, many), own + u, many);
        }
      }
  }

  // 16 numbers that are `apart` from each other: A of them, where that is known.
  template <int A>
  static Floats load_apart(const float* from, int64_t apart) {
    if (A == 1) return load(from);
    if (A == 2) return evens(load(from), load(from + LANES));
    Floats found;
    for (int i = 0; i < LANES; i++) found[i] = from[i * apart];
    return found;
  }

  // Sums of V output lines at once, 16 numbers of each. apart: between the lines in the input.
  template <int V, int A>
  void sums(const float* from, int64_t apart, const float* weight, Floats* total) const {
    for (int v = 0; v < V; v++) total[v] = Floats{};
    for (int64_t d = 0; d < layer.kernel[0]; d++)
      for (int64_t h = 0; h < layer.kernel[1]; h++) {
        const int64_t line = d * layer.dilation[0] * full[1] + h * layer.dilation[1];
        for (int64_t w = 0; w < layer.kernel[2]; w++, weight++) {
          const float* x = from + line * full[2] + w * layer.dilation[2];
          for (int v = 0; v < V; v++)
            total[v] = total[v] + load_apart<A>(x + v * apart, layer.stride[2]) * *weight;
        }
      }
  }

  // V output lines of a channel. own: its weights.
  template <int V, int A>
  void channel_lines(const float* from, int64_t channel, const float* own, float* to) const {
    const int64_t apart = layer.stride[1] * full[2];
    for (int64_t w = 0; w < step.out[2]; w += LANES) {
      Floats total[V];
      sums<V, A>(from + w * layer.stride[2], apart, own, total);
      for (int v = 0; v < V; v++) {
        const Floats y = layer.bias ? total[v] + layer.bias[channel] : total[v];
        store(step.ended(y), to + v * step.out[2] + w, least_of(step.out[2] - w, LANES));
      }
    }
  }

  void run_planes(float* padded) const {
    const int64_t all = step.samples * layer.channels, end = all * (thread + 1) / threads;
    const int64_t volume = full[0] * full[1] * full[2] + room(layer);
    const int64_t width = up(layer.channels, LANES);
    const int64_t places = layer.kernel[0] * layer.kernel[1] * layer.kernel[2];
    float* own = padded + volume;
    memset(padded, 0, volume * sizeof(float));
    for (int64_t at = all * thread / threads; at < end; at++) {
      const int64_t channel = at % layer.channels;
      for (int64_t p = 0; p < places; p++) own[p] = layer.weights[p * width + channel];
      pad(x + at * plane, padded);
      for (int64_t d = 0; d < step.out[0]; d++) {
        const float* from = padded + d * layer.stride[0] * full[1] * full[2];
        float* to = y + at * pixels + d * step.out[1] * step.out[2];
        if (layer.stride[2] == 1)
          plane_of<1>(from, channel, own, to);
        else if (layer.stride[2] == 2)
          plane_of<2>(from, channel, own, to);
        else
          plane_of<0>(from, channel, own, to);
      }
    }
  }

  template <int A>
  void plane_of(const float* from, int64_t channel, const float* own, float* to) const {
    const int64_t apart = layer.stride[1] * full[2];
    int64_t h = 0;
    for (; h + 4 <= step.out[1]; h += 4, to += 4 * step.out[2])
      channel_lines<4, A>(from + h * apart, channel, own, to);
    for (; h + 2 <= step.out[1]; h += 2, to += 2 * step.out[2])
      channel_lines<2, A>(from + h * apart, channel, own, to);
    if (h < step.out[1]) channel_lines<1, A>(from + h * apart, channel, own, to);
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
  if (step.kind == MEAN) windows.run_mean();
  if (step.kind == LARGEST) windows.run_last<true>((int64_t*)memory);
  if (step.kind == DEPTHWISE)
    step.x_last ? windows.run_last<false>((int64_t*)memory) : windows.run_planes((float*)memory);
}

}  // namespace
