#include "libtorch/optim/param_store.h"

#include <c10/util/Exception.h>
#include <torch/types.h>

#include <utility>

#include "libtorch/optim/handles.h"

namespace flashoptim::libtorch {
namespace {

constexpr store::Op kOp{"step"};

/// Whether other options than hyperparameters differ: what is stored.
bool same_format(const OptionValues& a, const OptionValues& b) {
  return a.quantize == b.quantize && a.state_codec == b.state_codec && a.master_weight_bits == b.master_weight_bits &&
         a.stochastic_rounding == b.stochastic_rounding && a.min_quantized_numel == b.min_quantized_numel;
}

/// Whether memory holds the values: a view that negates them, or one of zeros, has to be copied.
bool is_materialized(const at::Tensor& tensor) { return !tensor.is_neg() && !tensor._is_zerotensor(); }

/// Address of a gradient that a step can take as it lies; false for one that it cannot.
bool read_gradient(const store::Record& record, const at::Tensor& grad, const void** address) {
  store::Facts facts;
  if (!read_facts(grad, &facts) || !record.takes_gradient(facts, device_of(grad.device()))) return false;
  *address = facts.data;
  const int64_t end = (grad.storage_offset() + grad.numel()) * static_cast<int64_t>(grad.itemsize());
  return (grad.numel() == 0 || end <= facts.storage) && is_materialized(grad);
}

}  // namespace

// ---- records --------------------------------------------------------------------------------------------------------

void ParamStore::follow(const Groups& groups) {
  size_t record = 0;
  bool same = true;
  for (size_t g = 0; same && g < groups.size(); ++g) {
    const auto& params = groups[g].params();
    for (size_t i = 0; same && i < params.size(); ++i, ++record) {
      same = record < known_.size() && known_[record] == params[i].unsafeGetTensorImpl() &&
             positions_[record].group == g && positions_[record].index == i;
    }
  }
  if (same && record == known_.size()) return;
  std::vector<const void*> known;
  std::vector<Position> positions;
  std::unordered_map<const void*, int64_t> index;
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto& params = groups[g].params();
    for (size_t i = 0; i < params.size(); ++i) {
      const Position position{g, i};
      check_param(class_name(kind_) + (": " + position.str()), params[i]);
      index.emplace(params[i].unsafeGetTensorImpl(), static_cast<int64_t>(known.size()));
      known.push_back(params[i].unsafeGetTensorImpl());
      positions.push_back(position);
    }
  }
  known_ = std::move(known);
  positions_ = std::move(positions);
  index_ = std::move(index);
  reset();
}

void ParamStore::reset() { store_.reset(static_cast<int64_t>(known_.size())); }

int64_t ParamStore::find(const Groups& groups, const at::Tensor& param) const {
  const auto found = index_.find(param.unsafeGetTensorImpl());
  if (found == index_.end()) return -1;
  const Position at = position(found->second);
  if (at.group >= groups.size() || at.index >= groups[at.group].params().size()) return -1;
  return groups[at.group].params()[at.index].is_same(param) ? found->second : -1;
}

const at::Tensor& ParamStore::param(const Groups& groups, int64_t record) const {
  const Position at = position(record);
  return groups[at.group].params()[at.index];
}

std::string ParamStore::name(int64_t record) const { return class_name(kind_) + (": " + position(record).str()); }

bool ParamStore::has_read(size_t group, const OptionValues& values) const {
  return group < groups_.size() && groups_[group].is_known && groups_[group].values == values;
}

void ParamStore::read(size_t group, const FlashOptions& options) {
  if (group >= groups_.size()) groups_.resize(group + 1);
  GroupOptions& known = groups_[group];
  const bool stays =
      known.is_known && known.has_momentum == options.has_momentum() && same_format(known.values, options.values());
  known = {true, options.values(), options.has_momentum(), {hyperparameters_of(kind_, options.values()), nullptr}};
  if (stays) return;
  for (size_t record = 0; record < positions_.size(); ++record) {
    if (positions_[record].group == group) store_.forget(static_cast<int64_t>(record));
  }
}

// ---- looks ----------------------------------------------------------------------------------------------------------

