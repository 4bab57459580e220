// Arguments and results of boxed kernels: who owns what crosses torch's stable ABI.
//
// A boxed kernel gets a stack of 64-bit values and owns what they point at: tensors, lists, strings. These classes take
// them over. torch's own TORCH_BOX is not used because its std::string conversion (2.11 to 2.13) leaks the string, and
// step_ has one.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "libtorch/store/tensor.h"

namespace flashoptim::ops {

using namespace store;  // NOLINT: the operators are written in the store's words

// Each takes over one value of a stack.
Tensor take_tensor(StableIValue value);
Tensor take_optional_tensor(StableIValue value);
TensorList take_tensors(StableIValue value);
std::vector<int64_t> take_ints(StableIValue value);
std::vector<double> take_floats(StableIValue value);
std::string take_string(StableIValue value);
int64_t take_int(StableIValue value);
double take_float(StableIValue value);
bool take_bool(StableIValue value);

// Each makes a value that its receiver owns.
StableIValue give_tensor(Tensor tensor);
StableIValue give_tensors(TensorList tensors);
StableIValue give_bool(bool value);
StableIValue give_int(int64_t value);
StableIValue give_ints(const std::vector<int64_t>& values);
StableIValue give_string(const std::string& text);

}  // namespace flashoptim::ops
