// The store's functions for Python, as a dict: each takes a store's capsule first. Called as C functions, without
// torch's dispatcher: handing 1,500 tensors to an operator costs more than stepping them.
//
// Whatever is wrong is RuntimeError, with nothing changed.
#include <algorithm>
#include <string>

#include "libtorch/ops/checks.h"
#include "libtorch/ops/python_store.h"

namespace flashoptim::ops {
namespace {

/// Arguments of one call.
struct Arguments {
  PyObject* const* values;
  PySsize count;
  PyObject* operator[](PySsize i) const { return values[i]; }
};

PyObject* none() {
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

/// A function of Python: no C++ exception gets out.
template <PySsize kCount, PyObject* (*body)(Arguments)>
PyObject* guarded(PyObject*, PyObject* const* values, PySsize count) {
  try {
    if (count != kCount)
      throw std::runtime_error("flashoptim: a function of the store got " + std::to_string(count) +
                               " arguments; it takes " + std::to_string(kCount));
    return body({values, count});
  } catch (const std::exception& error) {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* to_list(const std::vector<int64_t>& numbers) {
  Reference list(PyList_New(0));
  for (const int64_t number : numbers) {
    const Reference item(PyLong_FromLongLong(number));
    if (PyList_Append(list.get(), item.get()) != 0) throw PythonError();
  }
  return list.release();
}

/// new_store(optimizer: str) -> capsule
PyObject* new_store(Arguments a) { return PythonStore::new_capsule(parse_optimizer({"new_store"}, to_string(a[0]))); }

/// reset(store, params: list[Tensor])
PyObject* reset(Arguments a) {
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  store.reset(a[1]);
  return none();
}

/// forget(store, index: int)
PyObject* forget(Arguments a) {
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  store.forget(to_int(a[1]));
  return none();
}

/// kPlaceNumbers numbers (checks.h); None: the whole itself.
store::Shard to_shard(Op op, PyObject* tuple) {
  if (is_none(tuple)) return {};
  std::vector<int64_t> numbers;
  for (PySsize i = 0; i < PyTuple_Size(tuple); ++i) numbers.push_back(to_int(PyTuple_GetItem(tuple, i)));
  return parse_shard(op, numbers);
}

/// describe(store, index: int, name: str, group: int, master_weights: int, codec: int, has_momentum: int,
///          gradient_dtype: int, place: tuple | None, param: Tensor, is_copy: int, state: dict, is_offloaded: int)
PyObject* describe(Arguments a) {
  const Op op{"describe"};
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  store::RecordOptions options;
  options.group = to_int(a[3]);
  options.format.master_weights = parse_master_weights(op, "master_weights", to_int(a[4]));
  options.format.codec = parse_state_codec(op, "codec", to_int(a[5]));
  options.has_momentum = to_int(a[6]) != 0;
  options.gradient_dtype = static_cast<DType>(to_int(a[7]));
  options.shard = to_shard(op, a[8]);
  options.is_copy = to_int(a[10]) != 0;
  options.is_offloaded = to_int(a[12]) != 0;
  store.describe(op, to_int(a[1]), to_string(a[2]), options, a[9], a[11]);
  return none();
}

/// plan(store) -> list[list[int]] | None: makes the plans that are missing; the records of every plan, None: as before.
PyObject* plan(Arguments a) {
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  if (!store.store().plan({"plan"})) return none();
  Reference list(PyList_New(0));
  for (int64_t p = 0; p < store.store().plans(); ++p) {
    const Reference records(to_list(store.store().plan_view(p).records));
    if (PyList_Append(list.get(), records.get()) != 0) throw PythonError();
  }
  return list.release();
}

/// Address of an optional tensor of `count` elements of a dtype on `device`.
void* address(Op op, const char* name, PyObject* object, int32_t dtype, int64_t count, Device device) {
  if (is_none(object)) return nullptr;
  const LocalTensor tensor(object);
  if (!tensor.has_value()) op.fail(std::string(name) + " is no plain tensor; allowed are None and a torch.Tensor");
  return unpack_array(op, {name}, tensor.handle(), dtype, count, device);
}

/// From the tuple (nonfinite, grad_divisor, clip_coefficient, found_inf, telemetry) of tensors or None.
store::Controls to_controls(Op op, PyObject* tuple, Device device, size_t records, double grad_scale, int64_t stride) {
  if (PyTuple_Size(tuple) != 5) throw PythonError();
  const DtypeCodes& c = codes();
  const auto scalar = [&](PySsize place, const char* name, int32_t dtype) {
    return address(op, name, PyTuple_GetItem(tuple, place), dtype, 1, device);
  };
  constexpr int64_t kTelemetryNumbers = sizeof(StepTelemetry) / sizeof(int64_t);
  store::Controls controls;
  controls.gradient_scale = checked_grad_scale(op, grad_scale);
  controls.nonfinite_gradients = static_cast<int64_t*>(scalar(0, "nonfinite", c.int64));
  controls.gradient_divisor = static_cast<const float*>(scalar(1, "grad_divisor", c.float32));
  controls.clip_coefficient = static_cast<const float*>(scalar(2, "clip_coefficient", c.float32));
  controls.found_inf = static_cast<const float*>(scalar(3, "found_inf", c.float32));
  controls.telemetry = static_cast<StepTelemetry*>(address(op, "telemetry", PyTuple_GetItem(tuple, 4), c.int64,
                                                           static_cast<int64_t>(records) * kTelemetryNumbers, device));
  controls.telemetry_stride = stride;
  if (stride < 1) op.fail("telemetry_stride = " + std::to_string(stride) + "; must be at least 1");
  return controls;
}

store::GroupHyperparameters to_group(Op op, PythonStore& store, PyObject* values, PyObject* lr, Device device) {
  std::vector<Hyperparameters> sets;
  unpack_hypers(op, to_doubles(values), store.store().optimizer(), StepNumber::kOpen, &sets);
  if (sets.size() != 1) op.fail("hypers holds " + std::to_string(sets.size()) + " sets for one group");
  return {sets[0], static_cast<const float*>(address(op, "lr", lr, codes().float32, 1, device))};
}

/// Runs a step; on the CPU, where it takes its time, without Python's lock.
template <class Body>
void run(bool on_cpu, Body body) {
  if (!on_cpu) return body();
  const WithoutLock without_lock;
  body();
}

/// step(store, state: dict, staged: dict | None, counts_on_device: int, hypers: list[list[float]],
///      lrs: list[Tensor | None] | None, controls: list[tuple], grad_scale: float, telemetry_stride: int)
///   -> list[int] | int: what has to be seen to first (PythonStore::Step::needs), with nothing changed, or the number
/// of parameters that were stepped. hypers and lrs have an entry a group, controls one a plan. Staged parameters are
/// copied back and counts set in the same call: no signal of Python's comes between.
PyObject* step(Arguments a) {
  const Op op{"step"};
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  PythonStore::Step step = store.look(a[1], a[2], to_int(a[3]) != 0);
  if (!step.needs.empty()) return to_list(step.needs);
  if (step.stepped.empty()) return PyLong_FromLongLong(0);
  const double grad_scale = PyFloat_AsDouble(a[7]);
  const int64_t stride = to_int(a[8]), plans = store.store().plans();
  if (PyList_Size(a[6]) != plans) op.fail("controls must have " + std::to_string(plans) + " entries, one per plan");
  std::vector<store::Controls> controls;
  for (int64_t p = 0; p < plans; ++p) {
    const auto view = store.store().plan_view(p);
    const bool is_meta = view.backend == Backend::kMeta;
    controls.push_back(
        is_meta ? store::Controls()
                : to_controls(op, PyList_GetItem(a[6], p), view.device, view.records.size(), grad_scale, stride));
  }
  std::vector<store::GroupHyperparameters> groups;
  std::vector<Device> devices(static_cast<size_t>(PyList_Size(a[4])));  // of each group that steps
  for (const int64_t i : step.stepped) {
    const store::Record& record = store.store().record(i);
    devices.at(static_cast<size_t>(record.options().group)) = record.device();
  }
  for (size_t g = 0; g < devices.size(); ++g) {
    const auto at = static_cast<PySsize>(g);
    PyObject* const lr = is_none(a[5]) ? a[5] : PyList_GetItem(a[5], at);
    groups.push_back(to_group(op, store, PyList_GetItem(a[4], at), lr, devices[g]));
  }
  if (PyErr_Occurred() != nullptr) throw PythonError();
  const auto conclude = [&] {
    store.copy_back(step, a[2]);
    store.count(step);
    store.bump_versions(step.stepped);
  };
  try {
    run(store.has_cpu_plan(), [&] { store.store().step(op, groups, controls); });
  } catch (const std::exception&) {
    // Offloaded states are stepped one behind the other: those before the failure have been, and are counted so.
    store.keep_stepped(&step);
    if (!step.stepped.empty()) conclude();
    throw;
  }
  conclude();
  return PyLong_FromLongLong(static_cast<long long>(step.stepped.size()));
}

/// step_one(store, index: int, state: dict | None, staged: tuple | None, hypers: list[float], lr: Tensor | None,
///          controls: tuple, grad_scale: float, telemetry_stride: int) -> int: 1: done; 0: describe it first; -1:
///          plan() first. Telemetry is that of the record's whole plan; of one record, where it has none yet.
PyObject* step_one(Arguments a) {
  const Op op{"step_one"};
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  const int64_t index = to_int(a[1]);
  PythonStore::One one;
  if (!store.look_at(index, a[2], a[3], &one)) return PyLong_FromLongLong(0);
  if (store.store().wants_plan(index)) return PyLong_FromLongLong(-1);
  const store::Record& record = store.store().record(index);
  const auto conclude = [&] {
    if (!is_none(a[3])) store.copy_back(index, a[3]);
    store.count_one(index, a[2], one.count);
    store.bump_versions({index});
  };
  if (record.backend() != Backend::kMeta) {
    const store::GroupHyperparameters group = to_group(op, store, a[4], a[5], record.device());
    const store::Controls controls =
        to_controls(op, a[6], record.device(), store.store().plan_size(index), PyFloat_AsDouble(a[7]), to_int(a[8]));
    try {
      run(record.backend() == Backend::kCpu,
          [&] { store.store().step_one(op, index, one.gradient, one.count, group, controls); });
    } catch (const std::exception&) {
      if (!store.store().stepped().empty()) conclude();  // what failed came behind the step
      throw;
    }
  }
  conclude();
  return PyLong_FromLongLong(1);
}

/// gradient_norm(store, state, staged, grad_scale: float, grad_divisor: Tensor | None, max_norm: float,
///               result: Tensor) -> list[int] | int: as step(); result: 4 float32, the sum of squares as one double,
///               the
/// norm, the clipping coefficient. All gradients must be of one plan.
PyObject* gradient_norm(Arguments a) {
  const Op op{"gradient_norm"};
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  const PythonStore::Step step = store.look(a[1], a[2], false);
  if (!step.needs.empty()) return to_list(step.needs);
  const float scale = checked_grad_scale(op, PyFloat_AsDouble(a[3]));
  const double max_norm = PyFloat_AsDouble(a[5]);
  if (!(max_norm >= 0.0)) op.fail("max_norm = " + number(max_norm) + "; must be at least 0 (0: no clipping)");
  if (step.stepped.empty()) return PyLong_FromLongLong(0);
  const int64_t plan = store.store().only_plan(op);
  const Device device = store.store().plan_view(plan).device;
  const auto* const divisor = static_cast<const float*>(address(op, "grad_divisor", a[4], codes().float32, 1, device));
  auto* const result = static_cast<cuda::GradientNorm*>(address(op, "result", a[6], codes().float32, 4, device));
  store.store().gradient_norm(op, plan, scale, divisor, static_cast<float>(max_norm), result);
  return PyLong_FromLongLong(static_cast<long long>(step.stepped.size()));
}

/// same_objects(list, known: list) -> bool: whether both hold the same objects.
PyObject* same_objects(Arguments a) {
  const PySsize count = PyList_Size(a[1]);
  bool same = PyList_Size(a[0]) == count;
  for (PySsize i = 0; same && i < count; ++i) same = PyList_GetItem(a[0], i) == PyList_GetItem(a[1], i);
  if (PyErr_Occurred() != nullptr) throw PythonError();
  return PyBool_FromLong(same ? 1 : 0);
}

void remember(std::vector<PyObject*>& types, PyObject* type) {
  if (std::find(types.begin(), types.end(), type) != types.end()) return;
  Py_IncRef(type);
  types.push_back(type);
}

/// wrap(type): tensors of this type stand for their `_local_tensor`.
PyObject* wrap(Arguments a) {
  remember(python_side().wrapper_types, a[0]);
  return none();
}

/// plain(type): tensors of this type, a subclass of torch.Tensor, are as those of torch.Tensor.
PyObject* plain(Arguments a) {
  remember(python_side().plain_types, a[0]);
  return none();
}

/// versions(function): torch's way to count up the versions of a list of tensors.
PyObject* versions(Arguments a) {
  Py_IncRef(a[0]);
  python_side().bump_versions = a[0];
  return none();
}

/// find_layout(probes: list[tuple] | None): finds where torch keeps what a step looks at, by _layout.py's probes; None:
/// torch is asked from now on.
PyObject* find_layout(Arguments a) {
  tensor_layout() = {};
  if (is_none(a[0])) return none();
  std::vector<Probe> probes;
  for (PySsize i = 0; i < PyList_Size(a[0]); ++i) {
    PyObject* const facts = PyList_GetItem(a[0], i);
    if (PyTuple_Size(facts) != 12) throw std::runtime_error("flashoptim: a probe has 12 facts");
    PyObject* const object = PyTuple_GetItem(facts, 0);
    const auto fact = [&](PySsize at) { return static_cast<std::intptr_t>(to_int(PyTuple_GetItem(facts, at))); };
    const LocalTensor tensor(object);
    Facts said;
    if (!tensor.has_value() || !read_facts(tensor.handle(), &said)) throw std::runtime_error("a probe is no tensor");
    Probe& probe = probes.emplace_back();
    probe.implementation = static_cast<const char*>(implementation_of(object));
    probe.sizes = said.sizes, probe.strides = said.strides;
    probe.storage = fact(1), probe.data = fact(2), probe.bytes = fact(3), probe.offset = fact(4);
    probe.numel = fact(5), probe.dim = fact(6), probe.keys = fact(7), probe.object = fact(8);
    probe.has_autograd = fact(9), probe.gradient = fact(10), probe.version = fact(11);
  }
  tensor_layout() = ops::find_layout(probes);
  return none();
}

/// looks_same(tensor, change: callable) -> bool: whether a step would take a tensor for what it was before the call.
PyObject* looks_same(Arguments a) {
  TensorKinds kinds;
  Trace trace;
  trace.remember(a[0], implementation_of(a[0]), &kinds);
  const Reference done(PyObject_CallFunctionObjArgs(a[1], nullptr));
  return PyBool_FromLong(trace.is(implementation_of(a[0])) ? 1 : 0);
}

/// bump_version(tensor): counts a tensor's version up where it stands.
PyObject* bump_version(Arguments a) {
  bump_version_of(a[0]);
  return none();
}

/// steps(store) -> int: how many calls of step and step_one have stepped.
PyObject* steps(Arguments a) { return PyLong_FromLongLong(PythonStore::of(a[0]).steps()); }

/// set_ring(store, slot_bytes: int, slots: int, is_simulated: int): what offloaded states stream through from the next
/// plan on.
PyObject* set_ring(Arguments a) {
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  store.store().set_ring({to_int(a[1]), to_int(a[2]), to_int(a[3]) != 0});
  return none();
}

/// flush(store): a pass over offloaded states is over.
PyObject* flush(Arguments a) {
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  store.store().flush({"flush"});
  return none();
}

/// synchronize(store): waits until every offloaded state is home.
PyObject* synchronize(Arguments a) {
  PythonStore& store = PythonStore::of(a[0]);
  const auto lock = store.lock();
  run(/*on_cpu=*/true, [&] { store.store().synchronize({"synchronize"}); });
  return none();
}

/// copied(store) -> list[int]: bytes up and down, copies up and down, units found on the device and not, so far.
PyObject* copied(Arguments a) {
  const OffloadCounts counts = PythonStore::of(a[0]).store().offload_counts();
  return to_list(
      {counts.up_bytes, counts.down_bytes, counts.up_copies, counts.down_copies, counts.prefetched, counts.fetched});
}

#define FLASHOPTIM_FUNCTION(name, count) {#name, reinterpret_cast<void*>(&guarded<count, name>), kPyFastCall, nullptr}
PyMethod g_functions[] = {
    FLASHOPTIM_FUNCTION(new_store, 1),    FLASHOPTIM_FUNCTION(reset, 2),         FLASHOPTIM_FUNCTION(forget, 2),
    FLASHOPTIM_FUNCTION(describe, 13),    FLASHOPTIM_FUNCTION(plan, 1),          FLASHOPTIM_FUNCTION(step, 9),
    FLASHOPTIM_FUNCTION(step_one, 9),     FLASHOPTIM_FUNCTION(gradient_norm, 7), FLASHOPTIM_FUNCTION(same_objects, 2),
    FLASHOPTIM_FUNCTION(wrap, 1),         FLASHOPTIM_FUNCTION(plain, 1),         FLASHOPTIM_FUNCTION(steps, 1),
    FLASHOPTIM_FUNCTION(versions, 1),     FLASHOPTIM_FUNCTION(find_layout, 1),   FLASHOPTIM_FUNCTION(looks_same, 2),
    FLASHOPTIM_FUNCTION(bump_version, 1), FLASHOPTIM_FUNCTION(set_ring, 4),      FLASHOPTIM_FUNCTION(flush, 1),
    FLASHOPTIM_FUNCTION(synchronize, 1),  FLASHOPTIM_FUNCTION(copied, 1),
};
#undef FLASHOPTIM_FUNCTION

}  // namespace
}  // namespace flashoptim::ops

/// For ctypes.PyDLL: the functions above as a dict. `sample` is a tensor whose implementation
/// flashoptim::implementation says to be at `implementation`, an object of `object_size` bytes; null, with an
/// exception, where it is not to be found in it.
extern "C" __attribute__((visibility("default"))) PyObject* flashoptim_python_functions(
    PyObject* tensor_type, PyObject* parameter_type, PyObject* sample, int64_t object_size, int64_t implementation,
    int free_threaded) {
  using namespace flashoptim::ops;
  try {
    PythonSide& side = python_side();
    const std::intptr_t offset = find_tensor(sample, object_size, reinterpret_cast<const void*>(implementation));
    if (side.grad == nullptr) {
      side.grad = Reference(PyUnicode_InternFromString("grad")).release();
      side.local_tensor = Reference(PyUnicode_InternFromString("_local_tensor")).release();
      side.spec = Reference(PyUnicode_InternFromString("_spec")).release();
      side.mesh = Reference(PyUnicode_InternFromString("mesh")).release();
      side.placements = Reference(PyUnicode_InternFromString("placements")).release();
      side.tensor_type = Reference::borrowed(tensor_type).release();
      side.parameter_type = Reference::borrowed(parameter_type).release();
    }
    side.tensor_offset = offset;
    side.is_free_threaded = free_threaded != 0;
    Reference functions(PyDict_New());
    for (PyMethod& function : g_functions) {
      const Reference made(PyCFunction_NewEx(&function, nullptr, nullptr));
      if (PyDict_SetItemString(functions.get(), function.name, made.get()) != 0) throw PythonError();
    }
    return functions.release();
  } catch (const std::exception& error) {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}
