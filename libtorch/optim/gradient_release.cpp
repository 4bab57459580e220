#include "flashoptim/torch/gradient_release.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/types.h>

#include <cmath>
#include <utility>

#include "libtorch/optim/param_state.h"
#include "libtorch/optim/release.h"

namespace flashoptim::libtorch {
namespace {

namespace impl = ::torch::autograd::impl;
using ::torch::autograd::PostAccumulateGradHook;

void check_options(const GradientReleaseOptions& options) {
  const std::string& clip = options.clip();
  const char* const where = "enable_gradient_release: ";
  TORCH_CHECK(clip.empty() || clip == "two_pass" || clip == "previous" || clip == "parameter", where, "clip = \"", clip,
              "\"; must be \"\", \"two_pass\", \"previous\" or \"parameter\"");
  TORCH_CHECK(clip.empty() != options.max_norm().has_value(), where, "clip = \"", clip, "\" ",
              options.max_norm().has_value() ? "with" : "without", " max_norm; must be both or neither");
  const double max_norm = options.max_norm().value_or(1.0), decay = options.norm_decay();
  TORCH_CHECK(std::isfinite(max_norm) && max_norm > 0, where, "max_norm = ", max_norm, "; must be finite and above 0");
  TORCH_CHECK(decay >= 0 && decay < 1, where, "norm_decay = ", decay, "; must be at least 0 and below 1");
  TORCH_CHECK(decay == 0 || clip == "previous", where, "norm_decay = ", decay, " with clip = \"", clip,
              "\"; must be 0, or go with \"previous\"");
}

/// The hooks of a parameter, run before ours, and ours.
PostAccumulateGradHook* hook_of(const at::Tensor& param) {
  return impl::get_autograd_meta(param) == nullptr ? nullptr : impl::post_acc_grad_hooks(param).get();
}

}  // namespace

/// What a parameter calls once its gradient is complete. It keeps nobody alive.
class GradientRelease::Hook final : public PostAccumulateGradHook {
 public:
  Hook(std::weak_ptr<GradientRelease> release, std::unique_ptr<PostAccumulateGradHook> before)
      : release_(std::move(release)), before_(std::move(before)) {}

  void operator()(const at::Tensor& param) override {
    if (before_ != nullptr) (*before_)(param);
    // The step may end release, and this hook with it: nothing of it is used from here on.
    const std::shared_ptr<GradientRelease> release = release_.lock();
    if (release != nullptr) release->release(param);
  }

  std::shared_ptr<GradientRelease> release() const { return release_.lock(); }
  std::unique_ptr<PostAccumulateGradHook> take_before() { return std::move(before_); }

