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
/// - buffers that hold positions, frequencies or schedules, which 16 bits would spoil (a rotary embedding's inv_freq is
///   0.7 radians off at position 4,096 in bfloat16), unless `cast_buffers` names them: told by the last part of their
///   name (kExactBufferNames) or by their values: sequences of 8 numbers or more that rise or fall all the way, whole
///   numbers of which `dtype` lacks some, and numbers that would become infinite or 0.
/// Gradients that exist are cast along. What a float32 parameter loses in 16 bits goes into its correction in every
/// optimizer of flashoptim's that is alive and holds it, so that training goes on from the float32 weights. Throws
/// c10::Error, with nothing cast, for another dtype or a pattern that matches nothing.
void cast_model(::torch::nn::Module& module, ::torch::Dtype dtype = ::torch::kBFloat16,
                const std::vector<std::string>& keep_fp32_patterns = {},
                const std::vector<std::string>& cast_buffers = {});

/// The same, with `optimizer`, one of flashoptim's, as the only one that learns of it.
void cast_model(::torch::nn::Module& module, ::torch::optim::Optimizer& optimizer,
                ::torch::Dtype dtype = ::torch::kBFloat16, const std::vector<std::string>& keep_fp32_patterns = {},
                const std::vector<std::string>& cast_buffers = {});

/// Patterns for the last part of a buffer's name, in lower case, that cast_model() leaves alone.
extern const std::vector<std::string> kExactBufferNames;

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
