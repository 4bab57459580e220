// The plan's contract: errors name what is wrong and change nothing; skipped steps change no byte; a bad gradient
// spoils no more than its element, or its group.
#include <gtest/gtest.h>

#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

const OptimizerChoice& kAdamW = kOptimizers[0];
const Storage kNarrow{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8};

TEST(Plan, FoundInfChangesNoByte) {
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      for (const Storage& storage : all_storages()) {
        TestTensor t(optimizer, codec, storage, {7, 33}, 1, 0, Gradients::kHostile);
        Plan plan;
        ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &t.tensors(), 1, &plan).is_ok());
        const float found_inf = 1.0f;
        int64_t nonfinite = 0;
        StepOptions options;
        options.found_inf = &found_inf;
        options.nonfinite_gradients = &nonfinite;
        const std::vector<unsigned char> before = t.bytes();
        const Hyperparameters hyper = busy_hyperparameters(1);
        ASSERT_TRUE(plan.step(&hyper, 1, options).is_ok());
        ASSERT_TRUE(t.bytes() == before) << describe(optimizer, codec, storage);
        EXPECT_EQ(nonfinite, 0);
        // And 0 is no reason to skip.
        const float fine = 0.0f;
        options.found_inf = &fine;
        ASSERT_TRUE(plan.step(&hyper, 1, options).is_ok());
        EXPECT_FALSE(t.bytes() == before) << describe(optimizer, codec, storage);
      }
    }
  }
}

TEST(Plan, NonFiniteGradientsAreCountedAcrossTensorsAndAddedToTheCounter) {
  for (DType gradient_dtype : {DType::kBFloat16, DType::kFloat32}) {
    const Storage storage{DType::kBFloat16, gradient_dtype, MasterWeights::kCorrection8};
    std::vector<std::unique_ptr<TestTensor>> tensors;
    int64_t expected = 0;
    for (int64_t n : {1, 33, 1000, 5000}) {
      tensors.push_back(std::make_unique<TestTensor>(kAdamW, StateCodec::kDefault, storage, std::vector<int64_t>{n},
                                                     static_cast<uint64_t>(n), 0, Gradients::kHostile));
      tensors.back()->set_step(1);
      for (int64_t i = 0; i < n; ++i) expected += !std::isfinite(tensors.back()->gradient_at(i));
    }
    ASSERT_GT(expected, 50);
    int64_t counted = 1000;
    StepOptions options;
    options.nonfinite_gradients = &counted;
    ASSERT_TRUE(run_steps(kAdamW, tensors, 1, 1, options).is_ok());
    EXPECT_EQ(counted, 1000 + expected);
  }
}

TEST(Plan, AGradientThatTheScaleMakesInfiniteCounts) {
  TestTensor t(kAdamW, StateCodec::kFloat32, {DType::kFloat32, DType::kFloat32, MasterWeights::kNone}, {3}, 1);
  const float gradient[] = {1.0f, 1e30f, -1e-30f};
  t.tensors().gradient = gradient;
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).is_ok());
  int64_t counted = 0;
  StepOptions options;
  options.gradient_scale = 1e10f;
  options.nonfinite_gradients = &counted;
  const Hyperparameters hyper = busy_hyperparameters(1);
  ASSERT_TRUE(plan.step(&hyper, 1, options).is_ok());
  EXPECT_EQ(counted, 1);
}

void set_gradient_element(TestTensor& t, int64_t i, float value) {
  unsigned char* at = const_cast<unsigned char*>(static_cast<const unsigned char*>(t.tensors().gradient));
  if (t.tensors().gradient_dtype == DType::kFloat32) {
    std::memcpy(at + 4 * i, &value, 4);
  } else {
    const uint16_t bits = static_cast<uint16_t>(to_narrow(t.tensors().gradient_dtype, value));
    std::memcpy(at + 2 * i, &bits, 2);
  }
}

