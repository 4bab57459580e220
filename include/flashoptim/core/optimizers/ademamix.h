// AdEMAMix (Pagliardini, Ablin & Grangier 2024, algorithm 1): Adam with a second, slow average of the gradient.
//
//   m1    <- beta1 m1 + (1 - beta1) g
//   m2    <- beta3(t) m2 + (1 - beta3(t)) g
//   v     <- beta2 v + (1 - beta2) g^2
//   delta  = lr * weight_decay * w
//          + lr * (m1 / (1 - beta1^t) + alpha(t) m2) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// alpha(t) = alpha min(1, t / t_alpha); beta3(t) goes from beta1 to beta3 within t_beta3 steps so that its half-life,
// ln 0.5 / ln beta3(t) - 1, grows linearly. 0 steps: no warm-up. m2 has no bias correction.
//
// What is kept of m2 is s = m2 - c m1, c = (1 - beta3) / (1 - beta1): what gradients have passed on to it by way of m1,
//   s     <- beta3(t) s + (beta3(t) c(t - 1) - beta1 c(t)) m1         (m1 of before)
// the same numbers, in smaller steps: m1 is a quarter as large as the gradients it averages, and it moves smoothly. A
// slow average's error is that of rounding each of its steps (docs/numerics.md, "A slow average"), and halves so.
//
// How far m2 is from the root of v, both from zero states: by Cauchy and Schwarz, with r = beta3^2 / beta2,
//   |m2| <= (1 - beta3) / sqrt(1 - beta2) sqrt(1 + r + ... + r^(t - 1)) sqrt(v),
// and the same for m1 with beta1. Where r < 1 the sum is below 1 / (1 - r); at beta2 .999 and beta3 .9999 r is 1.0008:
// v forgets first. While gradients come m2 stays below sqrt(v); t steps after the last one the bound is about 0.11
// e^(t / 2500) (2^14 at t = 30,000), which no format can cover for every t. So both averages are stored relative to the
// root of v, because delta divides them by it: an error is the same share of each element's step, however far the
// elements of a group are apart, and a header's scale has the whole range of fp32. What is beyond 2^32 times the root
// is read as that much: after 56,000 steps without a gradient, when sqrt(v) has fallen by 2^40 and eps is what divides.
// Gradients above 2^60 are taken as 2^60 and v is at most 2^127, so a state is never infinite.
//
// Reads lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay, decay_lr, step.
#pragma once

#include "flashoptim/core/optimizers/rule.h"

namespace flashoptim::core {

struct AdEMAMix {
  static constexpr OptimizerKind kKind = OptimizerKind::kAdEMAMix;
  static constexpr const char* kName = "ademamix";
  static constexpr const char* kTitle = "AdEMAMix";
  static constexpr auto kHyperparameters = hyperparameter_list(
      {.weight_decay = 1e-2}, beta_field("beta1", &Hyperparameters::beta1, 0.9),
      beta_field("beta2", &Hyperparameters::beta2, 0.999), beta_field("beta3", &Hyperparameters::beta3, 0.9999),
      nonnegative_field("alpha", &Hyperparameters::alpha, 5.0), whole_field("t_alpha", &Hyperparameters::t_alpha, 0, 0),
      whole_field("t_beta3", &Hyperparameters::t_beta3, 0, 0), nonnegative_field("eps", &Hyperparameters::eps, 1e-8));
  static constexpr bool kDecoupledDecay = true;
  static constexpr int kSlotCount = 3;
  static constexpr StateSlot kSlots[] = {{"exp_avg", StateKind::kSigned, 1, 6},
                                         {"exp_avg_sq", StateKind::kUnsigned},
                                         {"exp_avg_slow", StateKind::kSigned, 1, 6, true}};

  struct Hyper {
    float lr;
    float decay;  // share of w taken off
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float beta3, slow_from_fast;
    float fast_share, alpha;   // of m1, bias correction and m2's part of it included; of s
    float inverse_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
    float eps;
  };

