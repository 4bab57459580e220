#include "libtorch/optim/param_store.h"

#include <c10/util/Exception.h>
#include <torch/types.h>

#include <algorithm>
#include <set>
#include <tuple>
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

at::Device at_device(store::Device device) {
  const auto type = static_cast<at::DeviceType>(device.type);
  return type == at::kCPU ? at::Device(type) : at::Device(type, static_cast<c10::DeviceIndex>(device.index));
}

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
  elements_ = 0;
  for (const auto& group : groups) {
    for (const at::Tensor& param : group.params()) elements_ += param.numel();
  }
  known_ = std::move(known);
  positions_ = std::move(positions);
  index_ = std::move(index);
  reset();
}

void ParamStore::reset() {
  telemetry_.settle();
  telemetry_.forget_largest();
  store_.reset(static_cast<int64_t>(known_.size()));
}

std::string ParamStore::label(const at::Tensor& param, Position position) const {
  const auto found = names_.find(param.unsafeGetTensorImpl());
  return found == names_.end() ? position.str() : found->second;
}

void ParamStore::set_lr(size_t group, const at::Tensor& lr) {
  if (group >= lrs_.size()) lrs_.resize(group + 1);
  lrs_[group] = lr;
}

const at::Tensor& ParamStore::lr(size_t group) const {
  static const at::Tensor none;
  return group < lrs_.size() ? lrs_[group] : none;
}

store::GroupHyperparameters ParamStore::hyper_of(size_t group) const {
  store::GroupHyperparameters hyper = groups_[group].hyper;
  if (lr(group).defined()) hyper.lr = lr(group).const_data_ptr<float>();
  return hyper;
}

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
  return {record, &tensor, state, is_ready, gradient, /*is_fresh=*/state == nullptr};
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
    ConvertedState converted = convert_state(kind_, name, *taken->state, param, form);
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

// ---- what steps read and count --------------------------------------------------------------------------------------

void ParamStore::count_steps(const std::vector<Taken>& taken, States& states, bool capturing) {
  const auto need_no_capture = [&] {
    TORCH_CHECK(!capturing, class_name(kind_),
                ": step() cannot be captured in a CUDA graph as things are: call step() once before the capture, with "
                "gradients of the same parameters");
  };
  bool any = false;
  std::map<std::pair<store::Device, int64_t>, at::Tensor, decltype([](const auto& a, const auto& b) {
             return std::tuple(a.first.type, a.first.index, a.second) <
                    std::tuple(b.first.type, b.first.index, b.second);
           })>
      made;
  std::set<const void*> counters;
  std::set<const FlashParamState*> stepping;
  for (const Taken& one : taken) {
    FlashParamState& state = *one.state;
    const bool wants_device = groups_[position(one.record).group].values.capturable && !one.param->is_meta();
    if (!wants_device) {
      if (state.step_on_device.defined()) count_on_host(&state);
      continue;
    }
    any = true;
    stepping.insert(&state);
    if (!state.step_on_device.defined()) {
      need_no_capture();
      // One for all that have taken as many steps: they go on together.
      at::Tensor& counter = made[{device_of(one.param->device()), state.step}];
      if (!counter.defined()) {
        counter = at::full({1}, state.step, at::TensorOptions().dtype(at::kLong).device(one.param->device()));
      }
      state.step_on_device = counter;
    }
    counters.insert(state.step_on_device.unsafeGetTensorImpl());
  }
  if (!any) return;
  // Those that sit this step out get counters of their own.
  for (auto& [key, held] : states) {
    auto& state = static_cast<FlashParamState&>(*held);
    if (!state.step_on_device.defined() || stepping.count(&state) != 0) continue;
    if (counters.count(state.step_on_device.unsafeGetTensorImpl()) == 0) continue;
    need_no_capture();
    state.step_on_device = state.step_on_device.clone();
  }
}

store::StepCount ParamStore::count_of(const Taken& one) {
  const at::Tensor& counter = one.state->step_on_device;
  return {one.state->step, counter.defined() ? counter.mutable_data_ptr<int64_t>() : nullptr};
}

bool ParamStore::is_captured(const std::vector<Taken>& taken) const {
  std::set<std::pair<int32_t, int32_t>> seen;
  bool capturing = false;
  for (const Taken& one : taken) {
    const store::Device device = device_of(one.param->device());
    if (!one.param->is_cuda() || !seen.emplace(device.type, device.index).second) continue;
    capturing = capturing || in_store([&] { return store::is_capturing(device); });
  }
  for (const Taken& one : taken) {
    TORCH_CHECK(!capturing || groups_[position(one.record).group].values.capturable, name(one.record),
                ": step() cannot be captured in a CUDA graph with capturable = false, because the host counts steps; "
                "set the option capturable, and call step() once before the capture");
    TORCH_CHECK(!capturing || one.param->is_cuda(), name(one.record), " is on ", one.param->device(),
                "; a step of it cannot be captured in a CUDA graph");
  }
  return capturing;
}

