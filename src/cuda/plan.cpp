// cuda::Plan's public face: what is checked, what is kept on the host, and when launches begin.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "flashoptim/cuda.h"
#include "src/checks.h"
#include "src/cuda/plan_impl.h"
#include "src/inspect.h"
#include "src/rules.h"

namespace flashoptim::cuda {
namespace {

Status empty_plan() { return Status::invalid_argument("plan is empty: call Plan::make first"); }

/// Runs body() with the plan's device current.
template <class Body>
Status on_device(int32_t device, Body body) {
  const DeviceGuard guard(device);
  const Status status = device_status(guard.error(), "cannot use the device of the plan");
  return status.is_ok() ? body() : status;
}

}  // namespace

Plan::Plan() = default;
Plan::~Plan() {
  if (impl_ == nullptr) return;
  impl_.reset();
  PlanMemory::free_abandoned();
}
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

Status Plan::make(OptimizerKind optimizer, bool has_momentum, const ParameterTensors* tensors, int64_t count,
                  int32_t device, Plan* plan, const MakeOptions& options) {
  return guarded([&] {
    if (plan == nullptr) return Status::invalid_argument("plan is null");
    auto impl = std::make_unique<Impl>();
    Status status = flashoptim::Plan::make(optimizer, has_momentum, tensors, count, &impl->tensors);
    if (!status.is_ok()) return status;
    impl->optimizer = optimizer;
    impl->rule = rule_kind(optimizer, has_momentum);
    impl->device = device;
    // As many as flashoptim::Plan's set_hyper_index() allows.
    auto hypers = static_cast<int32_t>(std::min<int64_t>(count, kMaxHyperparameterSets));
    for (int64_t i = 0; i < count; ++i) {
      const ParameterTensors& t = impl->tensors.tensor(i);
      hypers = std::max(hypers, t.hyper_index + 1);
      status = check_scales(t, {"tensors", i});
      if (!status.is_ok()) return status;
    }
    const auto size = static_cast<size_t>(count);
    impl->gradients.reserve(size);
    for (int64_t i = 0; i < count; ++i) impl->gradients.push_back(tensors[i].gradient);
    impl->changes.resize(size, Change::kNone);
    impl->some.reserve(size);
    impl->named_in.resize(size);
    impl->used_in.resize(static_cast<size_t>(hypers));
    status = on_device(device, [&] {
      const RelaxedCapture relaxed;
      return impl->tables.make(impl->tensors, impl->rule, state_count(optimizer, has_momentum), hypers, device,
                               options);
    });
    if (status.is_ok()) plan->impl_ = std::move(impl);
    return status;
  });
}

int64_t Plan::size() const { return impl_ == nullptr ? 0 : impl_->tensors.size(); }
const ParameterTensors& Plan::tensor(int64_t index) const {
  static constexpr ParameterTensors kNone;
  return impl_ == nullptr ? kNone : impl_->tensors.tensor(index);
}
int32_t Plan::device() const { return impl_ == nullptr ? -1 : impl_->device; }
int32_t Plan::launches() const { return impl_ == nullptr ? 0 : static_cast<int32_t>(impl_->tables.launches.size()); }
bool Plan::retains_memory_forever() const { return impl_ != nullptr && impl_->tables.memory->is_retained_forever(); }

Status Plan::set_gradient(int64_t index, const void* gradient) {
  return guarded([&] { return impl_ == nullptr ? empty_plan() : impl_->set_gradient(index, gradient); });
}

Status Plan::set_gradients(const void* const* gradients) {
  return guarded([&] {
    if (gradients == nullptr && size() > 0) {
      return Status::invalid_argument("gradients is null; it must have " + std::to_string(size()) + " entries");
    }
    Status status;
    for (int64_t i = 0, count = size(); status.is_ok() && i < count; ++i) {
      if (impl_->gradients[static_cast<size_t>(i)] == gradients[i]) continue;  // at once, for most are
      status = impl_->set_gradient(i, gradients[i]);
    }
    return status;
  });
}

Status Plan::set_hyper_index(int64_t index, int32_t hyper_index) {
  return guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    if (index >= 0 && index < size() && tensor(index).hyper_index == hyper_index) return Status::ok();
    const Status status = impl_->tensors.set_hyper_index(index, hyper_index);
    if (!status.is_ok()) return status;
    impl_->mark_changed(index, Change::kAll);
    impl_->used_hypers = -1;
    return status;
  });
}

Status Plan::set_tensor(int64_t index, const ParameterTensors& tensor) {
  return guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    Status status = check_scales(tensor, {"tensor"});
    if (status.is_ok()) status = impl_->tensors.set_tensor(index, tensor);
    if (!status.is_ok()) return status;
    impl_->set_kept_gradient(index, tensor.gradient);
    impl_->mark_changed(index, Change::kAll);
    impl_->used_hypers = -1;
    return status;
  });
}

