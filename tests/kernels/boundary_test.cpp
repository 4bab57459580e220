// The boundary: sizes, counts, indices and pointers that make no sense are a Status, and arrays at any address are
// right.
#include <gtest/gtest.h>

#include <limits>

#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
const OptimizerChoice& kAdamW = kOptimizers[0];
const Storage kNarrow{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection16};

TEST(Boundary, SizesThatWouldOverflowAreRefusedByMake) {
  const struct {
    const char* what;
    void (*spoil)(ParameterTensors&);
  } cases[] = {
      {"layout", [](ParameterTensors& t) { t.layout = {0, kMost}; }},
      {"layout", [](ParameterTensors& t) { t.layout = {kMost, 0}; }},
      {"layout", [](ParameterTensors& t) { t.layout = {kMost, kMost}; }},
      {"layout", [](ParameterTensors& t) { t.layout = {1, (int64_t{1} << 57) + 1}; }},
      {"layout", [](ParameterTensors& t) { t.layout = {std::numeric_limits<int64_t>::min(), 1}; }},
      {"place.first_element", [](ParameterTensors& t) { t.place.first_element = kMost; }},
      {"place.first_element", [](ParameterTensors& t) { t.place.first_element = kMost - 99; }},
      {"place.first_element", [](ParameterTensors& t) { t.place.first_element = std::numeric_limits<int64_t>::min(); }},
      {"place.first_element", [](ParameterTensors& t) { t.place = {kMost, 0, 0, {1, 1000}}; }},
      {"place.run", [](ParameterTensors& t) { t.place.run = std::numeric_limits<int64_t>::min(); }},
      {"place.run", [](ParameterTensors& t) { t.place = {0, 50, 100, {}}; }},
      {"place.stride", [](ParameterTensors& t) { t.place = {0, 50, std::numeric_limits<int64_t>::min(), {1, 1000}}; }},
      {"place.first_element", [](ParameterTensors& t) { t.place = {0, 50, kMost, {1, int64_t{1} << 57}}; }},
      {"place.first_element", [](ParameterTensors& t) { t.place = {kMost, 1, kMost, {1, int64_t{1} << 57}}; }},
      {"place.whole", [](ParameterTensors& t) { t.place.whole = {0, kMost}; }},
      {"place.whole", [](ParameterTensors& t) { t.place.whole = {kMost, kMost}; }},
      {"place.whole", [](ParameterTensors& t) { t.place.whole = {-1, -1}; }},
      {"hyper_index", [](ParameterTensors& t) { t.hyper_index = std::numeric_limits<int32_t>::max(); }},
      {"hyper_index", [](ParameterTensors& t) { t.hyper_index = std::numeric_limits<int32_t>::max() - 1; }},
      {"hyper_index", [](ParameterTensors& t) { t.hyper_index = kMaxHyperparameterSets; }},
      {"hyper_index", [](ParameterTensors& t) { t.hyper_index = std::numeric_limits<int32_t>::min(); }},
  };
  for (const auto& bad : cases) {
    TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
    bad.spoil(t.tensors());
    Plan plan;
    const Status status = Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << bad.what;
    EXPECT_NE(status.message().find(std::string("tensors[0].") + bad.what), std::string::npos) << status.message();
    EXPECT_EQ(plan.size(), 0);
  }
  TestTensor last(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
  last.tensors().place.first_element = kMost - 100;
  last.tensors().hyper_index = kMaxHyperparameterSets - 1;
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &last.tensors(), 1, &plan).is_ok());
  std::vector<Hyperparameters> hypers(kMaxHyperparameterSets);
  EXPECT_TRUE(plan.step(hypers.data(), kMaxHyperparameterSets).is_ok());
}

TEST(Boundary, MoreBlocksThanAPlanCountsAreRefused) {
  TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
  t.tensors().layout = {int64_t{1} << 57, 1};  // 2^57 groups, each of one element
  t.tensors().parameter = far_apart(1);
  t.tensors().correction = far_apart(2);
  for (int k = 0; k < 2; ++k) t.tensors().states[k] = far_apart(3 + k), t.tensors().scales[k] = far_apart(5 + k);
  const std::vector<ParameterTensors> list(3000, t.tensors());
  Plan plan;
  const Status status = Plan::make(OptimizerKind::kAdamW, true, list.data(), 3000, &plan);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("more elements than a plan counts"), std::string::npos) << status.message();
}

