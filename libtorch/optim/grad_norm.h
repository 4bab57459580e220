// Norms of gradients, and how they clip: as the Python package takes them (_collectives.py), of one process.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace flashoptim::libtorch {

/// Of one gradient; float64, no dimensions.
at::Tensor sum_of_squares(const at::Tensor& grad);
/// From sums of squares, added up in their order, on the first one's device; float32, no dimensions.
at::Tensor total_norm(const std::vector<at::Tensor>& squares);
/// What gradients of a norm are multiplied with, so that theirs is at most `max_norm`: torch's formula.
at::Tensor clip_coefficient(const at::Tensor& norm, double max_norm);
/// torch.nn.utils.clip_grad_norm_: scales gradients in place; returns their norm before.
at::Tensor clip_in_place(const std::vector<at::Tensor>& grads, double max_norm);

/// Clips released gradients to a norm of `max_norm`, in one of these ways:
///   two_pass   by the norm of all, measured by a backward() before the one that steps. Exact.
///   previous   by the norm of all in steps before: `decay` times what it was plus 1 - `decay` times the last one.
///   parameter  each by its own norm.
class ReleaseClip {
 public:
  using Params = std::vector<at::Tensor>;

  ReleaseClip(std::string way, double max_norm, double decay)
      : way_(std::move(way)), max_norm_(max_norm), decay_(decay) {}

  const std::string& way() const { return way_; }
  double max_norm() const { return max_norm_; }
  /// The norm of all gradients of the last step; float32. Undefined: no step yet.
  const at::Tensor& norm() const { return norm_; }
  bool is_measuring() const { return is_measuring_; }

  /// Adds a gradient to the norm.
  void measure(const at::Tensor& param);
  /// What the step of a parameter multiplies its gradient with. Throws where "two_pass" has measured no norm.
  at::Tensor factor(const at::Tensor& param);
  /// The same for what is left to step(); undefined: nothing.
  at::Tensor factor_of_step() const { return measured_; }

  void begin_measuring();
  void stop_measuring() { is_measuring_ = false; }
  /// The norm of what was measured, and what the next backward() multiplies gradients with. `params`: in the order of
  /// groups, which backward() does not decide.
  void end_measuring(const Params& params);
  /// A step is over: all its gradients have been applied.
  void finish(const Params& params);
  /// The norm of the step under way, or of the last one; 0: there was none.
  at::Tensor norm_now(const Params& params) const;

 private:
  at::Tensor total(const Params& params) const;

  std::string way_;
  double max_norm_, decay_;
  at::Tensor norm_, average_, measured_;
  std::unordered_map<const void*, at::Tensor> squares_;
  bool is_measuring_ = false;
};

}  // namespace flashoptim::libtorch
