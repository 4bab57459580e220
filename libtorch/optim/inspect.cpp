// What is kept for a parameter, seen and set from outside: formats, decoded states, fp32 weights.
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/types.h>

#include <utility>

#include "flashoptim/torch/optimizer.h"
#include "libtorch/optim/handles.h"
#include "libtorch/optim/param_state.h"
#include "libtorch/optim/param_store.h"

namespace flashoptim::libtorch {
namespace {

constexpr store::Op kOp{"inspect"};

}  // namespace

std::optional<FlashOptimizer::Position> FlashOptimizer::find_position(const at::Tensor& param) const {
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    const auto& params = param_groups_[g].params();
    for (size_t i = 0; i < params.size(); ++i) {
      if (params[i].is_same(param)) return Position{g, i};
    }
  }
  return std::nullopt;
}

FlashOptimizer::Position FlashOptimizer::position_of(const char* function, const at::Tensor& param) const {
  const std::optional<Position> position = find_position(param);
  TORCH_CHECK(position.has_value(), class_name(kind_), "::", function, ": param ",
              param.defined() ? "is no parameter of this optimizer" : "is undefined", "; must be one of param_groups");
  return *position;
}

bool FlashOptimizer::holds(const at::Tensor& param) const { return find_position(param).has_value(); }

const FlashParamState* FlashOptimizer::param_state(const at::Tensor& param) const {
  position_of("param_state", param);
  return find_state(param);
}

::torch::OrderedDict<std::string, at::Tensor> FlashOptimizer::decoded_state(const at::Tensor& param) const {
  position_of("decoded_state", param);
  ::torch::OrderedDict<std::string, at::Tensor> result;
  const FlashParamState* state = find_state(param);
  if (state == nullptr || state->states.empty()) return result;
  const auto slots = static_cast<int>(state->states.size());
  const store::Stored stored = stored_of(*state, slots);
  store::TensorList values =
      in_store([&] { return store::decode_states(kOp, kind_, stored.arrays, state->state_codec); });
  for (int k = 0; k < slots; ++k) {
    result.insert(store::array_name(kind_, store::Role::kState, k, StateCodec::kFloat32),
                  take(std::move(values[static_cast<size_t>(k)])));
  }
  return result;
}

at::Tensor FlashOptimizer::fp32_weight(const at::Tensor& param) const {
  const Position position = position_of("fp32_weight", param);
  const at::NoGradGuard no_grad;
  const FlashParamState* state = find_state(param);
  if (state == nullptr || !has_correction(*state)) {
    return param.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  }
  if (state->param_dtype == param.scalar_type()) return merged_weights(param, *state);
  // The parameter has been cast since: what its next step will make of it.
  const auto& group = param_groups_[position.group];
  std::unique_ptr<FlashOptions> made;
  if (!is_settled(position.group)) made = settled_options(group_prefix(position.group), group);
  const auto& options = made != nullptr ? *made : static_cast<const FlashOptions&>(group.options());
  const std::string name = class_name(kind_) + (": " + position.str());
  const ConvertedState next = convert_state(kind_, name, *state, param, form_of(options, param));
  return merged_weights(next.values.defined() ? next.values : param, *next.state);
}

struct FlashOptimizer::NewWeight {
  at::Tensor param, nearest, correction;  // correction: undefined where none is kept
  MasterWeights master_weights;
  std::unique_ptr<FlashParamState> state;  // null: the parameter's own
};