TEST(Boundary, LayoutsOfShapesThatAreNoneAreRefusedByMake) {
  const int64_t huge[] = {int64_t{1} << 40, int64_t{1} << 40}, negative[] = {4, -1}, empty[] = {kMost, kMost, 0};
  for (const GroupLayout layout :
       {group_layout(huge, 2), group_layout(negative, 2), group_layout(nullptr, 1), group_layout(huge, -1)}) {
    EXPECT_EQ(layout.rows, -1);
    TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
    t.tensors().layout = layout;
    Plan plan;
    EXPECT_EQ(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).code(), StatusCode::kInvalidArgument);
  }
  for (const RowRule rule : {RowRule::kFirstDimension, RowRule::kShortest}) {
    EXPECT_EQ(group_layout(huge, 2, rule).rows, -1);
    EXPECT_EQ(group_layout(negative, 2, rule).rows, -1);
    EXPECT_EQ(group_layout(empty, 3, rule).numel(), 0);
  }
  EXPECT_EQ(group_layout(empty, 3, static_cast<RowRule>(3)).rows, -1);
  EXPECT_EQ(group_layout(empty, 3).numel(), 0);
  EXPECT_EQ(group_layout(nullptr, 0).numel(), 1);
}

TEST(Boundary, BoxesAndShardsThatAreNoneAreRefused) {
  const int64_t huge[] = {int64_t{1} << 40, int64_t{1} << 40}, some[] = {4, 64}, none[] = {0, 0};
  const int64_t empty[] = {kMost, kMost, 0}, origin[] = {0, 0, 0};
  const Place before{77, 0, 0, {}};
  Place place = before;
  constexpr RowRule kRule = RowRule::kShortest;
  const struct {
    const char* what;
    Status status;
  } cases[] = {
      {"place is null", place_of_box(some, none, some, 2, kRule, nullptr)},
      {"whole_sizes", place_of_box(nullptr, none, some, 2, kRule, &place)},
      {"offsets", place_of_box(some, nullptr, some, 2, kRule, &place)},
      {"sizes", place_of_box(some, none, nullptr, 2, kRule, &place)},
      {"dimensions = -1", place_of_box(some, none, some, -1, kRule, &place)},
      {"rule = 0", place_of_box(some, none, some, 2, static_cast<RowRule>(0), &place)},
      {"whole_sizes", place_of_box(huge, none, some, 2, kRule, &place)},
  };
  for (const auto& bad : cases) {
    EXPECT_EQ(bad.status.code(), StatusCode::kInvalidArgument) << bad.what;
    EXPECT_NE(bad.status.message().find(bad.what), std::string::npos) << bad.status.message();
  }
  EXPECT_TRUE(place == before);
  ASSERT_TRUE(place_of_box(empty, origin, empty, 3, kRule, &place).is_ok());
  EXPECT_TRUE(place == Place{});

  EXPECT_EQ(shard_layout({0, 0, 0, {4, 64}}, -64).rows, -1);
  EXPECT_EQ(shard_layout({0, 30, 64, {4, 64}}, 100).rows, -1);
  EXPECT_EQ(shard_layout({0, 0, 0, {4, 0}}, 100).numel(), 100);
}

TEST(Boundary, ScalesOfFullPrecisionStatesAreNotLookedAt) {
  TestTensor t(kAdamW, StateCodec::kFloat32, kNarrow, {7, 40}, 1);  // short groups: stepped through copies
  int not_scales = 0;
  for (void*& scales : t.tensors().scales) scales = &not_scales;
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).is_ok());
  EXPECT_EQ(plan.tensor(0).scales[0], nullptr);
  const Hyperparameters hyper = busy_hyperparameters(1);
  EXPECT_TRUE(plan.step(&hyper, 1).is_ok());
}

