// All steps of one direction of an int8 LSTM or GRU layer in one call. What the inputs add to the
// gates was computed before, for all steps at once.
//
// Threads share out the units. Each quantizes the whole state of the step before, so that one
// barrier a step is enough (two with a projection). Sums are exact integers, and what follows is
// one IEEE operation at a time (compiled without contraction), so neither the instruction set nor
// the number of threads or rows changes a bit. quantize/nn/int8_steps.py says the same in PyTorch.

#include "elementary.h"
#include "gemm.h"

// A product of int8 weights, its outputs in blocks of `parts` panels: the gates of 16 units.
struct Product {
  int64_t inputs;
  const int8_t* packed;       // [blocks][parts] panels
  const int32_t* sums;        // of the weights of an output [blocks][parts][16]
  const float *scale, *bias;  // [blocks][parts][16]; bias may be null
};

struct Layer {
  int64_t gates, units, width;  // gates: 4 (LSTM) or 3 (GRU); width: of the state that recurs
  Product recurrent;            // [width] -> [gates][units]
  Product projection;           // [units] -> [width]; packed is null without one
};

struct Call {
  int64_t steps, rows, reverse, threads;  // rows: of a step, the most
  const int64_t* batches;                 // rows of each step, or null: all
  const float* x;                         // [all rows, gates, units]: what the inputs add
  float* y;                               // [all rows, width]
  float* h;                               // [rows, width]: the state before, and after
  float* c;                               // [rows, units]: the LSTM's cells before, and after
  float* full;                            // [rows, units]: room for what is projected
};

namespace {

constexpr int64_t MOST_AT_ONCE = 32;  // rows of a block
constexpr int64_t TILE_ROWS = 8;      // fewer are multiplied without tiles

// ------------------------------------------------------------------------------------------------
// products

struct Rows {  // quantized, of one thread
  uint8_t* q;
  Row* rows;
  int64_t stride;
};

// parts[p][r]: 16 outputs of each panel of a block for `many` rows from `first` on, up to
// MOST_AT_ONCE.
typedef Floats Parts[MOST_AT_ONCE];

template <int P>
inline void finish(const Product& product, int64_t panel, const Row* rows, int64_t many,
                   const int32_t* from, Parts* parts, int64_t first) {
  for (int p = 0; p < P; p++) {
    const int64_t at = (panel + p) * LANES;
    const Ints sums = load_vector<Ints>(product.sums + at);
    const Floats scale = load(product.scale + at);
    for (int64_t r = 0; r < many; r++) {
      const Ints sum = load_vector<Ints>(from + (r * P + p) * LANES);
      const Ints exact = sum - rows[r].zero * sums;
      Floats y = to_floats(exact) * scale * rows[r].step;
      if (product.bias) y = y + load(product.bias + at);
      parts[p][first + r] = y;
    }
  }
}

// The P panels from `panel` on.
template <int P>
void multiply(const Product& product, int64_t panel, const Rows& q, int64_t row, int64_t many,
              bool tiles, Parts* parts) {
  const int64_t padded = up(product.inputs, 64), size = 16 * padded;
  const int8_t* w = product.packed + panel * size;
  const uint8_t* from = q.q + row * q.stride;
  alignas(64) int32_t sums[MOST_AT_ONCE * 4 * LANES];
#if defined(QUANTIZE_TILES)
  if (tiles) {
    constexpr int SIDE = P <= 2 ? P : 2;
    if (many > 16)
      multiply_tiles<2, SIDE>(from, q.stride, w, size, padded, sums);
    else
      multiply_tiles<1, SIDE>(from, q.stride, w, size, padded, sums);
    return finish<SIDE>(product, panel, q.rows + row, many, sums, parts, 0);
  }
#endif
  for (int64_t r = 0; r < many; r += MOST_ROWS) {
    const int64_t some = many - r < MOST_ROWS ? many - r : MOST_ROWS;
    multiply_rows<P>(some, from + r * q.stride, q.stride, w, size, up(product.inputs, 4), sums);
    finish<P>(product, panel, q.rows + row + r, some, sums, parts, r);
  }
}

// All G panels of a block, as many at a time as the registers or tiles hold.
template <int G>
void multiply_block_of(const Product& product, int64_t block, const Rows& q, int64_t row,
                       int64_t many, bool tiles, Parts* parts) {
  int64_t first = block * G;
  if (tiles || MOST_PANELS == 2) {
    for (int g = 0; g + 2 <= G; g += 2)
      multiply<2>(product, first + g, q, row, many, tiles, parts + g);
    if (G % 2) multiply<1>(product, first + G - 1, q, row, many, tiles, parts + G - 1);
  } else if (MOST_PANELS >= G) {
    multiply<MOST_PANELS >= G ? G : 1>(product, first, q, row, many, tiles, parts);
  } else {
    for (int g = 0; g < G; g++) multiply<1>(product, first + g, q, row, many, tiles, parts + g);
  }
}

// ------------------------------------------------------------------------------------------------
// a call

thread_local Scratch scratch;

inline Floats load_units(const float* x, int64_t many) {
  return many == LANES ? load(x) : load_part(x, many);
}
inline void store_units(Floats y, float* to, int64_t many) { memcpy(to, &y, many * sizeof(float)); }

struct Job {
  const Layer& layer;
  const Call& call;
  const float* before = nullptr;  // outputs of the step before,
  int64_t known = 0;              // and how many rows it had

