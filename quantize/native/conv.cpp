// An int8 convolution in one call, with each sample of the input in 8 bits, or each pixel where the
// kernel is one pixel: a step and a zero point, found when the input arrives.
//
// Threads share out the numbers to find the ranges of samples, then lines of the images to quantize
// them (with their padding, channels side by side), then rows: a row holds the bytes that one
// output pixel looks at. Rows are multiplied as in a linear layer. Sums are exact integers, and
// what follows is one IEEE operation at a time (compiled without contraction), so neither the
// instruction set nor the number of threads or samples changes a bit. quantize/nn/int8_images.py
// says the same in PyTorch.

#include "gemm.h"

struct Layer {
  // of depth, height and width; a dimension that the input doesn't have is 1
  int64_t kernel[3], stride[3], dilation[3], before[3], after[3];  // before, after: the padding
  int64_t channels, outputs, groups;
  int64_t taps;               // channels that a row holds of each place: of a group, perhaps more
  const int8_t* packed;       // [groups] weights of [panels of a group], rows [taps] of every place
  const int32_t* sums;        // of the weights of an output [groups][16 panels]
  const float *scale, *bias;  // [groups][16 panels]; bias may be null
  int64_t relu;
};

struct Call {
  int64_t samples, threads, last;  // last: channels are the last dimension of x and y
  int64_t size[3], out[3];
  const float* x;
  float* y;
};

