// States from and to torch::optim's AdamW, Adam and SGD, and what every import ends with.
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <type_traits>

#include "flashoptim/torch/interchange.h"
#include "libtorch/optim/archive.h"
#include "libtorch/optim/param_store.h"
#include "libtorch/optim/state_import.h"

namespace flashoptim::libtorch {

// ---- imports --------------------------------------------------------------------------------------------------------

StateImport::StateImport(FlashOptimizer& optimizer, std::string where)
    : optimizer_(optimizer), where_(std::move(where)) {
  for (size_t g = 0; g < optimizer.param_groups().size(); ++g) options_.push_back(options_of(optimizer, g));
}

std::unique_ptr<FlashOptions> StateImport::options_of(const FlashOptimizer& optimizer, size_t group) {
  std::unique_ptr<FlashOptions> options;
  if (optimizer.is_settled(group)) {
    options.reset(static_cast<FlashOptions*>(optimizer.param_groups()[group].options().clone().release()));
  } else {
    options = optimizer.settled_options(optimizer.group_prefix(group), optimizer.param_groups()[group]);
  }
  const at::Tensor& lr = optimizer.store_->lr(group);
  if (lr.defined()) options->values_.lr = lr.item<double>();
  return options;
}

void StateImport::add(size_t group, size_t index, FlashParamState state) {
  const at::Tensor& param = params(group)[index];
  const std::string name = where_ + FlashOptimizer::Position{group, index}.str();
  check_param(name, param);
  const at::NoGradGuard no_grad;
  state = checked_state(name, param, kind(), state, /*is_as_saved=*/false);
  const Form form = form_of(options(group), param);
  if (fit_of(kind(), name, state, param, form) == store::Fit::kYes) {
    states_.push_back({param, {std::make_unique<FlashParamState>(std::move(state)), {}, store::CorrectionFate::kKept}});
    return;
  }
  ConvertedState converted = convert_state(kind(), name, state, param, form);
  TORCH_CHECK(converted.fate != store::CorrectionFate::kLost, name, " has dtype ", param.scalar_type(),
              " and other values than ", state.param_dtype, " can hold, or fewer; its correction was saved for ",
              state.param_dtype, " weights. Must be ", state.param_dtype,
              ", as when it was saved, or of a dtype that holds the weights of then, which are loaded first");
  warn_of(converted.fate, name, state, param);
  states_.push_back({param, std::move(converted)});
}

void StateImport::finish() {
  const at::NoGradGuard no_grad;
  std::vector<FlashOptimizer::ReplacedState> states;
  for (size_t g = 0; g < options_.size(); ++g) {
    options_[g]->check_settled(where_ + "param_groups[" + std::to_string(g) + "].");
  }
  for (Added& one : states_) {
    if (one.conversion.values.defined()) one.param.detach().copy_(one.conversion.values);
    one.conversion.state->param_dtype = one.param.scalar_type();
    states.emplace_back(one.param, std::move(one.conversion.state));
  }
  optimizer_.replace(std::move(options_), std::move(states));
}

void FlashOptimizer::replace(std::vector<std::unique_ptr<FlashOptions>> options, std::vector<ReplacedState> states) {
  for (size_t g = 0; g < options.size(); ++g) {
    options[g]->settle();
    param_groups_[g].set_options(std::move(options[g]));
    if (store_->lr(g).defined()) store_->lr(g).fill_(param_groups_[g].options().get_lr());
  }
  state_.clear();
  for (auto& [param, state] : states) state_[param.unsafeGetTensorImpl()] = std::move(state);
  clip_ = at::Tensor();
  store_->reset();
}

// ---- torch::optim ---------------------------------------------------------------------------------------------------

namespace {

using ::torch::optim::Adam;
using ::torch::optim::AdamOptions;
using ::torch::optim::AdamParamState;
using ::torch::optim::AdamW;
using ::torch::optim::AdamWOptions;
using ::torch::optim::AdamWParamState;
using ::torch::optim::Optimizer;
using ::torch::optim::OptimizerParamGroup;
using ::torch::optim::SGD;
using ::torch::optim::SGDOptions;
using ::torch::optim::SGDParamState;

/// Calls `call` with a type that says which of torch's optimizers has this kind.
template <class Call>
void with_torchs(OptimizerKind kind, const std::string& where, Call&& call) {
  switch (kind) {
    case OptimizerKind::kAdamW:
      return call(std::type_identity<AdamW>());
    case OptimizerKind::kAdam:
      return call(std::type_identity<Adam>());
    case OptimizerKind::kSgd:
      return call(std::type_identity<SGD>());
    default:
      break;
  }
  TORCH_CHECK(false, where, class_name(kind),
              " has no counterpart in torch::optim; must be FlashAdamW, FlashAdam or "
              "FlashSGD");
}

/// torch's types by optimizer.
template <class T>
struct Types;
template <>
struct Types<AdamW> {
  using Options = AdamWOptions;
  using State = AdamWParamState;
  static constexpr const char* kName = "torch::optim::AdamW";
};
template <>
struct Types<Adam> {
  using Options = AdamOptions;
  using State = AdamParamState;
  static constexpr const char* kName = "torch::optim::Adam";
};
template <>
struct Types<SGD> {
  using Options = SGDOptions;
  using State = SGDParamState;
  static constexpr const char* kName = "torch::optim::SGD";
};

/// With decouple_lr a weight decays by weight_decay * lr / initial_lr, in torch by weight_decay * lr.
double decay_unit(const OptionValues& values) { return values.decouple_lr ? values.initial_lr : 1.0; }

template <class Theirs>
void take_options(const Theirs& from, OptionValues* to) {
  to->lr = from.lr();
  to->weight_decay = from.weight_decay() * decay_unit(*to);
  if constexpr (std::is_same_v<Theirs, SGDOptions>) {
    to->momentum = from.momentum();
    to->dampening = from.dampening();
    to->nesterov = from.nesterov();
  } else {
    to->betas = from.betas();
    to->eps = from.eps();
  }
}

template <class Theirs>
void give_options(const OptionValues& from, Theirs* to) {
  to->lr(from.lr);
  to->weight_decay(from.weight_decay / decay_unit(from));
  if constexpr (std::is_same_v<Theirs, SGDOptions>) {
    to->momentum(from.momentum);
    to->dampening(from.dampening);
    to->nesterov(from.nesterov);
  } else {
    to->betas(from.betas);
    to->eps(from.eps);
  }
}

/// fp32 states, in a slot's place each.
FlashParamState fp32_state(const std::string& name, const at::Tensor& param, int64_t step,
                           const std::vector<at::Tensor>& states) {
  FlashParamState state;
  state.step = step;
  state.param_dtype = param.scalar_type();
  state.correction = at::empty({0}, param.options().dtype(at::kChar).requires_grad(false));
  for (const at::Tensor& one : states) {
    TORCH_CHECK(one.defined() && one.layout() == at::kStrided && at::isFloatingType(one.scalar_type()) &&
                    one.sizes() == param.sizes(),
                name, ": its state in the other optimizer is undefined, or of another shape or kind than Float ",
                param.sizes());
    state.states.push_back(copy_with(one.detach().to(param.device(), at::kFloat),
                                     param.is_non_overlapping_and_dense() ? param.strides() : one.strides()));
    state.scales.push_back(at::empty({0}, param.options().dtype(at::kShort).requires_grad(false)));
  }
  return state;
}

void check_groups(const std::string& where, const std::vector<OptimizerParamGroup>& ours,
                  const std::vector<OptimizerParamGroup>& theirs) {
  TORCH_CHECK(ours.size() == theirs.size(), where, "the other optimizer has ", theirs.size(), " param_groups; must be ",
              ours.size());
  for (size_t g = 0; g < ours.size(); ++g) {
    TORCH_CHECK(ours[g].params().size() == theirs[g].params().size(), where, "param_groups[", g, "] has ",
                theirs[g].params().size(), " params in the other optimizer; must be ", ours[g].params().size());
    for (size_t i = 0; i < ours[g].params().size(); ++i) {
      TORCH_CHECK(theirs[g].params()[i].defined(), where, "param_groups[", g, "].params[", i,
                  "] is undefined in the other optimizer; must be a tensor");
      TORCH_CHECK(ours[g].params()[i].sizes() == theirs[g].params()[i].sizes(), where, "param_groups[", g, "].params[",
                  i, "] has shape ", theirs[g].params()[i].sizes(), " in the other optimizer; must be ",
                  ours[g].params()[i].sizes());
    }
  }
}

template <class T>
void import_from(StateImport* into, const FlashOptimizer& flash, const Optimizer& from) {
  using State = typename Types<T>::State;
  const std::string& where = into->where();
  TORCH_CHECK(dynamic_cast<const T*>(&from) != nullptr, where, "`from` is another optimizer; must be ",
              Types<T>::kName);
  check_groups(where, flash.param_groups(), from.param_groups());
  bool has_amsgrad = false;
  for (size_t g = 0; g < into->groups(); ++g) {
    const auto& group = from.param_groups()[g];
    const auto* const options =
        group.has_options() ? dynamic_cast<const typename Types<T>::Options*>(&group.options()) : nullptr;
    TORCH_CHECK(options != nullptr, where, "param_groups[", g, "] of `from` has no options of ", Types<T>::kName,
                "; must have them");
    take_options(*options, &into->values(g));
    for (size_t i = 0; i < into->params(g).size(); ++i) {
      const auto found = from.state().find(from.param_groups()[g].params()[i].unsafeGetTensorImpl());
      if (found == from.state().end()) continue;
      const at::Tensor& param = into->params(g)[i];
      const std::string name = where + "param_groups[" + std::to_string(g) + "].params[" + std::to_string(i) + "]";
      const auto* const state = dynamic_cast<const State*>(found->second.get());
      TORCH_CHECK(state != nullptr, name, ": its state in the other optimizer is of another kind; must be of ",
                  Types<T>::kName);
      const State& theirs = *state;
      if constexpr (std::is_same_v<State, SGDParamState>) {
        if (theirs.momentum_buffer().defined()) {
          into->add(g, i, fp32_state(name, param, 1, {theirs.momentum_buffer()}));
        }
      } else {
        has_amsgrad = has_amsgrad || theirs.max_exp_avg_sq().defined();
        into->add(g, i, fp32_state(name, param, theirs.step(), {theirs.exp_avg(), theirs.exp_avg_sq()}));
      }
    }
  }
  if (has_amsgrad) TORCH_WARN(where, "amsgrad's largest variances are left behind: there is no amsgrad here");
}

template <class T>
void export_to(const FlashOptimizer& from, Optimizer& to, const std::string& where) {
  using State = typename Types<T>::State;
  TORCH_CHECK(dynamic_cast<T*>(&to) != nullptr, where, "`to` is another optimizer; must be ", Types<T>::kName);
  check_groups(where, from.param_groups(), to.param_groups());
  std::vector<OptionValues> options;
  for (size_t g = 0; g < from.param_groups().size(); ++g) {
    options.push_back(StateImport::options_of(from, g)->values());
    TORCH_CHECK(to.param_groups()[g].has_options() &&
                    dynamic_cast<const typename Types<T>::Options*>(&to.param_groups()[g].options()) != nullptr,
                where, "param_groups[", g, "] of `to` has no options of ", Types<T>::kName, "; must have them");
    TORCH_CHECK(!options.back().maximize, where, "param_groups[", g,
                "].maximize = true; must be false: ", Types<T>::kName, " minimizes alone");
  }
  int64_t corrections = 0;
  std::vector<std::pair<void*, std::unique_ptr<State>>> states;
  for (size_t g = 0; g < from.param_groups().size(); ++g) {
    for (size_t i = 0; i < from.param_groups()[g].params().size(); ++i) {
      const at::Tensor& param = from.param_groups()[g].params()[i];
      const FlashParamState* ours = from.param_state(param);
      if (ours == nullptr || ours->states.empty()) continue;
      corrections += has_correction(*ours) ? 1 : 0;
      const auto decoded = from.decoded_state(param);
      auto made = std::make_unique<State>();
      if constexpr (std::is_same_v<State, SGDParamState>) {
        made->momentum_buffer(decoded["momentum_buffer"]);
      } else {
        made->step(ours->steps());
        made->exp_avg(decoded["exp_avg"]);
        made->exp_avg_sq(decoded["exp_avg_sq"]);
      }
      states.emplace_back(to.param_groups()[g].params()[i].unsafeGetTensorImpl(), std::move(made));
    }
  }
  for (size_t g = 0; g < from.param_groups().size(); ++g) {
    give_options(options[g], &static_cast<typename Types<T>::Options&>(to.param_groups()[g].options()));
  }
  to.state().clear();
  for (auto& [key, state] : states) to.state()[key] = std::move(state);
  if (corrections > 0) {
    TORCH_WARN(where, corrections, " parameters have corrections, which ", Types<T>::kName,
               " does not keep: get_fp32_model_state() has the weights with them");
  }
}

/// One of torch's over the same parameters.
template <class T>
std::unique_ptr<T> counterpart(const FlashOptimizer& optimizer) {
  std::vector<OptimizerParamGroup> groups;
  for (const auto& group : optimizer.param_groups()) {
    groups.emplace_back(group.params(), std::make_unique<typename Types<T>::Options>(1e-3));
  }
  return std::make_unique<T>(groups, typename Types<T>::Options(1e-3));
}

}  // namespace

void load_from_torch(FlashOptimizer& optimizer, const Optimizer& from) {
  StateImport into(optimizer, "load_from_torch: ");
  with_torchs(optimizer.kind(), into.where(),
              [&](auto type) { import_from<typename decltype(type)::type>(&into, optimizer, from); });
  into.finish();
}

void save_to_torch(const FlashOptimizer& optimizer, Optimizer& to) {
  const std::string where = "save_to_torch: ";
  with_torchs(optimizer.kind(), where,
              [&](auto type) { export_to<typename decltype(type)::type>(optimizer, to, where); });
}

void load_torch_archive(FlashOptimizer& optimizer, ::torch::serialize::InputArchive& archive) {
  StateImport into(optimizer, "load_torch_archive: ");
  with_torchs(optimizer.kind(), into.where(), [&](auto type) {
    using T = typename decltype(type)::type;
    const std::unique_ptr<T> theirs = counterpart<T>(optimizer);
    try {
      theirs->load(archive);
    } catch (const c10::Error& error) {
      TORCH_CHECK(false, into.where(), "no archive that ", Types<T>::kName,
                  " wrote for these parameters: ", error.what_without_backtrace());
    } catch (const std::exception& error) {  // torch's reader looks up what it does not know
      TORCH_CHECK(false, into.where(), "no archive that ", Types<T>::kName,
                  " wrote for these parameters: ", error.what());
    }
    import_from<T>(&into, optimizer, *theirs);
  });
  into.finish();
}

void save_torch_archive(const FlashOptimizer& optimizer, ::torch::serialize::OutputArchive& archive) {
  const std::string where = "save_torch_archive: ";
  with_torchs(optimizer.kind(), where, [&](auto type) {
    using T = typename decltype(type)::type;
    const std::unique_ptr<T> theirs = counterpart<T>(optimizer);
    export_to<T>(optimizer, *theirs, where);
    theirs->save(archive);
  });
}

}  // namespace flashoptim::libtorch
