#include "libtorch/ops/python_store.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <unordered_set>

namespace flashoptim::ops {
namespace {

constexpr const char* kCapsule = "flashoptim.store";
constexpr int64_t kMostSteps = int64_t{1} << 53;

/// What stands in a dict from record numbers under `index`, borrowed; null where nothing does.
PyObject* find(PyObject* by_record, int64_t index) {
  if (is_none(by_record)) return nullptr;
  const Reference key(PyLong_FromLongLong(index));
  PyObject* const value = PyDict_GetItemWithError(by_record, key.get());
  if (value == nullptr && PyErr_Occurred() != nullptr) throw PythonError();
  return value;
}

/// The first or second of a pair in place of `other`, where it is there and not None.
PyObject* staged_or(PyObject* pair, PySsize place, PyObject* other) {
  if (pair == nullptr) return other;
  PyObject* const value = PyTuple_GetItem(pair, place);
  if (value == nullptr) throw PythonError();
  return is_none(value) ? other : value;
}

/// Address of a gradient that a step can take as it lies; false for one that it cannot.
bool read_gradient(const store::Record& record, const LocalTensor& grad, const void** address) {
  Facts facts;
  if (!grad.has_value() || !read_facts(grad.handle(), &facts)) return false;
  const int64_t numel = record.tensors().layout.numel();
  if (!record.takes_gradient(facts, device_of(grad.handle())) || !is_in_storage(grad.handle(), facts, numel)) {
    return false;
  }
  *address = facts.data;
  // Only a tensor of one element can lie as it should and yet have the other sign: an imaginary part has gaps.
  return numel != 1 || !is_negated(grad.handle());
}

}  // namespace

bool bump_version_of(PyObject* tensor) {
  const TensorLayout& l = tensor_layout();
  const void* const counter = l.is_known ? pointer_at(implementation_of(tensor), l.version) : nullptr;
  if (counter == nullptr) return false;  // an inference tensor's
  auto* const count = reinterpret_cast<uint32_t*>(reinterpret_cast<std::intptr_t>(counter) + l.count);
  std::atomic_ref<uint32_t>(*count).fetch_add(1);
  return true;
}

PythonStore::PythonStore(OptimizerKind optimizer)
    : store_(optimizer),
      traces_per_record_(kFirstSlot + 2 * static_cast<size_t>(state_count(optimizer, /*has_momentum=*/true))) {}

PythonStore& PythonStore::of(PyObject* capsule) {
  auto* const store = static_cast<PythonStore*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (store == nullptr) throw PythonError();
  return *store;
}

PyObject* PythonStore::new_capsule(OptimizerKind optimizer) {
  auto store = std::make_unique<PythonStore>(optimizer);
  PyObject* const capsule = PyCapsule_New(store.get(), kCapsule, [](PyObject* dying) {
    delete static_cast<PythonStore*>(PyCapsule_GetPointer(dying, kCapsule));
  });
  if (capsule == nullptr) throw PythonError();
  store.release();
  return capsule;
}

std::unique_lock<std::mutex> PythonStore::lock() {
  // Waiting here with Python's lock in hand would wait for ever.
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) {
    throw std::runtime_error(
        "flashoptim: another thread is stepping this optimizer at this moment; threads that share one must take turns "
        "(a lock around step())");
  }
  return lock;
}

void PythonStore::reset(PyObject* params) {
  std::vector<Reference> held;
  std::unordered_map<PyObject*, int64_t> index;
  bool has_wrappers = false;
  for (PySsize i = 0; i < PyList_Size(params); ++i) {
    held.push_back(Reference::borrowed(PyList_GetItem(params, i)));
    index.emplace(held.back().get(), i);
    has_wrappers = has_wrappers || !is_plain_tensor(held.back().get());
  }
  store_.reset(static_cast<int64_t>(held.size()));
  entries_.assign(held.size(), nullptr);
  rows_.assign(held.size(), {});
  traces_.assign(held.size() * traces_per_record_, {});
  kinds_.clear();
  has_wrappers_ = has_wrappers;
  order_.clear();
  index_ = std::move(index);
  params_ = std::move(held);
}

