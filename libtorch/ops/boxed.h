// Arguments and results of boxed kernels: who owns what crosses torch's stable ABI.
//
// A boxed kernel gets a stack of 64-bit values and owns what they point at: tensors, lists, strings. These classes take
// them over. torch's own TORCH_BOX is not used because its std::string conversion (2.11 to 2.13) leaks the string, and
// step_ has one.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace flashoptim::ops {

/// Throws std::runtime_error where a call into torch failed.
void check_torch(AOTITorchError error, const char* what);

/// One owned tensor, or none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor();

  AtenTensorHandle get() const { return handle_; }
  bool has_value() const { return handle_ != nullptr; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_ = nullptr;
};

using TensorList = std::vector<Tensor>;

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
