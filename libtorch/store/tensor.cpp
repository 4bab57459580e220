#include "libtorch/store/tensor.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

// What torch says of its last failure: from torch 2.13 on, so it may be missing.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace flashoptim::store {
namespace {

bool same_sizes(const TensorInfo& a, const TensorInfo& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

/// The same order of elements in memory; both have the same sizes.
bool same_strides(const TensorInfo& a, const TensorInfo& b) {
  if (a.numel == 0) return true;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.strides[d] != b.strides[d] && a.sizes[d] != 1) return false;
  }
  return true;
}

/// Bytes of an element.
int64_t element_size(int32_t dtype) {
  static const std::array<int8_t, 128> kSizes = [] {
    std::array<int8_t, 128> sizes = {};
    const DtypeCodes& c = codes();
    for (const int32_t known : {c.float32, c.bfloat16, c.float16, c.int8, c.uint8, c.int16, c.uint16, c.int64}) {
      sizes[static_cast<size_t>(known)] = static_cast<int8_t>(aoti_torch_dtype_element_size(known));
    }
    return sizes;
  }();
  const int64_t size = dtype >= 0 && dtype < 128 ? kSizes[static_cast<size_t>(dtype)] : 0;
  return size != 0 ? size : static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
}

/// Elements from the first one of a tensor to behind its last one.
int64_t extent(const TensorInfo& t) {
  if (t.numel == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim; ++d) last += (t.sizes[d] - 1) * t.strides[d];
  return last + 1;
}

}  // namespace

std::string torch_said() {
  if (&torch_exception_get_what_without_backtrace == nullptr) return "";
  const char* const said = torch_exception_get_what_without_backtrace();
  return said == nullptr || said[0] == '\0' ? "" : std::string(": ") + said;
}

void check_torch(AOTITorchError error, const char* what) {
  if (error == AOTI_TORCH_SUCCESS) return;
  throw std::runtime_error(std::string("flashoptim: torch's ") + what + " failed" + torch_said());
}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

Tensor::~Tensor() {
  if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
}

void Op::fail(const std::string& rest) const {
  throw std::runtime_error("flashoptim::" + std::string(name) + ": " + rest);
}

void Op::check(const Status& status) const {
  if (!status.is_ok()) fail(status.message());
}

const DtypeCodes& codes() {
  static const DtypeCodes kCodes;
  return kCodes;
}

std::string dtype_name(int32_t dtype) {
  const DtypeCodes& c = codes();
  const std::pair<int32_t, const char*> known[] = {{c.float32, "float32"},
                                                   {c.bfloat16, "bfloat16"},
                                                   {c.float16, "float16"},
                                                   {c.int8, "int8"},
                                                   {c.uint8, "uint8"},
                                                   {c.int16, "int16"},
                                                   {c.uint16, "uint16"},
                                                   {c.int64, "int64"},
                                                   {aoti_torch_dtype_float64(), "float64"},
                                                   {aoti_torch_dtype_int32(), "int32"},
                                                   {aoti_torch_dtype_bool(), "bool"},
                                                   {aoti_torch_dtype_complex32(), "complex32"},
                                                   {aoti_torch_dtype_complex64(), "complex64"},
                                                   {aoti_torch_dtype_complex128(), "complex128"}};
  for (const auto& [code, name] : known) {
    if (code == dtype) return name;
  }
  return "dtype " + std::to_string(dtype);
}

std::string ints(const int64_t* values, int64_t count) {
  std::ostringstream text;
  for (int64_t i = 0; i < count; ++i) text << (i == 0 ? "[" : ", ") << values[i];
  text << (count == 0 ? "[]" : "]");
  return text.str();
}

std::string number(double value) {
  std::ostringstream text;
  text.precision(17);
  text << value;
  return text.str();
}

TensorInfo read_tensor(Op op, Name name, AtenTensorHandle tensor) {
  static const int32_t strided = aoti_torch_layout_strided();
  TensorInfo info;
  bool defined = tensor != nullptr;
  if (defined) check_torch(aoti_torch_is_defined(tensor, &defined), "is_defined");
  if (!defined) op.fail(name.str() + " is undefined; a tensor is needed");
  int32_t layout = 0;
  check_torch(aoti_torch_get_layout(tensor, &layout), "get_layout");
  if (layout != strided) op.fail(name.str() + " is sparse or of another layout; allowed is torch.strided");
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  check_torch(aoti_torch_get_numel(tensor, &info.numel), "get_numel");
  check_torch(aoti_torch_get_dim(tensor, &info.dim), "get_dim");
  check_torch(aoti_torch_get_sizes(tensor, &sizes), "get_sizes");
  check_torch(aoti_torch_get_strides(tensor, &strides), "get_strides");
  check_torch(aoti_torch_get_dtype(tensor, &info.dtype), "get_dtype");
  info.device = device_of(tensor);
  info.sizes = sizes;
  info.strides = strides;
  int64_t storage = 0, offset = 0;
  check_torch(aoti_torch_get_storage_size(tensor, &storage), "get_storage_size");
  check_torch(aoti_torch_get_storage_offset(tensor, &offset), "get_storage_offset");
  if (info.numel != 0) info.storage_needed = (offset + extent(info)) * element_size(info.dtype);
  if (info.storage_needed > storage) {
    op.fail(name.str() + " of shape " + ints(info.sizes, info.dim) + " and dtype " + dtype_name(info.dtype) +
            " needs more memory than its storage has, " + std::to_string(storage) +
            " bytes: the storage has been resized");
  }
  return info;
}