bool ParamStore::is_current(int64_t record, const at::Tensor& param, const FlashParamState* state) const {
  const store::Record& known = store_.record(record);
  store::Facts facts;
  if (state == nullptr || !known.is_known() || !read_facts(param, &facts) || !known.is_parameter(facts)) return false;
  const int slots = store::slot_count(kind_, known.options().has_momentum);
  const store::Format format = known.options().format;
  const auto count = static_cast<size_t>(slots);
  if (slots > 0 && (state->states.size() != count || state->scales.size() != count)) return false;
  for (int k = 0; k < slots; ++k) {
    const auto at = static_cast<size_t>(k);
    if (!read_facts(state->states[at], &facts) || !known.is_state(k, facts)) return false;
    if (format.codec == StateCodec::kFloat32) continue;
    if (!read_facts(state->scales[at], &facts) || !known.is_scale(k, facts)) return false;
  }
  if (store::correction_bits(format.master_weights) == 0) return true;
  return read_facts(state->correction, &facts) && known.is_correction(facts);
}

ParamStore::Taken ParamStore::look(const Groups& groups, const States& states, int64_t record) const {
  const at::Tensor &tensor = param(groups, record), &grad = tensor.grad();
  const auto found = states.find(tensor.unsafeGetTensorImpl());
  auto* const state = found == states.end() ? nullptr : static_cast<FlashParamState*>(found->second.get());
  const void* gradient = nullptr;
  const bool is_ready = is_current(record, tensor, state) && read_gradient(store_.record(record), grad, &gradient);
  return {record, &tensor, state, is_ready, gradient};
}

void ParamStore::see_to(std::vector<Taken>* taken, Change* change) {
  std::vector<NewState> wanted;
  std::vector<Taken*> owners;
  for (Taken& one : *taken) {
    if (one.is_ready) continue;
    const std::string name = this->name(one.record);
    check_param(name, *one.param);
    const at::Tensor& grad = one.param->grad();
    const std::string grad_name = name + ".grad";
    check_gradient(grad_name, *one.param, grad);
    in_store([&] {
      store::select_backend(kOp.name, name, device_of(one.param->device()));
      // These look at storages, too.
      store::read_tensor(kOp, {name.c_str()}, handle_of(*one.param));
      store::read_tensor(kOp, {grad_name.c_str()}, handle_of(grad));
    });
    if (one.state != nullptr) continue;
    const GroupOptions& group = groups_[position(one.record).group];
    wanted.push_back({one.param, form_of(group.values, group.has_momentum, *one.param), nullptr});
    owners.push_back(&one);
  }
  make_states(kind_, &wanted);
  for (size_t i = 0; i < wanted.size(); ++i) {
    owners[i]->state = wanted[i].state.get();
    (*change)[owners[i]->record].state = std::move(wanted[i].state);
  }
  for (Taken& one : *taken) {
    if (!one.is_ready) describe(&one, &(*change)[one.record]);
  }
}

void ParamStore::describe(Taken* taken, Made* made) {
  const at::Tensor &param = *taken->param, &grad = param.grad();
  const std::string name = this->name(taken->record);
  const size_t group = position(taken->record).group;
  const Form form = form_of(groups_[group].values, groups_[group].has_momentum, param);
  const bool has_bits = store::correction_bits(form.format.master_weights) != 0;
  TORCH_CHECK(!has_bits || taken->state->param_dtype != at::kFloat || has_correction(*taken->state), name,
              " has dtype ", param.scalar_type(), ", but it was Float at its last step: what it had beyond ",
              param.scalar_type(),
              " is lost, and a correction cannot begin with it. Cast with cast_model(module, optimizer), or give "
              "set_fp32_model_state() what get_fp32_model_state() gave before the cast; or call reset_corrections(), "
              "and weights are what the parameter holds now");
  if (fit_of(kind_, name, *taken->state, param, form) == store::Fit::kNo) {
    Conversion converted = convert_state(kind_, name, *taken->state, param, form);
    warn_of(converted.fate, name, *taken->state, param);
    made->state = std::move(converted.state);
    made->values = std::move(converted.values);
    taken->state = made->state.get();
  }
  const std::vector<int64_t> strides = strides_of(kind_, *taken->state, form, param);
  if (!lies(param, strides)) made->weights = copy_with(made->values.defined() ? made->values : param, strides);
  if (!lies(grad, strides) || !is_materialized(grad)) made->gradient = copy_with(grad, strides);

  store::RecordOptions options;
  options.group = static_cast<int64_t>(group);
  options.format = form.format;
  options.has_momentum = form.has_momentum;
  options.gradient_dtype = dtype_of(grad);
  options.is_copy = made->weights.defined();
  // The format that the state fits, whatever it was called.
  FlashParamState described = *taken->state;
  described.master_weights = form.format.master_weights;
  const int slots = store::slot_count(kind_, form.has_momentum);
  if (slots > 0) described.state_codec = form.format.codec;
  const store::Stored stored = stored_of(described, slots);
  in_store([&] {
    store_.describe(kOp, taken->record, name, options, handle_of(made->weights.defined() ? made->weights : param),
                    stored.arrays, stored.correction);
  });
  taken->gradient = (made->gradient.defined() ? made->gradient : grad).const_data_ptr();
}

