#include "flashoptim/torch/optimizer.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/types.h>

#include <algorithm>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "flashoptim/core/optimizer_list.h"
#include "libtorch/optim/operators.h"
#include "libtorch/optim/param_state.h"

namespace flashoptim::libtorch {

/// One parameter of a step.
struct FlashOptimizer::Work {
  Place place;
  at::Tensor param, grad;
  FlashParamState* state;                 // the optimizer's, or that of `made`
  std::unique_ptr<FlashParamState> made;  // new or extended, to be stored once the step has succeeded
  const FlashOptions* options;
};

/// One call of the operator: parameters of one device, all with or all without momentum.
struct FlashOptimizer::Batch {
  at::Device device;
  bool has_momentum;
  operators::StepLists lists;
  std::vector<std::pair<const FlashOptions*, int64_t>> hyper_keys;  // options and step of each set of lists.hypers

  int64_t hyper_index(const FlashOptions& options, int64_t step);
};

namespace {

/// A set of the operators' hypers: what the optimizer reads, in the order of optimizer_info.h.
void append_hypers(OptimizerKind kind, const Hyperparameters& p, std::vector<double>* hypers) {
  const auto append = [&]<class Rule>() {
    if (Rule::kKind != kind || core::kIsWithoutMomentum<Rule>) return;
    for (const core::HyperparameterField& field : Rule::kHyperparameters.fields) {
      hypers->push_back(core::value_of(field, p));
    }
  };
#define FLASHOPTIM_APPEND(name) append.template operator()<core::name>();
  FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_APPEND)
#undef FLASHOPTIM_APPEND
}

std::string prefix(OptimizerKind kind) { return std::string(class_name(kind)) + ": "; }

/// The gradient as the operator wants it: the parameter's element order.
at::Tensor checked_gradient(const std::string& name, const at::Tensor& param, const at::Tensor& grad) {
  TORCH_CHECK(grad.layout() == at::kStrided, name, " has layout ", grad.layout(),
              "; must be Strided (for sparse gradients: grad.to_dense())");
  TORCH_CHECK(grad.scalar_type() == param.scalar_type() || grad.scalar_type() == at::kFloat, name, " has dtype ",
              grad.scalar_type(), "; must be the parameter's, ", param.scalar_type(), ", or Float");
  TORCH_CHECK(grad.sizes() == param.sizes(), name, " has shape ", grad.sizes(), "; must be the parameter's, ",
              param.sizes());
  TORCH_CHECK(grad.device() == param.device(), name, " is on ", grad.device(), "; must be where the parameter is, on ",
              param.device());
  if (same_element_order(param, grad)) return grad;
  return at::empty_like(param, param.options().dtype(grad.scalar_type()).requires_grad(false)).copy_(grad);
}

}  // namespace

std::string FlashOptimizer::Place::str() const {
  return "param_groups[" + std::to_string(group) + "].params[" + std::to_string(index) + "]";
}

FlashOptimizer::FlashOptimizer(const std::vector<::torch::optim::OptimizerParamGroup>& groups,
                               std::unique_ptr<FlashOptions> defaults)
    : Optimizer(std::vector<::torch::optim::OptimizerParamGroup>{}, std::move(defaults)) {
  const auto& options = static_cast<const FlashOptions&>(*defaults_);
  kind_ = options.kind();
  options.check(prefix(kind_));
  static_cast<FlashOptions&>(*defaults_).role_.kind = FlashOptions::Role::kDefaults;
  for (const auto& group : groups) add_param_group(group);
}

void FlashOptimizer::add_param_group(const ::torch::optim::OptimizerParamGroup& group) {
  const std::string where = group_prefix(param_groups_.size());
  std::unordered_set<const void*> known;
  for (const auto& existing : param_groups_) {
    for (const auto& param : existing.params()) known.insert(param.unsafeGetTensorImpl());
  }
  for (size_t i = 0; i < group.params().size(); ++i) {
    const at::Tensor& param = group.params()[i];
    const std::string name = where + "params[" + std::to_string(i) + "]";
    check_param(name, param);
    TORCH_CHECK(known.insert(param.unsafeGetTensorImpl()).second, name,
                " is already a parameter of this optimizer; each must be given once");
  }
  param_groups_.emplace_back(group.params(), settled_options(where, group));
}