  Job(const Layer& layer, const Call& call) : layer(layer), call(call) {}

  int64_t batch(int64_t step) const { return call.batches ? call.batches[step] : call.rows; }

  const float* state(int64_t row) const {
    return row < known ? before + row * layer.width : call.h + row * layer.width;
  }

  // LSTM: c = f c + i g, h = o tanh(c).
  void lstm(const float* x, int64_t at, int64_t row, int64_t many, const Parts* parts, int64_t r,
            float* to) const {
    Floats gate[4];
    for (int g = 0; g < 4; g++) gate[g] = load_units(x + g * layer.units, many) + parts[g][r];
    float* cell = call.c + row * layer.units + at;
    const Floats kept = sigmoid(gate[1]) * load_units(cell, many);
    const Floats c = kept + sigmoid(gate[0]) * hyperbolic(gate[2]);
    store_units(c, cell, many);
    store_units(sigmoid(gate[3]) * hyperbolic(c), to, many);
  }

  // GRU: n = tanh(x_n + r h_n), h = n + z (h - n).
  void gru(const float* x, int64_t at, int64_t row, int64_t many, const Parts* parts, int64_t r,
           float* to) const {
    const Floats reset = sigmoid(load_units(x, many) + parts[0][r]);
    const Floats update = sigmoid(load_units(x + layer.units, many) + parts[1][r]);
    const Floats fresh = load_units(x + 2 * layer.units, many);
    const Floats n = hyperbolic(fresh + reset * parts[2][r]);
    const Floats h = load_units(state(row) + at, many);
    store_units(n + update * (h - n), to, many);
  }

  Rows quantize(const Product& product, uint8_t* memory, int64_t rows, const float* full) const {
    Rows q = {memory, nullptr, row_stride(product.inputs)};
    q.rows = (Row*)(memory + up(rows, MOST_AT_ONCE) * q.stride);
    const int64_t padded = up(product.inputs, 64);
    for (int64_t r = 0; r < rows; r++) {
      const float* from = full ? full + r * product.inputs : state(r);
      q.rows[r] = quantize_row(from, product.inputs, padded, q.q + r * q.stride);
    }
    return q;
  }

  // This thread's units of one step. first: the step's first row among all.
  template <int G>
  void step(int64_t first, int64_t rows, uint8_t* memory, int64_t thread, int64_t threads,
            bool tiles) const {
    const Rows q = quantize(layer.recurrent, memory, rows, nullptr);
    const int64_t blocks = up(layer.units, LANES) / LANES, end = blocks * (thread + 1) / threads;
    float* y = call.full ? call.full : call.y + first * layer.width;
    Parts parts[G];
    for (int64_t block = blocks * thread / threads; block < end; block++) {
      const int64_t at = block * LANES;
      const int64_t many = layer.units - at < LANES ? layer.units - at : LANES;
      for (int64_t row = 0; row < rows; row += MOST_AT_ONCE) {
        const int64_t some = rows - row < MOST_AT_ONCE ? rows - row : MOST_AT_ONCE;
        multiply_block_of<G>(layer.recurrent, block, q, row, some, tiles, parts);
        for (int64_t r = 0; r < some; r++) {
          const float* x = call.x + (first + row + r) * G * layer.units + at;
          float* to = y + (row + r) * layer.units + at;
          if (G == 4)
            lstm(x, at, row + r, many, parts, r, to);
          else
            gru(x, at, row + r, many, parts, r, to);
        }
      }
    }
  }

