#include "libtorch/optim/param_state.h"

#include <c10/util/Exception.h>
#include <torch/types.h>

#include <algorithm>
#include <utility>

#include "libtorch/optim/handles.h"

namespace flashoptim::libtorch {
namespace {

constexpr store::Op kOp{"state"};

bool is_supported(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf; }

/// Whether two elements may share memory, judged by strides.
bool overlaps(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense() || tensor.numel() == 0) return false;
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dimensions) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

store::StorageOrder order_of(const at::Tensor& tensor) {
  return store::storage_order(tensor.sizes().data(), tensor.strides().data(), tensor.dim());
}

std::vector<store::ArraySpec> specs_of(OptimizerKind kind, const at::Tensor& param, Form form) {
  return store::arrays_of(kind, form.has_momentum, form.format, param.sizes().vec(), order_of(param));
}

/// A state of step 0 from arrays in specs_of's order.
std::unique_ptr<FlashParamState> assembled(const std::vector<store::ArraySpec>& specs, store::Tensor* arrays,
                                           const at::Tensor& param, Form form) {
  auto state = std::make_unique<FlashParamState>();
  state->master_weights = form.format.master_weights;
  state->state_codec = form.format.codec;
  state->param_dtype = param.scalar_type();
  state->rows = store::layout_of(param.sizes().vec(), order_of(param)).rows;
  const at::TensorOptions on_device = at::TensorOptions().device(param.device());
  state->correction = at::empty({0}, on_device.dtype(at::kChar));
  for (size_t i = 0; i < specs.size(); ++i) {
    at::Tensor array = take(std::move(arrays[i]));
    if (specs[i].role == store::Role::kCorrection) state->correction = std::move(array);
    if (specs[i].role == store::Role::kScale) state->scales.back() = std::move(array);
    if (specs[i].role != store::Role::kState) continue;
    state->states.push_back(std::move(array));
    state->scales.push_back(at::empty({0}, on_device.dtype(at::kShort)));
  }
  return state;
}

}  // namespace

int64_t FlashParamState::steps() const { return step_on_device.defined() ? step_on_device.item<int64_t>() : step; }

std::string class_name(OptimizerKind kind) { return std::string("Flash") + optimizer_title(kind); }

void check_param(const std::string& name, const at::Tensor& param) {
  TORCH_CHECK(param.defined(), name, " is undefined; a tensor is needed");
  TORCH_CHECK(param.layout() == at::kStrided, name, " has layout ", param.layout(), "; must be Strided (dense)");
  TORCH_CHECK(is_supported(param.scalar_type()), name, " has dtype ", param.scalar_type(),
              "; must be Float, BFloat16 or Half");
  TORCH_CHECK(param.is_leaf(), name,
              " is not a leaf of the autograd graph (requires_grad, made by an operation); "
              "must be a leaf");
  TORCH_CHECK(!overlaps(param), name, " has shape ", param.sizes(), " and strides ", param.strides(),
              ", by which two of its elements may be one in memory; each must be its own");
}

void check_has_values(const std::string& name, const at::Tensor& tensor, bool may_be_meta) {
  TORCH_CHECK(tensor.defined(), name, " is undefined; must be a dense tensor");
  TORCH_CHECK(tensor.layout() == at::kStrided && tensor.has_storage(), name, " has layout ", tensor.layout(),
              "; must be Strided (dense)");
  TORCH_CHECK(may_be_meta || !tensor.is_meta(), name, " is on meta, without values; must be on a device that has some");
}

void check_gradient(const std::string& name, const at::Tensor& param, const at::Tensor& grad) {
  TORCH_CHECK(grad.layout() == at::kStrided, name, " has layout ", grad.layout(),
              "; must be Strided (for sparse gradients: grad.to_dense())");
  TORCH_CHECK(grad.scalar_type() == param.scalar_type() || grad.scalar_type() == at::kFloat, name, " has dtype ",
              grad.scalar_type(), "; must be the parameter's, ", param.scalar_type(), ", or Float");
  TORCH_CHECK(grad.sizes() == param.sizes(), name, " has shape ", grad.sizes(), "; must be the parameter's, ",
              param.sizes());
  TORCH_CHECK(grad.device() == param.device(), name, " is on ", grad.device(), "; must be where the parameter is, on ",
              param.device());
}

DType dtype_of(const at::Tensor& param) {
  return in_store([&] { return store::parse_param_dtype(kOp, {"param"}, dtype_code(param.scalar_type())); });
}

Form form_of(const OptionValues& values, bool has_momentum, const at::Tensor& param) {
  store::FormatOptions format;
  format.quantize = values.quantize;
  format.codec = values.state_codec == "paper" ? StateCodec::kPaper : StateCodec::kDefault;
  format.master_weight_bits = values.master_weight_bits;
  format.stochastic_rounding = values.stochastic_rounding;
  format.min_quantized_numel = values.min_quantized_numel;
  return {in_store([&] { return store::format_of(dtype_of(param), param.sizes().vec(), format); }), has_momentum};
}

std::vector<int64_t> strides_of(OptimizerKind kind, const FlashParamState& state, Form form, const at::Tensor& param) {
  if (store::slot_count(kind, form.has_momentum) > 0 && !state.states.empty()) return state.states[0].strides().vec();
  if (has_correction(state)) return state.correction.strides().vec();
  return store::dense_strides(param.sizes().vec(), order_of(param));
}

