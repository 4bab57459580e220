// Plans that callers hold: made once from all tensors, stepped with the gradients alone. A call with every list costs a
// handle per tensor and list in torch's stable ABI, which is more than the step of a small model.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "libtorch/ops/checks.h"
#include "libtorch/ops/device_plan.h"
#include "libtorch/ops/python_abi.h"

namespace flashoptim::ops {

/// What python.cpp expects to find in the states again.
struct KnownStates {
  std::vector<const PyObject*> values;  ///< kept alive by the caller, compared by address
  std::vector<size_t> counts;           ///< where among them each parameter's step count stands
  bool is_watched = false;              ///< every change of a state is counted
  bool is_seen = false;                 ///< they were found when the count was `changes`
  uint64_t changes = 0;
};

class PreparedPlan {
 public:
  /// From checked tensors, whose gradients give their dtypes; `params` are read for shapes.
  PreparedPlan(Op op, const StepInput& input, const TensorList& params);

  std::mutex& mutex() { return mutex_; }
  Backend backend() const { return backend_; }
  Device device() const { return device_; }
  OptimizerKind optimizer() const { return optimizer_; }
  bool has_momentum() const { return has_momentum_; }
  int64_t size() const { return static_cast<int64_t>(shapes_.size()); }
  DevicePlan& plan() { return plan_; }

  /// Takes one gradient per tensor, of the parameter's shape and strides and the dtype that the plan was made for; one
  /// of 0 elements where a parameter is left out of this step. Throws before any is taken.
  void set_gradients(Op op, const TensorList& grads);

  /// Hyperparameters of the next step(), as plan_step_ takes them; the number of sets.
  size_t set_hypers(Op op, const std::vector<double>& values, const std::vector<int64_t>& hyper_index);
  /// One step with the gradients and hyperparameters that were set last.
  void step(Op op, const StepControls& controls);

  // The same for python.cpp, which reads tensors itself. These leave a gradient of any other kind alone.
  /// Whether tensor `index` is at the address that the plan was made for.
  bool is_parameter(int64_t index, const dlpack::Tensor& tensor) const;
  bool is_gradient(int64_t index, const dlpack::Tensor& tensor) const;
  /// Whether it is one int64 on the plan's device.
  bool is_counter(const dlpack::Tensor& tensor) const;
  /// Takes checked gradients, null where one is left out, for the next set_or_use_gradients().
  void offer_gradients(Op op, const std::vector<const void*>& gradients);
  /// set_gradients(grads); where `grads` is empty, those that were offered since the last call.
  void set_or_use_gradients(Op op, const TensorList& grads);
  KnownStates& known() { return known_; }

 private:
  bool is_on_device(const dlpack::Tensor& tensor) const;

  struct Shape {
    size_t extents;  // of extents_: sizes, then strides
    int64_t dim, numel;
    int32_t gradient_dtype;
    uint8_t dlpack_type, dlpack_bits;  // of the gradient
  };

  const int64_t* sizes(const Shape& shape) const { return extents_.data() + shape.extents; }
  const int64_t* strides(const Shape& shape) const { return sizes(shape) + shape.dim; }

  std::mutex mutex_;
  Backend backend_;
  Device device_;
  OptimizerKind optimizer_;
  bool has_momentum_;
  std::vector<Shape> shapes_;
  std::vector<int64_t> extents_;
  std::vector<const void*> parameters_, gradients_;
  bool has_offered_ = false;
  std::vector<Hyperparameters> hypers_;
  std::vector<int64_t> hyper_index_;
  KnownStates known_;
  DevicePlan plan_;
};

/// Numbers for plans, from 1.
class PreparedPlans {
 public:
  static PreparedPlans& instance();
  int64_t add(std::shared_ptr<PreparedPlan> plan);
  /// Throws where there is none.
  std::shared_ptr<PreparedPlan> find(Op op, int64_t number);
  void remove(int64_t number);

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<PreparedPlan>> plans_;
  std::vector<size_t> free_;
};

}  // namespace flashoptim::ops