namespace {

thread_local Scratch scratch;

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

// 16 vectors of 16 numbers, columns to rows.
inline void transpose(Floats* v) {
  Floats other[LANES];
  for (int turn = 0; turn < 2; turn++) {
    for (int i = 0; i < 8; i++) {
      other[2 * i] = lower(v[i], v[i + 8]);
      other[2 * i + 1] = upper(v[i], v[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
      v[2 * i] = lower(other[i], other[i + 8]);
      v[2 * i + 1] = upper(other[i], other[i + 8]);
    }
  }
}

// memcpy of few bytes, without a call.
inline void copy(uint8_t* to, const uint8_t* from, int64_t n) {
  for (; n >= 64; n -= 64, to += 64, from += 64) memcpy(to, from, 64);
  for (; n >= 16; n -= 16, to += 16, from += 16) memcpy(to, from, 16);
  for (; n >= 4; n -= 4, to += 4, from += 4) memcpy(to, from, 4);
  for (; n > 0; n--) *to++ = *from++;
}

struct Job {
  const Layer& layer;
  const Call& call;
  int64_t full[3];  // sizes with the padding
  int64_t pitch;    // bytes of a pixel
  int64_t plane, pixels, inputs, padded, stride, panels, rows, chunk;
  bool pointwise;  // a row is a pixel of the input
  uint8_t *image = nullptr, *gathered = nullptr;
  Range* ranges = nullptr;  // [threads][samples]
  Row* found = nullptr;     // steps of each sample, or of each row of a chunk

  Job(const Layer& layer, const Call& call) : layer(layer), call(call) {
    plane = call.size[0] * call.size[1] * call.size[2];
    pixels = call.out[0] * call.out[1] * call.out[2];
    pointwise = layer.groups == 1;
    for (int d = 0; d < 3; d++) {
      full[d] = layer.before[d] + call.size[d] + layer.after[d];
      pointwise =
          pointwise && layer.kernel[d] == 1 && layer.stride[d] == 1 && full[d] == call.size[d];
    }
    inputs = layer.kernel[0] * layer.kernel[1] * layer.kernel[2] * layer.taps;
    padded = up(inputs, 64), stride = row_stride(inputs);
    pitch = up(layer.channels, 4);
    panels = up(layer.outputs / layer.groups, LANES) / LANES;
    rows = call.samples * pixels;
    chunk = rows_at_once(stride, rows);
  }

  int64_t volume() const { return full[0] * full[1] * full[2]; }

  bool open() {
    const int64_t images = pointwise ? 0 : up(call.samples * volume() * pitch, 64);
    const int64_t row_bytes = up(chunk, 32) * stride;
    const int64_t range_bytes = call.threads * call.samples * sizeof(Range);
    const int64_t steps = pointwise ? chunk : call.samples;
    if (!scratch.reserve(images + row_bytes + range_bytes + steps * sizeof(Row))) return false;
    image = scratch.memory;
    gathered = image + images;
    ranges = (Range*)(gathered + row_bytes);
    found = (Row*)(ranges + call.threads * call.samples);
    return true;
  }

  // --------------------------------------------------------------------------------- quantizing

  void look(int64_t thread, int64_t threads) const {
    const int64_t many = layer.channels * plane;
    for (int64_t sample = 0; sample < call.samples; sample++) {
      const int64_t first = many * thread / threads, end = many * (thread + 1) / threads;
      Range range;
      range.look(call.x + sample * many + first, end - first);
      ranges[thread * call.samples + sample] = range;
    }
  }

  Steps steps_of(int64_t sample, int64_t threads) const {
    Range range = ranges[sample];
    for (int64_t thread = 1; thread < threads; thread++)
      range.join(ranges[thread * call.samples + sample]);
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
      const Ints pixels_of[4] = {lower(even[0], odd[0]), upper(even[0], odd[0]),
                                 lower(even[1], odd[1]), upper(even[1], odd[1])};
      const uint8_t* bytes = (const uint8_t*)pixels_of;
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
    const bool inside = d >= 0 && d < call.size[0] && h >= 0 && h < call.size[1];
    const int64_t many = inside && steps.finite ? call.size[2] : 0;
    const int64_t low = many ? layer.before[2] : 0;
    if (many < width || pitch != layer.channels) memset(to, steps.row.zero, width * pitch);
    if (!many) return;
    const int64_t first = (d * call.size[1] + h) * call.size[2];
    const float* x = call.x + sample * layer.channels * plane;
    if (call.last)
      put_pixels(steps, x + first * layer.channels, many, to + low * pitch);
    else
      for (int64_t p = 0; p < many; p += LANES)
        put_planes(steps, x + first + p, many - p < LANES ? many - p : LANES,
                   to + (low + p) * pitch, pitch);
  }

  void quantize(int64_t thread, int64_t threads) const {
    const int64_t lines = full[0] * full[1], all = call.samples * lines;
    const int64_t end = all * (thread + 1) / threads;
    for (int64_t at = all * thread / threads; at < end;) {
      const int64_t sample = at / lines;
      const Steps steps = steps_of(sample, threads);
      for (; at < end && at / lines == sample; at++)
        line(steps, sample, at % lines / full[1], at % lines % full[1]);
    }
  }

  // Pixels as rows, each with steps of its own. row: the first of them among all of the call.
  void quantize_pixels(int64_t row, int64_t end, uint8_t* to, Row* steps) const {
    while (row < end) {
      const int64_t sample = row / pixels, pixel = row % pixels, left = pixels - pixel;
      int64_t some = end - row < left ? end - row : left;
      some = some < LANES ? some : LANES;
      const float* x = call.x + sample * layer.channels * plane;
      if (call.last) {
        const float* from = x + pixel * layer.channels;
        for (int64_t i = 0; i < some; i++)
          steps[i] =
              quantize_row(from + i * layer.channels, layer.channels, padded, to + i * stride);
      } else {
        quantize_columns(x + pixel, some, to, steps);
      }
      row += some, to += some * stride, steps += some;
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
    const int64_t lines = call.out[1] * call.out[2];
    while (row < end) {
      const int64_t sample = row / pixels, pixel = row % pixels, at = pixel % call.out[2];
      const int64_t depth = sample * full[0] + pixel / lines * layer.stride[0];
      const int64_t height = pixel % lines / call.out[2] * layer.stride[1];
      const int64_t left = call.out[2] - at, many = end - row < left ? end - row : left;
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

  void run(int64_t thread, int64_t threads) const;
};

// What becomes of the sums of the rows from `first` on.
struct Results {
  const Job& job;
  int64_t group, first;

  // What the 16 outputs of a panel share.
  struct Panel {
    const Job& job;
    int64_t first, channel, many;
    Floats scale, bias;
    Ints sums;

    void put(const int32_t* from, int64_t apart, int64_t row, int64_t count) const {
      for (int64_t r = first + row, end = r + count; r < end;) {
        const int64_t sample = r / job.pixels, pixel = r % job.pixels;
        const int64_t left = job.pixels - pixel < end - r ? job.pixels - pixel : end - r;
        const int64_t some = left < LANES ? left : LANES;
        Floats y[LANES];
        for (int64_t i = 0; i < some; i++)
          y[i] = output(from + i * apart, job.found[job.pointwise ? r - first + i : sample]);
        if (job.call.last)
          store_pixels(y, r, some);
        else
          store_planes(y, sample, pixel, some);
        r += some, from += some * apart;
      }
    }

    Floats output(const int32_t* from, const Row& step) const {
      Ints sum;
      memcpy(&sum, from, sizeof sum);
      const Ints exact = sum - step.zero * sums;
      Floats y = __builtin_convertvector(exact, Floats) * scale * step.step;
      if (job.layer.bias) y = y + bias;
      if (job.layer.relu) y = y < 0 ? Floats{} : y;
      return y;
    }

    void store_pixels(const Floats* y, int64_t row, int64_t some) const {
      float* to = job.call.y + row * job.layer.outputs + channel;
      for (int64_t i = 0; i < some; i++, to += job.layer.outputs)
        if (many == LANES)
          memcpy(to, y + i, sizeof *y);
        else
          memcpy(to, y + i, many * sizeof(float));
    }

    void store_planes(Floats* y, int64_t sample, int64_t pixel, int64_t some) const {
      float* to = job.call.y + (sample * job.layer.outputs + channel) * job.pixels + pixel;
      transpose(y);
      for (int64_t i = 0; i < many; i++, to += job.pixels)
        if (some == LANES)
          memcpy(to, y + i, sizeof *y);
        else
          memcpy(to, y + i, some * sizeof(float));
    }
  };

  Panel panel(int64_t panel) const {
    const Layer& layer = job.layer;
    const int64_t own = layer.outputs / layer.groups, at = panel * LANES;
    const int64_t shared = (group * job.panels + panel) * LANES;
    Panel found = {job, first, group * own + at, own - at < LANES ? own - at : LANES};
    found.scale = load(layer.scale + shared);
    if (layer.bias) found.bias = load(layer.bias + shared);
    memcpy(&found.sums, layer.sums + shared, sizeof found.sums);
    return found;
  }
};

void Job::run(int64_t thread, int64_t threads) const {
  if (!pointwise) {
    look(thread, threads);
    barrier(threads);
    quantize(thread, threads);
    for (int64_t sample = 0; sample < call.samples && thread == 0; sample++)
      found[sample] = steps_of(sample, threads).row;
    barrier(threads);
  }
  for (int64_t group = 0; group < layer.groups; group++) {
    for (int64_t first = 0; first < rows; first += chunk) {
      const int64_t count = rows - first < chunk ? rows - first : chunk;
      const int64_t low = count * thread / threads, end = count * (thread + 1) / threads;
      uint8_t* to = gathered + low * stride;
      if (pointwise)
        quantize_pixels(first + low, first + end, to, found + low);
      else
        gather(first + low, first + end, group, to);
      barrier(threads);
      const int8_t* packed = layer.packed + group * panels * LANES * padded;
      const Results results = {*this, group, first};
      Gemm<Results>{gathered, packed, stride, padded, panels, results}.share(count, thread,
                                                                             threads);
      barrier(threads);
    }
  }
}

}  // namespace

extern "C" {

// What conv.py compares with its own before the first call.
extern const int64_t layer_bytes, call_bytes;
const int64_t layer_bytes = sizeof(Layer);
const int64_t call_bytes = sizeof(Call);

// 0 if this process may run the code.
int open_library() { return open_matrices(); }

// 0, or 1 where there is no memory.
int convolve(const Layer* layer, const Call* call) {
  Job job(*layer, *call);
  if (!job.open()) return 1;
#if defined(_OPENMP)
  if (call->threads > 1) {
#pragma omp parallel num_threads(int(call->threads))
    job.run(omp_get_thread_num(), omp_get_num_threads());
    return 0;
  }
#endif
  job.run(0, 1);
  return 0;
}
}
