#include "libtorch/ops/python_store.h"

#include <algorithm>
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

/// A dict's key as text; nothing where it is none.
std::string text_or_nothing(PyObject* key) {
  PySsize size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(key, &size);
  if (data != nullptr) return std::string(data, static_cast<size_t>(size));
  PyErr_Clear();
  return {};
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

PythonStore::PythonStore(OptimizerKind optimizer) : store_(optimizer) {}

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
  for (PySsize i = 0; i < PyList_Size(params); ++i) {
    held.push_back(Reference::borrowed(PyList_GetItem(params, i)));
    index.emplace(held.back().get(), i);
  }
  store_.reset(static_cast<int64_t>(held.size()));
  entries_.assign(held.size(), nullptr);
  order_.clear();
  index_ = std::move(index);
  params_ = std::move(held);
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
    PyDict_Next(state, &position, &key, &value);
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
  entries_[static_cast<size_t>(index)] = entries;
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

bool PythonStore::is_current(int64_t index, PyObject* state, store::StepCount* count,
                             std::vector<Reference>* held) const {
  const store::Record& record = store_.record(index);
  const std::shared_ptr<const Entries>& entries = entries_[static_cast<size_t>(index)];
  if (!record.is_known() || entries == nullptr) return false;
  const int slots = state_count(store_.optimizer(), record.options().has_momentum);
  const CriticalSection section(state);
  PyObject *key = nullptr, *value = nullptr;
  PySsize position = 0;
  size_t at = 0;
  for (; PyDict_Next(state, &position, &key, &value) != 0; ++at) {
    if (at >= entries->size()) return false;
    const Entry& entry = (*entries)[at];
    if (entry.key.get() != key) return false;
    if (entry.kind == EntryKind::kOther) continue;
    if (held != nullptr) held->push_back(Reference::borrowed(value));
    if (entry.kind == EntryKind::kStep) {
      if (!read_count(index, value, count)) return false;
      continue;
    }
    if (entry.kind != EntryKind::kCorrection && entry.slot >= slots) continue;  // SGD's buffer while momentum is 0
    const LocalTensor tensor(value);
    Facts facts;
    if (!tensor.has_value() || !read_facts(tensor.handle(), &facts)) return false;
    const bool same = entry.kind == EntryKind::kState   ? record.is_state(entry.slot, facts)
                      : entry.kind == EntryKind::kScale ? record.is_scale(entry.slot, facts)
                                                        : record.is_correction(facts);
    if (!same) return false;
  }
  return at == entries->size();
}

bool PythonStore::has_cpu_plan() const {
  for (int64_t p = 0; p < store_.plans(); ++p) {
    if (store_.plan_view(p).backend == Backend::kCpu) return true;
  }
  return false;
}

PythonStore::Step PythonStore::look(PyObject* state, PyObject* staged, bool counts_on_device) {
  struct Taken {
    int64_t record;
    const void* gradient;
    store::StepCount count;
  };
  const PythonSide& side = python_side();
  Step step;
  const auto records = static_cast<size_t>(size());
  std::vector<PyObject*> grads(records);
  std::vector<bool> are_alike(records);
  for (size_t i = 0; i < records; ++i) {
    Reference grad(PyObject_GetAttr(params_[i].get(), side.grad));
    if (is_none(grad.get())) continue;
    grads[i] = grad.get();
    are_alike[i] = are_placed_alike(params_[i].get(), grad.get());
    step.held.push_back(std::move(grad));
  }
  // From here to the launch nothing runs that could change a container: no Python code, and Python's lock is kept, or
  // (a CPU step, a Python without lock) what was looked at is held.
  std::vector<Reference>* const held = side.is_free_threaded || has_cpu_plan() ? &step.held : nullptr;
  std::vector<PyObject*> states(records);
  match_states(state, &states);
  std::vector<Taken> taken;
  taken.reserve(records);
  bool is_planned = true, has_counters = false;
  for (size_t i = 0; i < records; ++i) {
    if (grads[i] == nullptr) continue;
    const auto index = static_cast<int64_t>(i);
    Taken one{index, nullptr, {}};
    const auto fits = [&] {
      if (states[i] == nullptr || !is_current(index, states[i], &one.count, held)) return false;
      PyObject* const pair = is_none(staged) ? nullptr : find(staged, index);
      const store::Record& record = store_.record(index);
      const LocalTensor param(staged_or(pair, 0, params_[i].get())), grad(staged_or(pair, 1, grads[i]));
      Facts facts;
      if (!param.has_value() || !read_facts(param.handle(), &facts) || !record.is_parameter(facts)) return false;
      // A gradient that is placed otherwise is redistributed first, which gives a staged one.
      if (!are_alike[i] && staged_or(pair, 1, grads[i]) == grads[i]) return false;
      if (!read_gradient(record, grad, &one.gradient)) return false;
      return (one.count.on_device != nullptr || !counts_on_device);
    };
    if (!fits()) {
      step.needs.push_back(index);
      continue;
    }
    is_planned = is_planned && store_.is_planned(index);
    has_counters = has_counters || one.count.on_device != nullptr;
    taken.push_back(one);
  }
  if (!is_planned || store_.is_stale()) step.needs.push_back(kPlanFirst);
  if (has_counters && step.needs.empty()) {
    // A counter is shared only by parameters that step together.
    std::unordered_set<const int64_t*> counters;
    for (const Taken& one : taken) counters.insert(one.count.on_device);
    for (size_t i = 0; i < records; ++i) {
      store::StepCount count;
      if (grads[i] != nullptr || states[i] == nullptr ||
          !is_current(static_cast<int64_t>(i), states[i], &count, held)) {
        continue;
      }
      if (count.on_device != nullptr && counters.contains(count.on_device)) step.needs.push_back(kUnshareCounters);
    }
  }
  if (!step.needs.empty()) return step;
  store_.begin();
  for (const Taken& one : taken) {
    store_.take(one.record, one.gradient, one.count);
    step.stepped.push_back(one.record);
    step.states.push_back(one.count.on_device == nullptr ? states[static_cast<size_t>(one.record)] : nullptr);
    step.counts.push_back(one.count.taken);
  }
  return step;
}

bool PythonStore::look_at(int64_t index, PyObject* state, PyObject* staged, One* one) {
  PyObject* const object = params_.at(static_cast<size_t>(index)).get();
  one->held_gradient = Reference(PyObject_GetAttr(object, python_side().grad));
  const bool are_alike = are_placed_alike(object, one->held_gradient.get());
  if (is_none(state) || !is_current(index, state, &one->count, &one->held)) return false;
  PyObject* const pair = is_none(staged) ? nullptr : staged;
  const store::Record& record = store_.record(index);
  const LocalTensor param(staged_or(pair, 0, object)), grad(staged_or(pair, 1, one->held_gradient.get()));
  Facts facts;
  if (!param.has_value() || !read_facts(param.handle(), &facts) || !record.is_parameter(facts)) return false;
  if (!are_alike && staged_or(pair, 1, one->held_gradient.get()) == one->held_gradient.get()) return false;
  return read_gradient(record, grad, &one->gradient);
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

void PythonStore::count(const Step& step) {
  ++steps_;
  Reference value;
  int64_t last = -1;
  for (size_t i = 0; i < step.stepped.size(); ++i) {
    if (step.states[i] == nullptr) continue;
    const int64_t now = step.counts[i] + 1;
    if (now != last) value = Reference(PyLong_FromLongLong(now));
    last = now;
    set_count(step.stepped[i], step.states[i], value.get());
  }
}

void PythonStore::count_one(int64_t index, PyObject* state, store::StepCount count) {
  ++steps_;
  if (count.on_device != nullptr) return;
  const Reference value(PyLong_FromLongLong(count.taken + 1));
  set_count(index, state, value.get());
}

}  // namespace flashoptim::ops
