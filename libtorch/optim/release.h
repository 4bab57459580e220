// What an optimizer holds while its gradients are released.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "flashoptim/torch/gradient_release.h"
#include "libtorch/optim/grad_norm.h"

namespace flashoptim::libtorch {

/// Gradient release of one optimizer, which holds it and is held by nobody: hooks hold this weakly, so that optimizer,
/// parameters and this are freed without each other.
class GradientRelease : public std::enable_shared_from_this<GradientRelease> {
 public:
  GradientRelease(FlashOptimizer* optimizer, GradientReleaseOptions options);
  ~GradientRelease();

  /// Begins: hooks for the optimizer's parameters but `left_to_step`.
  static std::shared_ptr<GradientRelease> begin(FlashOptimizer& optimizer, const GradientReleaseOptions& options,
                                                const std::vector<at::Tensor>& left_to_step);
  /// The optimizer is another object now.
  void follow(FlashOptimizer* optimizer) { optimizer_ = optimizer; }
  bool is_active() const { return optimizer_ != nullptr; }
  /// Ends release, of the optimizer, too.
  void end();

  /// A gradient is complete: steps the parameter and frees the gradient.
  void release(const at::Tensor& param);
  /// Gives a hook to parameters that are new in the groups, and takes it from those that have left them. Throws, with
  /// nothing changed, where another optimizer releases one.
  void watch();
  /// step() begins: what it multiplies gradients with that are left to it (undefined: nothing).
  at::Tensor begin_step();
  /// zero_grad() was called.
  void finish();
  at::Tensor clip_grad_norm(double max_norm) const;

  at::Tensor norm() const { return clip_.has_value() ? clip_->norm() : at::Tensor(); }
  void measure_norm(const std::function<void()>& backward);
  void accumulate(const std::function<void()>& backward);

 private:
  class Hook;
  struct Watched {
    at::Tensor param;
    bool has_hook;
  };

  std::vector<at::Tensor> params() const;
  ::torch::optim::OptimizerParamGroup& group_of(const at::Tensor& param) const;
  void check_free(const at::Tensor& param) const;
  static void remove_hook(const at::Tensor& param, const GradientRelease* release);

  FlashOptimizer* optimizer_;  // null: release has ended
  GradientReleaseOptions options_;
  std::optional<ReleaseClip> clip_;
  std::unordered_map<const void*, Watched> watched_;
  std::unordered_set<const void*> released_;  // since the last step() or zero_grad()
  int accumulating_ = 0;
  std::recursive_mutex mutex_;  // backward() has a thread for every device
};

}  // namespace flashoptim::libtorch