// ---- steps ----------------------------------------------------------------------------------------------------------

store::Controls ParamStore::controls(store::Device device, store::Backend backend) {
  store::Controls controls;
  if (backend == store::Backend::kMeta) return controls;
  for (const auto& [known, counter] : nonfinite_) {
    if (known == device) controls.nonfinite_gradients = counter.mutable_data_ptr<int64_t>();
  }
  if (controls.nonfinite_gradients == nullptr) {
    const at::Device on(static_cast<at::DeviceType>(device.type), static_cast<c10::DeviceIndex>(device.index));
    nonfinite_.emplace_back(device, at::zeros({1}, at::TensorOptions().dtype(at::kLong).device(on)));
    controls.nonfinite_gradients = nonfinite_.back().second.mutable_data_ptr<int64_t>();
  }
  return controls;
}

template <class Plan, class Step>
void ParamStore::run(States& states, std::vector<Taken>* taken, const Plan& plan, const Step& step) {
  Change change;
  try {
    bool is_ready = true;
    for (const Taken& one : *taken) is_ready = is_ready && one.is_ready;
    if (!is_ready) see_to(taken, &change);
    plan();
    for (const Taken& one : *taken) {
      const auto made = change.find(one.record);
      if (made == change.end() || !made->second.values.defined() || made->second.weights.defined()) continue;
      made->second.before = one.param->detach().clone();
      one.param->detach().copy_(made->second.values);
    }
    in_store(step);
  } catch (...) {
    // Backwards: parameters may turn out to share memory.
    for (auto one = taken->rbegin(); one != taken->rend(); ++one) {
      if (one->is_ready) continue;
      store_.forget(one->record);
      const auto made = change.find(one->record);
      if (made != change.end() && made->second.before.defined()) one->param->detach().copy_(made->second.before);
    }
    throw;
  }
  for (const Taken& one : *taken) {
    one.state->step += 1;
    // As torch's own in-place operations do, so that autograd notices a backward through weights that have changed.
    one.param->unsafeGetTensorImpl()->bump_version();
    if (one.is_ready) continue;
    const Form form = {store_.record(one.record).options().format, store_.record(one.record).options().has_momentum};
    one.state->master_weights = form.format.master_weights;
    if (one.state->states.empty() || form.has_momentum) one.state->state_codec = form.format.codec;
    one.state->param_dtype = one.param->scalar_type();
    Made& made = change[one.record];
    if (made.weights.defined()) one.param->detach().copy_(made.weights);
    if (made.state != nullptr) states[one.param->unsafeGetTensorImpl()] = std::move(made.state);
  }
}

void ParamStore::step(const Groups& groups, States& states) {
  follow(groups);
  std::vector<Taken> taken;
  for (int64_t record = 0; record < store_.size(); ++record) {
    if (param(groups, record).grad().defined()) taken.push_back(look(groups, states, record));
  }
  if (taken.empty()) return;
  const auto make_plans = [&] { in_store([&] { store_.plan(kOp); }); };
  run(states, &taken, make_plans, [&] {
    store_.begin();
    for (const Taken& one : taken) store_.take(one.record, one.gradient, {one.state->step, nullptr});
    std::vector<store::GroupHyperparameters> hypers;
    for (const GroupOptions& group : groups_) hypers.push_back(group.hyper);
    std::vector<store::Controls> each;
    for (int64_t p = 0; p < store_.plans(); ++p) {
      const auto view = store_.plan_view(p);
      each.push_back(controls(view.device, view.backend));
    }
    store_.step(kOp, hypers, each);
  });
}

void ParamStore::step_one(const Groups& groups, States& states, int64_t record) {
  std::vector<Taken> taken = {look(groups, states, record)};
  const auto make_plans = [&] {
    if (store_.wants_plan(record)) in_store([&] { store_.plan(kOp); });
  };
  run(states, &taken, make_plans, [&] {
    const store::Record& known = store_.record(record);
    store_.step_one(kOp, record, taken[0].gradient, {taken[0].state->step, nullptr},
                    groups_[position(record).group].hyper, controls(known.device(), known.backend()));
  });
}

int64_t ParamStore::nonfinite_gradients() const {
  int64_t count = 0;
  for (const auto& [device, counter] : nonfinite_) count += counter.item<int64_t>();
  return count;
}

}  // namespace flashoptim::libtorch
