// Attention of float32 numbers: for each query, the sum of the values, weighted by the softmax of
// its products with the keys.
//
// Keys come in blocks of KEYS, and each block corrects what the blocks before it gave by the
// largest score so far. A score is one fused step for each of its products, in their order, and a
// sum over keys one for each key, so neither the instruction set nor the number of threads, of
// queries or of batches changes a bit.

#pragma once
#include "planes.h"

struct Attention {
  int64_t batches, heads, shared;      // shared: query heads of a head of keys and values
  int64_t queries, keys, width, wide;  // width: of queries and keys; wide: of values
  int64_t q[3], k[3], v[3], mask[3];   // numbers from one batch, head, position to the next
  float scale;
  int32_t causal;  // does a query see no key after its own place?
  int64_t masked;  // what the mask is; see Masked
};

namespace {

enum Masked : int64_t { UNMASKED, ADDED, SEEN };  // SEEN: a byte for each key, 0 hides it

// exp(x) of x up to 0; 0 below -87. To 2e-7 of its size; NaN stays NaN.
inline Floats weight_of(Floats x) {
  const Floats shift = Floats{} + 0x1.8p23f;  // adding it rounds to the nearest integer
  const Floats shifted = multiply_add(x, Floats{} + 1.44269504f, shift), n = shifted - shift;
  const Floats r =
      multiply_add(n, Floats{} + 2.12194440e-4f, multiply_add(n, Floats{} - 0.693359375f, x));
  Floats p = multiply_add(r, Floats{} + 1.9875691500e-4f, Floats{} + 1.3981999507e-3f);
  p = multiply_add(p, r, Floats{} + 8.3334519073e-3f);
  p = multiply_add(p, r, Floats{} + 4.1665795894e-2f);
  p = multiply_add(p, r, Floats{} + 1.6666665459e-1f);
  p = multiply_add(p, r, Floats{} + 5.0000001201e-1f);
  const Ints power = ((Ints)shifted - bits<int32_t>(0x1.8p23f) + 127) << 23;
  const Floats found = (multiply_add(p, r * r, r) + 1) * (Floats)power;
  return choose(x < -87, Floats{}, found);
}

#if defined(__AVX512F__)
constexpr int HIGH = 8, BROAD = 2;  // rows and panels whose sums are in registers
#else
constexpr int HIGH = 4, BROAD = 1;
#endif

inline Floats spread(const float* x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_set1_ps(*x);
#elif defined(__AVX2__)
  return {_mm256_broadcast_ss(x), _mm256_broadcast_ss(x)};
#else
  return Floats{} + *x;
#endif
}

// to[r][16 p] = products of HIGH rows of `a` and P panels of `b` [count][16], added to what is
// there if there is MORE. apart: numbers from a panel to the next. Inlined into loops, whose inner
// loops compilers unroll before they look for registers.
template <int P, bool MORE>
[[gnu::always_inline]] inline void fused_products(const float* a, int64_t a_apart, const float* b,
                                                  int64_t apart, int64_t count, float* to,
                                                  int64_t to_apart) {
  Floats total[HIGH][P];
  for (int r = 0; r < HIGH; r++)
    for (int p = 0; p < P; p++) total[r][p] = MORE ? load(to + r * to_apart + p * LANES) : Floats{};
  for (int64_t i = 0; i < count; i++) {
    Floats side[P];
    for (int p = 0; p < P; p++) side[p] = load(b + p * apart + i * LANES);
    for (int r = 0; r < HIGH; r++) {
      const Floats one = spread(a + r * a_apart + i);
      for (int p = 0; p < P; p++) total[r][p] = multiply_add(one, side[p], total[r][p]);
    }
  }
  for (int r = 0; r < HIGH; r++)
    for (int p = 0; p < P; p++) store(total[r][p], to + r * to_apart + p * LANES);
}

// The same of more rows and panels.
template <bool MORE>
inline void fused_products(const float* a, int64_t a_apart, int64_t rows, const float* b,
                           int64_t apart, int64_t panels, int64_t count, float* to,
                           int64_t to_apart) {
  for (int64_t p = 0; p < panels; p += BROAD) {
    const float* side = b + p * apart;
    for (int64_t r = 0; r < rows; r += HIGH) {
      float* own = to + r * to_apart + p * LANES;
      if (panels - p >= BROAD)
        fused_products<BROAD, MORE>(a + r * a_apart, a_apart, side, apart, count, own, to_apart);
      else
        fused_products<1, MORE>(a + r * a_apart, a_apart, side, apart, count, own, to_apart);
    }
  }
}

// A thread's part of an attention. y: [batches, queries, heads, wide].
struct Attending {
  static constexpr int64_t QUERIES = 32, KEYS = 256;  // of a block

  const Attention& own;
  const float *q, *k, *v;
  const void* mask;
  float* y;
  int64_t columns, tall, broad;  // keys, key width and value width, filled up
  float *keys, *values, *queries, *scores, *sums;
  float highest[QUERIES], total[QUERIES];

