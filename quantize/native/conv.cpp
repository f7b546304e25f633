// Int8 convolutions, one or a whole program of them, in one call. Each sample of an input is in 8
// bits, or each pixel where the kernel is one pixel: a step and a zero point, found when it
// arrives.
//
// Threads share out the numbers to find the ranges of samples (unless the step before has noted
// them while it stored its results), then lines of the images to quantize them (with their padding,
// channels side by side), then rows: a row holds the bytes that one output pixel looks at. Rows are
// multiplied as in a linear layer. Where a layer's weights are few beside its rows, each thread
// gathers and multiplies rows of its own; else threads share the rows and divide the weights. Sums
// are exact integers, and what follows is one IEEE operation at a time (compiled without
// contraction), so neither the instruction set nor the number of threads or samples changes a bit.
// quantize/nn/int8_images.py says the same in PyTorch.

#include "gemm.h"
#include "planes.h"
#include "steps.h"
#include "windows.h"

namespace {

constexpr int64_t HEIGHT = 32;           // rows of a block
constexpr int64_t NEAR_BYTES = 1 << 20;  // of weights that stay in the cache for every block

thread_local Scratch scratch;

// memcpy of few bytes, without a call.
inline void copy(uint8_t* to, const uint8_t* from, int64_t n) {
  for (; n >= 64; n -= 64, to += 64, from += 64) memcpy(to, from, 64);
  for (; n >= 16; n -= 16, to += 16, from += 16) memcpy(to, from, 16);
  for (; n >= 4; n -= 4, to += 4, from += 4) memcpy(to, from, 4);
  for (; n > 0; n--) *to++ = *from++;
}

inline void clear(uint8_t* to, int64_t n) {
  for (; n >= 16; n -= 16, to += 16) memset(to, 0, 16);
  for (; n > 0; n--) *to++ = 0;
}

struct Job {
  const Step& step;
  const Layer& layer;
  const float *x, *other, *gate;
  float* y;
  int64_t threads;
  int64_t full[3];  // sizes with the padding
  int64_t pitch;    // bytes of a pixel
  int64_t plane, pixels, inputs, padded, stride, panels, rows, chunk;
  bool pointwise;  // a row is a pixel of the input
  bool own_rows;   // does each thread have rows of its own?
  uint8_t *image = nullptr, *gathered = nullptr;
  Range *ranges = nullptr, *y_ranges;  // [threads][samples]
  Row* found = nullptr;                // steps of each sample, or of each row of a chunk

  Job(const Step& step, const Run& run)
      : step(step),
        layer(*step.layer),
        x(run.numbers(step.x)),
        other(run.numbers(step.other)),
        gate(run.numbers(step.gate)),
        y(run.numbers(step.y)),
        threads(run.threads),
        y_ranges(run.ranges(step.y_range)) {
    plane = step.size[0] * step.size[1] * step.size[2];
    pixels = step.out[0] * step.out[1] * step.out[2];
    pointwise = layer.groups == 1;
    for (int d = 0; d < 3; d++) {
      full[d] = layer.before[d] + step.size[d] + layer.after[d];
      pointwise =
          pointwise && layer.kernel[d] == 1 && layer.stride[d] == 1 && full[d] == step.size[d];
    }
    inputs = layer.kernel[0] * layer.kernel[1] * layer.kernel[2] * layer.taps;
    padded = up(inputs, 64), stride = row_stride(inputs);
    pitch = up(layer.channels, 4);
    panels = up(layer.outputs / layer.groups, LANES) / LANES;
    rows = step.samples * pixels;
    const int64_t weights = panels * LANES * padded;
    own_rows = rows >= HEIGHT * threads && weights <= NEAR_BYTES && weights <= rows * stride;
    chunk = own_rows ? HEIGHT : up(rows_at_once(stride, rows), HEIGHT);
  }

  int64_t volume() const { return full[0] * full[1] * full[2]; }
  int64_t image_bytes() const { return pointwise ? 0 : up(step.samples * volume() * pitch, 64); }
  int64_t row_bytes() const { return chunk * stride * (own_rows ? threads : 1); }
  int64_t range_bytes() const { return threads * step.samples * sizeof(Range); }
  int64_t found_bytes() const {
    const int64_t count = pointwise ? chunk * (own_rows ? threads : 1) : step.samples;
    return up(count * sizeof(Row), 64);
  }
  int64_t bytes() const { return image_bytes() + row_bytes() + range_bytes() + found_bytes(); }

