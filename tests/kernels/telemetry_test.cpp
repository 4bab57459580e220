// Plan::inspect against brute force: the real step runs on the same tensors, and every count is found again from the
// bytes before and after it. The step runs the compiled kernels, inspect core's formulas one group at a time.
#include "tests/kernels/telemetry_support.h"

namespace flashoptim::test {
namespace {

const OptimizerChoice& kAdamW = kOptimizers[0];

// ---- every count, every configuration -------------------------------------------------------------------------------

struct Choice {
  OptimizerChoice optimizer;
  StateCodec codec;
};

class TelemetryCounts : public testing::TestWithParam<Choice> {};

/// Steps on hostile gradients, each one inspected before; a twin is stepped without.
TEST_P(TelemetryCounts, CountsWhatTheStepThenDoesAndChangesNothing) {
  const auto& [optimizer, codec] = GetParam();
  StepTelemetry sum{};
  for (const Storage& storage : all_storages()) {
    for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{3, 77}, std::vector<int64_t>{100}}) {
      SCOPED_TRACE(describe(optimizer, codec, storage) + " of " + std::to_string(sizes.size()) + " dimensions");
      TestTensor t(optimizer, codec, storage, sizes, 31, 1, Gradients::kHostile),
          twin(optimizer, codec, storage, sizes, 31, 1, Gradients::kHostile);
      t.tensors().place.first_element = twin.tensors().place.first_element = (int64_t{1} << 40) + 64;
      Plan plan, twin_plan;
      ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &t.tensors(), 1, &plan).is_ok());
      ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &twin.tensors(), 1, &twin_plan).is_ok());
      for (int64_t step = 1; step <= 6; ++step) {
        t.set_step(step);
        twin.set_step(step);
        ASSERT_TRUE(plan.set_gradient(0, t.tensors().gradient).is_ok());
        ASSERT_TRUE(twin_plan.set_gradient(0, twin.tensors().gradient).is_ok());
        Hyperparameters hyper = busy_hyperparameters(step);
        hyper.maximize = step == 2;
        hyper.nesterov = step == 3;
        hyper.lr = step == 5 ? 1e-6 : step == 6 ? 1e-9 : hyper.lr;
        StepOptions options;
        options.gradient_scale = step == 4 ? 37.5f : 1.0f;
        const Before before(optimizer, t);
        StepTelemetry told{};
        ASSERT_TRUE(plan.inspect(&hyper, 1, options, {}, &told).is_ok());
        ASSERT_TRUE(t.bytes() == before.all) << "inspect changed a byte";
        ASSERT_TRUE(plan.step(&hyper, 1, options).is_ok());
        ASSERT_TRUE(twin_plan.step(&hyper, 1, options).is_ok());
        ASSERT_TRUE(t.bytes() == twin.bytes()) << "the step after inspect is another one";
        ASSERT_TRUE(t.guards_intact());
        expect_equal(told, brute_force(optimizer, before, t, hyper, options.gradient_scale));
        if (HasFailure()) return;
        add_to(told, sum);
      }
    }
  }
  // Every count had something to count.
  EXPECT_GT(sum.nonfinite_gradients, 0);
  EXPECT_GT(sum.lost_updates, 0);
  const bool quantized = codec != StateCodec::kFloat32 && optimizer.states > 0;
  EXPECT_EQ(sum.floored_codes > 0, quantized);
  EXPECT_EQ(sum.saturated_codes > 0, quantized && codec == StateCodec::kPaper);
  EXPECT_EQ(sum.largest_update_ratio > 0.0f, documented_bound(optimizer, busy_hyperparameters(2)) > 0.0);
}

std::vector<Choice> all_choices() {
  std::vector<Choice> all;
  for (const OptimizerChoice& o : kOptimizers) {
    for (StateCodec codec : kCodecs) all.push_back({o, codec});
  }
  return all;
}

std::string name_of(const testing::TestParamInfo<Choice>& info) {
  static const char* const kNames[] = {"float32", "paper", "default"};
  return std::string(info.param.optimizer.name) + "_" + kNames[static_cast<int>(info.param.codec)];
}

INSTANTIATE_TEST_SUITE_P(EveryRuleAndCodec, TelemetryCounts, testing::ValuesIn(all_choices()), name_of);

// ---- single findings ------------------------------------------------------------------------------------------------

StepTelemetry inspected(const OptimizerChoice& o, TestTensor& t, const Hyperparameters& hyper) {
  Plan plan;
  EXPECT_TRUE(Plan::make(o.kind, o.has_momentum, &t.tensors(), 1, &plan).is_ok());
  StepTelemetry out{};
  EXPECT_TRUE(plan.inspect(&hyper, 1, {}, {}, &out).is_ok());
  return out;
}

