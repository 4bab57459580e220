// Plan::inspect as a call: which groups it looks at, tensors and threads, what it adds to, errors.
#include <limits>

#include "tests/kernels/telemetry_support.h"

namespace flashoptim::test {
namespace {

const OptimizerChoice& kAdamW = kOptimizers[0];
const Storage kNarrow{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8};

// ---- which elements -------------------------------------------------------------------------------------------------

/// One NaN in one group at a time: `stride` steps in a row see it once, whatever the seed.
TEST(Telemetry, StrideLooksAtEveryGroupOnceInAsManySteps) {
  constexpr int64_t kRows = 5, kRow = 80, kGroups = kRows * 3;
  for (int64_t stride : {1, 2, 7, 15, 16, 40}) {
    for (int64_t hit = 0; hit < kGroups; ++hit) {
      TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {kRows, kRow}, 1);
      std::vector<float> gradient(kRows * kRow, 1e-3f);
      gradient[static_cast<size_t>(hit / 3 * kRow + hit % 3 * 32)] = NAN;
      fill(t, std::vector<float>(kRows * kRow, 1.0f), gradient);
      Plan plan;
      ASSERT_TRUE(Plan::make(kAdamW.kind, true, &t.tensors(), 1, &plan).is_ok());
      StepTelemetry sum{};
      for (int64_t step = 1000; step < 1000 + stride; ++step) {
        Hyperparameters hyper = busy_hyperparameters(step);
        hyper.seed = static_cast<uint64_t>(hit);
        StepTelemetry told{};
        ASSERT_TRUE(plan.inspect(&hyper, 1, {}, {stride}, &told).is_ok());
        EXPECT_LE(told.examined, (kGroups + stride - 1) / stride * 32);
        add_to(told, sum);
      }
      ASSERT_EQ(sum.nonfinite_gradients, 1) << "group " << hit << ", stride " << stride;
      ASSERT_EQ(sum.examined, kRows * kRow) << "stride " << stride;
    }
  }
}

/// Tensors of one size do not all start at the same group.
TEST(Telemetry, StrideStartsElsewhereInEveryTensor) {
  std::vector<std::unique_ptr<TestTensor>> tensors;
  std::vector<ParameterTensors> list;
  for (int i = 0; i < 64; ++i) {
    tensors.push_back(std::make_unique<TestTensor>(kAdamW, StateCodec::kDefault, kNarrow, std::vector<int64_t>{32}, 1));
    list.push_back(tensors.back()->tensors());
  }
  Plan plan;
  ASSERT_TRUE(Plan::make(kAdamW.kind, true, list.data(), 64, &plan).is_ok());
  for (int64_t step = 1; step <= 8; ++step) {
    const Hyperparameters hyper = busy_hyperparameters(step);
    std::vector<StepTelemetry> told(64);
    ASSERT_TRUE(plan.inspect(&hyper, 1, {}, {8}, told.data()).is_ok());
    int seen = 0;
    for (const StepTelemetry& t : told) seen += t.examined != 0;
    EXPECT_GE(seen, 1);
    EXPECT_LE(seen, 24) << "8 are expected";
  }
}

TEST(Telemetry, AStrideBeyondTheTensorIsNoOverflow) {
  TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {40000}, 1);
  Plan plan;
  ASSERT_TRUE(Plan::make(kAdamW.kind, true, &t.tensors(), 1, &plan).is_ok());
  const Hyperparameters hyper = busy_hyperparameters(1);
  for (int64_t stride : {int64_t{1} << 40, std::numeric_limits<int64_t>::max()}) {
    StepTelemetry told{};
    ASSERT_TRUE(plan.inspect(&hyper, 1, {}, {stride}, &told).is_ok());
    EXPECT_LE(told.examined, 32);
  }
}

// ---- the plan -------------------------------------------------------------------------------------------------------

