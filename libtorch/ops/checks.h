// All checks of what callers pass to the operators, and its unpacking into the library's own types. Whatever is wrong
// throws std::runtime_error("flashoptim::<op>: <argument>[<index>] ... ; <what is allowed>") before anything is
// changed.
#pragma once

#include <string>
#include <vector>

#include "flashoptim/step.h"
#include "libtorch/ops/boxed.h"
#include "libtorch/ops/device_plan.h"
#include "libtorch/ops/tensor_info.h"

namespace flashoptim::ops {

OptimizerKind parse_optimizer(Op op, const std::string& name);
MasterWeights parse_master_weights(Op op, const std::string& argument, int64_t value);
StateCodec parse_state_codec(Op op, const std::string& argument, int64_t value);

/// Arguments of step_, taken off the stack.
struct StepArguments {
  std::string optimizer;
  TensorList params, grads, corrections, states, scales;
  std::vector<int64_t> master_weights, state_codecs, rows, first_elements, hyper_index;
  std::vector<double> hypers;
  double grad_scale = 1.0;
  Tensor found_inf, nonfinite;
};

/// The same, checked, as the library wants it.
struct StepInput {
  OptimizerKind optimizer;
  bool has_momentum;
  Backend backend;
  Device device;
  std::vector<ParameterTensors> tensors;
  std::vector<Hyperparameters> hypers;
  StepControls controls;
};

/// Sets of hyperparameter_count(optimizer) numbers in the order of optimizer_info.h, appended to *hypers.
void unpack_hypers(Op op, const std::vector<double>& values, OptimizerKind optimizer, bool has_momentum,
                   std::vector<Hyperparameters>* hypers);

/// grad_scale, which must be a finite float32.
float checked_grad_scale(Op op, double value);

/// Throws unless hyper_index[index] = value is one of `sets`.
void check_hyper_index(Op op, size_t index, int64_t value, size_t sets);

/// Address of an optional tensor of `count` elements of a dtype, contiguous, on `device`; null where there is none.
void* unpack_array(Op op, Name name, const Tensor& tensor, int32_t dtype, int64_t count, Device device);

/// Checks everything but what a plan checks when it is made (overlapping memory). Clears and fills *input.
void unpack_step(Op op, const StepArguments& arguments, StepInput* input);

/// Throws where two written arrays share memory. Costs a sort, so it is done when a plan is made.
void check_no_overlap(Op op, const std::vector<ParameterTensors>& tensors);

/// A parameter with its correction (null where master_weights has none).
struct WeightInput {
  Backend backend;
  DType dtype;
  MasterWeights master_weights;
  TensorInfo param;
  void* correction = nullptr;
};
WeightInput unpack_weight(Op op, const Tensor& param, const Tensor& correction, int64_t master_weights);

/// fp32 tensor of the sizes and element order of `like`.
TensorInfo unpack_float_like(Op op, const std::string& argument, const Tensor& tensor, const TensorInfo& like,
                             const std::string& like_name);

/// States and scales of one tensor. `infos` describes the states.
struct StatesInput {
  Backend backend;
  OptimizerKind optimizer;
  bool has_momentum;
  ParameterTensors tensor;
  std::vector<TensorInfo> infos;
};
StatesInput unpack_states(Op op, const std::string& optimizer, const TensorList& states, const TensorList& scales,
                          int64_t state_codec, int64_t rows);

}  // namespace flashoptim::ops