/// Two tensors, one with NaN or infinity in one gradient of step 2: fp32 states and the weights of all other elements
/// agree bit for bit; of quantized states the other groups do, and the group's own others stay finite.
TEST(Plan, ABadGradientSpoilsItsOwnWeightAndAtMostItsGroupsStates) {
  constexpr int64_t kRow = 77, kRows = 5, kHit = 2 * kRow + 40;  // in the second group of row 2
  for (float bad : {NAN, INFINITY, -INFINITY}) {
    for (const OptimizerChoice& optimizer : kOptimizers) {
      for (StateCodec codec : kCodecs) {
        for (const Storage& storage : all_storages()) {
          SCOPED_TRACE(describe(optimizer, codec, storage));
          TestTensor clean(optimizer, codec, storage, {kRows, kRow}, 9),
              spoilt(optimizer, codec, storage, {kRows, kRow}, 9);
          for (TestTensor* t : {&clean, &spoilt}) {
            Plan plan;
            ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &t->tensors(), 1, &plan).is_ok());
            for (int64_t step = 1; step <= 3; ++step) {
              t->set_step(step);
              const float good = t->gradient_at(kHit);
              if (t == &spoilt && step == 2) set_gradient_element(*t, kHit, bad);
              ASSERT_TRUE(plan.set_gradient(0, t->tensors().gradient).is_ok());
              const Hyperparameters hyper = busy_hyperparameters(step);
              ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
              set_gradient_element(*t, kHit, good);
            }
          }
          SlotValues clean_values(kRows * kRow), spoilt_values(kRows * kRow);
          if (optimizer.states > 0) {
            ASSERT_TRUE(
                decode_states(optimizer.kind, optimizer.has_momentum, clean.tensors(), clean_values.pointers).is_ok());
            ASSERT_TRUE(decode_states(optimizer.kind, optimizer.has_momentum, spoilt.tensors(), spoilt_values.pointers)
                            .is_ok());
          }
          for (int64_t i = 0; i < kRows * kRow; ++i) {
            if (i == kHit) continue;
            const bool same_group =
                codec != StateCodec::kFloat32 && i / kRow == kHit / kRow && i % kRow / 32 == kHit % kRow / 32;
            if (same_group) {
              ASSERT_TRUE(std::isfinite(spoilt.weight_at(i))) << i;
              for (const float* state : spoilt_values.pointers) ASSERT_TRUE(std::isfinite(state[i])) << i;
            } else {
              ASSERT_EQ(spoilt.weight_at(i), clean.weight_at(i)) << i;
              for (int k = 0; k < kMaxSlots; ++k) {
                ASSERT_EQ(spoilt_values.pointers[k][i], clean_values.pointers[k][i]) << i;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Plan, FiniteGradientsOfAnySizeMakeNoNanAndNoInfiniteState) {
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      for (double size = -45.0; size <= 38.0; size += 1.0) {
        SCOPED_TRACE(describe(optimizer, codec, kNarrow) + " gradients of 1e" + std::to_string(size));
        TestTensor t(optimizer, codec, {DType::kFloat32, DType::kFloat32, MasterWeights::kNone}, {64}, 2);
        std::vector<float> gradient(64);
        Random random(static_cast<uint64_t>(size + 100));
        for (float& g : gradient)
          g = static_cast<float>((random.below(2) == 0 ? 1.0 : -1.0) * std::pow(10.0, size - 3.0 * random.uniform()));
        t.tensors().gradient = gradient.data();
        Plan plan;
        ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &t.tensors(), 1, &plan).is_ok());
        for (int64_t step = 1; step <= 20; ++step) {
          Hyperparameters hyper = busy_hyperparameters(step);
          hyper.eps = step % 2 == 0 ? 0.0 : 1e-8;
          hyper.lr = 1e-4;
          hyper.momentum = 0.5;  // SGD's buffer itself must stay in range at 1e38
          hyper.weight_decay = 0.01;
          ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
        }
        SlotValues values(64);
        if (optimizer.states > 0) {
          ASSERT_TRUE(decode_states(optimizer.kind, optimizer.has_momentum, t.tensors(), values.pointers).is_ok());
        }
        for (size_t i = 0; i < 64; ++i) {
          ASSERT_TRUE(std::isfinite(t.weight_at(static_cast<int64_t>(i)))) << gradient[i];
          for (int k = 0; k < optimizer.states; ++k) {
            ASSERT_TRUE(std::isfinite(values.slots[k][i])) << gradient[i];
            // Beside a positive v the paper's codec may read 0; the default one never.
            if (!state_slot(optimizer.kind, k).is_signed && codec == StateCodec::kDefault &&
                std::fabs(gradient[i]) > 1e-18f) {
              ASSERT_GT(values.slots[k][i], 0.0f) << gradient[i];
            }
          }
        }
      }
    }
  }
}

// ---- errors ---------------------------------------------------------------------------------------------------------

struct BadHyper {
  const char* field;
  const char* value;
  void (*spoil)(Hyperparameters&);
};

TEST(Plan, HyperparametersOutOfRangeAreErrorsThatNameTheFieldAndItsValueAndChangeNothing) {
  const BadHyper cases[] = {
      {"step", "0", [](Hyperparameters& h) { h.step = 0; }},
      {"step", "-3", [](Hyperparameters& h) { h.step = -3; }},
      {"lr", "nan", [](Hyperparameters& h) { h.lr = NAN; }},
      {"lr", "inf", [](Hyperparameters& h) { h.lr = INFINITY; }},
      {"lr", "-0.5", [](Hyperparameters& h) { h.lr = -0.5; }},
      {"beta1", "1", [](Hyperparameters& h) { h.beta1 = 1.0; }},
      {"beta1", "-0.1", [](Hyperparameters& h) { h.beta1 = -0.1; }},
      {"beta2", "1.5", [](Hyperparameters& h) { h.beta2 = 1.5; }},
      {"beta2", "nan", [](Hyperparameters& h) { h.beta2 = NAN; }},
      {"eps", "-1e-08", [](Hyperparameters& h) { h.eps = -1e-8; }},
      {"weight_decay", "nan", [](Hyperparameters& h) { h.weight_decay = NAN; }},
      {"weight_decay", "-0.1", [](Hyperparameters& h) { h.weight_decay = -0.1; }},
  };
  for (const BadHyper& bad : cases) {
    TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
    Plan plan;
    ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).is_ok());
    const std::vector<unsigned char> before = t.bytes();
    Hyperparameters hyper = busy_hyperparameters(1);
    bad.spoil(hyper);
    const Status status = plan.step(&hyper, 1);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << bad.field << " = " << bad.value;
    EXPECT_NE(status.message().find(bad.field), std::string::npos) << status.message();
    EXPECT_NE(status.message().find(bad.value), std::string::npos) << status.message();
    EXPECT_TRUE(t.bytes() == before) << bad.field << " = " << bad.value;
    // And the plan still works.
    hyper = busy_hyperparameters(1);
    EXPECT_TRUE(plan.step(&hyper, 1).is_ok());
  }
}