void PythonStore::forget(int64_t index) {
  store_.forget(index);
  rows_.at(static_cast<size_t>(index)) = {};
}

std::shared_ptr<const PythonStore::Entries> PythonStore::entries_of(PyObject* state) {
  const int slots = state_count(store_.optimizer(), /*has_momentum=*/true);
  Entries entries;
  PyObject *key = nullptr, *value = nullptr;
  for (PySsize position = 0; PyDict_Next(state, &position, &key, &value) != 0;) {
    Entry entry{Reference::borrowed(key), EntryKind::kOther, 0};
    const std::string name = text_or_nothing(key);
    if (name == "step") entry.kind = EntryKind::kStep;
    if (name == "correction") entry.kind = EntryKind::kCorrection;
    for (int k = 0; k < slots; ++k) {
      const auto is = [&](store::Role role, StateCodec codec) {
        return name == store::array_name(store_.optimizer(), role, k, codec);
      };
      const bool is_state =
          is(store::Role::kState, StateCodec::kFloat32) || is(store::Role::kState, StateCodec::kDefault);
      if (!is_state && !is(store::Role::kScale, StateCodec::kDefault)) continue;
      entry.kind = is_state ? EntryKind::kState : EntryKind::kScale;
      entry.slot = k;
    }
    entries.push_back(std::move(entry));
  }
  std::erase_if(known_entries_, [](const auto& known) { return known.use_count() == 1; });  // nobody's any more
  for (const auto& known : known_entries_) {
    const auto same = [](const Entry& a, const Entry& b) { return a.key.get() == b.key.get(); };
    if (std::equal(known->begin(), known->end(), entries.begin(), entries.end(), same)) return known;
  }
  return known_entries_.emplace_back(std::make_shared<const Entries>(std::move(entries)));
}

void PythonStore::describe(Op op, int64_t index, const std::string& name, const store::RecordOptions& options,
                           PyObject* param, PyObject* state) {
  const auto slots = static_cast<size_t>(state_count(store_.optimizer(), options.has_momentum));
  const CriticalSection section(state);
  const std::shared_ptr<const Entries> entries = entries_of(state);
  std::vector<LocalTensor> read;  // keeps the handles
  read.reserve(entries->size() + 1);
  store::StateTensors stored;
  stored.states.resize(slots);
  stored.scales.resize(slots);
  AtenTensorHandle correction = nullptr;
  PyObject *key = nullptr, *value = nullptr;
  PySsize position = 0;
  for (const Entry& entry : *entries) {
    // Of a DTensor a local tensor is asked for, which may run code.
    const bool is_there = PyDict_Next(state, &position, &key, &value) != 0;
    if (!is_there || key != entry.key.get()) op.fail("the state of " + name + " was changed while it was looked at");
    const bool is_array = entry.kind == EntryKind::kCorrection || static_cast<size_t>(entry.slot) < slots;
    if (entry.kind == EntryKind::kOther || entry.kind == EntryKind::kStep || !is_array) continue;
    const LocalTensor& tensor = read.emplace_back(value);
    if (!tensor.has_value()) {
      op.fail("state '" + to_string(key) + "' of " + name +
              " is no plain tensor; allowed are torch.Tensor and DTensor");
    }
    if (entry.kind == EntryKind::kCorrection) correction = tensor.handle();
    if (entry.kind == EntryKind::kState) stored.states[static_cast<size_t>(entry.slot)] = tensor.handle();
    if (entry.kind == EntryKind::kScale) stored.scales[static_cast<size_t>(entry.slot)] = tensor.handle();
  }
  const LocalTensor& local = read.emplace_back(param);
  if (!local.has_value()) op.fail(name + " is no plain tensor; allowed are torch.Tensor, Parameter and DTensor");
  store_.describe(op, index, name, options, local.handle(), stored, correction);
  std::fill_n(traces_of(index), traces_per_record_, Trace());
  entries_[static_cast<size_t>(index)] = entries;
  const ParameterTensors& tensors = store_.record(index).tensors();
  rows_[static_cast<size_t>(index)] = {entries.get(), tensors.layout.numel(), static_cast<int32_t>(slots),
                                       tensors.gradient_dtype == DType::kFloat32 ? 4 : 2, options.is_offloaded};
}

