// Rows of floats in 8 bits, as quantize/nn/int8_kernels.py says: a step and a zero point for each.

#pragma once
#include "numbers.h"

namespace {

constexpr float SMALLEST = 1e-30f;  // step of a row of zeros

struct Row {
  float step;
  int32_t zero;
};

template <class T>
inline Floats load_part(const T* x, int64_t n) {  // zeros after the first n
  T some[LANES] = {};
  memcpy(some, x, n * sizeof(T));
  return load(some);
}

#if defined(__AVX512F__)
inline Floats load_part(const float* x, int64_t n) {
  return (Floats)_mm512_maskz_loadu_ps(__mmask16((1 << n) - 1), x);
}
#elif defined(__AVX2__)
inline Floats load_part(const float* x, int64_t n) {
  alignas(64) static constexpr int32_t masks[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                           -1, -1, -1, -1, -1, -1, -1, -1};
  const __m256i* mask = (const __m256i*)(masks + LANES - n);
  return {_mm256_maskload_ps(x, _mm256_loadu_si256(mask)),
          _mm256_maskload_ps(x + 8, _mm256_loadu_si256(mask + 1))};
}
#endif

inline Ints cut_off(Ints numbers) {  // below 0 and above 255
  const Ints cut = choose(numbers < 0, Ints{}, numbers);
  return choose(cut > 255, Ints{} + 255, cut);
}

// n numbers, cut off, as bytes.
inline void store_bytes(Ints numbers, uint8_t* to, int64_t n) {
  uint8_t bytes[LANES];
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i words = _mm256_packs_epi32((__m256i)numbers.part[0], (__m256i)numbers.part[1]);
  const __m256i all = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i first = _mm256_castsi256_si128(all), last = _mm256_extracti128_si256(all, 1);
  _mm_storeu_si128((__m128i*)bytes, _mm_packus_epi16(first, last));
#else
  store_lowest(cut_off(numbers), bytes);
#endif
  if (n == LANES)
    memcpy(to, bytes, LANES);
  else if (n == 8)
    memcpy(to, bytes, 8);  // without a call
  else
    memcpy(to, bytes, n);
}
// The same with 64 numbers.
inline void store_bytes(const Ints* numbers, uint8_t* to) {
#if defined(__AVX512BW__)
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32((__m512i)numbers[0], (__m512i)numbers[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)numbers[2], (__m512i)numbers[3]);
  const __m512i bytes = _mm512_packus_epi16(low, high);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int half = 0; half < 2; half++, to += 32, numbers += 2) {
    const __m256i low =
        _mm256_packs_epi32((__m256i)numbers[0].part[0], (__m256i)numbers[0].part[1]);
    const __m256i high =
        _mm256_packs_epi32((__m256i)numbers[1].part[0], (__m256i)numbers[1].part[1]);
    const __m256i bytes = _mm256_packus_epi16(low, high);
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(bytes, order));
  }
#else
  for (int part = 0; part < 4; part++) store_bytes(numbers[part], to + part * LANES, LANES);
#endif
}

// Numbers of a row, 16 from i on, or the n that are left of it.
template <class T>
struct Plain {
  const T* x;
  Floats at(int64_t i) const { return load(x + i); }
  Floats part(int64_t i, int64_t n) const { return load_part(x + i, n); }
};
// The same times a factor for each.
template <class T>
struct Scaled {
  const T* x;
  const float* factor;
  Floats at(int64_t i) const { return load(x + i) * load(factor + i); }
  Floats part(int64_t i, int64_t n) const { return load_part(x + i, n) * load_part(factor + i, n); }
};

// The least and the largest number of a row; 0 is always among them. `poison` is NaN in a lane
// where a number was not finite.
struct Range {
  Floats low = {}, high = {}, poison = {};

  void look(Floats v) {
    low = least(v, low);
    high = most(v, high);
#if defined(__AVX512F__)
    poison = (Floats)_mm512_fmadd_ps((__m512)v, _mm512_setzero_ps(), (__m512)poison);
#else
    poison = poison + v * 0.0f;
#endif
  }
  // n numbers; four ranges at once, since each waits for its last step.
  template <class Numbers>
  [[gnu::always_inline]] void look(const Numbers& x, int64_t n) {
    int64_t i = 0;
    if (n >= 4 * LANES) {
      Range more[3];
      for (; i + 4 * LANES <= n; i += 4 * LANES) {
        look(x.at(i));
        for (int part = 0; part < 3; part++) more[part].look(x.at(i + (part + 1) * LANES));
      }
      more[0].join(more[1]);
      join(more[2]);
      join(more[0]);
    }
    for (; i + LANES <= n; i += LANES) look(x.at(i));
    if (i < n) look(x.part(i, n - i));
  }
  template <class T>
  void look(const T* x, int64_t n) {
    look(Plain<T>{x}, n);
  }
  void join(const Range& other) {
    low = least(other.low, low);
    high = most(other.high, high);
    poison = poison + other.poison;
  }