struct StallCase {
  const char* name;
  DType dtype;
  MasterWeights master;
  double lr;
  int64_t least, most;  ///< updates lost of 1,024
};

class LostUpdates : public testing::TestWithParam<StallCase> {};

/// A weight of 1.0 and updates of lr, as norm weights have: numerics.md's stall case. h / N is 3.1e-5 with 24
/// bit, 1.2e-7 with 32 bit; without correction the ULP is 2^-7.
TEST_P(LostUpdates, OfWeightsOfOne) {
  const StallCase& c = GetParam();
  const DType gradient = c.dtype;
  TestTensor t(kAdamW, StateCodec::kFloat32, {c.dtype, gradient, c.master}, {1024}, 1);
  fill(t, std::vector<float>(1024, 1.25f), std::vector<float>(1024, 1e-3f));
  Hyperparameters hyper;
  hyper.lr = c.lr;
  const StepTelemetry told = inspected(kAdamW, t, hyper);
  EXPECT_GE(told.lost_updates, c.least);
  EXPECT_LE(told.lost_updates, c.most);
  EXPECT_EQ(told.examined, 1024);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, LostUpdates,
    testing::Values(
        StallCase{"paper24bitBelowHalfAStep", DType::kBFloat16, MasterWeights::kCorrection8Nearest, 1e-5, 1024, 1024},
        StallCase{"paper24bitAboveHalfAStep", DType::kBFloat16, MasterWeights::kCorrection8Nearest, 2e-5, 0, 0},
        // 1e-5 / 3.08e-5 of the updates go through, each as a whole step.
        StallCase{"dithered24bit", DType::kBFloat16, MasterWeights::kCorrection8, 1e-5, 620, 764},
        StallCase{"paper32bit", DType::kBFloat16, MasterWeights::kCorrection16Nearest, 1e-5, 0, 0},
        StallCase{"bf16", DType::kBFloat16, MasterWeights::kNone, 1e-3, 1024, 1024},
        StallCase{"fp16", DType::kFloat16, MasterWeights::kNone, 1e-3, 0, 0},
        StallCase{"fp32", DType::kFloat32, MasterWeights::kNone, 1e-8, 1024, 1024},
        StallCase{"fp32Moves", DType::kFloat32, MasterWeights::kNone, 1e-6, 0, 0},
        StallCase{"noUpdateIsNotLost", DType::kBFloat16, MasterWeights::kNone, 0.0, 0, 0}),
    [](const auto& info) { return std::string(info.param.name); });

struct SpreadCase {
  const char* name;
  StateCodec codec;
  double decades;
  float least, most;                   ///< ratio
  double floored_least, floored_most;  ///< share of codes
};

class LargestUpdate : public testing::TestWithParam<SpreadCase> {};

/// Gradients of a group spread over decades, as in benchmarks/fidelity. Exact AdamW stays near 1 here. The default
/// codec rounds a momentum far below the group's largest to 0 now and then, without bias, and no variance ever.
TEST_P(LargestUpdate, OverTheBoundAfterTwoHundredSteps) {
  const SpreadCase& c = GetParam();
  constexpr size_t kCount = 2048;
  TestTensor t(kAdamW, c.codec, {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection16}, {kCount}, 1);
  Random random(5);
  std::vector<float> sigma(kCount), g(kCount), w(kCount, 0.0f);
  for (float& s : sigma) s = static_cast<float>(1e-2 * std::pow(10.0, -c.decades * random.uniform()));
  Plan plan;
  ASSERT_TRUE(Plan::make(kAdamW.kind, true, &t.tensors(), 1, &plan).is_ok());
  StepTelemetry told{};
  fill(t, w, g);
  for (int64_t step = 1; step <= 200; ++step) {
    for (size_t i = 0; i < kCount; ++i) g[i] = sigma[i] * static_cast<float>(0.1 + random.normal());
    ASSERT_TRUE(split_weights(DType::kBFloat16, MasterWeights::kNone, g.data(), const_cast<void*>(t.tensors().gradient),
                              nullptr, kCount)
                    .is_ok());
    Hyperparameters hyper;
    hyper.beta2 = 0.95;
    hyper.step = step;
    hyper.weight_decay = 0.1;
    ASSERT_TRUE(plan.inspect(&hyper, 1, {}, {}, &told).is_ok());
    ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
  }
  EXPECT_GE(told.largest_update_ratio, c.least);
  EXPECT_LE(told.largest_update_ratio, c.most);
  EXPECT_EQ(told.examined, 200 * static_cast<int64_t>(kCount)) << "counts add up";
  const double floored = static_cast<double>(told.floored_codes) / (2.0 * static_cast<double>(told.examined));
  EXPECT_GE(floored, c.floored_least);
  EXPECT_LE(floored, c.floored_most);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, LargestUpdate,
    testing::Values(SpreadCase{"default", StateCodec::kDefault, 0.0, 0.9f, 1.1f, 1e-6, 0.01},
                    SpreadCase{"defaultFourDecades", StateCodec::kDefault, 4.0, 0.9f, 1.1f, 1e-6, 0.01},
                    SpreadCase{"float32FourDecades", StateCodec::kFloat32, 4.0, 0.9f, 1.01f, 0.0, 0.0},
                    SpreadCase{"paper", StateCodec::kPaper, 0.0, 0.9f, 1.1f, 1e-6, 0.01},
                    SpreadCase{"paperFourDecades", StateCodec::kPaper, 4.0, 10.0f, 1e6f, 0.2, 0.8}),
    [](const auto& info) { return std::string(info.param.name); });