FlashOptimizer::NewWeight FlashOptimizer::new_weight(const std::string& where, const at::Tensor& param,
                                                     const at::Tensor& weight) {
  TORCH_CHECK(weight.defined() && at::isFloatingType(weight.scalar_type()), where, "is ",
              weight.defined() ? toString(weight.scalar_type()) : "undefined", "; must be a floating tensor");
  TORCH_CHECK(weight.layout() == at::kStrided && weight.has_storage() && (!weight.is_meta() || param.is_meta()), where,
              "has layout ", weight.layout(), " on ", weight.device(), "; must be a dense tensor with values");
  TORCH_CHECK(weight.sizes() == param.sizes(), where, "has shape ", weight.sizes(), "; must be the parameter's, ",
              param.sizes());
  in_store([&] { store::read_tensor(kOp, {"weight"}, handle_of(weight)); });  // its storage, too
  const Position position = position_of("set_fp32_weight", param);
  const std::string name = class_name(kind_) + (": " + position.str());
  check_param(name, param);
  const FlashOptions& options = group_options(position.group);
  options.check_settled(group_prefix(position.group));
  const Form form = form_of(options, param);
  NewWeight made{param, {}, {}, form.format.master_weights, nullptr};
  const FlashParamState* state = find_state(param);
  if (state == nullptr) {
    made.state = make_state(kind_, param, form);
  } else if (fit_of(kind_, name, *state, param, form) == store::Fit::kNo) {
    FlashParamState without = *state;  // the correction will be another
    without.master_weights = MasterWeights::kNone;
    made.state = convert_state(kind_, name, without, param, form).state;
  }
  if (made.state != nullptr) state = made.state.get();
  const std::vector<int64_t> strides = strides_of(kind_, *state, form, param);
  const auto like = [&](at::ScalarType dtype) {
    return at::empty_strided(param.sizes(), strides, param.options().dtype(dtype).requires_grad(false));
  };
  const at::Tensor values = like(at::kFloat).copy_(weight.detach());
  made.nearest = like(param.scalar_type());
  if (store::correction_bits(form.format.master_weights) != 0) made.correction = like(state->correction.scalar_type());
  in_store([&] {
    store::split_weights(kOp, handle_of(values), handle_of(made.nearest),
                         made.correction.defined() ? handle_of(made.correction) : nullptr, form.format.master_weights);
  });
  return made;
}

void FlashOptimizer::write(NewWeight weight) {
  FlashParamState* state = weight.state == nullptr ? find_state(weight.param) : weight.state.get();
  weight.param.detach().copy_(weight.nearest);
  if (weight.correction.defined()) state->correction.copy_(weight.correction);
  state->master_weights = weight.master_weights;
  state->param_dtype = weight.param.scalar_type();
  if (weight.state != nullptr) state_[weight.param.unsafeGetTensorImpl()] = std::move(weight.state);
}

void FlashOptimizer::set_fp32_weight(const at::Tensor& param, const at::Tensor& weight) {
  position_of("set_fp32_weight", param);
  const at::NoGradGuard no_grad;
  write(new_weight(std::string(class_name(kind_)) + "::set_fp32_weight: weight ", param, weight));
}

void FlashOptimizer::set_fp32_weights(const std::vector<std::pair<at::Tensor, at::Tensor>>& weights) {
  const at::NoGradGuard no_grad;
  std::vector<NewWeight> made;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string where = std::string(class_name(kind_)) + "::set_fp32_weights: weights[" + std::to_string(i) + "]";
    const at::Tensor& param = weights[i].first;
    TORCH_CHECK(param.defined() && holds(param), where, ".first ",
                param.defined() ? "is no parameter of this optimizer" : "is undefined",
                "; must be one of param_groups");
    made.push_back(new_weight(where + ".second ", param, weights[i].second));
  }
  for (NewWeight& weight : made) write(std::move(weight));
}

void FlashOptimizer::reset_corrections() {
  for (const auto& group : param_groups_) {
    for (const at::Tensor& param : group.params()) reset_correction(param);
  }
}

void FlashOptimizer::reset_corrections(const std::vector<at::Tensor>& params) {
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(params[i].defined() && holds(params[i]), class_name(kind_), "::reset_corrections: params[", i, "] ",
                params[i].defined() ? "is no parameter of this optimizer" : "is undefined",
                "; must be one of param_groups");
  }
  for (const at::Tensor& param : params) reset_correction(param);
}

void FlashOptimizer::reset_correction(const at::Tensor& param) {
  FlashParamState* state = find_state(param);
  if (state == nullptr) return;
  const at::NoGradGuard no_grad;
  if (has_correction(*state)) state->correction.zero_();
  // Zeros, or none, are a correction of whatever the parameter has become; one that needs none has none.
  state->param_dtype = param.scalar_type();
  if (state->param_dtype == at::kFloat) state->master_weights = MasterWeights::kNone;
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

int64_t FlashOptimizer::nonfinite_gradients() const { return store_->nonfinite_gradients(); }

std::vector<at::Tensor> state_tensors(const ::torch::optim::Optimizer& optimizer) {
  const auto* flash = dynamic_cast<const FlashOptimizer*>(&optimizer);
  return flash == nullptr ? std::vector<at::Tensor>{} : flash->state_tensors();
}

}  // namespace flashoptim::libtorch