/// Ranges of a few blocks, from the last to the first, on two threads.
void run_in_pieces(void* user, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  ++*static_cast<int*>(user);
  constexpr int64_t kPiece = 3;
  const auto run = [=](int64_t parity) {
    for (int64_t piece = (count - 1) / kPiece; piece >= 0; --piece) {
      if (piece % 2 == parity) body(context, piece * kPiece, std::min(count, (piece + 1) * kPiece));
    }
  };
  std::thread other(run, 1);
  run(0);
  other.join();
}

TEST(Telemetry, EachTensorHasItsOwnWhateverTheThreads) {
  const std::vector<std::vector<int64_t>> shapes = {{5000}, {0}, {7, 33}, {1}, {64, 100}, {20000}, {33}};
  const size_t count = shapes.size();
  std::vector<std::unique_ptr<TestTensor>> tensors;
  std::vector<ParameterTensors> list;
  for (size_t i = 0; i < count; ++i) {
    tensors.push_back(
        std::make_unique<TestTensor>(kAdamW, kCodecs[i % 3], kNarrow, shapes[i], i, 0, Gradients::kHostile));
  }
  ASSERT_TRUE(run_steps(kAdamW, tensors, 1, 3).is_ok());
  for (size_t i = 0; i < count; ++i) {
    list.push_back(tensors[i]->tensors());
    list.back().hyper_index = static_cast<int32_t>(i % 2);
  }
  list[4].gradient = nullptr;
  Hyperparameters hypers[] = {busy_hyperparameters(4), busy_hyperparameters(9)};
  hypers[1].lr = 1e-7;
  Plan plan;
  ASSERT_TRUE(Plan::make(kAdamW.kind, true, list.data(), static_cast<int64_t>(count), &plan).is_ok());
  for (int64_t stride : {1, 3, 100}) {
    std::vector<StepTelemetry> plain(count), pieces(count);
    ASSERT_TRUE(plan.inspect(hypers, 2, {}, {stride}, plain.data()).is_ok());
    StepOptions options;
    int calls = 0;
    options.parallel_for = run_in_pieces;
    options.parallel_for_user = &calls;
    ASSERT_TRUE(plan.inspect(hypers, 2, options, {stride}, pieces.data()).is_ok());
    EXPECT_EQ(calls, 1);
    for (size_t i = 0; i < count; ++i) {
      SCOPED_TRACE("tensor " + std::to_string(i) + " stride " + std::to_string(stride));
      expect_equal(plain[i], pieces[i]);
      if (stride == 1) {
        EXPECT_EQ(plain[i].examined, i == 4 ? 0 : tensors[i]->numel());
      }
    }
    expect_equal(plain[4], {});
  }
  // And the step then does so.
  std::vector<StepTelemetry> told(count);
  ASSERT_TRUE(plan.inspect(hypers, 2, {}, {}, told.data()).is_ok());
  std::vector<Before> before;
  for (const auto& t : tensors) before.emplace_back(kAdamW, *t);
  ASSERT_TRUE(plan.step(hypers, 2).is_ok());
  for (size_t i = 0; i < count; ++i) {
    SCOPED_TRACE("tensor " + std::to_string(i));
    if (i != 4) expect_equal(told[i], brute_force(kAdamW, before[i], *tensors[i], hypers[i % 2], 1.0f));
  }
}

TEST(Telemetry, IsAddedToWhatIsThere) {
  TestTensor t(kAdamW, StateCodec::kPaper, kNarrow, {1000}, 1, 0, Gradients::kHostile);
  const Hyperparameters hyper = busy_hyperparameters(1);
  Plan plan;
  ASSERT_TRUE(Plan::make(kAdamW.kind, true, &t.tensors(), 1, &plan).is_ok());
  StepTelemetry once{}, sum{10, 20, 30, 40, 50, 1e-9f}, high{0, 0, 0, 0, 0, 1e9f};
  ASSERT_TRUE(plan.inspect(&hyper, 1, {}, {}, &once).is_ok());
  ASSERT_TRUE(plan.inspect(&hyper, 1, {}, {}, &sum).is_ok());
  ASSERT_TRUE(plan.inspect(&hyper, 1, {}, {}, &high).is_ok());
  StepTelemetry expected{10, 20, 30, 40, 50, 1e-9f};
  add_to(once, expected);
  expect_equal(sum, expected);
  EXPECT_GT(once.largest_update_ratio, 1e-9f);
  EXPECT_EQ(high.largest_update_ratio, 1e9f);
}

