// A pass of a Llama-style decoder over the next tokens of some texts: one, a few, or a prompt.
//
// All threads run the same code from top to bottom. Each takes its own part of the rows, heads or
// outputs of a stage, and a barrier stands between two stages. With few rows a layer takes as long
// as its weights take to arrive from memory, and each is read once. A token's numbers don't depend
// on how many tokens are computed with it, nor on the number of threads (compiled without
// contraction: every operation rounds by itself). native.py builds the structs.

#include "contexts.h"
#include "products.h"

namespace {

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  Floats lanes = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) lanes += load(x + i) * load(x + i);
  float squares = sum(lanes);
  for (; i < n; i++) squares += x[i] * x[i];
  const float factor = 1 / sqrtf(squares / n + eps);
  for (i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

void rotate(float* x, const float* cosine, const float* sine, int64_t d) {
  for (int64_t i = 0; i < d / 2; i++) {
    const float a = x[i], b = x[i + d / 2];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + d / 2] = b * cosine[i] + a * sine[i];
  }
}

void store(const float* x, int64_t n, int64_t kind, void* held, void* scales, int64_t row) {
  if (kind == F32) memcpy((float*)held + row * n, x, n * sizeof(float));
  if (kind == F16)
    for (int64_t i = 0; i < n; i++) ((Half*)held)[row * n + i] = to_half(x[i]);
  if (kind == BF16)
    for (int64_t i = 0; i < n; i++) ((Brain*)held)[row * n + i] = to_brain(x[i]);
  if (kind == INT8) {  // as kv_cache.functions.quantize_rows does it
    const float s = largest(x, n) / 126.5f;
    const Brain scale = to_brain(s < 1e-30f ? 1e-30f : s);
    ((Brain*)scales)[row] = scale;
    for (int64_t i = 0; i < n; i++) {
      const float v = nearbyintf(x[i] / widen(scale));
      ((int8_t*)held)[row * n + i] = int8_t(v > 127 ? 127 : v > -127 ? v : -127);
    }
  }
}

// The most that a pass needs room for, over all layers.
struct Sizes {
  int64_t most, qkv = 0, ffn = 0, heads = 0, inputs = 0, kinds = 0, inner = 0, inner_kinds = 0;

  Sizes(const Model& model) : most(model.width), inputs(model.width) {
    for (int64_t i = 0; i < model.layers; i++) {
      const Layer& a = model.layer[i];
      raise(qkv, a.q.outputs + a.k.outputs + a.v.outputs);
      raise(ffn, a.gate.outputs);
      raise(heads, a.q.outputs / model.head_dim);
      for (const Linear* part : {&a.q, &a.k, &a.v, &a.out, &a.gate, &a.up, &a.down}) note(*part);
    }
    note(model.head);
  }
  static void raise(int64_t& most, int64_t value) { most = value > most ? value : most; }
  void note(const Linear& a) {
    kinds |= kinds_of(a);
    raise(inputs, a.first ? a.first->inputs : a.inputs);
    if (!a.first && !a.factor) return;
    raise(inner, a.inputs);
    inner_kinds |= int64_t(1) << a.kind;
  }
};

struct Run {
  static constexpr int64_t FEW_ROWS = 16;  // up to so many, threads share a row's chunks
  const Model& model;
  const Pass& pass;
  const Sizes size;
  const int64_t rows, d, width;
  Input in, middle;
  std::vector<float> qkv, gate, rest, cosine, sine, sums, peak, total;
  int64_t most_chunks = 1;

  Run(const Model& model, const Pass& pass)
      : model(model),
        pass(pass),
        size(model),
        rows(pass.batch * pass.tokens),
        d(model.head_dim),
        width(model.width),
        in(rows, size.inputs, size.kinds),
        middle(size.inner ? rows : 0, size.inner, size.inner_kinds),
        qkv(rows * size.qkv),
        gate(rows * size.ffn),
        rest(rows * size.ffn),
        cosine(rows * d / 2),
        sine(rows * d / 2) {
    if (rows > FEW_ROWS) return;
    for (int64_t i = 0; i < model.layers; i++)
      for (int64_t row = 0; row < rows; row++) {
        const Seen chunks = context(i).chunks(row);
        Sizes::raise(most_chunks, chunks.high - chunks.low);
      }
    sums.resize(rows * most_chunks * size.heads * d);
    peak.resize(rows * most_chunks * size.heads);
    total.resize(rows * most_chunks * size.heads);
  }

  Context context(int64_t layer) const {
    const Layer& a = model.layer[layer];
    return {pass, layer, model.layers, a.q.outputs / d, a.k.outputs / d, d};
  }

