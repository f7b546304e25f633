// 4-bit weights in the layout of the instruction that multiplies them, and rows in 8 bits.
//
// A panel holds 16 outputs. Of each group of inputs it has blocks of 32: 4 vectors of 64 bytes, and
// in each the next 4 inputs of every output in the low halves of its bytes, the 4 after them in the
// high ones. So one load gives two products. The group's 16 scales and 16 zeros follow (bfloat16).
//
// A row has one step for every 32 inputs: x is about q * step. The sum over a block is an exact
// integer, and the blocks are added in the order of the inputs:
//
//   total += float(sum of q code) * (scale * step)
//   total += (zero - 8 scale) * (step * sum of q)
//
// each as one fused operation. No other row, panel or thread takes part, so neither their number
// nor the way to read the codes changes a bit.

#pragma once
#include "rows.h"
#include "structs.h"

namespace {

constexpr int64_t BLOCK = 32, BLOCK_BYTES = 256;

// Exact sums of 16 outputs over a block.
struct CodeSums {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  // Of two inputs in each 16 bits, in which 8 of 2 * 15 * 127 fit; of 8 outputs and of the others.
  __m256i first = _mm256_setzero_si256(), last = _mm256_setzero_si256();
#elif defined(__SSE2__) && !defined(__AVX512VNNI__)
  Quarters total = {};
#else
  Ints total = {};
#endif

  // codes: up to 15; four: the row's signed bytes that they meet.
  void add(const Bytes& codes, const int8_t* four) {
    int32_t quad;
    memcpy(&quad, four, 4);
#if defined(__AVX512VNNI__)
    total = (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, _mm512_set1_epi32(quad));
#elif defined(__AVX2__)
    const __m256i x = _mm256_set1_epi32(quad);
    add_products(first, _mm256_maddubs_epi16(half_of(codes, 0), x));
    add_products(last, _mm256_maddubs_epi16(half_of(codes, 1), x));
#elif defined(__aarch64__)
    struct Quarters {
      int32x4_t part[4];
    };
    struct Parts {
      int8x16_t part[4];
    };
    Quarters sums = bits<Quarters>(total);
    const Parts all = bits<Parts>(codes);
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
    for (int i = 0; i < 4; i++) sums.part[i] = dot(sums.part[i], all.part[i], x);
    total = bits<Ints>(sums);
#elif defined(__SSE2__)
    const Quarters all = bits<Quarters>(codes);
    const __m128i x = _mm_set1_epi32(quad), odd = _mm_srai_epi16(x, 8);
    const __m128i even = _mm_srai_epi16(_mm_slli_epi16(x, 8), 8);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m128i part = all.part[i];
      const __m128i products = _mm_madd_epi16(_mm_and_si128(part, _mm_set1_epi16(255)), even);
      const __m128i more = _mm_madd_epi16(_mm_srli_epi16(part, 8), odd);
      total.part[i] = _mm_add_epi32(total.part[i], _mm_add_epi32(products, more));
    }
#else
    for (int output = 0; output < 16; output++)
      for (int i = 0; i < 4; i++) total[output] += codes[4 * output + i] * four[i];
#endif
  }
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  static void add_products(__m256i& total, __m256i products) {
    total = _mm256_add_epi16(total, products);
    end_step(total);
  }
#endif
  Floats floats() const {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    const __m256i ones = _mm256_set1_epi16(1);
    return to_floats(joined(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(last, ones)));
#elif defined(__SSE2__) && !defined(__AVX512VNNI__)
    return to_floats(bits<Ints>(total));
#else
    return to_floats(total);
#endif
  }
};

// ------------------------------------------------------------------------------------------------
// rows

// q: bytes [n]; step, sums: one for every 32, the sum times the step. n: a multiple of 32. A block
// with a NaN or an infinity gets a step of NaN.
inline void quantize_blocks(const float* x, int64_t n, int8_t* q, float* step, float* sums) {
  for (int64_t block = 0; block < n / BLOCK; block++) {
    const Floats part[2] = {load(x + BLOCK * block), load(x + BLOCK * block + LANES)};
    const Ints size[2] = {(Ints)part[0] & 0x7fffffff, (Ints)part[1] & 0x7fffffff};
    const int32_t largest = largest_of(choose(size[0] > size[1], size[0], size[1]));
    const bool finite = largest < 0x7f800000;
    float s = bits<float>(largest) * (1.0f / 127);
    s = s < SMALLEST ? SMALLEST : s;
    const float inverse = finite ? 1 / s : 0, shift = 0x1.8p23f;
    Ints total = {};
    for (int half = 0; half < 2; half++) {
      const Floats usable = finite ? part[half] : Floats{};
      const Ints whole = (Ints)(usable * inverse + shift) - bits<int32_t>(shift);
      total += whole;
      store_lowest(whole, q + BLOCK * block + LANES * half);
    }
    step[block] = finite ? s : bits<float>(0x7fc00000);
    sums[block] = step[block] * float(sum(total));
  }
}

struct FineRow {
  const int8_t* q;
  const float *step, *sum;
};

// ------------------------------------------------------------------------------------------------
// products

inline int64_t group_bytes(int64_t group) { return group / BLOCK * BLOCK_BYTES + 64; }
inline int64_t panel_bytes(const Linear& a) { return a.inputs / a.group * group_bytes(a.group); }

// A panel as it is stored.
struct StoredPanel {
  const uint8_t* at;
  int64_t group, ahead;  // bytes from here to what is read next

