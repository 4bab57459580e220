// A store for Python's optimizers: tensors are in `optimizer.state`, a dict of dicts by parameter, and a step looks at
// every one of them.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "libtorch/ops/python_objects.h"
#include "libtorch/ops/tensor_layout.h"
#include "libtorch/store/store.h"

namespace flashoptim::ops {

/// Counts a tensor's version up where it stands; false: torch must be asked to.
bool bump_version_of(PyObject* tensor);

class PythonStore {
 public:
  explicit PythonStore(OptimizerKind optimizer);

  /// The store of a capsule that new_capsule() made.
  static PythonStore& of(PyObject* capsule);
  static PyObject* new_capsule(OptimizerKind optimizer);

  /// For the length of a call. Throws where another thread is in one: threads must not share an optimizer unguarded.
  std::unique_lock<std::mutex> lock();

  store::Store& store() { return store_; }
  int64_t size() const { return static_cast<int64_t>(params_.size()); }

  /// `params`, a list of tensors, are the records from now on, none of them known.
  void reset(PyObject* params);
  void forget(int64_t index);

  /// What record `index` is: `param` its dense local tensor, `state` the dict of its tensors.
  void describe(Op op, int64_t index, const std::string& name, const store::RecordOptions& options, PyObject* param,
                PyObject* state);

  /// What a step over all parameters with a gradient finds. Objects are borrowed from containers that Python's lock
  /// keeps as they are, or held here.
  struct Step {
    std::vector<int64_t> needs;     ///< records to describe (or gradients to copy) first: nothing was taken then
    std::vector<int64_t> stepped;   ///< the records that were taken
    std::vector<PyObject*> states;  ///< their dicts; null where steps are counted on the device
    std::vector<int64_t> counts;    ///< steps they had taken
    std::vector<Reference> held;    ///< gradients, and all else where the lock is given up
  };
  /// Among a step's needs: plan() first; give parameters that sit out step counters of their own first.
  static constexpr int64_t kPlanFirst = -1, kUnshareCounters = -2;
  /// Looks at everything and takes it into the store. state: optimizer.state; staged: None, or a dict from record to a
  /// pair of tensors (or None) to use in the places of parameter and gradient; counts_on_device: steps must be counted
  /// by tensors.
  Step look(PyObject* state, PyObject* staged, bool counts_on_device);
  /// The same for one record, whose state is given; nothing is taken. False: describe it first.
  struct One {
    const void* gradient = nullptr;
    store::StepCount count;
    Reference held_gradient;
    std::vector<Reference> held;
  };
  bool look_at(int64_t index, PyObject* state, PyObject* staged, One* one);

  /// Copies a staged parameter, the first of `pair` (null: none), back to where it belongs.
  void copy_back(int64_t index, PyObject* pair);
  void copy_back(const Step& step, PyObject* staged);
  /// Leaves those in a step that the store has stepped: one that failed on the way, over offloaded states.
  void keep_stepped(Step* step) const;
  /// Sets the host's step counts in the dicts of what was stepped.
  void count(const Step& step);
  void count_one(int64_t index, PyObject* state, store::StepCount count);
  /// Tells autograd that parameters have changed: the store writes behind its back.
  void bump_versions(const std::vector<int64_t>& records) const;
  /// Steps that were done: an interrupt right behind one must not be taken for its failure.
  int64_t steps() const { return steps_; }

  /// Records that a plan has, and whether it is on the CPU: its step then gives up Python's lock.
  bool has_cpu_plan() const;

 private:
  enum class EntryKind : uint8_t { kOther, kStep, kState, kScale, kCorrection };
  /// One entry of a state's dict, in the dict's order.
  struct Entry {
    Reference key;
    EntryKind kind;
    int slot;
  };
  using Entries = std::vector<Entry>;
  /// What a look reads of a record beside its traces; as it stands where the record is not known.
  struct Row {
    const Entries* entries = nullptr;  // owned by entries_
    int64_t gradient_numel = 0;
    int32_t slots = 0, gradient_element_size = 0;
    bool is_offloaded = false;
    int64_t versions = -1;  // of the state's tensors, together: of offloaded ones
  };
  /// Of each record, in this order: parameter, gradient, correction, then a state and its scale for each slot.
  enum : size_t { kParam, kGradient, kCorrection, kFirstSlot };
  enum class InPlace : uint8_t { kNone, kTaken, kUnlike };

  std::shared_ptr<const Entries> entries_of(PyObject* state);
  /// What a record's tensors were when it was last looked at in full (tensor_layout.h).
  Trace* traces_of(int64_t index) { return traces_.data() + static_cast<size_t>(index) * traces_per_record_; }
  const Trace* traces_of(int64_t index) const {
    return traces_.data() + static_cast<size_t>(index) * traces_per_record_;
  }
  static size_t trace_of(const Entry& entry);
  /// Whether a state's dict holds what the record was described with; its step count. Holds the values where asked.
  bool is_current(int64_t index, PyObject* state, store::StepCount* count, std::vector<Reference>* held);
  /// Drops copies of an offloaded state that were made before somebody wrote to its tensors.
  void look_at_versions(int64_t index, PyObject* state);
  bool is_parameter(int64_t index, PyObject* object);
  bool take_gradient(int64_t index, PyObject* object, const void** address);
  /// The implementation of a parameter's gradient, without its Python object: null where there is none, the
  /// parameter's own where torch is to be asked.
  const void* gradient_of(int64_t index) const;
  InPlace gradient_in_place(int64_t index, const void** address) const;
  void prefetch(size_t record) const;
  struct Sight;
  void look_once(Sight* sight, PyObject* state, PyObject* staged, bool counts_on_device, Step* step);
  bool read_count(int64_t index, PyObject* value, store::StepCount* count) const;
  void match_states(PyObject* state, std::vector<PyObject*>* states);
  void set_count(int64_t index, PyObject* state, PyObject* value);

  store::Store store_;
  std::mutex mutex_;
  std::vector<Reference> params_;
  std::unordered_map<PyObject*, int64_t> index_;
  std::vector<std::shared_ptr<const Entries>> entries_;        // of each record
  std::vector<std::shared_ptr<const Entries>> known_entries_;  // each kind once
  std::vector<Row> rows_;                                      // of each record
  std::vector<Trace> traces_;                                  // traces_per_record_ of each record
  size_t traces_per_record_;
  TensorKinds kinds_;           // of the traces
  bool has_wrappers_ = false;   // among the parameters
  std::vector<int64_t> order_;  // records of optimizer.state's entries, as last seen
  int64_t steps_ = 0;
};

}  // namespace flashoptim::ops
