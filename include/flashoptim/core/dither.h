// Counter-based dither: one 32-bit word per (seed, step, element, stream), the same on every back end, rank and thread.
//
// Unbiased rounding adds a number u, uniform in [0, 1), and rounds down. u here is a low-discrepancy sequence in time:
// successive steps advance it by a quadratic irrational, lanes of a group are offset by another, and groups by a hash.
// An event of probability p then happens p * T times in T steps within O(log T), not within sqrt(p * T), which is what
// keeps the noise that an EMA accumulates low (docs/numerics.md, "Dither").
#pragma once

#include "flashoptim/core/lanes.h"

namespace flashoptim::core {

/// kSecondMomentum: of rules that keep two averages of the gradient.
enum class DitherStream : int { kVariance = 0, kMomentum = 1, kWeight = 2, kSecondMomentum = 3 };

/// What a step adds to every element's dither: host side, once per step.
struct DitherKey {
  uint32_t step;
  uint32_t seed;
};

/// What one step adds to a stream: 2^32 / golden ratio (odd), which has the lowest discrepancy there is, and for
/// momentum 2^32 * frac(sqrt 2), for a second one frac(sqrt 3), so that the states of an element do not round together.
/// Measured, other irrationals (the R3 sequence) lose 10 to 20 % (docs/numerics.md).
template <DitherStream kStream>
inline constexpr uint32_t kDitherTimeStep = kStream == DitherStream::kMomentum         ? 0x6a09e667u
                                            : kStream == DitherStream::kSecondMomentum ? 0xbb67ae85u
                                                                                       : 0x9e3779b9u;

/// 2^32 * frac(sqrt 2), frac(sqrt 3), frac(sqrt 7), and of a second momentum frac(sqrt 11).
template <DitherStream kStream>
inline constexpr uint32_t kDitherLaneStep = kStream == DitherStream::kVariance         ? 0x6a09e667u
                                            : kStream == DitherStream::kMomentum       ? 0xbb67ae85u
                                            : kStream == DitherStream::kSecondMomentum ? 0x510e527fu
                                                                                       : 0xa54ff53bu;

/// Bijective mixing of 32 bits (two multiply-xorshift rounds).
template <class F>
FLASHOPTIM_HD IntOf<F> mix32(IntOf<F> x) {
  x = x ^ shift_right(x, 16);
  x = x * splat_bits<F>(0x7feb352du);
  x = x ^ shift_right(x, 15);
  x = x * splat_bits<F>(0x846ca68bu);
  return x ^ shift_right(x, 16);
}

/// `step` counts from 1; `seed` is the optimizer's.
FLASHOPTIM_HD DitherKey make_dither_key(uint64_t seed, uint64_t step) {
  DitherKey key{};
  key.seed = mix32<float>(static_cast<uint32_t>(seed) ^ mix32<float>(static_cast<uint32_t>(seed >> 32) + 0x9e3779b9u));
  key.step = static_cast<uint32_t>(step);
  return key;
}

/// Hash of the group whose first element has this flat index in the whole, unsharded tensor (low and high 32 bits).
template <class F>
FLASHOPTIM_HD IntOf<F> dither_group_hash(const DitherKey& key, IntOf<F> first_low, IntOf<F> first_high) {
  return mix32<F>(first_low ^ splat_bits<F>(key.seed) ^ (first_high * splat_bits<F>(0x85ebca6bu)));
}

/// Start of a stream in a group: lane j's word is start + j * kDitherLaneStep<kStream>, modulo 2^32.
template <DitherStream kStream, class F>
FLASHOPTIM_HD IntOf<F> dither_group_start(const DitherKey& key, IntOf<F> group_hash) {
  // Odd multiples of one hash decorrelate the streams without hashing again.
  constexpr uint32_t kMultiplier = kStream == DitherStream::kVariance         ? 1u
                                   : kStream == DitherStream::kMomentum       ? 0x85ebca6bu
                                   : kStream == DitherStream::kSecondMomentum ? 0x27d4eb2fu
                                                                              : 0xc2b2ae35u;
  return group_hash * splat_bits<F>(kMultiplier) + splat_bits<F>(key.step * kDitherTimeStep<kStream>);
}

}  // namespace flashoptim::core
