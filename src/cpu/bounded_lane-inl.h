// What hot paths (avx2/, avx512/) make of core's formulas where their conditions hold.
#pragma once

#include <bit>

#include "flashoptim/core/weight_split.h"

namespace flashoptim::cpu {

/// F for a rule whose bounds are known to change nothing.
template <class F>
struct BoundedLane {
  F v;

  friend FLASHOPTIM_HD BoundedLane operator+(BoundedLane a, BoundedLane b) { return {a.v + b.v}; }
  friend FLASHOPTIM_HD BoundedLane operator-(BoundedLane a, BoundedLane b) { return {a.v - b.v}; }
  friend FLASHOPTIM_HD BoundedLane operator*(BoundedLane a, BoundedLane b) { return {a.v * b.v}; }
  friend FLASHOPTIM_HD BoundedLane operator/(BoundedLane a, BoundedLane b) { return {a.v / b.v}; }
  friend FLASHOPTIM_HD BoundedLane sqrt(BoundedLane a) {
    using core::sqrt;
    return {sqrt(a.v)};
  }
  /// Rules name the bound first.
  friend FLASHOPTIM_HD BoundedLane max(BoundedLane, BoundedLane a) { return a; }
  friend FLASHOPTIM_HD BoundedLane min(BoundedLane, BoundedLane a) { return a; }
};

/// Of corrections of kBits beside narrow weights, multiplied by 2^kShift when they are made floats.
template <class Narrow, int kBits, int kShift = 0>
struct CorrectionConstants {
  static constexpr int kFraction = kBits == 8 ? 23 : 15;
  static constexpr float kMax = core::Correction<kBits>::kMax;
  static constexpr uint32_t kLargest = static_cast<uint32_t>(kMax);
  /// What core::correction_value multiplies by, in which powers of two change no digit.
  static constexpr float kUnit = core::half_ulp_of_unit_scale<Narrow>() / static_cast<float>(1u << kShift);
  float inverse_high = core::Correction<kBits>::kInverseHigh * kUnit;
  float inverse_low = core::Correction<kBits>::kInverseLow * kUnit;
  /// Pattern of twice_inverse_scale(0) * kUnits: split_update_dithered's two factors as one, which loses nothing
  /// where the scale is not far from 1.
  uint32_t units = std::bit_cast<uint32_t>(static_cast<float>(1 << Narrow::kMantissaBits) * kMax *
                                           static_cast<float>(1 << kFraction)) +
                   (128u << 23);
  /// The same of split().
  uint32_t nearest_units = units - (static_cast<uint32_t>(kFraction) << 23);
  uint32_t above = ((kLargest + 1u) << kFraction) - 1u, below = 0u - (kLargest << kFraction);
};

}  // namespace flashoptim::cpu

namespace flashoptim::core {

template <class F>
struct LaneTraits<cpu::BoundedLane<F>> {
  using Int = IntOf<F>;
  using Mask = MaskOf<F>;
  static constexpr int kWidth = LaneTraits<F>::kWidth;
  static FLASHOPTIM_HD cpu::BoundedLane<F> splat(float value) { return {core::splat<F>(value)}; }
};

}  // namespace flashoptim::core
