// Counter-based dither: one 32-bit word per (seed, step, element, stream), the same on every back end, rank and thread.
//
// Unbiased rounding adds a number u, uniform in [0, 1), and rounds down. u here is a low-discrepancy sequence in time:
// successive steps advance it by the golden ratio, lanes of a group are offset by another irrational (one per stream),
// and groups by a hash (one per stream). An event of
// probability p then happens p * T times in T steps within O(log T), not within sqrt(p * T), which is what keeps
// the noise that an EMA accumulates low (docs/numerics.md, "Dither").
#pragma once

#include "flashoptim/core/lanes.h"

namespace flashoptim::core {

enum class DitherStream : int { kVariance = 0, kMomentum = 1, kWeight = 2 };

/// What a step adds to every element's dither: host side, once per step.
struct DitherKey {
  uint32_t time;
  uint32_t seed;
};

/// 2^32 / golden ratio, odd: the step with the lowest discrepancy there is. The streams share it; measured, that costs
/// nothing, while other irrationals (R3) lose 10 to 15 % (docs/numerics.md).
inline constexpr uint32_t kDitherTimeStep = 0x9e3779b9u;

/// 2^32 * frac(sqrt 2), frac(sqrt 3), frac(sqrt 7).
template <DitherStream kStream>
inline constexpr uint32_t kDitherLaneStep = kStream == DitherStream::kVariance   ? 0x6a09e667u
                                            : kStream == DitherStream::kMomentum ? 0xbb67ae85u
                                                                                 : 0xa54ff53bu;

/// Bijective mixing of 32 bits (two multiply-xorshift rounds).
FLASHOPTIM_HD uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

/// `step` counts from 1; `seed` is the optimizer's.
FLASHOPTIM_HD DitherKey make_dither_key(uint64_t seed, uint64_t step) {
  DitherKey key{};
  key.seed = mix32(static_cast<uint32_t>(seed) ^ mix32(static_cast<uint32_t>(seed >> 32) + 0x9e3779b9u));
  key.time = static_cast<uint32_t>(step) * kDitherTimeStep;
  return key;
}

/// Hash of the group that starts at flat element index `first_element` of the whole, unsharded tensor.
FLASHOPTIM_HD uint32_t dither_group_hash(const DitherKey& key, int64_t first_element) {
  const uint64_t index = static_cast<uint64_t>(first_element);
  const uint32_t low = static_cast<uint32_t>(index);
  const uint32_t high = static_cast<uint32_t>(index >> 32);
  return mix32(low ^ key.seed ^ (high * 0x85ebca6bu));
}

/// Start of a stream in a group: lane j's word is start + j * kDitherLaneStep<stream>, modulo 2^32.
FLASHOPTIM_HD uint32_t dither_group_start(const DitherKey& key, uint32_t group_hash, DitherStream stream) {
  const int s = static_cast<int>(stream);
  // Odd multiples of one hash decorrelate the streams without hashing again.
  const uint32_t h = s == 0 ? group_hash : s == 1 ? group_hash * 0x85ebca6bu : group_hash * 0xc2b2ae35u;
  return h + key.time;
}

}  // namespace flashoptim::core