  void open(uint8_t* memory, const Run& run) {
    image = memory;
    gathered = image + image_bytes();
    ranges = (Range*)(gathered + row_bytes());
    found = (Row*)((uint8_t*)ranges + range_bytes());
    if (step.x_range != NOWHERE) ranges = run.ranges(step.x_range);
  }

  // --------------------------------------------------------------------------------- quantizing

  void look(int64_t thread) const {
    const int64_t many = layer.channels * plane;
    for (int64_t sample = 0; sample < step.samples; sample++) {
      const int64_t first = many * thread / threads, end = many * (thread + 1) / threads;
      Range range;
      range.look(x + sample * many + first, end - first);
      ranges[thread * step.samples + sample] = range;
    }
  }

  Steps steps_of(int64_t sample) const {
    Range range = ranges[sample];
    for (int64_t thread = 1; thread < threads; thread++)
      range.join(ranges[thread * step.samples + sample]);
    return Steps(range);
  }

  // Bytes of 4 channels from `c` on, of 16 pixels, channels side by side.
  template <class Quantizer>
  Ints four_channels(const Quantizer& steps, const float* x, int64_t c, int64_t some) const {
    Ints four = {};
    for (int64_t i = 0; i < 4 && c + i < layer.channels; i++) {
      const float* from = x + (c + i) * plane;
      const Floats v = some == LANES ? load(from) : load_part(from, some);
      four |= steps.bytes_of(v) << int(8 * i);
    }
    return four;
  }

  // `some` pixels, up to 16, whose channels are planes, to pixels `apart` bytes from each other.
  template <class Quantizer>
  void put_planes(const Quantizer& steps, const float* x, int64_t some, uint8_t* to,
                  int64_t apart) const {
    int64_t c = 0;
    for (; c + 16 <= layer.channels; c += 16) {
      Ints four[4];
      for (int i = 0; i < 4; i++) four[i] = four_channels(steps, x, c + 4 * i, some);
      const Ints even[2] = {lower(four[0], four[2]), upper(four[0], four[2])};
      const Ints odd[2] = {lower(four[1], four[3]), upper(four[1], four[3])};
      const Ints four_pixels[4] = {lower(even[0], odd[0]), upper(even[0], odd[0]),
                                   lower(even[1], odd[1]), upper(even[1], odd[1])};
      const uint8_t* bytes = (const uint8_t*)four_pixels;
      for (int64_t i = 0; i < some; i++) memcpy(to + i * apart + c, bytes + 16 * i, 16);
    }
    for (; c < layer.channels; c += 4) {
      const Ints four = four_channels(steps, x, c, some);
      const uint8_t* bytes = (const uint8_t*)&four;
      for (int64_t i = 0; i < some; i++) memcpy(to + i * apart + c, bytes + 4 * i, 4);
    }
  }

  void put_pixels(const Steps& steps, const float* x, int64_t many, uint8_t* to) const {
    if (pitch == layer.channels) return steps.put(x, many * layer.channels, to);
    for (int64_t p = 0; p < many; p++)
      steps.put(x + p * layer.channels, layer.channels, to + p * pitch);
  }

  // A line of an image, along its width.
  void line(const Steps& steps, int64_t sample, int64_t depth, int64_t height) const {
    const int64_t width = full[2];
    uint8_t* to = image + ((sample * full[0] + depth) * full[1] + height) * width * pitch;
    const int64_t d = depth - layer.before[0], h = height - layer.before[1];
    const bool inside = d >= 0 && d < step.size[0] && h >= 0 && h < step.size[1];
    const int64_t many = inside && steps.finite ? step.size[2] : 0;
    const int64_t low = many ? layer.before[2] : 0;
    if (many < width || pitch != layer.channels) memset(to, steps.row.zero, width * pitch);
    if (!many) return;
    const int64_t first = (d * step.size[1] + h) * step.size[2];
    const float* own = x + sample * layer.channels * plane;
    if (step.x_last)
      put_pixels(steps, own + first * layer.channels, many, to + low * pitch);
    else
      for (int64_t p = 0; p < many; p += LANES)
        put_planes(steps, own + first + p, many - p < LANES ? many - p : LANES,
                   to + (low + p) * pitch, pitch);
  }

  // Does a window look at this place of a padded dimension?
  bool is_seen(int d, int64_t at) const {
    return layer.dilation[d] > 1 || at % layer.stride[d] < layer.kernel[d];
  }

