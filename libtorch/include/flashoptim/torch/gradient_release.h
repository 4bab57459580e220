// Gradient release: every parameter is stepped as soon as its gradient is complete, and the gradient is freed at once.
//
//   auto handle = flashoptim::torch::enable_gradient_release(*model, optimizer);
//   for (...) {
//     loss.backward();      // steps
//     optimizer.step();     // ends the step: finds nothing to do, as long as everything is released
//   }
//   handle.remove();
//
// Hooks of the parameters do it, during backward(); the step is step_param(), so every bit is as without. One gradient
// is alive at a time, where there would be one for every parameter.
#pragma once

#include <torch/arg.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "flashoptim/torch/namespace.h"
#include "flashoptim/torch/optimizer.h"

namespace flashoptim::libtorch {

class GradientRelease;

struct GradientReleaseOptions {
  /// Called before each step with the parameter, whose gradient it may change, and its group. Where it returns false,
  /// the gradient is freed without a step.
  using PreStep = std::function<bool(const ::torch::Tensor& param, ::torch::optim::OptimizerParamGroup& group)>;

  /// How gradients are clipped to a norm of max_norm, by min(1, max_norm / (norm + 1e-6)):
  /// "" not at all;
  /// "two_pass" by the norm of all, exactly (GradientReleaseHandle::measure_norm);
  /// "previous" by the norm of all in the steps before this one; in the first, each by its own norm;
  /// "parameter" each by its own norm.
  TORCH_ARG(std::string, clip);
  /// Finite, > 0; given with `clip`, and only then.
  TORCH_ARG(std::optional<double>, max_norm);
  /// With "previous", how slowly its norm follows: 0 is the norm of the last step alone, 0.9 means a tenth of the last
  /// one and nine tenths of what it was. >= 0 and < 1.
  TORCH_ARG(double, norm_decay) = 0;
  TORCH_ARG(PreStep, pre_step);
};

/// What enable_gradient_release() returns. It need not be kept: release ends with remove(), or with the optimizer.
class GradientReleaseHandle {
 public:
  explicit GradientReleaseHandle(std::shared_ptr<GradientRelease> release);

  /// Whether gradients are released: until remove(), or until the optimizer is no more.
  bool active() const;
  /// Ends gradient release: gradients are kept, and step() steps. Calling it again does nothing.
  void remove();
  /// With `clip`, the norm of all gradients of the last step, before clipping: float32, no dimensions. Undefined: no
  /// step yet. With "two_pass" it is there once measure_norm() returns, otherwise once the step ends.
  ::torch::Tensor grad_norm() const;
  /// For clip "two_pass": calls `backward`, which calls loss.backward({}, /*keep_graph=*/true); gradients are freed
  /// after they were added to the norm. The next loss.backward() steps, by gradients that are clipped. Throws
  /// c10::Error where `clip` is another, where there are gradients already, or where no gradient came.
  void measure_norm(const std::function<void()>& backward);
  /// Calls `backward`, whose gradients are kept and added to, as for every micro-batch but the last. The last one,
  /// outside, steps each parameter by the sum; parameters that it does not reach keep theirs for step().
  void accumulate(const std::function<void()>& backward);

 private:
  std::shared_ptr<GradientRelease> release_;
};

/// Begins gradient release. Parameters of `optimizer` (one of flashoptim's) that are not in the module, or not in the
/// list, are left to step(); those of groups that are added later are released, too. One backward() a step: step()
/// stays in the loop, and tells where a step ends; zero_grad() of the optimizer's own type does, too.
///
/// Throws c10::Error, with nothing changed, where a trainable parameter is none of the optimizer's, where none is,
/// where options do not go together, or where gradients of the optimizer or of a parameter are released already.
GradientReleaseHandle enable_gradient_release(const ::torch::nn::Module& module, ::torch::optim::Optimizer& optimizer,
                                              const GradientReleaseOptions& options = {});
GradientReleaseHandle enable_gradient_release(const std::vector<::torch::Tensor>& params,
                                              ::torch::optim::Optimizer& optimizer,
                                              const GradientReleaseOptions& options = {});

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::enable_gradient_release;
using ::flashoptim::libtorch::GradientReleaseHandle;
using ::flashoptim::libtorch::GradientReleaseOptions;
}  // namespace torch
