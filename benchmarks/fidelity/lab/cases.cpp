#include "lab/cases.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "flashoptim/core/narrow_float.h"
#include "flashoptim/core/optimizer_list.h"

namespace flashoptim::fidelity {

namespace {

enum Stream : uint32_t { kNoise = 1, kMean, kSpread, kWeight, kChoice, kExtra1, kExtra2, kExtra3 };

constexpr int kAdamCases = static_cast<int>(Family::kAdam), kSgdCases = static_cast<int>(Family::kSgd),
              kLionCases = static_cast<int>(Family::kLion), kAllCases = kAdamCases | kSgdCases | kLionCases;

float power_of_ten(double x) { return static_cast<float>(std::pow(10.0, x)); }

/// Position of the one loud element of each group at step t.
bool is_moving_outlier(const GradientRow& r, int64_t i) {
  return static_cast<int64_t>(r.random.bits(kChoice, r.counter(i / 32 * 32)) & 31u) == i % 32;
}

class CaseList {
 public:
  explicit CaseList(OptimizerKind optimizer) : optimizer_(optimizer) {}

  /// Appends a case whose gradients are g(row, element), if it is one of this optimizer's; a spare one otherwise.
  template <class Gradient>
  Case& add(int optimizers, const char* name, const char* what, double target, Gradient gradient) {
    Case c;
    c.name = name;
    c.what = what;
    c.optimizer = optimizer_;
    c.target = family_of(optimizer_) == Family::kAdam ? target : kNoTarget;
    c.hyper = default_hyperparameters(optimizer_);
    c.hyper.weight_decay = 0.0;
    if (family_of(optimizer_) == Family::kSgd) c.hyper.momentum = 0.9;
    c.fill = [gradient](const GradientRow& r, float* out) {
      for (int64_t i = 0; i < r.count; ++i) out[i] = gradient(r, i);
    };
    const int bit = static_cast<int>(family_of(optimizer_));
    if ((optimizers & bit) == 0) return spare_ = c;
    cases.push_back(std::move(c));
    return cases.back();
  }

  std::vector<Case> cases;