void PythonStore::match_states(PyObject* state, std::vector<PyObject*>* states) {
  const CriticalSection section(state);
  PyObject *key = nullptr, *value = nullptr;
  size_t place = 0;
  for (PySsize position = 0; PyDict_Next(state, &position, &key, &value) != 0; ++place) {
    if (place == order_.size()) order_.push_back(-1);
    int64_t& record = order_[place];
    if (record < 0 || record >= size() || params_[static_cast<size_t>(record)].get() != key) {
      const auto found = index_.find(key);
      record = found == index_.end() ? -1 : found->second;
    }
    if (record >= 0) (*states)[static_cast<size_t>(record)] = value;
  }
}

bool PythonStore::read_count(int64_t index, PyObject* value, store::StepCount* count) const {
  *count = {};
  if (type_of(value) == &PyLong_Type) {
    count->taken = PyLong_AsLongLong(value);
    if (count->taken == -1 && PyErr_Occurred() != nullptr) PyErr_Clear();  // too large
    return count->taken >= 0 && count->taken < kMostSteps;
  }
  const LocalTensor tensor(value);
  Facts facts;
  if (!tensor.has_value() || !read_facts(tensor.handle(), &facts) || facts.dtype != codes().int64) return false;
  for (int64_t d = 0; d < facts.dim; ++d) {
    if (facts.sizes[d] != 1) return false;
  }
  if (device_of(tensor.handle()) != store_.record(index).device() || !is_in_storage(tensor.handle(), facts, 1)) {
    return false;
  }
  count->on_device = static_cast<int64_t*>(const_cast<void*>(facts.data));
  return true;
}

size_t PythonStore::trace_of(const Entry& entry) {
  if (entry.kind == EntryKind::kCorrection) return kCorrection;
  return kFirstSlot + 2 * static_cast<size_t>(entry.slot) + (entry.kind == EntryKind::kScale ? 1 : 0);
}

bool PythonStore::is_current(int64_t index, PyObject* state, store::StepCount* count, std::vector<Reference>* held) {
  const Row& row = rows_[static_cast<size_t>(index)];
  if (row.entries == nullptr) return false;
  Trace* const traces = traces_of(index);
  const bool is_known = tensor_layout().is_known;
  const CriticalSection section(state);
  PyObject *key = nullptr, *value = nullptr;
  PySsize position = 0;
  auto entry = row.entries->begin();
  for (; PyDict_Next(state, &position, &key, &value) != 0; ++entry) {
    if (entry == row.entries->end() || entry->key.get() != key) return false;
    if (entry->kind == EntryKind::kOther) continue;
    if (held != nullptr) held->push_back(Reference::borrowed(value));
    if (entry->kind == EntryKind::kStep) {
      if (!read_count(index, value, count)) return false;
      continue;
    }
    if (entry->kind != EntryKind::kCorrection && entry->slot >= row.slots) continue;  // SGD's buffer at momentum 0
    Trace& trace = traces[trace_of(*entry)];
    if (is_known && is_plain_tensor(value) && trace.is(implementation_of(value))) continue;
    const LocalTensor tensor(value);
    if (!tensor.has_value()) return false;
    const void* const implementation = implementation_of(tensor.object());
    if (is_known && tensor.object() != value && trace.is(implementation)) continue;
    const store::Record& record = store_.record(index);
    Facts facts;
    if (!read_facts(tensor.handle(), &facts)) return false;
    const bool same = entry->kind == EntryKind::kState   ? record.is_state(entry->slot, facts)
                      : entry->kind == EntryKind::kScale ? record.is_scale(entry->slot, facts)
                                                         : record.is_correction(facts);
    if (!same) return false;
    trace.remember(value, implementation, &kinds_);
  }
  if (entry != row.entries->end()) return false;
  if (row.is_offloaded) look_at_versions(index, state);
  return true;
}

