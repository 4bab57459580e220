// States that live on the host and stream through a ring of slots on the device: the schedule of the copies.
//
// What belongs together is a unit: arrays on the host that fit into one slot, copied up as one, stepped there (all at
// once, or part by part as gradients come) and copied down as one. The ring learns in which order units are used, and
// brings up those that come next while the ones before them are stepped. It only says what is to wait for what; the
// device does the copies, on two queues of its own beside the one that steps, and the host waits for nothing but in
// synchronize().
//
//   OffloadRing ring(device, memory, slot_bytes, slots);
//   const int64_t unit = ring.add({{host, 0, bytes}}, 1);
//   status = ring.open(unit, &slot);          // the step queue will find the unit at `slot`
//   ... a step of what is there, on the step queue ...
//   status = ring.close(unit, 0);             // comes down, and others come up
//   status = ring.synchronize();              // everything is home
//
// A call that fails leaves a ring that can go on: what was stepped and is not home yet stays in its slot, and comes
// down by a later call. One thread uses a ring at a time. No CUDA and no torch here: the order of the copies is tested
// with devices that are made of threads or of numbers alone (tests/kernels/offload_*_test.cpp).
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "flashoptim/types.h"

namespace flashoptim {

/// Work of one queue runs in the order in which it was given.
enum class OffloadQueue : int32_t { kUp = 0, kStep = 1, kDown = 2 };

/// What copies and waits. Calls say what is to be done and return; none but synchronize() waits.
class OffloadDevice {
 public:
  virtual ~OffloadDevice() = default;
  /// On the queue kUp and kDown.
  virtual Status copy_up(void* device, const void* host, int64_t bytes) = 0;
  virtual Status copy_down(void* host, const void* device, int64_t bytes) = 0;
  /// An event, by its number.
  virtual Status make_event(int64_t* event) = 0;
  /// The event comes when everything that `queue` was given so far is done; what it was recorded for before is
  /// forgotten.
  virtual Status record(int64_t event, OffloadQueue queue) = 0;
  /// What `queue` is given from now on waits for the event as it was last recorded.
  virtual Status wait(OffloadQueue queue, int64_t event) = 0;
  /// The host waits for it.
  virtual Status synchronize(int64_t event) = 0;
  /// Names the stream that kStep is at the moment: a ring that sees it change orders the two.
  virtual void* step_stream() const = 0;
};

/// A stretch of the host's memory and its place in a slot.
struct OffloadCopy {
  void* host = nullptr;
  int64_t offset = 0;
  int64_t bytes = 0;
};

/// What has been copied so far.
struct OffloadCounts {
  int64_t up_bytes = 0, down_bytes = 0;
  int64_t up_copies = 0, down_copies = 0;
  int64_t prefetched = 0;  ///< units that were up, or on their way, when they were opened
  int64_t fetched = 0;     ///< units that were not
};

class OffloadRing {
 public:
  /// `memory`: slots * slot_bytes on the device, that the step queue may use; at least two slots. Both outlive the
  /// ring.
  static Status make(OffloadDevice* device, void* memory, int64_t slot_bytes, int64_t slots, OffloadRing* ring);

  /// A new unit, of `parts` that are stepped one by one; its number. Before any is known to come first, units are taken
  /// to be used from the last to the first, as backward() reaches parameters.
  int64_t add(std::vector<OffloadCopy> copies, int64_t parts);
  /// The order in which units will be used, as far as it has not been learned.
  void expect(const std::vector<int64_t>& units);

  /// Sees to it that the step queue finds the unit at *slot, and that units which are used next are on their way.
  Status open(int64_t unit, void** slot);
  /// Behind the step of one part of an open unit, or of all parts (-1). The unit goes down when every part has been
  /// stepped that was in the pass before. The step counts whatever this returns.
  Status close(int64_t unit, int64_t part);
  /// Nothing was stepped between open() and here.
  void cancel(int64_t unit);

  /// A pass is over: what has been stepped goes down, whether or not parts are missing.
  Status flush();
  /// The same, and the host waits until everything is home and no copy is under way: afterwards nobody reads the units'
  /// memory or writes to the slots. Copies up are waited for even where those down fail.
  Status synchronize();
  /// The host's memory of a unit was written by others: a copy on the device is no longer it. (What has been stepped
  /// and is not home yet is lost: synchronize() before writing.)
  void drop(int64_t unit);
  void drop_all();

  int64_t units() const { return static_cast<int64_t>(units_.size()); }
  const OffloadCounts& counts() const { return counts_; }
  /// Whether something was stepped that may not be home yet.
  bool is_in_flight() const { return in_flight_; }

 private:
  struct Unit {
    std::vector<OffloadCopy> copies;
    std::vector<bool> seen;    // parts, in this pass
    int64_t count = 0;         // of them
    int64_t expected = 0;      // of them, as the last pass had it
    int64_t next = -1;         // the unit that was used behind this one
    bool has_learned = false;  // what is next
    int64_t slot = -1;         // where it is; -1: nowhere
    int64_t home_slot = -1;    // whose `down` says when the host's memory is up to date; -1: it is
    bool is_dirty = false;     // stepped and not down
  };
  struct Slot {
    int64_t up = -1, stepped = -1, down = -1;  // events
    int64_t unit = -1;
    bool is_marked = false;  // `stepped` has been recorded behind the last step
    bool has_down = false;   // `down` has been recorded
    void* stream = nullptr;  // of the last step
    uint64_t last_use = 0;
  };

  Status acquire(int64_t unit, int64_t* slot);
  Status upload(int64_t unit, int64_t slot);
  Status download(int64_t unit);
  Status prefetch(int64_t from);
  Status mark(Slot& slot);
  /// A slot whose unit is not among the next ones; -1: none.
  int64_t stale_slot(int64_t from) const;
  void release(int64_t slot);
  char* address(int64_t slot) const { return memory_ + slot * slot_bytes_; }

  OffloadDevice* device_ = nullptr;
  char* memory_ = nullptr;
  int64_t slot_bytes_ = 0;
  std::vector<Unit> units_;
  std::vector<Slot> slots_;
  std::deque<int64_t> free_;
  int64_t last_ = -1, open_ = -1;
  int64_t last_down_ = -1;  // the event of the last copy down
  bool in_flight_ = false;
  int64_t up_over_ = -1;       // an event, for the end of all copies up
  bool up_in_flight_ = false;  // there may be one that the host has not waited for
  uint64_t uses_ = 0;
  OffloadCounts counts_;
};

}  // namespace flashoptim
