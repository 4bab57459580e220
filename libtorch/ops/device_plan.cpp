#include "libtorch/ops/device_plan.h"

#include <algorithm>
#include <string>
#include <utility>

#include "flashoptim/core/optimizers/rule.h"

namespace flashoptim::ops {
namespace {

/// Puts what the controls point at, in the CPU's memory, into hyperparameters and options.
StepOptions read_controls(const StepControls& controls, std::vector<Hyperparameters>& hypers) {
  StepOptions out, *const options = &out;
  options->nonfinite_gradients = controls.nonfinite_gradients;
  options->gradient_scale =
      core::gradient_factor(controls.gradient_scale, controls.gradient_divisor, controls.clip_coefficient);
  options->found_inf = controls.found_inf;
  const bool skipped = controls.found_inf != nullptr && *controls.found_inf != 0.0f;
  for (size_t i = 0; i < controls.lrs.size(); ++i) {
    if (controls.lrs[i] != nullptr) hypers[i].lr = static_cast<double>(*controls.lrs[i]);
  }
  for (size_t i = 0; i < controls.steps.size(); ++i) {
    int64_t* const counter = controls.steps[i];
    if (counter == nullptr) continue;
    const auto before = controls.steps.begin() + static_cast<std::ptrdiff_t>(i);
    const bool first_use = std::find(controls.steps.begin(), before, counter) == before;
    if (!skipped && first_use) ++*counter;
    hypers[i].step = skipped ? *counter + 1 : *counter;
  }
  return with_torch_threads(out);
}

#if FLASHOPTIM_HAS_CUDA
cuda::StepOptions cuda_options(const StepControls& controls, void* stream) {
  cuda::StepOptions options;
  options.stream = stream;
  options.gradient_scale = controls.gradient_scale;
  options.gradient_divisor = controls.gradient_divisor;
  options.clip_coefficient = controls.clip_coefficient;
  options.found_inf = controls.found_inf;
  options.nonfinite_gradients = controls.nonfinite_gradients;
  options.lr = controls.lrs.empty() ? nullptr : controls.lrs.data();
  options.step = controls.steps.empty() ? nullptr : controls.steps.data();
  return options;
}
#endif

}  // namespace

Status DevicePlan::make(Backend backend, Device device, OptimizerKind optimizer, bool has_momentum,
                        const std::vector<ParameterTensors>& tensors, DevicePlan* plan) {
  const auto count = static_cast<int64_t>(tensors.size());
  plan->device_ = device;
#if FLASHOPTIM_HAS_CUDA
  if (backend == Backend::kCuda) {
    cuda::Plan made;
    Status status = cuda::Plan::make(optimizer, has_momentum, tensors.data(), count, device.index, &made);
    if (status.is_ok()) plan->plan_ = std::move(made);
    return status;
  }
#else
  static_cast<void>(backend);
#endif
  Plan made;
  Status status = Plan::make(optimizer, has_momentum, tensors.data(), count, &made);
  if (status.is_ok()) plan->plan_ = std::move(made);
  return status;
}

int64_t DevicePlan::size() const {
  return std::visit([](const auto& plan) { return plan.size(); }, plan_);
}
const ParameterTensors& DevicePlan::tensor(int64_t index) const {
  return std::visit([index](const auto& plan) -> const ParameterTensors& { return plan.tensor(index); }, plan_);
}
Status DevicePlan::set_gradient(int64_t index, const void* gradient) {
  return std::visit([=](auto& plan) { return plan.set_gradient(index, gradient); }, plan_);
}
Status DevicePlan::set_gradients(const void* const* gradients) {
#if FLASHOPTIM_HAS_CUDA
  if (auto* plan = std::get_if<cuda::Plan>(&plan_)) return plan->set_gradients(gradients);
#endif
  Plan& plan = std::get<Plan>(plan_);
  Status status;
  for (int64_t i = 0; status.is_ok() && i < plan.size(); ++i) status = plan.set_gradient(i, gradients[i]);
  return status;
}
Status DevicePlan::set_hyper_index(int64_t index, int32_t hyper_index) {
  return std::visit([=](auto& plan) { return plan.set_hyper_index(index, hyper_index); }, plan_);
}

Status DevicePlan::step(std::vector<Hyperparameters>& hypers, const StepControls& controls) {
  const auto count = static_cast<int64_t>(hypers.size());
#if FLASHOPTIM_HAS_CUDA
  if (auto* plan = std::get_if<cuda::Plan>(&plan_)) {
    void* const stream = current_stream(device_);
    for (auto counter = controls.steps.begin(); counter != controls.steps.end(); ++counter) {
      if (*counter == nullptr || std::find(controls.steps.begin(), counter, *counter) != counter) continue;
      const Status status = cuda::advance_step(*counter, controls.found_inf, device_.index, stream);
      if (!status.is_ok()) return status;
    }
    const cuda::StepOptions options = cuda_options(controls, stream);
    if (controls.telemetry != nullptr) {
      const Status status =
          plan->inspect(hypers.data(), count, options, {controls.telemetry_stride}, controls.telemetry);
      if (!status.is_ok()) return status;
    }
    return plan->step(hypers.data(), count, options);
  }
#endif
  Plan& plan = std::get<Plan>(plan_);
  const StepOptions options = read_controls(controls, hypers);
  if (controls.telemetry != nullptr) {
    const Status status = plan.inspect(hypers.data(), count, options, {controls.telemetry_stride}, controls.telemetry);
    if (!status.is_ok()) return status;
  }
  return plan.step(hypers.data(), count, options);
}

Status DevicePlan::gradient_norm(float gradient_scale, const float* gradient_divisor, float max_norm,
                                 cuda::GradientNorm* result) {
#if FLASHOPTIM_HAS_CUDA
  if (auto* plan = std::get_if<cuda::Plan>(&plan_)) {
    cuda::NormOptions options;
    options.stream = current_stream(device_);
    options.gradient_scale = gradient_scale;
    options.gradient_divisor = gradient_divisor;
    options.max_norm = max_norm;
    return plan->gradient_norm(options, result);
  }
#endif
  static_cast<void>(gradient_scale), static_cast<void>(gradient_divisor), static_cast<void>(max_norm);
  static_cast<void>(result);
  return Status::unsupported("the fused gradient norm is for CUDA tensors; use torch.nn.utils.clip_grad_norm_");
}

}  // namespace flashoptim::ops
