// Parameters and what is stored for them: records, and the library's plans over them.
//
// A store holds addresses, never tensors: memory belongs to whoever owns the tensors, and is free the moment they let
// go of it. So a front end looks at every tensor at every step, tells the store where it is now (describe(), where
// anything is not as it was), and steps before anybody else can move it. The looking is the front ends' (a Python dict
// or a C++ map holds the tensors); what there is to compare, and everything that follows from a change, is here.
//
//   for every record:   if (!record.is_parameter(facts) || ...) store.describe(...);
//   store.begin();      store.take(i, gradient, steps);  ...  store.step(groups, controls);
//
// Bad arguments throw std::runtime_error and change nothing. One thread uses a store at a time.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "libtorch/store/arrays.h"
#include "libtorch/store/device_plan.h"
#include "libtorch/store/format.h"
#include "libtorch/store/offload.h"

namespace flashoptim::store {

/// How a parameter is to be kept, as its group's options and the parameter itself say.
struct RecordOptions {
  int64_t group = 0;
  Format format;
  bool has_momentum = true;
  DType gradient_dtype = DType::kFloat32;
  /// The tensor is a copy for one step, of a parameter that lies otherwise than its state.
  bool is_copy = false;
  /// States and correction are on the host, in host_arrays()' memory, wherever the parameter is.
  bool is_offloaded = false;
  /// Where the local tensor lies in the whole; as it stands for a tensor that is the whole.
  Shard shard;
};

/// One parameter with what is stored for it: its local tensor, as it was when it was described.
class Record {
 public:
  bool is_known() const { return is_known_; }
  const RecordOptions& options() const { return options_; }
  const ParameterTensors& tensors() const { return tensors_; }
  Device device() const { return device_; }
  Backend backend() const { return backend_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }

  // Whether a tensor is the one that was described: address, dtype, sizes and order of elements, and a storage that
  // holds it. (Whoever resizes a storage moves it, mostly; freed and taken anew, a smaller one may come to the same
  // address.)
  bool is_parameter(const Facts& facts) const {
    return facts.data == tensors_.parameter && facts.storage >= storage_ && fits(facts, dtype_);
  }
  bool is_state(int slot, const Facts& facts) const {
    return facts.data == tensors_.states[slot] && facts.storage >= state_storages_[slot] &&
           fits(facts, state_dtypes_[slot]);
  }
  bool is_scale(int slot, const Facts& facts) const {
    return facts.data == tensors_.scales[slot] && facts.storage >= scale_storages_[slot] && fits_scale(facts, slot);
  }
  bool is_correction(const Facts& facts) const {
    return facts.data == tensors_.correction && facts.storage >= correction_storage_ && fits(facts, correction_dtype_);
  }
  /// Whether a gradient can be taken as it lies: any address. (Its storage is looked at with is_in_storage().)
  bool takes_gradient(const Facts& facts, Device device) const {
    return device == device_ && fits(facts, gradient_dtype_);
  }

 private:
  friend class Store;
  bool fits(const Facts& facts, int32_t dtype) const;
  bool fits_scale(const Facts& facts, int slot) const;

  // What every step reads stands together, first.
  bool is_known_ = false;
  bool is_apart_ = false;  // from the arrays of the records that it was stepped with, as far as it has not moved since
  bool was_stepped_alone_ = false;
  int32_t plan_ = -1, index_ = -1;  // of the plan that it is in; -1: none yet
  RecordOptions options_;
  ParameterTensors tensors_;
  Device device_;
  Backend backend_ = Backend::kCpu;
  std::vector<int64_t> sizes_, strides_;
  int32_t dtype_ = 0, gradient_dtype_ = 0, correction_dtype_ = -1;
  int32_t state_dtypes_[kMaxSlots] = {}, scale_dtypes_[kMaxSlots] = {};
  // Bytes of storage that each needs.
  int64_t storage_ = 0, correction_storage_ = 0, state_storages_[kMaxSlots] = {}, scale_storages_[kMaxSlots] = {};
  int64_t touched_ = -1;  // when it was stepped alone, among the others
};

/// Steps that a parameter has taken: a number of the host's, or, where it is not null, an int64 on the parameter's
/// device, which the step itself counts up.
struct StepCount {
  int64_t taken = 0;
  int64_t* on_device = nullptr;
  auto operator<=>(const StepCount&) const = default;
};

/// What a step takes beside gradients, of one plan. Pointers are to memory of the plan's device, or null.
struct Controls {
  float gradient_scale = 1.0f;
  const float* gradient_divisor = nullptr;
  const float* clip_coefficient = nullptr;
  const float* found_inf = nullptr;
  int64_t* nonfinite_gradients = nullptr;
  StepTelemetry* telemetry = nullptr;  ///< one for each of the plan's records, or null
  int64_t telemetry_stride = 1;
};

/// A group's hyperparameters; `step` is filled in for each parameter.
struct GroupHyperparameters {
  Hyperparameters values;
  const float* lr = nullptr;  ///< on the device: read by the step in place of values.lr
};

class Store {
 public:
  explicit Store(OptimizerKind optimizer);
  ~Store();

