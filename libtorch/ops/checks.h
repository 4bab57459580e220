// Checks of what callers pass to the operators. Whatever is wrong throws std::runtime_error("flashoptim::<op>:
// <argument>[<index>] ... ; <what is allowed>") before anything is changed.
#pragma once

#include <string>
#include <vector>

#include "flashoptim/step.h"
#include "libtorch/ops/boxed.h"
#include "libtorch/store/format.h"

namespace flashoptim::ops {

OptimizerKind parse_optimizer(Op op, const std::string& name);
MasterWeights parse_master_weights(Op op, const std::string& argument, int64_t value);
StateCodec parse_state_codec(Op op, const std::string& argument, int64_t value);
DType parse_dtype(Op op, const std::string& argument, int64_t value);

/// What describes a shard's place (place_of_box): first_element, run, stride, rows and row size of the whole, its
/// leading dimensions.
inline constexpr int64_t kPlaceNumbers = 6;
/// None at all, or zeros: the tensor is the whole.
store::Shard parse_shard(Op op, const std::vector<int64_t>& numbers);

/// Whether a set of numbers must say which step it is, or may leave that open by a step of 0.
enum class StepNumber { kGiven, kOpen };

/// Sets of hyperparameter_count(optimizer) numbers in the order of optimizer_info.h, appended to *hypers.
void unpack_hypers(Op op, const std::vector<double>& values, OptimizerKind optimizer, StepNumber step,
                   std::vector<Hyperparameters>* hypers);

/// grad_scale, which must be a finite float32.
float checked_grad_scale(Op op, double value);

/// Address of an optional tensor (null: none) of `count` elements of a dtype, contiguous, on `device`.
void* unpack_array(Op op, Name name, AtenTensorHandle tensor, int32_t dtype, int64_t count, Device device);

/// Throws unless a list has one entry for each of `wanted` tensors.
void check_count(Op op, const char* argument, size_t size, size_t wanted);

/// How many tensors of a list there are for each of `tensors` parameters, and whether that means momentum.
int slots_per_tensor(Op op, OptimizerKind optimizer, const char* argument, size_t size, size_t tensors,
                     bool* has_momentum);

}  // namespace flashoptim::ops
