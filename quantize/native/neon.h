// Sums of four products of bytes in each lane, on aarch64: one instruction where the compiler
// targets it (dotprod), and the same integers without.

#pragma once
#include <arm_neon.h>

namespace {

inline uint32x4_t dot(uint32x4_t total, uint8x16_t a, uint8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_u32(total, a, b);
#else
  const uint32x4_t low = vpaddlq_u16(vmull_u8(vget_low_u8(a), vget_low_u8(b)));
  return vaddq_u32(total, vpaddq_u32(low, vpaddlq_u16(vmull_high_u8(a, b))));
#endif
}

inline int32x4_t dot(int32x4_t total, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(total, a, b);
#else
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  return vaddq_s32(total, vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(a, b))));
#endif
}

}  // namespace