bool lies(const at::Tensor& tensor, at::IntArrayRef strides) {
  if (tensor.numel() == 0) return true;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != strides[static_cast<size_t>(d)]) return false;
  }
  return true;
}

at::Tensor copy_with(const at::Tensor& tensor, at::IntArrayRef strides) {
  return at::empty_strided(tensor.sizes(), strides, tensor.options().requires_grad(false)).copy_(tensor.detach());
}

void count_on_host(FlashParamState* state) {
  state->step = state->steps();
  state->step_on_device = at::Tensor();
}

bool has_correction(const FlashParamState& state) { return store::correction_bits(state.master_weights) != 0; }

store::Stored stored_of(const FlashParamState& state, int slots) {
  store::Stored stored;
  const auto count = static_cast<size_t>(slots);
  if (state.states.size() >= count) {
    for (size_t k = 0; k < count; ++k) {
      stored.arrays.states.push_back(handle_of(state.states[k]));
      if (state.state_codec != StateCodec::kFloat32) stored.arrays.scales.push_back(handle_of(state.scales[k]));
    }
  }
  if (has_correction(state)) {
    stored.correction = handle_of(state.correction);
    stored.correction_of =
        in_store([&] { return store::parse_param_dtype(kOp, {"param_dtype"}, dtype_code(state.param_dtype)); });
  }
  return stored;
}

void make_states(OptimizerKind kind, std::vector<NewState>* wanted) {
  std::vector<bool> is_made(wanted->size(), false);
  for (size_t first = 0; first < wanted->size(); ++first) {
    if (is_made[first]) continue;
    const at::Device device = (*wanted)[first].param->device();
    std::vector<size_t> together;
    std::vector<std::vector<store::ArraySpec>> specs;
    std::vector<store::ArraySpec> all;
    for (size_t i = first; i < wanted->size(); ++i) {
      if ((*wanted)[i].param->device() != device) continue;
      is_made[i] = true;
      together.push_back(i);
      specs.push_back(specs_of(kind, *(*wanted)[i].param, (*wanted)[i].form));
      all.insert(all.end(), specs.back().begin(), specs.back().end());
    }
    store::TensorList arrays = in_store([&] { return store::new_arrays(kOp, all, device_of(device)); });
    store::Tensor* next = arrays.data();
    for (size_t i = 0; i < together.size(); ++i) {
      NewState& one = (*wanted)[together[i]];
      one.state = assembled(specs[i], next, *one.param, one.form);
      next += specs[i].size();
    }
  }
}

std::unique_ptr<FlashParamState> make_state(OptimizerKind kind, const at::Tensor& param, Form form) {
  std::vector<NewState> wanted;
  wanted.push_back({&param, form, nullptr});
  make_states(kind, &wanted);
  return std::move(wanted[0].state);
}

store::Fit fit_of(OptimizerKind kind, const std::string& name, const FlashParamState& state, const at::Tensor& param,
                  Form form) {
  const store::Stored stored = stored_of(state, store::slot_count(kind, form.has_momentum));
  return in_store([&] { return store::fit(kind, form.has_momentum, handle_of(param), stored, form.format, {}, name); });
}

ConvertedState convert_state(OptimizerKind kind, const std::string& name, const FlashParamState& saved,
                             const at::Tensor& param, Form form) {
  const int slots = store::slot_count(kind, form.has_momentum);
  const store::Stored stored = stored_of(saved, slots);
  const bool is_dense = param.is_non_overlapping_and_dense();
  const at::Tensor dense =
      is_dense ? param.detach() : copy_with(param, store::dense_strides(param.sizes().vec(), order_of(param)));
  store::Converted converted = in_store(
      [&] { return store::convert(kOp, name, kind, form.has_momentum, handle_of(dense), stored, form.format); });
  ConvertedState result;
  result.state = assembled(specs_of(kind, dense, form), converted.arrays.data(), dense, form);
  result.values = take(std::move(converted.param));
  result.fate = converted.fate;
  if (slots == 0 || !stored.arrays.states.empty()) result.state->step = saved.steps();
  if (slots == 0 && !saved.states.empty()) {
    result.state->states = saved.states;
    result.state->scales = saved.scales;
    result.state->state_codec = saved.state_codec;
  }
  return result;
}

void warn_of(store::CorrectionFate fate, const std::string& name, const FlashParamState& saved,
             const at::Tensor& param) {
  if (fate == store::CorrectionFate::kDropped) {
    TORCH_WARN(name, ": its state has a correction, which a ", param.scalar_type(),
               " parameter with these options does not keep: its weights lose the bits below their own precision");
  }
  if (fate == store::CorrectionFate::kLost) {
    TORCH_WARN(name, ": its correction belongs to ", saved.param_dtype, " weights, whose last bits are lost in ",
               param.scalar_type(),
               ": it goes on from the weights as they are. To keep what corrections hold, call get_fp32_model_state() "
               "before the cast and set_fp32_model_state() with what it gave after it");
  }
}

at::Tensor merged_weights(const at::Tensor& param, const FlashParamState& state) {
  if (!has_correction(state)) return param.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  const at::Tensor correction = state.correction.to(param.device());
  const at::Tensor weights =
      lies(param, correction.strides()) ? param.detach() : copy_with(param, correction.strides());
  return in_store(
      [&] { return take(store::merge_weights(kOp, handle_of(weights), handle_of(correction), state.master_weights)); });
}

}  // namespace flashoptim::libtorch