TEST(Telemetry, ASkippedStepExaminesNothing) {
  TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {1000}, 1, 0, Gradients::kHostile);
  const Hyperparameters hyper = busy_hyperparameters(1);
  Plan plan;
  ASSERT_TRUE(Plan::make(kAdamW.kind, true, &t.tensors(), 1, &plan).is_ok());
  float found_inf = 1.0f;
  int64_t nonfinite = 5;
  StepOptions options;
  options.found_inf = &found_inf;
  options.nonfinite_gradients = &nonfinite;
  StepTelemetry told{};
  ASSERT_TRUE(plan.inspect(&hyper, 1, options, {}, &told).is_ok());
  expect_equal(told, {});
  found_inf = 0.0f;
  ASSERT_TRUE(plan.inspect(&hyper, 1, options, {}, &told).is_ok());
  EXPECT_EQ(told.examined, 1000);
  EXPECT_GT(told.nonfinite_gradients, 0);
  EXPECT_EQ(nonfinite, 5) << "that counter is the step's";
}

struct BadCall {
  const char* word;
  void (*spoil)(Hyperparameters&, int64_t& count, StepOptions&, InspectOptions&, StepTelemetry*& telemetry);
};

TEST(Telemetry, WrongArgumentsAreErrorsThatNameThemAndChangeNothing) {
  using H = Hyperparameters;
  const BadCall cases[] = {
      {"telemetry is null", [](H&, int64_t&, StepOptions&, InspectOptions&, StepTelemetry*& out) { out = nullptr; }},
      {"stride = 0", [](H&, int64_t&, StepOptions&, InspectOptions& o, StepTelemetry*&) { o.stride = 0; }},
      {"stride = -3", [](H&, int64_t&, StepOptions&, InspectOptions& o, StepTelemetry*&) { o.stride = -3; }},
      {"hypers has 0 entries", [](H&, int64_t& count, StepOptions&, InspectOptions&, StepTelemetry*&) { count = 0; }},
      {"gradient_scale",
       [](H&, int64_t&, StepOptions& o, InspectOptions&, StepTelemetry*&) { o.gradient_scale = INFINITY; }},
      {"step = 0", [](H& h, int64_t&, StepOptions&, InspectOptions&, StepTelemetry*&) { h.step = 0; }},
      {"lr = nan", [](H& h, int64_t&, StepOptions&, InspectOptions&, StepTelemetry*&) { h.lr = NAN; }},
      {"beta2 = 1.5", [](H& h, int64_t&, StepOptions&, InspectOptions&, StepTelemetry*&) { h.beta2 = 1.5; }},
  };
  for (const BadCall& bad : cases) {
    TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
    Plan plan;
    ASSERT_TRUE(Plan::make(kAdamW.kind, true, &t.tensors(), 1, &plan).is_ok());
    const std::vector<unsigned char> before = t.bytes();
    H hyper = busy_hyperparameters(1);
    int64_t count = 1;
    StepOptions options;
    InspectOptions inspect_options;
    StepTelemetry told{}, *out = &told;
    bad.spoil(hyper, count, options, inspect_options, out);
    const Status status = plan.inspect(&hyper, count, options, inspect_options, out);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << bad.word;
    EXPECT_NE(status.message().find(bad.word), std::string::npos) << status.message();
    EXPECT_TRUE(t.bytes() == before);
    expect_equal(told, {});
  }
  Plan empty;
  StepTelemetry told{};
  const Hyperparameters hyper = busy_hyperparameters(1);
  EXPECT_EQ(empty.inspect(&hyper, 1, {}, {}, &told).code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(Plan::make(kAdamW.kind, true, nullptr, 0, &empty).is_ok());
  EXPECT_TRUE(empty.inspect(&hyper, 1, {}, {}, nullptr).is_ok()) << "no tensors need no entries";
}

}  // namespace
}  // namespace flashoptim::test
