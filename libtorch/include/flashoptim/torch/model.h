// Whole models: casting to 16 bit for training, fp32 export and import.
#pragma once

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <torch/ordered_dict.h>

#include <string>
#include <vector>

#include "flashoptim/torch/namespace.h"

namespace flashoptim::libtorch {

/// Casts the floating parameters and buffers of `module` to `dtype` (bfloat16 or float16), in place: the parameters
/// stay the same tensors, so tied ones stay tied and optimizers made earlier keep theirs. Left as they are:
/// - what `keep_fp32_patterns` names: globs (`*`, `?`, `[...]`; `*` matches dots, too) over the dotted names of
///   parameters and buffers ("layers.0.norm.weight") and of modules ("layers.*.norm"), which keeps all inside;
/// - parameters and buffers of modules with running statistics (BatchNorm, InstanceNorm with tracking).
/// Gradients that exist are cast along. Throws c10::Error, with nothing cast, for another dtype or a pattern that
/// matches nothing.
void cast_model(::torch::nn::Module& module, ::torch::Dtype dtype = ::torch::kBFloat16,
                const std::vector<std::string>& keep_fp32_patterns = {});

/// The same in mid-training: weights keep their digits, as far as corrections hold them. `optimizer` is one of
/// flashoptim's, made before; parameters that are not its own are cast as above.
void cast_model(::torch::nn::Module& module, ::torch::optim::Optimizer& optimizer,
                ::torch::Dtype dtype = ::torch::kBFloat16, const std::vector<std::string>& keep_fp32_patterns = {});

/// Parameters and buffers by dotted name, copies, floating ones in float32: for a parameter of `optimizer` the weight
/// that its steps continue from (parameter and correction), otherwise its value. `optimizer` is one of flashoptim's.
::torch::OrderedDict<std::string, ::torch::Tensor> get_fp32_model_state(const ::torch::nn::Module& module,
                                                                        const ::torch::optim::Optimizer& optimizer);

/// The inverse: parameters and corrections become the nearest to `state`. Names and shapes must match the module's, and
/// tied parameters must come with equal values; otherwise throws c10::Error with nothing set.
void set_fp32_model_state(::torch::nn::Module& module, ::torch::optim::Optimizer& optimizer,
                          const ::torch::OrderedDict<std::string, ::torch::Tensor>& state);

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::cast_model;
using ::flashoptim::libtorch::get_fp32_model_state;
using ::flashoptim::libtorch::set_fp32_model_state;
}  // namespace torch
