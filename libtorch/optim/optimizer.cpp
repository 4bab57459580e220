#include "flashoptim/torch/optimizer.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/types.h>

#include <cmath>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>

#include "libtorch/optim/param_state.h"
#include "libtorch/optim/param_store.h"
#include "libtorch/optim/release.h"

namespace flashoptim::libtorch {

namespace {

std::string prefix(OptimizerKind kind) { return std::string(class_name(kind)) + ": "; }

}  // namespace

std::string FlashOptimizer::Position::str() const {
  return "param_groups[" + std::to_string(group) + "].params[" + std::to_string(index) + "]";
}

FlashOptimizer::FlashOptimizer(const std::vector<::torch::optim::OptimizerParamGroup>& groups,
                               std::unique_ptr<FlashOptions> defaults)
    : Optimizer(std::vector<::torch::optim::OptimizerParamGroup>{}, std::move(defaults)) {
  const auto& options = static_cast<const FlashOptions&>(*defaults_);
  kind_ = options.kind();
  store_ = std::make_unique<ParamStore>(kind_);
  options.check(prefix(kind_));
  static_cast<FlashOptions&>(*defaults_).role_.kind = FlashOptions::Role::kDefaults;
  for (const auto& group : groups) add_param_group(group);
  LiveOptimizers::add(this);
}

FlashOptimizer::FlashOptimizer(FlashOptimizer&& other) noexcept
    : Optimizer(std::move(other)),
      kind_(other.kind_),
      store_(std::move(other.store_)),
      release_(std::move(other.release_)),
      clip_(std::move(other.clip_)) {
  if (release_ != nullptr) release_->follow(this);
  LiveOptimizers::add(this);
}

FlashOptimizer& FlashOptimizer::operator=(FlashOptimizer&& other) noexcept {
  if (this == &other) return *this;
  if (release_ != nullptr) release_->end();
  Optimizer::operator=(std::move(other));
  kind_ = other.kind_;
  store_ = std::move(other.store_);
  release_ = std::move(other.release_);
  clip_ = std::move(other.clip_);
  if (release_ != nullptr) release_->follow(this);
  return *this;
}

FlashOptimizer::~FlashOptimizer() {
  LiveOptimizers::remove(this);
  if (release_ != nullptr) release_->end();
}

// ---- groups ---------------------------------------------------------------------------------------------------------

void FlashOptimizer::add_param_group(const ::torch::optim::OptimizerParamGroup& group) {
  const std::string where = group_prefix(param_groups_.size());
  std::unordered_set<const void*> known;
  for (const auto& existing : param_groups_) {
    for (const auto& param : existing.params()) known.insert(param.unsafeGetTensorImpl());
  }
  for (size_t i = 0; i < group.params().size(); ++i) {
    const at::Tensor& param = group.params()[i];
    const std::string name = where + "params[" + std::to_string(i) + "]";
    check_param(name, param);
    TORCH_CHECK(known.insert(param.unsafeGetTensorImpl()).second, name,
                " is already a parameter of this optimizer; each must be given once");
  }
  param_groups_.emplace_back(group.params(), settled_options(where, group));
  if (release_ == nullptr) return;
  try {
    release_->watch();
  } catch (...) {
    param_groups_.pop_back();
    throw;
  }
}

std::string FlashOptimizer::group_prefix(size_t group) const {
  return prefix(kind_) + "param_groups[" + std::to_string(group) + "].";
}

std::unique_ptr<FlashOptions> FlashOptimizer::settled_options(const std::string& where,
                                                              const ::torch::optim::OptimizerParamGroup& group) const {
  const auto& defaults = static_cast<const FlashOptions&>(*defaults_);
  const ::torch::optim::OptimizerOptions& given = group.has_options() ? group.options() : defaults;
  const auto* own = dynamic_cast<const FlashOptions*>(&given);
  TORCH_CHECK(own != nullptr && own->kind() == kind_, where, "options are of another optimizer; must be ",
              class_name(kind_), "Options");
  std::unique_ptr<FlashOptions> options(static_cast<FlashOptions*>(own->clone().release()));
  options->inherit(defaults);
  // Kept apart from lr, which schedulers change.
  if (options->values_.initial_lr == 0) options->values_.initial_lr = options->values_.lr;
  options->check_settled(where);
  options->settle();
  return options;
}

bool FlashOptimizer::is_settled(size_t group) const {
  const auto& param_group = param_groups_[group];
  if (!param_group.has_options()) return false;
  const auto* options = dynamic_cast<const FlashOptions*>(&param_group.options());
  if (options == nullptr || options->kind() != kind_) return false;
  // torch's add_param_group leaves a clone of the defaults in place of options that it does not know.
  const std::string name = class_name(kind_);
  TORCH_CHECK(options->role_.kind != FlashOptions::Role::kDefaults, group_prefix(group),
              "options may be lost: the group was added by torch::optim::Optimizer::add_param_group, which is not "
              "virtual and puts the optimizer's defaults in place of options that are not torch's own. Call ",
              name,
              "::add_param_group (dynamic_cast<flashoptim::torch::FlashOptimizer&>(optimizer).add_param_group); "
              "mend this group with param_groups()[",
              group, "].set_options(std::make_unique<", name, "Options>(...))");
  return options->role_.kind == FlashOptions::Role::kGroup;
}

void FlashOptimizer::check_groups() const {
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    if (!is_settled(g)) {
      (void)settled_options(group_prefix(g), param_groups_[g]);
    } else {
      static_cast<const FlashOptions&>(param_groups_[g].options()).check_settled(group_prefix(g));
    }
  }
}

