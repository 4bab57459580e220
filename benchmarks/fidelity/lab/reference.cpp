#include "lab/reference.h"

#include <algorithm>
#include <cmath>

#include "flashoptim/core/optimizer_list.h"
#include "tests/oracle/oracle.h"

namespace flashoptim::fidelity {

namespace {

constexpr int64_t kWeightSamples = 60;
constexpr int64_t kUpdateSamples = 100;

struct ExactState {
  std::vector<double> w, m, v, update;
  std::vector<oracle::Element<double>> elements;
};

const char* rule_name(OptimizerKind optimizer) {
#define FLASHOPTIM_CASE(rule) \
  if (core::rule::kKind == optimizer && !core::kIsWithoutMomentum<core::rule>) return #rule;
  FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
  return "";
}

void exact_adamw(const Hyperparameters& h, const float* g, ExactState& s, int64_t count) {
  const double step_size = h.lr / (1.0 - std::pow(h.beta1, static_cast<double>(h.step)));
  const double inverse_root_bias = 1.0 / std::sqrt(1.0 - std::pow(h.beta2, static_cast<double>(h.step)));
  const double decay = h.lr * h.weight_decay;
  for (int64_t k = 0; k < count; ++k) {
    const auto i = static_cast<size_t>(k);
    const double x = static_cast<double>(g[k]);
    s.m[i] = h.beta1 * s.m[i] + (1.0 - h.beta1) * x;
    s.v[i] = h.beta2 * s.v[i] + (1.0 - h.beta2) * x * x;
    const double denominator = std::sqrt(s.v[i]) * inverse_root_bias + h.eps;
    s.update[i] = denominator > 0.0 ? step_size * (s.m[i] / denominator) : 0.0;
    s.w[i] -= s.update[i] + decay * s.w[i];
  }
}

void exact_sgd(const Hyperparameters& h, const float* g, ExactState& s, int64_t count) {
  const double share = h.step == 1 ? 1.0 : 1.0 - h.dampening;
  for (int64_t k = 0; k < count; ++k) {
    const auto i = static_cast<size_t>(k);
    const double x = static_cast<double>(g[k]) + h.weight_decay * s.w[i];
    s.m[i] = h.momentum * s.m[i] + share * x;
    s.update[i] = h.lr * (h.nesterov ? x + h.momentum * s.m[i] : s.m[i]);
    s.w[i] -= s.update[i];
  }
}

void exact_lion(const Hyperparameters& h, const float* g, ExactState& s, int64_t count) {
  const double decay = h.lr * h.weight_decay;
  for (int64_t k = 0; k < count; ++k) {
    const auto i = static_cast<size_t>(k);
    const double x = static_cast<double>(g[k]);
    const double c = h.beta1 * s.m[i] + (1.0 - h.beta1) * x;
    s.m[i] = h.beta2 * s.m[i] + (1.0 - h.beta2) * x;
    s.update[i] = c > 0.0 ? h.lr : c < 0.0 ? -h.lr : 0.0;
    s.w[i] -= s.update[i] + decay * s.w[i];
  }
}

/// Of every other optimizer, by the tests' oracle.
void exact_other(OptimizerKind optimizer, const Hyperparameters& h, const float* g, ExactState& s, int64_t count) {
  oracle::Settings settings;
  for (int64_t i = 0; i < hyperparameter_count(optimizer); ++i) {
    if (double* const setting = settings.find(hyperparameter(optimizer, i).name))
      *setting = get_hyperparameter(optimizer, i, h);
  }
  const double decay = h.lr * h.weight_decay;
  settings.weight_decay = 0.0;
  const oracle::Step<double> step = oracle::find<double>(rule_name(optimizer));
  for (int64_t k = 0; k < count; ++k) {
    const auto i = static_cast<size_t>(k);
    oracle::Element<double>& e = s.elements[i];
    e.weight = s.w[i];
    s.update[i] = step(e, static_cast<double>(g[k]), settings);
    s.w[i] -= s.update[i] + decay * s.w[i];
  }
}

}  // namespace

Reference run_reference(const Case& c, const CaseData& data) {
  const auto size = static_cast<size_t>(c.elements);
  Reference out;
  ExactState s{std::vector<double>(data.weights.begin(), data.weights.end()), std::vector<double>(size, 0.0),
               std::vector<double>(size, 0.0), std::vector<double>(size, 0.0),
               std::vector<oracle::Element<double>>(size)};
  std::vector<float> g(size);
  const int64_t weight_stride = std::max<int64_t>(1, c.steps / kWeightSamples);
  const int64_t update_stride = std::max<int64_t>(1, c.steps / kUpdateSamples);
  for (int64_t t = 1; t <= c.steps; ++t) {
    const Hyperparameters h = c.hyper_at(t);
    widen_row(c.gradient_dtype, data.row(c, t), g.data(), c.elements);
    switch (c.optimizer) {
      case OptimizerKind::kLion:
        exact_lion(h, g.data(), s, c.elements);
        break;
      case OptimizerKind::kSgd:
        exact_sgd(h, g.data(), s, c.elements);
        break;
      case OptimizerKind::kAdamW:
        exact_adamw(h, g.data(), s, c.elements);
        break;
      default:
        exact_other(c.optimizer, h, g.data(), s, c.elements);
        break;
    }
    const double bound = c.update_bound(h);
    if (bound > 0.0) {
      double largest = 0.0;
      for (const double u : s.update) largest = std::max(largest, std::fabs(u));
      out.largest_update = std::max(out.largest_update, largest / bound);
    }
    if (t % weight_stride == 0 || t == c.steps) {
      out.weight_steps.push_back(t);
      out.weights.push_back(s.w);
    }
    if (t % update_stride == 0) {
      out.update_steps.push_back(t);
      out.updates.emplace_back(s.update.begin(), s.update.end());
    }
  }
  return out;
}

}  // namespace flashoptim::fidelity
