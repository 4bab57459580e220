// The offloaded states of one plan: on the host between steps, in slots on the device where the plan's kernels step
// them. What does not fit into a slot is stepped in pieces, each with its place in the whole, so that the bits are
// those of a state that stays on the device.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "flashoptim/offload.h"
#include "libtorch/store/device_plan.h"
#include "libtorch/store/tensor.h"

namespace flashoptim::store {

/// The ring that states stream through.
struct RingOptions {
  int64_t slot_bytes = int64_t{64} << 20;
  int64_t slots = 16;
  bool is_simulated = false;  ///< parameters on the CPU, for tests
};

/// A record and its arrays: the parameter on the device, the others on the host.
struct OffloadedRecord {
  int64_t record;
  ParameterTensors tensors;
};

/// One that steps.
struct OffloadedStep {
  int64_t record;
  const void* gradient;
  int32_t hyper_index;
};

class Offload {
 public:
  /// Throws where plan or ring cannot be made. `hyper_sets`: how many sets of hyperparameters a step may have.
  Offload(Op op, Backend backend, Device device, OptimizerKind optimizer, bool has_momentum, int64_t hyper_sets,
          const std::vector<OffloadedRecord>& records, const RingOptions& options);
  Offload(const Offload&) = delete;
  Offload& operator=(const Offload&) = delete;
  /// Waits until everything is home.
  ~Offload();

  /// Where a record's arrays are from now on.
  void move(int64_t record, const ParameterTensors& tensors);
  /// The order in which records are expected to be stepped one by one, until another is seen.
  void expect(const std::vector<int64_t>& records);
  /// The host's memory of a record was written by others.
  void drop(int64_t record);

  /// Steps records, of which each is known: all at once, or `is_alone` one of several that come one by one. Those that
  /// were stepped are put behind *done, also where it fails; one that was stepped in part goes on there when it comes
  /// again. `controls` count no steps: see DevicePlan::count().
  Status step(const std::vector<OffloadedStep>& taken, bool is_alone, std::vector<Hyperparameters>& hypers,
              const StepControls& controls, std::vector<int64_t>* done);

  /// A pass is over; everything that was stepped goes home.
  Status flush();
  /// And the host waits for it; what it then writes is what the next step reads.
  Status synchronize();
  const OffloadCounts& counts() const { return ring_.counts(); }
  int64_t units() const { return ring_.units(); }
  DevicePlan& plan() { return plan_; }

 private:
  /// Elements that follow each other, of one record, and where their arrays are in the slot; -1: it has none.
  struct Piece {
    int64_t record = 0, first = 0;
    ParameterTensors tensors;  // on the host
    int64_t unit = 0, part = 0;
    int64_t states_at[kMaxSlots], scales_at[kMaxSlots], correction_at = -1;
  };
  struct Known {
    std::vector<int64_t> pieces;
    size_t stepped = 0;  // of them, in a step that failed
  };

  /// A piece as it is stepped: its states and corrections in a slot.
  static ParameterTensors in_slot(const Piece& piece, void* slot);
  void cut(const OffloadedRecord& record, int64_t slot_bytes, std::vector<Piece>* pieces) const;
  int64_t place(Piece* piece, int64_t offset, std::vector<OffloadCopy>* copies, bool may_join) const;
  void use_stream();

  Backend backend_;
  Device device_;
  std::unique_ptr<OffloadDevice> copies_;
  std::set<std::shared_ptr<void>> host_;  // copies may be on their way to it when its tensors go
  Tensor memory_;
  OffloadRing ring_;
  DevicePlan plan_;
  std::vector<Piece> pieces_;
  std::map<int64_t, Known> records_;
};

/// Bytes of a record's arrays on the host, without what is between them.
int64_t offloaded_bytes(const ParameterTensors& tensors);

}  // namespace flashoptim::store
