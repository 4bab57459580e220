// Master weights as a 16-bit parameter and an 8- or 16-bit correction (paper, section 3.1: tight rounding bound).
//
//   split(w):     n = round_nearest_even(w to narrow)
//                 h = 2^(max(E, 1) - bias - mantissa - 1)      E = exponent field of n; h is half a ULP of n
//                 c = round(clamp((w - n) / h, -1, 1) * N)     N = 127 ("24 bits") or 32767 ("32 bits")
//   merge(n, c):  n + (c / N) * h
//
// Rounding to nearest leaves |w - n| <= h, so all N steps cover values that occur, and
//   |merge(split(w)) - w| <= h / (2 N) + one fp32 rounding
// for every finite w that does not overflow the narrow type (two roundings where n = 0: x and the sum).
// merge(split(merge(n, c))) == merge(n, c) bit for bit, but for the last n of a binade with |c| = N, which merges to a
// tie that rounds to the next binade, and for a few pairs of 16 bits, by one ULP (docs/numerics.md has the list).
// tests/core checks both over all fp32 inputs and all pairs.
#pragma once

#include "flashoptim/core/narrow_float.h"
#include "flashoptim/types.h"

namespace flashoptim::core {

FLASHOPTIM_HD constexpr bool has_correction(MasterWeights m) {
  return m != MasterWeights::kNone && m != MasterWeights::kNoneStochastic;
}
/// Bits of a correction, where there is one.
FLASHOPTIM_HD constexpr int correction_bits(MasterWeights m) {
  return m == MasterWeights::kCorrection8 || m == MasterWeights::kCorrection8Nearest ? 8 : 16;
}
FLASHOPTIM_HD constexpr bool is_nearest(MasterWeights m) {
  return m == MasterWeights::kCorrection8Nearest || m == MasterWeights::kCorrection16Nearest;
}

/// A correction of `kBits` bits, N = kMax.
template <int kBits>
struct Correction {
  static_assert(kBits == 8 || kBits == 16);
  static constexpr float kMax = kBits == 8 ? 127.0f : 32767.0f;
  /// 1 / N as a sum of two floats, the first short enough that c * kInverseHigh is exact: c / N then rounds once.
  static constexpr float kInverseHigh = kBits == 8 ? 0x1.0204p-7f : 0x1p-15f;
  static constexpr float kInverseLow =
      static_cast<float>(1.0 / static_cast<double>(kMax) - static_cast<double>(kInverseHigh));
};

/// c / N, correctly rounded for every integer |c| <= N.
template <int kBits, class F>
FLASHOPTIM_HD F correction_fraction(F c) {
  using C = Correction<kBits>;
  return c * splat<F>(C::kInverseHigh) + c * splat<F>(C::kInverseLow);
}

/// Scale exponents: an fp32 pattern 2^(max(E, 1) - bias) of the narrow value n, so that h = scale * 2^-(mantissa + 1).
/// 2^128 (infinity) for infinity and NaN.
template <class Narrow, class F>
FLASHOPTIM_HD IntOf<F> scale_bits(F narrow_value) {
  constexpr uint32_t kSmallest = static_cast<uint32_t>(1 - Narrow::kBias + 127) << 23;
  return int_max(to_bits(narrow_value) & splat_bits<F>(0x7f800000u), splat_bits<F>(kSmallest));
}

/// 2^(128 - e) for a scale 2^(e - 127), e = 1 ... 254: in range at both ends, unlike the reciprocal itself. 0 for e =
/// 255.
template <class F>
FLASHOPTIM_HD F twice_inverse_scale(IntOf<F> scale) {
  return from_bits(splat_bits<F>(0x7f800000u) - scale);
}

template <class Narrow>
FLASHOPTIM_HD constexpr float half_ulp_of_unit_scale() {
  return 1.0f / static_cast<float>(1 << (Narrow::kMantissaBits + 1));
}

/// What a correction (an integer) adds to a narrow value: (c / N) * h.
template <class Narrow, int kBits, class F>
FLASHOPTIM_HD F correction_value(F narrow_value, IntOf<F> correction) {
  const F fraction = correction_fraction<kBits>(int_to_float(correction));
  const IntOf<F> scale = int_min(scale_bits<Narrow>(narrow_value), splat_bits<F>(254u << 23));
  return (fraction * splat<F>(half_ulp_of_unit_scale<Narrow>())) * from_bits(scale);
}

/// fp32 master weight of a narrow value (as fp32) and its correction.
template <class Narrow, int kBits, class F>
FLASHOPTIM_HD F merge(F narrow_value, IntOf<F> correction) {
  return narrow_value + correction_value<Narrow, kBits, F>(narrow_value, correction);
}

template <class F>
struct SplitWeight {
  IntOf<F> narrow;      ///< 16-bit pattern
  IntOf<F> correction;  ///< two's complement integer, |correction| <= N
};

/// The correction of kTo bits nearest to one of kFrom bits of the same narrow value. No ties: both N are odd.
template <int kFrom, int kTo>
FLASHOPTIM_HD constexpr int32_t rescale_correction(int32_t correction) {
  constexpr int64_t kFromMax = static_cast<int64_t>(Correction<kFrom>::kMax);
  constexpr int64_t kToMax = static_cast<int64_t>(Correction<kTo>::kMax);
  const int64_t half = correction < 0 ? -kFromMax : kFromMax;
  return static_cast<int32_t>((2 * correction * kToMax + half) / (2 * kFromMax));
}

/// Nearest integer to x, ties to even, for |x| <= 2^22.
template <class F>
FLASHOPTIM_HD IntOf<F> nearest_int(F x) {
  // The sum's last digit is 1: the addition rounds, and the pattern counts.
  return to_bits(x + splat<F>(0x1.8p23f)) - splat_bits<F>(0x4b400000u);
}

/// Nearest narrow value and nearest correction. NaN and values that round to infinity get correction 0.
template <class Narrow, int kBits, class F>
FLASHOPTIM_HD SplitWeight<F> split(F w) {
  constexpr float kMax = Correction<kBits>::kMax;
  SplitWeight<F> out;
  out.narrow = Narrow::template round<F>(w);
  const F n = Narrow::template widen<F>(out.narrow);
  // In units of h / N; the two factors keep every intermediate in range.
  const F unit = twice_inverse_scale<F>(scale_bits<Narrow>(n));
  F x = ((w - n) * unit) * splat<F>(static_cast<float>(1 << Narrow::kMantissaBits) * kMax);
  x = min(max(x, splat<F>(-kMax)), splat<F>(kMax));
  const MaskOf<F> finite = int_greater(splat_bits<F>(0x7f800000u), to_bits(n) & splat_bits<F>(0x7f800000u));
  out.correction = select(finite, nearest_int(x), splat_bits<F>(0u));
  return out;
}

/// One optimizer update w -= delta on a split weight, rounded to nearest as in the paper; w = merge(narrow,
/// correction). delta == 0 changes no bit (splitting w again could: see docs/numerics.md, the last value of a binade).
template <class Narrow, int kBits, class F>
FLASHOPTIM_HD SplitWeight<F> split_update_nearest(IntOf<F> narrow_bits, IntOf<F> correction, F w, F delta) {
  SplitWeight<F> out = split<Narrow, kBits, F>(w - delta);
  const MaskOf<F> unchanged = equals(delta, splat<F>(0.0f));
  out.narrow = select(unchanged, narrow_bits, out.narrow);
  out.correction = select(unchanged, correction, out.correction);
  return out;
}

/// One optimizer update w -= delta on a split weight, rounded without bias.
///
/// The update is taken off the correction's value, not off w: what it loses to fp32 is then 2^-24 of h instead of
/// 2^-24 of w, so that updates far below one fp32 ULP of w still count. The correction is rounded down after adding the
/// dither u in [0, 1), so that the expected weight is the exact one. delta == 0 changes no bit. `value` is
/// correction_value(), `dither` the stream's 32-bit word.
template <class Narrow, int kBits, class F>
FLASHOPTIM_HD SplitWeight<F> split_update_dithered(IntOf<F> narrow_bits, IntOf<F> correction, F value, F delta,
                                                   IntOf<F> dither) {
  constexpr float kMax = Correction<kBits>::kMax;
  // Corrections in fixed point: kFraction bits behind the point, |x| <= 2^30.
  constexpr int kFraction = kBits == 8 ? 23 : 15;
  constexpr float kOne = static_cast<float>(1 << kFraction);
  constexpr float kUnits = static_cast<float>(1 << Narrow::kMantissaBits) * kMax * kOne;
  const F n = Narrow::template widen<F>(narrow_bits);
  const F rest = value - delta;

  const IntOf<F> new_narrow = Narrow::template round<F>(n + rest);
  const F n_new = Narrow::template widen<F>(new_narrow);
  const F new_rest = (n - n_new) + rest;
  const F x = (new_rest * twice_inverse_scale<F>(scale_bits<Narrow>(n_new))) * splat<F>(kUnits);
  const F clamped = min(max(x, splat<F>(-kMax * kOne)), splat<F>(kMax * kOne));
  const IntOf<F> c = shift_right_signed(truncate_to_int(clamped) + shift_right(dither, 32 - kFraction), kFraction);

  const MaskOf<F> unchanged = equals(delta, splat<F>(0.0f));
  SplitWeight<F> out;
  out.narrow = select(unchanged, narrow_bits, new_narrow);
  out.correction = select(unchanged, correction, c);
  return out;
}

/// Spacing of the narrow type's subnormals, 2^(1 - bias - mantissa).
template <class Narrow>
FLASHOPTIM_HD constexpr float narrow_subnormal_unit() {
  float unit = 1.0f;
  for (int i = 0; i < Narrow::kBias + Narrow::kMantissaBits - 1; ++i) unit *= 0.5f;
  return unit;
}

/// A narrow weight without correction, rounded without bias: one of the two neighbours of w, with the probabilities
/// that make the expectation w. NaN stays NaN; a value that rounds to nearest within range never dithers to infinity.
template <class Narrow, class F>
FLASHOPTIM_HD IntOf<F> round_dithered(F w, IntOf<F> dither) {
  constexpr int kDropped = 23 - Narrow::kMantissaBits;
  w = canonical_nan(w);  // dither would carry a payload of ones over to 0
  const IntOf<F> bits = to_bits(w);
  const IntOf<F> nearest = Narrow::template round<F>(w);
  // fp32 is piecewise linear in its bit pattern, so adding u below the kept digits is exact dithering.
  const IntOf<F> sum = bits + shift_right(dither, 32 - kDropped);
  F rounded = from_bits(shift_left(shift_right(sum, kDropped), kDropped));
  if constexpr (Narrow::kBias != 127) {
    // Narrow subnormals are evenly spaced: dither in their unit. The unit is 2^(1 - bias - mantissa).
    constexpr float kUnit = narrow_subnormal_unit<Narrow>();
    const F units = abs(w) * splat<F>(1.0f / kUnit);
    const F u = int_to_float(shift_right(dither, 32 - kDropped)) * splat<F>(1.0f / static_cast<float>(1 << kDropped));
    const F magnitude = int_to_float(truncate_to_int(min(units, splat<F>(2048.0f)) + u)) * splat<F>(kUnit);
    const F signed_magnitude = flip_sign<F>(magnitude, bits & splat_bits<F>(0x80000000u));
    const F smallest_normal = from_bits(splat_bits<F>(static_cast<uint32_t>(1 - Narrow::kBias + 127) << 23));
    rounded = select(greater(smallest_normal, abs(w)), signed_magnitude, rounded);
  }
  const IntOf<F> dithered = Narrow::template round<F>(rounded);
  const F widened = Narrow::template widen<F>(dithered);
  const IntOf<F> infinity = splat_bits<F>(0x7f800000u);
  const MaskOf<F> in_range = int_greater(infinity, to_bits(widened) & infinity);
  return select(in_range, dithered, nearest);
}

}  // namespace flashoptim::core
