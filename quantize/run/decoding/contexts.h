// Which part of a cache a row sees, and the attention of many neighbouring rows.

#pragma once
#include "attention.h"

#include <vector>

namespace {

// Positions in the cache, as indices into its third axis.
struct Seen {
  int64_t low, high;
};

// One layer's cache, or caches, and the texts in it.
struct Context {
  const Pass& pass;
  int64_t layer, layers, heads, kv_heads, d;

  int64_t group() const { return heads / kv_heads; }
  int64_t text(int64_t row) const { return row / pass.tokens; }
  int64_t pad(int64_t row) const { return pass.pad ? pass.pad[text(row)] : 0; }
  int64_t place(int64_t row) const {
    return (pass.lengths ? pass.lengths[text(row)] : pass.length) + row % pass.tokens;
  }
  const Held& held(int64_t row) const {
    return pass.held[pass.lengths ? text(row) * layers + layer : layer];
  }

  // What a row sees. Padding sees itself, so that it sees something.
  Seen seen(int64_t row) const {
    const Held& own = held(row);
    const int64_t here = place(row);
    int64_t low = pad(row);
    if (own.window && here - own.window + 1 > low) low = here - own.window + 1;
    low = low > here ? here : low;
    return {low - own.first, here + 1 - own.first};
  }

  // Chunks of a row's text that lie in what it sees: from the first to before the last.
  Seen chunks(int64_t row) const {
    const Seen all = seen(row);
    const int64_t start = pad(row) - held(row).first;  // of the text
    if (all.low < start) return {0, 1};
    return {(all.low - start) / CHUNK, (all.high - 1 - start) / CHUNK + 1};
  }

  Seen part(int64_t row, int64_t chunk) const {
    Seen all = seen(row);
    const int64_t text_start = pad(row) - held(row).first, start = text_start + chunk * CHUNK;
    if (all.low < text_start) return all;
    all.low = all.low > start ? all.low : start;
    all.high = all.high < start + CHUNK ? all.high : start + CHUNK;
    return all;
  }

  // Index of a key's or value's position in all that its cache holds.
  int64_t at(int64_t row, int64_t kv, int64_t position) const {
    const int64_t slot = pass.lengths ? 0 : text(row);
    return (slot * kv_heads + kv) * held(row).capacity + position;
  }
};

template <class T>
Keys<T> keys_at(const Held& held, int64_t at, int64_t d) {
  return {(const T*)held.k + at * d, (const T*)held.v + at * d,
          held.k_scale ? (const Brain*)held.k_scale + at : nullptr,
          held.v_scale ? (const Brain*)held.v_scale + at : nullptr};
}

inline void attend_part(const Query* query, int64_t many, const Context& in, const Held& held,
                        int64_t at) {
  const int64_t d = in.d;
  if (in.pass.kind == F32)
    attend_all(query, many, keys_at<float>(held, at, d), d);
  else if (in.pass.kind == F16)
    attend_all(query, many, keys_at<Half>(held, at, d), d);
  else if (in.pass.kind == BF16)
    attend_all(query, many, keys_at<Brain>(held, at, d), d);
  else
    attend_all(query, many, keys_at<int8_t>(held, at, d), d);
}

// Attention of neighbouring rows of one text in one cache, a chunk for all of them after the other.
struct Neighbours {
  static constexpr int64_t MOST = 32;
  const Context& in;
  const Held& held;
  const int64_t together;  // rows whose queries are computed at once
  std::vector<float> sums, peak, total, part, k, v;
  std::vector<Query> query;

  explicit Neighbours(const Context& in)
      : in(in),
        held(in.held(0)),
        together(in.group() < MOST_QUERIES ? MOST_QUERIES / in.group() : 1),
        sums(MOST * in.group() * in.d),
        peak(MOST * in.group()),
        total(MOST * in.group()),
        part(together * in.group() * (in.d + 2)),
        query(together * in.group()) {
    if (!widens()) return;
    k.resize(CHUNK * in.d);
    v.resize(CHUNK * in.d);
  }

  // Whether keys and values are made floats once for all rows.
  bool widens() const { return in.pass.kind == F16 || in.pass.kind == BF16; }

  Found found(int64_t i) {
    return {&sums[i * in.group() * in.d], &peak[i * in.group()], &total[i * in.group()]};
  }

