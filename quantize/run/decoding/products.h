// Linear layers on a few rows or many. What a row gives depends on no other row, and on no thread.
//
// A thread computes the outputs of a range of its own for all rows. Integer sums are exact; floats
// are added in one order, whatever the number of rows.

#pragma once
#include "inputs.h"
#include "tiles.h"

namespace {

// ------------------------------------------------------------------------------------------------
// floats

// y[m][o] = w[o] . x[m] for M rows of inputs and O outputs, each `n` apart. A single row takes
// weights as fast as memory gives them, if they are asked for.
template <int M, int O, class W>
inline void dot(const W* w, const float* x, int64_t n, float (*y)[O]) {
  constexpr int64_t AHEAD = 3 * 4096 / sizeof(W);
  Floats total[M][O] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
#pragma GCC unroll 4
    for (int o = 0; o < O; o++) {
      if (M * O == 1) __builtin_prefetch(w + i + AHEAD);
      const Floats v = load(w + o * n + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) total[m][o] = multiply_add(v, load(x + m * n + i), total[m][o]);
    }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int o = 0; o < O; o++) {
      y[m][o] = sum(total[m][o]);
      for (int64_t k = i; k < n; k++) y[m][o] += widen(w[o * n + k]) * x[m * n + k];
    }
}

// Outputs whose sums, of 4 rows, fit the registers.
#if defined(__AVX512F__)
constexpr int FLOAT_OUTPUTS = 4;
#else
constexpr int FLOAT_OUTPUTS = 1;
#endif

template <int O, class W>
inline void dot_some(int64_t rows, const W* w, const float* x, int64_t n, float (*y)[O]) {
  switch (rows) {
    case 1:
      return dot<1, O>(w, x, n, y);
    case 2:
      return dot<2, O>(w, x, n, y);
    case 3:
      return dot<3, O>(w, x, n, y);
    default:
      return dot<4, O>(w, x, n, y);
  }
}

// ------------------------------------------------------------------------------------------------
// integers

// `multiply_block` of integers.h for one row. Weights come from memory as fast as they are asked
// for: those of the next P panels are.
template <int P>
inline void multiply_row(const uint8_t* q, const int8_t* w, int64_t panel, int64_t k,
                         int32_t* sums) {
  Sums total[P];
  for (int64_t i = 0; i < k; i += 4) {
    int32_t four;
    memcpy(&four, q + i, 4);
    const Quad quad(four);
    for (int p = 0; p < P; p++) {
      const int8_t* from = w + p * panel + 16 * i;
      __builtin_prefetch(from + P * panel);
      total[p].add(quad, Weights(from));
    }
  }
  for (int p = 0; p < P; p++) total[p].store(sums + p * 16);
}

// ------------------------------------------------------------------------------------------------
// a product

struct Product {  // y[row, output] = or += W x + b
  const Linear& a;
  const Input& in;
  const float* value;  // of the inputs as they were [rows, inputs]: outliers count in float
  int64_t rows;
  float* y;
  int64_t stride;
  bool add;

  static constexpr int64_t TILE_ROWS = 8, WIDE_ROWS = 9;  // from so many rows on it pays
  static constexpr int64_t ROWS_AT_ONCE = 16;             // of floats: they stay in the cache

  void run() const {
    if (a.kind == INT8)
      run_int8(own_part(panels()));
    else if (a.kind == INT4)
      run_int4(own_part(panels()));
    else
      run_floats(own_part(a.outputs));
  }

  int64_t panels() const { return up(a.outputs, LANES) / LANES; }

  // 16 outputs of a panel, of which the layer may lack the last.
  void put(int64_t row, int64_t panel, Floats sums) const {
    const int64_t output = panel * LANES;
    const int64_t many = a.outputs - output < LANES ? a.outputs - output : LANES;
    float* to = y + row * stride + output;
    if (many == LANES) {
      if (a.bias) sums = sums + load(a.bias + output);
      if (add) sums = sums + load(to);
      store_vector(sums, to);
      return;
    }
    if (a.bias) sums = sums + load_part(a.bias + output, many);
    if (add) sums = sums + load_part(to, many);
    memcpy(to, &sums, many * sizeof(float));
  }