  // This thread's outputs of the projection of one step.
  void project(int64_t first, int64_t rows, uint8_t* memory, int64_t thread, int64_t threads,
               bool tiles) const {
    const Rows q = quantize(layer.projection, memory, rows, call.full);
    const int64_t blocks = up(layer.width, LANES) / LANES, end = blocks * (thread + 1) / threads;
    Parts parts[1];
    for (int64_t block = blocks * thread / threads; block < end; block++) {
      const int64_t at = block * LANES;
      const int64_t many = layer.width - at < LANES ? layer.width - at : LANES;
      for (int64_t row = 0; row < rows; row += MOST_AT_ONCE) {
        const int64_t some = rows - row < MOST_AT_ONCE ? rows - row : MOST_AT_ONCE;
        multiply_block_of<1>(layer.projection, block, q, row, some, tiles, parts);
        for (int64_t r = 0; r < some; r++)
          store_units(parts[0][r], call.y + (first + row + r) * layer.width + at, many);
      }
    }
  }

  int64_t scratch_bytes() const {
    const int64_t widest = layer.width > layer.units ? layer.width : layer.units;
    return up(call.rows, MOST_AT_ONCE) * (row_stride(widest) + sizeof(Row));
  }

  // The steps of one thread. `memory`: of this thread.
  void run(uint8_t* memory, int64_t thread, int64_t threads) {
    const bool tiles = uses_tiles();
#if defined(QUANTIZE_TILES)
    if (tiles) open_tiles();
#endif
    int64_t first = 0;
    if (call.reverse)
      for (int64_t s = 0; s < call.steps; s++) first += batch(s);
    for (int64_t i = 0; i < call.steps; i++) {
      const int64_t s = call.reverse ? call.steps - 1 - i : i, rows = batch(s);
      if (call.reverse) first -= rows;
      if (layer.gates == 4)
        step<4>(first, rows, memory, thread, threads, tiles);
      else
        step<3>(first, rows, memory, thread, threads, tiles);
      barrier(threads);
      if (call.full) {
        project(first, rows, memory, thread, threads, tiles);
        barrier(threads);
      }
      before = call.y + first * layer.width, known = rows;
      if (!call.reverse) first += rows;
    }
#if defined(QUANTIZE_TILES)
    if (tiles) close_tiles();
#endif
  }

  bool uses_tiles() const {
#if defined(QUANTIZE_TILES)
    return call.rows >= TILE_ROWS;
#else
    return false;
#endif
  }

  // The last output of each row becomes its state.
  void keep_states() const {
    int64_t first = 0;
    for (int64_t s = 0; s < call.steps; s++) {
      const int64_t rows = batch(s), after = s + 1 < call.steps ? batch(s + 1) : 0;
      const int64_t low = call.reverse ? 0 : after, high = call.reverse && s ? 0 : rows;
      for (int64_t r = low; r < high; r++)
        memcpy(call.h + r * layer.width, call.y + (first + r) * layer.width,
               layer.width * sizeof(float));
      first += rows;
    }
  }
};

}  // namespace

extern "C" {

// What recurrent.py compares with its own before the first call.
extern const int64_t layer_bytes, call_bytes;
const int64_t layer_bytes = sizeof(Layer);
const int64_t call_bytes = sizeof(Call);

// 0 if this process may run the code.
int open_library() { return open_matrices(); }

// 0, or 1 where there is no memory.
int steps(const Layer* layer, const Call* call) {
  const Job job(*layer, *call);
  const int64_t bytes = up(job.scratch_bytes(), 64);
  if (!scratch.reserve(bytes * call->threads)) return 1;
  uint8_t* memory = scratch.memory;
  if (call->threads > 1) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(int(call->threads))
    {
      const int64_t thread = omp_get_thread_num();
      Job(*layer, *call).run(memory + thread * bytes, thread, omp_get_num_threads());
    }
#else
    Job(*layer, *call).run(memory, 0, 1);
#endif
  } else {
    Job(*layer, *call).run(memory, 0, 1);
  }
  job.keep_states();
  return 0;
}
}