  void quantize(int64_t thread) const {
    const int64_t lines = full[0] * full[1], all = step.samples * lines;
    const int64_t end = all * (thread + 1) / threads;
    for (int64_t at = all * thread / threads; at < end;) {
      const int64_t sample = at / lines;
      const Steps steps = steps_of(sample);
      for (; at < end && at / lines == sample; at++) {
        const int64_t depth = at % lines / full[1], height = at % lines % full[1];
        if (is_seen(0, depth) && is_seen(1, height)) line(steps, sample, depth, height);
      }
    }
  }

  // Pixels as rows, each with steps of its own. row: the first of them among all of the call.
  void quantize_pixels(int64_t row, int64_t end, uint8_t* to, Row* steps) const {
    while (row < end) {
      const int64_t sample = row / pixels, pixel = row % pixels, left = pixels - pixel;
      int64_t some = end - row < left ? end - row : left;
      some = some < LANES ? some : LANES;
      const float* own = x + sample * layer.channels * plane;
      if (step.x_last) {
        const float* from = own + pixel * layer.channels;
        if (gate)
          quantize_together(Scaled<float>{from, gate + sample * layer.channels}, some, to, steps);
        else
          quantize_together(Plain<float>{from}, some, to, steps);
      } else {
        quantize_columns(own + pixel, some, to, steps);
      }
      row += some, to += some * stride, steps += some;
    }
  }

  // Up to 16 pixels, channels last: their ranges become steps side by side. first: of the pixels.
  template <class Numbers>
  void quantize_together(const Numbers& first, int64_t some, uint8_t* to, Row* steps) const {
    const int64_t seen = seen_bytes(layer.channels);
    if (some == 1) {
      *steps = quantize_row(first, layer.channels, seen, to);
      return;
    }
    Range all;
    Floats low[LANES] = {}, high[LANES] = {};
    Numbers own = first;
    for (int64_t i = 0; i < some; i++, own.x += layer.channels) {
      Range range;
      range.look(own, layer.channels);
      low[i] = range.low, high[i] = range.high;
      all.poison = all.poison + range.poison;
    }
    all.low = picked(low, [](auto a, auto b) { return least(a, b); });
    all.high = picked(high, [](auto a, auto b) { return most(a, b); });
    const bool finite = all.finite();
    const SideBySide each(all);
    own = first;
    for (int64_t i = 0; i < some; i++, to += stride, own.x += layer.channels) {
      steps[i] = finite ? each.row(int(i)) : quantize_row(own, layer.channels, seen, to);
      if (!finite) continue;
      each.steps(int(i)).put(own, layer.channels, to);
      clear(to + layer.channels, seen - layer.channels);
    }
  }

  // The same of up to 16 pixels whose channels are planes.
  void quantize_columns(const float* x, int64_t some, uint8_t* to, Row* steps) const {
    Range ranges;
    for (int64_t c = 0; c < layer.channels; c++) {
      const float* from = x + c * plane;
      ranges.look(some == LANES ? load(from) : load_part(from, some));
    }
    const SideBySide each(ranges);
    const int64_t whole = layer.channels / 4 * 4;
    for (int64_t i = 0; i < some; i++) {
      steps[i] = each.row(int(i));
      memset(to + i * stride + whole, 0, padded - whole);
    }
    put_planes(each, x, some, to, stride);
  }

  // --------------------------------------------------------------------------------- rows

  // What the output pixels from `row` on look at in one group.
  void gather(int64_t row, int64_t end, int64_t group, uint8_t* to) const {
    const int64_t lines = step.out[1] * step.out[2];
    while (row < end) {
      const int64_t sample = row / pixels, pixel = row % pixels, at = pixel % step.out[2];
      const int64_t depth = sample * full[0] + pixel / lines * layer.stride[0];
      const int64_t height = pixel % lines / step.out[2] * layer.stride[1];
      const int64_t left = step.out[2] - at, many = end - row < left ? end - row : left;
      const int64_t first = (depth * full[1] + height) * full[2] + at * layer.stride[2];
      const uint8_t* from = image + first * pitch + group * (layer.channels / layer.groups);
      for (int64_t i = 0; i < many; i++, to += stride, from += layer.stride[2] * pitch)
        places(from, to);
      row += many;
    }
  }