const void* const_data(AtenTensorHandle tensor) {
  const void* data = nullptr;
  check_torch(torch_get_const_data_ptr(tensor, &data), "get_const_data_ptr");
  return data;
}

void* mutable_data(AtenTensorHandle tensor) {
  void* data = nullptr;
  check_torch(torch_get_mutable_data_ptr(tensor, &data), "get_mutable_data_ptr");
  return data;
}

bool is_contiguous(const TensorInfo& t) {
  if (t.numel == 0) return true;
  int64_t expected = 1;
  for (int64_t d = t.dim - 1; d >= 0; --d) {
    if (t.sizes[d] == 1) continue;
    if (t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

bool is_dense(const TensorInfo& t) {
  if (is_contiguous(t)) return true;
  std::vector<int64_t> order(static_cast<size_t>(t.dim));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&t](int64_t a, int64_t b) { return t.strides[a] < t.strides[b]; });
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (t.sizes[d] == 1) continue;
    if (t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

bool read_facts(AtenTensorHandle tensor, Facts* facts) {
  return aoti_torch_get_strides(tensor, const_cast<int64_t**>(&facts->strides)) == AOTI_TORCH_SUCCESS &&
         aoti_torch_get_sizes(tensor, const_cast<int64_t**>(&facts->sizes)) == AOTI_TORCH_SUCCESS &&
         aoti_torch_get_dim(tensor, &facts->dim) == AOTI_TORCH_SUCCESS &&
         aoti_torch_get_dtype(tensor, &facts->dtype) == AOTI_TORCH_SUCCESS &&
         aoti_torch_get_storage_size(tensor, &facts->storage) == AOTI_TORCH_SUCCESS &&
         torch_get_const_data_ptr(tensor, &facts->data) == AOTI_TORCH_SUCCESS;
}

bool is_in_storage(AtenTensorHandle tensor, const Facts& facts, int64_t numel) {
  int64_t offset = 0;
  check_torch(aoti_torch_get_storage_offset(tensor, &offset), "get_storage_offset");
  return numel == 0 || (offset + numel) * element_size(facts.dtype) <= facts.storage;
}

bool is_negated(AtenTensorHandle tensor) {
  AtenTensorHandle copy = nullptr;
  check_torch(aoti_torch_new_tensor_handle(tensor, &copy), "new_tensor_handle");
  StableIValue stack[1];  // owns the copy from here on; the result takes its place
  static_assert(sizeof stack == sizeof copy);
  std::memcpy(stack, &copy, sizeof stack);
  check_torch(aoti_torch_call_dispatcher("aten::is_neg", "", stack), "is_neg");
  bool result = false;
  std::memcpy(&result, stack, sizeof result);
  return result;
}

Device device_of(AtenTensorHandle tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  Device device;
  check_torch(aoti_torch_get_device_type(tensor, &device.type), "get_device_type");
  if (device.type != cpu) check_torch(aoti_torch_get_device_index(tensor, &device.index), "get_device_index");
  return device;
}

void check_contiguous(Op op, Name name, const TensorInfo& tensor) {
  if (!is_contiguous(tensor)) {
    op.fail(name.str() + " has shape " + ints(tensor.sizes, tensor.dim) + " and strides " +
            ints(tensor.strides, tensor.dim) + "; it must be contiguous");
  }
}

void check_device(Op op, Name name, Device device, Name like_name, Device like) {
  if (device != like) {
    op.fail(name.str() + " is on " + device_name(device) + ", but " + like_name.str() + " on " + device_name(like) +
            "; all tensors must be on one device");
  }
}

void check_like(Op op, Name name, const TensorInfo& tensor, Name like_name, const TensorInfo& like) {
  check_device(op, name, tensor.device, like_name, like.device);
  if (!same_sizes(tensor, like)) {
    op.fail(name.str() + " has shape " + ints(tensor.sizes, tensor.dim) + ", but " + like_name.str() + " has shape " +
            ints(like.sizes, like.dim) + "; both must be the same");
  }
  if (!same_strides(tensor, like)) {
    op.fail(name.str() + " has strides " + ints(tensor.strides, tensor.dim) + ", but " + like_name.str() +
            " has strides " + ints(like.strides, like.dim) +
            "; both must be the same (copy it into an empty_like of the other)");
  }
}

void check_dtype(Op op, Name name, int32_t dtype, int32_t wanted, const char* because) {
  if (dtype != wanted) {
    op.fail(name.str() + " has dtype " + dtype_name(dtype) + "; " + because + " needs " + dtype_name(wanted));
  }
}

}  // namespace flashoptim::store
