// The few functions of CPython and structs of DLPack that python.cpp uses, declared without their headers.
#pragma once

#include <cstdint>
#include <exception>

struct _object;  // NOLINT: CPython's name
using PyObject = _object;
using PySsize = std::intptr_t;

/// PyMethodDef.
struct PyMethod {
  const char* name;
  void* function;  // PyObject* (*)(PyObject* self, PyObject* const* arguments, Py_ssize_t count)
  int flags;
  const char* doc;
};
inline constexpr int kPyFastCall = 0x80;  // METH_FASTCALL, in the stable ABI since Python 3.10

extern "C" {
#define FLASHOPTIM_WEAK __attribute__((weak, visibility("default")))
FLASHOPTIM_WEAK extern PyObject _Py_NoneStruct;
FLASHOPTIM_WEAK extern PyObject* PyExc_RuntimeError;
FLASHOPTIM_WEAK void Py_IncRef(PyObject*);
FLASHOPTIM_WEAK void Py_DecRef(PyObject*);
FLASHOPTIM_WEAK PyObject* PyErr_Occurred();
FLASHOPTIM_WEAK void PyErr_Clear();
FLASHOPTIM_WEAK void PyErr_SetString(PyObject*, const char*);
FLASHOPTIM_WEAK PyObject* PyObject_Type(PyObject*);
FLASHOPTIM_WEAK PyObject* PyObject_GetAttr(PyObject*, PyObject*);
FLASHOPTIM_WEAK PyObject* PyBool_FromLong(long);
FLASHOPTIM_WEAK long long PyLong_AsLongLong(PyObject*);
FLASHOPTIM_WEAK PyObject* PyLong_FromLongLong(long long);
FLASHOPTIM_WEAK double PyFloat_AsDouble(PyObject*);
FLASHOPTIM_WEAK void* PyEval_SaveThread();
FLASHOPTIM_WEAK void PyEval_RestoreThread(void*);
FLASHOPTIM_WEAK PyObject* PyUnicode_InternFromString(const char*);
FLASHOPTIM_WEAK PyObject* PyTuple_Pack(PySsize, ...);
FLASHOPTIM_WEAK PyObject* PyList_New(PySsize);
FLASHOPTIM_WEAK PySsize PyList_Size(PyObject*);
FLASHOPTIM_WEAK PyObject* PyList_GetItem(PyObject*, PySsize);
FLASHOPTIM_WEAK int PyList_SetItem(PyObject*, PySsize, PyObject*);
FLASHOPTIM_WEAK int PyList_Append(PyObject*, PyObject*);
FLASHOPTIM_WEAK PyObject* PyDict_New();
FLASHOPTIM_WEAK int PyDict_Next(PyObject*, PySsize*, PyObject**, PyObject**);
FLASHOPTIM_WEAK int PyDict_SetItem(PyObject*, PyObject*, PyObject*);
FLASHOPTIM_WEAK int PyDict_SetItemString(PyObject*, const char*, PyObject*);
FLASHOPTIM_WEAK PyObject* PyCFunction_NewEx(PyMethod*, PyObject*, PyObject*);
FLASHOPTIM_WEAK void* PyCapsule_GetPointer(PyObject*, const char*);
// Not in the stable ABI, and there from Python 3.12 on: python.cpp does without where they are not.
FLASHOPTIM_WEAK int PyDict_AddWatcher(int (*callback)(int event, PyObject* dict, PyObject* key, PyObject* value));
FLASHOPTIM_WEAK int PyDict_Watch(int watcher, PyObject* dict);
#undef FLASHOPTIM_WEAK
}

namespace flashoptim::ops {

/// One owned reference.
class Reference {
 public:
  explicit Reference(PyObject* object) : object_(object) {
    if (object == nullptr) throw std::exception();
  }
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_DecRef(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

namespace dlpack {

// DLTensor and DLPackExchangeAPI of DLPack 1.x.
inline constexpr int32_t kCpu = 1, kCuda = 2;
inline constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dim;
  uint8_t type, bits;
  uint16_t lanes;
  const int64_t *sizes, *strides;
  uint64_t byte_offset;

  const void* address() const { return static_cast<const char*>(data) + byte_offset; }
};

using TensorFromPyObject = int (*)(void* py_object, Tensor* out);

struct ExchangeTable {
  uint32_t major, minor;
  void *previous, *allocator, *managed_from_py_object, *managed_to_py_object;
  TensorFromPyObject tensor_from_py_object;
  void* current_stream;
};

}  // namespace dlpack
}  // namespace flashoptim::ops
