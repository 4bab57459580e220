// FlashAdamW, FlashAdam, FlashSGD, FlashSGDW, FlashLion: used like torch::optim's optimizers.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "flashoptim/torch/namespace.h"
#include "flashoptim/torch/optimizer.h"
#include "flashoptim/torch/options.h"

namespace flashoptim::libtorch {

template <class OptionsType>
class FlashOptimizerOf : public FlashOptimizer {
 public:
  using Options = OptionsType;

  /// A group's own options must be of this type; what they do not set they take from `defaults`.
  explicit FlashOptimizerOf(const std::vector<::torch::optim::OptimizerParamGroup>& groups, Options defaults = {})
      : FlashOptimizer(groups, std::make_unique<Options>(std::move(defaults))) {}
  explicit FlashOptimizerOf(std::vector<::torch::Tensor> params, Options defaults = {})
      : FlashOptimizerOf({::torch::optim::OptimizerParamGroup(std::move(params))}, std::move(defaults)) {}
};

/// Adam with decoupled weight decay.
class FlashAdamW final : public FlashOptimizerOf<FlashAdamWOptions> {
 public:
  using FlashOptimizerOf::FlashOptimizerOf;
};

/// Adam with L2 regularization.
class FlashAdam final : public FlashOptimizerOf<FlashAdamOptions> {
 public:
  using FlashOptimizerOf::FlashOptimizerOf;
};

/// SGD with momentum, dampening, Nesterov momentum and L2 regularization.
class FlashSGD final : public FlashOptimizerOf<FlashSGDOptions> {
 public:
  using FlashOptimizerOf::FlashOptimizerOf;
};

/// SGD with decoupled weight decay.
class FlashSGDW final : public FlashOptimizerOf<FlashSGDWOptions> {
 public:
  using FlashOptimizerOf::FlashOptimizerOf;
};

/// Lion (sign of interpolated momentum) with decoupled weight decay.
class FlashLion final : public FlashOptimizerOf<FlashLionOptions> {
 public:
  using FlashOptimizerOf::FlashOptimizerOf;
};

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::FlashAdam;
using ::flashoptim::libtorch::FlashAdamW;
using ::flashoptim::libtorch::FlashLion;
using ::flashoptim::libtorch::FlashOptimizerOf;
using ::flashoptim::libtorch::FlashSGD;
using ::flashoptim::libtorch::FlashSGDW;
}  // namespace torch