TEST(Boundary, NullPointersAndUnknownChoicesAreRefused) {
  TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {100}, 1);
  const auto refused = [](const Status& status, const char* what) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << what;
    EXPECT_NE(status.message().find(what), std::string::npos) << status.message();
  };
  Plan plan;
  refused(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, nullptr), "plan");
  refused(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), kMost, &plan), "count");
  refused(Plan::make(static_cast<OptimizerKind>(-1), true, &t.tensors(), 1, &plan), "optimizer = -1");
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).is_ok());
  const std::vector<unsigned char> before = t.bytes();
  const Hyperparameters hyper = busy_hyperparameters(1);
  refused(plan.step(nullptr, 1), "hypers");
  refused(plan.step(&hyper, -1), "count = -1");
  refused(plan.set_gradients(nullptr), "gradients");
  EXPECT_EQ(plan.tensor(1).layout.numel(), 0);
  EXPECT_EQ(plan.tensor(-1).parameter, nullptr);
  EXPECT_EQ(Plan().tensor(0).parameter, nullptr);
  refused(cpu_isa(nullptr), "name");

  std::vector<float> values(100), more(100);
  float* slots[] = {values.data(), more.data()};
  float* one_slot[] = {values.data(), nullptr};
  const auto unknown = static_cast<OptimizerKind>(99);
  refused(decode_states(unknown, true, t.tensors(), slots), "optimizer = 99");
  refused(encode_states(unknown, true, t.tensors(), slots), "optimizer = 99");
  refused(decode_states(OptimizerKind::kAdamW, true, t.tensors(), nullptr), "values");
  refused(encode_states(OptimizerKind::kAdamW, true, t.tensors(), nullptr), "values");
  refused(decode_states(OptimizerKind::kAdamW, true, t.tensors(), one_slot), "values[1]");
  refused(encode_states(OptimizerKind::kAdamW, true, t.tensors(), one_slot), "values[1]");
  ParameterTensors strange = t.tensors();
  strange.state_codec = static_cast<StateCodec>(3);
  refused(decode_states(OptimizerKind::kAdamW, true, strange, slots), "state_codec = 3");
  strange = t.tensors();
  strange.states[1] = nullptr;
  refused(decode_states(OptimizerKind::kAdamW, true, strange, slots), "states[1]");

  const auto bf16 = DType::kBFloat16;
  const auto master = MasterWeights::kCorrection16;
  void *const parameter = t.tensors().parameter, *const correction = t.tensors().correction;
  refused(merge_weights(bf16, master, parameter, correction, nullptr, 100), "weights");
  refused(merge_weights(bf16, master, nullptr, correction, values.data(), 100), "parameter");
  refused(merge_weights(bf16, master, parameter, nullptr, values.data(), 100), "correction");
  refused(merge_weights(bf16, master, parameter, correction, values.data(), -1), "count = -1");
  refused(merge_weights(bf16, master, parameter, correction, values.data(), kMost), "count");
  refused(merge_weights(static_cast<DType>(7), master, parameter, correction, values.data(), 100), "dtype = 7");
  refused(merge_weights(bf16, static_cast<MasterWeights>(6), parameter, correction, values.data(), 100),
          "master_weights = 6");
  refused(split_weights(bf16, master, nullptr, parameter, correction, 100), "weights");
  refused(split_weights(bf16, master, values.data(), nullptr, correction, 100), "parameter");
  refused(split_weights(bf16, master, values.data(), parameter, nullptr, 100), "correction");
  EXPECT_TRUE(merge_weights(bf16, master, nullptr, nullptr, nullptr, 0).is_ok());
  EXPECT_TRUE(t.bytes() == before);
}

