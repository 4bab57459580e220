// What a step looks at in Python, as loops in C: one call instead of several passes over lists of 300 objects.
//
// The library names no Python at link time: it uses functions of CPython's stable ABI alone, declared here as weak symbols,
// which are there where Python has loaded the library. Tensors are read through torch's DLPack exchange table (DLPack 1.3),
// which is a stable ABI as well. Whatever is not as expected is left to the operators, which take lists and name what is wrong.
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>

#include "libtorch/ops/prepared.h"
#include "libtorch/ops/python_abi.h"

namespace flashoptim::ops {
namespace {

/// What flashoptim_python_functions was given; lives as long as the process.
struct PythonSide {
  dlpack::TensorFromPyObject read = nullptr;
  PyObject *tensor_type = nullptr, *parameter_type = nullptr;
  PyObject* grad = nullptr;  // "grad"
};
PythonSide g_python;

/// A tensor of torch's own types, whose memory is what it says; false, with no exception set, for anything else.
bool read(PyObject* object, dlpack::Tensor* tensor) {
  PyObject* const type = PyObject_Type(object);
  const bool is_plain = type == g_python.tensor_type || type == g_python.parameter_type;
  Py_DecRef(type);
  if (!is_plain) return false;
  if (g_python.read(object, tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

std::shared_ptr<PreparedPlan> find_plan(PyObject* number) {
  return PreparedPlans::instance().find(Op{"plan"}, PyLong_AsLongLong(number));
}

PyObject* to_bool(bool value) { return PyBool_FromLong(value ? 1 : 0); }

/// A function of Python: no C++ exception gets out.
template <PyObject* (*body)(PyObject* const* arguments)>
PyObject* guarded(PyObject*, PyObject* const* arguments, PySsize) {
  try {
    return body(arguments);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

/// same_objects(list, known: list) -> bool: whether both hold the same objects.
PyObject* same_objects(PyObject* const* arguments) {
  PyObject *const now = arguments[0], *const known = arguments[1];
  const PySsize count = PyList_Size(known);
  bool same = PyList_Size(now) == count;
  for (PySsize i = 0; same && i < count; ++i) same = PyList_GetItem(now, i) == PyList_GetItem(known, i);
  return PyErr_Occurred() != nullptr ? nullptr : to_bool(same);
}

/// Whether the values of a dict are known[*place], ...; moves *place behind them.
bool same_values(PyObject* dict, PyObject* known, PySsize* place) {
  PyObject *key = nullptr, *value = nullptr;
  const PySsize count = PyList_Size(known);
  for (PySsize position = 0; PyDict_Next(dict, &position, &key, &value) != 0; ++*place) {
    if (*place >= count || PyList_GetItem(known, *place) != value) return false;
  }
  return true;
}

/// same_states(state: dict, dicts: list) -> bool: whether the values of `state` are `dicts`.
PyObject* same_states(PyObject* const* arguments) {
  PySsize place = 0;
  return to_bool(same_values(arguments[0], arguments[1], &place) && place == PyList_Size(arguments[1]));
}

/// is_current(plan, params: list, dicts: list, known: list) -> bool: whether the parameters are where the plan takes them to
/// be, and the values of all dicts, one behind the other, are `known`.
PyObject* is_current(PyObject* const* arguments) {
  const std::shared_ptr<PreparedPlan> plan = find_plan(arguments[0]);
  PyObject *const params = arguments[1], *const dicts = arguments[2], *const known = arguments[3];
  PySsize place = 0;
  for (PySsize i = 0, count = PyList_Size(dicts); i < count; ++i) {
    if (!same_values(PyList_GetItem(dicts, i), known, &place)) return to_bool(false);
  }
  if (place != PyList_Size(known) || PyList_Size(params) != plan->size()) return to_bool(false);
  for (PySsize i = 0; i < plan->size(); ++i) {
    dlpack::Tensor tensor;
    if (!read(PyList_GetItem(params, i), &tensor) || !plan->is_parameter(i, tensor)) return to_bool(false);
  }
  return to_bool(true);
}

/// take_gradients(plan, params: list) -> tuple[list, list] | None: gives the plan the addresses of the parameters' gradients
/// for its next step. The gradients, to be kept until then, and the places of parameters that have none. None, where the
/// operators have to look at the gradients.
PyObject* take_gradients(PyObject* const* arguments) {
  const std::shared_ptr<PreparedPlan> plan = find_plan(arguments[0]);
  PyObject* const params = arguments[1];
  const PySsize count = PyList_Size(params);
  const std::lock_guard lock(plan->mutex());
  const Reference grads(PyList_New(count)), absent(PyList_New(0));
  plan->begin_offer();
  bool taken = count == plan->size();
  for (PySsize i = 0; taken && i < count; ++i) {
    PyObject* const grad = PyObject_GetAttr(PyList_GetItem(params, i), g_python.grad);
    if (grad == nullptr) return nullptr;
    PyList_SetItem(grads.get(), i, grad);  // takes the reference over
    dlpack::Tensor tensor;
    if (grad == &_Py_NoneStruct) {
      plan->offer_no_gradient(i);
      const Reference index(PyLong_FromLongLong(i));
      PyList_Append(absent.get(), index.get());
    } else {
      taken = read(grad, &tensor) && plan->offer_gradient(i, tensor);
    }
  }
  if (!taken) {
    Py_IncRef(&_Py_NoneStruct);
    return &_Py_NoneStruct;
  }
  plan->take_offered(Op{"plan"});
  return PyTuple_Pack(2, grads.get(), absent.get());
}

/// set_values(dicts: list, key, value, known: list, places: list[int]): dict[key] = known[place] = value for every dict.
PyObject* set_values(PyObject* const* arguments) {
  PyObject *const dicts = arguments[0], *const key = arguments[1], *const value = arguments[2], *const known = arguments[3];
  for (PySsize i = 0, count = PyList_Size(dicts); i < count; ++i) {
    const PySsize place = PyLong_AsLongLong(PyList_GetItem(arguments[4], i));
    Py_IncRef(value);  // PyList_SetItem takes a reference over
    if (PyDict_SetItem(PyList_GetItem(dicts, i), key, value) != 0 || PyList_SetItem(known, place, value) != 0) return nullptr;
  }
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

PyMethod g_functions[] = {
    {"same_objects", reinterpret_cast<void*>(&guarded<same_objects>), kPyFastCall, nullptr},
    {"same_states", reinterpret_cast<void*>(&guarded<same_states>), kPyFastCall, nullptr},
    {"is_current", reinterpret_cast<void*>(&guarded<is_current>), kPyFastCall, nullptr},
    {"take_gradients", reinterpret_cast<void*>(&guarded<take_gradients>), kPyFastCall, nullptr},
    {"set_values", reinterpret_cast<void*>(&guarded<set_values>), kPyFastCall, nullptr},
};

}  // namespace
}  // namespace flashoptim::ops

/// For ctypes.PyDLL: the functions above as a dict, from torch.Tensor, torch.nn.Parameter and
/// torch.Tensor.__dlpack_c_exchange_api__. Empty, where that table is of another
/// version; null, where Python's functions are not to be found.
extern "C" __attribute__((visibility("default"))) PyObject* flashoptim_python_functions(PyObject* tensor_type,
                                                                                         PyObject* parameter_type,
                                                                                         PyObject* capsule) {
  using namespace flashoptim::ops;
  if (&PyCFunction_NewEx == nullptr) return nullptr;
  const auto* table = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (table == nullptr) return nullptr;
  PyObject* const functions = PyDict_New();
  if (table->major != 1 || table->tensor_from_py_object == nullptr) return functions;
  Py_IncRef(tensor_type);
  Py_IncRef(parameter_type);
  g_python = {table->tensor_from_py_object, tensor_type, parameter_type, PyUnicode_InternFromString("grad")};
  for (PyMethod& function : g_functions) {
    const Reference made(PyCFunction_NewEx(&function, nullptr, nullptr));
    PyDict_SetItemString(functions, function.name, made.get());
  }
  return functions;
}