  void all() {
    angles();
    for (int64_t i = 0; i < model.layers; i++) layer(model.layer[i], context(i));
    logits();
  }

  void angles() {
    const Context first = context(0);
    const Span own = own_part(rows);
    for (int64_t row = own.low; row < own.high; row++) {
      const int64_t place = first.place(row) - first.pad(row);
      for (int64_t i = 0; i < d / 2; i++) {
        const float angle = float(place > 0 ? place : 0) * model.frequencies[i];
        cosine[row * d / 2 + i] = cosf(angle) * model.rope_scale;
        sine[row * d / 2 + i] = sinf(angle) * model.rope_scale;
      }
    }
  }

  void layer(const Layer& a, const Context& context) {
    const int64_t wide = (context.heads + 2 * context.kv_heads) * d;
    normalize(a.attention_norm, kinds_of(a.q) | kinds_of(a.k) | kinds_of(a.v));
    apply(a.q, in, middle, rows, qkv.data(), wide);
    apply(a.k, in, middle, rows, qkv.data() + context.heads * d, wide);
    apply(a.v, in, middle, rows, qkv.data() + (context.heads + context.kv_heads) * d, wide);
#pragma omp barrier
    keep_heads(a, context, wide);
#pragma omp barrier
    attend(context, wide);
#pragma omp barrier
    prepare(context.heads * d, kinds_of(a.out));
    apply(a.out, in, middle, rows, pass.x, width, true);
#pragma omp barrier
    normalize(a.ffn_norm, kinds_of(a.gate) | kinds_of(a.up));
    const int64_t hidden = a.gate.outputs;
    apply(a.gate, in, middle, rows, gate.data(), hidden);
    apply(a.up, in, middle, rows, rest.data(), hidden);
#pragma omp barrier
    join_gates(hidden, kinds_of(a.down));
    apply(a.down, in, middle, rows, pass.x, width, true);
#pragma omp barrier
  }

  // Each row of x, normalized, into `in`.
  void normalize(const float* weight, int64_t kinds) {
    const Span own = own_part(rows);
    for (int64_t row = own.low; row < own.high; row++) {
      rms_norm(pass.x + row * width, weight, width, model.norm_eps, &in.value[row * width]);
      in.prepare(row, width, kinds);
    }
#pragma omp barrier
  }

  void prepare(int64_t many, int64_t kinds) {
    const Span own = own_part(rows);
    for (int64_t row = own.low; row < own.high; row++) in.prepare(row, many, kinds);
#pragma omp barrier
  }

  void join_gates(int64_t hidden, int64_t kinds) {
    const Span own = own_part(rows);
    for (int64_t row = own.low; row < own.high; row++) {
      const float *left = &gate[row * hidden], *right = &rest[row * hidden];
      float* to = &in.value[row * hidden];
#pragma omp simd
      for (int64_t i = 0; i < hidden; i++) to[i] = left[i] / (1 + exponential(-left[i])) * right[i];
      in.prepare(row, hidden, kinds);
    }
#pragma omp barrier
  }

  // Normalizes and turns queries and keys, and puts keys and values into the cache.
  void keep_heads(const Layer& a, const Context& context, int64_t wide) {
    const int64_t heads = context.heads, kv_heads = context.kv_heads, all = heads + 2 * kv_heads;
    const Span own = own_part(rows * all);
    for (int64_t i = own.low; i < own.high; i++) {
      const int64_t row = i / all, head = i % all;
      float* x = &qkv[row * wide + head * d];
      const float* weight = head < heads ? a.q_norm : a.k_norm;
      if (head < heads + kv_heads) {
        if (weight) rms_norm(x, weight, d, model.norm_eps, x);
        rotate(x, &cosine[row * d / 2], &sine[row * d / 2], d);
      }
      if (head < heads) continue;
      const bool key = head < heads + kv_heads;
      const Held& held = context.held(row);
      const int64_t at =
          context.at(row, (head - heads) % kv_heads, context.place(row) - held.first);
      store(x, d, pass.kind, key ? held.k : held.v, key ? held.k_scale : held.v_scale, at);
    }
  }

  void attend(const Context& context, int64_t wide) {
    const Tiles tiles(pass.kind == INT8 && attends_by_tiles(d));
    if (rows > FEW_ROWS)
      attend_blocks(context, wide);
    else
      attend_chunks(context, wide);
  }