TEST(Plan, TooFewHyperparametersAreAnError) {
  TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
  t.tensors().hyper_index = 2;
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).is_ok());
  const std::vector<unsigned char> before = t.bytes();
  const Hyperparameters hypers[] = {busy_hyperparameters(1), busy_hyperparameters(1), busy_hyperparameters(1)};
  const Status status = plan.step(hypers, 2);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("2"), std::string::npos) << status.message();
  EXPECT_TRUE(t.bytes() == before);
  EXPECT_TRUE(plan.step(hypers, 3).is_ok());
}

struct BadTensor {
  StatusCode code;
  const char* field;
  const char* value;
  void (*spoil)(ParameterTensors&);
};

TEST(Plan, TensorsThatDoNotFitAreErrorsThatNameTheFieldAndLeaveThePlanAsItWas) {
  const BadTensor cases[] = {
      {StatusCode::kInvalidArgument, "parameter", "null", [](ParameterTensors& t) { t.parameter = nullptr; }},
      {StatusCode::kInvalidArgument, "correction", "null", [](ParameterTensors& t) { t.correction = nullptr; }},
      {StatusCode::kInvalidArgument, "states[1]", "null", [](ParameterTensors& t) { t.states[1] = nullptr; }},
      {StatusCode::kInvalidArgument, "scales[0]", "null", [](ParameterTensors& t) { t.scales[0] = nullptr; }},
      {StatusCode::kInvalidArgument, "layout", "-1", [](ParameterTensors& t) { t.layout.rows = -1; }},
      {StatusCode::kInvalidArgument, "layout", "2^57",
       [](ParameterTensors& t) { t.layout = {int64_t{1} << 40, int64_t{1} << 40}; }},
      {StatusCode::kInvalidArgument, "first_element", "-5", [](ParameterTensors& t) { t.place.first_element = -5; }},
      {StatusCode::kInvalidArgument, "hyper_index", "-1", [](ParameterTensors& t) { t.hyper_index = -1; }},
      {StatusCode::kInvalidArgument, "dtype", "",
       [](ParameterTensors& t) { t.parameter_dtype = static_cast<DType>(9); }},
      {StatusCode::kInvalidArgument, "master_weights", "17",
       [](ParameterTensors& t) { t.master_weights = static_cast<MasterWeights>(17); }},
      {StatusCode::kInvalidArgument, "state_codec", "-2",
       [](ParameterTensors& t) { t.state_codec = static_cast<StateCodec>(-2); }},
      {StatusCode::kUnsupported, "master_weights", "",
       [](ParameterTensors& t) { t.parameter_dtype = t.gradient_dtype = DType::kFloat32; }},
      {StatusCode::kUnsupported, "gradient_dtype", "float16",
       [](ParameterTensors& t) { t.gradient_dtype = DType::kFloat16; }},
  };
  for (const BadTensor& bad : cases) {
    TestTensor good(kAdamW, StateCodec::kDefault, kNarrow, {7, 33}, 1),
        other(kAdamW, StateCodec::kDefault, kNarrow, {100}, 2);
    Plan plan;
    ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &other.tensors(), 1, &plan).is_ok());
    ParameterTensors list[] = {good.tensors(), good.tensors()};
    bad.spoil(list[1]);
    const Status status = Plan::make(OptimizerKind::kAdamW, true, list, 2, &plan);
    EXPECT_EQ(status.code(), bad.code) << bad.field << ": " << status.message();
    EXPECT_NE(status.message().find("tensors[1]"), std::string::npos) << status.message();
    EXPECT_NE(status.message().find(bad.field), std::string::npos) << status.message();
    EXPECT_NE(status.message().find(bad.value), std::string::npos) << status.message();
    ASSERT_EQ(plan.size(), 1) << "the plan must stay the old one";
    EXPECT_EQ(plan.tensor(0).layout.numel(), 100);
  }
}

