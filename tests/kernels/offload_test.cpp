// The schedule of offloaded states: order, overlap, reuse of slots, races and failures, on devices that are simulated.
#include "flashoptim/offload.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "tests/kernels/offload_devices.h"

namespace flashoptim {
namespace {

using testing::ThreadedDevice;
using testing::VirtualDevice;

/// Units of some bytes on the host; a step adds 1 to every byte.
class Model {
 public:
  Model(OffloadDevice* device, int64_t units, int64_t bytes, int64_t slots, int64_t parts = 1)
      : bytes_(bytes), ring_memory_(static_cast<size_t>(bytes * slots)) {
    EXPECT_TRUE(OffloadRing::make(device, ring_memory_.data(), bytes, slots, &ring).is_ok());
    for (int64_t u = 0; u < units; ++u) {
      host.emplace_back(static_cast<size_t>(bytes), static_cast<unsigned char>(u));
      // In two stretches, as codes and scales are.
      const int64_t half = bytes / 2;
      ring.add({{host.back().data(), 0, half}, {host.back().data() + half, half, bytes - half}}, parts);
    }
  }

  static void add_one(void* slot, int64_t bytes) {
    auto* const values = static_cast<unsigned char*>(slot);
    for (int64_t i = 0; i < bytes; ++i) ++values[i];
  }

  Status step(VirtualDevice* device, int64_t unit, double seconds = 1e-4, int64_t part = 0) {
    void* slot = nullptr;
    const Status status = ring.open(unit, &slot);
    if (!status.is_ok()) return status;
    device->step(slot, bytes_, seconds, [&] { add_one(slot, bytes_); });
    return ring.close(unit, part);
  }

  OffloadRing ring;
  std::vector<std::vector<unsigned char>> host;

