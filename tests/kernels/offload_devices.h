// Devices for the offload ring that are made of numbers or of threads.
#pragma once

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "flashoptim/offload.h"

namespace flashoptim::testing {

/// Copies at given bandwidths, in virtual time, and knows what is ordered behind what: two accesses of the same memory
/// of which one writes, and neither of which is ordered behind the other, are a race, whenever they happen to run.
class VirtualDevice : public OffloadDevice {
 public:
  /// Those of OffloadQueue, and a second stream of kStep.
  static constexpr size_t kQueues = 4;
  struct Access {
    int queue;
    int64_t number;  ///< of the queue's work
    std::array<int64_t, kQueues> behind;
    const char* begin;
    const char* end;
    bool is_write;
    double start, finish;  ///< seconds
  };

  double up_bandwidth = 50e9, down_bandwidth = 50e9;  ///< bytes a second
  int64_t fails_at = -1;                              ///< the number of the call that fails; -1: none
  bool keeps_failing = false;
  int64_t calls = 0;
  std::vector<Access> accesses;

  Status copy_up(void* device, const void* host, int64_t bytes) override {
    if (fails()) return failure("copy_up");
    const double seconds = static_cast<double>(bytes) / up_bandwidth;
    run(0, seconds, {{host, bytes, false}, {device, bytes, true}});
    std::memcpy(device, host, static_cast<size_t>(bytes));
    return Status::ok();
  }
  Status copy_down(void* host, const void* device, int64_t bytes) override {
    if (fails()) return failure("copy_down");
    const double seconds = static_cast<double>(bytes) / down_bandwidth;
    run(2, seconds, {{device, bytes, false}, {host, bytes, true}});
    std::memcpy(host, device, static_cast<size_t>(bytes));
    return Status::ok();
  }
  Status make_event(int64_t* event) override {
    if (fails()) return failure("make_event");
    *event = static_cast<int64_t>(events_.size());
    events_.emplace_back();
    return Status::ok();
  }
  Status record(int64_t event, OffloadQueue queue) override {
    if (fails()) return failure("record");
    const size_t at = index(queue);
    Event& one = events_.at(static_cast<size_t>(event));
    one.time = queues_[at].time;
    one.behind = queues_[at].behind;
    return Status::ok();
  }
  Status wait(OffloadQueue queue, int64_t event) override {
    if (fails()) return failure("wait");
    Queue& one = queues_[index(queue)];
    const Event& other = events_.at(static_cast<size_t>(event));
    one.time = std::max(one.time, other.time);
    for (size_t q = 0; q < kQueues; ++q) one.behind[q] = std::max(one.behind[q], other.behind[q]);
    return Status::ok();
  }
  Status synchronize(int64_t event) override {
    if (fails()) return failure("synchronize");
    const Event& one = events_.at(static_cast<size_t>(event));
    for (size_t q = 0; q < kQueues; ++q) host_behind_[q] = std::max(host_behind_[q], one.behind[q]);
    return Status::ok();
  }
  void* step_stream() const override { return reinterpret_cast<void*>(uintptr_t{on_second_stream}); }

  /// A step of `bytes` at `device` that takes `seconds`.
  void step(void* device, int64_t bytes, double seconds, const std::function<void()>& body) {
    run(index(OffloadQueue::kStep), seconds, {{device, bytes, true}});
    body();
  }
  /// Other work of the step queue.
  void compute(double seconds) { run(index(OffloadQueue::kStep), seconds, {}); }
  /// When everything is done.
  double end() const { return std::max({queues_[0].time, queues_[1].time, queues_[2].time, queues_[3].time}); }
  double time_of(OffloadQueue queue) const { return queues_[static_cast<size_t>(queue)].time; }
  /// Whether the host knows that all copies in a direction are done.
  bool host_knows_all_up() const { return host_behind_[0] >= queues_[0].number; }
  bool host_knows_all_down() const { return host_behind_[2] >= queues_[2].number; }

  /// The races, in words; empty: there is none.
  std::string races() const {
    for (size_t i = 0; i < accesses.size(); ++i) {
      for (size_t k = i + 1; k < accesses.size(); ++k) {
        const Access &a = accesses[i], &b = accesses[k];
        if (a.queue == b.queue || (!a.is_write && !b.is_write) || a.begin >= b.end || b.begin >= a.end) continue;
        const bool ordered =
            b.behind[static_cast<size_t>(a.queue)] >= a.number || a.behind[static_cast<size_t>(b.queue)] >= b.number;
        if (!ordered) {
          return "work " + std::to_string(a.number) + " of queue " + std::to_string(a.queue) + " and work " +
                 std::to_string(b.number) + " of queue " + std::to_string(b.queue) + " share memory";
        }
      }
    }
    return {};
  }

