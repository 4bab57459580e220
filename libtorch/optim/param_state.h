// Parameters: which can be optimized, and the state that is kept for one.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "flashoptim/torch/optimizer.h"

namespace flashoptim::libtorch {

/// "FlashAdamW", ...
const char* class_name(OptimizerKind kind);

/// Throws unless `param` can be optimized; `name` stands for it in the message.
void check_param(const std::string& name, const at::Tensor& param);

/// Same order of elements in memory, for tensors of the same shape.
bool same_element_order(const at::Tensor& a, const at::Tensor& b);

/// Tensors of zeros, asked for one by one and made together. On CUDA they lie in a few allocations, one behind the
/// other, and one launch zeroes them; elsewhere each has its own.
class Zeros {
 public:
  /// *place, which must stay where it is, becomes a tensor of these dense sizes and strides.
  void add(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options, at::Tensor* place);
  void make();

 private:
  struct Wanted {
    std::vector<int64_t> sizes, strides;
    at::TensorOptions options;
    int64_t numel;
    at::Tensor* place;
  };
  void make_together(at::Device device);

  std::vector<Wanted> wanted_;
};

/// A state before the first step: every byte 0, which decodes to 0. Its tensors are there once `zeros` has been made.
std::unique_ptr<FlashParamState> make_state(const at::Tensor& param, const FlashOptions& options, Zeros* zeros);
/// As make_state, with the formats given.
std::unique_ptr<FlashParamState> make_state(const at::Tensor& param, OptimizerKind kind, bool has_momentum,
                                            MasterWeights master_weights, StateCodec codec, Zeros* zeros);
/// Gives a state the slots that it lacks because momentum was 0 so far.
void add_slots(const at::Tensor& param, OptimizerKind kind, FlashParamState* state, Zeros* zeros);

}  // namespace flashoptim::libtorch