 private:
  int64_t bytes_;
  std::vector<unsigned char> ring_memory_;
};

std::vector<int64_t> upwards(int64_t count) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

TEST(OffloadRing, StepsEveryUnitWhereverItIs) {
  VirtualDevice device;
  Model model(&device, 10, 1000, 3);
  for (int pass = 0; pass < 4; ++pass) {
    for (int64_t u = 9; u >= 0; --u) ASSERT_TRUE(model.step(&device, u).is_ok());
  }
  ASSERT_TRUE(model.ring.synchronize().is_ok());
  EXPECT_TRUE(device.host_knows_all_down());
  EXPECT_TRUE(device.host_knows_all_up()) << "memory may be freed, with copies ahead on their way";
  for (size_t u = 0; u < 10; ++u) {
    for (const unsigned char value : model.host[u]) ASSERT_EQ(value, u + 4);
  }
  EXPECT_EQ(device.races(), "");
}

TEST(OffloadRing, HidesCopiesBehindWorkThatTakesLonger) {
  VirtualDevice device;
  constexpr int64_t kUnits = 40, kBytes = 1000;
  device.up_bandwidth = device.down_bandwidth = 1e6;  // a unit takes 1 ms each way
  Model model(&device, kUnits, kBytes, 4);
  const auto pass = [&] {
    for (int64_t u = kUnits - 1; u >= 0; --u) {
      device.compute(1.5e-3);
      ASSERT_TRUE(model.step(&device, u, 0.0).is_ok());
    }
  };
  pass();
  const double begin = device.time_of(OffloadQueue::kStep);
  pass();
  // Nothing but the work itself: all copies ran beside it, in both directions.
  EXPECT_NEAR(device.time_of(OffloadQueue::kStep) - begin, kUnits * 1.5e-3, 1e-6);
}

TEST(OffloadRing, IsAsFastAsTheBusInBothDirectionsAtOnce) {
  VirtualDevice device;
  constexpr int64_t kUnits = 50, kBytes = 1000;
  device.up_bandwidth = device.down_bandwidth = 1e6;
  Model model(&device, kUnits, kBytes, 4);
  model.ring.expect(upwards(kUnits));
  for (int64_t u = 0; u < kUnits; ++u) ASSERT_TRUE(model.step(&device, u, 1e-5).is_ok());
  ASSERT_TRUE(model.ring.synchronize().is_ok());
  // 50 units of 1 ms: one direction after the other would take 100 ms.
  EXPECT_LT(device.end(), (kUnits + 4) * 1e-3);
}

TEST(OffloadRing, LearnsTheOrderAndCorrectsItWhereItChanges) {
  VirtualDevice device;
  constexpr int64_t kUnits = 12;
  Model model(&device, kUnits, 100, 4);
  std::vector<int64_t> order = upwards(kUnits);
  std::mt19937 random(7);
  for (int change = 0; change < 3; ++change) {
    std::shuffle(order.begin(), order.end(), random);
    int64_t fetched = 0;
    for (int pass = 0; pass < 3; ++pass) {
      const int64_t before = model.ring.counts().fetched;
      for (const int64_t u : order) ASSERT_TRUE(model.step(&device, u).is_ok());
      fetched = model.ring.counts().fetched - before;
    }
    EXPECT_EQ(fetched, 0) << "after change " << change;
  }
  EXPECT_EQ(device.races(), "");
}

TEST(OffloadRing, KeepsAUnitUntilAllItsPartsAreStepped) {
  VirtualDevice device;
  Model model(&device, 6, 100, 3, /*parts=*/3);
  for (int pass = 0; pass < 3; ++pass) {
    for (int64_t u = 5; u >= 0; --u) {
      for (int64_t part = 2; part >= 0; --part) ASSERT_TRUE(model.step(&device, u, 1e-4, part).is_ok());
    }
  }
  EXPECT_EQ(model.ring.counts().down_bytes, 3 * 6 * 100);  // each once a pass
  ASSERT_TRUE(model.ring.synchronize().is_ok());
  EXPECT_EQ(model.host[5][0], 5 + 9);
  EXPECT_EQ(device.races(), "");
}

TEST(OffloadRing, SendsDownWhatWaitsForAPartThatDoesNotCome) {
  VirtualDevice device;
  Model model(&device, 6, 100, 3, /*parts=*/2);
  for (int pass = 0; pass < 3; ++pass) {
    for (int64_t u = 5; u >= 0; --u) ASSERT_TRUE(model.step(&device, u, 1e-4, 0).is_ok());  // part 1 never
    ASSERT_TRUE(model.ring.flush().is_ok());
  }
  for (size_t u = 0; u < 6; ++u) EXPECT_EQ(model.host[u][0], u + 3);
  const int64_t before = model.ring.counts().down_bytes;
  for (int64_t u = 5; u >= 0; --u) ASSERT_TRUE(model.step(&device, u, 1e-4, 0).is_ok());
  EXPECT_EQ(model.ring.counts().down_bytes - before, 600);  // learned: nothing waits any more
  // And a part that comes after all is stepped.
  ASSERT_TRUE(model.step(&device, 2, 1e-4, 1).is_ok());
  ASSERT_TRUE(model.ring.synchronize().is_ok());
  EXPECT_EQ(model.host[2][0], 2 + 5);
  EXPECT_EQ(device.races(), "");
}

TEST(OffloadRing, OrdersStreamsThatStepOneUnit) {
  VirtualDevice device;
  Model model(&device, 2, 100, 2, /*parts=*/2);
  ASSERT_TRUE(model.step(&device, 0, 1e-4, 0).is_ok());
  device.on_second_stream = true;
  ASSERT_TRUE(model.step(&device, 0, 1e-4, 1).is_ok());
  device.on_second_stream = false;
  ASSERT_TRUE(model.ring.synchronize().is_ok());
  EXPECT_EQ(model.host[0][0], 2);
  EXPECT_EQ(device.races(), "");
}

TEST(OffloadRing, TakesWhatTheHostHasWritten) {
  VirtualDevice device;
  Model model(&device, 4, 100, 6);
  for (int64_t u = 3; u >= 0; --u) ASSERT_TRUE(model.step(&device, u).is_ok());
  for (int64_t u = 3; u >= 0; --u) ASSERT_TRUE(model.step(&device, u).is_ok());
  ASSERT_TRUE(model.ring.synchronize().is_ok());
  std::fill(model.host[2].begin(), model.host[2].end(), 100);
  model.ring.drop(2);
  for (int64_t u = 3; u >= 0; --u) ASSERT_TRUE(model.step(&device, u).is_ok());
  ASSERT_TRUE(model.ring.synchronize().is_ok());
  EXPECT_EQ(model.host[2][0], 101);
  EXPECT_EQ(model.host[1][0], 1 + 3);
  EXPECT_EQ(device.races(), "");
}

TEST(OffloadRing, GoesOnBehindAFailureOfAnyCall) {
  constexpr int64_t kUnits = 7, kPasses = 3;
  int64_t calls = 1 << 20;
  for (int64_t fails_at = 9 + 2; fails_at < calls; ++fails_at) {  // behind those of make()
    VirtualDevice device;
    Model model(&device, kUnits, 64, 3);
    device.fails_at = fails_at;
    std::vector<int> taken(kUnits, 0);
    const auto step = [&](int64_t u) {
      void* slot = nullptr;
      if (!model.ring.open(u, &slot).is_ok()) return false;
      device.step(slot, 64, 1e-4, [&] { Model::add_one(slot, 64); });
      ++taken[static_cast<size_t>(u)];
      static_cast<void>(model.ring.close(u, 0));  // the step counts all the same
      return true;
    };
    for (int64_t pass = 0; pass < kPasses; ++pass) {
      for (int64_t u = kUnits - 1; u >= 0; --u) ASSERT_TRUE(step(u) || step(u)) << "call " << fails_at;
    }
    ASSERT_TRUE(model.ring.synchronize().is_ok() || model.ring.synchronize().is_ok());
    for (int64_t u = 0; u < kUnits; ++u) {
      const auto at = static_cast<size_t>(u);
      ASSERT_EQ(taken[at], kPasses);
      for (const unsigned char value : model.host[at]) ASSERT_EQ(value, u + kPasses) << "call " << fails_at;
    }
    ASSERT_EQ(device.races(), "") << "call " << fails_at;
    calls = device.calls;
  }
}

TEST(OffloadRing, NothingIsUnderWayBehindASynchronizationWhateverFails) {
  for (int64_t fails_at = 0;; ++fails_at) {
    VirtualDevice device;
    Model model(&device, 8, 1000, 3);
    const int64_t before = device.calls;
    device.fails_at = before + fails_at;
    for (int64_t u = 7; u >= 0; --u) static_cast<void>(model.step(&device, u));
    const bool has_failed = device.calls > device.fails_at;
    device.fails_at = -1;
    ASSERT_TRUE(model.ring.synchronize().is_ok());
    EXPECT_TRUE(device.host_knows_all_up()) << "call " << fails_at << " failed";
    EXPECT_TRUE(device.host_knows_all_down()) << "call " << fails_at << " failed";
    if (!has_failed) break;
  }
}

TEST(OffloadRing, CopiesInBothDirectionsAtOnceOnThreads) {
  constexpr int64_t kUnits = 24, kBytes = 4096, kPasses = 5;
  ThreadedDevice device;
  Model model(&device, kUnits, kBytes, 4, /*parts=*/2);
  std::mt19937 random(3);
  std::vector<int64_t> order = upwards(kUnits);
  for (int64_t pass = 0; pass < kPasses; ++pass) {
    if (pass == 3) std::shuffle(order.begin(), order.end(), random);
    for (const int64_t u : order) {
      for (const int64_t part : {0, 1}) {
        void* slot = nullptr;
        ASSERT_TRUE(model.ring.open(u, &slot).is_ok());
        device.step([slot] { Model::add_one(slot, kBytes); });
        ASSERT_TRUE(model.ring.close(u, part).is_ok());
      }
    }
    if (pass == 2) {
      ASSERT_TRUE(model.ring.synchronize().is_ok());
      EXPECT_EQ(model.host[0][0], 2 * 3);
    }
  }
  ASSERT_TRUE(model.ring.synchronize().is_ok());
  for (int64_t u = 0; u < kUnits; ++u) {
    for (const unsigned char value : model.host[static_cast<size_t>(u)]) ASSERT_EQ(value, u + 2 * kPasses);
  }
}

TEST(OffloadRing, RefusesARingThatCannotTurn) {
  VirtualDevice device;
  OffloadRing ring;
  char memory[16];
  const Status status = OffloadRing::make(&device, memory, 16, 1, &ring);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("slots = 1"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace flashoptim