  void scales(int64_t g, Floats& scale, Floats& shift) const {
    const uint8_t* end = at + (g + 1) * group_bytes(group) - 64;
    __builtin_prefetch(end + ahead);
    scale = load((const Brain*)end);
    shift = load((const Brain*)(end + 32)) - 8.0f * scale;
  }
  // The next 4 inputs of each output, and the 4 after them.
  void codes(int64_t g, int64_t block, int64_t i, Bytes& low, Bytes& high) const {
    const uint8_t* from = at + g * group_bytes(group) + block * BLOCK_BYTES + 64 * i;
    __builtin_prefetch(from + ahead);
    const Bytes both = load_vector<Bytes>(from);
    low = both & 15;
    high = both >> 4;
  }
};

// A panel unpacked to a code per byte: for many rows.
struct WidePanel {
  uint8_t* bytes;  // [inputs / 4][16][4]
  float* floats;   // [groups][2][16]
  int64_t group;

  void fill(const StoredPanel& from, int64_t inputs) {
    for (int64_t g = 0; g < inputs / group; g++) {
      Floats pair[2];
      from.scales(g, pair[0], pair[1]);
      for (int i = 0; i < 2; i++) store_vector(pair[i], floats + 32 * g + LANES * i);
      for (int64_t block = 0; block < group / BLOCK; block++)
        for (int64_t i = 0; i < 4; i++) {
          Bytes two[2];
          from.codes(g, block, i, two[0], two[1]);
          uint8_t* to = bytes + 16 * (g * group + block * BLOCK) + 128 * i;
          for (int part = 0; part < 2; part++) store_vector(two[part], to + 64 * part);
        }
    }
  }
  void scales(int64_t g, Floats& scale, Floats& shift) const {
    scale = load(floats + 32 * g);
    shift = load(floats + 32 * g + LANES);
  }
  void codes(int64_t g, int64_t block, int64_t i, Bytes& low, Bytes& high) const {
    const uint8_t* from = bytes + 16 * (g * group + block * BLOCK) + 128 * i;
    low = load_vector<Bytes>(from);
    high = load_vector<Bytes>(from + 64);
  }
};

// Panels whose sums, of 4 rows, fit the registers, and vectors of a block that are unrolled.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int64_t CODE_PANELS = 1, UNROLLED = 4;
#else
constexpr int64_t CODE_PANELS = 2, UNROLLED = 1;
#endif

// y[r][p] = 16 outputs of panel p for row r.
template <int R, int P, class Panel>
inline void multiply_codes(const Panel* panel, const FineRow* row, int64_t inputs, int64_t group,
                           Floats (*y)[P]) {
  Floats total[R][P] = {};
  const int64_t blocks = group / BLOCK;
  for (int64_t g = 0; g < inputs / group; g++) {
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t at = g * blocks + block;
      CodeSums sums[R][P];
#pragma GCC unroll UNROLLED
      for (int64_t i = 0; i < 4; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          Bytes low, high;
          panel[p].codes(g, block, i, low, high);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) {
            const int8_t* eight = row[r].q + BLOCK * at + 8 * i;
            sums[r][p].add(low, eight);
            sums[r][p].add(high, eight + 4);
          }
        }
      Floats scale[P], shift[P];  // not before: the sums need the registers
      for (int p = 0; p < P; p++) panel[p].scales(g, scale[p], shift[p]);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Floats step = everywhere(row[r].step[at]), sum = everywhere(row[r].sum[at]);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          total[r][p] = multiply_add(sums[r][p].floats(), scale[p] * step, total[r][p]);
          total[r][p] = multiply_add(shift[p], sum, total[r][p]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) y[r][p] = total[r][p];
}

template <int P, class Panel>
inline void multiply_some(int64_t rows, const Panel* panel, const FineRow* row, int64_t inputs,
                          int64_t group, Floats (*y)[P]) {
  switch (rows) {
    case 1:
      return multiply_codes<1, P>(panel, row, inputs, group, y);
    case 2:
      return multiply_codes<2, P>(panel, row, inputs, group, y);
    case 3:
      return multiply_codes<3, P>(panel, row, inputs, group, y);
    default:
      return multiply_codes<4, P>(panel, row, inputs, group, y);
  }
}

// ------------------------------------------------------------------------------------------------
// packing

// packed: [outputs, inputs / 2], even columns in the low halves; scale, zero: [outputs, groups].
inline void pack_codes(const uint8_t* packed, const Brain* scale, const Brain* zero,
                       int64_t outputs, int64_t inputs, int64_t group, uint8_t* to) {
  const int64_t groups = inputs / group, panels = (outputs + LANES - 1) / LANES;
  const int64_t stride = groups * group_bytes(group);
  memset(to, 0, panels * stride);
  for (int64_t output = 0; output < outputs; output++) {
    uint8_t* panel = to + output / LANES * stride;
    const int64_t lane = output % LANES;
    for (int64_t g = 0; g < groups; g++) {
      uint8_t* at = panel + g * group_bytes(group);
      const uint8_t* from = packed + (output * inputs + g * group) / 2;
      for (int64_t i = 0; i < group; i++) {  // input i: vector i / 8, low half for the first 4
        const uint8_t code = from[i / 2] >> 4 * (i % 2) & 15;
        at[i / 8 * 64 + 4 * lane + i % 4] |= code << i % 8 / 4 * 4;
      }
      Brain* scales = (Brain*)(at + group / BLOCK * BLOCK_BYTES);
      scales[lane] = scale[output * groups + g];
      scales[LANES + lane] = zero[output * groups + g];
    }
  }
}

}  // namespace