std::string FlashOptimizer::group_prefix(size_t group) const {
  return prefix(kind_) + "param_groups[" + std::to_string(group) + "].";
}

std::unique_ptr<FlashOptions> FlashOptimizer::settled_options(const std::string& where,
                                                              const ::torch::optim::OptimizerParamGroup& group) const {
  const auto& defaults = static_cast<const FlashOptions&>(*defaults_);
  const ::torch::optim::OptimizerOptions& given = group.has_options() ? group.options() : defaults;
  const auto* own = dynamic_cast<const FlashOptions*>(&given);
  TORCH_CHECK(own != nullptr && own->kind() == kind_, where, "options are of another optimizer; must be ",
              class_name(kind_), "Options");
  std::unique_ptr<FlashOptions> options(static_cast<FlashOptions*>(own->clone().release()));
  options->inherit(defaults);
  // Kept apart from lr, which schedulers change.
  if (options->values_.initial_lr == 0) options->values_.initial_lr = options->values_.lr;
  options->check_settled(where);
  options->settle();
  return options;
}

bool FlashOptimizer::is_settled(size_t group) const {
  const auto& param_group = param_groups_[group];
  if (!param_group.has_options()) return false;
  const auto* options = dynamic_cast<const FlashOptions*>(&param_group.options());
  if (options == nullptr || options->kind() != kind_) return false;
  // torch's add_param_group leaves a clone of the defaults in place of options that it does not know.
  const std::string name = class_name(kind_);
  TORCH_CHECK(options->role_.kind != FlashOptions::Role::kDefaults, group_prefix(group),
              "options may be lost: the group was added by torch::optim::Optimizer::add_param_group, which is not "
              "virtual and puts the optimizer's defaults in place of options that are not torch's own. Call ",
              name,
              "::add_param_group (dynamic_cast<flashoptim::torch::FlashOptimizer&>(optimizer).add_param_group); "
              "mend this group with param_groups()[",
              group, "].set_options(std::make_unique<", name, "Options>(...))");
  return options->role_.kind == FlashOptions::Role::kGroup;
}

FlashOptions& FlashOptimizer::group_options(size_t group) {
  if (!is_settled(group)) param_groups_[group].set_options(settled_options(group_prefix(group), param_groups_[group]));
  return static_cast<FlashOptions&>(param_groups_[group].options());
}

FlashParamState* FlashOptimizer::find_state(const at::Tensor& param) const {
  const auto found = state_.find(param.unsafeGetTensorImpl());
  return found == state_.end() ? nullptr : static_cast<FlashParamState*>(found->second.get());
}

std::vector<FlashOptimizer::Work> FlashOptimizer::collect_work() {
  std::vector<Work> works;
  Zeros zeros;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    FlashOptions& options = group_options(g);
    options.check_settled(group_prefix(g));
    const auto& params = param_groups_[g].params();
    for (size_t i = 0; i < params.size(); ++i) {
      const at::Tensor& param = params[i];
      const at::Tensor& grad = param.grad();
      if (!grad.defined()) continue;
      const Place place{g, i};
      const auto name = [&] { return prefix(kind_) + place.str(); };
      Work work{place, param, {}, find_state(param), nullptr, &options};
      if (work.state == nullptr) {
        check_param(name(), param);  // again: params() can be changed from outside
        work.made = make_state(param, options, &zeros);
      } else if (options.has_momentum() && work.state->states.empty()) {
        work.made = std::make_unique<FlashParamState>(*work.state);
        add_slots(param, kind_, work.made.get(), &zeros);
      }
      if (work.made != nullptr) work.state = work.made.get();
      const bool fits = grad.sizes() == param.sizes() && grad.strides() == param.strides() &&
                        grad.layout() == at::kStrided && grad.scalar_type() == param.scalar_type() &&
                        grad.device() == param.device();
      work.grad = fits ? grad : checked_gradient(name() + ".grad", param, grad);
      works.push_back(std::move(work));
    }
  }
  zeros.make();
  return works;
}

