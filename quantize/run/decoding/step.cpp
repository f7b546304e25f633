// A pass of a Llama-style decoder over the next few tokens, reading every weight once from where
// torch keeps it.
//
// All threads run the same code from top to bottom: a loop under `omp for` is shared out among
// them, everything else is either done by each or ends in a barrier. With so few rows a layer takes
// as long as its weights take to arrive from memory, so the loops only have to be simple enough for
// the compiler to turn into vector instructions. native.py builds the structs below.

#include "numbers.h"

#include <vector>

enum Kind : int64_t { F32, F16, BF16, INT8, INT4 };

struct Linear {  // y = W x + b, or W (W' x) + b with W' = *first
  int64_t kind, outputs, inputs, group;
  const void* weight;  // [outputs, inputs]; int4: two to a byte, even columns low
  const void* scale;   // int8: float [outputs]; int4: bf16 [outputs, inputs / group]
  const void* zero;    // int4: bf16 [outputs, inputs / group]
  const float* bias;
  const Linear* first;
};

struct Layer {
  const float *attention_norm, *ffn_norm, *q_norm, *k_norm;  // weights; the last two may be null
  Linear q, k, v, out, gate, up, down;
};

struct Model {
  int64_t layers, width, head_dim;
  float norm_eps, rope_scale;
  const float* frequencies;  // radians per position [head_dim / 2]
  const float* norm;
  const Layer* layer;
  Linear head;
};

struct Held {  // one layer of the cache: k, v [batch, kv_heads, capacity, head_dim], scales [batch,
               // kv_heads, capacity]
  void *k, *v, *k_scale, *v_scale;
  int64_t capacity, first, window;  // index 0 is position `first`; window 0: none
};

struct Pass {
  int64_t batch, tokens, length, keep, kind,
      threads;             // `length` positions are held, `keep` last tokens get logits
  const int64_t* pad;      // [batch] empty positions on the left, or null
  const int64_t* lengths;  // [batch] what each row holds, in a cache of its own; null: `length`
  const Held* held;        // [layers]; with `lengths` [batch, layers], each of one row
  float* x;                // [batch, tokens, width]: embeddings, overwritten
  float* logits;           // [batch, keep, vocabulary]
};

namespace {

constexpr int64_t CHUNK = 256;  // positions of one attention task

// The largest size; NaN if there is a NaN or an infinity, whose rounded form must not look like a
// number.
inline float largest(const float* x, int64_t n) {
  float most = 0, nan = 0;
#pragma omp simd reduction(max : most) reduction(+ : nan)
  for (int64_t i = 0; i < n; i++) {
    most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    nan += x[i] * 0;
  }
  return most + nan;
}

struct Range {
  float low, high;
};

// The least and the largest of all values and 0; NaN if there is a NaN.
inline Range range_of(const float* x, int64_t n) {
  float low = 0, high = 0, nan = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : nan)
  for (int64_t i = 0; i < n; i++) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    nan += x[i] * 0;
  }
  return {low + nan, high + nan};
}

// A rounded product, which the compiler can't join with the operation that takes it.
inline float alone(float x) {
  asm("" : "+m"(x));
  return x;
}

// ------------------------------------------------------------------------------------- rows that
// enter a product

struct Input {  // rows of activations in each form that a kind of weight multiplies
  std::vector<float> value, brain;  // as they are; rounded to bf16
  std::vector<uint8_t> q;           // 8 bits
  std::vector<float> scale;         // of q, per row
  std::vector<int32_t> zero;        // what stands for 0 in q, per row
  std::vector<int8_t> upper,
      lower;  // of 16 bits, per 64: even places of the first 32 and of the second, then odd ones
  std::vector<float> fine_scale, sum;  // of the 16 bits and of value, per 32