void PythonStore::look_at_versions(int64_t index, PyObject* state) {
  static PyObject* const name = Reference(PyUnicode_InternFromString("_version")).release();
  int64_t versions = 0;
  PyObject *key = nullptr, *value = nullptr;
  PySsize position = 0;
  Row& row = rows_[static_cast<size_t>(index)];
  for (const Entry& entry : *row.entries) {
    if (PyDict_Next(state, &position, &key, &value) == 0) return;
    if (entry.kind == EntryKind::kOther || entry.kind == EntryKind::kStep) continue;
    const LocalTensor local(value);
    const Reference version(PyObject_GetAttr(local.has_value() ? local.object() : value, name));
    versions += PyLong_AsLongLong(version.get());
  }
  if (row.versions >= 0 && row.versions != versions) store_.drop(index);
  row.versions = versions;
}

bool PythonStore::has_cpu_plan() const {
  for (int64_t p = 0; p < store_.plans(); ++p) {
    if (store_.plan_view(p).backend == Backend::kCpu) return true;
  }
  return false;
}

bool PythonStore::is_parameter(int64_t index, PyObject* object) {
  Trace& trace = traces_of(index)[kParam];
  const bool is_known = tensor_layout().is_known;
  if (is_known && is_plain_tensor(object) && trace.is(implementation_of(object))) return true;
  const LocalTensor param(object);
  if (!param.has_value()) return false;
  const void* const implementation = implementation_of(param.object());
  if (is_known && param.object() != object && trace.is(implementation)) return true;
  Facts facts;
  if (!read_facts(param.handle(), &facts) || !store_.record(index).is_parameter(facts)) return false;
  trace.remember(object, implementation, &kinds_);
  return true;
}

bool PythonStore::take_gradient(int64_t index, PyObject* object, const void** address) {
  const LocalTensor grad(object);
  if (!grad.has_value()) return false;
  const Row& row = rows_[static_cast<size_t>(index)];
  Trace& trace = traces_of(index)[kGradient];
  const void* const implementation = implementation_of(grad.object());
  if (tensor_layout().is_known &&
      trace.is_like(implementation, row.gradient_numel, row.gradient_element_size, address)) {
    return true;
  }
  if (!read_gradient(store_.record(index), grad, address)) return false;
  trace.remember(object, implementation, &kinds_);
  return true;
}

const void* PythonStore::gradient_of(int64_t index) const {
  const TensorLayout& l = tensor_layout();
  PyObject* const object = params_[static_cast<size_t>(index)].get();
  const void* const implementation = implementation_of(object);
  if (!is_plain_tensor(object)) return implementation;
  const void* const autograd = pointer_at(implementation, l.autograd);
  if (autograd == nullptr) return nullptr;
  const void* const gradient = pointer_at(autograd, l.gradient);
  return reinterpret_cast<std::intptr_t>(gradient) == l.no_gradient ? nullptr : gradient;
}

PythonStore::InPlace PythonStore::gradient_in_place(int64_t index, const void** address) const {
  const void* const gradient = gradient_of(index);
  if (gradient == nullptr) return InPlace::kNone;
  const auto at = static_cast<size_t>(index);
  if (gradient == implementation_of(params_[at].get())) return InPlace::kUnlike;
  // Its Python object, if it has one, says whether it is a tensor of a type that is known.
  auto* const object = reinterpret_cast<PyObject*>(word_at(gradient, tensor_layout().object) & ~std::intptr_t{1});
  if (object != nullptr && !is_plain_tensor(object)) return InPlace::kUnlike;
  const Row& row = rows_[at];
  const bool is_like =
      traces_of(index)[kGradient].is_like(gradient, row.gradient_numel, row.gradient_element_size, address);
  return is_like ? InPlace::kTaken : InPlace::kUnlike;
}

void PythonStore::prefetch(size_t record) const {
  const Trace* const traces = traces_of(static_cast<int64_t>(record));
  for (size_t k = 0; k < traces_per_record_; ++k) {
    if (k != kGradient) traces[k].prefetch();  // gradients are new
  }
}