  // Few rows: chunks are shared out, and joined when all are there. A thread takes several in turn,
  // as each asks for the next one's keys, but not so many that a long row is left to it alone.
  void attend_chunks(const Context& context, int64_t wide) {
    const int64_t heads = context.heads, kv_heads = context.kv_heads, group = context.group();
    const int64_t parts = (rows > 1 ? 2 : 1) * thread_count();
    const int64_t in_turn = (kv_heads * most_chunks + parts - 1) / parts;
    std::vector<Query> query(group);
#pragma omp for schedule(dynamic, in_turn) collapse(3)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t kv = 0; kv < kv_heads; kv++)
        for (int64_t i = 0; i < most_chunks; i++) {
          const Seen chunks = context.chunks(row);
          if (chunks.low + i >= chunks.high) continue;
          const Seen part = context.part(row, chunks.low + i);
          const float* q = &qkv[row * wide + kv * group * d];
          const Found to = found(row, i, kv * group);
          for (int64_t h = 0; h < group; h++)
            query[h] = {q + h * d, part.high - part.low, to.of(h, d)};
          attend_part(query.data(), group, context, context.held(row),
                      context.at(row, kv, part.low));
        }
    const Span own = own_part(rows * heads);
    for (int64_t task = own.low; task < own.high; task++) {
      const int64_t row = task / heads, head = task % heads;
      const Seen chunks = context.chunks(row);
      float* y = &in.value[task * d];
      float most = -INFINITY, weights = 0;
      memset(y, 0, d * sizeof(float));
      for (int64_t i = 0; i < chunks.high - chunks.low; i++)
        join({y, &most, &weights}, found(row, i, head), 1, d);
      for (int64_t k = 0; k < d; k++) y[k] = y[k] / weights;
    }
  }
  Found found(int64_t row, int64_t chunk, int64_t head) {
    const int64_t at = (row * most_chunks + chunk) * size.heads + head;
    return {&sums[at * d], &peak[at], &total[at]};
  }

  // Many rows: blocks of neighbouring rows are shared out.
  void attend_blocks(const Context& context, int64_t wide) {
    constexpr int64_t MOST = Neighbours::MOST;
    const int64_t blocks = (pass.tokens + MOST - 1) / MOST;
    Neighbours neighbours(context);
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t text = 0; text < pass.batch; text++)
      for (int64_t block = blocks - 1; block >= 0; block--)  // the longest first
        for (int64_t kv = 0; kv < context.kv_heads; kv++) {
          const int64_t low = block * MOST;
          const int64_t high = low + MOST < pass.tokens ? low + MOST : pass.tokens;
          const int64_t first = text * pass.tokens;
          neighbours.run(first + low, first + high, kv, qkv.data(), wide, in.value.data(),
                         context.heads * d);
        }
  }

  void logits() {
    const int64_t kept = pass.batch * pass.keep;
    if (kept == 0) return;
    const Span own = own_part(kept);
    for (int64_t row = own.low; row < own.high; row++) {
      const int64_t from = (row / pass.keep + 1) * pass.tokens - pass.keep + row % pass.keep;
      rms_norm(pass.x + from * width, model.norm, width, model.norm_eps, &in.value[row * width]);
      in.prepare(row, width, kinds_of(model.head));
    }
#pragma omp barrier
    apply(model.head, in, middle, kept, pass.logits, model.head.outputs);
  }
};

}  // namespace

extern "C" {

// What structs.py compares with its own before the first call.
extern const int64_t linear_bytes, layer_bytes, model_bytes, held_bytes, pass_bytes;
const int64_t linear_bytes = sizeof(Linear);
const int64_t layer_bytes = sizeof(Layer);
const int64_t model_bytes = sizeof(Model);
const int64_t held_bytes = sizeof(Held);
const int64_t pass_bytes = sizeof(Pass);

// 0: it uses no instructions that a process has to ask for.
int open_library() { return 0; }

void decode(const Model* model, const Pass* pass) {
  Run run(*model, *pass);
#pragma omp parallel num_threads(int(pass->threads))
  run.all();
}

// Asks for what the caller reads next, wherever it lies.
void fetch_lines(const void* const* addresses, int64_t count) {
  for (int64_t i = 0; i < count; i++) __builtin_prefetch(addresses[i]);
}

// Bytes of a 4-bit layer's panels.
int64_t int4_bytes(int64_t outputs, int64_t inputs, int64_t group) {
  return (outputs + LANES - 1) / LANES * (inputs / group * group_bytes(group));
}

void pack_int4(const uint8_t* packed, const void* scale, const void* zero, int64_t outputs,
               int64_t inputs, int64_t group, uint8_t* to) {
  pack_codes(packed, (const Brain*)scale, (const Brain*)zero, outputs, inputs, group, to);
}
}
