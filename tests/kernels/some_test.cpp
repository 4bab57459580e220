// Steps over some of a plan's tensors, tensors that move, checks without a step: the same bits as a plan of their own.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <thread>

#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

const OptimizerChoice& kAdamW = kOptimizers[0];
const Storage kNarrow{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8};

using Tensors = std::vector<std::unique_ptr<TestTensor>>;

/// Sizes of every kind, with and without blocks that are copied, two hyperparameter sets.
Tensors some_tensors(const OptimizerChoice& optimizer, StateCodec codec) {
  Tensors all;
  const std::vector<int64_t> shapes[] = {{5000}, {7, 33}, {1}, {0}, {3, 1024}, {64, 40}, {70000}, {31}};
  uint64_t seed = 1;
  for (const auto& shape : shapes) {
    all.push_back(std::make_unique<TestTensor>(optimizer, codec, kNarrow, shape, seed, static_cast<int64_t>(seed % 3)));
    all.back()->tensors().hyper_index = static_cast<int32_t>(seed % 2);
    ++seed;
  }
  return all;
}

Plan plan_of(const OptimizerChoice& optimizer, const Tensors& tensors) {
  std::vector<ParameterTensors> list;
  for (const auto& t : tensors) list.push_back(t->tensors());
  Plan plan;
  EXPECT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, list.data(), static_cast<int64_t>(list.size()), &plan)
                  .is_ok());
  return plan;
}

std::vector<unsigned char> bytes_of(const Tensors& tensors) {
  std::vector<unsigned char> out;
  for (const auto& t : tensors) {
    EXPECT_TRUE(t->guards_intact());
    t->append_to(out);
  }
  return out;
}

std::vector<Hyperparameters> two_sets(int64_t step) {
  std::vector<Hyperparameters> hypers(2, busy_hyperparameters(step));
  hypers[1].lr *= 0.5;
  hypers[1].weight_decay = 0.0;
  return hypers;
}

/// As PyTorch's pool would: ranges on several threads at a time.
void on_three_threads(void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; ++t) {
    threads.emplace_back([=] { body(context, count * t / 3, count * (t + 1) / 3); });
  }
  for (std::thread& t : threads) t.join();
}

TEST(StepSome, InAnyPartsAndOrderIsTheStep) {
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      SCOPED_TRACE(describe(optimizer, codec, kNarrow));
      Tensors whole = some_tensors(optimizer, codec), parts = some_tensors(optimizer, codec);
      Plan whole_plan = plan_of(optimizer, whole), parts_plan = plan_of(optimizer, parts);
      Random random(7);
      for (int64_t step = 1; step <= 4; ++step) {
        const auto hypers = two_sets(step);
        StepOptions options;
        if (step % 2 == 0) options.parallel_for = on_three_threads;
        for (Tensors* tensors : {&whole, &parts}) {
          Plan& plan = tensors == &whole ? whole_plan : parts_plan;
          for (size_t i = 0; i < tensors->size(); ++i) {
            (*tensors)[i]->set_step(step);
            ASSERT_TRUE(plan.set_gradient(static_cast<int64_t>(i), (*tensors)[i]->tensors().gradient).is_ok());
          }
        }
        ASSERT_TRUE(whole_plan.step(hypers.data(), 2, options).is_ok());
        std::vector<int64_t> order(parts.size());
        std::iota(order.begin(), order.end(), 0);
        for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[random.below(static_cast<uint32_t>(i + 1))]);
        for (size_t at = 0; at < order.size();) {
          const auto count = std::min<size_t>(1 + random.below(3), order.size() - at);
          ASSERT_TRUE(
              parts_plan.step_some(order.data() + at, static_cast<int64_t>(count), hypers.data(), 2, options).is_ok());
          at += count;
        }
        ASSERT_TRUE(bytes_of(whole) == bytes_of(parts)) << "step " << step;
      }
    }
  }
}

TEST(StepSome, LeavesTheOthersAloneAndSkipsWhereThereIsNoGradient) {
  Tensors tensors = some_tensors(kAdamW, StateCodec::kDefault);
  Plan plan = plan_of(kAdamW, tensors);
  ASSERT_TRUE(plan.set_gradient(4, nullptr).is_ok());
  std::vector<std::vector<unsigned char>> before;
  for (const auto& t : tensors) before.push_back(t->bytes());
  const auto hypers = two_sets(1);
  const int64_t indices[] = {6, 4, 1};
  ASSERT_TRUE(plan.step_some(indices, 3, hypers.data(), 2).is_ok());
  for (size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(tensors[i]->bytes() == before[i], i != 6 && i != 1) << i;
  }
}