  // The bytes of all places of the kernel; `from`: the first of them.
  void places(const uint8_t* from, uint8_t* to) const {
    const bool together = layer.taps == pitch && layer.dilation[2] == 1;
    const int64_t many = together ? 1 : layer.kernel[2];
    const int64_t bytes = together ? layer.kernel[2] * pitch : layer.taps;
    for (int64_t d = 0; d < layer.kernel[0]; d++) {
      for (int64_t h = 0; h < layer.kernel[1]; h++) {
        const int64_t line = d * layer.dilation[0] * full[1] + h * layer.dilation[1];
        for (int64_t w = 0; w < many; w++, to += bytes)
          copy(to, from + (line * full[2] + w * layer.dilation[2]) * pitch, bytes);
      }
    }
  }

  // Rows from `first` on, as bytes.
  void fill(int64_t first, int64_t count, int64_t group, uint8_t* to, Row* steps) const {
    if (pointwise)
      quantize_pixels(first, first + count, to, steps);
    else
      gather(first, first + count, group, to);
  }

  static int64_t line_bytes(int64_t count, int64_t stride) {
    return up(count, HEIGHT) * stride + up(count * sizeof(Row), 64);
  }

  void run(int64_t thread) const;
  void line(int64_t first, int64_t count, uint8_t* memory, float* to, int64_t to_first) const;
  void multiply_own(int64_t group, int64_t thread) const;
  void multiply_shared(int64_t group, int64_t thread) const;
};

// What becomes of the sums of the rows from `first` on. steps: of these rows, or of all samples.
struct Results {
  const Job& job;
  int64_t group, first;
  const Row* steps;
  Range* ranges;  // of each sample of y, as this thread sees it; may be null
  float* y;       // channels last: of the row `y_first`
  int64_t y_first;

  static constexpr int64_t TOGETHER = LANES;

  // What the 16 outputs of a panel share.
  struct Panel {
    const Results& all;
    const Job& job;
    int64_t channel, many;
    Floats scale, bias;
    Ints sums;

    void put(const int32_t* from, int64_t apart, int64_t row, int64_t count) const {
      switch (job.step.activation) {
        case NONE:
          return put_as<NONE>(from, apart, row, count);
        case SILU:
          return put_as<SILU>(from, apart, row, count);
        default:
          return put_as<-1>(from, apart, row, count);
      }
    }

    // ACTIVATION: of the results, -1 for any. What all rows share is copied: numbers that are
    // stored could be its own, as far as a compiler sees.
    template <int64_t ACTIVATION>
    void put_as(const int32_t* from, int64_t apart, int64_t row, int64_t count) const {
      const Step& step = job.step;
      const int64_t activation = ACTIVATION < 0 ? step.activation : ACTIVATION, many = this->many;
      const int64_t outputs = job.layer.outputs, pixels = job.pixels;
      const Floats scale = this->scale, bias = this->bias;
      const Ints sums = this->sums;
      const bool has_bias = job.layer.bias, has_range = all.ranges, last = step.y_last;
      const Limits limits = step.limits, last_limits = step.last_limits;
      const float *other = job.other ? job.other + channel : nullptr, *tails = step.tails;
      for (int64_t r = all.first + row, end = r + count; r < end;) {
        const int64_t sample = r / pixels, pixel = r % pixels;
        const int64_t some = least_of(least_of(pixels - pixel, end - r), LANES);
        const Row* own = all.steps + (job.pointwise ? r - all.first : sample);
        float* to = all.y + (r - all.y_first) * outputs + channel;
        Floats turned[LANES];
        Range range;
        for (int64_t i = 0; i < some; i++, from += apart, own += job.pointwise) {
          const Ints exact = load_vector<Ints>(from) - own->zero * sums;
          Floats y = to_floats(exact) * scale * own->step;
          if (has_bias) y = y + bias;
          y = limits.cut(activated(y, activation, tails));
          if (other) y = last_limits.cut(y + load_some(other + (r + i) * outputs, many));
          if (has_range) range.look(y);
          if (last)
            store(y, to + i * outputs, many);
          else
            turned[i] = y;
        }
        if (has_range) all.ranges[sample].join(range);
        if (!last) store_planes(turned, sample, pixel, some);
        r += some;
      }
    }

    void store_planes(Floats* y, int64_t sample, int64_t pixel, int64_t some) const {
      float* to = job.y + (sample * job.layer.outputs + channel) * job.pixels + pixel;
      transpose(y);
      for (int64_t i = 0; i < many; i++, to += job.pixels) store(y[i], to, some);
    }
  };

