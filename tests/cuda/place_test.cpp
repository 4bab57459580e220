// Shards that know their place: the device's bytes and telemetry against the CPU's, whose shards hold the bytes of the
// whole (tests/kernels/place_bits_test.cpp).
#include <gtest/gtest.h>

#include <array>

#include "src/cuda/arguments.h"
#include "tests/cuda/device_tensors.h"

namespace flashoptim::cuda_test {
namespace {

struct Shard {
  GroupLayout layout;
  Place place;
};

/// Cuts between groups of the whole.
const std::vector<Shard>& aligned_shards() {
  constexpr int64_t kManyRows = int64_t{1} << 27;
  static const std::vector<Shard> kShards = {
      {{7, 33}, {99, 0, 0, {10, 33}}},                                     // rows
      {{1, 1000}, {3200, 0, 0, {1, 4200}}},                                // flat, to its end
      {{12, 32}, {64, 32, 96, {12, 96}}},                                  // columns
      {{64, 512}, {1024, 512, 4096, {64, 4096}}},                          // of long rows
      {{1, 64 * 512}, {1024, 512, 4096, {64, 4096}}},                      // the same, laid out flat
      {{300, 96}, {32, 96, 160, {300, 160}}},                              // runs of three groups
      {{300, 96}, {kManyRows / 2 * 160 + 32, 96, 160, {kManyRows, 160}}},  // beyond 2^32
      {{6, 8}, {64, 8, 72, {6, 72}}},                                      // short groups
      {{12, 40}, {80, 160, 200, {16, 40}}},                                // runs of whole short rows
      {{0, 0}, {0, 0, 0, {12, 96}}},
  };
  return kShards;
}

/// Cuts within groups.
const std::vector<Shard>& unaligned_shards() {
  static const std::vector<Shard> kShards = {
      {{1, 935}, {65, 0, 0, {1, 1000}}},
      {{1, 4097}, {31, 0, 0, {1, 5000}}},
      {{40, 15}, {7, 15, 31, {1, 1240}}},
      {{12, 33}, {40, 33, 96, {12, 96}}},
      {{6, 7}, {33, 7, 40, {2, 120}}},
      {{1, 95}, {5, 0, 0, {10, 33}}},
      {{64, 1025}, {1025, 1025, 4100, {64, 4100}}},
      {{1, 1}, {31, 0, 0, {1, 64}}},
  };
  return kShards;
}

constexpr size_t kMostShards = 20;

void expect_same(const Config& config, const std::vector<std::vector<Shard>>& lists, size_t offset) {
  PlanPair pair(config);
  for (const std::vector<Shard>& shards : lists) {
    for (const Shard& s : shards) pair.add(config, s.layout, offset, s.place);
  }
  ASSERT_LE(pair.size(), kMostShards);
  ASSERT_OK(pair.make());
  for (int64_t step = 1; step <= 4; ++step) {
    pair.new_gradients({step == 3, 1e-3f});
    const Hyperparameters hyper = test_hyper(config, step);
    for (int64_t stride : {1, 3}) {
      std::array<StepTelemetry, kMostShards> host{};
      DeviceValue<std::array<StepTelemetry, kMostShards>> device(host);
      ASSERT_OK(pair.cpu().inspect(&hyper, 1, {}, {stride}, host.data()));
      ASSERT_OK(pair.cuda().inspect(&hyper, 1, {}, {stride}, device.pointer()->data()));
      const std::array<StepTelemetry, kMostShards> found = device.get();
      for (size_t i = 0; i < pair.size(); ++i) {
        SCOPED_TRACE("tensor " + std::to_string(i) + " at stride " + std::to_string(stride));
        EXPECT_EQ(found[i].examined, host[i].examined);
        EXPECT_EQ(found[i].nonfinite_gradients, host[i].nonfinite_gradients);
        EXPECT_EQ(found[i].lost_updates, host[i].lost_updates);
        EXPECT_EQ(found[i].floored_codes, host[i].floored_codes);
        EXPECT_EQ(found[i].saturated_codes, host[i].saturated_codes);
        EXPECT_EQ(found[i].largest_update_ratio, host[i].largest_update_ratio);
      }
    }
    ASSERT_OK(pair.cpu().step(&hyper, 1));
    ASSERT_OK(pair.cuda().step(&hyper, 1));
    // Every other one, each in a launch of its own, or neighbours together; entries brought to the device again.
    std::vector<int64_t> some;
    const bool neighbours = step % 2 == 0;
    for (size_t i = 0; i < pair.size(); i += neighbours ? 1 : 2) some.push_back(static_cast<int64_t>(i));
    if (neighbours) {
      some.resize(pair.size() / 2);
      for (const int64_t i : some) ASSERT_OK(pair.cuda().set_tensor(i, pair.cuda().tensor(i)));
    }
    ASSERT_OK(pair.cpu().step_some(some.data(), static_cast<int64_t>(some.size()), &hyper, 1));
    ASSERT_OK(pair.cuda().step_some(some.data(), static_cast<int64_t>(some.size()), &hyper, 1));
    ASSERT_CUDA(cudaDeviceSynchronize());
    const std::string difference = pair.difference();
    ASSERT_EQ(difference, "") << "step " << step;
  }
}

TEST(CudaPlace, ShardsHoldTheBytesOfTheCpus) {
  size_t turn = 0;
  for (const Config& config : all_configs()) {
    SCOPED_TRACE(name(config));
    static constexpr size_t kOffsets[] = {0, 0, 2, 1};
    const size_t offset = kOffsets[turn++ % 4];
    const bool any_cut =
        config.codec == StateCodec::kFloat32 || state_count(config.optimizer, config.has_momentum) == 0;
    std::vector<std::vector<Shard>> lists{aligned_shards()};
    if (any_cut) lists.push_back(unaligned_shards());
    expect_same(config, lists, offset);
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(CudaPlace, RunsOfFullGroupsTakeTheHotKernel) {
  for (const Shard& s : aligned_shards()) {
    ParameterTensors t;
    t.parameter_dtype = t.gradient_dtype = DType::kBFloat16;
    t.master_weights = MasterWeights::kCorrection8;
    t.state_codec = StateCodec::kDefault;
    t.layout = s.layout;
    t.place = s.place;
    const bool full_runs = s.place.run > 0 && s.place.run % kGroupSize == 0 && s.place.whole.row_size != 40;
    const int hot = cuda::hot_format_of(t, 2, tensor_groups(t));
    EXPECT_EQ(hot >= 0 && cuda::kHotFormats[hot].groups == cuda::HotGroups::kInRuns, full_runs)
        << s.layout.rows << " x " << s.layout.row_size;
  }
}

}  // namespace
}  // namespace flashoptim::cuda_test
