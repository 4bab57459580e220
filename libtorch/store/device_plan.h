// A plan on whatever device its tensors are: the library's plans behind one interface.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "flashoptim/cuda.h"
#include "flashoptim/step.h"
#include "libtorch/store/device.h"

namespace flashoptim::store {

/// What a step takes beside tensors and hyperparameters. Pointers are to memory of the plan's device, or null.
struct StepControls {
  float gradient_scale = 1.0f;
  const float* gradient_divisor = nullptr;
  const float* clip_coefficient = nullptr;
  const float* found_inf = nullptr;
  int64_t* nonfinite_gradients = nullptr;
  /// One entry per tensor, or null: what the step will do is looked at first, in every telemetry_stride-th group.
  StepTelemetry* telemetry = nullptr;
  int64_t telemetry_stride = 1;
  /// One entry per hyperparameter set, or empty. A step counter counts up, unless found_inf, and is then the set's
  /// step.
  std::vector<const float*> lrs;
  std::vector<int64_t*> steps;
};

/// A plan's memory on a GPU is torch's: from the allocator whose retry and statistics its tensors have.
class DevicePlan {
 public:
  /// `backend` is kCpu or kCuda.
  static Status make(Backend backend, Device device, OptimizerKind optimizer, bool has_momentum,
                     const std::vector<ParameterTensors>& tensors, DevicePlan* plan);

  int64_t size() const;
  Status set_gradient(int64_t index, const void* gradient);
  /// One per tensor.
  Status set_gradients(const void* const* gradients);
  Status set_hyper_index(int64_t index, int32_t hyper_index);
  /// Where one tensor's arrays are from now on.
  Status set_tensor(int64_t index, const ParameterTensors& tensor);

  /// On the device's current stream. Hyperparameters are changed where controls say otherwise.
  Status step(std::vector<Hyperparameters>& hypers, const StepControls& controls);
  /// The same over some of the tensors alone.
  Status step_some(const int64_t* indices, int64_t count, std::vector<Hyperparameters>& hypers,
                   const StepControls& controls);
  /// For steps in several calls: counts the step counters of `controls` up, once for all of them.
  Status count(std::vector<Hyperparameters>& hypers, const StepControls& controls);
  /// step_some() behind count(), with the same hyperparameters and controls.
  Status step_counted(const int64_t* indices, int64_t count, std::vector<Hyperparameters>& hypers,
                      const StepControls& controls);
  /// What step() checks before it changes anything.
  Status check_step(const std::vector<Hyperparameters>& hypers, const StepControls& controls) const;
  /// The CPU has none: kUnsupported.
  Status gradient_norm(float gradient_scale, const float* gradient_divisor, float max_norm, cuda::GradientNorm* result);

 private:
  /// A step, or one of `some` tensors (null: all).
  Status run(const int64_t* some, int64_t count, std::vector<Hyperparameters>& hypers, const StepControls& controls);

#if FLASHOPTIM_HAS_CUDA
  std::variant<Plan, cuda::Plan> plan_;
#else
  std::variant<Plan> plan_;
#endif
  Device device_;
};

}  // namespace flashoptim::store