  OptimizerKind optimizer() const { return optimizer_; }
  int64_t size() const { return static_cast<int64_t>(records_.size()); }
  const Record& record(int64_t index) const { return records_[static_cast<size_t>(index)]; }

  /// `count` records, none of them known.
  void reset(int64_t count);
  /// The ring that offloaded states stream through, from the next plan on.
  void set_ring(const RingOptions& ring) { ring_ = ring; }

  /// What record `index` is from now on, checked. `stored` lies as the parameter does; `name` stands for the parameter
  /// in messages. Where only addresses are new, plans stay.
  void describe(Op op, int64_t index, const std::string& name, const RecordOptions& options, AtenTensorHandle param,
                const StateTensors& stored, AtenTensorHandle correction);
  void forget(int64_t index);

  /// Makes plans for what is new: one for each device and number of slots. True where any plan has changed.
  bool plan(Op op);
  /// Records of the plan that record `index` is in; 1, of its own, where there is none yet.
  size_t plan_size(int64_t index) const;
  bool is_planned(int64_t index) const { return record(index).plan_ >= 0; }
  /// -1: none.
  int64_t plan_of(int64_t index) const { return record(index).plan_; }
  /// Whether plans hold records that have been forgotten or described otherwise since.
  bool is_stale() const { return is_stale_; }
  int64_t plans() const { return static_cast<int64_t>(plans_.size()); }
  struct PlanView {
    Device device;
    Backend backend;
    const std::vector<int64_t>& records;
  };
  PlanView plan_view(int64_t plan) const;

  /// Begins a step, in which no record takes part yet.
  void begin();
  /// Record `index`, known and planned, takes part with this gradient.
  void take(int64_t index, const void* gradient, StepCount count);
  int64_t taken() const { return taken_; }
  /// The plan of everything that was taken; throws where there are several.
  int64_t only_plan(Op op) const;

  /// The host's memory of an offloaded record was written by others since it was copied to the device.
  void drop(int64_t index);
  /// A pass over offloaded states is over: what was stepped goes home.
  void flush(Op op);
  /// The same, and the host waits until everything is home: state tensors hold what the last step left.
  void synchronize(Op op);
  /// What has been copied for offloaded states since the plans were made.
  OffloadCounts offload_counts() const;
  /// Records of which the last step() or step_one() has stepped all, also where it has failed.
  const std::vector<int64_t>& stepped() const { return stepped_; }

  /// Steps what was taken; `groups` has one entry a group, `controls` one a plan. All plans are checked before one
  /// changes anything, and that no two arrays share memory: among what was taken, for others may be gone by now.
  void step(Op op, const std::vector<GroupHyperparameters>& groups, const std::vector<Controls>& controls);
  /// Whether a record that is stepped alone should be planned first. New parameters come one after the other in the
  /// first backward pass, and planning all at each would cost the square of their number: so a record is first stepped
  /// by a plan of its own, and all are planned when one comes again.
  bool wants_plan(int64_t index) const { return !is_planned(index) && record(index).was_stepped_alone_; }
  /// One record alone, whether planned or not, at a cost that does not depend on the number of records.
  void step_one(Op op, int64_t index, const void* gradient, StepCount count, const GroupHyperparameters& group,
                const Controls& controls);
  /// Norm of the gradients taken, of one plan, to memory of its device.
  void gradient_norm(Op op, int64_t plan, float gradient_scale, const float* gradient_divisor, float max_norm,
                     cuda::GradientNorm* result);

 private:
  struct Set {
    int64_t group;
    StepCount count;
    auto operator<=>(const Set&) const = default;
  };
  /// Records of one device and number of slots, and the step at hand.
  struct Planned {
    Device device;
    Backend backend;
    bool has_momentum;
    DevicePlan plan;
    std::vector<int64_t> records;
    std::vector<const void*> gradients;  // one per record
    std::vector<int32_t> hyper_index;    // the same, as the plan has them
    std::vector<Set> sets;               // one hyperparameter set each
    std::map<Set, int32_t> places;       // among them
    int64_t taken = 0;
    std::unique_ptr<Offload> offload;  // of the offloaded ones; null: there are none
  };

  std::unique_ptr<Offload> make_offload(Op op, const Planned& planned) const;
  void step_offloaded(Op op, Planned& planned, std::vector<Hyperparameters>& hypers, const StepControls& controls);
  void step_one_offloaded(Op op, int64_t index, const void* gradient, StepCount count,
                          const GroupHyperparameters& group, const Controls& controls);
  static int32_t place_of(Planned& planned, const Set& set);
  void check_moved(Op op);
  void fill_in(const Planned& planned, const std::vector<GroupHyperparameters>& groups, const Controls& controls,
               std::vector<Hyperparameters>* hypers, StepControls* step) const;

  OptimizerKind optimizer_;
  std::vector<Record> records_;
  std::vector<std::unique_ptr<Planned>> plans_;
  bool is_stale_ = false;   // there are known records in no plan, or plans of records that have changed
  bool has_moved_ = false;  // one that was taken has
  int64_t taken_ = 0;
  RingOptions ring_;
  std::vector<int64_t> stepped_;
  int64_t touches_ = 0;
};

}  // namespace flashoptim::store