/// A tensor's arrays at other addresses: every array a byte further, the gradient too.
class OddTensor {
 public:
  OddTensor(const TestTensor& from, size_t by) {
    t_ = from.tensors();
    const ElementSizesOf sizes = element_sizes_of(t_);
    const auto numel = static_cast<size_t>(from.numel()), groups = static_cast<size_t>(t_.layout.groups());
    t_.parameter = copy(t_.parameter, numel * static_cast<size_t>(sizes.parameter), by);
    t_.gradient = copy(t_.gradient, numel * static_cast<size_t>(sizes.gradient), by);
    t_.correction = copy(t_.correction, numel * static_cast<size_t>(sizes.correction), by);
    for (int k = 0; k < kMaxSlots; ++k) {
      t_.states[k] = copy(t_.states[k], numel * static_cast<size_t>(sizes.state), by);
      t_.scales[k] = copy(t_.scales[k], groups * 2, by);
    }
  }
  const ParameterTensors& tensors() const { return t_; }
  std::vector<unsigned char> bytes(const TestTensor& like) const {
    const ElementSizesOf sizes = element_sizes_of(t_);
    std::vector<unsigned char> out;
    const auto append = [&out](const void* p, int64_t bytes) {
      if (p != nullptr) out.insert(out.end(), static_cast<const char*>(p), static_cast<const char*>(p) + bytes);
    };
    const int64_t numel = like.numel(), groups = t_.layout.groups();
    append(t_.parameter, numel * sizes.parameter);
    append(t_.correction, numel * sizes.correction);
    for (void* const state : t_.states) append(state, numel * sizes.state);
    for (void* const scales : t_.scales) append(scales, groups * 2);
    return out;
  }

 private:
  void* copy(const void* from, size_t bytes, size_t by) {
    if (from == nullptr || bytes == 0) return nullptr;
    auto& storage = storages_.emplace_back(bytes + 64 + by);
    unsigned char* const to = storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64 + by;
    std::memcpy(to, from, bytes);
    return to;
  }
  ParameterTensors t_;
  std::vector<std::vector<unsigned char>> storages_;
};

/// Blocks that end in short groups, in full ones, and in fewer than a vector of them. Under
/// UndefinedBehaviorSanitizer this also finds loads and stores through pointers of a wrong alignment.
TEST(Boundary, ArraysAtOddAddressesGiveTheSameBits) {
  const Storage storages[] = {{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8},
                              {DType::kBFloat16, DType::kFloat32, MasterWeights::kCorrection16},
                              {DType::kFloat16, DType::kFloat16, MasterWeights::kNoneStochastic},
                              {DType::kFloat32, DType::kFloat32, MasterWeights::kNone}};
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      for (const Storage& storage : storages) {
        for (const std::vector<int64_t>& shape : {std::vector<int64_t>{2500}, {7, 33}, {13, 96}}) {
          SCOPED_TRACE(describe(optimizer, codec, storage));
          TestTensor even(optimizer, codec, storage, shape, 5);
          Plan even_plan;
          OddTensor odd1(even, 1), odd2(even, 2), odd3(even, 3);
          ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &even.tensors(), 1, &even_plan).is_ok());
          const Hyperparameters hyper = busy_hyperparameters(1);
          ASSERT_TRUE(even_plan.step(&hyper, 1).is_ok());
          const OddTensor expected(even, 0);
          const auto numel = static_cast<size_t>(even.numel());
          for (OddTensor* odd : {&odd1, &odd2, &odd3}) {
            Plan plan;
            ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &odd->tensors(), 1, &plan).is_ok());
            StepTelemetry telemetry{};
            ASSERT_TRUE(plan.inspect(&hyper, 1, {}, {}, &telemetry).is_ok());
            ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
            ASSERT_TRUE(odd->bytes(even) == expected.bytes(even));
            // There and back through the conversions.
            std::vector<float> weights(numel);
            SlotValues values(numel);
            const ParameterTensors& t = odd->tensors();
            ASSERT_TRUE(
                merge_weights(storage.dtype, storage.master, t.parameter, t.correction, weights.data(), even.numel())
                    .is_ok());
            ASSERT_TRUE(decode_states(optimizer.kind, optimizer.has_momentum, t, values.pointers).is_ok());
            ASSERT_TRUE(encode_states(optimizer.kind, optimizer.has_momentum, t, values.pointers).is_ok());
            ASSERT_TRUE(
                split_weights(storage.dtype, storage.master, weights.data(), t.parameter, t.correction, even.numel())
                    .is_ok());
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashoptim::test
