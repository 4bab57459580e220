// FlashAdamW, FlashAdam and so on, a class for every Options struct of options.h: used like torch::optim's optimizers.
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

  /// Patterns over names ("layers.0.norm.weight"; globs as cast_model()'s) and options for the parameters that match:
  /// whatever is set on them. Where several patterns match, all apply, later ones over earlier ones.
  using Policy = std::vector<std::pair<std::string, Options>>;
  /// Named parameters, as module->named_parameters() gives them: reports and describe() call them so. Throws c10::Error
  /// where an option of `policy` has a value that is not allowed; TORCH_WARN names patterns that match nothing.
  explicit FlashOptimizerOf(const ::torch::OrderedDict<std::string, ::torch::Tensor>& params, Options defaults = {},
                            const Policy& policy = {})
      : FlashOptimizer(params, std::make_unique<Options>(std::move(defaults)), entries(policy)) {}

 private:
  static PolicyEntries entries(const Policy& policy) {
    PolicyEntries result;
    for (const auto& [pattern, options] : policy) result.emplace_back(pattern, &options);
    return result;
  }
};

#define FLASHOPTIM_CLASS(name)                                              \
  class Flash##name final : public FlashOptimizerOf<Flash##name##Options> { \
   public:                                                                  \
    using FlashOptimizerOf::FlashOptimizerOf;                               \
  };
FLASHOPTIM_FOR_EACH_OPTIMIZER(FLASHOPTIM_CLASS)
#undef FLASHOPTIM_CLASS

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::FlashOptimizerOf;
#define FLASHOPTIM_CLASS(name) using ::flashoptim::libtorch::Flash##name;
FLASHOPTIM_FOR_EACH_OPTIMIZER(FLASHOPTIM_CLASS)
#undef FLASHOPTIM_CLASS
}  // namespace torch