TEST(StepSome, ReadsTheHyperparametersOfItsTensorsAlone) {
  Tensors tensors = some_tensors(kAdamW, StateCodec::kDefault), other = some_tensors(kAdamW, StateCodec::kDefault);
  Plan plan = plan_of(kAdamW, tensors), other_plan = plan_of(kAdamW, other);
  auto hypers = two_sets(1);
  ASSERT_TRUE(other_plan.step(hypers.data(), 2).is_ok());
  hypers[0].lr = NAN;  // tensor 0's set is 1
  const int64_t first = 0, second = 1;
  ASSERT_TRUE(plan.step_some(&first, 1, hypers.data(), 2).is_ok());
  EXPECT_TRUE(tensors[0]->bytes() == other[0]->bytes());
  const std::vector<unsigned char> before = tensors[1]->bytes();
  const Status status = plan.step_some(&second, 1, hypers.data(), 2);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("hypers[0].lr = nan"), std::string::npos) << status.message();
  EXPECT_TRUE(tensors[1]->bytes() == before);
}

TEST(StepSome, BadArgumentsAreErrorsThatChangeNothing) {
  Tensors tensors = some_tensors(kAdamW, StateCodec::kDefault);
  Plan plan = plan_of(kAdamW, tensors);
  const auto hypers = two_sets(1);
  const std::vector<unsigned char> before = bytes_of(tensors);
  const auto refuses = [&](const std::vector<int64_t>& indices, int64_t count, int64_t hyper_count, const char* what) {
    const Status status = plan.step_some(indices.data(), count, hypers.data(), hyper_count);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << what;
    EXPECT_NE(status.message().find(what), std::string::npos) << status.message();
    EXPECT_TRUE(bytes_of(tensors) == before) << what;
  };
  refuses({0, 8}, 2, 2, "indices[1] = 8");
  refuses({-1}, 1, 2, "indices[0] = -1");
  refuses({2, 3, 2}, 3, 2, "indices[2] = 2");
  refuses({0}, -1, 2, "count = -1");
  refuses({0}, 9, 2, "count = 9");
  refuses({0}, 1, 1, "hypers has 1 entries");
  refuses({0}, 1, -4, "count = -4");
  EXPECT_EQ(plan.step_some(nullptr, 1, hypers.data(), 2).code(), StatusCode::kInvalidArgument);
  const int64_t index = 0;
  EXPECT_EQ(plan.step_some(&index, 1, nullptr, 2).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(plan.step_some(nullptr, 0, nullptr, 0).is_ok());
  Plan empty;
  EXPECT_EQ(empty.step_some(&index, 1, hypers.data(), 2).code(), StatusCode::kInvalidArgument);
  // The plan works as before: a name from a refused call is not taken.
  EXPECT_TRUE(plan.step_some(&index, 1, hypers.data(), 2).is_ok());
}

TEST(SetTensor, StepsWhereTheArraysAreNow) {
  for (StateCodec codec : kCodecs) {
    Tensors there = some_tensors(kAdamW, codec), expected = some_tensors(kAdamW, codec),
            here = some_tensors(kAdamW, codec);
    Plan plan = plan_of(kAdamW, there), expected_plan = plan_of(kAdamW, expected);
    const std::vector<unsigned char> before = bytes_of(there);
    for (size_t i = 0; i < here.size(); ++i) {
      ASSERT_TRUE(plan.set_tensor(static_cast<int64_t>(i), here[i]->tensors()).is_ok());
    }
    const auto hypers = two_sets(1);
    ASSERT_TRUE(plan.step(hypers.data(), 2).is_ok());
    ASSERT_TRUE(expected_plan.step(hypers.data(), 2).is_ok());
    EXPECT_TRUE(bytes_of(here) == bytes_of(expected));
    EXPECT_TRUE(bytes_of(there) == before);
  }
}

TEST(SetTensor, RefusesWhatNeedsANewPlanAndKeepsTheOldTensor) {
  Tensors tensors = some_tensors(kAdamW, StateCodec::kDefault);
  Plan plan = plan_of(kAdamW, tensors);
  const struct {
    const char* what;
    void (*spoil)(ParameterTensors&);
  } cases[] = {
      {"tensor.layout.row_size = 4999", [](ParameterTensors& t) { t.layout.row_size = 4999; }},
      {"tensor.place.first_element = 1", [](ParameterTensors& t) { t.place.first_element = 1; }},
      {"tensor.place.run = 32", [](ParameterTensors& t) { t.place.run = 32; }},
      {"tensor.place.stride = 64", [](ParameterTensors& t) { t.place.stride = 64; }},
      {"tensor.place.whole.rows = 1", [](ParameterTensors& t) { t.place.whole = {1, 5000}; }},
      {"tensor.place.whole.row_size = 5000", [](ParameterTensors& t) { t.place.whole = {0, 5000}; }},
      {"tensor.parameter_dtype", [](ParameterTensors& t) { t.parameter_dtype = DType::kFloat16; }},
      {"tensor.gradient_dtype", [](ParameterTensors& t) { t.gradient_dtype = DType::kFloat32; }},
      {"tensor.master_weights", [](ParameterTensors& t) { t.master_weights = MasterWeights::kNone; }},
      {"tensor.state_codec", [](ParameterTensors& t) { t.state_codec = StateCodec::kPaper; }},
      {"tensor.parameter is null", [](ParameterTensors& t) { t.parameter = nullptr; }},
      {"tensor.scales[1] is null", [](ParameterTensors& t) { t.scales[1] = nullptr; }},
      {"hyper_index = 8", [](ParameterTensors& t) { t.hyper_index = 8; }},
      {"hyper_index = -1", [](ParameterTensors& t) { t.hyper_index = -1; }},
  };
  for (const auto& bad : cases) {
    ParameterTensors t = tensors[0]->tensors();
    t.gradient = nullptr;
    bad.spoil(t);
    const Status status = plan.set_tensor(0, t);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << bad.what;
    EXPECT_NE(status.message().find(bad.what), std::string::npos) << status.message();
    EXPECT_EQ(plan.tensor(0).gradient, tensors[0]->tensors().gradient) << bad.what;
    EXPECT_EQ(plan.tensor(0).hyper_index, 1) << bad.what;
  }
  EXPECT_EQ(plan.set_tensor(8, tensors[0]->tensors()).code(), StatusCode::kInvalidArgument);
}

TEST(CheckStep, SaysWhatStepWouldAndChangesNothing) {
  Tensors tensors = some_tensors(kAdamW, StateCodec::kDefault);
  const Plan plan = plan_of(kAdamW, tensors);
  const std::vector<unsigned char> before = bytes_of(tensors);
  auto hypers = two_sets(1);
  EXPECT_TRUE(plan.check_step(hypers.data(), 2).is_ok());
  EXPECT_EQ(plan.check_step(hypers.data(), 1).code(), StatusCode::kInvalidArgument);
  hypers[1].beta1 = 1.0;
  EXPECT_NE(plan.check_step(hypers.data(), 2).message().find("hypers[1].beta1 = 1"), std::string::npos);
  hypers[1].beta1 = 0.5;
  StepOptions options;
  options.gradient_scale = INFINITY;
  EXPECT_NE(plan.check_step(hypers.data(), 2, options).message().find("gradient_scale"), std::string::npos);
  EXPECT_EQ(Plan().check_step(hypers.data(), 2).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(bytes_of(tensors) == before);
}

/// What a call costs, counted instead of timed: hyperparameter sets and tensors that it does not name are not looked
/// at.
TEST(StepSome, DoesNotLookAtOtherTensorsHyperparameters) {
  constexpr int64_t kTensors = 20000;
  const Storage wide{DType::kFloat32, DType::kFloat32, MasterWeights::kNone};
  std::vector<float> memory(4 * 8);
  ParameterTensors t;
  t.parameter = memory.data();
  t.gradient = memory.data() + 8;
  t.states[0] = memory.data() + 16;
  t.states[1] = memory.data() + 24;
  t.layout = {1, 8};
  t.parameter_dtype = t.gradient_dtype = wide.dtype;
  std::vector<ParameterTensors> list(kTensors, t);
  for (int64_t i = 0; i < kTensors; ++i) list[static_cast<size_t>(i)].hyper_index = static_cast<int32_t>(i);
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, list.data(), kTensors, &plan).is_ok());
  // Only the last set is a valid one.
  std::vector<Hyperparameters> hypers(kTensors);
  for (Hyperparameters& h : hypers) h.step = -1;
  const int64_t last = kTensors - 1;
  EXPECT_FALSE(plan.step(hypers.data(), kTensors).is_ok());
  hypers.back().step = 1;
  EXPECT_TRUE(plan.step_some(&last, 1, hypers.data(), kTensors).is_ok());
}

}  // namespace
}  // namespace flashoptim::test