  // rows low to high, of which q [.., stride] holds the queries and y [.., stride] gets the sums.
  void run(int64_t low, int64_t high, int64_t kv, const float* q, int64_t q_stride, float* y,
           int64_t y_stride) {
    const int64_t group = in.group(), d = in.d;
    for (int64_t i = 0; i < (high - low) * group; i++) peak[i] = -INFINITY, total[i] = 0;
    memset(sums.data(), 0, (high - low) * group * d * sizeof(float));
    const int64_t last = in.chunks(high - 1).high;
    for (int64_t chunk = in.chunks(low).low; chunk < last; chunk++)
      add_chunk(low, high, kv, chunk, q, q_stride);
    for (int64_t row = low; row < high; row++)
      for (int64_t h = 0; h < group; h++) {
        const Found all = found(row - low);
        float* to = y + row * y_stride + (kv * group + h) * d;
        for (int64_t i = 0; i < d; i++) to[i] = all.sums[h * d + i] / all.total[h];
      }
  }

  void add_chunk(int64_t low, int64_t high, int64_t kv, int64_t chunk, const float* q,
                 int64_t stride) {
    Seen wide = {held.capacity, 0};
    for (int64_t row = low; row < high; row++) {
      const Seen own = part_of(row, chunk);
      if (own.low >= own.high) continue;
      wide.low = own.low < wide.low ? own.low : wide.low;
      wide.high = own.high > wide.high ? own.high : wide.high;
    }
    const bool widened = widens() && wide.high - wide.low <= CHUNK;
    if (widened) widen_rows(in.at(low, kv, wide.low), wide.high - wide.low);
    for (int64_t row = low; row < high;) {
      const Seen own = part_of(row, chunk);
      int64_t end = row + 1;
      while (end < high && end < row + together && part_of(end, chunk).low == own.low) end++;
      if (own.low < own.high) {
        const int64_t many = ask(row, end, kv, chunk, q, stride);
        const int64_t at = in.at(row, kv, own.low);
        if (widened)
          attend_floats(many, own.low - wide.low);
        else
          attend_part(query.data(), many, in, held, at);
        for (int64_t i = 0; i < end - row; i++)
          join(found(row + i - low), part_found(i), in.group(), in.d);
      }
      row = end;
    }
  }

  Found part_found(int64_t i) {
    const int64_t many = together * in.group();
    float *peak_of = part.data() + many * in.d, *total_of = peak_of + many;
    return Found{part.data(), peak_of, total_of}.of(i * in.group(), in.d);
  }

  // The queries of some rows' heads; returns how many.
  int64_t ask(int64_t row, int64_t end, int64_t kv, int64_t chunk, const float* q, int64_t stride) {
    const int64_t group = in.group(), d = in.d;
    int64_t many = 0;
    for (int64_t r = row; r < end; r++) {
      const Seen own = part_of(r, chunk);
      const float* x = q + r * stride + kv * group * d;
      for (int64_t h = 0; h < group; h++)
        query[many++] = {x + h * d, own.high - own.low, part_found(r - row).of(h, d)};
    }
    return many;
  }

  // Nothing of a chunk that isn't the row's.
  Seen part_of(int64_t row, int64_t chunk) const {
    const Seen own = in.chunks(row);
    return chunk < own.low || chunk >= own.high ? Seen{0, 0} : in.part(row, chunk);
  }

  void widen_rows(int64_t at, int64_t n) {
    const int64_t from = at * in.d, many = n * in.d;
    if (in.pass.kind == F16)
      widen_all((const Half*)held.k + from, (const Half*)held.v + from, many);
    else
      widen_all((const Brain*)held.k + from, (const Brain*)held.v + from, many);
  }
  template <class T>
  void widen_all(const T* keys, const T* values, int64_t many) {
    for (int64_t i = 0; i < many; i++) k[i] = widen(keys[i]);
    for (int64_t i = 0; i < many; i++) v[i] = widen(values[i]);
  }

  void attend_floats(int64_t many, int64_t offset) {
    const Keys<float> keys = {&k[offset * in.d], &v[offset * in.d], nullptr, nullptr};
    attend_all(query.data(), many, keys, in.d);
  }
};

}  // namespace
