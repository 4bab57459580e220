#include "libtorch/store/device_plan.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "flashoptim/core/optimizers/rule.h"
#include "libtorch/store/tensor.h"

namespace flashoptim::store {
namespace {

/// Learning rates that are in the CPU's memory.
void read_lrs(const StepControls& controls, std::vector<Hyperparameters>& hypers) {
  for (size_t i = 0; i < controls.lrs.size(); ++i) {
    if (controls.lrs[i] != nullptr) hypers[i].lr = static_cast<double>(*controls.lrs[i]);
  }
}

/// Counts the CPU's counters up, each once.
void count_steps(const StepControls& controls, std::vector<Hyperparameters>& hypers) {
  const bool skipped = controls.found_inf != nullptr && *controls.found_inf != 0.0f;
  for (size_t i = 0; i < controls.steps.size(); ++i) {
    int64_t* const counter = controls.steps[i];
    if (counter == nullptr) continue;
    const auto before = controls.steps.begin() + static_cast<std::ptrdiff_t>(i);
    const bool first_use = std::find(controls.steps.begin(), before, counter) == before;
    if (!skipped && first_use) ++*counter;
    hypers[i].step = skipped ? *counter + 1 : *counter;
  }
}

StepOptions cpu_options(const StepControls& controls) {
  StepOptions options;
  options.nonfinite_gradients = controls.nonfinite_gradients;
  options.gradient_scale =
      core::gradient_factor(controls.gradient_scale, controls.gradient_divisor, controls.clip_coefficient);
  options.found_inf = controls.found_inf;
  return with_torch_threads(options);
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

/// Counts the device's counters up, each once.
Status count_on_device(const StepControls& controls, Device device, void* stream) {
  for (auto counter = controls.steps.begin(); counter != controls.steps.end(); ++counter) {
    if (*counter == nullptr || std::find(controls.steps.begin(), counter, *counter) != counter) continue;
    const Status status = cuda::advance_step(*counter, controls.found_inf, device.index, stream);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

/// Device memory from torch's allocator, as tensors that nobody sees. Lives as long as the process: captured graphs may
/// keep a plan's memory beyond the plan.
class TorchMemory {
 public:
  static TorchMemory& instance() {
    static TorchMemory& memory = *new TorchMemory;
    return memory;
  }

  static cuda::DeviceAllocator allocator(const Device& device) {
    // One user a device, for it is the allocation's device that torch asks for.
    static std::mutex mutex;
    static auto& devices = *new std::map<int32_t, Device>;
    const std::lock_guard lock(mutex);
    Device& user = devices.try_emplace(device.index, device).first->second;
    return {&allocate, &free, &user};
  }

  /// torch's words about memory that it has not given this thread.
  static std::string& refusal() {
    thread_local std::string words;
    return words;
  }

 private:
  static void* allocate(void* user, int64_t bytes, void* /*stream: the current one*/) {
    const auto& device = *static_cast<const Device*>(user);
    const int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    if (aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), device.type, device.index, &handle) !=
        AOTI_TORCH_SUCCESS) {
      refusal() = torch_said();
      return nullptr;
    }
    Tensor tensor(handle);
    void* data = nullptr;
    if (torch_get_mutable_data_ptr(tensor, &data) != AOTI_TORCH_SUCCESS) return nullptr;
    TorchMemory& memory = instance();
    const std::lock_guard lock(memory.mutex_);
    memory.tensors_.emplace(data, std::move(tensor));
    return data;
  }

  static void free(void*, void* data) {
    TorchMemory& memory = instance();
    Tensor tensor;  // let go outside the lock
    const std::lock_guard lock(memory.mutex_);
    const auto found = memory.tensors_.find(data);
    if (found == memory.tensors_.end()) return;
    tensor = std::move(found->second);
    memory.tensors_.erase(found);
  }

  std::mutex mutex_;
  std::map<void*, Tensor> tensors_;
};
#endif

}  // namespace

Status DevicePlan::make(Backend backend, Device device, OptimizerKind optimizer, bool has_momentum,
                        const std::vector<ParameterTensors>& tensors, DevicePlan* plan) {
  const auto count = static_cast<int64_t>(tensors.size());
  plan->device_ = device;
#if FLASHOPTIM_HAS_CUDA
  if (backend == Backend::kCuda) {
    cuda::MakeOptions options;
    options.stream = current_stream(device);
    options.allocator = TorchMemory::allocator(device);
    cuda::Plan made;
    TorchMemory::refusal().clear();
    Status status = cuda::Plan::make(optimizer, has_momentum, tensors.data(), count, device.index, &made, options);
    if (status.is_ok()) {
      plan->plan_ = std::move(made);
    } else if (const std::string words = std::move(TorchMemory::refusal()); !words.empty()) {
      status = Status::out_of_memory(status.message() + words);
    }
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
Status DevicePlan::set_gradient(int64_t index, const void* gradient) {
  return std::visit([=](auto& plan) { return plan.set_gradient(index, gradient); }, plan_);
}
Status DevicePlan::set_gradients(const void* const* gradients) {
  return std::visit([=](auto& plan) { return plan.set_gradients(gradients); }, plan_);
}
Status DevicePlan::set_hyper_index(int64_t index, int32_t hyper_index) {
  return std::visit([=](auto& plan) { return plan.set_hyper_index(index, hyper_index); }, plan_);
}
Status DevicePlan::set_tensor(int64_t index, const ParameterTensors& tensor) {
  return std::visit([&](auto& plan) { return plan.set_tensor(index, tensor); }, plan_);
}

Status DevicePlan::step(std::vector<Hyperparameters>& hypers, const StepControls& controls) {
  return run(nullptr, 0, hypers, controls);
}
Status DevicePlan::step_some(const int64_t* indices, int64_t count, std::vector<Hyperparameters>& hypers,
                             const StepControls& controls) {
  return run(indices, count, hypers, controls);
}

Status DevicePlan::count(std::vector<Hyperparameters>& hypers, const StepControls& controls) {
#if FLASHOPTIM_HAS_CUDA
  if (std::holds_alternative<cuda::Plan>(plan_)) {
    return controls.steps.empty() ? Status::ok() : count_on_device(controls, device_, current_stream(device_));
  }
#endif
  read_lrs(controls, hypers);
  count_steps(controls, hypers);
  return Status::ok();
}

Status DevicePlan::step_counted(const int64_t* indices, int64_t count, std::vector<Hyperparameters>& hypers,
                                const StepControls& controls) {
  const auto sets = static_cast<int64_t>(hypers.size());
#if FLASHOPTIM_HAS_CUDA
  if (auto* plan = std::get_if<cuda::Plan>(&plan_)) {
    return plan->step_some(indices, count, hypers.data(), sets, cuda_options(controls, current_stream(device_)));
  }
#endif
  return std::get<Plan>(plan_).step_some(indices, count, hypers.data(), sets, cpu_options(controls));
}

Status DevicePlan::check_step(const std::vector<Hyperparameters>& hypers, const StepControls& controls) const {
  const auto count = static_cast<int64_t>(hypers.size());
#if FLASHOPTIM_HAS_CUDA
  if (const auto* plan = std::get_if<cuda::Plan>(&plan_)) {
    return plan->check_step(hypers.data(), count, cuda_options(controls, current_stream(device_)));
  }
#endif
  return std::get<Plan>(plan_).check_step(hypers.data(), count, cpu_options(controls));
}

Status DevicePlan::run(const int64_t* some, int64_t some_count, std::vector<Hyperparameters>& hypers,
                       const StepControls& controls) {
  const auto count = static_cast<int64_t>(hypers.size());
#if FLASHOPTIM_HAS_CUDA
  if (auto* plan = std::get_if<cuda::Plan>(&plan_)) {
    void* const stream = current_stream(device_);
    const cuda::StepOptions options = cuda_options(controls, stream);
    if (!controls.steps.empty()) {
      // Counters count up in launches of their own: nothing may be left to refuse after them.
      Status status = plan->check_step(hypers.data(), count, options);
      if (status.is_ok()) status = count_on_device(controls, device_, stream);
      if (!status.is_ok()) return status;
    }
    if (controls.telemetry != nullptr) {
      const Status status =
          plan->inspect(hypers.data(), count, options, {controls.telemetry_stride}, controls.telemetry);
      if (!status.is_ok()) return status;
    }
    if (some != nullptr) return plan->step_some(some, some_count, hypers.data(), count, options);
    return plan->step(hypers.data(), count, options);
  }
#endif
  Plan& plan = std::get<Plan>(plan_);
  const StepOptions options = cpu_options(controls);
  read_lrs(controls, hypers);
  if (!controls.steps.empty()) {
    const Status status = plan.check_step(hypers.data(), count, options);
    if (!status.is_ok()) return status;
    count_steps(controls, hypers);
  }
  if (controls.telemetry != nullptr) {
    const Status status = plan.inspect(hypers.data(), count, options, {controls.telemetry_stride}, controls.telemetry);
    if (!status.is_ok()) return status;
  }
  if (some != nullptr) return plan.step_some(some, some_count, hypers.data(), count, options);
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

}  // namespace flashoptim::store