  Panel panel(int64_t panel) const {
    const Layer& layer = job.layer;
    const int64_t own = layer.outputs / layer.groups, at = panel * LANES;
    const int64_t shared = (group * job.panels + panel) * LANES;
    Panel found = {*this, job, group * own + at, least_of(own - at, LANES)};
    found.scale = load(layer.scale + shared);
    if (layer.bias) found.bias = load(layer.bias + shared);
    found.sums = load_vector<Ints>(layer.sums + shared);
    return found;
  }

  // A thread's part of the products of `count` rows.
  void multiply(const uint8_t* q, int64_t count, int64_t thread, int64_t threads) const {
    const int8_t* packed = job.layer.packed + group * job.panels * LANES * job.padded;
    const Gemm<Results> gemm = {q, packed, job.stride, job.inputs, job.padded, job.panels, *this};
    gemm.share(count, thread, threads);
  }
};

void Job::multiply_own(int64_t group, int64_t thread) const {
  const int64_t blocks = up(rows, HEIGHT) / HEIGHT;
  const int64_t end = least_of(blocks * (thread + 1) / threads * HEIGHT, rows);
  uint8_t* q = gathered + thread * chunk * stride;
  Row* steps = pointwise ? found + thread * chunk : found;
  Range* seen = y_ranges ? y_ranges + thread * step.samples : nullptr;
  for (int64_t first = blocks * thread / threads * HEIGHT; first < end; first += chunk) {
    const int64_t count = least_of(end - first, chunk);
    fill(first, count, group, q, steps);
    Results{*this, group, first, steps, seen, y, 0}.multiply(q, count, 0, 1);
  }
}

void Job::multiply_shared(int64_t group, int64_t thread) const {
  Range* seen = y_ranges ? y_ranges + thread * step.samples : nullptr;
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = least_of(rows - first, chunk);
    const int64_t low = count * thread / threads, end = count * (thread + 1) / threads;
    fill(first + low, end - low, group, gathered + low * stride, found + low);
    barrier(threads);
    Results{*this, group, first, found, seen, y, 0}.multiply(gathered, count, thread, threads);
    barrier(threads);
  }
}

void Job::run(int64_t thread) const {
  if (y_ranges)
    for (int64_t s = 0; s < step.samples; s++) y_ranges[thread * step.samples + s] = Range();
  if (!pointwise) {
    if (step.x_range == NOWHERE) {
      look(thread);
      barrier(threads);
    }
    quantize(thread);
    for (int64_t sample = 0; sample < step.samples && thread == 0; sample++)
      found[sample] = steps_of(sample).row;
    barrier(threads);
  }
  for (int64_t group = 0; group < layer.groups; group++)
    own_rows ? multiply_own(group, thread) : multiply_shared(group, thread);
}

// Rows of pixels, by this thread alone, to memory that begins with those from `to_first` on.
void Job::line(int64_t first, int64_t count, uint8_t* memory, float* to, int64_t to_first) const {
  Row* steps = (Row*)(memory + up(count, HEIGHT) * stride);
  quantize_pixels(first, first + count, memory, steps);
  Results{*this, 0, first, steps, nullptr, to, to_first}.multiply(memory, count, 0, 1);
}

// A depthwise convolution with the kernels of one pixel before and behind it (one may be missing),
// line by line: each thread computes the lines that its own look at, and keeps as many as a window
// has. So what lies between large images stays in the cache, and no thread waits for another one.
struct Chain {
  const Step *wide = nullptr, *deep = nullptr, *narrow = nullptr;
  const Layer& layer;
  int64_t width, reach;  // numbers in a line, and lines of a window

  explicit Chain(const Step* steps)
      : wide(steps[0].kind == CONVOLUTION ? steps : nullptr),
        deep(wide ? steps + 1 : steps),
        narrow(steps + steps[0].together - 1 == deep ? nullptr : deep + 1),
        layer(*deep->layer),
        width(deep->size[2] * layer.channels),
        reach(layer.kernel[1]) {}

  int64_t ring_bytes() const { return wide ? up(reach * width * sizeof(float), 64) : 0; }
  // Of a thread.
  int64_t bytes(const Run& run) const {
    const Job before(wide ? *wide : *narrow, run), after(narrow ? *narrow : *wide, run);
    return up(reach * sizeof(int64_t), 64) + ring_bytes() +
           Job::line_bytes(deep->size[2], before.stride) +
           Job::line_bytes(deep->out[2], after.stride);
  }