  Input(int64_t rows, int64_t most)
      : value(rows * most),
        brain(rows * most),
        q(rows * most),
        scale(rows),
        zero(rows),
        upper(rows * (most + 63)),
        lower(rows * (most + 63)),
        fine_scale(rows * block_width(most + 32)),
        sum(rows * block_width(most + 32)) {}

  void prepare(int64_t row, int64_t width,
               int64_t kinds) {  // `value` of the row is written: make the other forms
    const float* x = &value[row * width];
    if (kinds >> BF16 & 1)
      for (int64_t i = 0; i < width; i++) brain[row * width + i] = widen(to_brain(x[i]));
    if (kinds >> INT8 & 1) {  // as nn/int8_kernels.py says, bit for bit
      const Range range = range_of(x, width);
      const float part = alone(range.high * (1.0f / 255)), other = alone(range.low * (1.0f / 255));
      float s = part - other;
      s = s - s == 0 ? s < 1e-30f ? 1e-30f : s : NAN;
      const float inverse = 1 / s;
      const int32_t at = s == s ? int32_t(nearbyintf(-range.low * inverse)) : 0;
      for (int64_t i = 0; i < width; i++) {
        int32_t v = s == s ? int32_t(nearbyintf(x[i] * inverse)) + at : 0;
        v = v < 0 ? 0 : v;
        q[row * width + i] = uint8_t(v > 255 ? 255 : v);
      }
      scale[row] = s;
      zero[row] = at;
    }
    if (kinds >> INT4 & 1)
      for (int64_t i = 0; i < width; i += 32) {
        float s = largest(x + i, 32) * (1.0f / 32512),
              all = 0;  // 127 * 256: the upper byte stays in range
        s = s < 1e-30f ? 1e-30f : s;
        const int64_t to = row * fine_width(width) + i / 64 * 64 + i % 64 / 2;
        for (int64_t j = 0; j < 32; j++) {
          int32_t v = int32_t(nearbyintf(x[i + j] / s)), high = (v + 128) >> 8;
          upper[to + (j & 1) * 32 + j / 2] = int8_t(high);
          lower[to + (j & 1) * 32 + j / 2] = int8_t(v - high * 256);
          all += x[i + j];
        }
        fine_scale[row * block_width(width) + i / 32] = s;
        sum[row * block_width(width) + i / 32] = all;
      }
  }

  static int64_t fine_width(int64_t width) { return (width + 63) / 64 * 64; }
  static int64_t block_width(int64_t width) { return (width / 32 + LANES - 1) / LANES * LANES; }
};

int64_t kinds_of(const Linear& a) { return int64_t(1) << (a.first ? a.first->kind : a.kind); }

// -------------------------------------------------------------------------------------------------
// products

// y[m] = w . x[m] for M rows of inputs, `n` apart.
template <int M, class W>
inline void dot(const W* w, const float* x, int64_t n, float* y) {
  Floats total[M] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    Floats v = load(w + i);
    for (int m = 0; m < M; m++) total[m] += v * load(x + m * n + i);
  }
  for (int m = 0; m < M; m++) y[m] = sum(total[m]);
  for (; i < n; i++)
    for (int m = 0; m < M; m++) y[m] += widen(w[i]) * x[m * n + i];
}

// zero: of each row, what stands for 0 in x.
template <int M>
inline void dot_int8(const int8_t* w, const uint8_t* x, const int32_t* zero, int64_t n,
                     int32_t* y) {
  constexpr int64_t STEP = Exact::STEP;
  alignas(64) uint8_t ones[STEP];
  memset(ones, 1, STEP);
  Exact total[M], all;
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    for (int m = 0; m < M; m++) total[m].add(w + i, x + m * n + i);
    all.add(w + i, ones);
  }
  if (i < n) {  // the rest, filled up with zeros
    alignas(64) int8_t w_end[STEP] = {};
    alignas(64) uint8_t x_end[STEP] = {};
    memcpy(w_end, w + i, n - i);
    for (int m = 0; m < M; m++) {
      memcpy(x_end, x + m * n + i, n - i);
      total[m].add(w_end, x_end);
    }
    all.add(w_end, ones);
  }
  const int32_t weights = all.sum();
  for (int m = 0; m < M; m++) y[m] = total[m].sum() - zero[m] * weights;
}

