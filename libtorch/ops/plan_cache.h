// Plans that step_ made, kept for the next call with the same tensors.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "libtorch/ops/device_plan.h"

namespace flashoptim::ops {

/// A bounded set of plans, the least recently used given up first. A plan is out of the set while a call steps it, so
/// that two threads never share one. What a plan points at may be long gone: it is used only for a call that brings the
/// same addresses, which are alive then.
class PlanCache {
 public:
  struct Entry {
    uint64_t hash;
    OptimizerKind optimizer;
    bool has_momentum;
    DevicePlan plan;
  };

  /// The process's cache.
  static PlanCache& instance();

  /// Takes out the plan over exactly these tensors, whatever their gradients and hyperparameter indices; null if there
  /// is none.
  std::unique_ptr<Entry> take(OptimizerKind optimizer, bool has_momentum, const std::vector<ParameterTensors>& tensors);
  /// Puts a plan in (again).
  void put(std::unique_ptr<Entry> entry);

  static uint64_t hash(OptimizerKind optimizer, bool has_momentum, const std::vector<ParameterTensors>& tensors);

 private:
  struct Slot {
    std::unique_ptr<Entry> entry;
    uint64_t last_use;
  };

  /// Gradient release steps one tensor at a time, so a model may need a plan per tensor.
  static constexpr size_t kMaxPlans = 1024;

  std::mutex mutex_;
  std::unordered_multimap<uint64_t, Slot> slots_;
  uint64_t uses_ = 0;
};

}  // namespace flashoptim::ops
