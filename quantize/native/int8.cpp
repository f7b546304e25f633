// Dynamic int8 linear layers, and programs of them with the norms, the attention and the sums that
// lie between.
//
// Neither the instruction set nor the number of threads or rows changes a bit: sums of integers are
// exact, and what follows is one IEEE operation at a time (compiled without contraction).
// quantize/nn/int8_kernels.py says of the layers, in PyTorch, what they compute.

#include "attend.h"
#include "linears.h"

enum Kind : int64_t { F32, F16, BF16 };
enum Work : int64_t { LINEARS, NORM, ATTENTION, EACH };

// Layers, and what becomes of the results of one that is alone.
struct Linears {
  const Layer* const* layers;
  int64_t count, rows, apart, how;
};

// Of a program. places: of what it reads, then of what it writes: the number of a block of memory
// in the bits from 40 on, bytes from its start below them; -1 is nowhere. apart: for each, bytes
// from one slice to the next, but in the last block, which is of a slice.
//   LINEARS: x, other, then a result for each layer
//   NORM: x, weight, bias, result
//   ATTENTION: q, k, v, mask, result
//   EACH: x, other, result
struct Step {
  int64_t work, shared;  // shared: by all threads?
  const void* what;      // Linears, Norm, Attention or Each, of one slice
  const int64_t *places, *apart;
};

namespace {

constexpr int64_t MOST_LAYERS = 8;

thread_local Scratch scratch;

template <class T>
int run(const Call& call) {
  Job<T> job(call);
  if (!scratch.reserve(job.all_bytes())) return 1;
  job.memory = scratch.memory;
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

int run_kind(const Call& call, int64_t kind) {
  switch (kind) {
    case F32:
      return run<float>(call);
    case F16:
      return run<Half>(call);
    default:
      return run<Brain>(call);
  }
}

// A slice that `threads` compute together, and which of them this one is. arena: what lies between
// the steps; memory: what a step needs for itself.
struct Turn {
  int64_t slice, thread, threads;
  uint8_t *arena, *memory;

  int64_t team(const Step& step) const { return step.shared ? threads : 1; }
};

// bytes: of the arena of a slice, which is the block `last`.
struct Program {
  const Step* steps;
  int64_t count, slices, last, bytes, threads;
  uint8_t* const* blocks;
  uint8_t* memory = nullptr;  // of all_bytes

  template <class T>
  T* at(const Step& step, int64_t i, const Turn& turn) const {
    const int64_t place = step.places[i];
    if (place < 0) return nullptr;
    const int64_t block = place >> 40, in_block = place & 0xffffffffff;
    if (block == last) return (T*)(turn.arena + in_block);
    return (T*)(blocks[block] + in_block + turn.slice * step.apart[i]);
  }

  // A call of layers. results: room for as many places.
  Call call_of(const Step& step, const Turn& turn, void** results) const {
    const Linears& own = *(const Linears*)step.what;
    for (int64_t i = 0; i < own.count; i++) results[i] = at<void>(step, 2 + i, turn);
    const float *x = at<float>(step, 0, turn), *other = at<float>(step, 1, turn);
    const int64_t threads = turn.team(step);
    return {own.layers, own.count, own.rows, threads, x, own.apart, results, own.how, other};
  }

  // What a step needs for itself.
  int64_t bytes_of(const Step& step, int64_t threads) const {
    threads = step.shared ? threads : 1;
    if (step.work == LINEARS) {
      const Linears& own = *(const Linears*)step.what;
      const Call call = {own.layers, own.count, own.rows, threads};
      return Job<float>(call).all_bytes();
    }
    if (step.work != ATTENTION) return 0;
    return up(Attending::bytes(*(const Attention*)step.what), 64) * threads;
  }
  // Memory of a slice that so many threads compute.
  int64_t slice_bytes(int64_t threads) const {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t own = bytes_of(steps[i], threads);
      most = own > most ? own : most;
    }
    return bytes + most;
  }
  int64_t all_bytes() const {
    const int64_t apart = slices < threads ? 0 : slice_bytes(1) * threads;
    const int64_t together = slices % threads ? slice_bytes(threads) : 0;
    return apart > together ? apart : together;
  }

  void attend(const Step& step, const Turn& turn) const {
    const Attention& own = *(const Attention*)step.what;
    uint8_t* mine = turn.memory + turn.thread * up(Attending::bytes(own), 64);
    const float *q = at<float>(step, 0, turn), *k = at<float>(step, 1, turn);
    const float* v = at<float>(step, 2, turn);
    Attending(own, q, k, v, at<void>(step, 3, turn), at<float>(step, 4, turn), mine)
        .run(turn.thread, turn.team(step));
  }

  void run_step(const Step& step, const Turn& turn) const {
    const int64_t thread = turn.thread, threads = turn.team(step);
    if (step.work == LINEARS) {
      void* results[MOST_LAYERS];
      const Call call = call_of(step, turn, results);
      Job<float> job(call);
      job.memory = turn.memory;
      job.run(thread, threads);
    } else if (step.work == ATTENTION) {
      attend(step, turn);
    } else {
      const float *x = at<float>(step, 0, turn), *other = at<float>(step, 1, turn);
      float* third = at<float>(step, 2, turn);
      if (step.work == NORM)
        run_norm(*(const Norm*)step.what, x, other, third, at<float>(step, 3, turn), thread,
                 threads);
      else
        run_each(*(const Each*)step.what, x, other, third, thread, threads);
    }
  }
  void run_slice(const Turn& turn) const {
    for (int64_t i = 0; i < count; i++) {
      if (turn.thread < turn.team(steps[i])) run_step(steps[i], turn);
      barrier(turn.threads);
    }
  }
  // A slice's numbers stay in the cache from step to step. Each thread computes as many as the
  // others; all share out those that are left.
  void run(int64_t thread) const {
    const int64_t own = slices / threads, size = slice_bytes(1);
    uint8_t* mine = memory + thread * size;
    for (int64_t i = 0; i < own; i++) run_slice({thread * own + i, 0, 1, mine, mine + bytes});
    barrier(threads);
    for (int64_t slice = own * threads; slice < slices; slice++)
      run_slice({slice, thread, threads, memory, memory + bytes});
  }
};

}  // namespace

