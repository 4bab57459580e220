// Shorter sequences for formulas of core's that give the same bits; for the host as well, where tests try every pattern
// (tests/core/hot_identities_test.cpp).
#pragma once

#include "flashoptim/core/weight_split.h"

namespace flashoptim::cuda {

/// a * b + c with one rounding.
FLASHOPTIM_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

/// Mantissa of 127/64, the corrections' 127 as a factor of an ULP's inverse.
inline constexpr uint32_t kMantissaOf127 = 0x007e0000u;

/// core::split's correction of 8 bits for the finite bf16 n nearest to w, in the low byte of what is returned: `rest`
/// is w - n, `factor` twice_inverse_scale(n) * 127/64. w - n has at most 17 digits, so the product of split() is exact
/// and the sum rounds alone; it is never above 127, so nothing is clamped; the sum's last digit is that of a
/// correction. (nearest_int() without its power of two. Of fp16, whose subnormals have more digits, that would not
/// hold.)
FLASHOPTIM_HD uint32_t nearest_correction(float rest, float factor) {
  constexpr float kSum = 0x1.8p17f / static_cast<float>(1 << core::BFloat16::kMantissaBits);
  return core::to_bits(fused(rest, factor, kSum));
}

/// Towards zero, and to the nearest integer there is.
FLASHOPTIM_HD int32_t saturated_int(float a) {
#if defined(__CUDA_ARCH__)
  return __float2int_rz(a);
#else
  return a >= 0x1p31f ? INT32_MAX : a < -0x1p31f ? INT32_MIN : static_cast<int32_t>(a);
#endif
}

/// core::split_update_dithered's correction in fixed point, N more: truncated, and clamped to 0 ... 2 N. `x` is what it
/// clamps there. |x| exceeds N by the roundings of n + rest alone; N more is then below 2^31, but for 16 bits of fp16,
/// whose corrections are finest beside an fp32 digit.
template <class Narrow, int kBits>
struct FixedCorrection {
  static constexpr int kFraction = kBits == 8 ? 23 : 15;
  static constexpr int32_t kLargest = static_cast<int32_t>(core::Correction<kBits>::kMax) << kFraction;  ///< N
  static constexpr uint32_t kMinusLargest = kBits == 8 ? 0x81u : 0x8001u;  ///< -N's digits

  static FLASHOPTIM_HD uint32_t make(float x) {
    int32_t t = saturated_int(x);
    if constexpr (kBits == 16 && Narrow::kBias != 127) t = t < kLargest ? t : kLargest;
#if defined(__CUDA_ARCH__)
    return static_cast<uint32_t>(__vimin_s32_relu(t + kLargest, 2 * kLargest));  // one instruction
#else
    const auto sum = static_cast<int32_t>(static_cast<uint32_t>(t) + static_cast<uint32_t>(kLargest));
    return static_cast<uint32_t>(sum < 0 ? 0 : sum < 2 * kLargest ? sum : 2 * kLargest);
#endif
  }
  /// The correction, in the upper kBits bits: (fixed - N 2^F + (word >> 32 - F)) >> F, one digit to the left. The
  /// dither's digit below the last place cannot carry; -N stands above the dither, where the shift leaves room.
  /// `minus_largest` is kMinusLargest.
  static FLASHOPTIM_HD uint32_t dithered(uint32_t fixed, uint32_t word, uint32_t minus_largest) {
#if defined(__CUDA_ARCH__)
    return fixed * 2u + __byte_perm(word, minus_largest, kBits == 8 ? 0x4321u : 0x5432u);
#else
    return fixed * 2u + (word >> kBits | minus_largest << (32 - kBits));
#endif
  }
};

}  // namespace flashoptim::cuda
