// A dynamic int8 linear layer in one call: y = (sum_k (q[k] - zero) w[k] * scale) * step + bias.
//
// Threads share out the rows to quantize them, then blocks of rows and outputs. Sums are exact
// integers, and what follows is one IEEE operation at a time (compiled without contraction), so
// neither the instruction set nor the number of threads or rows changes a bit.
// quantize/nn/int8_kernels.py says the same in PyTorch.

#include "gemm.h"

enum Kind : int64_t { F32, F16, BF16 };

struct Layer {
  int64_t inputs, outputs;
  const int8_t* packed;  // [panels][padded inputs / 4][16][4]
  const int32_t* sums;   // of the weights of an output [16 panels]
};

struct Call {
  int64_t rows, threads;
  const float *scale, *bias;  // [outputs]; bias may be null
  const void* x;              // [rows, inputs]
  void* y;                    // [rows, outputs]
};

namespace {

// ------------------------------------------------------------------------------------------------
// results

inline void store_some(Floats y, float* to, int64_t n) { memcpy(to, &y, n * sizeof(float)); }
inline void store_some(Floats y, Brain* to, int64_t n) {
  typedef uint32_t Unsigned __attribute__((vector_size(64)));
  typedef uint16_t Words __attribute__((vector_size(32)));
  const Unsigned b = (Unsigned)y;
  Unsigned rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  rounded = (Ints)(b & 0x7fffffff) > 0x7f800000 ? rounded * 0 + 0x7fc0 : rounded;
  const Words words = __builtin_convertvector(rounded, Words);
  memcpy(to, &words, n * sizeof(Brain));
}
inline void store_some(Floats y, Half* to, int64_t n) {
#if defined(__AVX512F__)
  const __m256i words = _mm512_cvtps_ph((__m512)y, 0);
  memcpy(to, &words, n * sizeof(Half));
#else
  for (int64_t i = 0; i < n; i++) to[i] = to_half(y[i]);
#endif
}

// What becomes of the sums of a call.
template <class T>
struct Results {
  const Layer& layer;
  const Call& call;
  const Row* rows;
  T* y;

  // What the 16 outputs of a panel share.
  struct Panel {
    const Row* rows;
    T* to;
    int64_t outputs, many;
    Floats scale, bias = {};
    Ints sums;
    bool has_bias;

    void put(const int32_t* from, int64_t apart, int64_t row, int64_t count) const {
      for (int64_t r = row; r < row + count; r++, from += apart) {
        Ints sum;
        memcpy(&sum, from, sizeof sum);
        const Ints exact = sum - rows[r].zero * sums;
        Floats y = __builtin_convertvector(exact, Floats) * scale * rows[r].step;
        if (has_bias) y = y + bias;
        if (many == LANES)
          store_some(y, to + r * outputs, LANES);
        else
          store_some(y, to + r * outputs, many);
      }
    }
  };

  Panel panel(int64_t panel) const {
    const int64_t at = panel * LANES, left = layer.outputs - at;
    Panel shared = {rows, y + at, layer.outputs, left < LANES ? left : LANES};
    shared.scale = load_part(call.scale + at, shared.many);
    shared.has_bias = call.bias;
    if (call.bias) shared.bias = load_part(call.bias + at, shared.many);
    memcpy(&shared.sums, layer.sums + at, sizeof shared.sums);
    return shared;
  }
};

// ------------------------------------------------------------------------------------------------
// a call

thread_local Scratch scratch;

template <class T>
struct Job {
  const Layer& layer;
  const Call& call;
  int64_t padded, stride, panels, chunk;
  uint8_t* q;
  Row* rows;

  Job(const Layer& layer, const Call& call) : layer(layer), call(call) {
    padded = up(layer.inputs, 64);
    stride = row_stride(layer.inputs);
    panels = up(layer.outputs, LANES) / LANES;
    chunk = rows_at_once(stride, call.rows);
  }

  bool open() {
    const int64_t bytes = up(chunk, 32) * stride;
    if (!scratch.reserve(bytes + chunk * sizeof(Row))) return false;
    q = scratch.memory;
    rows = (Row*)(q + bytes);
    return true;
  }

  void quantize(int64_t first, int64_t count, int64_t thread, int64_t threads) const {
    const T* x = (const T*)call.x + first * layer.inputs;
    const int64_t end = count * (thread + 1) / threads;
    for (int64_t i = count * thread / threads; i < end; i++)
      rows[i] = quantize_row(x + i * layer.inputs, layer.inputs, padded, q + i * stride);
  }

  void run(int64_t thread, int64_t threads) const {
    for (int64_t first = 0; first < call.rows; first += chunk) {
      const int64_t count = call.rows - first < chunk ? call.rows - first : chunk;
      quantize(first, count, thread, threads);
      barrier(threads);
      const Results<T> results = {layer, call, rows, (T*)call.y + first * layer.outputs};
      const Gemm<Results<T>> gemm = {q, layer.packed, stride, padded, panels, results};
      gemm.share(count, thread, threads);
      barrier(threads);
    }
  }
};

template <class T>
int run(const Layer& layer, const Call& call) {
  Job<T> job(layer, call);
  if (!job.open()) return 1;
#if defined(_OPENMP)
  if (call.threads > 1) {
#pragma omp parallel num_threads(int(call.threads))
    job.run(omp_get_thread_num(), omp_get_num_threads());
    return 0;
  }
#endif
  job.run(0, 1);
  return 0;
}

}  // namespace

extern "C" {

// What int8.py compares with its own before the first call.
extern const int64_t layer_bytes;
const int64_t layer_bytes = sizeof(Layer);

// 0 if this process may run the code.
int open_library() { return open_matrices(); }

// weight [outputs, inputs] to `packed` and `sums` as in Layer.
void pack(const int8_t* weight, int64_t outputs, int64_t inputs, int8_t* packed, int32_t* sums) {
  const int64_t panels = up(outputs, LANES) / LANES, padded = up(inputs, 64);
  memset(packed, 0, panels * LANES * padded);
  memset(sums, 0, panels * LANES * sizeof(int32_t));
  for (int64_t output = 0; output < outputs; output++) {
    const int8_t* from = weight + output * inputs;
    int8_t* to = packed + output / LANES * LANES * padded + output % LANES * 4;
    for (int64_t i = 0; i < inputs; i += 4) {
      const int64_t many = inputs - i < 4 ? inputs - i : 4;
      memcpy(to + LANES * i, from + i, many);
    }
    for (int64_t i = 0; i < inputs; i++) sums[output] += from[i];
  }
}

// 0, or 1 where there is no memory.
int linear(const Layer* layer, int64_t rows, int64_t kind, int64_t threads, const float* scale,
           const float* bias, const void* x, void* y) {
  const Call call = {rows, threads, scale, bias, x, y};
  switch (kind) {
    case F32:
      return run<float>(*layer, call);
    case F16:
      return run<Half>(*layer, call);
    default:
      return run<Brain>(*layer, call);
  }
}
}