struct MagnitudeCase {
  const char* name;
  StateCodec codec;
  float gradient;
  int64_t floored, saturated;  ///< of 64 codes: exp_avg and exp_avg_sq of 32 elements
};

class Magnitude : public testing::TestWithParam<MagnitudeCase> {};

/// A first step on 32 equal gradients g: m is g / 8, sqrt(v) is g / 4.
TEST_P(Magnitude, OfEqualGradients) {
  const MagnitudeCase& c = GetParam();
  TestTensor t(kAdamW, c.codec, {DType::kFloat32, DType::kFloat32, MasterWeights::kNone}, {32}, 1);
  fill(t, std::vector<float>(32, 1.0f), std::vector<float>(32, c.gradient));
  Hyperparameters hyper;
  hyper.beta1 = 0.875;
  hyper.beta2 = 0.9375;
  const StepTelemetry told = inspected(kAdamW, t, hyper);
  EXPECT_EQ(told.floored_codes, c.floored);
  EXPECT_EQ(told.saturated_codes, c.saturated);
}

INSTANTIATE_TEST_SUITE_P(Cases, Magnitude,
                         testing::Values(MagnitudeCase{"paper", StateCodec::kPaper, 1.0f, 0, 0},
                                         // m scale: 1e-8 / 8 rounds to 0 in fp16, and so does 1e-8 / 4.
                                         MagnitudeCase{"paperTiny", StateCodec::kPaper, 1e-8f, 64, 0},
                                         MagnitudeCase{"paperRootAlone", StateCodec::kPaper, 4.0f * 70000.0f, 0, 32},
                                         MagnitudeCase{"paperBoth", StateCodec::kPaper, 8.0f * 70000.0f, 0, 64},
                                         MagnitudeCase{"paperAtTheEdge", StateCodec::kPaper, 4.0f * 65504.0f, 0, 0},
                                         MagnitudeCase{"defaultTiny", StateCodec::kDefault, 1e-8f, 0, 0},
                                         MagnitudeCase{"defaultHuge", StateCodec::kDefault, 1e18f, 0, 0},
                                         // Adam clamps it.
                                         MagnitudeCase{"infinite", StateCodec::kDefault, INFINITY, 0, 0},
                                         MagnitudeCase{"nan", StateCodec::kPaper, NAN, 64, 0},
                                         MagnitudeCase{"nanInFloat32", StateCodec::kFloat32, NAN, 0, 0}),
                         [](const auto& info) { return std::string(info.param.name); });

/// Stored bytes from elsewhere: a header that reaches 1.5 * 2^127, above what a step stores.
TEST(Telemetry, AVarianceAboveTheWindowsEndSaturates) {
  TestTensor t(kAdamW, StateCodec::kDefault, {DType::kFloat32, DType::kFloat32, MasterWeights::kNone}, {32}, 1);
  fill(t, std::vector<float>(32, 1.0f), std::vector<float>(32, 0.0f));
  const uint16_t header = 0xfe0 << 4 | (22 - 8);
  std::memcpy(t.tensors().scales[1], &header, 2);
  std::memset(t.tensors().states[1], 1, 32);  // 2^127
  std::memset(t.tensors().states[1], 2, 3);   // 1.5 * 2^127
  Hyperparameters hyper;
  hyper.beta2 = 0.99;
  const Before before(kAdamW, t);
  ASSERT_EQ(before.states[1][2], 1.5f * 0x1p127f);
  ASSERT_EQ(before.states[1][3], 0x1p127f);
  const StepTelemetry told = inspected(kAdamW, t, hyper);
  EXPECT_EQ(told.saturated_codes, 3);
  EXPECT_EQ(told.floored_codes, 0);
}

}  // namespace
}  // namespace flashoptim::test
