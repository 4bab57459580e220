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

}  // namespace flashoptim::cuda