  // Floats.

  void run_floats(Span outputs) const {
    for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
      const int64_t end = row + ROWS_AT_ONCE < rows ? row + ROWS_AT_ONCE : rows;
      int64_t output = outputs.low;
      if (rows > 1)
        for (; output + FLOAT_OUTPUTS <= outputs.high; output += FLOAT_OUTPUTS)
          float_outputs<FLOAT_OUTPUTS>(output, row, end);
      for (; output < outputs.high; output++) float_outputs<1>(output, row, end);
    }
  }

  template <int O>
  void float_outputs(int64_t output, int64_t row, int64_t end) const {
    for (; row < end; row += 4) {
      const int64_t many = end - row < 4 ? end - row : 4;
      float sums[4][O];
      dot_outputs<O>(output, row, many, sums);
      for (int64_t m = 0; m < many; m++)
        for (int o = 0; o < O; o++) {
          float& to = y[(row + m) * stride + output + o];
          to = sums[m][o] + (a.bias ? a.bias[output + o] : 0) + (add ? to : 0);
        }
    }
  }

  template <int O>
  void dot_outputs(int64_t output, int64_t row, int64_t many, float (*sums)[O]) const {
    const int64_t n = a.inputs, from = output * n;
    if (a.kind == F32)
      dot_some(many, (const float*)a.weight + from, &in.value[row * n], n, sums);
    else if (a.kind == F16)
      dot_some(many, (const Half*)a.weight + from, &in.value[row * n], n, sums);
    else
      dot_some(many, (const Brain*)a.weight + from, &in.brain[row * n], n, sums);
  }

  // int8, with the bits that quantize/nn/int8_kernels.py describes.

  void run_int8(Span span) const {
    bool tiles = false;
#if defined(QUANTIZE_TILES)
    tiles = rows >= TILE_ROWS && tiles_are_open();
    if (tiles) open_tiles();
#endif
    const int64_t most = tiles || rows == 1 ? 2 : MOST_PANELS;
    for (int64_t panel = span.low; panel < span.high;) {
      const int64_t left = span.high - panel < most ? span.high - panel : most;
      if (left >= 4)
        panel += int8_panels<MOST_PANELS >= 4 ? 4 : 1>(panel, tiles);
      else if (left >= 2)
        panel += int8_panels<MOST_PANELS >= 2 ? 2 : 1>(panel, tiles);
      else
        panel += int8_panels<1>(panel, tiles);
    }
#if defined(QUANTIZE_TILES)
    if (tiles) close_tiles();
#endif
  }

  template <int P>
  int64_t int8_panels(int64_t panel, bool tiles) const {
    alignas(64) int32_t sums[32 * 32];
    for (int64_t row = 0; row < rows;) {
      const int64_t many = int8_sums<P>(panel, row, tiles, sums);
      for (int64_t r = 0; r < many; r++)
        for (int p = 0; p < P; p++) finish_int8(row + r, panel + p, sums + (r * P + p) * LANES);
      row += many;
    }
    return P;
  }

  // Sums of the next rows; returns of how many.
  template <int P>
  int64_t int8_sums(int64_t panel, int64_t row, bool tiles, int32_t* sums) const {
    const int64_t padded = up(a.inputs, 64), apart = Input::stride(a.inputs), left = rows - row;
    const int8_t* w = (const int8_t*)a.weight + panel * LANES * padded;
    const uint8_t* q = in.q + row * apart;
#if defined(QUANTIZE_TILES)
    if (tiles && left > 16) {
      multiply_tiles<2, P <= 2 ? P : 2>(q, apart, w, LANES * padded, padded, sums);
      return left < 32 ? left : 32;
    }
    if (tiles) {
      multiply_tiles<1, P <= 2 ? P : 2>(q, apart, w, LANES * padded, padded, sums);
      return left;
    }
#endif
    if (left == 1) {
      multiply_row<P>(q, w, LANES * padded, padded, sums);
      return 1;
    }
    const int64_t many = left < MOST_ROWS ? left : MOST_ROWS;
    multiply_rows<P>(many, q, apart, w, LANES * padded, padded, sums);
    return many;
  }

  void finish_int8(int64_t row, int64_t panel, const int32_t* from) const {
    const int64_t output = panel * LANES;
    const int64_t many = a.outputs - output < LANES ? a.outputs - output : LANES;
    const Floats scale = many == LANES ? load(a.scale + output) : load_part(a.scale + output, many);
    const Ints sum = load_vector<Ints>(from), weights = load_vector<Ints>(a.sums + output);
    const Row& own = in.row[row];
    const Ints exact = sum - own.zero * weights;
    Floats result = to_floats(exact) * scale * own.step;
    for (int64_t i = 0; i < a.outliers; i++) {
      const Floats kept = load(a.kept + i * panels() * LANES + output);
      result = result + kept * value[row * a.inputs + a.channels[i]];
    }
    put(row, panel, result);
  }

  // int4, as int4.h describes.

  void run_int4(Span span) const {
    const bool wide = rows >= WIDE_ROWS;
    const int64_t most = rows == 1 ? 2 : CODE_PANELS,
                  floats_of_one = 2 * LANES * a.inputs / a.group;
    std::vector<uint8_t> bytes(wide ? most * LANES * a.inputs : 0);
    std::vector<float> floats(wide ? most * floats_of_one : 0);
    for (int64_t panel = span.low; panel < span.high; panel += most) {
      const int64_t many = span.high - panel < most ? span.high - panel : most;
      StoredPanel narrow[2];
      WidePanel unpacked[2];
      for (int64_t p = 0; p < many; p++) {
        narrow[p] = stored(panel + p, most);
        unpacked[p] = {bytes.data() + p * LANES * a.inputs, floats.data() + p * floats_of_one,
                       a.group};
        if (wide) unpacked[p].fill(narrow[p], a.inputs);
      }
      wide ? int4_panels(panel, many, unpacked) : int4_panels(panel, many, narrow);
    }
  }

  StoredPanel stored(int64_t panel, int64_t together) const {
    const int64_t apart = panel_bytes(a);
    return {(const uint8_t*)a.weight + panel * apart, a.group, together * apart};
  }

  template <class Panel>
  void int4_panels(int64_t panel, int64_t many, const Panel* from) const {
    many == 2 ? int4_rows<2>(panel, from) : int4_rows<1>(panel, from);
  }

  template <int P, class Panel>
  void int4_rows(int64_t panel, const Panel* from) const {
    for (int64_t row = 0; row < rows; row += 4) {
      const int64_t many = rows - row < 4 ? rows - row : 4;
      FineRow four[4];
      for (int64_t r = 0; r < many; r++) four[r] = in.fine_row(row + r, a.inputs);
      Floats sums[4][P];
      multiply_some<P>(many, from, four, a.inputs, a.group, sums);
      for (int64_t r = 0; r < many; r++)
        for (int p = 0; p < P; p++) put(row + r, panel + p, sums[r][p]);
    }
  }
};

// y = or += W x + b. Threads leave as soon as their own outputs are done.
inline void apply(const Linear& a, const Input& in, Input& middle, int64_t rows, float* y,
                  int64_t stride, bool add = false) {
  const float* value = in.value.data();
  const bool between = a.first || a.factor;
  if (between) {
#pragma omp barrier
    if (a.first) Product{*a.first, in, value, rows, middle.value.data(), a.inputs, false}.run();
#pragma omp barrier
    const Span own = own_part(rows);
    for (int64_t row = own.low; row < own.high; row++) {
      float* x = &middle.value[row * a.inputs];
      if (a.factor)
        for (int64_t i = 0; i < a.inputs; i++) x[i] = value[row * a.inputs + i] * a.factor[i];
      middle.prepare(row, a.inputs, int64_t(1) << a.kind);
    }
#pragma omp barrier
  }
  Product{a, between ? middle : in, value, rows, y, stride, add}.run();
}

}  // namespace