Status Plan::check_step(const Hyperparameters* hypers, int64_t count, const StepOptions& options) const {
  return guarded([&] {
    int32_t used = 0;
    return impl_ == nullptr ? empty_plan() : impl_->check(hypers, count, options, &used);
  });
}

Status Plan::step(const Hyperparameters* hypers, int64_t count, const StepOptions& options) {
  return guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    int32_t used = 0;
    const Status status = impl_->check(hypers, count, options, &used);
    if (!status.is_ok()) return status;
    impl_->used_hypers = used;
    if (used == 0) return status;
    return on_device(impl_->device, [&] { return impl_->step(hypers, used, options); });
  });
}

Status Plan::step_some(const int64_t* indices, int64_t count, const Hyperparameters* hypers, int64_t hyper_count,
                       const StepOptions& options) {
  return guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    const Status status = impl_->check_some(indices, count, hypers, hyper_count, options);
    if (!status.is_ok() || impl_->some.empty()) return status;
    return on_device(impl_->device, [&] { return impl_->step_some(hypers, options); });
  });
}

Status Plan::inspect(const Hyperparameters* hypers, int64_t count, const StepOptions& options,
                     const InspectOptions& inspect_options, StepTelemetry* telemetry) {
  return guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    const PlanTables& tables = impl_->tables;
    Status status = check_inspection(inspect_options, telemetry, size(), " in device memory");
    int32_t used = 0;
    if (status.is_ok()) status = impl_->check(hypers, count, options, &used);
    if (!status.is_ok() || used == 0 || tables.inspect_chunk_count == 0) return status;
    return on_device(impl_->device, [&] {
      const auto stream = static_cast<cudaStream_t>(options.stream);
      LaunchTarget target;
      InspectArguments args;
      Status result = tables.memory->before_launches(stream, &target);
      if (result.is_ok()) result = impl_->upload(target, options.stream, &args.tensors);
      if (result.is_ok()) result = impl_->prepare_on_device(hypers, 0, used, options, 0, tables.largest_updates);
      if (!result.is_ok()) return result;
      args.chunks = tables.inspect_chunks;
      args.hypers = tables.hypers;
      args.largest_updates = tables.largest_updates;
      args.telemetry = telemetry;
      args.stride = inspect_options.stride;
      args.chunk_count = static_cast<uint32_t>(tables.inspect_chunk_count);
      result = launched(launch_inspect(impl_->rule, args, options.stream), "launching the inspection");
      tables.memory->after_launches(stream, target);
      return result;
    });
  });
}

Status Plan::gradient_norm(const NormOptions& options, GradientNorm* result) {
  return guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    if (result == nullptr) return Status::invalid_argument("result is null");
    const Status checked = check_gradient_scale(options.gradient_scale);
    if (!checked.is_ok()) return checked;
    return on_device(impl_->device, [&] {
      const PlanTables& tables = impl_->tables;
      const auto stream = static_cast<cudaStream_t>(options.stream);
      LaunchTarget target;
      NormArguments args;
      Status status = tables.memory->before_launches(stream, &target);
      if (status.is_ok()) status = impl_->upload(target, options.stream, &args.tensors);
      if (!status.is_ok()) return status;
      args.chunks = tables.norm_chunks;
      args.chunk_count = tables.norm_chunk_count;
      args.partial = tables.partial;
      args.finished = tables.finished;
      args.result = result;
      args.gradient_scale = options.gradient_scale;
      args.gradient_divisor = options.gradient_divisor;
      args.max_norm = options.max_norm;
      args.epsilon = options.epsilon;
      status = launched(launch_norm(args, options.stream), "launching the gradient norm");
      tables.memory->after_launches(stream, target);
      return status;
    });
  });
}

Status advance_step(int64_t* counter, const float* found_inf, int32_t device, void* stream) {
  return guarded([&] {
    if (counter == nullptr) return Status::invalid_argument("counter is null");
    const DeviceGuard guard(device);
    const Status status = device_status(guard.error(), "cannot use the device of the counter");
    return status.is_ok() ? launched(launch_advance(counter, found_inf, stream), "launching the step counter") : status;
  });
}

Status is_capturing(void* stream, bool* capturing) {
  return guarded([&] {
    if (capturing == nullptr) return Status::invalid_argument("capturing is null");
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    const Status status =
        device_status(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture), "cudaStreamIsCapturing");
    *capturing = capture != cudaStreamCaptureStatusNone;
    return status;
  });
}

}  // namespace flashoptim::cuda
