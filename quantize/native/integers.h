// Exact sums of products of uint8 rows and int8 weights, for each instruction set.
//
// Weights are interleaved: a panel holds 16 outputs, and of each the next 4 weights side by side,
// so that one vector of 64 bytes meets 4 bytes of a row. STEP of them follow each other:
// PANEL_BYTES(k) = 16 k bytes, where k is filled up with zeros.

#pragma once
#include "numbers.h"

#include <atomic>

#if defined(__AMX_INT8__)
#define QUANTIZE_TILES 1
#endif

namespace {

// Sums of 16 outputs, and the next 4 bytes of a row in the form that they are multiplied in.
#if defined(__AVX512VNNI__)
struct Quad {
  __m512i bytes;
  explicit Quad(int32_t q) : bytes(_mm512_set1_epi32(q)) {}
};
struct Weights {
  __m512i bytes;
  explicit Weights(const int8_t* w) : bytes(_mm512_loadu_si512(w)) {}
};
struct Sums {
  __m512i total = _mm512_setzero_si512();
  void add(const Quad& q, const Weights& w) {
    total = _mm512_dpbusd_epi32(total, q.bytes, w.bytes);
  }
  void store(int32_t* to) const { _mm512_storeu_si512(to, total); }
};
constexpr int MOST_ROWS = 4, MOST_PANELS = 4;
#elif defined(__AVX512BW__)
// Through 16 bits, even and odd places apart: the product of bytes saturates.
struct Quad {
  __m512i even, odd;
  explicit Quad(int32_t q)
      : even(_mm512_set1_epi32(q & 0xff00ff)), odd(_mm512_set1_epi32(q >> 8 & 0xff00ff)) {}
};
struct Weights {
  __m512i even, odd;
  explicit Weights(const int8_t* w) {
    const __m512i bytes = _mm512_loadu_si512(w);
    even = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8);
    odd = _mm512_srai_epi16(bytes, 8);
  }
};
struct Sums {
  __m512i total = _mm512_setzero_si512();
  void add(const Quad& q, const Weights& w) {
    const __m512i products = _mm512_madd_epi16(q.even, w.even);
    total = _mm512_add_epi32(total, _mm512_add_epi32(products, _mm512_madd_epi16(q.odd, w.odd)));
  }
  void store(int32_t* to) const { _mm512_storeu_si512(to, total); }
};
constexpr int MOST_ROWS = 4, MOST_PANELS = 2;
#elif defined(__AVX2__)
#define QUANTIZE_UNPACKS 1
struct Quad {
  __m256i even, odd;
  explicit Quad(int32_t q) {
    const __m256i bytes = _mm256_set1_epi32(q);
    even = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
    odd = _mm256_srli_epi16(bytes, 8);
  }
};
struct Weights {
  __m256i even[2], odd[2];
  Weights() = default;
  explicit Weights(const int8_t* w) {
    for (int half = 0; half < 2; half++) {
      const __m256i bytes = _mm256_loadu_si256((const __m256i*)w + half);
      even[half] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
      odd[half] = _mm256_srai_epi16(bytes, 8);
    }
  }
};
struct Sums {
  __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  void add(const Quad& q, const Weights& w) {
    for (int half = 0; half < 2; half++) {
      const __m256i products = _mm256_madd_epi16(q.even, w.even[half]);
      const __m256i more = _mm256_madd_epi16(q.odd, w.odd[half]);
      total[half] = _mm256_add_epi32(total[half], _mm256_add_epi32(products, more));
    }
  }
  void add_in_order(const Quad& q, const Weights& w) {
    for (int half = 0; half < 2; half++) {
      add_products(half, _mm256_madd_epi16(q.even, w.even[half]));
      add_products(half, _mm256_madd_epi16(q.odd, w.odd[half]));
    }
  }
  void add_products(int half, __m256i products) {
    total[half] = _mm256_add_epi32(total[half], products);
    end_step(total[half]);
  }
  void load(const int32_t* from) {
    for (int half = 0; half < 2; half++)
      total[half] = _mm256_loadu_si256((const __m256i*)from + half);
  }
  void store(int32_t* to) const {
    for (int half = 0; half < 2; half++) _mm256_storeu_si256((__m256i*)to + half, total[half]);
  }
};
constexpr int MOST_ROWS = 32, MOST_PANELS = 2;
#elif defined(__aarch64__)
// Weights are moved up by 128, so that both factors have no sign; `shift` is what that adds.
struct Quad {
  uint8x16_t bytes;
  explicit Quad(int32_t q) : bytes(vreinterpretq_u8_s32(vdupq_n_s32(q))) {}
};
struct Weights {
  uint8x16_t part[4];
  explicit Weights(const int8_t* w) {
    for (int i = 0; i < 4; i++)
      part[i] = veorq_u8(vld1q_u8((const uint8_t*)w + 16 * i), vdupq_n_u8(128));
  }
};
struct Sums {
  uint32x4_t total[4] = {}, shift = {};
  void add(const Quad& q, const Weights& w) {
    for (int i = 0; i < 4; i++) total[i] = dot(total[i], q.bytes, w.part[i]);
    shift = dot(shift, q.bytes, vdupq_n_u8(128));
  }
  void store(int32_t* to) const {
    for (int i = 0; i < 4; i++)
      vst1q_s32(to + 4 * i, vreinterpretq_s32_u32(vsubq_u32(total[i], shift)));
  }
};
constexpr int MOST_ROWS = 4, MOST_PANELS = 1;
#elif defined(__SSE2__)
struct Quad {
  __m128i even, odd;
  explicit Quad(int32_t q) {
    const __m128i bytes = _mm_set1_epi32(q);
    even = _mm_and_si128(bytes, _mm_set1_epi16(255));
    odd = _mm_srli_epi16(bytes, 8);
  }
};
struct Weights {
  const __m128i* bytes;
  explicit Weights(const int8_t* w) : bytes((const __m128i*)w) {}
};
struct Sums {
  __m128i total[4] = {};
  void add(const Quad& q, const Weights& w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m128i bytes = _mm_loadu_si128(w.bytes + i);
      const __m128i even = _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8);
      const __m128i products = _mm_madd_epi16(q.even, even);
      const __m128i more = _mm_madd_epi16(q.odd, _mm_srai_epi16(bytes, 8));
      total[i] = _mm_add_epi32(total[i], _mm_add_epi32(products, more));
    }
  }
  void store(int32_t* to) const {
    for (int i = 0; i < 4; i++) _mm_storeu_si128((__m128i*)to + i, total[i]);
  }
};
constexpr int MOST_ROWS = 4, MOST_PANELS = 1;
#else
struct Quad {
  int32_t byte[4];
  explicit Quad(int32_t q) {
    for (int i = 0; i < 4; i++) byte[i] = q >> 8 * i & 255;
  }
};
struct Weights {
  const int8_t* bytes;
  explicit Weights(const int8_t* w) : bytes(w) {}
};
struct Sums {
  int32_t total[16] = {};
  void add(const Quad& q, const Weights& w) {
    for (int output = 0; output < 16; output++)
      for (int i = 0; i < 4; i++) total[output] += q.byte[i] * w.bytes[4 * output + i];
  }
  void store(int32_t* to) const { memcpy(to, total, sizeof total); }
};
constexpr int MOST_ROWS = 4, MOST_PANELS = 1;
#endif