void ParamStore::keep_captured(const std::vector<Taken>& taken, const std::vector<at::Tensor>& read) {
  for (const Taken& one : taken) {
    const FlashParamState& state = *one.state;
    captured_.insert(captured_.end(), state.states.begin(), state.states.end());
    captured_.insert(captured_.end(), state.scales.begin(), state.scales.end());
    captured_.insert(captured_.end(), {state.correction, state.step_on_device});
  }
  captured_.insert(captured_.end(), read.begin(), read.end());
  captured_.insert(captured_.end(), lrs_.begin(), lrs_.end());
  const std::vector<at::Tensor> tables = telemetry_.tensors();
  captured_.insert(captured_.end(), tables.begin(), tables.end());
}

void ParamStore::watch_precision(const Groups& groups, const std::vector<Taken>& taken) {
  if (!telemetry_.is_on) return;
  for (const Taken& one : taken) {
    const size_t group = position(one.record).group;
    const double rate = lr(group).defined() ? lr(group).item<double>() : groups_[group].values.lr;
    const at::Tensor& param = this->param(groups, one.record);
    telemetry_.check_learning_rate(kind_, class_name(kind_) + ": " + label(param, position(one.record)), param,
                                   store_.record(one.record).options().format, rate);
  }
}

StepTelemetry* ParamStore::telemetry_of(const Groups& groups, int64_t key, const std::vector<int64_t>& records,
                                        at::Device device) {
  const auto names = [&] {
    std::vector<std::string> result;
    for (const int64_t record : records) {  // -1: it is in no group any more
      result.push_back(record < 0 ? "" : label(param(groups, record), position(record)));
    }
    return result;
  };
  return telemetry_.is_on ? telemetry_.table(key, names, device) : nullptr;
}

store::Controls ParamStore::controls(at::Device device, store::Backend backend, const at::Tensor& clip,
                                     std::vector<at::Tensor>* read) {
  store::Controls controls;
  if (backend == store::Backend::kMeta) return controls;
  if (clip.defined()) {
    read->push_back(clip.to(device, at::kFloat));
    controls.clip_coefficient = read->back().const_data_ptr<float>();
  }
  controls.telemetry_stride = Telemetry::stride(elements_);
  auto counter = std::find_if(nonfinite_.begin(), nonfinite_.end(), [&](auto& one) { return one.device() == device; });
  if (counter == nonfinite_.end()) {
    counter = nonfinite_.insert(nonfinite_.end(), at::zeros({1}, at::TensorOptions().dtype(at::kLong).device(device)));
  }
  controls.nonfinite_gradients = counter->mutable_data_ptr<int64_t>();
  return controls;
}

// ---- steps ----------------------------------------------------------------------------------------------------------

void ParamStore::make_plans() {
  const bool has_changed = in_store([&] { return store_.plan(kOp); });
  if (has_changed) telemetry_.settle();
}

void ParamStore::settle(const Taken& one, Made* made, States& states) {
  const Form form = {store_.record(one.record).options().format, store_.record(one.record).options().has_momentum};
  one.state->master_weights = form.format.master_weights;
  if (one.state->states.empty() || form.has_momentum) one.state->state_codec = form.format.codec;
  one.state->param_dtype = one.param->scalar_type();
  if (made->weights.defined()) one.param->detach().copy_(made->weights);
  if (made->state != nullptr) states[one.param->unsafeGetTensorImpl()] = std::move(made->state);
}

template <class Plan, class Step>
void ParamStore::run(const Groups& groups, States& states, std::vector<Taken>* taken, const Plan& plan,
                     const Step& step) {
  Change change;
  std::vector<at::Tensor> read;
  const bool capturing = is_captured(*taken);
  try {
    bool is_ready = true;
    for (const Taken& one : *taken) is_ready = is_ready && one.is_ready;
    if (!is_ready) see_to(taken, &change);
    watch_precision(groups, *taken);
    count_steps(*taken, states, capturing);
    plan();
    for (const Taken& one : *taken) {
      const auto made = change.find(one.record);
      if (made == change.end() || !made->second.values.defined() || made->second.weights.defined()) continue;
      made->second.before = one.param->detach().clone();
      one.param->detach().copy_(made->second.values);
    }
    in_store([&] { step(&read); });
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
    if (!one.state->step_on_device.defined()) one.state->step += 1;
    // As torch's own in-place operations do, so that autograd notices a backward through weights that have changed.
    one.param->unsafeGetTensorImpl()->bump_version();
    if (!one.is_ready) settle(one, &change[one.record], states);
  }
  if (capturing) keep_captured(*taken, read);
}