 private:
  std::weak_ptr<GradientRelease> release_;
  std::unique_ptr<PostAccumulateGradHook> before_;
};

GradientRelease::GradientRelease(FlashOptimizer* optimizer, GradientReleaseOptions options)
    : optimizer_(optimizer), options_(std::move(options)) {
  if (!options_.clip().empty()) clip_.emplace(options_.clip(), *options_.max_norm(), options_.norm_decay());
}

GradientRelease::~GradientRelease() = default;

std::shared_ptr<GradientRelease> GradientRelease::begin(FlashOptimizer& optimizer,
                                                        const GradientReleaseOptions& options,
                                                        const std::vector<at::Tensor>& left_to_step) {
  TORCH_CHECK(optimizer.release_ == nullptr,
              "enable_gradient_release: gradients of this optimizer are released already; end it first: "
              "handle.remove()");
  auto release = std::make_shared<GradientRelease>(&optimizer, options);
  for (const at::Tensor& param : left_to_step) {
    release->watched_.emplace(param.unsafeGetTensorImpl(), Watched{param, false});
  }
  release->watch();
  optimizer.release_ = release;
  return release;
}

void GradientRelease::end() {
  const std::lock_guard lock(mutex_);
  if (optimizer_ == nullptr) return;
  const std::shared_ptr<GradientRelease> self = shared_from_this();
  optimizer_->release_ = nullptr;
  optimizer_ = nullptr;
  for (const auto& [key, watched] : watched_) {
    if (watched.has_hook) remove_hook(watched.param, this);
  }
  watched_.clear();
}

void GradientRelease::remove_hook(const at::Tensor& param, const GradientRelease* release) {
  auto* const hook = dynamic_cast<Hook*>(hook_of(param));
  // Where others have put theirs in its place, they call it, or nobody does: it does nothing from now on.
  if (hook == nullptr || hook->release().get() != release) return;
  impl::set_post_acc_grad_hooks(param, hook->take_before());
}

void GradientRelease::check_free(const at::Tensor& param) const {
  const auto* const hook = dynamic_cast<const Hook*>(hook_of(param));
  const std::shared_ptr<GradientRelease> other = hook == nullptr ? nullptr : hook->release();
  TORCH_CHECK(other == nullptr || !other->is_active(), "gradients of ", optimizer_->name(param), " of shape ",
              param.sizes(), " are released already, by another optimizer; end that first: handle.remove()");
}

void GradientRelease::watch() {
  const std::lock_guard lock(mutex_);
  std::unordered_set<const void*> current;
  std::vector<at::Tensor> added;
  for (const at::Tensor& param : params()) {
    current.insert(param.unsafeGetTensorImpl());
    if (watched_.count(param.unsafeGetTensorImpl()) == 0) added.push_back(param);
  }
  for (const at::Tensor& param : added) check_free(param);
  for (auto watched = watched_.begin(); watched != watched_.end();) {
    if (current.count(watched->first) != 0) {
      ++watched;
      continue;
    }
    if (watched->second.has_hook) remove_hook(watched->second.param, this);
    watched = watched_.erase(watched);
  }
  for (const at::Tensor& param : added) {
    std::unique_ptr<PostAccumulateGradHook> before;
    if (hook_of(param) != nullptr) before = std::move(impl::post_acc_grad_hooks(param));
    // On a frozen parameter, too: there it waits until the parameter is trained.
    impl::set_post_acc_grad_hooks(param, std::make_unique<Hook>(weak_from_this(), std::move(before)));
    watched_.emplace(param.unsafeGetTensorImpl(), Watched{param, true});
  }
}

void GradientRelease::release(const at::Tensor& param) {
  const std::lock_guard lock(mutex_);
  if (optimizer_ == nullptr || accumulating_ > 0 || !param.grad().defined()) return;
  const at::NoGradGuard no_grad;
  if (clip_.has_value() && clip_->is_measuring()) {
    clip_->measure(param);
    param.mutable_grad() = at::Tensor();
    return;
  }
  TORCH_CHECK(released_.count(param.unsafeGetTensorImpl()) == 0, "the gradient of ", optimizer_->name(param),
              " of shape ", param.sizes(),
              " is complete a second time since step() or zero_grad() was called, and the first one has been applied "
              "already: gradient release allows one backward() a step. Call optimizer.step() after each, and all but "
              "the last of those whose gradients are to be added inside handle.accumulate()");
  if (!options_.pre_step() || options_.pre_step()(param, group_of(param))) {
    if (optimizer_ == nullptr) return;  // ended by pre_step
    optimizer_->step_released(param, clip_.has_value() ? clip_->factor(param) : at::Tensor());
  }
  param.mutable_grad() = at::Tensor();
  released_.insert(param.unsafeGetTensorImpl());
}

at::Tensor GradientRelease::begin_step() {
  const std::lock_guard lock(mutex_);
  watch();
  const at::NoGradGuard no_grad;
  const at::Tensor coefficient = clip_.has_value() ? clip_->factor_of_step() : at::Tensor();
  if (clip_.has_value()) clip_->finish(params());
  released_.clear();
  return coefficient;
}

void GradientRelease::finish() {
  const std::lock_guard lock(mutex_);
  const at::NoGradGuard no_grad;
  if (clip_.has_value() && !released_.empty()) clip_->finish(params());
  released_.clear();
}

at::Tensor GradientRelease::clip_grad_norm(double max_norm) const {
  TORCH_CHECK(clip_.has_value(), "clip_grad_norm_(", max_norm,
              ") while gradients are released would clip nothing: their norm is known when all have been applied. Must "
              "be GradientReleaseOptions().clip(\"two_pass\" (exact, by two backward passes), \"previous\" or "
              "\"parameter\").max_norm(",
              max_norm, ")");
  TORCH_CHECK(max_norm == clip_->max_norm(), "clip_grad_norm_: max_norm = ", max_norm,
              " while gradients are released; must be what enable_gradient_release() was given, ", clip_->max_norm(),
              ", by which they have been clipped already");
  return clip_->norm_now(params());
}

void GradientRelease::measure_norm(const std::function<void()>& backward) {
  TORCH_CHECK(clip_.has_value() && clip_->way() == "two_pass", "measure_norm() with clip = \"", options_.clip(),
              "\"; must be \"two_pass\"");
  TORCH_CHECK(is_active() && accumulating_ == 0 && !clip_->is_measuring(),
              "measure_norm() inside accumulate() or itself, or after remove(); must be one at a time, while gradients "
              "are released");
  for (const at::Tensor& param : params()) {
    TORCH_CHECK(!param.grad().defined(),
                "measure_norm() while there are gradients, to which backward() would add twice (those of accumulate() "
                "have no place beside clip = \"two_pass\"); call optimizer.zero_grad() first");
  }
  finish();
  clip_->begin_measuring();
  try {
    backward();
    const at::NoGradGuard no_grad;
    for (const at::Tensor& param : params()) {
      if (!param.grad().defined()) continue;  // else left to step()
      clip_->measure(param);
      param.mutable_grad() = at::Tensor();
    }
    clip_->end_measuring(params());
  } catch (...) {
    clip_->stop_measuring();
    throw;
  }
}

void GradientRelease::accumulate(const std::function<void()>& backward) {
  struct Inside {
    int& count;
    explicit Inside(int& c) : count(c) { ++count; }
    ~Inside() { --count; }
  } const inside(accumulating_);
  backward();
}

std::vector<at::Tensor> GradientRelease::params() const {
  std::vector<at::Tensor> result;
  if (optimizer_ == nullptr) return result;
  for (const auto& group : optimizer_->param_groups()) {
    result.insert(result.end(), group.params().begin(), group.params().end());
  }
  return result;
}

::torch::optim::OptimizerParamGroup& GradientRelease::group_of(const at::Tensor& param) const {
  const auto position = optimizer_->position_of("step_param", param);
  optimizer_->group_options(position.group);  // settled, as its steps see them
  return optimizer_->param_groups()[position.group];
}

// ---- the public side ------------------------------------------------------------------------------------------------

GradientReleaseHandle::GradientReleaseHandle(std::shared_ptr<GradientRelease> release) : release_(std::move(release)) {
  TORCH_CHECK(release_ != nullptr,
              "GradientReleaseHandle: release is null; must be what enable_gradient_release() returns");
}

bool GradientReleaseHandle::active() const { return release_->is_active(); }
void GradientReleaseHandle::remove() { release_->end(); }
at::Tensor GradientReleaseHandle::grad_norm() const { return release_->norm(); }
void GradientReleaseHandle::measure_norm(const std::function<void()>& backward) {
  TORCH_CHECK(backward != nullptr, "measure_norm: backward is empty; must be a function to call");
  release_->measure_norm(backward);
}
void GradientReleaseHandle::accumulate(const std::function<void()>& backward) {
  TORCH_CHECK(backward != nullptr, "accumulate: backward is empty; must be a function to call");
  release_->accumulate(backward);
}

namespace {

using Named = std::vector<std::pair<std::string, at::Tensor>>;

GradientReleaseHandle enable(const Named& named, ::torch::optim::Optimizer& optimizer,
                             const GradientReleaseOptions& options) {
  const char* const where = "enable_gradient_release: ";
  auto* const flash = dynamic_cast<FlashOptimizer*>(&optimizer);
  TORCH_CHECK(flash != nullptr, where, "optimizer is none of flashoptim's; must be a FlashOptimizer (FlashAdamW, ...)");
  check_options(options);
  std::unordered_set<const void*> owned, chosen;
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& param : group.params()) owned.insert(param.unsafeGetTensorImpl());
  }
  for (const auto& [name, param] : named) {
    TORCH_CHECK(param.defined(), where, name, " is undefined; must be a parameter");
    const bool is_owned = owned.count(param.unsafeGetTensorImpl()) != 0;
    TORCH_CHECK(
        is_owned || !param.requires_grad(), where, name, " of shape ", param.sizes(),
        " is in no group of the optimizer; must be the optimizer's own parameters and frozen ones. Where several "
        "optimizers share a model, hand each its own parameters");
    if (is_owned) chosen.insert(param.unsafeGetTensorImpl());
  }
  TORCH_CHECK(!chosen.empty(), where, "no parameter of the optimizer is among them: there is nothing to release");
  std::vector<at::Tensor> left_to_step;
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& param : group.params()) {
      if (chosen.count(param.unsafeGetTensorImpl()) == 0) left_to_step.push_back(param);
    }
  }
  return GradientReleaseHandle(GradientRelease::begin(*flash, options, left_to_step));
}

}  // namespace

GradientReleaseHandle enable_gradient_release(const ::torch::nn::Module& module, ::torch::optim::Optimizer& optimizer,
                                              const GradientReleaseOptions& options) {
  Named named;
  for (const auto& item : module.named_parameters())
    named.emplace_back("parameter \"" + item.key() + "\"", item.value());
  return enable(named, optimizer, options);
}

GradientReleaseHandle enable_gradient_release(const std::vector<at::Tensor>& params,
                                              ::torch::optim::Optimizer& optimizer,
                                              const GradientReleaseOptions& options) {
  Named named;
  for (size_t i = 0; i < params.size(); ++i) named.emplace_back("params[" + std::to_string(i) + "]", params[i]);
  return enable(named, optimizer, options);
}

}  // namespace flashoptim::libtorch
