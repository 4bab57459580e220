// Parameters: which can be optimized; and the state that is kept for one, in the terms of the store.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "flashoptim/torch/optimizer.h"
#include "libtorch/store/arrays.h"

namespace flashoptim::libtorch {

/// "FlashAdamW", ...
std::string class_name(OptimizerKind kind);

/// Every optimizer that is alive, for what happens to parameters outside of it (cast_model).
struct LiveOptimizers {
  static void add(FlashOptimizer* optimizer);
  static void remove(FlashOptimizer* optimizer);
  static std::vector<FlashOptimizer*> all();
  /// Throws unless the options of all its groups are there and allowed.
  static void check_groups(const FlashOptimizer& optimizer) { optimizer.check_groups(); }
};

/// What a step takes of options that check() has passed.
Hyperparameters hyperparameters_of(OptimizerKind kind, const OptionValues& values);

/// Throws unless `param` can be optimized; `name` stands for it in the message.
void check_param(const std::string& name, const at::Tensor& param);
/// Throws unless `tensor` is dense and has values, or is on meta where it may be.
void check_has_values(const std::string& name, const at::Tensor& tensor, bool may_be_meta = false);
/// Throws unless `grad` goes with `param`; `name` stands for it in the message.
void check_gradient(const std::string& name, const at::Tensor& param, const at::Tensor& grad);

/// The library's word for a dtype of check_param.
DType dtype_of(const at::Tensor& param);

/// How a parameter's state is to be.
struct Form {
  store::Format format;
  bool has_momentum = true;
};
/// Whether archives of `kind` hold the option, of for_each_option()'s index and name.
bool is_archived(OptimizerKind kind, int index, std::string_view name);
/// What a group's options mean for a parameter.
Form form_of(const OptionValues& values, bool has_momentum, const at::Tensor& param);
inline Form form_of(const FlashOptions& options, const at::Tensor& param) {
  return form_of(options.values(), options.has_momentum(), param);
}

// Order of elements in memory.

/// Strides of a dense tensor that lies as a state of this form does; as the parameter where it has no array.
std::vector<int64_t> strides_of(OptimizerKind kind, const FlashParamState& state, Form form, const at::Tensor& param);
/// Whether elements lie with these strides; those of dimensions of one element do not matter.
bool lies(const at::Tensor& tensor, at::IntArrayRef strides);
/// A copy of the tensor's values with these strides.
at::Tensor copy_with(const at::Tensor& tensor, at::IntArrayRef strides);

// States. Those that are made have allocations of their own for every tensor.

/// A state's arrays, borrowed: of its first `slots` slots, none of them where it has fewer.
store::Stored stored_of(const FlashParamState& state, int slots);
bool has_correction(const FlashParamState& state);
/// The host counts the state's steps from now on. Waits for the device where it was that.
void count_on_host(FlashParamState* state);

/// What a state is to be made for.
struct NewState {
  const at::Tensor* param;
  Form form;
  std::unique_ptr<FlashParamState> state;  ///< as before the first step: every byte 0, which decodes to 0
};
/// Makes the states, zeroing those of a device together.
void make_states(OptimizerKind kind, std::vector<NewState>* wanted);
std::unique_ptr<FlashParamState> make_state(OptimizerKind kind, const at::Tensor& param, Form form);

/// Whether a step can run on a state as it is; `name` stands for the parameter in messages.
store::Fit fit_of(OptimizerKind kind, const std::string& name, const FlashParamState& state, const at::Tensor& param,
                  Form form);

/// A state in another form.
struct ConvertedState {
  std::unique_ptr<FlashParamState> state;
  at::Tensor values;  ///< the parameter's new ones; undefined where they stay
  store::CorrectionFate fate;
};
/// Changes nothing. Slots that the form lacks (momentum is 0) stay as they are, for later; where it has slots that are
/// not there yet, the next step is the first.
ConvertedState convert_state(OptimizerKind kind, const std::string& name, const FlashParamState& saved,
                             const at::Tensor& param, Form form);
/// TORCH_WARN where weights lose what their correction held.
void warn_of(store::CorrectionFate fate, const std::string& name, const FlashParamState& saved,
             const at::Tensor& param);

/// The weights, fp32, that a parameter and the correction in its state stand for.
at::Tensor merged_weights(const at::Tensor& param, const FlashParamState& state);

}  // namespace flashoptim::libtorch
