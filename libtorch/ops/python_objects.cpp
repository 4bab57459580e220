#include "libtorch/ops/python_objects.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace flashoptim::ops {
namespace {

bool is_wrapper(PyObject* object) {
  const std::vector<PyObject*>& types = python_side().wrapper_types;
  return std::find(types.begin(), types.end(), type_of(object)) != types.end();
}

}  // namespace

LocalTensor::LocalTensor(PyObject* object) {
  const PythonSide& side = python_side();
  if (is_plain_tensor(object)) {
    object_ = object;
    return;
  }
  if (!is_wrapper(object)) return;
  held_ = Reference(PyObject_GetAttr(object, side.local_tensor));
  if (is_plain_tensor(held_.get())) object_ = held_.get();
}

namespace {

bool are_equal(PyObject* a, PyObject* b, PyObject* attribute) {
  const Reference first(PyObject_GetAttr(a, attribute)), second(PyObject_GetAttr(b, attribute));
  if (first.get() == second.get()) return true;
  constexpr int kEqual = 2;  // Py_EQ
  const int result = PyObject_RichCompareBool(first.get(), second.get(), kEqual);
  if (result < 0) throw PythonError();
  return result == 1;
}

}  // namespace

bool are_placed_alike(PyObject* a, PyObject* b) {
  const PythonSide& side = python_side();
  if (side.wrapper_types.empty()) return true;
  const bool is_wrapped = is_wrapper(a);
  if (is_wrapped != is_wrapper(b)) return false;
  if (!is_wrapped) return true;
  const Reference first(PyObject_GetAttr(a, side.spec)), second(PyObject_GetAttr(b, side.spec));
  if (first.get() == second.get()) return true;
  return are_equal(first.get(), second.get(), side.placements) && are_equal(first.get(), second.get(), side.mesh);
}

std::string to_string(PyObject* text) {
  PySsize size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(text, &size);
  if (data == nullptr) throw PythonError();
  return std::string(data, static_cast<size_t>(size));
}

std::string text_or_nothing(PyObject* key) {
  PySsize size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(key, &size);
  if (data != nullptr) return std::string(data, static_cast<size_t>(size));
  PyErr_Clear();
  return {};
}

int64_t to_int(PyObject* number) {
  const long long value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred() != nullptr) throw PythonError();
  return value;
}

std::vector<double> to_doubles(PyObject* list) {
  std::vector<double> values(static_cast<size_t>(PyList_Size(list)));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = PyFloat_AsDouble(PyList_GetItem(list, static_cast<PySsize>(i)));
  }
  if (PyErr_Occurred() != nullptr) throw PythonError();
  return values;
}

std::intptr_t find_tensor(PyObject* sample, int64_t object_size, const void* impl) {
  const auto* const bytes = reinterpret_cast<const char*>(sample);
  const auto word = static_cast<std::intptr_t>(sizeof impl);
  // Behind the object's head, a reference count and a type.
  for (std::intptr_t offset = 2 * word; offset + word <= object_size; offset += word) {
    const void* found = nullptr;
    std::memcpy(&found, bytes + offset, sizeof found);
    if (found == impl) return offset;
  }
  throw std::runtime_error("flashoptim: this torch keeps its tensors elsewhere than in their Python objects");
}

}  // namespace flashoptim::ops