TEST(Plan, AnUnknownOptimizerAnEmptyPlanAndABadIndexAreErrors) {
  Plan plan;
  const Hyperparameters hyper = busy_hyperparameters(1);
  EXPECT_EQ(plan.step(&hyper, 1).code(), StatusCode::kInvalidArgument);
  TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
  EXPECT_EQ(Plan::make(static_cast<OptimizerKind>(5), true, &t.tensors(), 1, &plan).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(Plan::make(OptimizerKind::kAdamW, true, nullptr, 1, &plan).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), -1, &plan).code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).is_ok());
  EXPECT_EQ(plan.set_gradient(1, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(plan.set_gradient(-1, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(plan.set_hyper_index(0, 7).code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, nullptr, 0, &plan).is_ok()) << "no tensors are a plan";
  EXPECT_TRUE(plan.step(&hyper, 1).is_ok());
}

TEST(Plan, ANullGradientSkipsItsTensorAlone) {
  TestTensor a(kAdamW, StateCodec::kDefault, kNarrow, {1000}, 1), b(kAdamW, StateCodec::kDefault, kNarrow, {7, 33}, 2);
  const std::vector<unsigned char> before_a = a.bytes(), before_b = b.bytes();
  const ParameterTensors list[] = {a.tensors(), b.tensors()};
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, list, 2, &plan).is_ok());
  ASSERT_TRUE(plan.set_gradient(0, nullptr).is_ok());
  const Hyperparameters hyper = busy_hyperparameters(1);
  ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
  EXPECT_TRUE(a.bytes() == before_a);
  EXPECT_FALSE(b.bytes() == before_b);
}