// (code - 8) * scale + zero: the products with the codes, and per group what is the same for all
// codes. upper, lower: as in Input; x_scale and x_sum: one for every 32, each row filled up to a
// multiple of LANES.
template <int M>
inline void dot_int4(const uint8_t* w, const Brain* scale, const Brain* zero, int64_t group,
                     const int8_t* upper, const int8_t* lower, const float* x_scale,
                     const float* x_sum, int64_t n, float* y) {
  const int64_t blocks = n / 32, width = Input::fine_width(n), stride = Input::block_width(n);
  Codes::Total total[M] = {};
  Floats same[M] = {}, factor[M];
  for (int64_t start = 0; start < blocks; start += LANES) {
    const int64_t many = blocks - start < LANES ? blocks - start : LANES;
    Floats s, z;
    if (group == 32)
      s = load_some(scale + start, many), z = load_some(zero + start, many);
    else {
      Brain some[2][LANES] = {};
      for (int64_t b = 0; b < many; b++)
        some[0][b] = scale[(start + b) * 32 / group], some[1][b] = zero[(start + b) * 32 / group];
      s = load(some[0]), z = load(some[1]);
    }
    for (int m = 0; m < M; m++) {
      factor[m] = s * load(x_scale + m * stride + start);
      same[m] += (z - 8 * s) * load(x_sum + m * stride + start);
    }
    for (int64_t b = 0; b < many; b += 2) {
      Codes codes(w + 16 * (start + b), b + 1 < many);
      for (int m = 0; m < M; m++) {
        const int64_t at = m * width + 32 * (start + b);
        codes.add(upper + at, lower + at, factor[m], b, total[m]);
      }
    }
  }
  for (int m = 0; m < M; m++) y[m] = Codes::sum(total[m], same[m]);
}

template <int M>
inline void one_output(const Linear& a, const Input& in, int64_t row, int64_t output, float* y) {
  int64_t n = a.inputs;
  const float* value = &in.value[row * n];
  switch (a.kind) {
    case F32:
      dot<M>((const float*)a.weight + output * n, value, n, y);
      break;
    case F16:
      dot<M>((const Half*)a.weight + output * n, value, n, y);
      break;
    case BF16:
      dot<M>((const Brain*)a.weight + output * n, &in.brain[row * n], n, y);
      break;
    case INT8: {
      int32_t sum[M];
      dot_int8<M>((const int8_t*)a.weight + output * n, &in.q[row * n], &in.zero[row], n, sum);
      for (int m = 0; m < M; m++)
        y[m] = alone(float(sum[m]) * ((const float*)a.scale)[output] * in.scale[row + m]);
      break;
    }
    default: {
      const int64_t groups = n / a.group, blocks = row * Input::block_width(n),
                    fine = row * Input::fine_width(n);
      dot_int4<M>((const uint8_t*)a.weight + output * n / 2,
                  (const Brain*)a.scale + output * groups, (const Brain*)a.zero + output * groups,
                  a.group, &in.upper[fine], &in.lower[fine], &in.fine_scale[blocks],
                  &in.sum[blocks], n, y);
    }
  }
}

// y[row, output] = or += W x + b. Threads leave as soon as their own outputs are done.
void multiply(const Linear& a, const Input& in, int64_t rows, float* y, int64_t stride, bool add) {
#pragma omp for schedule(static) nowait
  for (int64_t output = 0; output < a.outputs; output++) {
    float bias = a.bias ? a.bias[output] : 0;
    for (int64_t row = 0; row < rows; row += 4) {
      float sum[4];
      int64_t many = rows - row < 4 ? rows - row : 4;
      if (many == 4)
        one_output<4>(a, in, row, output, sum);
      else if (many == 3)
        one_output<3>(a, in, row, output, sum);
      else if (many == 2)
        one_output<2>(a, in, row, output, sum);
      else
        one_output<1>(a, in, row, output, sum);
      for (int64_t m = 0; m < many; m++) {
        float& to = y[(row + m) * stride + output];
        to = sum[m] + bias + (add ? to : 0);
      }
    }
  }
}

