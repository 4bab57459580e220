// 4 lanes of NEON (AArch64): the operations of core/lanes.h, each bit-equal to the scalar one.
// Only included by translation units compiled for AArch64, where NEON always is. fmax and its like are not used: they
// give other NaNs and other zeros than "a > b ? a : b".
#pragma once

#include <arm_neon.h>

#include "src/cpu/lane_memory.h"

namespace flashoptim::core {

struct NeonInt {
  uint32x4_t v;
};
struct NeonFloat {
  float32x4_t v;
};
/// All ones in the lanes that are true.
struct NeonMask {
  uint32x4_t v;
};

template <>
struct LaneTraits<NeonFloat> {
  using Int = NeonInt;
  using Mask = NeonMask;
  static constexpr int kWidth = 4;
  static FLASHOPTIM_HD NeonFloat splat(float value) { return {vdupq_n_f32(value)}; }
  static FLASHOPTIM_HD NeonInt splat_bits(uint32_t bits) { return {vdupq_n_u32(bits)}; }
};

/// The patterns as signed numbers.
FLASHOPTIM_HD int32x4_t as_signed(NeonInt a) { return vreinterpretq_s32_u32(a.v); }
FLASHOPTIM_HD NeonInt from_signed(int32x4_t a) { return {vreinterpretq_u32_s32(a)}; }

FLASHOPTIM_HD NeonFloat operator+(NeonFloat a, NeonFloat b) { return {vaddq_f32(a.v, b.v)}; }
FLASHOPTIM_HD NeonFloat operator-(NeonFloat a, NeonFloat b) { return {vsubq_f32(a.v, b.v)}; }
FLASHOPTIM_HD NeonFloat operator*(NeonFloat a, NeonFloat b) { return {vmulq_f32(a.v, b.v)}; }
FLASHOPTIM_HD NeonFloat operator/(NeonFloat a, NeonFloat b) { return {vdivq_f32(a.v, b.v)}; }
FLASHOPTIM_HD NeonInt operator+(NeonInt a, NeonInt b) { return {vaddq_u32(a.v, b.v)}; }
FLASHOPTIM_HD NeonInt operator-(NeonInt a, NeonInt b) { return {vsubq_u32(a.v, b.v)}; }
FLASHOPTIM_HD NeonInt operator*(NeonInt a, NeonInt b) { return {vmulq_u32(a.v, b.v)}; }
FLASHOPTIM_HD NeonInt operator&(NeonInt a, NeonInt b) { return {vandq_u32(a.v, b.v)}; }
FLASHOPTIM_HD NeonInt operator|(NeonInt a, NeonInt b) { return {vorrq_u32(a.v, b.v)}; }
FLASHOPTIM_HD NeonInt operator^(NeonInt a, NeonInt b) { return {veorq_u32(a.v, b.v)}; }

FLASHOPTIM_HD NeonInt to_bits(NeonFloat a) { return {vreinterpretq_u32_f32(a.v)}; }
FLASHOPTIM_HD NeonFloat from_bits(NeonInt a) { return {vreinterpretq_f32_u32(a.v)}; }

FLASHOPTIM_HD NeonFloat select(NeonMask m, NeonFloat a, NeonFloat b) { return {vbslq_f32(m.v, a.v, b.v)}; }
FLASHOPTIM_HD NeonInt select(NeonMask m, NeonInt a, NeonInt b) { return {vbslq_u32(m.v, a.v, b.v)}; }

FLASHOPTIM_HD NeonFloat max(NeonFloat a, NeonFloat b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
FLASHOPTIM_HD NeonFloat min(NeonFloat a, NeonFloat b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
FLASHOPTIM_HD NeonFloat abs(NeonFloat a) { return {vabsq_f32(a.v)}; }
FLASHOPTIM_HD NeonFloat sqrt(NeonFloat a) { return {vsqrtq_f32(a.v)}; }

FLASHOPTIM_HD NeonMask int_greater(NeonInt a, NeonInt b) { return {vcgtq_s32(as_signed(a), as_signed(b))}; }
FLASHOPTIM_HD NeonMask int_equal(NeonInt a, NeonInt b) { return {vceqq_u32(a.v, b.v)}; }
FLASHOPTIM_HD NeonInt int_max(NeonInt a, NeonInt b) { return from_signed(vmaxq_s32(as_signed(a), as_signed(b))); }
FLASHOPTIM_HD NeonInt int_min(NeonInt a, NeonInt b) { return from_signed(vminq_s32(as_signed(a), as_signed(b))); }
FLASHOPTIM_HD NeonInt unsigned_min(NeonInt a, NeonInt b) { return {vminq_u32(a.v, b.v)}; }
FLASHOPTIM_HD NeonMask unsigned_less(NeonInt a, NeonInt b) { return {vcltq_u32(a.v, b.v)}; }

// A shift by a negative count is one to the right.
FLASHOPTIM_HD NeonInt shift_left(NeonInt a, uint32_t count) {
  return {vshlq_u32(a.v, vdupq_n_s32(static_cast<int32_t>(count)))};
}
FLASHOPTIM_HD NeonInt shift_right(NeonInt a, uint32_t count) {
  return {vshlq_u32(a.v, vdupq_n_s32(-static_cast<int32_t>(count)))};
}
FLASHOPTIM_HD NeonInt shift_right_signed(NeonInt a, uint32_t count) {
  return from_signed(vshlq_s32(as_signed(a), vdupq_n_s32(-static_cast<int32_t>(count))));
}
FLASHOPTIM_HD NeonInt shift_left_each(NeonInt a, NeonInt count) { return {vshlq_u32(a.v, as_signed(count))}; }
FLASHOPTIM_HD NeonInt shift_right_each(NeonInt a, NeonInt count) {
  return {vshlq_u32(a.v, vnegq_s32(as_signed(count)))};
}

FLASHOPTIM_HD NeonInt bit_length(NeonInt a) { return {vsubq_u32(vdupq_n_u32(32), vclzq_u32(a.v))}; }

FLASHOPTIM_HD NeonFloat int_to_float(NeonInt a) { return {vcvtq_f32_s32(as_signed(a))}; }
FLASHOPTIM_HD NeonInt truncate_to_int(NeonFloat a) { return from_signed(vcvtq_s32_f32(a.v)); }

FLASHOPTIM_HD NeonMask is_nan(NeonFloat a) { return {vmvnq_u32(vceqq_f32(a.v, a.v))}; }
FLASHOPTIM_HD NeonMask equals(NeonFloat a, NeonFloat b) { return {vceqq_f32(a.v, b.v)}; }
FLASHOPTIM_HD NeonMask greater(NeonFloat a, NeonFloat b) { return {vcgtq_f32(a.v, b.v)}; }

FLASHOPTIM_HD NeonFloat half_to_float(NeonInt bits) {
  return canonical_nan(NeonFloat{vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(bits.v)))});
}
FLASHOPTIM_HD NeonInt float_to_half(NeonFloat a) {
  const NeonInt half = {vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(a.v)))};
  return select(is_nan(a), splat_bits<NeonFloat>(0x7e00u), half);
}

