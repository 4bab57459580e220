// What must not matter: threads, alignment, and how a tensor is cut along its first dimension.
#include <gtest/gtest.h>

#include <numeric>
#include <thread>

#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

struct Threads {
  int count;
  int calls = 0;
};

/// As many threads as asked for, on ranges of unequal length.
void run_on_threads(void* user, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  Threads& threads = *static_cast<Threads*>(user);
  ++threads.calls;
  std::vector<std::thread> running;
  int64_t begin = 0;
  for (int i = 1; i <= threads.count; ++i) {
    const int64_t end =
        i == threads.count ? count : std::min(count, count * i * i / (threads.count * threads.count) + 1);
    if (end > begin) running.emplace_back(body, context, begin, end);
    begin = std::max(begin, end);
  }
  for (std::thread& t : running) t.join();
}

const std::vector<Storage> kSomeStorages{{DType::kFloat32, DType::kFloat32, MasterWeights::kNone},
                                         {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8},
                                         {DType::kFloat16, DType::kFloat32, MasterWeights::kCorrection16},
                                         {DType::kBFloat16, DType::kFloat32, MasterWeights::kNoneStochastic},
                                         {DType::kFloat16, DType::kFloat16, MasterWeights::kCorrection8Nearest}};

template <class Body>
void for_each_configuration(Body body) {
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      for (const Storage& storage : kSomeStorages) {
        SCOPED_TRACE(describe(optimizer, codec, storage));
        body(optimizer, codec, storage);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

std::vector<std::unique_ptr<TestTensor>> several(const OptimizerChoice& optimizer, StateCodec codec,
                                                 const Storage& storage, int64_t shift) {
  std::vector<std::unique_ptr<TestTensor>> tensors;
  const std::vector<std::vector<int64_t>> shapes{{kSanitized ? 2003 : 100003}, {7, 33}, {0}, {513}, {3, 1000}, {1}};
  for (size_t i = 0; i < shapes.size(); ++i)
    tensors.push_back(std::make_unique<TestTensor>(optimizer, codec, storage, shapes[i], 7 + i, shift));
  return tensors;
}

std::vector<unsigned char> all_bytes(const std::vector<std::unique_ptr<TestTensor>>& tensors) {
  std::vector<unsigned char> out;
  for (const auto& t : tensors) t->append_to(out);
  return out;
}

TEST(Geometry, OneTwoAndFiveThreadsGiveTheSameBytesAsNone) {
  for_each_configuration([](const OptimizerChoice& optimizer, StateCodec codec, const Storage& storage) {
    const auto reference = several(optimizer, codec, storage, 0);
    ASSERT_TRUE(run_steps(optimizer, reference, 1, 2).is_ok());
    const std::vector<unsigned char> expected = all_bytes(reference);
    for (int count : {1, 2, 5}) {
      const auto tensors = several(optimizer, codec, storage, 0);
      Threads threads{count};
      StepOptions options;
      options.parallel_for = run_on_threads;
      options.parallel_for_user = &threads;
      ASSERT_TRUE(run_steps(optimizer, tensors, 1, 2, options).is_ok());
      ASSERT_EQ(threads.calls, 2) << "the hook runs once a step";
      ASSERT_TRUE(all_bytes(tensors) == expected) << count << " threads";
      for (const auto& t : tensors) ASSERT_TRUE(t->guards_intact());
    }
  });
}

TEST(Geometry, MisalignedStorageGivesTheSameBytesAndNothingOutsideIsWritten) {
  for_each_configuration([](const OptimizerChoice& optimizer, StateCodec codec, const Storage& storage) {
    std::vector<unsigned char> expected;
    for (int64_t shift : {0, 1, 3}) {
      std::vector<std::unique_ptr<TestTensor>> tensors;
      for (int64_t n : {1, 31, 33, 512, 545, 1000})
        tensors.push_back(std::make_unique<TestTensor>(optimizer, codec, storage, std::vector<int64_t>{n}, 3, shift));
      tensors.push_back(std::make_unique<TestTensor>(optimizer, codec, storage, std::vector<int64_t>{7, 33}, 4, shift));
      ASSERT_TRUE(run_steps(optimizer, tensors, 1, 3).is_ok());
      for (const auto& t : tensors) ASSERT_TRUE(t->guards_intact()) << t->numel() << " elements, " << shift << " off";
      if (shift == 0) expected = all_bytes(tensors);
      ASSERT_TRUE(all_bytes(tensors) == expected) << shift << " elements off";
    }
  });
}

/// Steps a whole tensor and the same cut into shards along dimension 0, and compares every array.
void expect_shards_equal_whole(const OptimizerChoice& optimizer, StateCodec codec, const Storage& storage,
                               const std::vector<int64_t>& sizes, const std::vector<int64_t>& cut, int64_t origin) {
  TestTensor whole(optimizer, codec, storage, sizes, 5), parts(optimizer, codec, storage, sizes, 5);
  whole.tensors().place.first_element = origin;
  const ElementSizesOf size = element_sizes_of(whole.tensors());
  const int64_t row = std::accumulate(sizes.begin() + 1, sizes.end(), int64_t{1}, std::multiplies<>());
  std::vector<ParameterTensors> shards;
  int64_t begin = 0;
  for (int64_t rows : cut) {
    ParameterTensors s = parts.tensors();
    std::vector<int64_t> shard_sizes = sizes;
    shard_sizes[0] = rows;
    s.layout = group_layout(shard_sizes.data(), static_cast<int64_t>(shard_sizes.size()));
    const int64_t first = begin * row;
    s.place.first_element = origin + first;
    s.parameter = static_cast<unsigned char*>(s.parameter) + first * size.parameter;
    if (s.correction != nullptr) s.correction = static_cast<unsigned char*>(s.correction) + first * size.correction;
    const int64_t groups =
        whole.tensors().layout.rows == 1 ? first / kGroupSize : begin * whole.tensors().layout.groups_per_row();
    for (int k = 0; k < optimizer.states; ++k) {
      s.states[k] = static_cast<unsigned char*>(s.states[k]) + first * size.state;
      if (s.scales[k] != nullptr) s.scales[k] = static_cast<uint16_t*>(s.scales[k]) + groups;
    }
    shards.push_back(s);
    begin += rows;
  }
  ASSERT_EQ(begin, sizes[0]);
  Plan whole_plan, shard_plan;
  ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, &whole.tensors(), 1, &whole_plan).is_ok());
  ASSERT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, shards.data(), static_cast<int64_t>(shards.size()),
                         &shard_plan)
                  .is_ok());
  for (int64_t step = 1; step <= 5; ++step) {
    const Hyperparameters hyper = busy_hyperparameters(step);
    whole.set_step(step);
    parts.set_step(step);
    ASSERT_TRUE(whole_plan.set_gradient(0, whole.tensors().gradient).is_ok());
    for (size_t i = 0; i < shards.size(); ++i) {
      const auto* gradient = static_cast<const unsigned char*>(parts.tensors().gradient) +
                             (shards[i].place.first_element - origin) * size.gradient;
      ASSERT_TRUE(shard_plan.set_gradient(static_cast<int64_t>(i), gradient).is_ok());
    }
    ASSERT_TRUE(whole_plan.step(&hyper, 1).is_ok());
    ASSERT_TRUE(shard_plan.step(&hyper, 1).is_ok());
    ASSERT_TRUE(whole.bytes() == parts.bytes()) << "step " << step;
  }
}