void apply(const Linear& a, const Input& in, Input& middle, int64_t rows, float* y, int64_t stride,
           bool add = false) {
  if (!a.first) return multiply(a, in, rows, y, stride, add);
#pragma omp barrier
  multiply(*a.first, in, rows, middle.value.data(), a.inputs, false);
#pragma omp barrier
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) middle.prepare(row, a.inputs, int64_t(1) << a.kind);
  multiply(a, middle, rows, y, stride, add);
}

// ------------------------------------------------------------------------------------------------
// attention

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
  float factor = 1 / sqrtf(squares / n + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

void rotate(float* x, const float* cosine, const float* sine, int64_t d) {
  for (int64_t i = 0; i < d / 2; i++) {
    float a = x[i], b = x[i + d / 2];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + d / 2] = b * cosine[i] + a * sine[i];
  }
}

void store(const float* x, int64_t n, int64_t kind, void* held, void* scales, int64_t row) {
  if (kind == F32) memcpy((float*)held + row * n, x, n * sizeof(float));
  if (kind == F16)
    for (int64_t i = 0; i < n; i++) ((Half*)held)[row * n + i] = to_half(x[i]);
  if (kind == BF16)
    for (int64_t i = 0; i < n; i++) ((Brain*)held)[row * n + i] = to_brain(x[i]);
  if (kind == INT8) {  // as kv_cache.functions.quantize_rows does it
    float s = largest(x, n) / 126.5f;
    Brain scale = to_brain(s < 1e-30f ? 1e-30f : s);
    ((Brain*)scales)[row] = scale;
    for (int64_t i = 0; i < n; i++) {
      float v = nearbyintf(x[i] / widen(scale));
      ((int8_t*)held)[row * n + i] = int8_t(v > 127 ? 127 : v > -127 ? v : -127);
    }
  }
}

// Asks for rows that are read next: a chunk is too short for the CPU to notice by itself where it
// goes on.
template <class T>
inline void fetch(const T* rows, int64_t count, int64_t d) {
  for (int64_t i = 0; i < count * d * int64_t(sizeof(T)); i += 64)
    __builtin_prefetch((const char*)rows + i);
}

// y[m] = the sum of n rows of v [n, d], each times its weight s[m]. next: rows that are read after
// them.
template <int M, class T>
inline void weigh(const float (*s)[CHUNK], const T* v, const T* next, int64_t n, int64_t d,
                  float* y) {
  int64_t i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) {
    Floats t[M][4] = {};
    for (int64_t p = 0; p < n; p++) {
      if (i == 0) fetch(next + p * d, 1, d);
      for (int j = 0; j < 4; j++) {
        Floats x = load(v + p * d + i + j * LANES);
        for (int m = 0; m < M; m++) t[m][j] += s[m][p] * x;
      }
    }
    for (int m = 0; m < M; m++) memcpy(y + m * d + i, t[m], sizeof t[m]);
  }
  for (; i < d; i++)
    for (int m = 0; m < M; m++) {
      y[m * d + i] = 0;
      for (int64_t p = 0; p < n; p++) y[m * d + i] += s[m][p] * widen(v[p * d + i]);
    }
}

