// Rows of activations in each form that a kind of weight multiplies, and a thread's part of work.

#pragma once
#include "int4.h"

#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline int64_t thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}
inline int64_t thread_count() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

struct Span {
  int64_t low, high;
};

// This thread's part of `count` things.
inline Span own_part(int64_t count) {
  const int64_t thread = thread_number(), threads = thread_count();
  return {count * thread / threads, count * (thread + 1) / threads};
}

struct Input {  // rows of activations in each form that a kind of weight multiplies
  std::vector<float> value, brain;  // as they are; rounded to bf16
  std::vector<uint8_t> memory;
  uint8_t* q;                    // for int8 weights [rows, stride(width)]
  std::vector<Row> row;          // their steps and zeros
  std::vector<int8_t> fine;      // for int4 weights
  std::vector<float> step, sum;  // of every 32 of them

  // kinds: of all weights that multiply these rows, a bit each.
  Input(int64_t rows, int64_t most, int64_t kinds) : value(rows * most) {
    if (kinds >> BF16 & 1) brain.resize(rows * most);
    if (kinds >> INT8 & 1) {
      memory.resize(up(rows, 32) * stride(most) + 64);
      row.resize(rows);
    }
    q = memory.data() + (64 - (uintptr_t)memory.data() % 64);
    if (kinds >> INT4 & 1) {
      fine.resize(rows * most);
      step.resize(rows * most / BLOCK);
      sum.resize(rows * most / BLOCK);
    }
  }

  // Where `width` values start in q, row after row; else the lines of 16 rows share few places of
  // the cache.
  static int64_t stride(int64_t width) {
    const int64_t padded = up(width, 64);
    return padded / 64 % 2 ? padded : padded + 64;
  }

  // `value` of row i is written: make the other forms.
  void prepare(int64_t i, int64_t width, int64_t kinds) {
    const float* x = &value[i * width];
    if (kinds >> BF16 & 1)
      for (int64_t k = 0; k < width; k++) brain[i * width + k] = widen(to_brain(x[k]));
    if (kinds >> INT8 & 1) row[i] = quantize_row(x, width, up(width, 64), q + i * stride(width));
    if (kinds >> INT4 & 1) {
      const int64_t block = i * width / BLOCK;
      quantize_blocks(x, width, &fine[i * width], &step[block], &sum[block]);
    }
  }

  FineRow fine_row(int64_t i, int64_t width) const {
    const int64_t block = i * width / BLOCK;
    return {&fine[i * width], &step[block], &sum[block]};
  }
};

// The forms of its inputs that a layer asks for; one with outliers makes its own.
inline int64_t kinds_of(const Linear& a) {
  return a.factor ? 0 : int64_t(1) << (a.first ? a.first->kind : a.kind);
}

}  // namespace