TEST(Geometry, UnevenShardsAlongDimensionZeroGiveTheBytesOfTheWhole) {
  for_each_configuration([](const OptimizerChoice& optimizer, StateCodec codec, const Storage& storage) {
    expect_shards_equal_whole(optimizer, codec, storage, {10, 33}, {3, 0, 1, 6}, 0);
    expect_shards_equal_whole(optimizer, codec, storage, {7, 100}, {2, 5}, 0);
    expect_shards_equal_whole(optimizer, codec, storage, {9, 4, 16}, {4, 4, 1}, 0);
    expect_shards_equal_whole(optimizer, codec, storage, {20, 512}, {7, 13}, 0);
    // Flat tensors: cut between groups.
    expect_shards_equal_whole(optimizer, codec, storage, {1000}, {32, 512, 456}, 0);
    // Past 2^32 elements, where a 32-bit index would wrap.
    expect_shards_equal_whole(optimizer, codec, storage, {10, 33}, {3, 7}, (int64_t{1} << 32) - 33 * 5);
  });
}

TEST(Geometry, DitherTellsElementsBeyondTwoToTheThirtyTwoApart) {
  const Storage storage{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8};
  std::vector<std::vector<unsigned char>> results;
  for (int64_t origin : {int64_t{0}, int64_t{1} << 32, int64_t{1} << 40}) {
    TestTensor t(kOptimizers[0], StateCodec::kDefault, storage, {4, 64}, 5);
    t.tensors().place.first_element = origin;
    Plan plan;
    ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).is_ok());
    const Hyperparameters hyper = busy_hyperparameters(1);
    ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
    results.push_back(t.bytes());
  }
  EXPECT_NE(results[0], results[1]);
  EXPECT_NE(results[0], results[2]);
  EXPECT_NE(results[1], results[2]);
}

TEST(Geometry, AResumedRunEqualsTheUninterruptedOne) {
  for_each_configuration([](const OptimizerChoice& optimizer, StateCodec codec, const Storage& storage) {
    std::vector<std::unique_ptr<TestTensor>> one, two;
    one.push_back(std::make_unique<TestTensor>(optimizer, codec, storage, std::vector<int64_t>{7, 33}, 6));
    two.push_back(std::make_unique<TestTensor>(optimizer, codec, storage, std::vector<int64_t>{7, 33}, 6));
    ASSERT_TRUE(run_steps(optimizer, one, 1, 10).is_ok());
    ASSERT_TRUE(run_steps(optimizer, two, 1, 4).is_ok());
    ASSERT_TRUE(run_steps(optimizer, two, 5, 6).is_ok());  // another plan over the same memory
    ASSERT_TRUE(one[0]->bytes() == two[0]->bytes());
  });
}

TEST(Geometry, GroupLayoutKeepsGroupsWithinRowsAndGroupsShortRowsFlat) {
  const auto layout = [](std::vector<int64_t> sizes) {
    return group_layout(sizes.data(), static_cast<int64_t>(sizes.size()));
  };
  const auto is = [](const GroupLayout& l, int64_t rows, int64_t row_size, int64_t groups) {
    return l.rows == rows && l.row_size == row_size && l.groups() == groups;
  };
  EXPECT_TRUE(is(layout({7, 33}), 7, 33, 14));
  EXPECT_TRUE(is(layout({7, 32}), 7, 32, 7));
  EXPECT_TRUE(is(layout({100, 31}), 1, 3100, 97));
  EXPECT_TRUE(is(layout({64, 3, 7, 7}), 64, 147, 320));
  EXPECT_TRUE(is(layout({1000}), 1, 1000, 32));
  EXPECT_TRUE(is(layout({}), 1, 1, 1));
  EXPECT_EQ(layout({0, 64}).groups(), 0);
  EXPECT_EQ(layout({64, 0}).groups(), 0);
  EXPECT_EQ(layout({int64_t{1} << 20, int64_t{1} << 20}).numel(), int64_t{1} << 40);
}

}  // namespace
}  // namespace flashoptim::test