// s[m] = the scores of n rows of k [n, d] for query m: q[m] . k. next: rows that are read after
// them.
template <int M, class T>
inline void score(const float* q, const T* k, const T* next, int64_t n, int64_t d,
                  float (*s)[CHUNK]) {
  int64_t p = 0;
  for (; p + 4 <= n; p += 4) {
    fetch(next + p * d, 4, d);
    Floats t[M][4] = {};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
      Floats row[4];
      for (int j = 0; j < 4; j++) row[j] = load(k + (p + j) * d + i);
      for (int m = 0; m < M; m++) {
        Floats x = load(q + m * d + i);
        for (int j = 0; j < 4; j++) t[m][j] += row[j] * x;
      }
    }
    for (int m = 0; m < M; m++) sum4(t[m], s[m] + p);
    for (; i < d; i++)
      for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) s[m][p + j] += q[m * d + i] * widen(k[(p + j) * d + i]);
  }
  for (; p < n; p++) {
    float y[M];
    dot<M>(k + p * d, q, d, y);
    for (int m = 0; m < M; m++) s[m][p] = y[m];
  }
}

// Softmax attention of `heads` queries over `n` positions: unnormalized sums [heads, d], and each
// head's largest score and total.
template <int64_t D, class T>
void attend(const float* q, int64_t heads, const T* k, const T* v, const Brain* k_scale,
            const Brain* v_scale, int64_t n, int64_t width, float* sums, float* peak,
            float* total) {
  const int64_t d = D ? D : width;
  const float factor = 1 / sqrtf(float(d));
  float scores[4][CHUNK];
  for (int64_t head = 0; head < heads; head += 4) {
    const int64_t many = heads - head < 4 ? heads - head : 4;
    const float* x = q + head * d;
    if (many == 4)
      score<4>(x, k, v, n, d, scores);
    else if (many == 3)
      score<3>(x, k, v, n, d, scores);
    else if (many == 2)
      score<2>(x, k, v, n, d, scores);
    else
      score<1>(x, k, v, n, d, scores);
    for (int64_t h = 0; h < many; h++) {
      float *s = scores[h], top = -INFINITY, sum = 0;
      for (int64_t p = 0; p < n; p++) s[p] *= k_scale ? factor * widen(k_scale[p]) : factor;
#pragma omp simd reduction(max : top)
      for (int64_t p = 0; p < n; p++) top = s[p] > top ? s[p] : top;
#pragma omp simd reduction(+ : sum)
      for (int64_t p = 0; p < n; p++) sum += s[p] = exponential(s[p] - top);
      peak[head + h] = top;
      total[head + h] = sum;
      if (v_scale)
        for (int64_t p = 0; p < n; p++) s[p] *= widen(v_scale[p]);
    }
    float* y = sums + head * d;
    if (many == 4)
      weigh<4>(scores, v, k + n * d, n, d, y);
    else if (many == 3)
      weigh<3>(scores, v, k + n * d, n, d, y);
    else if (many == 2)
      weigh<2>(scores, v, k + n * d, n, d, y);
    else
      weigh<1>(scores, v, k + n * d, n, d, y);
  }
}

template <class T>
void attend_width(const float* q, int64_t heads, const Held& held, int64_t at, int64_t n, int64_t d,
                  float* sums, float* peak, float* total) {
  const T *k = (const T*)held.k + at * d, *v = (const T*)held.v + at * d;
  const Brain* k_scale = held.k_scale ? (const Brain*)held.k_scale + at : nullptr;
  const Brain* v_scale = held.v_scale ? (const Brain*)held.v_scale + at : nullptr;
  auto run = d == 64 ? attend<64, T> : d == 128 ? attend<128, T> : attend<0, T>;
  run(q, heads, k, v, k_scale, v_scale, n, d, sums, peak, total);
}

// -------------------------------------------------------------------------------------------------
// the pass

