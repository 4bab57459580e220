// ADOPT (Taniguchi et al. 2024, algorithm 2 with the clipping of its section 5.4; decoupled weight decay as in the
// authors' implementation): Adam with a momentum of gradients that the variance before them has normalized.
//
//   v <- g^2 at step 1, which changes no weight; then, with n = t - 1 updates so far and this one,
//   m     <- beta1 m + (1 - beta1) clip(g / max(sqrt(v), eps), n^(1/4))
//   delta  = lr * m + lr * weight_decay * w
//   v     <- beta2 v + (1 - beta2) g^2
//
// m is an average of numbers of at most n^(1/4), whatever v becomes (32 after a million steps), so |m| < n^(1/4), and
// it is stored relative to its group alone: divided by the root of v it would have no bound. delta takes it as it is,
// so the codec has SGD's K of 5.
//
// Reads lr, beta1, beta2, eps, weight_decay, decay_lr, step. Gradients above 2^60 are taken as 2^60: v stays finite.
#pragma once

#include "flashoptim/core/optimizers/rule.h"

namespace flashoptim::core {

struct Adopt {
  static constexpr OptimizerKind kKind = OptimizerKind::kAdopt;
  static constexpr const char* kName = "adopt";
  static constexpr const char* kTitle = "ADOPT";
  static constexpr auto kHyperparameters = hyperparameter_list({}, beta_field("beta1", &Hyperparameters::beta1, 0.9),
                                                               beta_field("beta2", &Hyperparameters::beta2, 0.9999),
                                                               nonnegative_field("eps", &Hyperparameters::eps, 1e-6));
  static constexpr bool kDecoupledDecay = true;
  static constexpr int kSlotCount = 2;
  static constexpr StateSlot kSlots[] = {{"exp_avg", StateKind::kSigned, kNoSlot, 5},
                                         {"exp_avg_sq", StateKind::kUnsigned}};

  struct Hyper {
    float lr, decay;               // 0 at step 1
    float beta1, one_minus_beta1;  // 0 at step 1
    float beta2, one_minus_beta2;  // at step 1 0 and 1
    float eps;
    float limit;  // of a normalized gradient
  };

  static FLASHOPTIM_HD Hyper make_hyper(const Hyperparameters& p) {
    const bool is_first = p.step == 1;
    const double updates = static_cast<double>(p.step - 1);
    Hyper h{};
    h.lr = is_first ? 0.0f : static_cast<float>(p.lr);
    h.decay = is_first ? 0.0f : static_cast<float>(decoupled_decay(p));
    h.beta1 = is_first ? 0.0f : static_cast<float>(p.beta1);
    h.one_minus_beta1 = is_first ? 0.0f : static_cast<float>(1.0 - p.beta1);
    h.beta2 = is_first ? 0.0f : static_cast<float>(p.beta2);
    h.one_minus_beta2 = is_first ? 1.0f : static_cast<float>(1.0 - p.beta2);
    h.eps = static_cast<float>(p.eps);
    h.limit = static_cast<float>(double_sqrt(double_sqrt(updates)));
    return h;
  }

  template <class F>
  static FLASHOPTIM_HD F update(F w, F g, F (&s)[kSlotCount], const Hyper& h) {
    g = min(splat<F>(0x1p60f), max(splat<F>(-0x1p60f), g));  // NaN passes
    // Below 2^-62 g^2 has underflown, and v says nothing of g.
    const F denominator = max(splat<F>(0x1p-62f), max(sqrt(s[1]), splat<F>(h.eps)));
    const F normalized = min(splat<F>(h.limit), max(splat<F>(-h.limit), g / denominator));
    s[0] = splat<F>(h.beta1) * s[0] + splat<F>(h.one_minus_beta1) * normalized;
    s[1] = splat<F>(h.beta2) * s[1] + splat<F>(h.one_minus_beta2) * (g * g);
    return splat<F>(h.decay) * w + splat<F>(h.lr) * s[0];
  }

  static FLASHOPTIM_HD double largest_update(const Hyperparameters& p) {
    return p.lr * double_sqrt(double_sqrt(static_cast<double>(p.step - 1)));
  }
};

}  // namespace flashoptim::core
