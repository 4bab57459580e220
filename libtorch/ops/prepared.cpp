#include "libtorch/ops/prepared.h"

#include <algorithm>
#include <utility>

namespace flashoptim::ops {

PreparedPlan::PreparedPlan(Op op, const StepInput& input, const TensorList& params)
    : backend_(input.backend),
      device_(input.device),
      optimizer_(input.optimizer),
      has_momentum_(input.has_momentum),
      gradients_(params.size()) {
  for (size_t i = 0; i < params.size(); ++i) {
    const TensorInfo info = read_tensor(op, {"params", static_cast<int64_t>(i)}, params[i]);
    const DType dtype = input.tensors[i].gradient_dtype;
    const bool same = dtype == input.tensors[i].parameter_dtype;
    shapes_.push_back({extents_.size(), info.dim, info.numel, same ? info.dtype : codes().float32,
                       dtype == DType::kBFloat16 ? dlpack::kBfloat : dlpack::kFloat,
                       static_cast<uint8_t>(dtype == DType::kFloat32 ? 32 : 16)});
    extents_.insert(extents_.end(), info.sizes, info.sizes + info.dim);
    extents_.insert(extents_.end(), info.strides, info.strides + info.dim);
  }
  if (backend_ == Backend::kMeta) return;
  for (const ParameterTensors& tensor : input.tensors) parameters_.push_back(tensor.parameter);
  check_no_overlap(op, input.tensors);
  op.check(DevicePlan::make(backend_, device_, optimizer_, has_momentum_, input.tensors, &plan_));
}

void PreparedPlan::set_gradients(Op op, const TensorList& grads) {
  has_offered_ = false;
  if (grads.size() != shapes_.size()) {
    op.fail("grads has " + std::to_string(grads.size()) + " entries; needed are " + std::to_string(shapes_.size()) +
            ", one per tensor of the plan");
  }
  for (size_t i = 0; i < grads.size(); ++i) {
    const Shape& shape = shapes_[i];
    const Name name{"grads", static_cast<int64_t>(i)};
    const TensorInfo grad = read_tensor(op, name, grads[i]);
    if (grad.numel == 0 && shape.numel != 0) {
      gradients_[i] = nullptr;
      continue;
    }
    TensorInfo like = grad;
    like.dim = shape.dim;
    like.sizes = sizes(shape);
    like.strides = strides(shape);
    like.device = device_;
    check_like(op, name, grad, {"params", static_cast<int64_t>(i)}, like);
    check_dtype(op, name, grad.dtype, shape.gradient_dtype, "the plan");
    gradients_[i] = backend_ == Backend::kMeta ? nullptr : const_data(grads[i]);
  }
  if (backend_ == Backend::kMeta) return;
  op.check(plan_.set_gradients(gradients_.data()));
}

size_t PreparedPlan::set_hypers(Op op, const std::vector<double>& values, const std::vector<int64_t>& hyper_index) {
  hypers_.clear();
  unpack_hypers(op, values, optimizer_, has_momentum_, &hypers_);
  if (!hyper_index.empty() && hyper_index.size() != static_cast<size_t>(size())) {
    op.fail("hyper_index has " + std::to_string(hyper_index.size()) + " entries; needed are none or " +
            std::to_string(size()) + ", one per tensor of the plan");
  }
  for (size_t i = 0; i < hyper_index.size(); ++i) check_hyper_index(op, i, hyper_index[i], hypers_.size());
  hyper_index_ = hyper_index;
  return hypers_.size();
}

void PreparedPlan::step(Op op, const StepControls& controls) {
  for (size_t i = 0; i < hyper_index_.size(); ++i) {
    op.check(plan_.set_hyper_index(static_cast<int64_t>(i), static_cast<int32_t>(hyper_index_[i])));
  }
  op.check(plan_.step(hypers_, controls));
}

bool PreparedPlan::is_parameter(int64_t index, const dlpack::Tensor& tensor) const {
  return backend_ != Backend::kMeta && tensor.address() == parameters_[static_cast<size_t>(index)];
}

bool PreparedPlan::is_on_device(const dlpack::Tensor& tensor) const {
  if (backend_ == Backend::kCuda) return tensor.device_type == dlpack::kCuda && tensor.device_index == device_.index;
  return backend_ == Backend::kCpu && tensor.device_type == dlpack::kCpu;
}

bool PreparedPlan::is_counter(const dlpack::Tensor& tensor) const {
  if (!is_on_device(tensor) || tensor.type != dlpack::kInt || tensor.bits != 64 || tensor.lanes != 1) return false;
  return std::all_of(tensor.sizes, tensor.sizes + tensor.dim, [](int64_t size) { return size == 1; });
}

bool PreparedPlan::is_gradient(int64_t index, const dlpack::Tensor& tensor) const {
  const Shape& shape = shapes_[static_cast<size_t>(index)];
  if (!is_on_device(tensor) || tensor.lanes != 1) return false;
  if (tensor.type != shape.dlpack_type || tensor.bits != shape.dlpack_bits) return false;
  if (tensor.dim != shape.dim) return false;
  const int64_t *const wanted_sizes = sizes(shape), *const wanted_strides = strides(shape);
  for (int64_t d = 0; d < shape.dim; ++d) {
    if (tensor.sizes[d] != wanted_sizes[d]) return false;
    if (tensor.strides[d] != wanted_strides[d] && wanted_sizes[d] != 1 && shape.numel != 0) return false;
  }
  return true;
}

void PreparedPlan::offer_gradients(Op op, const std::vector<const void*>& gradients) {
  has_offered_ = false;
  op.check(plan_.set_gradients(gradients.data()));
  has_offered_ = true;
}

void PreparedPlan::set_or_use_gradients(Op op, const TensorList& grads) {
  const bool has_offered = std::exchange(has_offered_, false);
  if (!has_offered || !grads.empty()) set_gradients(op, grads);
}

PreparedPlans& PreparedPlans::instance() {
  // Never destroyed: plans may be given back while the process ends.
  static PreparedPlans& plans = *new PreparedPlans;
  return plans;
}

int64_t PreparedPlans::add(std::shared_ptr<PreparedPlan> plan) {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) {
    plans_.push_back(std::move(plan));
    return static_cast<int64_t>(plans_.size());
  }
  const size_t index = free_.back();
  free_.pop_back();
  plans_[index] = std::move(plan);
  return static_cast<int64_t>(index) + 1;
}

std::shared_ptr<PreparedPlan> PreparedPlans::find(Op op, int64_t number) {
  const std::lock_guard lock(mutex_);
  if (number < 1 || number > static_cast<int64_t>(plans_.size()) ||
      plans_[static_cast<size_t>(number - 1)] == nullptr) {
    op.fail("plan = " + std::to_string(number) + "; no such plan: plan_new gives numbers, plan_free takes them back");
  }
  return plans_[static_cast<size_t>(number - 1)];
}

void PreparedPlans::remove(int64_t number) {
  std::shared_ptr<PreparedPlan> removed;  // destroyed outside the lock
  const std::lock_guard lock(mutex_);
  if (number < 1 || number > static_cast<int64_t>(plans_.size())) return;
  removed = std::move(plans_[static_cast<size_t>(number - 1)]);
  if (removed != nullptr) free_.push_back(static_cast<size_t>(number - 1));
}

}  // namespace flashoptim::ops
