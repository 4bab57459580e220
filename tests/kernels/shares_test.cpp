// Shares: every item once, however it is called, and nobody idle while there is work.
#include "src/shares.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <thread>
#include <vector>

namespace flashoptim::test {
namespace {

constexpr int64_t kCounts[] = {1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 1000, 1024, 4099, 100003};

TEST(Shares, EveryItemIsDoneOnceByOneCallWhereverItBegins) {
  Shares shares;
  for (int64_t count : kCounts) {
    for (int64_t first : {int64_t{0}, count / 16, count / 7, count / 3, count / 2, count - 1}) {
      shares.reset(count);
      std::vector<int> done(static_cast<size_t>(count), 0);
      int64_t first_done = -1;
      shares.work(first, [&](int64_t begin, int64_t end, int64_t share_end) {
        ASSERT_TRUE(0 <= begin && begin < end && end <= share_end && share_end <= count);
        if (first_done < 0) {
          first_done = begin;
          EXPECT_TRUE(begin <= first && first < share_end)
              << "a call begins with its own share: " << count << ", " << first;
        }
        for (int64_t i = begin; i < end; ++i) ++done[static_cast<size_t>(i)];
      });
      for (int n : done) ASSERT_EQ(n, 1) << count << " items, first " << first;
      shares.work(first, [](int64_t, int64_t, int64_t) { FAIL() << "nothing is left"; });
    }
  }
}

TEST(Shares, EveryItemIsDoneOnceByManyThreadsStepAfterStep) {
  Shares shares;
  for (int64_t count : kCounts) {
    std::vector<std::atomic<int>> done(static_cast<size_t>(count));
    constexpr int kThreads = 7, kSteps = 5;
    for (int step = 0; step < kSteps; ++step) {
      shares.reset(count);
      std::latch all_are_there(kThreads);
      std::vector<std::thread> threads;
      for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
          const int64_t begin = count * t / kThreads, end = count * (t + 1) / kThreads;
          all_are_there.arrive_and_wait();
          if (begin == end) return;
          shares.work(begin, [&](int64_t from, int64_t to, int64_t) {
            for (int64_t i = from; i < to; ++i) done[static_cast<size_t>(i)].fetch_add(1, std::memory_order_relaxed);
          });
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
    for (const auto& n : done) ASSERT_EQ(n.load(), kSteps) << count << " items";
  }
}

/// The reason for them: a thread that is held up in its first piece leaves all others of its items to the rest.
TEST(Shares, AThreadThatIsHeldUpKeepsOnePieceOnly) {
  constexpr int64_t kCount = 4096;
  Shares shares;
  shares.reset(kCount);
  std::atomic<int64_t> by_others{0};
  std::atomic<bool> has_begun{false}, may_go_on{false};
  int64_t kept = 0;
  std::thread slow([&] {
    shares.work(0, [&](int64_t begin, int64_t end, int64_t) {
      has_begun = true;
      while (!may_go_on) std::this_thread::yield();
      kept += end - begin;
    });
  });
  while (!has_begun) std::this_thread::yield();
  shares.work(kCount / 2, [&](int64_t begin, int64_t end, int64_t) { by_others += end - begin; });
  may_go_on = true;
  slow.join();
  EXPECT_LE(kept, 64);
  EXPECT_EQ(by_others + kept, kCount);
}

}  // namespace
}  // namespace flashoptim::test
