// SGD with momentum, dampening, Nesterov (PyTorch's formulation) and L2 or decoupled weight decay (SGDW).
//
//   g     <- g + weight_decay * w                          (SGD only: L2)
//   b     <- g at step 1, momentum * b + (1 - dampening) g after
//   delta  = lr * (nesterov ? g + momentum * b : b)        (momentum = 0: lr * g, no buffer)
//          + lr * weight_decay * w                         (SGDW only: decoupled)
//
// Reads lr, momentum, dampening, nesterov, weight_decay, decay_lr (SGDW), step.
#pragma once

#include "flashoptim/core/optimizers/rule.h"

namespace flashoptim::core {

template <bool kDecoupled, bool kMomentum>
struct SgdRule {
  static constexpr OptimizerKind kKind = kDecoupled ? OptimizerKind::kSgdw : OptimizerKind::kSgd;
  static constexpr const char* kName = kDecoupled ? "sgdw" : "sgd";
  static constexpr const char* kTitle = kDecoupled ? "SGDW" : "SGD";
  static constexpr bool kWithoutMomentum = !kMomentum;
  static constexpr auto kHyperparameters =
      hyperparameter_list({}, nonnegative_field("momentum", &Hyperparameters::momentum, 0.0),
                          finite_field("dampening", &Hyperparameters::dampening, 0.0),
                          flag_field("nesterov", &Hyperparameters::nesterov, false));
  static constexpr bool kDecoupledDecay = kDecoupled;
  static constexpr int kSlotCount = kMomentum ? 1 : 0;
  static constexpr StateSlot kSlots[1] = {{"momentum_buffer", StateKind::kSigned, kNoSlot, 5}};

  struct Hyper {
    float lr;
    float decay;  // SGDW: share of w taken off; SGD: L2 coefficient
    float momentum;
    float gradient_share;              // 1 at step 1, then 1 - dampening
    float from_gradient, from_buffer;  // direction = from_gradient * g + from_buffer * b
  };

  static FLASHOPTIM_HD Hyper make_hyper(const Hyperparameters& p) {
    Hyper h{};
    h.lr = static_cast<float>(p.lr);
    h.decay = static_cast<float>(kDecoupled ? decoupled_decay(p) : p.weight_decay);
    h.momentum = static_cast<float>(p.momentum);
    h.gradient_share = p.step == 1 ? 1.0f : static_cast<float>(1.0 - p.dampening);
    h.from_gradient = p.nesterov ? 1.0f : 0.0f;
    h.from_buffer = p.nesterov ? static_cast<float>(p.momentum) : 1.0f;
    return h;
  }

  template <class F>
  static FLASHOPTIM_HD F update(F w, F g, F (&s)[1], const Hyper& h) {
    if constexpr (!kDecoupled) g = g + splat<F>(h.decay) * w;
    F direction = g;
    if constexpr (kMomentum) {
      s[0] = splat<F>(h.momentum) * s[0] + splat<F>(h.gradient_share) * g;
      direction = splat<F>(h.from_gradient) * g + splat<F>(h.from_buffer) * s[0];
    }
    const F update = splat<F>(h.lr) * direction;
    if constexpr (kDecoupled) return splat<F>(h.decay) * w + update;
    return update;
  }

  /// An update is as large as its gradients.
  static FLASHOPTIM_HD double largest_update(const Hyperparameters&) { return 0.0; }
};

using Sgd = SgdRule<false, true>;
using Sgdw = SgdRule<true, true>;
using SgdPlain = SgdRule<false, false>;
using SgdwPlain = SgdRule<true, false>;

}  // namespace flashoptim::core
