// Parameters: which can be optimized, and the state that is kept for one.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "flashoptim/torch/optimizer.h"

namespace flashoptim::torch {

/// "FlashAdamW", ...
const char* class_name(OptimizerKind kind);

/// Throws unless `param` can be optimized; `name` stands for it in the message.
void check_param(const std::string& name, const at::Tensor& param);

/// Same order of elements in memory, for tensors of the same shape.
bool same_element_order(const at::Tensor& a, const at::Tensor& b);

/// A state before the first step: every byte 0, which decodes to 0.
std::unique_ptr<FlashParamState> make_state(const at::Tensor& param, const FlashOptions& options);
/// As make_state, with the formats given.
std::unique_ptr<FlashParamState> make_state(const at::Tensor& param, OptimizerKind kind, bool has_momentum,
                                            MasterWeights master_weights, StateCodec codec);
/// Gives a state the slots that it lacks because momentum was 0 so far.
void add_slots(const at::Tensor& param, OptimizerKind kind, FlashParamState* state);

}  // namespace flashoptim::torch
