// What a step looks at in Python, as loops in C. 300 tensors with 1800 entries of state: 18 us to see that nothing
// moved, where Python takes 38; 20 us to take the gradients, where a list through the operator
// takes 40.
//
// The library names no Python at link time: it uses functions of CPython's stable ABI, as weak symbols, which are there
// where Python has loaded the library, and two beyond it that it can do without (DictWatcher). Tensors are read through
// torch's DLPack exchange table (DLPack 1.3), a stable ABI as well. Whatever is not as expected is left to the
// operators, which take lists and name what is wrong.
//
// The plan keeps no tensor of its own: a held reference would make torch.utils.swap_tensors refuse the parameter.
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

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

/// Whether this is of one of torch's own types: a subclass may mean something else by its memory.
bool is_plain(PyObject* object) {
  PyObject* const type = PyObject_Type(object);
  Py_DecRef(type);  // it has an instance that keeps it
  return type == g_python.tensor_type || type == g_python.parameter_type;
}

/// False, with no exception set, for what is no tensor or has no memory to look at.
bool read(PyObject* object, dlpack::Tensor* tensor) {
  if (g_python.read(object, tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

std::shared_ptr<PreparedPlan> find_plan(PyObject* number) {
  return PreparedPlans::instance().find(Op{"plan"}, PyLong_AsLongLong(number));
}

PyObject* none() {
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

PyObject* to_bool(bool value) { return PyBool_FromLong(value ? 1 : 0); }

/// A function of Python: no C++ exception gets out.
template <PyObject* (*body)(PyObject* const* arguments)>
PyObject* guarded(PyObject*, PyObject* const* arguments, PySsize) {
  try {
    return body(arguments);
  } catch (const std::exception& error) {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_RuntimeError, error.what());
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

/// same_states(state: dict, dicts: list) -> bool: whether the values of `state` are `dicts`.
PyObject* same_states(PyObject* const* arguments) {
  PyObject *key = nullptr, *value = nullptr, *const dicts = arguments[1];
  const PySsize count = PyList_Size(dicts);
  PySsize place = 0;
  for (PySsize position = 0; PyDict_Next(arguments[0], &position, &key, &value) != 0; ++place) {
    if (place >= count || PyList_GetItem(dicts, place) != value) return to_bool(false);
  }
  return to_bool(place == count);
}

/// Counts changes of watched dicts by others than count(): a step need not look into 300 of them where none has changed
/// (a third of is_current()'s time). From Python 3.12 on.
class DictWatcher {
 public:
  void start() {
    if (&PyDict_AddWatcher == nullptr || id_ >= 0) return;
    id_ = PyDict_AddWatcher(&on_change);
    if (id_ < 0) PyErr_Clear();  // others have taken all that there are
  }
  /// Whether it will count the changes of all of them.
  bool watch(PyObject* dicts) const {
    if (id_ < 0) return false;
    for (PySsize i = 0, count = PyList_Size(dicts); i < count; ++i) {
      if (PyDict_Watch(id_, PyList_GetItem(dicts, i)) == 0) continue;
      PyErr_Clear();
      return false;
    }
    return true;
  }
  static uint64_t changes() { return g_changes.load(std::memory_order_acquire); }
  /// The dict that is about to be changed by count().
  static void set_own(const PyObject* dict) { g_own.store(dict, std::memory_order_relaxed); }

 private:
  static int on_change(int, PyObject* dict, PyObject*, PyObject*) {
    if (dict != g_own.load(std::memory_order_relaxed)) g_changes.fetch_add(1, std::memory_order_acq_rel);
    return 0;
  }

  static inline std::atomic<uint64_t> g_changes = 0;
  static inline std::atomic<const PyObject*> g_own = nullptr;  // of one thread: setting an entry keeps Python's lock
  int id_ = -1;
};
DictWatcher g_watcher;

/// remember(plan, dicts: list, known: list, counts: list[int]): the dicts' values, one behind the other, which
/// is_current() compares with, and the places of the step counts among them. The caller keeps the values.
PyObject* remember(PyObject* const* arguments) {
  const std::shared_ptr<PreparedPlan> plan = find_plan(arguments[0]);
  PyObject* const values = arguments[2];
  KnownStates& known = plan->known();
  known.values.resize(static_cast<size_t>(PyList_Size(values)));
  for (size_t i = 0; i < known.values.size(); ++i) known.values[i] = PyList_GetItem(values, static_cast<PySsize>(i));
  known.counts.resize(static_cast<size_t>(PyList_Size(arguments[3])));
  for (size_t i = 0; i < known.counts.size(); ++i)
    known.counts[i] = static_cast<size_t>(PyLong_AsLongLong(PyList_GetItem(arguments[3], static_cast<PySsize>(i))));
  known.is_watched = g_watcher.watch(arguments[1]);
  known.is_seen = false;  // the next look is a real one
  return none();
}

/// Whether the values of all dicts, one behind the other, are those remembered.
bool same_values(PyObject* dicts, const std::vector<const PyObject*>& known) {
  size_t place = 0;
  for (PySsize i = 0, count = PyList_Size(dicts); i < count; ++i) {
    PyObject *const dict = PyList_GetItem(dicts, i), *key = nullptr, *value = nullptr;
    for (PySsize position = 0; PyDict_Next(dict, &position, &key, &value) != 0; ++place) {
      if (place >= known.size() || known[place] != value) return false;
    }
  }
  return place == known.size();
}

/// is_current(plan, params: list, dicts: list) -> bool: whether the parameters are where the plan takes them to be, and
/// the dicts, those of remember(), hold what they held.
PyObject* is_current(PyObject* const* arguments) {
  const std::shared_ptr<PreparedPlan> plan = find_plan(arguments[0]);
  PyObject *const params = arguments[1], *const dicts = arguments[2];
  KnownStates& known = plan->known();
  const uint64_t changes = DictWatcher::changes();
  if (!known.is_watched || !known.is_seen || known.changes != changes) {
    if (!same_values(dicts, known.values)) return to_bool(false);
    known.is_seen = true;
    known.changes = changes;
  }
  if (PyList_Size(params) != plan->size()) return to_bool(false);
  for (PySsize i = 0; i < plan->size(); ++i) {
    dlpack::Tensor tensor;
    if (!read(PyList_GetItem(params, i), &tensor) || !plan->is_parameter(i, tensor)) return to_bool(false);
  }
  return to_bool(true);
}

/// take_gradients(plan, params: list) -> tuple[list, list] | None: gives the plan the addresses of the parameters'
/// gradients for its next step. The gradients, to be kept until then, and the places of parameters that have none.
/// None, where the operators have to look at the gradients.
PyObject* take_gradients(PyObject* const* arguments) {
  const std::shared_ptr<PreparedPlan> plan = find_plan(arguments[0]);
  PyObject* const params = arguments[1];
  const PySsize count = PyList_Size(params);
  if (count != plan->size() || plan->backend() == Backend::kMeta) return none();
  const Reference grads(PyList_New(count)), absent(PyList_New(0));
  // Not in the plan before the end: Python's lock may change hands at every attribute, so the plan's must not be held.
  std::vector<const void*> addresses(static_cast<size_t>(count));
  for (PySsize i = 0; i < count; ++i) {
    PyObject* const grad = PyObject_GetAttr(PyList_GetItem(params, i), g_python.grad);
    if (grad == nullptr) return nullptr;
    PyList_SetItem(grads.get(), i, grad);  // takes the reference over
    if (grad == &_Py_NoneStruct) {
      const Reference index(PyLong_FromLongLong(i));
      PyList_Append(absent.get(), index.get());
      continue;
    }
    dlpack::Tensor tensor;
    if (!is_plain(grad) || !read(grad, &tensor) || !plan->is_gradient(i, tensor)) return none();
    addresses[static_cast<size_t>(i)] = tensor.address();
  }
  {
    const std::lock_guard lock(plan->mutex());
    plan->offer_gradients(Op{"plan"}, addresses);
  }
  return PyTuple_Pack(2, grads.get(), absent.get());
}

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

/// step(plan, hyper_index: list[int], hypers: list[float], grad_scale: float, nonfinite: Tensor) -> bool: plan_step_
/// with the gradients that take_gradients() has just given the plan, without the dispatcher. False, with nothing done,
/// where `nonfinite` is not what the operator wants.
PyObject* step(PyObject* const* arguments) {
  const Op op{"plan_step_"};
  const std::shared_ptr<PreparedPlan> plan = find_plan(arguments[0]);
  std::vector<int64_t> hyper_index(static_cast<size_t>(PyList_Size(arguments[1])));
  for (size_t i = 0; i < hyper_index.size(); ++i)
    hyper_index[i] = PyLong_AsLongLong(PyList_GetItem(arguments[1], static_cast<PySsize>(i)));
  std::vector<double> hypers(static_cast<size_t>(PyList_Size(arguments[2])));
  for (size_t i = 0; i < hypers.size(); ++i)
    hypers[i] = PyFloat_AsDouble(PyList_GetItem(arguments[2], static_cast<PySsize>(i)));
  StepControls controls;
  controls.gradient_scale = checked_grad_scale(op, PyFloat_AsDouble(arguments[3]));
  if (PyErr_Occurred() != nullptr) return nullptr;
  dlpack::Tensor nonfinite;
  if (!read(arguments[4], &nonfinite) || !plan->is_counter(nonfinite)) return to_bool(false);
  controls.nonfinite_gradients = static_cast<int64_t*>(const_cast<void*>(nonfinite.address()));
  {
    const WithoutLock without_lock;
    const std::lock_guard lock(plan->mutex());
    plan->set_hypers(op, hypers, hyper_index);
    plan->set_or_use_gradients(op, {});
    plan->step(op, controls);
  }
  return to_bool(true);
}

/// count(plan, dicts: list, key, value): dict[key] = value for every dict, as what the plan remembers.
PyObject* count(PyObject* const* arguments) {
  const std::shared_ptr<PreparedPlan> plan = find_plan(arguments[0]);
  PyObject *const dicts = arguments[1], *const key = arguments[2], *const value = arguments[3];
  KnownStates& known = plan->known();
  for (size_t i = 0; i < known.counts.size(); ++i) {
    PyObject* const dict = PyList_GetItem(dicts, static_cast<PySsize>(i));
    if (dict == nullptr) return nullptr;
    DictWatcher::set_own(dict);
    const int failed = PyDict_SetItem(dict, key, value);
    DictWatcher::set_own(nullptr);
    if (failed != 0) return nullptr;
    known.values.at(known.counts[i]) = value;
  }
  return none();
}

PyMethod g_functions[] = {
    {"same_objects", reinterpret_cast<void*>(&guarded<same_objects>), kPyFastCall, nullptr},
    {"same_states", reinterpret_cast<void*>(&guarded<same_states>), kPyFastCall, nullptr},
    {"remember", reinterpret_cast<void*>(&guarded<remember>), kPyFastCall, nullptr},
    {"is_current", reinterpret_cast<void*>(&guarded<is_current>), kPyFastCall, nullptr},
    {"take_gradients", reinterpret_cast<void*>(&guarded<take_gradients>), kPyFastCall, nullptr},
    {"step", reinterpret_cast<void*>(&guarded<step>), kPyFastCall, nullptr},
    {"count", reinterpret_cast<void*>(&guarded<count>), kPyFastCall, nullptr},
};

}  // namespace
}  // namespace flashoptim::ops

/// For ctypes.PyDLL: the functions above as a dict, from torch.Tensor, torch.nn.Parameter and
/// torch.Tensor.__dlpack_c_exchange_api__. Empty, where that table is of another version; null, where Python's
/// functions are not to be found.
extern "C" __attribute__((visibility("default"))) PyObject* flashoptim_python_functions(PyObject* tensor_type,
                                                                                        PyObject* parameter_type,
                                                                                        PyObject* capsule) {
  using namespace flashoptim::ops;
  if (&PyCFunction_NewEx == nullptr) return nullptr;
  const auto* table = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (table == nullptr) return nullptr;
  PyObject* const functions = PyDict_New();
  if (functions == nullptr || table->major != 1 || table->tensor_from_py_object == nullptr) return functions;
  if (g_python.grad == nullptr) {
    PyObject* const grad = PyUnicode_InternFromString("grad");
    if (grad == nullptr) return functions;
    Py_IncRef(tensor_type);
    Py_IncRef(parameter_type);
    g_python = {table->tensor_from_py_object, tensor_type, parameter_type, grad};
  }
  g_watcher.start();
  for (PyMethod& function : g_functions) {
    PyObject* const made = PyCFunction_NewEx(&function, nullptr, nullptr);
    if (made == nullptr) continue;
    PyDict_SetItemString(functions, function.name, made);
    Py_DecRef(made);
  }
  return functions;
}
