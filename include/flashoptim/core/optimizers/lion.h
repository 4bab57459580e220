// Lion (Chen et al. 2023): sign of an interpolation between momentum and gradient, decoupled weight decay.
//
//   delta = lr * sign(beta1 m + (1 - beta1) g) + lr * weight_decay * w
//   m    <- beta2 m + (1 - beta2) g
//
// Reads lr, beta1, beta2, weight_decay, decay_lr. sign(0) = 0; NaN passes.
#pragma once

#include "flashoptim/core/optimizers/rule.h"

namespace flashoptim::core {

struct Lion {
  static constexpr OptimizerKind kKind = OptimizerKind::kLion;
  static constexpr const char* kName = "lion";
  static constexpr const char* kTitle = "Lion";
  static constexpr auto kHyperparameters = hyperparameter_list({}, beta_field("beta1", &Hyperparameters::beta1, 0.9),
                                                               beta_field("beta2", &Hyperparameters::beta2, 0.99));
  static constexpr bool kDecoupledDecay = true;
  static constexpr int kSlotCount = 1;
  static constexpr StateSlot kSlots[] = {{"exp_avg", StateKind::kSigned, kNoSlot, 0}};

  struct Hyper {
    float lr;
    float decay;  // share of w taken off
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
  };

  static FLASHOPTIM_HD Hyper make_hyper(const Hyperparameters& p) {
    Hyper h{};
    h.lr = static_cast<float>(p.lr);
    h.decay = static_cast<float>(decoupled_decay(p));
    h.beta1 = static_cast<float>(p.beta1);
    h.one_minus_beta1 = static_cast<float>(1.0 - p.beta1);
    h.beta2 = static_cast<float>(p.beta2);
    h.one_minus_beta2 = static_cast<float>(1.0 - p.beta2);
    return h;
  }

  template <class F>
  static FLASHOPTIM_HD F update(F w, F g, F (&s)[kSlotCount], const Hyper& h) {
    const F c = splat<F>(h.beta1) * s[0] + splat<F>(h.one_minus_beta1) * g;
    s[0] = splat<F>(h.beta2) * s[0] + splat<F>(h.one_minus_beta2) * g;
    const F zero = splat<F>(0.0f);
    const F sign = select(greater(c, zero), splat<F>(1.0f), select(greater(zero, c), splat<F>(-1.0f), c));
    return splat<F>(h.decay) * w + splat<F>(h.lr) * sign;
  }

  static FLASHOPTIM_HD double largest_update(const Hyperparameters& p) { return p.lr; }
};

}  // namespace flashoptim::core