int64_t FlashOptimizer::Batch::hyper_index(const FlashOptions& options, int64_t step) {
  const std::pair<const FlashOptions*, int64_t> key{&options, step};
  const auto found = std::find(hyper_keys.rbegin(), hyper_keys.rend(), key);
  if (found != hyper_keys.rend()) return hyper_keys.rend() - found - 1;
  const OptionValues& v = options.values();
  Hyperparameters p;
  p.lr = v.lr;
  std::tie(p.beta1, p.beta2) = v.betas;
  p.eps = v.eps;
  p.weight_decay = v.weight_decay;
  p.momentum = v.momentum;
  p.dampening = v.dampening;
  p.decay_lr = v.decouple_lr ? v.initial_lr : 0.0;
  p.nesterov = v.nesterov;
  p.maximize = v.maximize;
  p.step = step;
  p.seed = static_cast<uint64_t>(v.seed);
  append_hypers(options.kind(), p, &lists.hypers);
  hyper_keys.push_back(key);
  return static_cast<int64_t>(hyper_keys.size()) - 1;
}

std::vector<FlashOptimizer::Batch> FlashOptimizer::make_batches(const std::vector<Work>& works) {
  std::vector<Batch> batches;
  for (const Work& work : works) {
    const bool has_momentum = work.options->has_momentum();
    auto batch = std::find_if(batches.begin(), batches.end(), [&](const Batch& b) {
      return b.device == work.param.device() && b.has_momentum == has_momentum;
    });
    if (batch == batches.end()) {
      batch = batches.insert(batch, Batch{work.param.device(), has_momentum, {}, {}});
      batch->lists.params.reserve(works.size());
      batch->lists.grads.reserve(works.size());
    }
    operators::StepLists& lists = batch->lists;
    const FlashParamState& state = *work.state;
    lists.params.push_back(work.param);
    lists.grads.push_back(work.grad);
    lists.corrections.push_back(state.correction);
    if (has_momentum) {
      lists.states.insert(lists.states.end(), state.states.begin(), state.states.end());
      lists.scales.insert(lists.scales.end(), state.scales.begin(), state.scales.end());
    }
    lists.master_weights.push_back(static_cast<int64_t>(state.master_weights));
    lists.state_codecs.push_back(static_cast<int64_t>(state.state_codec));
    lists.rows.push_back(state.rows);
    lists.first_elements.push_back(0);
    lists.hyper_index.push_back(batch->hyper_index(*work.options, state.step + 1));
  }
  return batches;
}

at::Tensor FlashOptimizer::nonfinite_counter(at::Device device) {
  for (const at::Tensor& counter : nonfinite_) {
    if (counter.device() == device) return counter;
  }
  return nonfinite_.emplace_back(at::zeros({1}, at::TensorOptions().dtype(at::kLong).device(device)));
}

at::Tensor FlashOptimizer::step(LossClosure closure) {
  at::Tensor loss;
  if (closure != nullptr) {
    const at::AutoGradMode enable_grad(true);
    loss = closure();
  }
  const at::NoGradGuard no_grad;
  std::vector<Work> works = collect_work();
  for (const Batch& batch : make_batches(works)) {
    operators::step_(kind_, batch.lists, nonfinite_counter(batch.device));
  }
  for (Work& work : works) {
    work.state->step += 1;
    // As torch's own in-place operations do, so that autograd notices a backward through weights that have changed.
    work.param.unsafeGetTensorImpl()->bump_version();
    if (work.made != nullptr) state_[work.param.unsafeGetTensorImpl()] = std::move(work.made);
  }
  return loss;
}

// ---- inspection -----------------------------------------------------------------------------------------------------

std::optional<FlashOptimizer::Place> FlashOptimizer::find_place(const at::Tensor& param) const {
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    const auto& params = param_groups_[g].params();
    for (size_t i = 0; i < params.size(); ++i) {
      if (params[i].is_same(param)) return Place{g, i};
    }
  }
  return std::nullopt;
}

FlashOptimizer::Place FlashOptimizer::place_of(const char* function, const at::Tensor& param) const {
  const std::optional<Place> place = find_place(param);
  TORCH_CHECK(place.has_value(), class_name(kind_), "::", function, ": param ",
              param.defined() ? "is no parameter of this optimizer" : "is undefined", "; must be one of param_groups");
  return *place;
}

bool FlashOptimizer::holds(const at::Tensor& param) const { return find_place(param).has_value(); }