namespace {

/// Starts to fetch a dict; its keys, once it is there. A dict's third word behind its head, in most Pythons, is where
/// its keys are; elsewhere nothing is gained.
void prefetch_dict(PyObject* dict) {
  if (dict != nullptr) prefetch_at(dict, 4 * sizeof(void*));
}
void prefetch_keys(PyObject* dict) {
  if (dict == nullptr || type_of(dict) != &PyDict_Type) return;
  const void* const keys = pointer_at(dict, 4 * sizeof(void*));
  for (const std::intptr_t line : {0, 64, 128}) prefetch_at(keys, line);
}

}  // namespace

/// What look() knows while it looks.
struct PythonStore::Sight {
  bool in_place;                  // gradients are read in place, unless asked for
  std::vector<Reference>* held;   // where all that is looked at is to be held
  std::vector<PyObject*> grads;   // of each record; null where not asked for
  std::vector<bool> are_alike;    // placed as their parameters
  std::vector<PyObject*> states;  // of each record
  std::vector<bool> has_grad;
  std::vector<int64_t> unlike;  // gradients to ask for
  std::vector<store::StepCount> counts;
  std::vector<const void*> addresses;
  bool has_counters = false;

  explicit Sight(size_t records)
      : grads(records),
        are_alike(records, true),
        states(records),
        has_grad(records),
        counts(records),
        addresses(records) {}
};

void PythonStore::look_once(Sight* sight, PyObject* state, PyObject* staged, bool counts_on_device, Step* step) {
  const auto records = static_cast<size_t>(size());
  std::fill(sight->states.begin(), sight->states.end(), nullptr);
  match_states(state, &sight->states);
  sight->has_grad.assign(records, false);
  sight->unlike.clear();
  sight->has_counters = false;
  step->needs.clear();
  step->stepped.clear();
  step->stepped.reserve(records);
  bool is_planned = true;
  // A look waits for memory more than it compares: so all that it will read is fetched some records ahead, each thing
  // when what leads to it has come.
  constexpr int64_t kGradients = 6, kStorages = 2;
  constexpr size_t kObjects = 12, kKeys = 8, kTensors = 4;
  const auto fetch_ahead = [&](size_t i) {
    if (i + kObjects < records) {
      prefetch_dict(sight->states[i + kObjects]);
      prefetch_at(params_[i + kObjects].get(), sizeof(void*));
    }
    if (i + kKeys < records) {
      prefetch_keys(sight->states[i + kKeys]);
      if (sight->in_place) prefetch_at(implementation_of(params_[i + kKeys].get()), tensor_layout().autograd);
    }
    if (i + kTensors < records) prefetch(i + kTensors);
    // Gradients are new, so that what leads to them is followed; all of it is alive.
    const auto ahead = static_cast<int64_t>(i);
    if (sight->in_place && ahead + kGradients < size()) {
      if (const void* const gradient = gradient_of(ahead + kGradients); gradient != nullptr) {
        prefetch_implementation(gradient);
      }
    }
    if (sight->in_place && ahead + kStorages < size()) {
      if (const void* const gradient = gradient_of(ahead + kStorages); gradient != nullptr) {
        prefetch_storage(pointer_at(gradient, tensor_layout().storage));
      }
    }
  };
  for (size_t i = 0; i < records; ++i) {
    fetch_ahead(i);
    const auto index = static_cast<int64_t>(i);
    store::StepCount& count = sight->counts[i];
    PyObject* const found = sight->states[i];
    if (sight->grads[i] == nullptr) {
      if (!sight->in_place) continue;
      const InPlace gradient = gradient_in_place(index, &sight->addresses[i]);
      if (gradient == InPlace::kNone) continue;
      if (gradient == InPlace::kUnlike) {
        sight->unlike.push_back(index);
        continue;
      }
    }
    sight->has_grad[i] = true;
    const auto fits = [&] {
      if (found == nullptr || !is_current(index, found, &count, sight->held)) return false;
      PyObject* const pair = is_none(staged) ? nullptr : find(staged, index);
      if (!is_parameter(index, staged_or(pair, 0, params_[i].get()))) return false;
      if (PyObject* const asked = sight->grads[i]; asked != nullptr) {
        // A gradient that is placed otherwise is redistributed first, which gives a staged one.
        PyObject* const grad = staged_or(pair, 1, asked);
        if (!sight->are_alike[i] && grad == asked) return false;
        if (!take_gradient(index, grad, &sight->addresses[i])) return false;
      }
      return count.on_device != nullptr || !counts_on_device;
    };
    if (!fits()) {
      step->needs.push_back(index);
      continue;
    }
    is_planned = is_planned && store_.is_planned(index);
    sight->has_counters = sight->has_counters || count.on_device != nullptr;
    step->stepped.push_back(index);
  }
  if (!is_planned || store_.is_stale()) step->needs.push_back(kPlanFirst);
}

