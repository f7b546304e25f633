// Dynamic int8 linear layers that take the same rows:
// y = (sum_k (q[k] - zero) w[k] * scale) * step + sum of a few channels in float + bias, and an
// activation of it.
//
// Where there are many rows, each thread quantizes its own and multiplies them by all weights, as
// many at a time as its cache holds; where there are few, threads share out the rows to quantize
// them, then the outputs. Sums are exact integers, and what follows is one IEEE operation at a time
// (compiled without contraction), so neither the instruction set nor the number of threads or rows
// changes a bit. quantize/nn/int8_kernels.py says the same in PyTorch.

#pragma once
#include "floats.h"
#include "gemm.h"

struct Layer {
  int64_t inputs, outputs;
  const int8_t* packed;       // [panels][padded inputs / 4][16][4]
  const int32_t* sums;        // of the weights of an output [16 panels]
  const float *scale, *bias;  // [outputs]; bias may be null
  const float* factor;        // [inputs], of the numbers that are quantized; may be null
  int64_t outliers;           // channels that count in float, at most MOST_OUTLIERS
  const int64_t* channels;    // [outliers]
  const float* kept;          // their weights [outliers][16 panels]
  int64_t activation;         // of the outputs; see elementary.h
  const float* tails;         // of GELU [4][32], or null
};

// Layers that read the same rows; those of several have neither factors nor outliers.
struct Call {
  const Layer* const* layers;
  int64_t count, rows, threads;
  const void* x;       // [rows, inputs]
  int64_t apart;       // numbers from one row of x to the next
  void* const* y;      // [rows, outputs] of each layer
  int64_t how;         // what becomes of results and `other`; see How
  const float* other;  // [rows, outputs] of a single layer of floats, or null
};

namespace {

constexpr int64_t MOST_OUTLIERS = 4;
constexpr int64_t HEIGHT = 32;           // rows of a block
constexpr int64_t NEAR_BYTES = 1 << 20;  // of weights that stay in the cache for every chunk,
constexpr int64_t NEAR_ROWS = 128;       // of this many rows; more pay for weights from far

// ------------------------------------------------------------------------------------------------
// results

template <class T>
inline void copy_some(const T& from, void* to, int64_t n) {
  if (n == LANES)
    memcpy(to, &from, sizeof from);
  else
    memcpy(to, &from, n * sizeof from / LANES);
}
inline void store_some(Floats y, float* to, int64_t n) { store(y, to, n); }
inline void store_some(Floats y, Brain* to, int64_t n) {
  Brain all[LANES];
  store(y, all);
  copy_some(all, to, n);
}
inline void store_some(Floats y, Half* to, int64_t n) {
#if defined(__AVX512F__)
  copy_some(_mm512_cvtps_ph((__m512)y, 0), to, n);
#else
  for (int64_t i = 0; i < n; i++) to[i] = to_half(y[i]);
#endif
}

// A row as its results need it.
struct Quantized {
  Row row;
  float outlier[MOST_OUTLIERS];
};

// What becomes of the sums of a call.
template <class T, bool OUTLIERS>
struct Results {
  const Layer& layer;
  const Quantized* rows;
  T* y;
  int64_t how;
  const float* other;

  static constexpr int64_t TOGETHER = 4;

  // What the 16 outputs of a panel share.
  struct Panel {
    const Quantized* rows;
    T* to;
    int64_t outputs, many, outliers, activation, how;
    const float *tails, *other;
    Floats scale, bias, kept[MOST_OUTLIERS];
    Ints sums;

    void put(const int32_t* from, int64_t apart, int64_t row, int64_t count) const {
      switch (activation) {  // code of their own for the most frequent ones
        case NONE:
          return put_active(from, apart, row, count, NONE);
        case GELU:
          return put_active(from, apart, row, count, GELU);
        default:
          return put_active(from, apart, row, count, activation);
      }
    }
    [[gnu::always_inline]] void put_active(const int32_t* from, int64_t apart, int64_t row,
                                           int64_t count, int64_t activation) const {
      const Panel own = *this;  // that no result is written to, so it stays in registers
      for (int64_t r = row; r < row + count; r++, from += apart) {
        const int64_t at = r * own.outputs;
        Floats y = activated(own.result_of(from, own.rows[r]), activation, own.tails);
        if (own.how != ALONE) y = joined(y, own.how, load_some(own.other + at, own.many));
        store_some(y, own.to + at, own.many);
      }
    }
    Floats result_of(const int32_t* from, const Quantized& q) const {
      const Ints sum = load_vector<Ints>(from);
      const Ints exact = sum - q.row.zero * sums;
      Floats result = to_floats(exact) * scale * q.row.step;
      if (OUTLIERS)
        for (int64_t i = 0; i < outliers; i++) result = result + kept[i] * q.outlier[i];
      return result + bias;
    }
  };

