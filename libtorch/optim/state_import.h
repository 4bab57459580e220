// States that come from elsewhere than an archive of ours: collected, checked and converted, and then an optimizer's.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "flashoptim/torch/optimizer.h"
#include "libtorch/optim/param_state.h"

namespace flashoptim::libtorch {

/// Nothing of the optimizer changes before finish().
class StateImport {
 public:
  /// `where` begins messages: "load_safetensors: ".
  StateImport(FlashOptimizer& optimizer, std::string where);

  OptimizerKind kind() const { return optimizer_.kind_; }
  const std::string& where() const { return where_; }
  size_t groups() const { return options_.size(); }
  const std::vector<at::Tensor>& params(size_t group) const { return optimizer_.param_groups()[group].params(); }
  /// A group's options as they are to be: its own so far. To be set before its states are added.
  FlashOptions& options(size_t group) { return *options_[group]; }
  OptionValues& values(size_t group) { return options_[group]->values_; }

  /// The state of a parameter, in any format; arrays of the parameter's shape, or without states. Converted to the
  /// group's formats, rounded to nearest. Throws c10::Error that names the parameter where a step cannot go on from it.
  void add(size_t group, size_t index, FlashParamState state);
  /// Options and states are the optimizer's now. Throws, with nothing changed, where options are not allowed.
  void finish();

  // For the way out.
  static const FlashParamState* state_of(const FlashOptimizer& optimizer, const at::Tensor& param) {
    return optimizer.find_state(param);
  }
  /// As steps see them, the learning rate from the device if it is there.
  static std::unique_ptr<FlashOptions> options_of(const FlashOptimizer& optimizer, size_t group);

 private:
  struct Added {
    at::Tensor param;
    ConvertedState conversion;
  };

  FlashOptimizer& optimizer_;
  std::string where_;
  std::vector<std::unique_ptr<FlashOptions>> options_;
  std::vector<Added> states_;
};

}  // namespace flashoptim::libtorch