// sums[r][p] = 16 outputs of panel p for row r. q: rows `stride` apart; w: panels `panel` bytes
// apart; k: a multiple of 4.
template <int R, int P>
inline void multiply_block(const uint8_t* q, int64_t stride, const int8_t* w, int64_t panel,
                           int64_t k, int32_t* sums) {
  Sums total[R][P];
  for (int64_t i = 0; i < k; i += 4) {
    for (int p = 0; p < P; p++) {
      const Weights weights(w + p * panel + 16 * i);
      for (int r = 0; r < R; r++) {
        int32_t four;
        memcpy(&four, q + r * stride + i, 4);
        total[r][p].add(Quad(four), weights);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) total[r][p].store(sums + (r * P + p) * 16);
}

#if defined(QUANTIZE_UNPACKS)

// sums of R rows and unpacked weights [k / 4][P]; more: are added to those that are there.
template <int R, int P>
inline void add_unpacked(const uint8_t* q, int64_t stride, const Weights* w, int64_t k, bool more,
                         int32_t* sums) {
  Sums total[R][P];
  for (int r = 0; r < R && more; r++)
    for (int p = 0; p < P; p++) total[r][p].load(sums + (r * P + p) * 16);
  for (int64_t i = 0; i < k; i += 4, w += P) {
    for (int r = 0; r < R; r++) {
      int32_t four;
      memcpy(&four, q + r * stride + i, 4);
      const Quad quad(four);
      for (int p = 0; p < P; p++) total[r][p].add_in_order(quad, w[p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) total[r][p].store(sums + (r * P + p) * 16);
}

// Weights of many rows are unpacked once for all of them, as many as the nearest cache holds.
template <int P>
inline void multiply_rows(int64_t rows, const uint8_t* q, int64_t stride, const int8_t* w,
                          int64_t panel, int64_t k, int32_t* sums) {
  constexpr int64_t UNPACKED = 256, ROWS_WORTH_IT = 5;
  const int64_t whole = rows / 2 * 2;
  if (rows < ROWS_WORTH_IT) {
    for (int64_t r = 0; r < whole; r += 2)
      multiply_block<2, P>(q + r * stride, stride, w, panel, k, sums + r * P * 16);
    if (whole < rows)
      multiply_block<1, P>(q + whole * stride, stride, w, panel, k, sums + whole * P * 16);
    return;
  }
  Weights unpacked[UNPACKED / 4 * P];
  for (int64_t from = 0; from < k; from += UNPACKED, q += UNPACKED) {
    const int64_t many = k - from < UNPACKED ? k - from : UNPACKED;
    for (int64_t i = 0; i < many; i += 4)
      for (int p = 0; p < P; p++)
        unpacked[i / 4 * P + p] = Weights(w + p * panel + 16 * (from + i));
    for (int64_t r = 0; r < whole; r += 2)
      add_unpacked<2, P>(q + r * stride, stride, unpacked, many, from > 0, sums + r * P * 16);
    if (whole < rows)
      add_unpacked<1, P>(q + whole * stride, stride, unpacked, many, from > 0,
                         sums + whole * P * 16);
  }
}

#else

template <int P>
inline void multiply_rows(int64_t rows, const uint8_t* q, int64_t stride, const int8_t* w,
                          int64_t panel, int64_t k, int32_t* sums) {
  switch (rows) {
    case 1:
      return multiply_block<1, P>(q, stride, w, panel, k, sums);
    case 2:
      return multiply_block<2, P>(q, stride, w, panel, k, sums);
    case 3:
      return multiply_block<3, P>(q, stride, w, panel, k, sums);
    default:
      return multiply_block<4, P>(q, stride, w, panel, k, sums);
  }
}

#endif

// ------------------------------------------------------------------------------------------------
// matrix tiles

#if defined(QUANTIZE_TILES)

struct TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr TileShapes() {
    for (int tile = 0; tile < 8; tile++) bytes[tile] = 64, rows[tile] = 16;
  }
};

// Tiles 0 to 3 are sums of 16 rows and 16 outputs, 4 and 5 rows of q, 6 and 7 weights. They are
// this thread's from here on. Compilers don't know that tiles are loaded from memory: all that was
// written to it before has to be there.
inline void open_tiles() {
  static constexpr TileShapes SHAPES;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  _tile_loadconfig(&SHAPES);
}
inline void close_tiles() { _tile_release(); }

struct Nothing {
  void operator()() const {}
};

// sums [16 R][16 P]: of 16 R rows and P panels, for R and P of 1 or 2. k: a multiple of 64.
// meanwhile: is called for each 64 of k, before sums are written.
template <int R, int P, class Work = Nothing>
inline void multiply_tiles(const uint8_t* q, int64_t stride, const int8_t* w, int64_t panel,
                           int64_t k, int32_t* sums, const Work& meanwhile = {}) {
  _tile_zero(0);
  if (P == 2) _tile_zero(1);
  if (R == 2) _tile_zero(2);
  if (R == 2 && P == 2) _tile_zero(3);
  for (int64_t i = 0; i < k; i += 64) {
    _tile_loadd(4, q + i, stride);
    _tile_loadd(6, w + 16 * i, 64);
    _tile_dpbusd(0, 4, 6);
    if (P == 2) {
      _tile_loadd(7, w + panel + 16 * i, 64);
      _tile_dpbusd(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, q + 16 * stride + i, stride);
      _tile_dpbusd(2, 5, 6);
    }
    if (R == 2 && P == 2) _tile_dpbusd(3, 5, 7);
    meanwhile();
  }
  _tile_stored(0, sums, 64 * P);
  if (P == 2) _tile_stored(1, sums + 16, 64 * P);
  if (R == 2) _tile_stored(2, sums + 256 * P, 64 * P);
  if (R == 2 && P == 2) _tile_stored(3, sums + 256 * P + 16, 64 * P);
}

#endif

}  // namespace
