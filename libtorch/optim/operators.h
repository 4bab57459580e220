// The operators flashoptim::* as C++ functions. They go through torch's dispatcher, like every other caller's.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flashoptim/types.h"

namespace flashoptim::libtorch::operators {

/// The optimizer's name in the operators' schemas.
const char* name_of(OptimizerKind kind);

/// Lists as step_ takes them (libtorch/ops/ops.cpp): one entry per parameter, states and scales slot by slot.
struct StepLists {
  std::vector<at::Tensor> params, grads, corrections, states, scales;
  std::vector<int64_t> master_weights, state_codecs, rows, first_elements, hyper_index;
  std::vector<double> hypers;
};
void step_(OptimizerKind kind, const StepLists& lists, const at::Tensor& nonfinite);

at::Tensor merge_weights(const at::Tensor& param, const at::Tensor& correction, MasterWeights master_weights);
void split_weights_(const at::Tensor& weights, const at::Tensor& param, const at::Tensor& correction,
                    MasterWeights master_weights);
std::vector<at::Tensor> decode_states(OptimizerKind kind, const std::vector<at::Tensor>& states,
                                      const std::vector<at::Tensor>& scales, StateCodec codec, int64_t rows);
/// Zeroes dense tensors of one device, on CUDA in one launch.
void zero_(const std::vector<at::Tensor>& tensors);
/// [rows, row_size, groups_per_row]
std::vector<int64_t> group_layout(at::IntArrayRef sizes);
/// Names of all slots, those that only momentum needs included.
const std::vector<std::string>& state_names(OptimizerKind kind);
/// Per slot: 1 where it takes both signs, else 0.
std::vector<int64_t> state_signs(OptimizerKind kind);

}  // namespace flashoptim::libtorch::operators
