// Adam and AdamW (Kingma & Ba 2015, Loshchilov & Hutter 2019; PyTorch's formulation).
//
//   g     <- g + weight_decay * w                    (Adam only: L2)
//   m     <- beta1 m + (1 - beta1) g
//   v     <- beta2 v + (1 - beta2) g^2
//   delta  = lr * weight_decay * w                   (AdamW only: decoupled)
//          + lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Reads lr, beta1, beta2, eps, weight_decay, decay_lr (AdamW), step.
#pragma once

#include "flashoptim/core/optimizers/rule.h"

namespace flashoptim::core {

template <bool kDecoupled>
struct AdamRule {
  static constexpr OptimizerKind kKind = kDecoupled ? OptimizerKind::kAdamW : OptimizerKind::kAdam;
  static constexpr const char* kName = kDecoupled ? "adamw" : "adam";
  static constexpr const char* kTitle = kDecoupled ? "AdamW" : "Adam";
  static constexpr auto kHyperparameters = hyperparameter_list(
      {.weight_decay = kDecoupled ? 1e-2 : 0.0}, beta_field("beta1", &Hyperparameters::beta1, 0.9),
      beta_field("beta2", &Hyperparameters::beta2, 0.999), nonnegative_field("eps", &Hyperparameters::eps, 1e-8));
  static constexpr bool kDecoupledDecay = kDecoupled;
  static constexpr int kSlotCount = 2;
  static constexpr StateSlot kSlots[2] = {{"exp_avg", StateKind::kSigned, 1, 6}, {"exp_avg_sq", StateKind::kUnsigned}};

  struct Hyper {
    float step_size;  // lr / (1 - beta1^t)
    float decay;      // AdamW: share of w taken off; Adam: L2 coefficient
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float inverse_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
    float eps;
  };

  static FLASHOPTIM_HD Hyper make_hyper(const Hyperparameters& p) {
    const double bias1 = 1.0 - integer_power(p.beta1, p.step);
    const double bias2 = 1.0 - integer_power(p.beta2, p.step);
    Hyper h{};
    h.step_size = static_cast<float>(p.lr / bias1);
    h.decay = static_cast<float>(kDecoupled ? decoupled_decay(p) : p.weight_decay);
    h.beta1 = static_cast<float>(p.beta1);
    h.one_minus_beta1 = static_cast<float>(1.0 - p.beta1);
    h.beta2 = static_cast<float>(p.beta2);
    h.one_minus_beta2 = static_cast<float>(1.0 - p.beta2);
    h.inverse_sqrt_bias2 = static_cast<float>(1.0 / double_sqrt(bias2));
    h.eps = static_cast<float>(p.eps);
    return h;
  }

  template <class F>
  static FLASHOPTIM_HD F update(F w, F g, F (&s)[kSlotCount], const Hyper& h) {
    advance(w, g, s, h);
    return decayed(w, step(s, h), h);
  }

  /// The first part of update(): m and v.
  template <class F>
  static FLASHOPTIM_HD void advance(F w, F g, F (&s)[kSlotCount], const Hyper& h) {
    if constexpr (!kDecoupled) g = g + splat<F>(h.decay) * w;
    g = clamp_gradient(g);
    s[0] = splat<F>(h.beta1) * s[0] + splat<F>(h.one_minus_beta1) * g;
    s[1] = splat<F>(h.beta2) * s[1] + splat<F>(h.one_minus_beta2) * (g * g);
  }

  /// The second: delta without decoupled decay, of the new m and v.
  template <class F>
  static FLASHOPTIM_HD F step(const F (&s)[kSlotCount], const Hyper& h) {
    const F denominator = sqrt(s[1]) * splat<F>(h.inverse_sqrt_bias2) + splat<F>(h.eps);
    return splat<F>(h.step_size) * (s[0] / max(splat<F>(kSmallestDenominator), denominator));
  }

  /// The last: delta.
  template <class F>
  static FLASHOPTIM_HD F decayed(F w, F step, const Hyper& h) {
    if constexpr (kDecoupled) return splat<F>(h.decay) * w + step;
    return step;
  }

  /// "Exact Adam's bound" (docs/numerics.md, "Largest update"): lr for a steady gradient, and for one that comes after
  /// none, whose m is (1 - beta1) g and sqrt(v) is sqrt(1 - beta2) |g|. Not strict: see its "Telemetry".
  static FLASHOPTIM_HD double largest_update(const Hyperparameters& p) {
    const double sudden = (1.0 - p.beta1) / double_sqrt(1.0 - p.beta2);
    return sudden > 1.0 ? p.lr * sudden : p.lr;
  }

  /// |g| above 2^60 is taken as 2^60, so that g^2 stays finite; NaN passes.
  template <class F>
  static FLASHOPTIM_HD F clamp_gradient(F g) {
    return min(splat<F>(0x1p60f), max(splat<F>(-0x1p60f), g));
  }

  /// Where every v after update() lies between these patterns, 2^-124 and 2^54, and variance_bounds(h), the two bounds
  /// in update() change nothing: (1 - beta2) g^2 <= v keeps |g| below 2^40, and sqrt(v) / sqrt(1 - beta2^t) + eps is at
  /// least 2^-62, and at most 2^27 2^12 + 2^38. v before was bounded as well, and so m; with m at most 2^33 times the
  /// root of v before, as the default codec decodes it, m over the root of v is below 2^46. (A decay of at most 1
  /// bounds what a tiny weight adds to delta.)
  static constexpr uint32_t kSmallestBoundingVariance = (127u - 124u) << 23;
  static constexpr uint32_t kLargestBoundingVariance = (127u + 54u) << 23;
  static constexpr bool kDividesRelative = true;
  static FLASHOPTIM_HD bool variance_bounds(const Hyper& h) {
    return h.beta2 >= 0x1p-20f && h.one_minus_beta2 >= 0x1p-24f && h.inverse_sqrt_bias2 >= 1.0f && h.eps <= 0x1p38f &&
           h.decay <= 1.0f;
  }

  /// Only reached with eps below it and |g| below about 1e-18, where g^2 underflows and v no longer bounds m.
  static constexpr float kSmallestDenominator = 0x1p-62f;
};

using AdamW = AdamRule<true>;
using Adam = AdamRule<false>;

}  // namespace flashoptim::core