FlashOptions& FlashOptimizer::group_options(size_t group) {
  if (!is_settled(group)) param_groups_[group].set_options(settled_options(group_prefix(group), param_groups_[group]));
  return static_cast<FlashOptions&>(param_groups_[group].options());
}

FlashParamState* FlashOptimizer::find_state(const at::Tensor& param) const {
  const auto found = state_.find(param.unsafeGetTensorImpl());
  return found == state_.end() ? nullptr : static_cast<FlashParamState*>(found->second.get());
}

void FlashOptimizer::read_group(size_t group) {
  const FlashOptions& options = group_options(group);
  if (store_->has_read(group, options.values())) return;
  options.check_settled(group_prefix(group));
  store_->read(group, options);
}

// ---- steps ----------------------------------------------------------------------------------------------------------

at::Tensor FlashOptimizer::step(LossClosure closure) {
  at::Tensor loss;
  if (release_ != nullptr) clip_ = release_->begin_step();
  if (closure != nullptr) {
    const at::AutoGradMode enable_grad(true);
    loss = closure();
  }
  const at::NoGradGuard no_grad;
  for (size_t g = 0; g < param_groups_.size(); ++g) read_group(g);
  store_->step(param_groups_, state_, clip_);
  clip_ = at::Tensor();
  return loss;
}

void FlashOptimizer::step_param(const at::Tensor& param) {
  step_released(param, clip_);
  clip_ = at::Tensor();
}

void FlashOptimizer::step_released(const at::Tensor& param, const at::Tensor& coefficient) {
  const at::NoGradGuard no_grad;
  int64_t record = param.defined() ? store_->find(param_groups_, param) : -1;
  if (record < 0) {
    position_of("step_param", param);
    for (size_t g = 0; g < param_groups_.size(); ++g) read_group(g);
    store_->follow(param_groups_);
    record = store_->find(param_groups_, param);
  }
  if (!param.grad().defined()) return;
  read_group(store_->position(record).group);
  store_->step_one(param_groups_, state_, record, coefficient);
}

at::Tensor FlashOptimizer::clip_grad_norm_(double max_norm) {
  const std::string where = prefix(kind_) + "clip_grad_norm_: ";
  TORCH_CHECK(std::isfinite(max_norm) && max_norm > 0, where, "max_norm = ", max_norm, "; must be finite and above 0");
  const at::NoGradGuard no_grad;
  if (release_ != nullptr) return release_->clip_grad_norm(max_norm);
  for (size_t g = 0; g < param_groups_.size(); ++g) read_group(g);
  at::Tensor coefficient;
  at::Tensor norm = store_->fused_norm(param_groups_, state_, max_norm, &coefficient);
  clip_ = coefficient;
  if (norm.defined()) return norm;
  std::vector<at::Tensor> grads;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    const std::vector<at::Tensor>& params = param_groups_[g].params();
    for (size_t i = 0; i < params.size(); ++i) {
      if (!params[i].grad().defined()) continue;
      check_gradient(prefix(kind_) + Position{g, i}.str() + ".grad", params[i], params[i].grad());
      grads.push_back(params[i].grad());
    }
  }
  return clip_in_place(grads, max_norm);
}

void FlashOptimizer::zero_grad(bool set_to_none) {
  clip_ = at::Tensor();
  Optimizer::zero_grad(set_to_none);
  if (release_ != nullptr) release_->finish();
}

void FlashOptimizer::set_lr_tensor(size_t group, const at::Tensor& lr) {
  const std::string where = prefix(kind_) + "set_lr_tensor: ";
  TORCH_CHECK(group < param_groups_.size(), where, "group = ", group, "; must be below ", param_groups_.size());
  if (lr.defined()) {
    TORCH_CHECK(group_options(group).values().capturable, where, "group = ", group,
                " has capturable = false; must be true, else steps take the option lr");
    TORCH_CHECK(lr.scalar_type() == at::kFloat && lr.numel() == 1 && lr.layout() == at::kStrided, where, "lr is a ",
                lr.scalar_type(), " tensor of shape ", lr.sizes(), "; must be Float, of one element");
    for (const at::Tensor& param : param_groups_[group].params()) {
      TORCH_CHECK(param.device() == lr.device(), where, "lr is on ", lr.device(),
                  "; must be where the group's parameters are, on ", param.device());
    }
  }
  store_->set_lr(group, lr);
}

// ---- those that are alive -------------------------------------------------------------------------------------------

namespace {

struct Registry {
  std::mutex mutex;
  std::vector<FlashOptimizer*> optimizers;
};

/// Never destroyed: optimizers may be static objects.
Registry& registry() {
  static Registry& registry = *new Registry;
  return registry;
}

}  // namespace

void LiveOptimizers::add(FlashOptimizer* optimizer) {
  const std::lock_guard lock(registry().mutex);
  registry().optimizers.push_back(optimizer);
}

void LiveOptimizers::remove(FlashOptimizer* optimizer) {
  const std::lock_guard lock(registry().mutex);
  std::erase(registry().optimizers, optimizer);
}

std::vector<FlashOptimizer*> LiveOptimizers::all() {
  const std::lock_guard lock(registry().mutex);
  return registry().optimizers;
}

}  // namespace flashoptim::libtorch
