// What an update rule is made of. A rule is one struct over decoded floats; it knows no dtype, no instruction set and
// no device. See docs/adding_an_optimizer.md.
//
//   struct Rule {
//     static constexpr int kStateCount;                 // 0, 1 or 2
//     static constexpr StateSlot kStates[kMaxStates];   // name, sign, and the slot it is stored relative to
//     struct Hyper {...};                               // fp32 numbers of one step
//     static Hyper make_hyper(const Hyperparameters&);  // in double, the only place where they are rounded
//     template <class F> static F update(F w, F g, F (&s)[kMaxStates], const Hyper&);
//     static constexpr bool kDecoupledDecay;            // delta depends on w by decoupled weight decay alone
//     static double largest_update(const Hyperparameters&);  // bound of |delta| without that decay; 0: none
//   };
//
// A rule with a variance may have its update() in three parts, and say where its own bounds change nothing. Hot paths
// use that:
//
//     template <class F> static void advance(F w, F g, F (&s)[kMaxStates], const Hyper&);  // the states
//     template <class F> static F step(const F (&s)[kMaxStates], const Hyper&);            // delta without decoupled
//     decay template <class F> static F decayed(F w, F step, const Hyper&);                      // delta static
//     constexpr uint32_t kSmallestBoundingVariance, kLargestBoundingVariance;       // patterns static bool
//     variance_bounds(const Hyper&);
//
// variance_bounds() also says that update() takes no root but that of the new s[1], and that s[0] over that root stays
// below kLargestRelative (default_codec.h) whatever was stored.
//
// update() changes the states in place and returns delta; the weight becomes w - delta (the caller subtracts, because
// a split weight can take off less than one fp32 ULP). largest_update() is what an exact update is held against
// (core/inspect.h, benchmarks/fidelity); no step reads it.
#pragma once

#include "flashoptim/core/lanes.h"
#include "flashoptim/types.h"

namespace flashoptim::core {

enum class StateKind : int { kSigned, kUnsigned };

/// Whether a rule says where its variances vouch for its bounds.
template <class Rule>
inline constexpr bool kHasBoundingVariance = requires { Rule::kLargestBoundingVariance; };

inline constexpr int kNoSlot = -1;

struct StateSlot {
  const char* name = "";
  StateKind kind = StateKind::kSigned;
  /// The default codec stores a signed slot relative to the square root of this unsigned slot (kNoSlot: to its group).
  int relative_to = kNoSlot;
  /// Bits of mantissa in the default codec's codes of a signed slot: 127 / 2^K octaves of range. 6 relative to a
  /// variance, where the range is narrow; alone, fewer, to cover the spread of magnitudes in a group; 0, and only
  /// alone: each group chooses 3 to 6 (docs/numerics.md).
  int mantissa_bits = 0;
};

/// base^exponent by repeated squaring: the same double operations, so the same bits, on host and device.
FLASHOPTIM_HD double integer_power(double base, int64_t exponent) {
  double result = 1.0;
  for (uint64_t n = static_cast<uint64_t>(exponent); n != 0; n >>= 1) {
    if (n & 1u) result *= base;
    base *= base;
  }
  return result;
}

FLASHOPTIM_HD double double_sqrt(double value) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(value);
#elif defined(__CUDACC__)
  return ::sqrt(value);
#else
  return __builtin_sqrt(value);
#endif
}

/// Share of w that decoupled weight decay takes off in one step.
FLASHOPTIM_HD double decoupled_decay(const Hyperparameters& p) {
  return p.decay_lr > 0.0 ? p.weight_decay * (p.lr / p.decay_lr) : p.weight_decay * p.lr;
}

/// What all gradients are multiplied by: scale / *divisor * *clip_coefficient, in this order; null is left out. The
/// division is IEEE's (-prec-div=true in CUDA).
FLASHOPTIM_HD float gradient_factor(float scale, const float* divisor, const float* clip_coefficient) {
  if (divisor != nullptr) scale = scale / *divisor;
  if (clip_coefficient != nullptr) scale = scale * *clip_coefficient;
  return scale;
}

/// The same for one set of hyperparameters: negated where it maximizes.
FLASHOPTIM_HD float directed_factor(float factor, const Hyperparameters& p) { return p.maximize ? -factor : factor; }

}  // namespace flashoptim::core