// Memory, and what only the loops need.

FLASHOPTIM_HD void store_f32(float* p, NeonFloat a) { vst1q_f32(p, a.v); }

FLASHOPTIM_HD void store_u32(uint32_t* p, NeonInt a) { vst1q_u32(p, a.v); }

/// Low 8 or 16 bits of each lane.
FLASHOPTIM_HD void store_8(uint8_t* p, NeonInt a) {
  const uint16x4_t halves = vmovn_u32(a.v);
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
  std::memcpy(p, &bytes, sizeof bytes);
}

FLASHOPTIM_HD void store_16(uint16_t* p, NeonInt a) { vst1_u16(p, vmovn_u32(a.v)); }

template <>
struct LaneMemory<NeonFloat> {
  static FLASHOPTIM_HD NeonFloat load_f32(const float* p) { return {vld1q_f32(p)}; }

  static FLASHOPTIM_HD NeonInt load_u32(const uint32_t* p) { return {vld1q_u32(p)}; }

  static FLASHOPTIM_HD NeonInt load_u8(const uint8_t* p) {
    return {vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(four_bytes(p)))))};
  }

  static FLASHOPTIM_HD NeonInt load_i8(const uint8_t* p) {
    return from_signed(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(four_bytes(p))))));
  }

  static FLASHOPTIM_HD NeonInt load_u16(const uint16_t* p) { return {vmovl_u16(vld1_u16(p))}; }

  static FLASHOPTIM_HD NeonInt load_i16(const uint16_t* p) {
    return from_signed(vmovl_s16(vreinterpret_s16_u16(vld1_u16(p))));
  }

  /// j * step for lane j, modulo 2^32.
  static FLASHOPTIM_HD NeonInt lane_multiples(uint32_t step) {
    const uint32_t multiples[4] = {0u, step, 2u * step, 3u * step};
    return load_u32(multiples);
  }

  /// out[r] = max (as signed numbers) over lanes of rows[r * kWidth ...], r = 0 ... 15.
  static FLASHOPTIM_HD void max_of_rows(const uint32_t* rows, uint32_t* out) {
    for (int r = 0; r < 16; r += 4) {
      const uint32_t* p = rows + 4 * r;
      const int32x4_t first = vpmaxq_s32(as_signed(load_u32(p)), as_signed(load_u32(p + 4)));
      const int32x4_t second = vpmaxq_s32(as_signed(load_u32(p + 8)), as_signed(load_u32(p + 12)));
      store_u32(out + r, from_signed(vpmaxq_s32(first, second)));
    }
  }

  /// The same for minima as unsigned numbers.
  static FLASHOPTIM_HD void unsigned_min_of_rows(const uint32_t* rows, uint32_t* out) {
    for (int r = 0; r < 16; r += 4) {
      const uint32_t* p = rows + 4 * r;
      const uint32x4_t first = vpminq_u32(vld1q_u32(p), vld1q_u32(p + 4));
      const uint32x4_t second = vpminq_u32(vld1q_u32(p + 8), vld1q_u32(p + 12));
      vst1q_u32(out + r, vpminq_u32(first, second));
    }
  }

 private:
  static FLASHOPTIM_HD uint32x2_t four_bytes(const uint8_t* p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return vdup_n_u32(bytes);
  }
};

}  // namespace flashoptim::core
