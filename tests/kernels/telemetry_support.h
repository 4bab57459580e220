// Telemetry by brute force: a real step's counts, found from the bytes before and after it.
#pragma once

#include <gtest/gtest.h>

#include "flashoptim/core/optimizer_list.h"
#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {

/// One element's step in fp32, by the rule itself.
struct Recomputed {
  float delta;
  float without_decay;  ///< the decoupled one
};

template <class Rule>
Recomputed recompute(float w, float g, float (&states)[kMaxSlots], Hyperparameters hyper) {
  constexpr int kSlots = core::kSlotArray<Rule>;
  float s[kSlots], copy[kSlots];
  for (int k = 0; k < kSlots; ++k) s[k] = copy[k] = states[k];
  Recomputed out{};
  out.delta = Rule::update(w, g, s, Rule::make_hyper(hyper));
  if (Rule::kDecoupledDecay) hyper.weight_decay = 0.0;
  out.without_decay = Rule::update(w, g, copy, Rule::make_hyper(hyper));
  for (int k = 0; k < kSlots; ++k) states[k] = s[k];
  return out;
}

inline Recomputed recompute(const std::string& name, float w, float g, float (&states)[kMaxSlots],
                            const Hyperparameters& hyper) {
  Recomputed out{};
#define FLASHOPTIM_CASE(rule) \
  if (name == #rule) out = recompute<core::rule>(w, g, states, hyper);
  FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
  return out;
}

/// docs/numerics.md, "Largest update".
inline double documented_bound(const OptimizerChoice& o, const Hyperparameters& h) {
  if (o.kind == OptimizerKind::kLion) return h.lr;
  if (o.kind == OptimizerKind::kAdamW || o.kind == OptimizerKind::kAdam)
    return h.lr * std::max(1.0, (1.0 - h.beta1) / std::sqrt(1.0 - h.beta2));
#define FLASHOPTIM_CASE(rule) \
  if (o.name == std::string(#rule)) return core::rule::largest_update(h);
  FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
  return 0.0;
}

/// Whether the codec's format ends below this state.
inline bool is_beyond_codec(StateCodec codec, bool is_signed, float state) {
  if (!std::isfinite(state)) return false;
  if (codec == StateCodec::kPaper) return std::fabs(is_signed ? state : std::sqrt(state)) > 65504.0f;
  return codec == StateCodec::kDefault && !is_signed && state > 0x1p127f;
}

/// What is known of a tensor before a step.
struct Before {
  std::vector<float> w, states[kMaxSlots];
  std::vector<unsigned char> parameter, correction, all;

  Before(const OptimizerChoice& o, const TestTensor& test) {
    const ParameterTensors& t = test.tensors();
    const int64_t n = test.numel();
    w.resize(static_cast<size_t>(n));
    EXPECT_TRUE(merge_weights(t.parameter_dtype, t.master_weights, t.parameter, t.correction, w.data(), n).is_ok());
    float* values[kMaxSlots];
    for (int k = 0; k < kMaxSlots; ++k) {
      states[k].resize(static_cast<size_t>(n));
      values[k] = states[k].data();
    }
    EXPECT_TRUE(decode_states(o.kind, o.has_momentum, t, values).is_ok());
    const ElementSizesOf sizes = element_sizes_of(t);
    const auto copy = [n](const void* from, int64_t size, std::vector<unsigned char>& to) {
      const unsigned char* p = static_cast<const unsigned char*>(from);
      if (size != 0) to.assign(p, p + n * size);
    };
    copy(t.parameter, sizes.parameter, parameter);
    copy(t.correction, sizes.correction, correction);
    all = test.bytes();
  }
};

/// The telemetry of a step that has happened.
inline StepTelemetry brute_force(const OptimizerChoice& o, const Before& before, const TestTensor& test,
                                 const Hyperparameters& hyper, float gradient_scale) {
  const Before after(o, test);
  const ElementSizesOf sizes = element_sizes_of(test.tensors());
  const auto same = [](const std::vector<unsigned char>& a, const std::vector<unsigned char>& b, size_t i,
                       int64_t size) {
    const size_t bytes = static_cast<size_t>(size);
    return bytes == 0 || std::memcmp(a.data() + i * bytes, b.data() + i * bytes, bytes) == 0;
  };
  StepTelemetry out{};
  out.examined = test.numel();
  const float bound = static_cast<float>(documented_bound(o, hyper));
  for (size_t i = 0; i < before.w.size(); ++i) {
    const float g = test.gradient_at(static_cast<int64_t>(i)) * (hyper.maximize ? -gradient_scale : gradient_scale);
    out.nonfinite_gradients += !std::isfinite(g);
    float s[kMaxSlots];
    for (int k = 0; k < kMaxSlots; ++k) s[k] = before.states[k][i];
    const Recomputed r = recompute(o.name, before.w[i], g, s, hyper);
    const bool kept = same(before.parameter, after.parameter, i, sizes.parameter) &&
                      same(before.correction, after.correction, i, sizes.correction);
    out.lost_updates += kept && r.delta != 0.0f && !std::isnan(r.delta);
    for (int k = 0; k < o.states; ++k) {
      out.floored_codes += s[k] != 0.0f && after.states[k][i] == 0.0f;
      out.saturated_codes += is_beyond_codec(test.tensors().state_codec, state_slot(o.kind, k).is_signed, s[k]);
    }
    if (bound > 0.0f && std::fabs(r.without_decay) / bound > out.largest_update_ratio) {
      out.largest_update_ratio = std::fabs(r.without_decay) / bound;
    }
  }
  return out;
}

inline void expect_equal(const StepTelemetry& a, const StepTelemetry& b) {
  EXPECT_EQ(a.examined, b.examined);
  EXPECT_EQ(a.nonfinite_gradients, b.nonfinite_gradients);
  EXPECT_EQ(a.lost_updates, b.lost_updates);
  EXPECT_EQ(a.floored_codes, b.floored_codes);
  EXPECT_EQ(a.saturated_codes, b.saturated_codes);
  EXPECT_EQ(a.largest_update_ratio, b.largest_update_ratio);
}

inline void add_to(const StepTelemetry& a, StepTelemetry& sum) {
  sum.examined += a.examined;
  sum.nonfinite_gradients += a.nonfinite_gradients;
  sum.lost_updates += a.lost_updates;
  sum.floored_codes += a.floored_codes;
  sum.saturated_codes += a.saturated_codes;
  sum.largest_update_ratio = std::max(sum.largest_update_ratio, a.largest_update_ratio);
}

/// A quantized or fp32 tensor of given weights and gradients, everything else 0.
inline void fill(TestTensor& t, const std::vector<float>& weights, const std::vector<float>& gradients) {
  const ParameterTensors& p = t.tensors();
  const int64_t n = t.numel();
  EXPECT_TRUE(split_weights(p.parameter_dtype, p.master_weights, weights.data(), p.parameter, p.correction, n).is_ok());
  EXPECT_TRUE(
      split_weights(p.gradient_dtype, MasterWeights::kNone, gradients.data(), const_cast<void*>(p.gradient), nullptr, n)
          .is_ok());
}

}  // namespace flashoptim::test