TEST(Plan, EachTensorFollowsItsOwnHyperparameters) {
  TestTensor a(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1), b(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1),
      c(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
  ParameterTensors list[] = {a.tensors(), b.tensors()};
  list[1].hyper_index = 1;
  Plan plan, alone;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, list, 2, &plan).is_ok());
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &c.tensors(), 1, &alone).is_ok());
  Hyperparameters hypers[] = {busy_hyperparameters(1), busy_hyperparameters(7)};
  hypers[1].lr = 0.5;
  hypers[1].seed = 3;
  ASSERT_TRUE(plan.step(hypers, 2).is_ok());
  ASSERT_TRUE(alone.step(&hypers[1], 1).is_ok());
  EXPECT_TRUE(b.bytes() == c.bytes());
  EXPECT_FALSE(a.bytes() == b.bytes());
}

TEST(Plan, GradientScaleIsAProductBeforeTheRuleAndMaximizeItsSign) {
  const Storage storage{DType::kFloat32, DType::kFloat32, MasterWeights::kNone};
  for (const OptimizerChoice& optimizer : kOptimizers) {
    TestTensor scaled(optimizer, StateCodec::kFloat32, storage, {100}, 1),
        plain(optimizer, StateCodec::kFloat32, storage, {100}, 1);
    std::vector<float> gradient(100);
    for (int64_t i = 0; i < 100; ++i)
      gradient[static_cast<size_t>(i)] = -0.25f * scaled.gradient_at(i);  // a power of two: exact
    plain.tensors().gradient = gradient.data();
    Plan scaled_plan, plain_plan;
    ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &scaled.tensors(), 1, &scaled_plan).is_ok());
    ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &plain.tensors(), 1, &plain_plan).is_ok());
    Hyperparameters hyper = busy_hyperparameters(1);
    ASSERT_TRUE(plain_plan.step(&hyper, 1).is_ok());
    hyper.maximize = true;
    StepOptions options;
    options.gradient_scale = 0.25f;
    ASSERT_TRUE(scaled_plan.step(&hyper, 1, options).is_ok());
    EXPECT_TRUE(scaled.bytes() == plain.bytes()) << optimizer.name;
  }
}

TEST(Plan, StatesRoundTripThroughDecodeAndEncodeForEveryCodec) {
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      SCOPED_TRACE(describe(optimizer, codec, kNarrow));
      std::vector<std::unique_ptr<TestTensor>> t;
      t.push_back(std::make_unique<TestTensor>(optimizer, codec, kNarrow, std::vector<int64_t>{7, 33}, 1));
      ASSERT_TRUE(run_steps(optimizer, t, 1, 5).is_ok());
      SlotValues values(231), again(231);
      const ParameterTensors& tensors = t[0]->tensors();
      EXPECT_TRUE(decode_states(optimizer.kind, optimizer.has_momentum, tensors, values.pointers).is_ok());
      EXPECT_TRUE(encode_states(optimizer.kind, optimizer.has_momentum, tensors, values.pointers).is_ok());
      EXPECT_TRUE(decode_states(optimizer.kind, optimizer.has_momentum, tensors, again.pointers).is_ok());
      EXPECT_TRUE(t[0]->guards_intact());
      for (int k = 0; k < optimizer.states; ++k) {
        const bool is_on_grid = !state_slot(optimizer.kind, k).is_signed && codec == StateCodec::kDefault;
        if (is_on_grid || codec == StateCodec::kFloat32) {
          EXPECT_EQ(again.slots[k], values.slots[k]) << "slot " << k;
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashoptim::test
