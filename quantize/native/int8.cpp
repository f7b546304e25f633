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
  int64_t count, rows, how;
};

// Of a program. places: of what it reads, then of what it writes: the number of a block of memory
// in the bits from 40 on, bytes from its start below them; -1 is nowhere.
//   LINEARS: x, other, then a result for each layer
//   NORM: x, weight, bias, result
//   ATTENTION: q, k, v, mask, result
//   EACH: x, other, result
struct Step {
  int64_t work, shared;  // shared: by all threads?
  const void* what;      // Linears, Norm, Attention or Each
  const int64_t* places;
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

struct Program {
  const Step* steps;
  int64_t count, threads;
  uint8_t* const* blocks;
  uint8_t* memory = nullptr;

  template <class T>
  T* at(int64_t place) const {
    return place < 0 ? nullptr : (T*)(blocks[place >> 40] + (place & 0xffffffffff));
  }
  int64_t team(const Step& step) const { return step.shared ? threads : 1; }

  // A call of layers. results: room for as many places.
  Call call_of(const Step& step, void** results) const {
    const Linears& own = *(const Linears*)step.what;
    for (int64_t i = 0; i < own.count; i++) results[i] = at<void>(step.places[2 + i]);
    const float* other = at<float>(step.places[1]);
    const float* x = at<float>(step.places[0]);
    return {own.layers, own.count, own.rows, team(step), x, results, own.how, other};
  }

  int64_t bytes_of(const Step& step) const {
    if (step.work == LINEARS) {
      const Linears& own = *(const Linears*)step.what;
      const Call call = {own.layers, own.count, own.rows, team(step), nullptr, nullptr, own.how};
      return Job<float>(call).all_bytes();
    }
    if (step.work != ATTENTION) return 0;
    return up(Attending::bytes(*(const Attention*)step.what), 64) * team(step);
  }
  int64_t bytes() const {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t own = bytes_of(steps[i]);
      most = own > most ? own : most;
    }
    return most;
  }

  void attend(const Step& step, int64_t thread) const {
    const Attention& own = *(const Attention*)step.what;
    const int64_t* p = step.places;
    uint8_t* mine = memory + thread * up(Attending::bytes(own), 64);
    Attending(own, at<float>(p[0]), at<float>(p[1]), at<float>(p[2]), at<void>(p[3]),
              at<float>(p[4]), mine)
        .run(thread, team(step));
  }

  void run_step(const Step& step, int64_t thread) const {
    const int64_t* p = step.places;
    if (step.work == LINEARS) {
      void* results[MOST_LAYERS];
      const Call call = call_of(step, results);
      Job<float> job(call);
      job.memory = memory;
      job.run(thread, team(step));
    } else if (step.work == NORM) {
      const Norm& own = *(const Norm*)step.what;
      run_norm(own, at<float>(p[0]), at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), thread,
               team(step));
    } else if (step.work == ATTENTION) {
      attend(step, thread);
    } else {
      const Each& own = *(const Each*)step.what;
      run_each(own, at<float>(p[0]), at<float>(p[1]), at<float>(p[2]), thread, team(step));
    }
  }
  void run(int64_t thread) const {
    for (int64_t i = 0; i < count; i++) {
      if (thread < team(steps[i])) run_step(steps[i], thread);
      barrier(threads);
    }
  }
};

}  // namespace

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

// 0, or 1 where there is no memory. `what` holds the rows in its lowest 40 bits, the kind in the
// next 8, and the threads in the rest: for few rows each argument takes a noticeable part of a
// call.
int linear(const Layer* layer, int64_t what, const void* x, void* y) {
  const Call call = {&layer, 1, what & 0xffffffffff, what >> 48, x, &y, ALONE, nullptr};
  return run_kind(call, what >> 40 & 0xff);
}

// A program of `count` steps on blocks of memory, the last of which, of so many bytes, is found
// here. 0, or 1 where there is no memory.
int run_program(const Step* steps, int64_t count, uint8_t** blocks, int64_t last, int64_t bytes,
                int64_t threads) {
  Program program = {steps, count, threads, blocks};
#if defined(_OPENMP)
  if (threads > 1) {
    bool enough = true;
    Team own;
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp master
      {
        program.threads = omp_get_num_threads();
        enough = scratch.reserve(bytes + program.bytes());
        blocks[last] = scratch.memory, program.memory = scratch.memory + bytes;
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
  if (!scratch.reserve(bytes + program.bytes())) return 1;
  blocks[last] = scratch.memory, program.memory = scratch.memory + bytes;
  program.run(0);
  return 0;
}
}
