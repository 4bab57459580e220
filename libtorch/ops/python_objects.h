// Tensors and numbers out of Python's objects.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "libtorch/ops/python_abi.h"
#include "libtorch/store/tensor.h"

namespace flashoptim::ops {

using namespace store;  // NOLINT: written in the store's words

/// What the Python side was given when it was set up; lives as long as the process.
struct PythonSide {
  PyObject *tensor_type = nullptr, *parameter_type = nullptr;
  // Names of attributes: of tensors, of their wrappers, of a wrapper's description.
  PyObject* bump_versions = nullptr;  // torch's function
  PyObject *grad = nullptr, *local_tensor = nullptr, *spec = nullptr, *mesh = nullptr, *placements = nullptr;
  std::vector<PyObject*> wrapper_types;  // of tensors whose memory is their `_local_tensor`'s
  std::vector<PyObject*> plain_types;    // subclasses of tensors whose memory is their own
  std::intptr_t tensor_offset = 0;       // of a tensor in its Python object
  bool is_free_threaded = false;
};
inline PythonSide g_python_side;  // here, so that a look at an object is a few loads
inline PythonSide& python_side() { return g_python_side; }
inline PyObject* type_of(PyObject* object) { return type_of(object, python_side().is_free_threaded); }

/// The plain tensor whose memory this is, or none where it is of an unknown type: the object itself, or a wrapper's
/// (DTensor's) local tensor. No code of Python's runs.
///
/// A tensor's handle is the at::Tensor inside its Python object. Where in the object it stands is found when the
/// library is set up, by looking for a tensor that is known both ways. Asking torch for it instead (DLPack, an
/// operator) takes a reference, which takes Python's lock: 40 ns, three times the whole look at a tensor.
class LocalTensor {
 public:
  explicit LocalTensor(PyObject* object);
  bool has_value() const { return object_ != nullptr; }
  AtenTensorHandle handle() const {
    return reinterpret_cast<AtenTensorHandle>(reinterpret_cast<char*>(object_) + python_side().tensor_offset);
  }
  PyObject* object() const { return object_; }

 private:
  PyObject* object_ = nullptr;
  Reference held_;
};

/// Whether the object is a tensor of a known type whose memory is its own.
inline bool is_plain_tensor(PyObject* object) {
  const PythonSide& side = python_side();
  PyObject* const type = type_of(object);
  return type == side.tensor_type || type == side.parameter_type ||
         std::find(side.plain_types.begin(), side.plain_types.end(), type) != side.plain_types.end();
}
/// The implementation of an object that is a tensor, plain or not.
inline const void* implementation_of(PyObject* object) {
  return *reinterpret_cast<const void* const*>(reinterpret_cast<const char*>(object) + python_side().tensor_offset);
}

/// Whether both are plain tensors, or both are wrappers that are cut and placed alike. Compares objects of Python's,
/// which can run its code.
bool are_placed_alike(PyObject* a, PyObject* b);

std::string to_string(PyObject* text);
/// A dict's key as text; nothing where it is none.
std::string text_or_nothing(PyObject* key);
int64_t to_int(PyObject* number);
std::vector<double> to_doubles(PyObject* list);

/// Where `sample`'s tensor, which has the implementation `impl`, stands in the object; throws where it does not.
std::intptr_t find_tensor(PyObject* sample, int64_t object_size, const void* impl);

}  // namespace flashoptim::ops