  Panel panel(int64_t panel) const {
    const int64_t at = panel * LANES, left = layer.outputs - at;
    const bool whole = left >= LANES;
    Panel shared = {rows, y + at, layer.outputs, whole ? LANES : left};
    shared.outliers = layer.outliers, shared.activation = layer.activation,
    shared.tails = layer.tails, shared.how = how, shared.other = other ? other + at : other;
    shared.scale = whole ? load(layer.scale + at) : load_part(layer.scale + at, left);
    shared.bias = -Floats{};  // adding it changes nothing, not even the sign of a zero
    if (layer.bias) shared.bias = whole ? load(layer.bias + at) : load_part(layer.bias + at, left);
    shared.sums = load_vector<Ints>(layer.sums + at);
    if (OUTLIERS)
      for (int64_t i = 0; i < layer.outliers; i++)
        shared.kept[i] = load(layer.kept + i * up(layer.outputs, LANES) + at);
    return shared;
  }
};

// ------------------------------------------------------------------------------------------------
// a call

template <class T>
struct Job {
  const Layer& layer;  // the first, which says how rows are quantized
  const Call& call;
  int64_t padded, stride, chunk;
  bool own_rows;              // does each thread have rows of its own?
  uint8_t* memory = nullptr;  // of all_bytes

  explicit Job(const Call& call) : layer(*call.layers[0]), call(call) {
    padded = up(layer.inputs, 64);
    stride = row_stride(layer.inputs);
    int64_t panels = 0;
    for (int64_t i = 0; i < call.count; i++) panels += panels_of(*call.layers[i]);
    own_rows = call.rows >= HEIGHT * call.threads;
    const bool near = panels * LANES * padded <= NEAR_BYTES;
    chunk = near ? NEAR_ROWS : up(rows_at_once(stride, call.rows), HEIGHT);
    if (!own_rows) chunk = up(call.rows, HEIGHT);
  }

  static int64_t panels_of(const Layer& layer) { return up(layer.outputs, LANES) / LANES; }

  // Of a chunk of rows.
  int64_t bytes() const { return up(chunk * (stride + int64_t(sizeof(Quantized))), 64); }

  int64_t all_bytes() const { return bytes() * (own_rows ? call.threads : 1); }

  // Rows as bytes, and what else is known of them.
  struct Chunk {
    int64_t first, count;
    uint8_t* q;
    Quantized* rows;
  };
  Chunk chunk_of(int64_t first, int64_t count, int64_t place) const {
    uint8_t* q = memory + place * bytes();
    return {first, count, q, (Quantized*)(q + chunk * stride)};
  }

  void quantize(const Chunk& to, int64_t low, int64_t high) const {
    const T* x = (const T*)call.x + (to.first + low) * call.apart;
    for (int64_t i = low; i < high; i++, x += call.apart) {
      uint8_t* q = to.q + i * stride;
      to.rows[i].row = layer.factor
                           ? quantize_row(Scaled<T>{x, layer.factor}, layer.inputs, padded, q)
                           : quantize_row(Plain<T>{x}, layer.inputs, padded, q);
      for (int64_t o = 0; o < layer.outliers; o++)
        to.rows[i].outlier[o] = widen(x[layer.channels[o]]);
    }
  }

  template <bool OUTLIERS>
  void multiply(const Chunk& of, int64_t at, int64_t thread, int64_t threads) const {
    typedef Results<T, OUTLIERS> Sink;
    const Layer& own = *call.layers[at];
    const int64_t before = of.first * own.outputs;
    const float* other = call.other ? call.other + before : nullptr;
    const Sink sink = {own, of.rows, (T*)call.y[at] + before, call.how, other};
    const Gemm<Sink> gemm = {of.q, own.packed, stride, own.inputs, padded, panels_of(own), sink};
    gemm.share(of.count, thread, threads);
  }
  void multiply(const Chunk& of, int64_t thread, int64_t threads) const {
    for (int64_t at = 0; at < call.count; at++)
      layer.outliers ? multiply<true>(of, at, thread, threads)
                     : multiply<false>(of, at, thread, threads);
  }

  void run(int64_t thread, int64_t threads) const {
    own_rows ? run_own(thread, threads) : run_shared(thread, threads);
  }

  void run_own(int64_t thread, int64_t threads) const {
    const int64_t blocks = up(call.rows, HEIGHT) / HEIGHT;
    int64_t end = blocks * (thread + 1) / threads * HEIGHT;
    end = end < call.rows ? end : call.rows;
    for (int64_t first = blocks * thread / threads * HEIGHT; first < end; first += chunk) {
      const int64_t count = end - first < chunk ? end - first : chunk;
      const Chunk own = chunk_of(first, count, thread);
      quantize(own, 0, count);
      multiply(own, 0, 1);
    }
  }

  void run_shared(int64_t thread, int64_t threads) const {
    const Chunk all = chunk_of(0, call.rows, 0);
    quantize(all, call.rows * thread / threads, call.rows * (thread + 1) / threads);
    barrier(threads);
    multiply(all, thread, threads);
  }
};

}  // namespace