std::vector<ParamStore::Taken> ParamStore::with_gradients(const Groups& groups, const States& states) const {
  std::vector<Taken> taken;
  for (int64_t record = 0; record < store_.size(); ++record) {
    if (param(groups, record).grad().defined()) taken.push_back(look(groups, states, record));
  }
  return taken;
}

void ParamStore::step(const Groups& groups, States& states, const at::Tensor& clip) {
  follow(groups);
  std::vector<Taken> taken = with_gradients(groups, states);
  if (taken.empty()) return;
  run(
      groups, states, &taken, [&] { make_plans(); },
      [&](std::vector<at::Tensor>* read) {
        store_.begin();
        for (const Taken& one : taken) store_.take(one.record, one.gradient, count_of(one));
        std::vector<store::GroupHyperparameters> hypers;
        for (size_t g = 0; g < groups_.size(); ++g) hypers.push_back(hyper_of(g));
        std::vector<store::Controls> each;
        for (int64_t p = 0; p < store_.plans(); ++p) {
          const auto view = store_.plan_view(p);
          const at::Device device = at_device(view.device);
          each.push_back(controls(device, view.backend, clip, read));
          if (view.backend != store::Backend::kMeta) {
            each.back().telemetry = telemetry_of(groups, p, view.records, device);
          }
        }
        store_.step(kOp, hypers, each);
      });
}

void ParamStore::step_one(const Groups& groups, States& states, int64_t record, const at::Tensor& clip) {
  std::vector<Taken> taken = {look(groups, states, record)};
  const auto plan = [&] {
    if (store_.wants_plan(record)) make_plans();
  };
  run(groups, states, &taken, plan, [&](std::vector<at::Tensor>* read) {
    FlashParamState& state = *taken[0].state;
    if (state.step_on_device.defined() && state.step_on_device.use_count() > 1) {
      TORCH_CHECK(!is_captured(taken), name(record),
                  ": a step of one parameter cannot be captured in a CUDA graph as "
                  "things are: call step_param() once before the capture");
      state.step_on_device = state.step_on_device.clone();  // others do not go along
    }
    const store::Record& known = store_.record(record);
    const at::Device device = at_device(known.device());
    store::Controls one = controls(device, known.backend(), clip, read);
    if (known.backend() != store::Backend::kMeta && telemetry_.is_on) {
      const int64_t p = store_.plan_of(record);
      one.telemetry = p < 0 ? telemetry_of(groups, -1 - record, {record}, device)
                            : telemetry_of(groups, p, store_.plan_view(p).records, device);
    }
    store_.step_one(kOp, record, taken[0].gradient, count_of(taken[0]), hyper_of(position(record).group), one);
  });
}

at::Tensor ParamStore::fused_norm(const Groups& groups, States& states, double max_norm, at::Tensor* coefficient) {
  follow(groups);
  std::vector<Taken> taken = with_gradients(groups, states);
  const auto momentum_of = [&](const Taken& one) { return groups_[position(one.record).group].has_momentum; };
  for (const Taken& one : taken) {
    if (!one.param->is_cuda() || one.param->device() != taken[0].param->device()) return {};
    if (momentum_of(one) != momentum_of(taken[0])) return {};
  }
  if (taken.empty()) return {};
  const bool capturing = is_captured(taken);
  const at::Tensor result = at::zeros({4}, taken[0].param->options().dtype(at::kFloat).requires_grad(false));
  Change change;
  try {
    see_to(&taken, &change);
    make_plans();
    in_store([&] {
      store_.begin();
      for (const Taken& one : taken) store_.take(one.record, one.gradient, {one.state->step, nullptr});
      static_assert(sizeof(cuda::GradientNorm) == 16);
      store_.gradient_norm(kOp, store_.only_plan(kOp), 1.0f, nullptr, static_cast<float>(max_norm),
                           static_cast<cuda::GradientNorm*>(result.mutable_data_ptr()));
    });
  } catch (...) {
    for (const Taken& one : taken) {
      if (!one.is_ready) store_.forget(one.record);
    }
    throw;
  }
  for (const Taken& one : taken) {
    if (one.is_ready) continue;
    Made& made = change[one.record];
    // A state that was made is kept; what was converted or copied is seen to again by the step.
    if (one.is_fresh && !made.values.defined() && !made.weights.defined()) {
      settle(one, &made, states);
    } else {
      store_.forget(one.record);
    }
  }
  if (capturing) captured_.push_back(result);
  *coefficient = result[3];
  return result[2];
}

int64_t ParamStore::nonfinite_gradients() const {
  int64_t count = 0;
  for (const at::Tensor& counter : nonfinite_) count += counter.item<int64_t>();
  return count;
}

void ParamStore::reset_numerics() {
  // In place: a captured CUDA graph goes on counting into the same tensors.
  for (const at::Tensor& counter : nonfinite_) counter.zero_();
  telemetry_.reset();
}

}  // namespace flashoptim::libtorch
