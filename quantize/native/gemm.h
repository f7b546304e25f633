// Products of many quantized rows with a packed weight, shared out among threads: what int8.cpp and
// conv.cpp have in common. A Sink says what becomes of the sums.

#pragma once
#include "integers.h"
#include "rows.h"

#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <optional>

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

// Bytes of a row that products look at; those behind its inputs must be 0.
inline int64_t seen_bytes(int64_t inputs) {
#if defined(QUANTIZE_TILES)
  return up(inputs, 64);
#else
  return up(inputs, 4);
#endif
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
// put(sums, apart, row, n) takes the sums of n rows, `apart` numbers from one to the next. Sums of
// tiles come Sink::TOGETHER rows at a time, or fewer.
template <class Sink>
struct Gemm {
  const uint8_t* q;
  const int8_t* packed;
  int64_t stride, inputs, padded, panels;
  const Sink& sink;

  static constexpr int64_t TILE_ROWS = 8;  // fewer are multiplied without tiles
  static constexpr int64_t BLOCK = 32;     // rows

  // f(row, panel) for each block of rows and of `most` panels that a thread has.
  template <class F>
  void each_block(int64_t count, int64_t most, int64_t thread, int64_t threads, const F& f) const {
    const int64_t blocks = up(count, BLOCK) / BLOCK, tasks = up(panels, most) / most * blocks;
    const int64_t end = tasks * (thread + 1) / threads;
    for (int64_t task = tasks * thread / threads; task < end; task++)
      f(task % blocks * BLOCK, task / blocks * most);
  }

  // A thread's part of `count` rows.
  void share(int64_t count, int64_t thread, int64_t threads) const {
#if defined(QUANTIZE_TILES)
    if (count >= TILE_ROWS) return share_tiles(count, thread, threads);
#endif
    each_block(count, MOST_PANELS, thread, threads, [&](int64_t row, int64_t panel) {
      const int64_t end = row + BLOCK < count ? row + BLOCK : count;
      if (panels - panel >= MOST_PANELS)
        outputs<MOST_PANELS>(row, end, panel);
      else
        for (int64_t p = panel; p < panels; p++) outputs<1>(row, end, p);
    });
  }

  // 16 P outputs of the rows from `row` to `end`.
  template <int P>
  void outputs(int64_t row, int64_t end, int64_t panel) const {
    const int8_t* w = packed + panel * LANES * padded;
    alignas(64) int32_t sums[MOST_ROWS * LANES * P];
    for (; row < end; row += MOST_ROWS) {
      const int64_t many = end - row < MOST_ROWS ? end - row : MOST_ROWS;
      multiply_rows<P>(many, q + row * stride, stride, w, LANES * padded, up(inputs, 4), sums);
      for (int p = 0; p < P; p++) sink.panel(panel + p).put(sums + p * LANES, P * LANES, row, many);
    }
  }

#if defined(QUANTIZE_TILES)
  // Sums of a block, which are put in parts while tiles multiply the next block.
  struct Waiting {
    alignas(64) int32_t sums[BLOCK * 2 * LANES];
    std::optional<decltype(sink.panel(0))> panels[2];
    int64_t apart = 0, row = 0, many = 0, done = 0;

    int64_t parts() const { return up(many - done, Sink::TOGETHER) / Sink::TOGETHER; }
    void put(int64_t parts) {
      for (; parts > 0 && done < many; parts--, done += Sink::TOGETHER) {
        const int64_t left = many - done, rows = left < Sink::TOGETHER ? left : Sink::TOGETHER;
        for (int64_t p = 0; p * LANES < apart; p++)
          panels[p]->put(sums + done * apart + p * LANES, apart, row + done, rows);
      }
    }
  };

  void share_tiles(int64_t count, int64_t thread, int64_t threads) const {
    open_tiles();
    Waiting waiting;
    each_block(count, 2, thread, threads, [&](int64_t row, int64_t panel) {
      if (panels - panel >= 2)
        block<2>(row, count, panel, waiting);
      else
        block<1>(row, count, panel, waiting);
    });
    waiting.put(waiting.parts());
    close_tiles();
  }

  // Up to BLOCK rows of `count`, for P panels. Meanwhile the weights of the panels after them come
  // nearer, a part for each block.
  template <int P>
  void block(int64_t row, int64_t count, int64_t panel, Waiting& waiting) const {
    const int64_t left = count - row, steps = padded / 64, blocks = up(count, BLOCK) / BLOCK;
    const int64_t lines = up(P * LANES, blocks) / blocks;  // of 64 bytes, in a step
    const int8_t *w = packed + panel * LANES * padded, *next = w + P * LANES * padded;
    const int8_t* end = panel + P < panels ? next + P * LANES * padded : next;
    next += row / BLOCK * steps * lines * 64;
    const int64_t parts = up(waiting.parts(), steps) / steps;
    const auto meanwhile = [&] {
      for (int64_t line = 0; line < lines && next < end; line++, next += 64)
        __builtin_prefetch(next, 0, 2);
      waiting.put(parts);
    };
    const uint8_t* from = q + row * stride;
    if (left > 16)
      multiply_tiles<2, P>(from, stride, w, LANES * padded, padded, waiting.sums, meanwhile);
    else
      multiply_tiles<1, P>(from, stride, w, LANES * padded, padded, waiting.sums, meanwhile);
    for (int p = 0; p < P; p++) waiting.panels[p].emplace(sink.panel(panel + p));
    waiting.apart = P * LANES, waiting.row = row, waiting.done = 0;
    waiting.many = left < BLOCK ? left : BLOCK;
  }
#endif
};

}  // namespace