void run(const Model& model, const Pass& pass) {
  const int64_t rows = pass.batch * pass.tokens, d = model.head_dim, width = model.width;
  const bool apart = pass.lengths;  // each row has a cache of its own
  auto length_of = [&](int64_t row) {
    return apart ? pass.lengths[row / pass.tokens] : pass.length;
  };
  auto held_of = [&](int64_t row, int64_t layer) -> const Held& {
    return pass.held[apart ? row / pass.tokens * model.layers + layer : layer];
  };
  auto chunks_of = [&](int64_t layer) {  // of the row that needs the most
    int64_t most = 0;
    for (int64_t row = 0; row < rows; row += pass.tokens) {
      int64_t held = length_of(row) + pass.tokens - held_of(row, layer).first;
      most = held > most ? held : most;
    }
    return (most + CHUNK - 1) / CHUNK;
  };
  int64_t most = width, wide = 0, ffn = 0, tasks = 0;
  for (int64_t i = 0; i < model.layers; i++) {
    const Layer& layer = model.layer[i];
    int64_t all = layer.q.outputs + layer.k.outputs + layer.v.outputs;
    wide = all > wide ? all : wide;
    ffn = layer.gate.outputs > ffn ? layer.gate.outputs : ffn;
    int64_t chunks = chunks_of(i);
    tasks = chunks * layer.q.outputs / d > tasks ? chunks * layer.q.outputs / d : tasks;
  }
  most = most > wide ? most : wide;
  most = most > ffn ? most : ffn;
  Input in(rows, most), middle(rows, most);
  std::vector<float> qkv(rows * wide), gate(rows * ffn), up(rows * ffn), cosine(rows * d / 2),
      sine(rows * d / 2);
  std::vector<float> sums(rows * tasks * d), peak(rows * tasks), total(rows * tasks);

#pragma omp parallel num_threads(pass.threads)
  {
    auto first_seen = [&](int64_t row,
                          const Held& held) {  // the first position that a row's token sees
      int64_t here = length_of(row) + row % pass.tokens,
              low = pass.pad ? pass.pad[row / pass.tokens] : 0;
      return held.window && here - held.window + 1 > low ? here - held.window + 1 : low;
    };
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      int64_t position =
          length_of(row) + row % pass.tokens - (pass.pad ? pass.pad[row / pass.tokens] : 0);
      for (int64_t i = 0; i < d / 2; i++) {
        float angle = float(position) * model.frequencies[i];
        cosine[row * d / 2 + i] = cosf(angle) * model.rope_scale;
        sine[row * d / 2 + i] = sinf(angle) * model.rope_scale;
      }
    }
    for (int64_t index = 0; index < model.layers; index++) {
      const Layer& layer = model.layer[index];
      const int64_t heads = layer.q.outputs / d, kv_heads = layer.k.outputs / d,
                    group = heads / kv_heads;
      const int64_t stride = (heads + 2 * kv_heads) * d, chunks = chunks_of(index);

#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; row++) {
        rms_norm(pass.x + row * width, layer.attention_norm, width, model.norm_eps,
                 &in.value[row * width]);
        in.prepare(row, width, kinds_of(layer.q) | kinds_of(layer.k) | kinds_of(layer.v));
      }
      apply(layer.q, in, middle, rows, qkv.data(), stride);
      apply(layer.k, in, middle, rows, qkv.data() + heads * d, stride);
      apply(layer.v, in, middle, rows, qkv.data() + (heads + kv_heads) * d, stride);
#pragma omp barrier

#pragma omp for schedule(static) collapse(2)
      for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads + 2 * kv_heads; head++) {
          float* x = &qkv[row * stride + head * d];
          const float* weight = head < heads ? layer.q_norm : layer.k_norm;
          if (head < heads + kv_heads) {
            if (weight) rms_norm(x, weight, d, model.norm_eps, x);
            rotate(x, &cosine[row * d / 2], &sine[row * d / 2], d);
          }
          if (head >= heads) {
            const Held& held = held_of(row, index);
            int64_t kv = (head - heads) % kv_heads, slot = apart ? 0 : row / pass.tokens,
                    at = length_of(row) + row % pass.tokens - held.first;
            bool key = head < heads + kv_heads;
            store(x, d, pass.kind, key ? held.k : held.v, key ? held.k_scale : held.v_scale,
                  (slot * kv_heads + kv) * held.capacity + at);
          }
        }
