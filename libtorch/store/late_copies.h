// A device for offloaded states on the CPU, for tests: "device" memory is the host's, and every copy is made as late as
// what was asked for allows, so that a wait that is missing is seen.
#pragma once

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "flashoptim/offload.h"

namespace flashoptim::store {

/// Steps run when they are called; copies when a step or the host waits for them.
class LateCopies final : public OffloadDevice {
 public:
  Status copy_up(void* device, const void* host, int64_t bytes) override {
    queue(OffloadQueue::kUp).work.push_back({device, host, bytes, {}});
    return Status::ok();
  }
  Status copy_down(void* host, const void* device, int64_t bytes) override {
    queue(OffloadQueue::kDown).work.push_back({host, device, bytes, {}});
    return Status::ok();
  }
  Status make_event(int64_t* event) override {
    *event = static_cast<int64_t>(events_.size());
    events_.emplace_back();
    return Status::ok();
  }
  Status record(int64_t event, OffloadQueue on) override {
    Queue& one = queue(on);
    events_[static_cast<size_t>(event)] = {on, one.done + static_cast<int64_t>(one.work.size())};
    return Status::ok();
  }
  Status wait(OffloadQueue on, int64_t event) override {
    const Mark mark = events_[static_cast<size_t>(event)];
    if (on == OffloadQueue::kStep) {
      run_to(mark);
    } else {
      queue(on).work.push_back({nullptr, nullptr, 0, mark});
    }
    return Status::ok();
  }
  Status synchronize(int64_t event) override {
    run_to(events_[static_cast<size_t>(event)]);
    return Status::ok();
  }
  void* step_stream() const override { return nullptr; }

 private:
  struct Mark {
    OffloadQueue queue = OffloadQueue::kStep;
    int64_t count = 0;
  };
  struct Work {
    void* to;
    const void* from;
    int64_t bytes;
    Mark behind;  // of a wait
  };
  struct Queue {
    std::deque<Work> work;
    int64_t done = 0;
  };

  Queue& queue(OffloadQueue which) { return queues_[static_cast<size_t>(which)]; }
  void run_to(const Mark& mark) {
    Queue& one = queue(mark.queue);
    while (one.done < mark.count && !one.work.empty()) {
      const Work work = one.work.front();
      one.work.pop_front();
      ++one.done;
      if (work.to == nullptr) {
        run_to(work.behind);
      } else {
        std::memcpy(work.to, work.from, static_cast<size_t>(work.bytes));
      }
    }
  }

  Queue queues_[3];
  std::vector<Mark> events_;
};

}  // namespace flashoptim::store