  Attending(const Attention& own, const float* q, const float* k, const float* v, const void* mask,
            float* y, uint8_t* memory)
      : own(own), q(q), k(k), v(v), mask(mask), y(y) {
    columns = filled(own.keys), tall = filled(own.width), broad = filled(own.wide);
    keys = (float*)memory;           // panels [width][16]
    values = keys + columns * tall;  // panels [keys][16]
    queries = values + columns * broad;
    scores = queries + QUERIES * tall;
    sums = scores + QUERIES * KEYS;
  }
  static int64_t filled(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
  static int64_t bytes(const Attention& own) {
    const int64_t tall = filled(own.width), broad = filled(own.wide);
    const int64_t numbers = filled(own.keys) * (tall + broad) + QUERIES * (tall + KEYS + broad);
    return numbers * int64_t(sizeof(float));
  }

  void run(int64_t thread, int64_t threads) {
    const int64_t blocks = (own.queries + QUERIES - 1) / QUERIES;
    const int64_t tasks = own.batches * own.heads * blocks, end = tasks * (thread + 1) / threads;
    int64_t packed = -1;
    for (int64_t task = tasks * thread / threads; task < end; task++) {
      const int64_t batch = task / blocks / own.heads, head = task / blocks % own.heads;
      const int64_t pair = batch * own.heads + head / own.shared;
      if (pair != packed) pack(batch, head / own.shared);
      packed = pair;
      attend(batch, head, task % blocks * QUERIES);
    }
  }

  void pack(int64_t batch, int64_t head) {
    const float* from = k + batch * own.k[0] + head * own.k[1];
    for (int64_t key = 0; key < own.keys; key += LANES) {
      const int64_t many = least_of(own.keys - key, LANES);
      for (int64_t i = 0; i < own.width; i += LANES)
        turn(from + key * own.k[2] + i, own.k[2], many, keys + key * own.width + i * LANES, LANES,
             least_of(own.width - i, LANES));
    }
    from = v + batch * own.v[0] + head * own.v[1];
    for (int64_t i = 0; i < own.wide; i += LANES) {
      const int64_t many = least_of(own.wide - i, LANES);
      for (int64_t key = 0; key < own.keys; key++)
        store(load_some(from + key * own.v[2] + i, many), values + i * own.keys + key * LANES);
    }
  }

  // Of the queries from `first` on.
  void attend(int64_t batch, int64_t head, int64_t first) {
    const int64_t count = least_of(own.queries - first, QUERIES);
    const int64_t rows = (count + HIGH - 1) / HIGH * HIGH;
    const float* from = q + batch * own.q[0] + head * own.q[1] + first * own.q[2];
    for (int64_t r = 0; r < rows; r++, from += own.q[2])
      for (int64_t i = 0; i < own.width; i += LANES) {
        const int64_t many = r < count ? least_of(own.width - i, LANES) : 0;
        store(load_some(from + i, many) * own.scale, queries + r * tall + i);
      }
    for (int64_t r = 0; r < QUERIES; r++) highest[r] = -INFINITY, total[r] = 0;
    const int64_t seen = own.causal ? least_of(own.keys, first + count) : own.keys;
    for (int64_t key = 0; key < seen; key += KEYS) {
      const int64_t many = least_of(own.keys - key, KEYS), panels = (many + LANES - 1) / LANES;
      fused_products<false>(queries, tall, rows, keys + key * own.width, own.width * LANES, panels,
                            own.width, scores, KEYS);
      for (int64_t r = 0; r < count; r++) weigh(batch, head, first + r, r, key, many);
      const auto add = key ? fused_products<true> : fused_products<false>;
      add(scores, KEYS, rows, values + key * LANES, own.keys * LANES, broad / LANES, many, sums,
          broad);
    }
    for (int64_t r = 0; r < count; r++) {
      const float part = total[r] == 0 ? 0 : 1 / total[r];
      float* to = y + ((batch * own.queries + first + r) * own.heads + head) * own.wide;
      for (int64_t i = 0; i < own.wide; i += LANES)
        store(load(sums + r * broad + i) * part, to + i, least_of(own.wide - i, LANES));
    }
  }

  // Scores of a row for `many` keys to weights, and what the blocks before gave to their measure.
  void weigh(int64_t batch, int64_t head, int64_t query, int64_t r, int64_t key, int64_t many) {
    float* row = scores + r * KEYS;
    const int64_t at = batch * own.mask[0] + head * own.mask[1] + query * own.mask[2] + key;
    const int64_t left = own.causal ? query + 1 - key : many;
    Floats high = Floats{} - INFINITY;
    for (int64_t i = 0; i < many; i += LANES) {
      const Floats score = masked(load(row + i), at + i, least_of(many - i, LANES), left - i);
      store(score, row + i);
      high = most(score, high);
    }
    const float found = largest_of(high), top = found > highest[r] ? found : highest[r];
    const float base = top == -INFINITY ? 0 : top;
    Floats sum_of_lanes = {};
    for (int64_t i = 0; i < many; i += LANES) {
      const Floats weight = weight_of(load(row + i) - base);
      store(weight, row + i);
      sum_of_lanes = sum_of_lanes + weight;
    }
    const float before = key > 0 ? weight_of(Floats{} + (highest[r] - base))[0] : 0;
    total[r] = total[r] * before + sum(sum_of_lanes);
    highest[r] = top;
    for (int64_t i = 0; i < broad && key > 0; i += LANES)
      store(load(sums + r * broad + i) * before, sums + r * broad + i);
  }

  // -inf for keys that aren't seen, those after the first `left` and `many` among them.
  Floats masked(Floats score, int64_t at, int64_t many, int64_t left) const {
    const Ints lanes = places_of_lanes();
    const Floats hidden = Floats{} - INFINITY;
    if (own.masked == ADDED) score = score + load_some((const float*)mask + at, many);
    if (own.masked == SEEN) {
      uint8_t seen[LANES] = {};
      memcpy(seen, (const uint8_t*)mask + at, many);
      score = choose(load_bytes(seen) == 0, hidden, score);
    }
    const int64_t end = least_of(many, left);
    if (end >= LANES) return score;
    return choose(lanes >= int32_t(end < 0 ? 0 : end), hidden, score);
  }
};

}  // namespace
