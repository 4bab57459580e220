// The 16-bit parameter formats, bfloat16 and IEEE binary16, and exact conversion to and from fp32.
//
// Rounding is to nearest, ties to even; subnormals are kept; overflow gives infinity; every NaN becomes the canonical
// quiet NaN, so that back ends whose hardware makes different NaNs store the same bits.
#pragma once

#include "flashoptim/core/lanes.h"

namespace flashoptim::core {

struct BFloat16 {
  static constexpr int kMantissaBits = 7;
  static constexpr int kBias = 127;

  /// Value of 16-bit patterns held in the low half of each lane. Exact.
  template <class F>
  static FLASHOPTIM_HD F widen(IntOf<F> bits) {
    return from_bits(shift_left(bits, 16));
  }

  /// 16-bit patterns nearest to `value`, ties to even; the high half of each lane is 0.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> round(F value) {
    const IntOf<F> bits = to_bits(value);
    const IntOf<F> odd = shift_right(bits, 16) & splat_bits<F>(1u);
    const IntOf<F> rounded = shift_right(bits + splat_bits<F>(0x7fffu) + odd, 16);
    return select(is_nan(value), splat_bits<F>(kCanonicalNan >> 16), rounded);
  }
};

/// Scalar binary16 conversions. CUDA's and F16C's instructions (SIMD lanes overload these) agree with them on every
/// input.
FLASHOPTIM_HD float half_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
  return canonical_nan<float>(value);
#else
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1fu) return from_bits(mantissa != 0 ? kCanonicalNan : (sign | 0x7f800000u));
  if (exponent != 0) return from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  // Subnormal: mantissa * 2^-24, exact in fp32.
  const float magnitude = static_cast<float>(static_cast<int32_t>(mantissa)) * 0x1p-24f;
  return from_bits(sign | to_bits(magnitude));
#endif
}

FLASHOPTIM_HD uint32_t float_to_half(float value) {
#if defined(__CUDA_ARCH__)
  unsigned short half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return is_nan(value) ? 0x7e00u : half;
#else
  const uint32_t bits = to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 puts the last binary16 subnormal digit (2^-24) at the last fp32 digit of the sum, so the
    // hardware's addition does the rounding.
    const float shifted = from_bits(magnitude) + 0.5f;
    return sign | (to_bits(shifted) - 0x3f000000u);
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return sign | ((magnitude + 0xfffu + odd - (112u << 23)) >> 13);
#endif
}

struct Float16 {
  static constexpr int kMantissaBits = 10;
  static constexpr int kBias = 15;

  template <class F>
  static FLASHOPTIM_HD F widen(IntOf<F> bits) {
    return half_to_float(bits);
  }

  template <class F>
  static FLASHOPTIM_HD IntOf<F> round(F value) {
    return float_to_half(value);
  }
};

}  // namespace flashoptim::core
