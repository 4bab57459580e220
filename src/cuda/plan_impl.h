// What cuda::Plan holds: the host's copy of the tensors, the tables on the device, and what these do not have yet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "flashoptim/cuda.h"
#include "src/cuda/arguments.h"
#include "src/cuda/device.h"
#include "src/cuda/tables.h"

namespace flashoptim::cuda {

/// What the device's table lacks of a tensor.
enum class Change : uint8_t { kNone, kGradient, kAll };

struct Plan::Impl {
  flashoptim::Plan tensors;  // checks and keeps the host's copy
  OptimizerKind optimizer;
  RuleKind rule;
  int32_t device = 0;
  PlanTables tables;

  // What steps look at again and again, side by side: `tensors` has a few cache lines for each.
  std::vector<const void*> gradients;
  int32_t used_hypers = -1;  // sets 0 ... used_hypers - 1 are used by a tensor with a gradient; -1: to be counted

  // Between these, what tables.entries lacks; nothing outside.
  std::vector<Change> changes;
  int64_t dirty_begin = 0, dirty_end = 0;
  bool only_gradients = true;

  // For step_some(): the tensors that it steps, and in which call each was named and each set of hyperparameters used.
  std::vector<int64_t> some;
  std::vector<uint64_t> named_in, used_in;
  uint64_t calls = 0;

  void mark_changed(int64_t index, Change change) {
    Change& kept = changes[static_cast<size_t>(index)];
    kept = std::max(kept, change);
    only_gradients = only_gradients && change == Change::kGradient;
    dirty_begin = dirty_begin == dirty_end ? index : std::min(dirty_begin, index);
    dirty_end = std::max(dirty_end, index + 1);
  }

  /// After a change of the host's copy.
  void set_kept_gradient(int64_t index, const void* gradient) {
    const void*& kept = gradients[static_cast<size_t>(index)];
    if ((kept == nullptr) != (gradient == nullptr)) used_hypers = -1;
    kept = gradient;
  }

  Status set_gradient(int64_t index, const void* gradient) {
    if (index >= 0 && index < tensors.size() && gradients[static_cast<size_t>(index)] == gradient) return Status::ok();
    const Status status = tensors.set_gradient(index, gradient);
    if (!status.is_ok()) return status;
    set_kept_gradient(index, gradient);
    mark_changed(index, Change::kGradient);
    return status;
  }

  /// What step(), inspect() and check_step() say about their arguments; sets 0 ... *used - 1 are read.
  Status check(const Hyperparameters* given, int64_t count, const StepOptions& options, int32_t* used) const;
  Status check_set(const Hyperparameters* given, int64_t index, const StepOptions& options) const;
  Status check_some(const int64_t* indices, int64_t count, const Hyperparameters* given, int64_t hyper_count,
                    const StepOptions& options);

  /// Brings the table that launches to `target` read up to date: *entries.
  Status upload(LaunchTarget target, void* stream, const TensorEntry** entries);
  /// The same for tensors of `some` alone.
  Status upload_some(LaunchTarget target, void* stream, const TensorEntry** entries);
  template <int capacity>
  Status upload_gradients(void* stream) const;
  /// Entries of the tensors that next(&index) gives, until it returns false.
  template <int capacity, class Next>
  Status upload_entries(TensorEntry* to, void* stream, Next next) const;
  template <class Next>
  Status upload_entries(TensorEntry* to, void* stream, Next next) const;

  PreparedHyper prepared(const Hyperparameters& given, const StepOptions& options) const;
  /// given[begin ... end - 1] to tables.hypers[at] and behind.
  Status prepare_on_device(const Hyperparameters* given, int64_t begin, int64_t end, const StepOptions& options,
                           int64_t at, float* updates) const;

  StepArguments step_arguments(const TensorEntry* entries, bool on_device, const StepOptions& options) const;
  /// A launch over chunks that all are `function`'s, or a few, where they are very many.
  Status launch(const Launch& what, StepArguments* args, void* stream) const;
  Status step(const Hyperparameters* given, int32_t used, const StepOptions& options);
  Status step_runs(const Hyperparameters* given, const StepOptions& options, LaunchTarget target);
  Status step_singles(const Hyperparameters* given, const StepOptions& options);
  Status step_some(const Hyperparameters* given, const StepOptions& options);

  const TensorWork& work_of(int64_t index) const { return tables.works[static_cast<size_t>(index)]; }
  /// Whether some[i]'s chunks go on where some[i - 1]'s end, in the same kernel.
  bool continues(size_t i) const {
    const TensorWork &before = work_of(some[i - 1]), &now = work_of(some[i]);
    return before.function == now.function && before.first_chunk + before.chunks == now.first_chunk;
  }
};

}  // namespace flashoptim::cuda
