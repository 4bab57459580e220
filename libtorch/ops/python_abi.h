// The few functions of CPython that the Python side uses, declared without its headers.
//
// The library names no Python at link time: these are weak symbols of CPython's stable ABI, which are there where
// Python has loaded the library. One binary serves every Python.
#pragma once

#include <cstdint>
#include <exception>
#include <utility>

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
FLASHOPTIM_WEAK extern PyObject PyLong_Type;
FLASHOPTIM_WEAK extern PyObject PyDict_Type;
FLASHOPTIM_WEAK extern PyObject* PyExc_RuntimeError;
FLASHOPTIM_WEAK extern PyObject* PyExc_TypeError;
FLASHOPTIM_WEAK void Py_IncRef(PyObject*);
FLASHOPTIM_WEAK void Py_DecRef(PyObject*);
FLASHOPTIM_WEAK PyObject* PyErr_Occurred();
FLASHOPTIM_WEAK void PyErr_Clear();
FLASHOPTIM_WEAK void PyErr_SetString(PyObject*, const char*);
FLASHOPTIM_WEAK PyObject* PyObject_Type(PyObject*);
FLASHOPTIM_WEAK PyObject* PyObject_GetAttr(PyObject*, PyObject*);
FLASHOPTIM_WEAK int PyObject_RichCompareBool(PyObject*, PyObject*, int operation);
FLASHOPTIM_WEAK PyObject* PyObject_CallFunctionObjArgs(PyObject*, ...);
FLASHOPTIM_WEAK PyObject* PyBool_FromLong(long);
FLASHOPTIM_WEAK long long PyLong_AsLongLong(PyObject*);
FLASHOPTIM_WEAK PyObject* PyLong_FromLongLong(long long);
FLASHOPTIM_WEAK double PyFloat_AsDouble(PyObject*);
FLASHOPTIM_WEAK void* PyEval_SaveThread();
FLASHOPTIM_WEAK void PyEval_RestoreThread(void*);
FLASHOPTIM_WEAK PyObject* PyUnicode_InternFromString(const char*);
FLASHOPTIM_WEAK const char* PyUnicode_AsUTF8AndSize(PyObject*, PySsize*);
FLASHOPTIM_WEAK PySsize PyTuple_Size(PyObject*);
FLASHOPTIM_WEAK PyObject* PyTuple_GetItem(PyObject*, PySsize);
FLASHOPTIM_WEAK PyObject* PyTuple_Pack(PySsize, ...);
FLASHOPTIM_WEAK PyObject* PyList_New(PySsize);
FLASHOPTIM_WEAK PySsize PyList_Size(PyObject*);
FLASHOPTIM_WEAK PyObject* PyList_GetItem(PyObject*, PySsize);
FLASHOPTIM_WEAK int PyList_Append(PyObject*, PyObject*);
FLASHOPTIM_WEAK PyObject* PyDict_New();
FLASHOPTIM_WEAK int PyDict_Next(PyObject*, PySsize*, PyObject**, PyObject**);
FLASHOPTIM_WEAK PyObject* PyDict_GetItemWithError(PyObject*, PyObject*);
FLASHOPTIM_WEAK int PyDict_SetItem(PyObject*, PyObject*, PyObject*);
FLASHOPTIM_WEAK int PyDict_SetItemString(PyObject*, const char*, PyObject*);
FLASHOPTIM_WEAK PyObject* PyCFunction_NewEx(PyMethod*, PyObject*, PyObject*);
FLASHOPTIM_WEAK PyObject* PyCapsule_New(void*, const char*, void (*destructor)(PyObject*));
FLASHOPTIM_WEAK void* PyCapsule_GetPointer(PyObject*, const char*);
// Of Python without its lock alone (3.13t on): a dict must not change while it is walked.
FLASHOPTIM_WEAK void PyCriticalSection_Begin(void* section, PyObject*);
FLASHOPTIM_WEAK void PyCriticalSection_End(void* section);
#undef FLASHOPTIM_WEAK
}

namespace flashoptim::ops {

/// Python's exception is set.
struct PythonError : std::exception {};

/// One owned reference, or none.
class Reference {
 public:
  Reference() = default;
  /// Takes a new reference over; throws where there is none.
  explicit Reference(PyObject* object) : object_(object) {
    if (object == nullptr) throw PythonError();
  }
  static Reference borrowed(PyObject* object) {
    Py_IncRef(object);
    return Reference(object);
  }
  Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Reference& operator=(Reference&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Reference() {
    if (object_ != nullptr) Py_DecRef(object_);
  }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_ = nullptr;
};

inline bool is_none(PyObject* object) { return object == &_Py_NoneStruct; }

/// The exact type, borrowed: its instance keeps it. The stable ABI's own Py_TYPE reads the same word; objects of a
/// Python without lock are laid out otherwise, and asked.
inline PyObject* type_of(PyObject* object, bool is_free_threaded) {
  struct Head {
    std::intptr_t references;
    PyObject* type;
  };
  if (!is_free_threaded) return reinterpret_cast<const Head*>(object)->type;
  PyObject* const type = PyObject_Type(object);
  Py_DecRef(type);
  return type;
}

/// Keeps a dict from changing under other threads for a scope: in a Python without lock; elsewhere the lock does.
class CriticalSection {
 public:
  explicit CriticalSection(PyObject* object) {
    if (&PyCriticalSection_Begin != nullptr) PyCriticalSection_Begin(section_, object);
  }
  CriticalSection(const CriticalSection&) = delete;
  CriticalSection& operator=(const CriticalSection&) = delete;
  ~CriticalSection() {
    if (&PyCriticalSection_End != nullptr) PyCriticalSection_End(section_);
  }

 private:
  alignas(16) char section_[64] = {};  // CPython's is two pointers
};

/// Lets other threads of Python run for a scope.
class WithoutLock {
 public:
  WithoutLock() : state_(PyEval_SaveThread()) {}
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;
  ~WithoutLock() { PyEval_RestoreThread(state_); }

 private:
  void* state_;
};

}  // namespace flashoptim::ops
