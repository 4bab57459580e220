// Whole steps against the float64 oracle, with bounds that are derived: running error analysis for the rule
// (oracle/bounded.h), the storage formats' step sizes for what is stored. Nothing here is tuned.
#include <gtest/gtest.h>

#include "flashoptim/core/optimizer_list.h"
#include "tests/kernels/test_tensors.h"
#include "tests/oracle/bounded.h"
#include "tests/oracle/oracle.h"

namespace flashoptim::test {
namespace {

using oracle::Bounded;
constexpr double kUnit = oracle::kFloatUnit;

/// Hyperparameters with which no term vanishes, in several combinations.
Hyperparameters hyperparameters(int variation, int64_t step) {
  Hyperparameters h = busy_hyperparameters(step);
  h.seed = 17;
  if (variation == 1) {  // decouple_lr, maximize, a state that starts late
    h.decay_lr = 0.02;
    h.maximize = true;
    h.step = step + 100;
  }
  if (variation ==
      2) {  // Nesterov, smaller eps (much smaller, and the paper codec's zero variances push weights out of fp16)
    h.nesterov = true;
    h.dampening = 0.0;
    h.eps = 1e-4;
    h.lr = 5e-4;
  }
  return h;
}
constexpr int kVariations = 3;

/// What the oracle takes of them, by name.
oracle::Settings settings_of(OptimizerKind kind, const Hyperparameters& h) {
  oracle::Settings s;
  for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
    if (i == kSeedIndex) continue;
    double* const setting = s.find(hyperparameter(kind, i).name);
    EXPECT_NE(setting, nullptr) << "tests/oracle/oracle.h has no " << hyperparameter(kind, i).name;
    if (setting != nullptr) *setting = get_hyperparameter(kind, i, h);
  }
  return s;
}

/// What storing the weight w - delta may lose, beside the error of delta. With h, h' half a ULP of the narrow value
/// before and after, N the largest correction and u = 2^-24:
///   fp32                 u |w'|
///   nearest, no correction  h', + u |w'| for the fp32 difference
///   stochastic           2 h' + u |w'|
///   correction, nearest  h' / 2N; w and w - delta in fp32 round by u |w| + u |w'|, c and c / N by u h' each
///   correction, dithered h' / N; the terms of core's split_update_dithered: 2 u h + u (h + |delta|) + u |n - n'| + 2 u
///   h'
///                        (tests/core/weight_update_test.cpp), and u |w'| where n' is not the nearest
double storage_bound(const TestTensor& t, int64_t i, double w, double delta, uint32_t narrow_before) {
  const double w_new = std::fabs(w - delta);
  if (t.tensors().parameter_dtype == DType::kFloat32) return kUnit * w_new + 0x1p-149;
  const ReferenceFormat& format = t.narrow_format();
  const double h = format.half_ulp(narrow_before), h_new = format.half_ulp(t.narrow_at(i));
  const double rounded = kUnit * (std::fabs(w) + w_new) + 0x1p-148;
  switch (t.tensors().master_weights) {
    case MasterWeights::kNone:
      return h_new + rounded;
    case MasterWeights::kNoneStochastic:
      return 2.0 * h_new + rounded;
    case MasterWeights::kCorrection8Nearest:
    case MasterWeights::kCorrection16Nearest:
      return h_new / (2.0 * t.largest_correction()) + rounded + 2.0 * kUnit * (h + h_new);
    default:
      return h_new / t.largest_correction() +
             kUnit * (3.0 * h + std::fabs(delta) + (std::fabs(delta) + h + h_new) + 2.0 * h_new + w_new) + 0x1p-149;
  }
}

int mantissa_bits(const std::string& name, int slot) {
#define FLASHOPTIM_CASE(rule) \
  if (name == #rule) return core::rule::kSlots[slot].mantissa_bits;
  FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
  return 0;
}

int64_t group_of(const TestTensor& t, int64_t i) {
  const GroupLayout& l = t.tensors().layout;
  return i / l.row_size * l.groups_per_row() + i % l.row_size / kGroupSize;
}

/// Paper: the code is nearest, half a step of y = q / 127 or r / s = q / 255 (and 10^-4 of a step for the fp32
/// arithmetic before it); the scale is a float16, 2^-11 relative or 2^-25. A largest element a gives a <= (s + 2^-25)
/// (1 + 2^-11).
double paper_bound(const TestTensor& t, int64_t i, int slot, bool is_signed, double exact) {
  const double s = kReferenceFloat16.decode(t.scale_at(slot, group_of(t, i)));
  const double a = std::max((s + 0x1p-25) * (1.0 + 0x1p-10), 1e-12);
  if (is_signed) {
    const double x = std::min(std::fabs(exact) / a, 1.0), step = 0.5001 / 127.0;
    const double y = std::min(2.0 * x / (1.0 + x) + step, 1.0);  // dx/dy = 2 / (2 - y)^2 grows with y
    return a * step * 2.0 / ((2.0 - y) * (2.0 - y)) + std::fabs(exact) * 0x1p-10 + 0x1p-25 +
           8 * kUnit * std::fabs(exact);
  }
  const double r = std::sqrt(std::max(exact, 0.0)), dr = a * 0.5001 / 255.0 + r * 0x1p-10 + 0x1p-25;
  return 2.0 * r * dr + dr * dr;
}

/// Default, variance: less than one step of 2^s fp32 patterns, s the header's shift; at least the smallest normal
/// number.
double window_bound(const TestTensor& t, int64_t i, int slot, double exact) {
  const int shift = (t.scale_at(slot, group_of(t, i)) & 15) + 8;
  return exact * std::ldexp(1.0, shift - 23) * (1.0 + 1e-6) + 0x1p-126;
}

/// Default, momentum: less than one step of the mu-law code, 2^-K of (2 + |x| / G) for every octave of it, times G S; S
/// is the power of two below the root of the variance as stored, or 1; G the header's scale. Where a group chooses K,
/// its header says so, and codes lie up to a first step 2^(1 - K) higher.
double mu_law_bound(const TestTensor& t, int64_t i, const OptimizerChoice& o, int slot, double exact,
                    const float* stored_variance) {
  const uint32_t header = t.scale_at(slot, group_of(t, i));
  const int bits = mantissa_bits(o.name, slot);
  const bool chosen = bits == 0, is_relative = stored_variance != nullptr;
  const int k = chosen ? 6 - static_cast<int>(header & 3u) : bits;
  const double g = float_of(chosen ? header >> 2 << 17 : header << 15);
  // Where v is 0, g^2 was below the smallest float: momentum is dropped.
  if (is_relative && *stored_variance == 0.0f) return 1e-20;
  const double s = is_relative ? std::exp2(std::floor(std::log2(static_cast<double>(*stored_variance)) / 2.0)) : 1.0;
  // A group whose scale is below the normal range is stored as zeros.
  const double zeros = chosen ? 0x1p-109 : 0x1p-116;
  const double start = chosen ? 2.0 + std::exp2(1 - k) : 2.0;
  return (start * g * s + std::fabs(exact)) * std::exp2(-k) * (1.0 + 1e-5) + zeros * s;
}

/// What storing slot `slot` of element i may lose; `stored` are all slots as they now read.
double state_bound(const TestTensor& t, int64_t i, const OptimizerChoice& o, StateCodec codec, int slot, double exact,
                   const std::vector<float> (&stored)[kMaxSlots]) {
  const StateSlotInfo info = state_slot(o.kind, slot);
  if (codec == StateCodec::kFloat32) return 0.0;
  if (codec == StateCodec::kPaper) return paper_bound(t, i, slot, info.is_signed, exact);
  if (!info.is_signed) return window_bound(t, i, slot, exact);
  const bool is_relative = info.relative_to >= 0;
  return mu_law_bound(t, i, o, slot, exact, is_relative ? &stored[info.relative_to][static_cast<size_t>(i)] : nullptr);
}

/// One step at a time, from what is stored: the bound is that of one step.
void expect_steps_within_bounds(const OptimizerChoice& o, StateCodec codec, const Storage& storage,
                                const std::vector<int64_t>& sizes, int variation) {
  TestTensor t(o, codec, storage, sizes, 21);
  const int64_t n = t.numel();
  Plan plan;
  ASSERT_TRUE(Plan::make(o.kind, o.has_momentum, &t.tensors(), 1, &plan).is_ok());
  std::vector<float> states[kMaxSlots], new_states[kMaxSlots];
  float *before[kMaxSlots], *after[kMaxSlots];
  for (int slot = 0; slot < kMaxSlots; ++slot) {
    states[slot].resize(static_cast<size_t>(n));
    new_states[slot].resize(static_cast<size_t>(n));
    before[slot] = states[slot].data();
    after[slot] = new_states[slot].data();
  }
  std::vector<double> w(static_cast<size_t>(n));
  std::vector<uint32_t> narrow(static_cast<size_t>(n));
  for (int64_t step = 1; step <= (kSanitized ? 3 : 12); ++step) {
    t.set_step(step);
    ASSERT_TRUE(plan.set_gradient(0, t.tensors().gradient).is_ok());
    ASSERT_TRUE(decode_states(o.kind, o.has_momentum, t.tensors(), before).is_ok());
    for (int64_t i = 0; i < n; ++i) {
      w[static_cast<size_t>(i)] = t.weight_at(i);
      narrow[static_cast<size_t>(i)] = storage.dtype == DType::kFloat32 ? 0 : t.narrow_at(i);
    }
    const Hyperparameters hyper = hyperparameters(variation, step);
    const oracle::Settings s = settings_of(o.kind, hyper);
    ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
    ASSERT_TRUE(decode_states(o.kind, o.has_momentum, t.tensors(), after).is_ok());
    for (int64_t i = 0; i < n; ++i) {
      const size_t k = static_cast<size_t>(i);
      // The rule sees the weight as merged to fp32: the sum rounds, and the correction's term.
      const double merged = storage.dtype == DType::kFloat32
                                ? 0.0
                                : kUnit * (std::fabs(w[k]) + 2.0 * t.narrow_format().half_ulp(narrow[k]));
      oracle::Element<Bounded> e{{w[k], merged}, {}};
      for (int slot = 0; slot < o.states; ++slot) e.states[slot] = {states[slot][k], 0.0};
      const Bounded delta = oracle::step(o.name, e, Bounded(t.gradient_at(i), 0.0), s);
      ASSERT_LE(std::fabs(t.weight_at(i) - (w[k] - delta.value)),
                delta.error + storage_bound(t, i, w[k], delta.value, narrow[k]))
          << "weight " << i << " at step " << step << " was " << w[k] << " exact update " << delta.value << " got "
          << w[k] - t.weight_at(i);
      for (int slot = 0; slot < o.states; ++slot) {
        const Bounded& exact = e.states[slot];
        ASSERT_LE(std::fabs(static_cast<double>(new_states[slot][k]) - exact.value),
                  exact.error + state_bound(t, i, o, codec, slot, exact.value, new_states))
            << "slot " << slot << ", element " << i << " step " << step << " exact " << exact.value;
      }
    }
  }
}

void expect_codec_within_bounds(StateCodec codec) {
  for (const OptimizerChoice& o : kOptimizers) {
    for (const Storage& storage : all_storages()) {
      for (int variation = 0; variation < kVariations; ++variation) {
        SCOPED_TRACE(describe(o, codec, storage) + " variation " + std::to_string(variation));
        expect_steps_within_bounds(o, codec, storage, {9, 77}, variation);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(Oracle, EveryStepWithFp32StatesIsWithinTheDerivedBound) { expect_codec_within_bounds(StateCodec::kFloat32); }
TEST(Oracle, EveryStepWithPaperStatesIsWithinOneRoundingOfItsCodes) { expect_codec_within_bounds(StateCodec::kPaper); }
TEST(Oracle, EveryStepWithDefaultStatesIsWithinOneStepOfItsCodes) { expect_codec_within_bounds(StateCodec::kDefault); }

/// A whole run with fp32 states: the bound follows the oracle through all steps, and stays small enough to mean
/// something.
void expect_run_within_bound(const OptimizerChoice& o, const Storage& storage, int variation) {
  TestTensor t(o, StateCodec::kFloat32, storage, {515}, 22);
  const int64_t n = t.numel();
  Plan plan;
  ASSERT_TRUE(Plan::make(o.kind, o.has_momentum, &t.tensors(), 1, &plan).is_ok());
  std::vector<oracle::Element<Bounded>> elements;
  std::vector<double> start;
  for (int64_t i = 0; i < n; ++i) {
    start.push_back(t.weight_at(i));
    elements.push_back({{start.back(), 0.0}, {}});
  }
  double moved = 0.0;
  for (int64_t step = 1; step <= 50; ++step) {
    t.set_step(step);
    ASSERT_TRUE(plan.set_gradient(0, t.tensors().gradient).is_ok());
    std::vector<uint32_t> narrow(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i)
      narrow[static_cast<size_t>(i)] = storage.dtype == DType::kFloat32 ? 0 : t.narrow_at(i);
    const Hyperparameters hyper = hyperparameters(variation, step);
    const oracle::Settings s = settings_of(o.kind, hyper);
    ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
    for (int64_t i = 0; i < n; ++i) {
      oracle::Element<Bounded>& e = elements[static_cast<size_t>(i)];
      oracle::Element<Bounded> seen = e;
      if (storage.dtype != DType::kFloat32)
        seen.weight.error += kUnit * (std::fabs(e.weight.value) + e.weight.error +
                                      2.0 * t.narrow_format().half_ulp(narrow[static_cast<size_t>(i)]));
      const Bounded delta = oracle::step(o.name, seen, Bounded(t.gradient_at(i), 0.0), s);
      const double w = e.weight.value;
      std::copy(std::begin(seen.states), std::end(seen.states), std::begin(e.states));
      e.weight = {w - delta.value,
                  e.weight.error + delta.error +
                      storage_bound(t, i, std::fabs(w) + e.weight.error, delta.value, narrow[static_cast<size_t>(i)]) +
                      kUnit * e.weight.error};
      ASSERT_LE(std::fabs(t.weight_at(i) - e.weight.value), e.weight.error) << "element " << i << " step " << step;
      moved = std::max(moved, std::fabs(e.weight.value - start[static_cast<size_t>(i)]));
    }
  }
  // A bound as large as the movement would prove nothing. Nine elements in ten have a small one; where L2 decay nearly
  // cancels the gradient, Adam divides noise by its own size, and no bound on a run can be.
  std::vector<double> errors;
  for (const auto& e : elements) errors.push_back(e.weight.error);
  std::nth_element(errors.begin(), errors.begin() + static_cast<int64_t>(errors.size() * 9 / 10), errors.end());
  const double most = errors[errors.size() * 9 / 10];
  if (o.kind != OptimizerKind::kLion) {
    EXPECT_LT(most, storage.dtype == DType::kFloat32 ? 2e-3 * moved : 0.5 * moved) << most << " of " << moved;
  }
}

TEST(Oracle, FiftyStepsFollowTheOracleWithinTheBoundThatRanAlong) {
  const Storage storages[] = {{DType::kFloat32, DType::kFloat32, MasterWeights::kNone},
                              {DType::kBFloat16, DType::kFloat32, MasterWeights::kCorrection8},
                              {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection16},
                              {DType::kFloat16, DType::kFloat32, MasterWeights::kCorrection8},
                              {DType::kFloat16, DType::kFloat16, MasterWeights::kCorrection16Nearest}};
  for (const OptimizerChoice& o : kOptimizers) {
    for (const Storage& storage : storages) {
      for (int variation = 0; variation < kVariations; ++variation) {
        SCOPED_TRACE(describe(o, StateCodec::kFloat32, storage) + " variation " + std::to_string(variation));
        expect_run_within_bound(o, storage, variation);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// The oracle itself on numbers worked by hand: one element, w = 1, g = 2, lr = 0.1, decay 0.5, first step.
TEST(Oracle, AgreesWithHandWorkedSteps) {
  oracle::Settings s;
  s.lr = 0.1;
  s.beta1 = 0.9;
  s.beta2 = 0.99;
  s.eps = 1.0;
  s.weight_decay = 0.5;
  s.momentum = 0.8;
  s.dampening = 0.25;
  const auto run = [&s](const char* name) {
    oracle::Element<double> e{1.0, {}};
    return oracle::step(name, e, 2.0, s);
  };
  EXPECT_NEAR(run("AdamW"), 0.1 * 0.5 + 0.1 * 2.0 / (2.0 + 1.0), 1e-15);
  EXPECT_NEAR(run("Adam"), 0.1 * 2.5 / (2.5 + 1.0), 1e-15);
  EXPECT_NEAR(run("Sgd"), 0.1 * 2.5, 1e-15);
  EXPECT_NEAR(run("Sgdw"), 0.1 * 0.5 + 0.1 * 2.0, 1e-15);
  EXPECT_NEAR(run("SgdPlain"), 0.1 * 2.5, 1e-15);
  EXPECT_NEAR(run("Lion"), 0.1 * 0.5 + 0.1, 1e-15);
  s.nesterov = 1.0;
  EXPECT_NEAR(run("Sgd"), 0.1 * (2.5 + 0.8 * 2.5), 1e-15);
  s.nesterov = 0.0;
  s.decay_lr = 0.4;
  EXPECT_NEAR(run("SgdwPlain"), 0.5 * 0.1 / 0.4 + 0.1 * 2.0, 1e-15);
  s.maximize = 1.0;
  EXPECT_NEAR(run("SgdwPlain"), 0.5 * 0.1 / 0.4 - 0.1 * 2.0, 1e-15);
}

}  // namespace
}  // namespace flashoptim::test