  bool finite() const {
#if defined(__AVX512F__)
    return !_mm512_cmp_ps_mask((__m512)poison, (__m512)poison, _CMP_UNORD_Q);
#else
    return all_of(poison == poison);
#endif
  }
  // Over all lanes.
  void bounds(float& bottom, float& top) const {
#if defined(__AVX512F__)
    // Both at once, as minima: of the lowest in the lower half, of minus the highest in the upper.
    const __m512 a = (__m512)low, b = (__m512)-high;
    __m512 m = _mm512_min_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    m = _mm512_min_ps(m, _mm512_shuffle_f32x4(m, m, 0xb1));
    m = _mm512_min_ps(m, _mm512_permute_ps(m, 0x4e));
    m = _mm512_min_ps(m, _mm512_permute_ps(m, 0xb1));
    bottom = _mm512_cvtss_f32(m);
    top = -_mm_cvtss_f32(_mm512_extractf32x4_ps(m, 2));
#else
    bottom = -largest_of(-low);
    top = largest_of(high);
#endif
  }
};

// How the numbers of a range become bytes. Not finite: a NaN or an infinity is among them, the step
// is NaN, and all bytes are 0.
struct Steps {
  Row row;
  float inverse;
  bool finite;

  Steps(Row row, float inverse) : row(row), inverse(inverse), finite(true) {}
  explicit Steps(const Range& range) {
    float bottom, top;
    range.bounds(bottom, top);
    finite = range.finite();
    row = {bits<float>(0x7fc00000), 0};
    if (!finite) return;
    const float step = top * (1.0f / 255) - bottom * (1.0f / 255);
    row.step = step < SMALLEST ? SMALLEST : step;
    inverse = 1.0f / row.step;
    row.zero = bits<int32_t>(-bottom * inverse + SHIFT) - bits<int32_t>(SHIFT);
  }

  // What becomes of 16 numbers, before it is cut off.
  Ints steps_of(Floats v) const {
    return (Ints)(v * inverse + SHIFT) - (bits<int32_t>(SHIFT) - row.zero);
  }
  // 16 bytes, each in a lane.
  Ints bytes_of(Floats v) const { return cut_off(steps_of(v)); }
  template <class Numbers>
  void put(const Numbers& x, int64_t n, uint8_t* q) const {
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
      const Ints numbers[4] = {steps_of(x.at(i)), steps_of(x.at(i + LANES)),
                               steps_of(x.at(i + 2 * LANES)), steps_of(x.at(i + 3 * LANES))};
      store_bytes(numbers, q + i);
    }
    for (; i + LANES <= n; i += LANES) store_bytes(steps_of(x.at(i)), q + i, LANES);
    if (i < n) store_bytes(steps_of(x.part(i, n - i)), q + i, n - i);
  }
  template <class T>
  void put(const T* x, int64_t n, uint8_t* q) const {
    put(Plain<T>{x}, n, q);
  }

  // Adding it rounds to the nearest integer, half to even.
  static constexpr float SHIFT = 0x1.8p23f;
};

// The same of 16 ranges at once, one in each lane. All is computed as in Steps, so the bits are the
// same; the bytes of a range that is not finite are any.
struct SideBySide {
  Floats step, inverse;
  Ints zero;

  explicit SideBySide(const Range& ranges) {
    step = ranges.high * (1.0f / 255) - ranges.low * (1.0f / 255);
    step = choose(step < SMALLEST, Floats{} + SMALLEST, step);
    inverse = 1.0f / step;
    zero = (Ints)(-ranges.low * inverse + Steps::SHIFT) - bits<int32_t>(Steps::SHIFT);
    const Ints finite = ranges.poison == ranges.poison;
    step = choose(finite, step, Floats{} + bits<float>(0x7fc00000));
    zero = choose(finite, zero, Ints{});
  }
  Row row(int lane) const { return {step[lane], zero[lane]}; }
  Steps steps(int lane) const { return Steps(row(lane), inverse[lane]); }

  Ints bytes_of(Floats v) const {
    return cut_off((Ints)(v * inverse + Steps::SHIFT) - bits<int32_t>(Steps::SHIFT) + zero);
  }
};

// q: bytes up to `padded`. A row with a NaN or an infinity gets a step of NaN.
template <class Numbers>
Row quantize_row(const Numbers& x, int64_t n, int64_t padded, uint8_t* q) {
  Range range;
  range.look(x, n);
  const Steps steps(range);
  const int64_t from = steps.finite ? n : 0;
  if (from < padded) memset(q + from, 0, padded - from);
  if (steps.finite) steps.put(x, n, q);
  return steps.row;
}

}  // namespace