 private:
  OptimizerKind optimizer_;
  Case spare_;
};

}  // namespace

Family family_of(OptimizerKind optimizer) {
  for (int k = 0; k < state_count(optimizer, true); ++k) {
    if (!state_slot(optimizer, k).is_signed) return Family::kAdam;
  }
  return state_count(optimizer, true) != state_count(optimizer, false) ? Family::kSgd : Family::kLion;
}

Hyperparameters Case::hyper_at(int64_t t) const {
  Hyperparameters at = hyper;
  at.step = t;
  if (schedule == Schedule::kWarmupCosine) {
    const double warmup = 0.05 * static_cast<double>(steps);
    const double x = static_cast<double>(t) / static_cast<double>(steps);
    at.lr *= static_cast<double>(t) < warmup ? static_cast<double>(t) / warmup
                                             : 0.5 * (1.0 + std::cos(std::numbers::pi * x));
  }
  return at;
}

double Case::update_bound(const Hyperparameters& at) const {
#define FLASHOPTIM_CASE(rule) \
  if (core::rule::kKind == optimizer && !core::kIsWithoutMomentum<core::rule>) return core::rule::largest_update(at);
  FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
  return 0.0;
}

std::vector<Case> make_cases(OptimizerKind optimizer) {
  CaseList list(optimizer);
  using Row = GradientRow;
  const auto plain = [](const Row& r, int64_t i) { return r.signal(i); };

  // The cases of numerics.md.
  list.add(kAllCases, "homogeneous", "g = sigma (mu + z)", 0.02, plain);
  list.add(kAdamCases, "homogeneous.b2=.95", "beta2 .95", 0.02, plain).hyper.beta2 = 0.95;
  list.add(kAllCases, "heavy", "Student t3", 0.02, [](const Row& r, int64_t i) {
    const float a = r.normal(kExtra1, i), b = r.normal(kExtra2, i), c = r.normal(kExtra3, i);
    const float chi = std::sqrt((a * a + b * b + c * c) * (1.0f / 3.0f));
    return r.sigma[i] * (r.mu[i] + r.z[i] / (chi * 1.7320508f));
  });
  list.add(kAllCases, "sparse", "2 % of steps non-zero", 0.02,
           [](const Row& r, int64_t i) { return r.uniform(kChoice, i) < 0.02f ? r.signal(i) : 0.0f; });
  list.add(kAllCases, "outlier", "one element in 32 is 100x", 0.05,
           [](const Row& r, int64_t i) { return (i % 32 == 7 ? 100.0f : 1.0f) * r.signal(i); });
  list.add(kAllCases, "spread1", "1 decade inside a group", 0.05, plain).decades = 1.0;
  list.add(kAllCases, "spread2", "2 decades", 0.08, plain).decades = 2.0;
  list.add(kAllCases, "spread3", "3 decades", 0.20, plain).decades = 3.0;
  {
    Case& c = list.add(kAllCases, "spread4", "4 decades, sigma 1e-2, beta2 .95", 0.50, plain);
    c.decades = 4.0;
    c.sigma = 1e-2;
    if (family_of(c.optimizer) == Family::kAdam) c.hyper.beta2 = 0.95;
  }
  list.add(kAdamCases, "g1e-5", "sigma 1e-5", 0.02, plain).sigma = 1e-5;
  list.add(kAllCases, "g1e-6", "sigma 1e-6", 0.02, plain).sigma = 1e-6;
  list.add(kAllCases, "g1e-12", "sigma 1e-12", 0.02, plain).sigma = 1e-12;
  list.add(kAllCases, "g1e6", "sigma 1e6", 0.02, plain).sigma = 1e6;
  list.add(kAllCases, "falling", "scale falls 1000x during the run", 0.02,
           [](const Row& r, int64_t i) {
             return r.signal(i) * power_of_ten(-3.0 * static_cast<double>(r.t) / static_cast<double>(r.steps));
           })
      .sigma = 1e-2;
  list.add(kAllCases, "rising", "scale rises 1000x during the run", 0.02,
           [](const Row& r, int64_t i) {
             return r.signal(i) * power_of_ten(3.0 * static_cast<double>(r.t) / static_cast<double>(r.steps));
           })
      .sigma = 1e-5;

  // Distributions.
  list.add(kAllCases, "laplace", "double exponential", kNoTarget, [](const Row& r, int64_t i) {
    const float u = r.uniform(kExtra1, i) - 0.5f;
    const float magnitude = -Random::log(1.0f - 2.0f * std::fabs(u)) * 0.70710678f;
    return r.sigma[i] * (r.mu[i] + (u < 0.0f ? -magnitude : magnitude));
  });
  list.add(kAllCases, "uniform", "uniform noise", kNoTarget, [](const Row& r, int64_t i) {
    return r.sigma[i] * (r.mu[i] + 3.4641016f * (r.uniform(kExtra1, i) - 0.5f));
  });
  const auto log_normal = [](const Row& r, int64_t i) { return r.signal(i) * std::exp(2.0f * r.normal(kExtra1, i)); };
  list.add(kAllCases, "lognormal", "magnitudes times exp(2 z')", kNoTarget, log_normal).sigma = 1e-4;
  {
    Case& c = list.add(kAdamCases, "lognormal.b2=.95", "the same, beta2 .95", kNoTarget, log_normal);
    c.sigma = 1e-4;
    c.hyper.beta2 = 0.95;
  }
  list.add(kAllCases, "low-noise", "noise 1 % of sigma, mean 10 %", kNoTarget,
           [](const Row& r, int64_t i) { return r.sigma[i] * (r.mu[i] + 0.01f * r.z[i]); });

  // Structure inside a group.
  list.add(kAllCases, "outlier1e4", "one element in 32 is 10,000x", kNoTarget,
           [](const Row& r, int64_t i) { return (i % 32 == 7 ? 1e4f : 1.0f) * r.signal(i); });
  const auto moving = [](const Row& r, int64_t i) { return (is_moving_outlier(r, i) ? 100.0f : 1.0f) * r.signal(i); };
  list.add(kAllCases, "moving-outlier", "one in 32 is 100x, another one every step", kNoTarget, moving);
  list.add(kAdamCases, "moving-outlier.b2=.95", "the same, beta2 .95", kNoTarget, moving).hyper.beta2 = 0.95;
  {
    Case& c = list.add(kAdamCases, "spread4.b2=.999", "4 decades, sigma 1e-2", kNoTarget, plain);
    c.decades = 4.0;
    c.sigma = 1e-2;
  }
  {
    Case& c = list.add(kAllCases, "spread6", "6 decades, sigma 0.1", kNoTarget, plain);
    c.decades = 6.0;
    c.sigma = 0.1;
  }
  list.add(
      kAllCases, "oscillating", "one in 32 swings by 3 decades, period 200", kNoTarget, [](const Row& r, int64_t i) {
        return r.signal(i) * (i % 32 == 3 ? power_of_ten(1.5 * std::sin(0.0314 * static_cast<double>(r.t))) : 1.0f);
      });

  // Rarely touched weights.
  const auto row_touched = [](double share) {
    return [share](const Row& r, int64_t i) {
      return r.shared_uniform(kChoice, i, 128) < static_cast<float>(share) ? r.signal(i) : 0.0f;
    };
  };
  list.add(kAllCases, "rare-row.1%", "embedding rows touched in 1 % of steps", kNoTarget, row_touched(0.01));
  list.add(kAdamCases, "rare-row.0.3%.b2=.95", "rows touched in 0.3 %, beta2 .95", kNoTarget, row_touched(0.003))
      .hyper.beta2 = 0.95;
  list.add(kAllCases, "zipf-rows", "row k touched with probability 1 / (k + 1)", kNoTarget,
           [](const Row& r, int64_t i) {
             const float rank = static_cast<float>(i / 128 + 1);
             return r.shared_uniform(kChoice, i, 128) * rank < 1.0f ? r.signal(i) : 0.0f;
           });
  list.add(kAllCases, "sparse.0.1%.spread2", "0.1 % of steps non-zero, 2 decades", kNoTarget,
           [](const Row& r, int64_t i) { return r.uniform(kChoice, i) < 0.001f ? r.signal(i) : 0.0f; })
      .decades = 2.0;

  // Scale in time.
  list.add(kAllCases, "bursts", "10 of 300 steps 1000x", kNoTarget,
           [](const Row& r, int64_t i) { return (r.t % 300 < 10 ? 1000.0f : 1.0f) * r.signal(i); })
      .sigma = 1e-5;
  list.add(kAllCases, "spikes1e4", "every 100 steps one in 32 is 10,000x", kNoTarget,
           [](const Row& r, int64_t i) {
             return r.signal(i) * (r.t % 100 == 0 && is_moving_outlier(r, i) ? 1e4f : 1.0f);
           })
      .sigma = 1e-4;
  list.add(kAllCases, "step-fall", "1000x smaller from step 500", kNoTarget,
           [](const Row& r, int64_t i) { return r.signal(i) * (r.t < 500 ? 1.0f : 1e-3f); })
      .sigma = 1e-2;
  list.add(kAllCases, "late", "zero in the first half", kNoTarget,
           [](const Row& r, int64_t i) { return r.t < r.steps / 2 ? 0.0f : r.signal(i); });
  list.add(kAllCases, "silence", "zero from step 200 to 2800", kNoTarget,
           [](const Row& r, int64_t i) { return r.t < 200 || r.t >= 2800 ? r.signal(i) : 0.0f; });
  list.add(kAdamCases, "silence.b2=.95", "the same, beta2 .95: v falls to 1e-58", kNoTarget,
           [](const Row& r, int64_t i) { return r.t < 200 || r.t >= 2800 ? r.signal(i) : 0.0f; })
      .hyper.beta2 = 0.95;
  list.add(kAllCases, "ar1.9", "AR(1) noise, 0.9", kNoTarget, [](const Row& r, int64_t i) {
    r.memory[i] = 0.9f * r.memory[i] + 0.43588989f * r.z[i];
    return r.sigma[i] * (r.mu[i] + r.memory[i]);
  });
  list.add(kAllCases, "ar1.99", "AR(1) noise, 0.99", kNoTarget, [](const Row& r, int64_t i) {
    r.memory[i] = 0.99f * r.memory[i] + 0.14106736f * r.z[i];
    return r.sigma[i] * (r.mu[i] + r.memory[i]);
  });

  // No noise at all: the codec's own is everything.
  const auto constant = [](const Row& r, int64_t i) { return r.sigma[i] * r.mu[i]; };
  list.add(kAllCases, "constant", "g = sigma mu", kNoTarget, constant);
  list.add(kAllCases, "constant.spread3", "the same, 3 decades", kNoTarget, constant).decades = 3.0;
  const auto alternating = [](const Row& r, int64_t i) {
    return r.sigma[i] * (r.mu[i] + ((r.t & 1) != 0 ? 1.0f : -1.0f));
  };
  list.add(kAllCases, "alternating", "g = sigma (mu +- 1)", kNoTarget, alternating);
  list.add(kAdamCases, "alternating.spread2", "the same, 2 decades", kNoTarget, alternating).decades = 2.0;

  // Hyperparameters.
  list.add(kAdamCases, "b2=.9", "beta2 .9", kNoTarget, plain).hyper.beta2 = 0.9;
  list.add(kAdamCases, "b2=.99", "beta2 .99", kNoTarget, plain).hyper.beta2 = 0.99;
  list.add(kAdamCases, "b2=.9999", "beta2 .9999", kNoTarget, plain).hyper.beta2 = 0.9999;
  list.add(kAdamCases, "b1=0", "beta1 0 (RMSprop)", kNoTarget, plain).hyper.beta1 = 0.0;
  {
    Case& c = list.add(kAdamCases, "b1=.98,b2=.999", "beta1 .98", kNoTarget, plain);
    c.hyper.beta1 = 0.98;
  }
  {
    Case& c = list.add(kAdamCases, "eps0.spread2", "eps 0, 2 decades", kNoTarget, plain);
    c.hyper.eps = 0.0;
    c.decades = 2.0;
  }
  {
    Case& c = list.add(kAdamCases, "eps1e-6.g1e-6", "eps 1e-6 beside sigma 1e-6", kNoTarget, plain);
    c.hyper.eps = 1e-6;
    c.sigma = 1e-6;
  }
  {
    Case& c = list.add(kLionCases, "b2=.98,b1=.95", "beta1 .95, beta2 .98", kNoTarget, plain);
    c.hyper.beta1 = 0.95;
    c.hyper.beta2 = 0.98;
  }
  {
    Case& c = list.add(kSgdCases, "momentum=.99", "momentum .99", kNoTarget, plain);
    c.hyper.momentum = 0.99;
  }
  {
    Case& c = list.add(kSgdCases, "nesterov.wd", "Nesterov, L2 0.1, weights N(0, .02^2), sigma 1", kNoTarget, plain);
    c.hyper.nesterov = true;
    c.hyper.weight_decay = 0.1;
    c.weight_deviation = 0.02;
    c.sigma = 1.0;
  }
  {
    Case& c = list.add(kAdamCases | kLionCases, "wd0.1", "weight decay 0.1, weights N(0, .02^2)", kNoTarget, plain);
    c.hyper.weight_decay = 0.1;
    c.weight_deviation = 0.02;
  }
  {
    Case& c = list.add(kAllCases, "cosine.wd", "warm-up and cosine, decay 0.1, weights N(0, .02^2)", kNoTarget, plain);
    c.hyper.weight_decay = family_of(c.optimizer) == Family::kSgd ? 0.0 : 0.1;
    c.weight_deviation = 0.02;
    c.schedule = Schedule::kWarmupCosine;
    c.hyper.beta2 = family_of(c.optimizer) == Family::kAdam ? 0.95 : c.hyper.beta2;
  }

  // Element types and corrections.
  {
    Case& c = list.add(kAllCases, "24bit", "8-bit corrections", kNoTarget, plain);
    c.correction_bits_8 = true;
  }
  {
    Case& c = list.add(kAllCases, "24bit.norm", "8-bit corrections, weights 1.0, warm-up and cosine, lr 1e-5",
                       kNoTarget, plain);
    c.correction_bits_8 = true;
    c.weight_mean = 1.0;
    c.schedule = Schedule::kWarmupCosine;
    c.hyper.lr = family_of(c.optimizer) == Family::kSgd ? 1e-2 : 1e-5;
  }
  {
    Case& c = list.add(kAllCases, "24bit.fp16", "fp16 weights and gradients, 8-bit corrections", kNoTarget, plain);
    c.correction_bits_8 = true;
    c.parameter_dtype = DType::kFloat16;
    c.gradient_dtype = DType::kFloat16;
    if (family_of(c.optimizer) == Family::kSgd) c.hyper.lr = 1.0;  // fp16 weights of 1e-6 would be subnormal
  }
  {
    Case& c = list.add(kAllCases, "fp16.spread2", "fp16 weights and gradients, 2 decades", kNoTarget, plain);
    c.parameter_dtype = DType::kFloat16;
    c.gradient_dtype = DType::kFloat16;
    c.decades = 2.0;
    if (family_of(c.optimizer) == Family::kSgd) c.hyper.lr = 1.0;
  }

  // Long.
  {
    Case& c = list.add(kAllCases, "30k-steps", "30,000 steps, 1024 elements", kNoTarget, plain);
    c.steps = 30000;
    c.elements = 1024;
  }
  {
    Case& c = list.add(kAdamCases, "30k-steps.spread3", "the same, 3 decades", kNoTarget, plain);
    c.steps = 30000;
    c.elements = 1024;
    c.decades = 3.0;
  }
  // Counts are lengths of warm-ups: all of the run.
  for (Case& c : list.cases) {
    for (int64_t i = kCommonHyperparameters; i < hyperparameter_count(optimizer); ++i) {
      if (hyperparameter(optimizer, i).kind == HyperparameterKind::kWhole)
        (void)set_hyperparameter(optimizer, i, static_cast<double>(c.steps), &c.hyper);
    }
  }
  return std::move(list.cases);
}

float to_float(DType dtype, uint16_t pattern) {
  return dtype == DType::kFloat16 ? core::Float16::widen<float>(pattern) : core::BFloat16::widen<float>(pattern);
}

void widen_row(DType dtype, const uint16_t* patterns, float* values, int64_t count) {
  if (dtype == DType::kFloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = core::Float16::widen<float>(patterns[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = core::BFloat16::widen<float>(patterns[i]);
  }
}

namespace {

void round_row(DType dtype, const float* values, uint16_t* patterns, int64_t count) {
  if (dtype == DType::kFloat16) {
    for (int64_t i = 0; i < count; ++i) patterns[i] = static_cast<uint16_t>(core::Float16::round<float>(values[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) patterns[i] = static_cast<uint16_t>(core::BFloat16::round<float>(values[i]));
  }
}

}  // namespace

CaseData make_data(const Case& c, uint64_t seed) {
  const int64_t n = c.elements;
  const auto size = static_cast<size_t>(n);
  CaseData data;
  data.sigma.resize(size);
  data.weights.resize(size);
  data.gradients.resize(static_cast<size_t>(c.steps) * size);
  Random random;
  random.seed = static_cast<uint32_t>(seed * 0x9e3779b97f4a7c15ull >> 32);
  std::vector<float> mu(size), z(size), memory(size, 0.0f), values(size);
  for (int64_t i = 0; i < n; ++i) {
    const auto k = static_cast<size_t>(i);
    const auto at = static_cast<uint32_t>(i);
    mu[k] = 0.1f * random.normal(kMean, at);
    data.sigma[k] =
        static_cast<float>(c.sigma * std::pow(10.0, -c.decades * static_cast<double>(random.uniform(kSpread, at))));
    const double w = c.weight_mean + c.weight_deviation * static_cast<double>(random.normal(kWeight, at));
    uint16_t pattern;
    const auto narrow = static_cast<float>(w);
    round_row(c.parameter_dtype, &narrow, &pattern, 1);
    data.weights[k] = to_float(c.parameter_dtype, pattern);
  }
  GradientRow row;
  row.steps = c.steps;
  row.count = n;
  row.sigma = data.sigma.data();
  row.mu = mu.data();
  row.z = z.data();
  row.memory = memory.data();
  row.random = random;
  for (row.t = 0; row.t < c.steps; ++row.t) {
    for (int64_t i = 0; i < n; ++i) z[static_cast<size_t>(i)] = row.normal(kNoise, i);
    c.fill(row, values.data());
    round_row(c.gradient_dtype, values.data(), data.gradients.data() + row.t * n, n);
  }
  return data;
}

}  // namespace flashoptim::fidelity
