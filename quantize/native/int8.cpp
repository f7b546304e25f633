// A dynamic int8 linear layer in one call: y = (sum_k (q[k] - zero) w[k] * scale) * step + bias.
//
// Threads share out the rows to quantize them, then blocks of rows and outputs. Sums are exact
// integers, and what follows is one IEEE operation at a time (compiled without contraction), so
// neither the instruction set nor the number of threads or rows changes a bit.
// quantize/nn/int8_kernels.py says the same in PyTorch.

#include "integers.h"
#include "rows.h"

#include <cstdlib>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(QUANTIZE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

constexpr int64_t CHUNK_BYTES =
    1 << 19;  // of quantized rows at a time, so that the products find them in the cache

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

// What the 16 outputs of a panel share.
struct Panel {
  int64_t many;
  Floats scale, bias = {};
  Ints sums;
  bool has_bias;

  Panel(const Layer& layer, const Call& call, int64_t panel) {
    const int64_t at = panel * LANES;
    many = layer.outputs - at < LANES ? layer.outputs - at : LANES;
    scale = load_part(call.scale + at, many);
    has_bias = call.bias;
    if (has_bias) bias = load_part(call.bias + at, many);
    memcpy(&sums, layer.sums + at, sizeof sums);
  }

  template <class T>
  void finish(const int32_t* from, const Row& row, T* to) const {
    Ints sum;
    memcpy(&sum, from, sizeof sum);
    Floats y = __builtin_convertvector(sum - row.zero * sums, Floats) * scale * row.step;
    if (has_bias) y = y + bias;
    if (many == LANES)
      store_some(y, to, LANES);
    else
      store_some(y, to, many);
  }
};

// ------------------------------------------------------------------------------------------------
// a call

struct Scratch {  // of a thread that calls; it grows
  uint8_t* memory = nullptr;
  size_t size = 0;
  bool reserve(size_t bytes) {
    if (bytes <= size) return true;
    free(memory);
    memory = (uint8_t*)aligned_alloc(64, up(bytes, 4096));
    size = memory ? bytes : 0;
    return memory;
  }
  ~Scratch() { free(memory); }
};
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
    stride = padded / 64 % 2
                 ? padded
                 : padded + 64;  // else the lines of 16 rows share few places of the cache
    panels = up(layer.outputs, LANES) / LANES;
    const int64_t most = CHUNK_BYTES / stride / 32 * 32;
    chunk = most < 32 ? 32 : most;
    chunk = call.rows < chunk ? call.rows : chunk;
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

  // 16 P outputs of all rows from `low` to `high` of a chunk.
  template <int P>
  void outputs(int64_t first, int64_t low, int64_t high, int64_t panel, bool tiles) const {
    const Panel shared[4] = {{layer, call, panel},
                             {layer, call, P > 1 ? panel + 1 : panel},
                             {layer, call, P > 2 ? panel + 2 : panel},
                             {layer, call, P > 2 ? panel + 3 : panel}};
    const int8_t* w = layer.packed + panel * 16 * padded;
    T* y = (T*)call.y + first * layer.outputs + panel * LANES;
    alignas(64) int32_t sums[32 * 32];
    for (int64_t row = low; row < high;) {
      int64_t many = multiply<P>(row, high - row, w, tiles, sums);
      for (int64_t r = 0; r < many; r++)
        for (int p = 0; p < P; p++)
          shared[p].finish(sums + (r * P + p) * 16, rows[row + r],
                           y + (row + r) * layer.outputs + p * LANES);
      row += many;
    }
  }

  // Sums of the next rows; returns of how many.
  template <int P>
  int64_t multiply(int64_t row, int64_t left, const int8_t* w, bool tiles, int32_t* sums) const {
    const uint8_t* from = q + row * stride;
#if defined(QUANTIZE_TILES)
    if (tiles && left > 16) {
      multiply_tiles<2, P <= 2 ? P : 2>(from, stride, w, 16 * padded, padded, sums);
      return left < 32 ? left : 32;
    }
    if (tiles) {
      multiply_tiles<1, P <= 2 ? P : 2>(from, stride, w, 16 * padded, padded, sums);
      return left;
    }
#endif
    const int64_t many = left < MOST_ROWS ? left : MOST_ROWS;
    multiply_rows<P>(many, from, stride, w, 16 * padded, padded, sums);
    return many;
  }

  void multiply_share(int64_t first, int64_t count, int64_t thread, int64_t threads) const {
    bool tiles = false;
    int64_t most = MOST_PANELS, height = up(count, 32);
#if defined(QUANTIZE_TILES)
    tiles = count >= TILE_ROWS;
    if (tiles) most = 2, open_tiles();
#endif
    const int64_t groups = (panels + most - 1) / most;
    if (groups < 4 * threads) height = 32;  // few outputs: share out the rows too
    const int64_t blocks = (count + height - 1) / height, tasks = groups * blocks;
    const int64_t end = tasks * (thread + 1) / threads;
    for (int64_t task = tasks * thread / threads; task < end; task++) {
      const int64_t low = task % blocks * height, panel = task / blocks * most;
      const int64_t high = low + height < count ? low + height : count;
      const int64_t many = panels - panel < most ? panels - panel : most;
      if (many == 4)
        outputs<MOST_PANELS >= 4 ? 4 : 1>(first, low, high, panel, tiles);
      else if (many == 2)
        outputs<2>(first, low, high, panel, tiles);
      else
        for (int64_t p = 0; p < many; p++) outputs<1>(first, low, high, panel + p, tiles);
    }
#if defined(QUANTIZE_TILES)
    if (tiles) close_tiles();
#endif
  }

  static constexpr int64_t TILE_ROWS = 8;

  void run(int64_t thread, int64_t threads) const {
    for (int64_t first = 0; first < call.rows; first += chunk) {
      const int64_t count = call.rows - first < chunk ? call.rows - first : chunk;
      quantize(first, count, thread, threads);
#if defined(_OPENMP)
      if (threads > 1) {
#pragma omp barrier
      }
#endif
      multiply_share(first, count, thread, threads);
#if defined(_OPENMP)
      if (threads > 1) {
#pragma omp barrier
      }
#endif
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
int open_library() {
#if defined(QUANTIZE_TILES)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return int(syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA));
#else
  return 0;
#endif
}

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