PythonStore::Step PythonStore::look(PyObject* state, PyObject* staged, bool counts_on_device) {
  const PythonSide& side = python_side();
  Step step;
  const auto records = static_cast<size_t>(size());
  if (kinds_.size() > 2 * traces_.size()) {  // of tensors that are long gone
    std::fill(traces_.begin(), traces_.end(), Trace());
    kinds_.clear();
  }
  Sight sight(records);
  // From here to the launch nothing runs that could change a container: no Python code, and Python's lock is kept, or
  // (a CPU step, a Python without lock) what was looked at is held.
  sight.held = side.is_free_threaded || has_cpu_plan() ? &step.held : nullptr;
  sight.in_place = tensor_layout().is_known && !has_wrappers_ && sight.held == nullptr && is_none(staged);
  const auto ask = [&](size_t i) {
    Reference grad(PyObject_GetAttr(params_[i].get(), side.grad));
    if (is_none(grad.get())) return;
    sight.grads[i] = grad.get();
    sight.are_alike[i] = are_placed_alike(params_[i].get(), grad.get());
    step.held.push_back(std::move(grad));
  };
  if (!sight.in_place) {
    for (size_t i = 0; i < records; ++i) ask(i);
  }
  look_once(&sight, state, staged, counts_on_device, &step);
  if (!sight.unlike.empty()) {
    // Asking makes Python objects, for which its collector may run code that changes anything: all is looked at anew.
    for (const int64_t index : sight.unlike) ask(static_cast<size_t>(index));
    look_once(&sight, state, staged, counts_on_device, &step);
    step.needs.insert(step.needs.end(), sight.unlike.begin(), sight.unlike.end());
  }
  if (sight.has_counters && step.needs.empty()) {
    // A counter is shared only by parameters that step together.
    std::unordered_set<const int64_t*> counters;
    for (const int64_t index : step.stepped) counters.insert(sight.counts[static_cast<size_t>(index)].on_device);
    for (size_t i = 0; i < records; ++i) {
      store::StepCount count;
      if (sight.has_grad[i] || sight.states[i] == nullptr ||
          !is_current(static_cast<int64_t>(i), sight.states[i], &count, sight.held)) {
        continue;
      }
      if (count.on_device != nullptr && counters.contains(count.on_device)) step.needs.push_back(kUnshareCounters);
    }
  }
  if (!step.needs.empty()) return step;
  store_.begin();
  step.states.reserve(step.stepped.size());
  step.counts.reserve(step.stepped.size());
  for (const int64_t index : step.stepped) {
    const auto i = static_cast<size_t>(index);
    const store::StepCount count = sight.counts[i];
    store_.take(index, sight.addresses[i], count);
    step.states.push_back(count.on_device == nullptr ? sight.states[i] : nullptr);
    step.counts.push_back(count.taken);
  }
  return step;
}