#pragma omp for schedule(dynamic) collapse(3)
      for (int64_t row = 0; row < rows; row++)
        for (int64_t kv = 0; kv < kv_heads; kv++)
          for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const Held& held = held_of(row, index);
            int64_t task = (row * chunks + chunk) * heads + kv * group;
            int64_t low = first_seen(row, held) - held.first,
                    high = length_of(row) + row % pass.tokens + 1 - held.first;
            low = low > chunk * CHUNK ? low : chunk * CHUNK;
            high = high < (chunk + 1) * CHUNK ? high : (chunk + 1) * CHUNK;
            int64_t slot = apart ? 0 : row / pass.tokens;
            int64_t at = (slot * kv_heads + kv) * held.capacity + low;
            const float* q = &qkv[row * stride + kv * group * d];
            if (high <= low)
              for (int64_t h = 0; h < group; h++)
                total[task + h] = -1;  // this row sees nothing of the chunk
            else {
              auto attend = pass.kind == F32    ? attend_width<float>
                            : pass.kind == F16  ? attend_width<Half>
                            : pass.kind == BF16 ? attend_width<Brain>
                                                : attend_width<int8_t>;
              attend(q, group, held, at, high - low, d, &sums[task * d], &peak[task], &total[task]);
            }
          }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t head = 0; head < heads; head++) {
          float *y = &in.value[(row * heads + head) * d], most = -INFINITY, sum = 0;
          for (int64_t c = 0; c < chunks; c++) {
            int64_t task = (row * chunks + c) * heads + head;
            if (total[task] != -1 && peak[task] > most) most = peak[task];
          }
          memset(y, 0, d * sizeof(float));
          for (int64_t c = 0; c < chunks; c++) {
            int64_t task = (row * chunks + c) * heads + head;
            if (total[task] == -1) continue;
            float factor = exponential(peak[task] - most);
            sum += factor * total[task];
            for (int64_t i = 0; i < d; i++) y[i] += factor * sums[task * d + i];
          }
          for (int64_t i = 0; i < d; i++) y[i] /= sum;
        }
        in.prepare(row, heads * d, kinds_of(layer.out));
      }
      apply(layer.out, in, middle, rows, pass.x, width, true);
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; row++) {
        rms_norm(pass.x + row * width, layer.ffn_norm, width, model.norm_eps,
                 &in.value[row * width]);
        in.prepare(row, width, kinds_of(layer.gate) | kinds_of(layer.up));
      }
      const int64_t hidden = layer.gate.outputs;
      apply(layer.gate, in, middle, rows, gate.data(), hidden);
      apply(layer.up, in, middle, rows, up.data(), hidden);
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; row++) {
#pragma omp simd
        for (int64_t i = row * hidden; i < (row + 1) * hidden; i++)
          in.value[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
        in.prepare(row, hidden, kinds_of(layer.down));
      }
      apply(layer.down, in, middle, rows, pass.x, width, true);
#pragma omp barrier
    }
    const int64_t kept = pass.batch * pass.keep;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < kept; row++) {
      int64_t from = (row / pass.keep + 1) * pass.tokens - pass.keep + row % pass.keep;
      rms_norm(pass.x + from * width, model.norm, width, model.norm_eps, &in.value[row * width]);
      in.prepare(row, width, kinds_of(model.head));
    }
    apply(model.head, in, middle, kept, pass.logits, model.head.outputs);
  }
}

}  // namespace

extern "C" {

// What structs.py compares with its own before the first call.
extern const int64_t struct_sizes[5];
const int64_t struct_sizes[5] = {sizeof(Linear), sizeof(Layer), sizeof(Model), sizeof(Held),
                                 sizeof(Pass)};

void decode(const Model* model, const Pass* pass) { run(*model, *pass); }
}
