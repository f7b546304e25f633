// Images in two orders: channels as planes, or last, side by side for each pixel. Vectors of 16
// numbers are turned from one into the other.

#pragma once
#include "rows.h"

namespace {

// 16 vectors of 16 numbers, columns to rows.
inline void transpose(Floats* v) {
  Floats other[LANES];
  for (int turn = 0; turn < 2; turn++) {
    for (int i = 0; i < 8; i++) {
      other[2 * i] = lower(v[i], v[i + 8]);
      other[2 * i + 1] = upper(v[i], v[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
      v[2 * i] = lower(other[i], other[i + 8]);
      v[2 * i + 1] = upper(other[i], other[i + 8]);
    }
  }
}

// The smallest number in each of 16 vectors, or what `pick` takes of two; the vectors change.
template <class Pick>
inline Floats picked(Floats* v, const Pick& pick) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // eight vectors at a time: the lanes of two next to each other, then of four, then of eight
  __m256 half[2];
  for (int at = 0; at < 2; at++, v += 8) {
    __m256 own[8];
    for (int i = 0; i < 8; i++) own[i] = pick(v[i].part[0], v[i].part[1]);
    for (int i = 0; i < 8; i += 2)
      own[i] = pick(_mm256_unpacklo_ps(own[i], own[i + 1]), _mm256_unpackhi_ps(own[i], own[i + 1]));
    for (int i = 0; i < 8; i += 4) {
      const __m256d a = _mm256_castps_pd(own[i]), b = _mm256_castps_pd(own[i + 2]);
      own[i] = pick(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                    _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    half[at] = pick(_mm256_permute2f128_ps(own[0], own[4], 0x20),
                    _mm256_permute2f128_ps(own[0], own[4], 0x31));
  }
  return {half[0], half[1]};
#else
  transpose(v);
  Floats found = v[0];
  for (int i = 1; i < LANES; i++) found = pick(v[i], found);
  return found;
#endif
}

inline void store(Floats v, float* to, int64_t n = LANES) {
  if (n == LANES) {
    store_vector(v, to);
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, __mmask16((1 << n) - 1), (__m512)v);
#elif defined(__AVX2__)
  // a store with a mask takes longer
  const __m256 half = n < 8 ? v.part[0] : v.part[1];
  if (n >= 8) _mm256_storeu_ps(to, v.part[0]), to += 8, n -= 8;
  __m128 rest = _mm256_castps256_ps128(half);
  if (n >= 4) {
    _mm_storeu_ps(to, rest);
    rest = _mm256_extractf128_ps(half, 1), to += 4, n -= 4;
  }
  for (int64_t i = 0; i < n; i++) to[i] = rest[i];
#else
  memcpy(to, &v, n * sizeof(float));
#endif
}

inline Floats load_some(const float* x, int64_t n) {
  return n == LANES ? load(x) : load_part(x, n);
}

// Numbers up to 16, of 16 columns or fewer, to their places in rows. columns: `from_apart` numbers
// from one to the next; rows: `to_apart`.
inline void turn(const float* from, int64_t from_apart, int64_t columns, float* to,
                 int64_t to_apart, int64_t rows) {
  Floats v[LANES] = {};
  for (int64_t i = 0; i < columns; i++) v[i] = load_some(from + i * from_apart, rows);
  transpose(v);
  for (int64_t i = 0; i < rows; i++) store(v[i], to + i * to_apart, columns);
}

inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

// A matrix [rows, columns] to [columns, rows], a thread's part of it: of its columns.
inline void turn_all(const float* from, int64_t rows, int64_t columns, float* to, int64_t thread,
                     int64_t threads) {
  const int64_t blocks = (columns + LANES - 1) / LANES, end = blocks * (thread + 1) / threads;
  for (int64_t block = blocks * thread / threads; block < end; block++) {
    const int64_t c = block * LANES, wide = least_of(columns - c, LANES);
    for (int64_t r = 0; r < rows; r += LANES) {
      const int64_t high = least_of(rows - r, LANES);
      turn(from + r * columns + c, columns, high, to + c * rows + r, rows, wide);
    }
  }
}

}  // namespace
