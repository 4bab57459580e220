// Dither depends on (seed, step, index in the whole tensor) only: repeated, resumed and differently threaded runs and
// shards give the same bytes; another seed gives others.
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "flashoptim/step.h"
#include "lab/cases.h"

namespace flashoptim::fidelity {
namespace {

constexpr int64_t kRows = 48, kColumns = 100;  // groups of 32, 32, 32 and 4
constexpr int64_t kNumel = kRows * kColumns;
constexpr int64_t kSteps = 60;

/// Everything that a checkpoint holds.
struct Stored {
  std::vector<uint16_t> parameter;
  std::vector<int8_t> correction;
  std::vector<uint8_t> states[kMaxSlots];
  std::vector<uint16_t> headers[kMaxSlots];
  bool operator==(const Stored&) const = default;
};

Stored first_state(const std::vector<float>& weights) {
  Stored s;
  s.parameter.resize(kNumel);
  s.correction.resize(kNumel);
  for (int k = 0; k < kMaxSlots; ++k) {
    s.states[k].assign(kNumel, 0);
    s.headers[k].assign(kRows * 4, 0);
  }
  EXPECT_TRUE(split_weights(DType::kBFloat16, MasterWeights::kCorrection8, weights.data(), s.parameter.data(),
                            s.correction.data(), kNumel)
                  .is_ok());
  return s;
}

/// Cuts the range into uneven pieces, each on its own thread, the last first.
void run_threads(void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t cuts[] = {count, count * 5 / 7, count * 2 / 5, count / 9, 0};
  std::vector<std::thread> threads;
  for (int k = 0; k < 4; ++k) {
    if (cuts[k + 1] < cuts[k]) threads.emplace_back([=] { body(context, cuts[k + 1], cuts[k]); });
  }
  for (std::thread& t : threads) t.join();
}
void run_inline(void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, count); }

class Determinism : public testing::TestWithParam<OptimizerKind> {
 protected:
  void SetUp() override {
    Case c;
    c.elements = kNumel;
    c.steps = kSteps;
    c.weight_deviation = 0.02;
    c.decades = 2.0;
    c.fill = [](const GradientRow& r, float* out) {
      for (int64_t i = 0; i < r.count; ++i) out[i] = r.signal(i);
    };
    case_ = c;
    data_ = make_data(c, 7);
  }

  /// Steps `from` to `to` on rows [first, last).
  void run(Stored& s, int64_t from, int64_t to, ParallelFor parallel_for, uint64_t seed, int64_t first = 0,
           int64_t last = kRows) {
    ParameterTensors tensor;
    const int64_t sizes[2] = {last - first, kColumns};
    const int64_t begin = first * kColumns;
    tensor.layout = group_layout(sizes, 2);
    tensor.place.first_element = begin;
    tensor.parameter = s.parameter.data() + begin;
    tensor.correction = s.correction.data() + begin;
    tensor.parameter_dtype = tensor.gradient_dtype = DType::kBFloat16;
    tensor.master_weights = MasterWeights::kCorrection8;
    tensor.state_codec = StateCodec::kDefault;
    for (int k = 0; k < state_count(GetParam(), true); ++k) {
      tensor.states[k] = s.states[k].data() + begin;
      tensor.scales[k] = s.headers[k].data() + first * 4;
    }
    Plan plan;
    const Status made = Plan::make(GetParam(), true, &tensor, 1, &plan);
    ASSERT_TRUE(made.is_ok()) << made.message();
    StepOptions options;
    options.parallel_for = parallel_for;
    Hyperparameters h = default_hyperparameters(GetParam());
    h.momentum = 0.9;
    h.seed = seed;
    for (h.step = from; h.step <= to; ++h.step) {
      ASSERT_TRUE(plan.set_gradient(0, data_.row(case_, h.step) + begin).is_ok());
      ASSERT_TRUE(plan.step(&h, 1, options).is_ok());
    }
  }
  Stored whole(uint64_t seed) {
    Stored s = first_state(data_.weights);
    run(s, 1, kSteps, run_inline, seed);
    return s;
  }

  Case case_;
  CaseData data_;
};

TEST_P(Determinism, RepeatedRunGivesTheSameBytes) { EXPECT_EQ(whole(1), whole(1)); }

TEST_P(Determinism, ResumedRunGivesTheSameBytes) {
  Stored s = first_state(data_.weights);
  run(s, 1, 23, run_inline, 1);
  Stored loaded = s;
  run(loaded, 24, kSteps, run_inline, 1);
  EXPECT_EQ(loaded, whole(1));
}

TEST_P(Determinism, ThreadsDoNotMatter) {
  Stored s = first_state(data_.weights);
  run(s, 1, kSteps, run_threads, 1);
  EXPECT_EQ(s, whole(1));
}

TEST_P(Determinism, ShardsDoNotMatter) {
  Stored s = first_state(data_.weights);
  run(s, 1, kSteps, run_inline, 1, 0, 7);
  run(s, 1, kSteps, run_inline, 1, 7, 31);
  run(s, 1, kSteps, run_inline, 1, 31, kRows);
  EXPECT_EQ(s, whole(1));
}

TEST_P(Determinism, SeedMatters) {
  EXPECT_FALSE(whole(1) == whole(2));
  EXPECT_FALSE(whole(1) == whole(1ull << 40 | 1ull));
}

std::vector<OptimizerKind> all_optimizers() {
  std::vector<OptimizerKind> all;
  for (int64_t i = 0; i < optimizer_count(); ++i) all.push_back(optimizer_at(i));
  return all;
}

INSTANTIATE_TEST_SUITE_P(Optimizers, Determinism, testing::ValuesIn(all_optimizers()),
                         [](const testing::TestParamInfo<OptimizerKind>& info) {
                           return std::string(optimizer_name(info.param));
                         });

}  // namespace
}  // namespace flashoptim::fidelity
