// Norms, rotations and gated units of bfloat16 rows, forward and back, as training asks for them:
// computed in float32, rounded once. PyTorch makes each of a dozen passes over memory.

#include "elementary.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// work(first, last, thread): a thread's part of `count` items.
template <class Work>
void shared(int64_t count, int64_t threads, const Work& work) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    {
      const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
      work(count * thread / all, count * (thread + 1) / all, thread);
    }
    return;
  }
#endif
  work(0, count, 0);
}

}  // namespace

extern "C" {

// 0 if this process may run the code.
int open_library() { return 0; }

// Rows [rows, width] over their root mean square, times `weight`; what each was multiplied by goes
// to `inverse`. width: a multiple of 16, as of all that follows.
void norm(const Brain* x, const float* weight, float epsilon, int64_t rows, int64_t width, Brain* y,
          float* inverse, int64_t threads) {
  shared(rows, threads, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t row = first; row < last; row++) {
      const Brain* from = x + row * width;
      Floats squares = {};
      for (int64_t i = 0; i < width; i += LANES) {
        const Floats now = load(from + i);
        squares += now * now;
      }
      const float scale = inverse[row] = 1 / sqrtf(sum(squares) / float(width) + epsilon);
      for (int64_t i = 0; i < width; i += LANES)
        store(load(from + i) * scale * load(weight + i), y + row * width + i);
    }
  });
}

// The gradients of `norm`: of x, and of the weight, a row of [threads, width] for each thread.
void norm_back(const Brain* gradient, const Brain* x, const float* weight, const float* inverse,
               int64_t rows, int64_t width, Brain* to_x, float* to_weight, int64_t threads) {
  shared(rows, threads, [=](int64_t first, int64_t last, int64_t thread) {
    float* own = to_weight + thread * width;
    for (int64_t row = first; row < last; row++) {
      const Brain *g = gradient + row * width, *from = x + row * width;
      const float scale = inverse[row];
      Floats products = {};
      for (int64_t i = 0; i < width; i += LANES) {
        const Floats both = load(g + i) * load(from + i);
        products += both * load(weight + i);
        const Floats total = load(own + i) + both * scale;
        store_vector(total, own + i);
      }
      const float back = sum(products) / float(width) * scale * scale * scale;
      for (int64_t i = 0; i < width; i += LANES)
        store(load(g + i) * load(weight + i) * scale - load(from + i) * back,
              to_x + row * width + i);
    }
  });
}

// Pairs of numbers of x [batch, heads, length, 2 * half] turned by the angles of their positions;
// cosine, sine: [length, half]. strides: of the first three dimensions of x, then of y.
void rotate(const Brain* x, const int64_t* size, const int64_t* strides, const float* cosine,
            const float* sine, float sign, Brain* y, int64_t threads) {
  const int64_t heads = size[1], length = size[2], half = size[3];
  shared(size[0] * heads * length, threads, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t row = first; row < last; row++) {
      const int64_t batch = row / length / heads, head = row / length % heads, at = row % length;
      const Brain* from = x + batch * strides[0] + head * strides[1] + at * strides[2];
      Brain* to = y + batch * strides[3] + head * strides[4] + at * strides[5];
      for (int64_t i = 0; i < half; i += LANES) {
        const Floats a = load(from + i), b = load(from + half + i);
        const Floats c = load(cosine + at * half + i), s = load(sine + at * half + i) * sign;
        store(a * c - b * s, to + i);
        store(b * c + a * s, to + half + i);
      }
    }
  });
}

// silu(gate) * up, of `count` numbers, in blocks of 16.
void gated(const Brain* gate, const Brain* up, int64_t count, Brain* y, int64_t threads) {
  shared(count / LANES, threads, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t i = LANES * first; i < LANES * last; i += LANES) {
      const Floats x = load(gate + i);
      store(x * sigmoid(x) * load(up + i), y + i);
    }
  });
}

// The gradients of `gated`.
void gated_back(const Brain* gradient, const Brain* gate, const Brain* up, int64_t count,
                Brain* to_gate, Brain* to_up, int64_t threads) {
  shared(count / LANES, threads, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t i = LANES * first; i < LANES * last; i += LANES) {
      const Floats g = load(gradient + i), x = load(gate + i), share = sigmoid(x);
      store(g * load(up + i) * share * (x * (1 - share) + 1), to_gate + i);
      store(g * x * share, to_up + i);
    }
  });
}
}