const FlashParamState* FlashOptimizer::param_state(const at::Tensor& param) const {
  place_of("param_state", param);
  return find_state(param);
}

::torch::OrderedDict<std::string, at::Tensor> FlashOptimizer::decoded_state(const at::Tensor& param) const {
  place_of("decoded_state", param);
  ::torch::OrderedDict<std::string, at::Tensor> result;
  const FlashParamState* state = find_state(param);
  if (state == nullptr || state->states.empty()) return result;
  const std::vector<std::string>& names = operators::state_names(kind_);
  std::vector<at::Tensor> values =
      operators::decode_states(kind_, state->states, state->scales, state->state_codec, state->rows);
  for (size_t k = 0; k < names.size(); ++k) result.insert(names[k], std::move(values[k]));
  return result;
}

at::Tensor FlashOptimizer::fp32_weight(const at::Tensor& param) const {
  place_of("fp32_weight", param);
  const at::NoGradGuard no_grad;
  const FlashParamState* state = find_state(param);
  if (state == nullptr) return param.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  return operators::merge_weights(param.detach(), state->correction, state->master_weights);
}

void FlashOptimizer::set_fp32_weight(const at::Tensor& param, const at::Tensor& weight) {
  const Place place = place_of("set_fp32_weight", param);
  const std::string where = std::string(class_name(kind_)) + "::set_fp32_weight: weight ";
  TORCH_CHECK(weight.defined() && at::isFloatingType(weight.scalar_type()), where, "is ",
              weight.defined() ? toString(weight.scalar_type()) : "undefined", "; must be a floating tensor");
  TORCH_CHECK(weight.sizes() == param.sizes(), where, "has shape ", weight.sizes(), "; must be the parameter's, ",
              param.sizes());
  const at::NoGradGuard no_grad;
  FlashParamState* state = find_state(param);
  std::unique_ptr<FlashParamState> made;
  if (state == nullptr) {
    check_param(prefix(kind_) + place.str(), param);
    Zeros zeros;
    made = make_state(param, group_options(place.group), &zeros);
    zeros.make();
    state = made.get();
  }
  const at::Tensor ordered =
      at::empty_like(param, param.options().dtype(at::kFloat).requires_grad(false)).copy_(weight.detach());
  operators::split_weights_(ordered, param.detach(), state->correction, state->master_weights);
  param.unsafeGetTensorImpl()->bump_version();
  if (made != nullptr) state_[param.unsafeGetTensorImpl()] = std::move(made);
}

void FlashOptimizer::reset_corrections() {
  for (const auto& group : param_groups_) reset_corrections(group.params());
}

void FlashOptimizer::reset_corrections(const std::vector<at::Tensor>& params) {
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(params[i].defined() && holds(params[i]), class_name(kind_), "::reset_corrections: params[", i, "] ",
                params[i].defined() ? "is no parameter of this optimizer" : "is undefined",
                "; must be one of param_groups");
  }
  const at::NoGradGuard no_grad;
  for (const at::Tensor& param : params) {
    if (FlashParamState* state = find_state(param)) state->correction.zero_();
  }
}

std::vector<at::Tensor> FlashOptimizer::state_tensors() const {
  std::vector<at::Tensor> tensors;
  const auto add = [&tensors](const at::Tensor& tensor) {
    if (tensor.numel() > 0) tensors.push_back(tensor);
  };
  for (const auto& group : param_groups_) {
    for (const at::Tensor& param : group.params()) {
      const FlashParamState* state = find_state(param);
      if (state == nullptr) continue;
      add(state->correction);
      for (const at::Tensor& tensor : state->states) add(tensor);
      for (const at::Tensor& tensor : state->scales) add(tensor);
    }
  }
  return tensors;
}

int64_t FlashOptimizer::nonfinite_gradients() const {
  int64_t count = 0;
  for (const at::Tensor& counter : nonfinite_) count += counter.item<int64_t>();
  return count;
}

std::vector<at::Tensor> state_tensors(const ::torch::optim::Optimizer& optimizer) {
  const auto* flash = dynamic_cast<const FlashOptimizer*>(&optimizer);
  return flash == nullptr ? std::vector<at::Tensor>{} : flash->state_tensors();
}

}  // namespace flashoptim::libtorch