  static FLASHOPTIM_HD Hyper make_hyper(const Hyperparameters& p) {
    const double beta3 = warm_beta3(p, p.step), alpha = p.alpha * share_of(p.step, p.t_alpha);
    const double before = (1.0 - warm_beta3(p, p.step - 1)) / (1.0 - p.beta1), now = (1.0 - beta3) / (1.0 - p.beta1);
    Hyper h{};
    h.lr = static_cast<float>(p.lr);
    h.decay = static_cast<float>(decoupled_decay(p));
    h.beta1 = static_cast<float>(p.beta1);
    h.one_minus_beta1 = static_cast<float>(1.0 - p.beta1);
    h.beta2 = static_cast<float>(p.beta2);
    h.one_minus_beta2 = static_cast<float>(1.0 - p.beta2);
    h.beta3 = static_cast<float>(beta3);
    h.slow_from_fast = static_cast<float>(beta3 * before - p.beta1 * now);
    h.fast_share = static_cast<float>(1.0 / (1.0 - integer_power(p.beta1, p.step)) + alpha * now);
    h.alpha = static_cast<float>(alpha);
    h.inverse_sqrt_bias2 = static_cast<float>(1.0 / double_sqrt(1.0 - integer_power(p.beta2, p.step)));
    h.eps = static_cast<float>(p.eps);
    return h;
  }

  template <class F>
  static FLASHOPTIM_HD F update(F w, F g, F (&s)[kSlotCount], const Hyper& h) {
    g = min(splat<F>(0x1p60f), max(splat<F>(-0x1p60f), g));  // NaN passes
    s[2] = splat<F>(h.beta3) * s[2] + splat<F>(h.slow_from_fast) * s[0];
    s[0] = splat<F>(h.beta1) * s[0] + splat<F>(h.one_minus_beta1) * g;
    s[1] = splat<F>(h.beta2) * s[1] + splat<F>(h.one_minus_beta2) * (g * g);
    const F denominator = sqrt(s[1]) * splat<F>(h.inverse_sqrt_bias2) + splat<F>(h.eps);
    const F mixed = splat<F>(h.fast_share) * s[0] + splat<F>(h.alpha) * s[2];
    return splat<F>(h.decay) * w + splat<F>(h.lr) * (mixed / max(splat<F>(0x1p-62f), denominator));
  }

  /// Adam's bound for both averages, of steady gradients and of one that comes after none; not strict, and m2's is
  /// exceeded where gradients fall (above).
  static FLASHOPTIM_HD double largest_update(const Hyperparameters& p) {
    const double root = double_sqrt(1.0 - p.beta2);
    const double sudden1 = (1.0 - p.beta1) / root, sudden2 = (1.0 - warm_beta3(p, p.step)) / root;
    return p.lr *
           ((sudden1 > 1.0 ? sudden1 : 1.0) + p.alpha * share_of(p.step, p.t_alpha) * (sudden2 > 1.0 ? sudden2 : 1.0));
  }

 private:
  /// How much of a warm-up has passed.
  static FLASHOPTIM_HD double share_of(int64_t step, int64_t steps) {
    return step < steps ? static_cast<double>(step) / static_cast<double>(steps) : 1.0;
  }

  /// beta3(t): of f(beta) = ln 0.5 / ln beta - 1, f^-1((1 - share) f(beta1) + share f(beta3)); constants cancel. 1 / ln
  /// beta is 0 for beta = 0. Never above beta3.
  static FLASHOPTIM_HD double warm_beta3(const Hyperparameters& p, int64_t step) {
    const double share = share_of(step, p.t_beta3);
    if (share == 1.0) return p.beta3;
    const double first = p.beta1 > 0.0 ? 1.0 / natural_log(p.beta1) : 0.0;
    const double last = p.beta3 > 0.0 ? 1.0 / natural_log(p.beta3) : 0.0;
    const double mixed = (1.0 - share) * first + share * last;
    const double beta = mixed < 0.0 ? exponential(1.0 / mixed) : 0.0;
    return beta < p.beta3 ? beta : p.beta3;
  }
};

}  // namespace flashoptim::core
