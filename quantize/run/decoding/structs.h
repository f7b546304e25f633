// What a pass is given: the structs that structs.py describes field by field.

#pragma once
#include <cstdint>

enum Kind : int64_t { F32, F16, BF16, INT8, INT4 };

struct Linear {  // y = W x + b, or W (W' x) + b with W' = *first
  int64_t kind, outputs, inputs, group, outliers;
  const void* weight;       // floats [outputs, inputs]; int8: panels of integers.h; int4: of int4.h
  const float* scale;       // int8: [outputs]
  const int32_t* sums;      // int8: of each output's weights, as many as there are in whole panels
  const float* bias;        // [outputs], or null
  const float* factor;      // int8 with outliers: of the inputs before they are quantized [inputs]
  const int64_t* channels;  // those that count in float [outliers]
  const float* kept;        // their weights [outliers, outputs in whole panels]
  const Linear* first;
};

struct Layer {
  const float *attention_norm, *ffn_norm, *q_norm, *k_norm;  // weights; the last two may be null
  Linear q, k, v, out, gate, up, down;
};

struct Model {
  int64_t layers, width, head_dim;
  float norm_eps, rope_scale;
  const float* frequencies;  // radians per position [head_dim / 2]
  const float* norm;
  const Layer* layer;
  Linear head;
};

// One layer of the cache: k, v [batch, kv_heads, capacity, head_dim], scales [batch, kv_heads,
// capacity]. Index 0 of the third axis is position `first`. window 0: none.
struct Held {
  void *k, *v, *k_scale, *v_scale;
  int64_t capacity, first, window;
};

struct Pass {
  int64_t batch, tokens, length, keep;  // `length` are held, `keep` last tokens get logits
  int64_t kind, threads;                // of the cache; of this pass
  const int64_t* pad;                   // [batch] empty positions on the left, or null
  const int64_t* lengths;  // [batch] what each row holds, in a cache of its own; null: `length`
  const Held* held;        // [layers]; with `lengths` [batch, layers], each of one row
  float* x;                // [batch, tokens, width]: embeddings, overwritten
  float* logits;           // [batch, keep, vocabulary]
};
