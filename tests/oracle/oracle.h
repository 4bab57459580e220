// The optimizers in real numbers, written from the papers and from PyTorch's documentation; nothing here is shared with
// the library. T is double, or a number that carries an error bound with it (bounded.h).
//
//   Adam    Kingma & Ba 2015, algorithm 1; weight decay as L2 (torch.optim.Adam)
//   AdamW   Loshchilov & Hutter 2019, algorithm 2 (torch.optim.AdamW: the decay is lr * lambda)
//   SGD     torch.optim.SGD: momentum, dampening, Nesterov, L2; the first momentum buffer is the gradient itself
//   SGDW    Loshchilov & Hutter 2019, algorithm 1, with torch.optim.SGD's momentum
//   Lion    Chen et al. 2023, algorithm 2
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
  /// Decoupled decay is weight_decay * lr; where this is not 0, weight_decay * lr / initial_lr.
  double initial_lr = 0.0;
  bool nesterov = false;
  bool maximize = false;
  int64_t step = 1;
};

template <class T>
struct Element {
  T weight;
  T first;   ///< exp_avg or momentum_buffer
  T second;  ///< exp_avg_sq
};

inline double root(double v) { return std::sqrt(v); }
inline double sign(double v) { return v > 0.0 ? 1.0 : v < 0.0 ? -1.0 : 0.0; }

inline double decay_of(const Settings& s) {
  return s.initial_lr > 0.0 ? s.weight_decay * s.lr / s.initial_lr : s.weight_decay * s.lr;
}

/// Each returns what the step takes off the weight, and updates the states; the caller subtracts.
template <class T>
T adam(Element<T>& e, T g, const Settings& s, bool decoupled) {
  if (s.maximize) g = T(0.0) - g;
  if (!decoupled) g = g + T(s.weight_decay) * e.weight;
  e.first = T(s.beta1) * e.first + T(1.0 - s.beta1) * g;
  e.second = T(s.beta2) * e.second + T(1.0 - s.beta2) * (g * g);
  const T first_hat = e.first / T(1.0 - std::pow(s.beta1, static_cast<double>(s.step)));
  const T second_hat = e.second / T(1.0 - std::pow(s.beta2, static_cast<double>(s.step)));
  const T step = T(s.lr) * first_hat / (root(second_hat) + T(s.eps));
  return decoupled ? T(decay_of(s)) * e.weight + step : step;
}

template <class T>
T sgd(Element<T>& e, T g, const Settings& s, bool decoupled, bool momentum) {
  if (s.maximize) g = T(0.0) - g;
  if (!decoupled) g = g + T(s.weight_decay) * e.weight;
  T direction = g;
  if (momentum) {
    e.first = s.step == 1 ? g : T(s.momentum) * e.first + T(1.0 - s.dampening) * g;
    direction = s.nesterov ? g + T(s.momentum) * e.first : e.first;
  }
  const T step = T(s.lr) * direction;
  return decoupled ? T(decay_of(s)) * e.weight + step : step;
}

template <class T>
T lion(Element<T>& e, T g, const Settings& s) {
  if (s.maximize) g = T(0.0) - g;
  const T direction = sign(T(s.beta1) * e.first + T(1.0 - s.beta1) * g);
  e.first = T(s.beta2) * e.first + T(1.0 - s.beta2) * g;
  return T(decay_of(s)) * e.weight + T(s.lr) * direction;
}

/// Names that step() knows: those of core/optimizer_list.h, spelt out here so that a new rule without an oracle is
/// seen.
const std::vector<std::string>& names();

template <class T>
T step(const std::string& name, Element<T>& e, T g, const Settings& s) {
  if (name == "AdamW") return adam(e, g, s, true);
  if (name == "Adam") return adam(e, g, s, false);
  if (name == "Sgd") return sgd(e, g, s, false, true);
  if (name == "Sgdw") return sgd(e, g, s, true, true);
  if (name == "SgdPlain") return sgd(e, g, s, false, false);
  if (name == "SgdwPlain") return sgd(e, g, s, true, false);
  return lion(e, g, s);
}

}  // namespace flashoptim::oracle