  void run(const Run& run, int64_t thread, uint8_t* memory) const {
    const Job before(wide ? *wide : *narrow, run), after(narrow ? *narrow : *wide, run);
    const Windows windows(*deep, run, thread);
    int64_t* lines = (int64_t*)memory;
    float* ring = (float*)(memory + up(reach * sizeof(int64_t), 64));
    uint8_t* own = (uint8_t*)ring + ring_bytes();
    uint8_t* last = own + Job::line_bytes(deep->size[2], before.stride);
    const int64_t each = deep->out[1], all = deep->samples * each;
    const int64_t end = all * (thread + 1) / run.threads;
    int64_t next = 0;  // the first line that isn't computed, among those of all samples
    for (int64_t at = all * thread / run.threads; at < end; at++) {
      const int64_t sample = at / each, pixels = deep->out[2];
      windows.lines_of(0, at % each, lines);
      for (int64_t h = 0; wide && h < reach; h++)
        if (lines[h] >= 0) lines[h] = ringed(before, sample, lines[h], next, ring, own);
      const float* image = wide ? ring : windows.x + sample * windows.plane * layer.channels;
      windows.line_last<false>(image, lines, windows.y + at * pixels * layer.channels);
      if (narrow) after.line(at * pixels, pixels, last, after.y, 0);
    }
  }

  // Where in the ring the line of an image lies that starts at this pixel; it is computed first if
  // it is new.
  int64_t ringed(const Job& before, int64_t sample, int64_t pixel, int64_t& next, float* ring,
                 uint8_t* memory) const {
    const int64_t pixels = deep->size[2], line = sample * deep->size[1] + pixel / pixels;
    const int64_t place = line % reach;
    if (line >= next) {
      before.line(line * pixels, pixels, memory, ring + place * width, line * pixels);
      next = line + 1;
    }
    return place * pixels;
  }
};

int64_t window_bytes(const Step& step) { return Windows::bytes(step); }

// The most memory that a step needs.
int64_t most_bytes(const Step* steps, int64_t count, const Run& run) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    const bool product = steps[i].kind == CONVOLUTION;
    int64_t own = product ? Job(steps[i], run).bytes() : window_bytes(steps[i]) * run.threads;
    if (steps[i].together > 1) own = Chain(steps + i).bytes(run) * run.threads;
    most = own > most ? own : most;
  }
  return most;
}

void run_steps(const Step* steps, int64_t count, const Run& run, uint8_t* memory, int64_t thread) {
  for (int64_t i = 0; i < count; i += steps[i].together) {
    if (steps[i].together > 1) {
      const Chain chain(steps + i);
      chain.run(run, thread, memory + thread * chain.bytes(run));
    } else if (steps[i].kind == CONVOLUTION) {
      Job job(steps[i], run);
      job.open(memory, run);
      job.run(thread);
    } else {
      run_window(steps[i], run, thread, memory + thread * window_bytes(steps[i]));
    }
    barrier(run.threads);
  }
}

void run_turns(const Step* steps, int64_t count, const Turns& call, Run run, uint8_t* memory,
               int64_t thread) {
  for (int64_t turn = 0; turn < call.turns; turn++) {
    run_steps(steps, count, run, memory, thread);
    run.input += call.x_apart, run.output += call.y_apart;
  }
}

}  // namespace

extern "C" {

// What conv.py compares with its own before the first call.
extern const int64_t layer_bytes, step_bytes, turns_bytes, range_bytes;
const int64_t layer_bytes = sizeof(Layer);
const int64_t step_bytes = sizeof(Step);
const int64_t turns_bytes = sizeof(Turns);
const int64_t range_bytes = sizeof(Range);

// 0 if this process may run the code.
int open_library() { return open_matrices(); }

// A program for some samples after the other, `turns` times. 0, or 1 where there is no memory.
int run_program(const Step* steps, int64_t count, const Turns* call) {
  Run run = {call->input, call->output, call->arena, call->threads};
  bool enough = true;
  uint8_t* memory = nullptr;
#if defined(_OPENMP)
  if (run.threads > 1) {
#pragma omp parallel num_threads(int(call->threads))
    {
#pragma omp master
      {
        run.threads = omp_get_num_threads();
        enough = scratch.reserve(most_bytes(steps, count, run));
        memory = scratch.memory;
      }
#pragma omp barrier
      if (enough) run_turns(steps, count, *call, run, memory, omp_get_thread_num());
    }
    return !enough;
  }
#endif
  if (!scratch.reserve(most_bytes(steps, count, run))) return 1;
  run_turns(steps, count, *call, run, scratch.memory, 0);
  return 0;
}
}
