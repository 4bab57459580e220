// at::Tensors as the store takes and gives them, and its errors as LibTorch users catch them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "libtorch/store/store.h"

namespace flashoptim::libtorch {

/// Borrowed: good as long as `tensor` stays where it is.
inline AtenTensorHandle handle_of(const at::Tensor& tensor) {
  return ::torch::aot_inductor::tensor_pointer_to_tensor_handle(const_cast<at::Tensor*>(&tensor));
}

inline at::Tensor take(store::Tensor tensor) {
  at::Tensor* const pointer = ::torch::aot_inductor::tensor_handle_to_tensor_pointer(tensor.get());
  return pointer == nullptr ? at::Tensor() : std::move(*pointer);
}

/// torch's codes of dtypes and devices in its stable ABI are its enumerators.
inline int32_t dtype_code(at::ScalarType dtype) { return static_cast<int32_t>(dtype); }

inline store::Device device_of(at::Device device) {
  return {static_cast<int32_t>(device.type()), device.is_cpu() ? 0 : device.index()};
}

/// store::read_facts, without calls through the stable ABI: a step asks this of every tensor.
inline bool read_facts(const at::Tensor& tensor, store::Facts* facts) {
  if (!tensor.defined() || tensor.layout() != at::kStrided || !tensor.has_storage()) return false;
  facts->data = tensor.const_data_ptr();
  facts->sizes = tensor.sizes().data();
  facts->strides = tensor.strides().data();
  facts->dim = tensor.dim();
  facts->dtype = dtype_code(tensor.scalar_type());
  facts->storage = static_cast<int64_t>(tensor.storage().nbytes());
  return true;
}

/// What the store says, without the name of its function, which callers here have not called.
inline std::string message_of(const std::exception& error) {
  const std::string text = error.what();
  const std::string prefix = "flashoptim";
  if (text.compare(0, prefix.size(), prefix) != 0) return text;
  const size_t end = text.find(": ");
  return end == std::string::npos || text.find(' ') < end ? text : text.substr(end + 2);
}

/// Calls into the store, whose std::runtime_error becomes c10::Error.
template <class Call>
auto in_store(Call&& call) {
  try {
    return call();
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception& error) {
    TORCH_CHECK(false, message_of(error));
  }
}

}  // namespace flashoptim::libtorch
