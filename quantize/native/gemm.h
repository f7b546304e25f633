// Products of many quantized rows with a packed weight, shared out among threads: what int8.cpp and
// conv.cpp have in common. A Sink says what becomes of the sums.

#pragma once
#include "integers.h"
#include "rows.h"

#include <sched.h>

#include <atomic>
#include <cstdlib>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(QUANTIZE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of a quantized row. Lines of 16 rows that share few places of the cache would be slow.
inline int64_t row_stride(int64_t inputs) {
  const int64_t padded = up(inputs, 64);
  return padded / 64 % 2 ? padded : padded + 64;
}

// Quantized rows at a time, so that the products find them in the cache.
inline int64_t rows_at_once(int64_t stride, int64_t rows) {
  constexpr int64_t CHUNK_BYTES = 1 << 19;
  const int64_t fitting = CHUNK_BYTES / stride / 32 * 32;
  const int64_t chunk = fitting < 32 ? 32 : fitting;
  return rows < chunk ? rows : chunk;
}

// Threads that wait for each other, in short steps: they spin for some 50 us, then let others run,
// since the one that they wait for may want this very core.
struct Team {
  static constexpr int SPINS = 1000;
  std::atomic<int64_t> arrived{0}, turn{0};

  void wait(int64_t threads) {
    const int64_t own = turn.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      turn.store(own + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn.load(std::memory_order_acquire) == own; spins++) {
#if defined(__x86_64__)
      if (spins < SPINS) {
        __builtin_ia32_pause();
        continue;
      }
#endif
      sched_yield();
    }
  }
};

thread_local Team* team = nullptr;  // of the program that runs

inline void barrier(int64_t threads) {
  if (team) {
    if (threads > 1) team->wait(threads);
    return;
  }
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp barrier
  }
#endif
}

// 0 if this process may use the tiles of matrices, or needs none.
inline int open_matrices() {
#if defined(QUANTIZE_TILES)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return int(syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA));
#else
  return 0;
#endif
}

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

// Rows times a weight. Sink::panel(p) gives what the 16 outputs of a panel share; its
// put(sums, apart, row, n) takes the sums of n rows, `apart` numbers from one to the next.
template <class Sink>
struct Gemm {
  const uint8_t* q;
  const int8_t* packed;
  int64_t stride, padded, panels;
  const Sink& sink;

  static constexpr int64_t TILE_ROWS = 8;  // fewer are multiplied without tiles

  // 16 P outputs of the rows from `low` to `high`.
  template <int P>
  void outputs(int64_t low, int64_t high, int64_t panel, bool tiles) const {
    const int8_t* w = packed + panel * 16 * padded;
    alignas(64) int32_t sums[32 * 32];
    for (int64_t row = low; row < high;) {
      const int64_t many = multiply<P>(row, high - row, w, tiles, sums);
      for (int p = 0; p < P; p++) sink.panel(panel + p).put(sums + p * 16, P * 16, row, many);
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

  // A thread's part of `count` rows.
  void share(int64_t count, int64_t thread, int64_t threads) const {
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
        outputs<MOST_PANELS >= 4 ? 4 : 1>(low, high, panel, tiles);
      else if (many == 2)
        outputs<2>(low, high, panel, tiles);
      else
        for (int64_t p = 0; p < many; p++) outputs<1>(low, high, panel + p, tiles);
    }
#if defined(QUANTIZE_TILES)
    if (tiles) close_tiles();
#endif
  }
};

}  // namespace
