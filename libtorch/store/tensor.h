// Tensors through torch's stable ABI: holding, reading and comparing them, and the words for messages about them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "flashoptim/types.h"
#include "libtorch/store/device.h"

namespace flashoptim::store {

/// ": " and torch's words about the call of this thread that has just failed; nothing where it has none.
std::string torch_said();
/// Throws std::runtime_error where a call into torch failed, with its words.
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
  operator AtenTensorHandle() const { return handle_; }  // NOLINT: borrowed, as functions here take tensors
  bool has_value() const { return handle_ != nullptr; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_ = nullptr;
};

using TensorList = std::vector<Tensor>;

/// What a tensor is, read once. Borrowed from the tensor; data is null until someone asks for it.
struct TensorInfo {
  void* data = nullptr;
  int64_t numel = 0;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = 0;
  Device device;
  int64_t storage_needed = 0;  ///< bytes, from the storage's beginning to behind the last element
};

/// What a step looks at in every tensor, as cheaply as can be. Borrowed from the tensor.
struct Facts {
  const void* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;
  int32_t dtype = 0;
  /// Bytes of the tensor's storage, which may be less than the tensor needs: a storage can be resized.
  int64_t storage = 0;
};

/// False for a tensor without strides or memory to look at (sparse, fake).
bool read_facts(AtenTensorHandle tensor, Facts* facts);
/// Whether the storage holds all of a dense tensor of `numel` elements.
bool is_in_storage(AtenTensorHandle tensor, const Facts& facts, int64_t numel);
/// Whether the values in memory are the tensor's with the other sign, as those of an imaginary part may be.
bool is_negated(AtenTensorHandle tensor);

Device device_of(AtenTensorHandle tensor);

/// Name of the operator, for messages.
struct Op {
  const char* name;
  [[noreturn]] void fail(const std::string& rest) const;
  /// Throws what the library said.
  void check(const Status& status) const;
};

/// Name of an argument, spelled out only when a message needs it: "grads[3]", or "param" where index < 0.
struct Name {
  const char* argument;
  int64_t index = -1;
  std::string str() const {
    return index < 0 ? std::string(argument) : std::string(argument) + "[" + std::to_string(index) + "]";
  }
};

/// torch's codes of the dtypes that occur here; they are functions because they are no constants across versions.
struct DtypeCodes {
  int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16(), int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8();
  int32_t int16 = aoti_torch_dtype_int16(), uint16 = aoti_torch_dtype_uint16(), int64 = aoti_torch_dtype_int64();
};

const DtypeCodes& codes();

std::string dtype_name(int32_t dtype);
/// "[3, 4]"
std::string ints(const int64_t* values, int64_t count);
/// With all digits.
std::string number(double value);

/// Reads a strided tensor; throws for undefined tensors, for other layouts, which have no strides to read, and for a
/// storage that is too small for its tensor.
TensorInfo read_tensor(Op op, Name name, AtenTensorHandle tensor);
/// Address of the first element. Read-only access does not materialize copy-on-write tensors.
const void* const_data(AtenTensorHandle tensor);
void* mutable_data(AtenTensorHandle tensor);

/// Whether the elements lie one behind the other in the order of their dimensions.
bool is_contiguous(const TensorInfo& t);
/// Whether the elements fill one stretch of memory, each once, in whatever order of dimensions.
bool is_dense(const TensorInfo& t);

// Each throws unless `tensor` is as named.
void check_contiguous(Op op, Name name, const TensorInfo& tensor);
void check_device(Op op, Name name, Device device, Name like_name, Device like);
/// It has device, sizes and element order of `like`.
void check_like(Op op, Name name, const TensorInfo& tensor, Name like_name, const TensorInfo& like);
void check_dtype(Op op, Name name, int32_t dtype, int32_t wanted, const char* because);

}  // namespace flashoptim::store
