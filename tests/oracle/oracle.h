// The optimizers in real numbers, written from the papers and from PyTorch's documentation; nothing here is shared with
// the library. T is double, or a number that carries an error bound with it (bounded.h).
//
//   Adam     Kingma & Ba 2015, algorithm 1; weight decay as L2 (torch.optim.Adam)
//   AdamW    Loshchilov & Hutter 2019, algorithm 2 (torch.optim.AdamW: the decay is lr * lambda)
//   SGD      torch.optim.SGD: momentum, dampening, Nesterov, L2; the first momentum buffer is the gradient itself
//   SGDW     Loshchilov & Hutter 2019, algorithm 1, with torch.optim.SGD's momentum
//   Lion     Chen et al. 2023, algorithm 2
//   AdEMAMix Pagliardini et al. 2024, algorithm 1 with its appendix's schedules
//   ADOPT    Taniguchi et al. 2024, algorithm 2; its first gradient makes the variance alone
//
// The tests of both front ends and the laboratory (benchmarks/fidelity) measure against these, in Python too (c_api).
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace flashoptim::oracle {

struct Settings {
  double lr = 0.0;
  double beta1 = 0.0, beta2 = 0.0, eps = 0.0;
  double weight_decay = 0.0;
  double momentum = 0.0, dampening = 0.0;
  double beta3 = 0.0, alpha = 0.0, t_alpha = 0.0, t_beta3 = 0.0;
  /// Decoupled decay is weight_decay * lr; where this is not 0, weight_decay * lr / decay_lr.
  double decay_lr = 0.0;
  double nesterov = 0.0, maximize = 0.0;  ///< flags
  double step = 1.0;                      ///< counts from 1

  /// By the names above; null where there is no such.
  double* find(const std::string& name) {
    const struct {
      const char* name;
      double* value;
    } all[] = {{"lr", &lr},
               {"beta1", &beta1},
               {"beta2", &beta2},
               {"eps", &eps},
               {"weight_decay", &weight_decay},
               {"momentum", &momentum},
               {"beta3", &beta3},
               {"alpha", &alpha},
               {"t_alpha", &t_alpha},
               {"t_beta3", &t_beta3},
               {"dampening", &dampening},
               {"decay_lr", &decay_lr},
               {"nesterov", &nesterov},
               {"maximize", &maximize},
               {"step", &step}};
    for (const auto& one : all) {
      if (name == one.name) return one.value;
    }
    return nullptr;
  }
};

inline constexpr int kMaxStates = 4;

template <class T>
struct Element {
  T weight{};
  T states[kMaxStates]{};  ///< in the order in which each optimizer below names them
};

inline double root(double v) { return std::sqrt(v); }
inline double sign(double v) { return v > 0.0 ? 1.0 : v < 0.0 ? -1.0 : 0.0; }

inline double clamped(double v, double limit) { return v > limit ? limit : v < -limit ? -limit : v; }
inline double at_least(double v, double least) { return v > least ? v : least; }

inline double decay_of(const Settings& s) {
  return s.decay_lr > 0.0 ? s.weight_decay * s.lr / s.decay_lr : s.weight_decay * s.lr;
}

/// Each returns what the step takes off the weight, and updates the states; the caller subtracts. A numerator of 0 over
/// a denominator of 0 is 0: nothing was ever seen.
template <class T>
T quotient(T numerator, T denominator) {
  return static_cast<double>(denominator) == 0.0 ? T(0.0) : numerator / denominator;
}

/// States: first moment, second moment.
template <class T>
T adam(Element<T>& e, T g, const Settings& s, bool decoupled) {
  T &first = e.states[0], &second = e.states[1];
  if (!decoupled) g = g + T(s.weight_decay) * e.weight;
  first = T(s.beta1) * first + T(1.0 - s.beta1) * g;
  second = T(s.beta2) * second + T(1.0 - s.beta2) * (g * g);
  const T first_hat = first / T(1.0 - std::pow(s.beta1, s.step));
  const T second_hat = second / T(1.0 - std::pow(s.beta2, s.step));
  const T step = T(s.lr) * quotient(first_hat, root(second_hat) + T(s.eps));
  return decoupled ? T(decay_of(s)) * e.weight + step : step;
}

/// State: the momentum buffer.
template <class T>
T sgd(Element<T>& e, T g, const Settings& s, bool decoupled, bool momentum) {
  if (!decoupled) g = g + T(s.weight_decay) * e.weight;
  T direction = g;
  if (momentum) {
    T& buffer = e.states[0];
    buffer = s.step == 1.0 ? g : T(s.momentum) * buffer + T(1.0 - s.dampening) * g;
    direction = s.nesterov != 0.0 ? g + T(s.momentum) * buffer : buffer;
  }
  const T step = T(s.lr) * direction;
  return decoupled ? T(decay_of(s)) * e.weight + step : step;
}

/// State: the momentum.
template <class T>
T lion(Element<T>& e, T g, const Settings& s) {
  T& momentum = e.states[0];
  const T direction = sign(T(s.beta1) * momentum + T(1.0 - s.beta1) * g);
  momentum = T(s.beta2) * momentum + T(1.0 - s.beta2) * g;
  return T(decay_of(s)) * e.weight + T(s.lr) * direction;
}

/// By how many steps an average forgets half: beta^(f + 1) = 1/2.
inline double half_life(double beta) { return std::log(0.5) / std::log(beta) - 1.0; }

inline double beta3_at(const Settings& s, double step) {
  if (s.t_beta3 <= 0.0 || step >= s.t_beta3) return s.beta3;
  const double share = step / s.t_beta3;
  const double life = (1.0 - share) * half_life(s.beta1) + share * half_life(s.beta3);
  return std::fmin(std::pow(0.5, 1.0 / (life + 1.0)), s.beta3);
}

/// States: fast average, second moment, and the slow average less (1 - beta3) / (1 - beta1) of the fast one.
template <class T>
T ademamix(Element<T>& e, T g, const Settings& s) {
  T &fast = e.states[0], &second = e.states[1];
  const double alpha = s.t_alpha > 0.0 ? std::fmin(s.step * s.alpha / s.t_alpha, s.alpha) : s.alpha;
  const double beta3 = beta3_at(s, s.step);
  T slow = e.states[2] + T((1.0 - beta3_at(s, s.step - 1.0)) / (1.0 - s.beta1)) * fast;
  fast = T(s.beta1) * fast + T(1.0 - s.beta1) * g;
  second = T(s.beta2) * second + T(1.0 - s.beta2) * (g * g);
  slow = T(beta3) * slow + T(1.0 - beta3) * g;
  e.states[2] = slow - T((1.0 - beta3) / (1.0 - s.beta1)) * fast;
  const T fast_hat = fast / T(1.0 - std::pow(s.beta1, s.step));
  const T second_hat = second / T(1.0 - std::pow(s.beta2, s.step));
  const T step = T(s.lr) * quotient(fast_hat + T(alpha) * slow, root(second_hat) + T(s.eps));
  return T(decay_of(s)) * e.weight + step;
}

/// States: the momentum, second moment.
template <class T>
T adopt(Element<T>& e, T g, const Settings& s) {
  T &momentum = e.states[0], &second = e.states[1];
  if (s.step == 1.0) {
    second = g * g;
    return T(0.0);
  }
  const T limit(std::pow(s.step - 1.0, 0.25));
  const T normalized = clamped(quotient(g, at_least(root(second), T(s.eps))), limit);
  momentum = T(s.beta1) * momentum + T(1.0 - s.beta1) * normalized;
  second = T(s.beta2) * second + T(1.0 - s.beta2) * (g * g);
  return T(decay_of(s)) * e.weight + T(s.lr) * momentum;
}

/// One step of one element, gradients as they are.
template <class T>
using Step = T (*)(Element<T>&, T g, const Settings&);

/// Those of core/optimizer_list.h by its names, spelt out here so that a new rule without an oracle is seen.
template <class T>
struct Named {
  const char* name;
  Step<T> step;
};

template <class T>
const std::vector<Named<T>>& all() {
  using E = Element<T>;
  using S = Settings;
  static const std::vector<Named<T>> list{
      {"AdamW", [](E& e, T g, const S& s) { return adam(e, g, s, true); }},
      {"Adam", [](E& e, T g, const S& s) { return adam(e, g, s, false); }},
      {"Sgd", [](E& e, T g, const S& s) { return sgd(e, g, s, false, true); }},
      {"Sgdw", [](E& e, T g, const S& s) { return sgd(e, g, s, true, true); }},
      {"SgdPlain", [](E& e, T g, const S& s) { return sgd(e, g, s, false, false); }},
      {"SgdwPlain", [](E& e, T g, const S& s) { return sgd(e, g, s, true, false); }},
      {"Lion", [](E& e, T g, const S& s) { return lion(e, g, s); }},
      {"AdEMAMix", [](E& e, T g, const S& s) { return ademamix(e, g, s); }},
      {"Adopt", [](E& e, T g, const S& s) { return adopt(e, g, s); }},
  };
  return list;
}

/// Null where there is none of this name.
template <class T>
Step<T> find(const std::string& name) {
  for (const Named<T>& one : all<T>()) {
    if (name == one.name) return one.step;
  }
  return nullptr;
}

/// A step by name; `maximize` turns the gradient round.
template <class T>
T step(const std::string& name, Element<T>& e, T g, const Settings& s) {
  return find<T>(name)(e, s.maximize != 0.0 ? T(0.0) - g : g, s);
}

}  // namespace flashoptim::oracle