  bool on_second_stream = false;

 private:
  struct Range {
    const void* begin;
    int64_t bytes;
    bool is_write;
  };
  struct Queue {
    double time = 0.0;
    int64_t number = 0;
    std::array<int64_t, kQueues> behind{};
  };
  struct Event {
    double time = 0.0;
    std::array<int64_t, kQueues> behind{};
  };

  size_t index(OffloadQueue queue) const {
    return queue == OffloadQueue::kStep && on_second_stream ? 3 : static_cast<size_t>(queue);
  }
  bool fails() {
    const int64_t call = calls++;
    return fails_at >= 0 && (call == fails_at || (keeps_failing && call > fails_at));
  }
  static Status failure(const char* what) { return Status::device_error(std::string(what) + " fails, as asked"); }

  void run(size_t at, double seconds, const std::vector<Range>& ranges) {
    Queue& queue = queues_[at];
    const double start = queue.time;
    queue.time += seconds;
    // What the host has waited for was done before it asked for this.
    for (size_t q = 0; q < kQueues; ++q) queue.behind[q] = std::max(queue.behind[q], host_behind_[q]);
    queue.behind[at] = ++queue.number;
    for (const Range& range : ranges) {
      const auto* const begin = static_cast<const char*>(range.begin);
      accesses.push_back({static_cast<int>(at), queue.number, queue.behind, begin, begin + range.bytes, range.is_write,
                          start, queue.time});
    }
  }

  std::array<Queue, kQueues> queues_;
  std::array<int64_t, kQueues> host_behind_{};
  std::vector<Event> events_;
};

/// The same on three threads, one a queue: what is not ordered really runs at once, where ThreadSanitizer sees it.
class ThreadedDevice : public OffloadDevice {
 public:
  ThreadedDevice() {
    for (size_t q = 0; q < 3; ++q) threads_[q] = std::thread([this, q] { work(q); });
  }
  ~ThreadedDevice() override {
    {
      const std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Status copy_up(void* device, const void* host, int64_t bytes) override {
    push(0, [=] { std::memcpy(device, host, static_cast<size_t>(bytes)); });
    return Status::ok();
  }
  Status copy_down(void* host, const void* device, int64_t bytes) override {
    push(2, [=] { std::memcpy(host, device, static_cast<size_t>(bytes)); });
    return Status::ok();
  }
  Status make_event(int64_t* event) override {
    const std::lock_guard lock(mutex_);
    *event = events_++;
    return Status::ok();
  }
  Status record(int64_t event, OffloadQueue queue) override {
    const std::lock_guard lock(mutex_);
    recorded_[event] = {static_cast<size_t>(queue), pushed_[static_cast<size_t>(queue)]};
    return Status::ok();
  }
  Status wait(OffloadQueue queue, int64_t event) override {
    const auto mark = mark_of(event);
    push(static_cast<size_t>(queue), [this, mark] { wait_for(mark); });
    return Status::ok();
  }
  Status synchronize(int64_t event) override {
    wait_for(mark_of(event));
    return Status::ok();
  }
  void* step_stream() const override { return nullptr; }

  void step(std::function<void()> body) { push(1, std::move(body)); }

 private:
  struct Mark {
    size_t queue = 0;
    int64_t number = 0;
  };

  Mark mark_of(int64_t event) {
    const std::lock_guard lock(mutex_);
    return recorded_[event];
  }
  void push(size_t queue, std::function<void()> body) {
    {
      const std::lock_guard lock(mutex_);
      todo_[queue].push_back(std::move(body));
      ++pushed_[queue];
    }
    changed_.notify_all();
  }
  void wait_for(const Mark& mark) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return done_[mark.queue] >= mark.number; });
  }
  void work(size_t queue) {
    for (;;) {
      std::function<void()> body;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return is_over_ || !todo_[queue].empty(); });
        if (todo_[queue].empty()) return;
        body = std::move(todo_[queue].front());
        todo_[queue].pop_front();
      }
      body();
      {
        const std::lock_guard lock(mutex_);
        ++done_[queue];
      }
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::array<std::deque<std::function<void()>>, 3> todo_;
  std::array<int64_t, 3> pushed_{}, done_{};
  std::map<int64_t, Mark> recorded_;
  int64_t events_ = 0;
  bool is_over_ = false;
  std::array<std::thread, 3> threads_;
};

}  // namespace flashoptim::testing