bool PythonStore::look_at(int64_t index, PyObject* state, PyObject* staged, One* one) {
  PyObject* const object = params_.at(static_cast<size_t>(index)).get();
  one->held_gradient = Reference(PyObject_GetAttr(object, python_side().grad));
  const bool are_alike = are_placed_alike(object, one->held_gradient.get());
  if (is_none(state) || !is_current(index, state, &one->count, &one->held)) return false;
  PyObject* const pair = is_none(staged) ? nullptr : staged;
  if (!is_parameter(index, staged_or(pair, 0, object))) return false;
  if (!are_alike && staged_or(pair, 1, one->held_gradient.get()) == one->held_gradient.get()) return false;
  return take_gradient(index, staged_or(pair, 1, one->held_gradient.get()), &one->gradient);
}

void PythonStore::copy_back(int64_t index, PyObject* pair) {
  if (pair == nullptr || is_none(PyTuple_GetItem(pair, 0))) return;
  const LocalTensor staged(PyTuple_GetItem(pair, 0)), param(params_[static_cast<size_t>(index)].get());
  check_torch(aoti_torch_copy_(param.handle(), staged.handle(), /*non_blocking=*/0), "copy_");
}

void PythonStore::copy_back(const Step& step, PyObject* staged) {
  if (is_none(staged)) return;
  for (const int64_t index : step.stepped) copy_back(index, find(staged, index));
}

void PythonStore::set_count(int64_t index, PyObject* state, PyObject* value) {
  for (const Entry& entry : *entries_[static_cast<size_t>(index)]) {
    if (entry.kind != EntryKind::kStep) continue;
    if (PyDict_SetItem(state, entry.key.get(), value) != 0) throw PythonError();
    return;
  }
}

void PythonStore::keep_stepped(Step* step) const {
  std::vector<bool> is_stepped(static_cast<size_t>(size()));
  for (const int64_t index : store_.stepped()) is_stepped[static_cast<size_t>(index)] = true;
  Step kept;
  for (size_t i = 0; i < step->stepped.size(); ++i) {
    if (!is_stepped[static_cast<size_t>(step->stepped[i])]) continue;
    kept.stepped.push_back(step->stepped[i]);
    kept.states.push_back(step->states[i]);
    kept.counts.push_back(step->counts[i]);
  }
  kept.held = std::move(step->held);
  *step = std::move(kept);
}

void PythonStore::count(const Step& step) {
  ++steps_;
  Reference value;
  int64_t last = -1;
  constexpr size_t kDicts = 8, kKeys = 4;
  const size_t records = step.stepped.size();
  for (size_t i = 0; i < records; ++i) {
    if (i + kDicts < records) prefetch_dict(step.states[i + kDicts]);
    if (i + kKeys < records) prefetch_keys(step.states[i + kKeys]);
    if (step.states[i] == nullptr) continue;
    const int64_t now = step.counts[i] + 1;
    if (now != last) value = Reference(PyLong_FromLongLong(now));
    last = now;
    set_count(step.stepped[i], step.states[i], value.get());
  }
}

void PythonStore::bump_versions(const std::vector<int64_t>& records) const {
  Reference others;
  constexpr size_t kAhead = 8;
  for (size_t i = 0; i < records.size(); ++i) {
    PyObject* const param = params_[static_cast<size_t>(records[i])].get();
    if (i + kAhead < records.size() && tensor_layout().is_known) {
      PyObject* const ahead = params_[static_cast<size_t>(records[i + kAhead])].get();
      prefetch_at(pointer_at(implementation_of(ahead), tensor_layout().version), tensor_layout().count);
    }
    if (bump_version_of(param)) continue;
    if (others.get() == nullptr) others = Reference(PyList_New(0));
    if (PyList_Append(others.get(), param) != 0) throw PythonError();
  }
  if (others.get() == nullptr) return;
  const Reference done(PyObject_CallFunctionObjArgs(python_side().bump_versions, others.get(), nullptr));
}

void PythonStore::count_one(int64_t index, PyObject* state, store::StepCount count) {
  ++steps_;
  if (count.on_device != nullptr) return;
  const Reference value(PyLong_FromLongLong(count.taken + 1));
  set_count(index, state, value.get());
}

}  // namespace flashoptim::ops
