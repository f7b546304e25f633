// The sums of int8_attention.h by matrix tiles: exact, as those of every instruction are.

#pragma once
#include "integers.h"

#if defined(QUANTIZE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t CHUNK = 256;  // positions; 2^16 * 127 * CHUNK fits 32 bits
constexpr int64_t WIDE = 64;    // bytes of a vector
constexpr int64_t TILE = 16;    // rows of a tile

// Asks for rows that are read later, for the second level of cache: a chunk is too short for the
// CPU to notice by itself where it goes on.
template <class T>
inline void fetch(const T* rows, int64_t count, int64_t d) {
  for (int64_t i = 0; i < count * d * int64_t(sizeof(T)); i += 64)
    __builtin_prefetch((const char*)rows + i, 0, 2);
}

#if defined(QUANTIZE_TILES)

// Whether this process may use tiles.
inline bool tiles_are_open() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool open = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return open;
}

// Tiles of this thread for as long as it lives.
struct Tiles {
  const bool open;

  explicit Tiles(bool wanted) : open(wanted && tiles_are_open()) {
    if (open) open_tiles();
  }
  ~Tiles() {
    if (open) close_tiles();
  }
};

// Part i of each of four vectors of four bytes: y[j], quarter r: part 4 r + j.
inline void turn_fours(const __m512i* x, __m512i* y) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
  const __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  y[0] = _mm512_unpacklo_epi64(a, b);
  y[1] = _mm512_unpackhi_epi64(a, b);
  y[2] = _mm512_unpacklo_epi64(c, d);
  y[3] = _mm512_unpackhi_epi64(c, d);
}

// Rows of bytes for scores, as the right side of a product: [d / 4][TILE][4]. Those of four
// queries go to the columns from one on.
inline void fill_columns(const int8_t* const* rows, int64_t column, int64_t d, int8_t* columns) {
  for (int64_t at = 0; at < d; at += WIDE) {
    __m512i four[4], turned[4];
    for (int m = 0; m < 4; m++)
      four[m] = rows[m] ? _mm512_loadu_si512(rows[m] + at) : _mm512_setzero_si512();
    turn_fours(four, turned);
    for (int j = 0; j < 4; j++) {
      int8_t* to = columns + TILE * (at + 4 * j) + 4 * column;
      _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(turned[j]));
      _mm_storeu_si128((__m128i*)(to + 4 * WIDE), _mm512_extracti32x4_epi32(turned[j], 1));
      _mm_storeu_si128((__m128i*)(to + 8 * WIDE), _mm512_extracti32x4_epi32(turned[j], 2));
      _mm_storeu_si128((__m128i*)(to + 12 * WIDE), _mm512_extracti32x4_epi32(turned[j], 3));
    }
  }
}

// Four numbers of every fourth row.
inline __m512i fours(const int32_t (*row)[TILE], int64_t column) {
  const auto four = [&](int i) { return _mm_load_si128((const __m128i*)(row[4 * i] + column)); };
  __m512i all = _mm512_castsi128_si512(four(0));
  all = _mm512_inserti32x4(all, four(1), 1);
  all = _mm512_inserti32x4(all, four(2), 2);
  return _mm512_inserti32x4(all, four(3), 3);
}

// exact[m] = 256 upper + lower of four queries, whose columns begin at one, for TILE rows.
inline void join_columns(const int32_t (*sums)[TILE], int64_t column, __m512i* exact) {
  __m512i part[4];
  for (int j = 0; j < 4; j++) {
    const __m512i upper = _mm512_slli_epi32(fours(sums + j, column + 4), 8);
    part[j] = _mm512_add_epi32(upper, fours(sums + j, column));
  }
  turn_fours(part, exact);
}

// sums [WIDE]: exact scores of WIDE rows of k [.., d] for up to 8 queries. d: a multiple of WIDE.
inline void tile_scores(const int8_t* columns, const int8_t* k, int64_t d, int32_t (*sums)[TILE]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t at = 0; at < d; at += WIDE) {
    _tile_loadd(6, columns + TILE * at, WIDE);
    _tile_loadd(4, k + at, d);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, k + at + TILE * d, d);
    _tile_dpbssd(1, 5, 6);
    _tile_loadd(4, k + at + 2 * TILE * d, d);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(5, k + at + 3 * TILE * d, d);
    _tile_dpbssd(3, 5, 6);
  }
  _tile_stored(0, sums, WIDE);
  _tile_stored(1, sums + TILE, WIDE);
  _tile_stored(2, sums + 2 * TILE, WIDE);
  _tile_stored(3, sums + 3 * TILE, WIDE);
}

// Sums of WIDE columns begin.
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
// They go on with WIDE rows of values. weights: [TILE][CHUNK], from those rows on; quads: vectors
// of Quads.
inline void add_to_sums(const uint8_t* weights, const int8_t (*quads)[4][WIDE]) {
  _tile_loadd(4, weights, CHUNK);
  _tile_loadd(6, quads[0][0], 4 * WIDE);
  _tile_dpbusd(0, 4, 6);
  _tile_loadd(7, quads[0][1], 4 * WIDE);
  _tile_dpbusd(1, 4, 7);
  _tile_loadd(6, quads[0][2], 4 * WIDE);
  _tile_dpbusd(2, 4, 6);
  _tile_loadd(7, quads[0][3], 4 * WIDE);
  _tile_dpbusd(3, 4, 7);
}
// sums[i]: of vector i of Quads, for each row of weights.
inline void store_sums(int32_t (*sums)[TILE][TILE]) {
  _tile_stored(0, sums[0], WIDE);
  _tile_stored(1, sums[1], WIDE);
  _tile_stored(2, sums[2], WIDE);
  _tile_stored(3, sums[3], WIDE);
}

#else

struct Tiles {
  explicit Tiles(bool) {}
};

#endif

// Whether the sums over an int8 cache go by tiles.
inline bool attends_by_tiles(int64_t d) {
#if defined(QUANTIZE_TILES)
  return d % WIDE == 0 && tiles_are_open();
#else
  return false;
#endif
}

}  // namespace