// A value in a Python dictionary; without a key, how much a container holds.
struct Held {
  void *holder, *key;
  intptr_t value;
};

extern "C" {

// What int8_library.py compares with its own before the first call.
extern const int64_t layer_bytes, linears_bytes, norm_bytes, attention_bytes, each_bytes,
    step_bytes;
const int64_t layer_bytes = sizeof(Layer);
const int64_t linears_bytes = sizeof(Linears);
const int64_t norm_bytes = sizeof(Norm);
const int64_t attention_bytes = sizeof(Attention);
const int64_t each_bytes = sizeof(Each);
const int64_t step_bytes = sizeof(Step);

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

// Is all held as it was? `get` is Python's PyDict_GetItemWithError, `size` its PyObject_Size; who
// calls has the interpreter's lock.
int are_held(const Held* held, int64_t count, intptr_t (*get)(void*, void*),
             intptr_t (*size)(void*)) {
  for (int64_t i = 0; i < count; i++) {
    void *holder = held[i].holder, *key = held[i].key;
    if ((key ? get(holder, key) : size(holder)) != held[i].value) return 0;
  }
  return 1;
}

// 0, or 1 where there is no memory. `what` holds the rows in its lowest 40 bits, the kind in the
// next 8, and the threads in the rest: for few rows each argument takes a noticeable part of a
// call.
int linear(const Layer* layer, int64_t what, const void* x, void* y) {
  const int64_t rows = what & 0xffffffffff, threads = what >> 48;
  const Call call = {&layer, 1, rows, threads, x, layer->inputs, &y, ALONE, nullptr};
  return run_kind(call, what >> 40 & 0xff);
}

// A program of `count` steps, for each of the slices, on blocks of memory; another one, the last,
// of so many bytes for a slice, is found here. 0, or 1 where there is no memory.
int run_program(const Step* steps, int64_t count, int64_t slices, uint8_t* const* blocks,
                int64_t last, int64_t bytes, int64_t threads) {
  Program program = {steps, count, slices, last, bytes, threads, blocks};
#if defined(_OPENMP)
  if (threads > 1) {
    bool enough = true;
    Team own;
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp master
      {
        program.threads = omp_get_num_threads();
        enough = scratch.reserve(program.all_bytes());
        program.memory = scratch.memory;
      }
#pragma omp barrier
      team = &own;
      if (enough) program.run(omp_get_thread_num());
      team = nullptr;
    }
    return !enough;
  }
#endif
  program.threads = 1;
  if (!scratch.reserve(program.all_bytes())) return 1;
  program.memory = scratch.memory;
  program.run(0);
  return 0;
}
}
