#include "libtorch/ops/boxed.h"

#include <bit>
#include <cstring>
#include <utility>

namespace flashoptim::ops {
namespace {

template <class T>
T from_bits(StableIValue value) {
  T result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <class T>
StableIValue to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(StableIValue));
  StableIValue result = 0;
  std::memcpy(&result, &value, sizeof value);
  return result;
}

static_assert(std::endian::native == std::endian::little, "StableIValue holds small values in its lowest bytes");

/// Deletes a list when it goes out of scope; its elements have been taken out by then. What torch says of that is not
/// asked: it can only fail for a handle that is none.
struct ListOwner {
  StableListHandle list;
  ~ListOwner() {
    if (list != nullptr) torch_delete_list(list);
  }
};
struct StringOwner {
  StringHandle string;
  ~StringOwner() { torch_delete_string(string); }
};

template <class T, class Take>
std::vector<T> take_list(StableIValue value, Take take) {
  const ListOwner owner{from_bits<StableListHandle>(value)};
  size_t size = 0;
  check_torch(torch_list_size(owner.list, &size), "torch_list_size");
  std::vector<T> result;
  result.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element = 0;
    check_torch(torch_list_get_item(owner.list, i, &element), "torch_list_get_item");
    result.push_back(take(element));
  }
  return result;
}

/// A list of `size` values, each of which `give` makes.
template <class Give>
StableIValue give_list(size_t size, Give give) {
  ListOwner owner{nullptr};
  check_torch(torch_new_list_reserve_size(size, &owner.list), "torch_new_list_reserve_size");
  for (size_t i = 0; i < size; ++i) check_torch(torch_list_push_back(owner.list, give(i)), "torch_list_push_back");
  return to_bits(std::exchange(owner.list, nullptr));
}

}  // namespace

Tensor take_tensor(StableIValue value) { return Tensor(from_bits<AtenTensorHandle>(value)); }

Tensor take_optional_tensor(StableIValue value) {
  auto* inner = from_bits<StableIValue*>(value);
  if (inner == nullptr) return {};
  Tensor tensor = take_tensor(*inner);
  delete inner;  // torch allocates it with new for every extension that targets less than 2.13
  return tensor;
}

TensorList take_tensors(StableIValue value) { return take_list<Tensor>(value, take_tensor); }
std::vector<int64_t> take_ints(StableIValue value) { return take_list<int64_t>(value, take_int); }
std::vector<double> take_floats(StableIValue value) { return take_list<double>(value, take_float); }

std::string take_string(StableIValue value) {
  const StringOwner owner{from_bits<StringHandle>(value)};
  const char* data = nullptr;
  size_t length = 0;
  check_torch(torch_string_c_str(owner.string, &data), "torch_string_c_str");
  check_torch(torch_string_length(owner.string, &length), "torch_string_length");
  return std::string(data, length);
}

int64_t take_int(StableIValue value) { return from_bits<int64_t>(value); }
double take_float(StableIValue value) { return from_bits<double>(value); }
bool take_bool(StableIValue value) { return from_bits<bool>(value); }

StableIValue give_tensor(Tensor tensor) { return to_bits(tensor.release()); }

StableIValue give_tensors(TensorList tensors) {
  return give_list(tensors.size(), [&](size_t i) { return give_tensor(std::move(tensors[i])); });
}

StableIValue give_bool(bool value) { return to_bits(value); }
StableIValue give_int(int64_t value) { return to_bits(value); }

StableIValue give_ints(const std::vector<int64_t>& values) {
  return give_list(values.size(), [&](size_t i) { return to_bits(values[i]); });
}

StableIValue give_string(const std::string& text) {
  StringHandle handle = nullptr;
  check_torch(torch_new_string_handle(text.data(), text.size(), &handle), "torch_new_string_handle");
  return to_bits(handle);
}

}  // namespace flashoptim::ops
