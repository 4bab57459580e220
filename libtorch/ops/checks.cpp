#include "libtorch/ops/checks.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace flashoptim::ops {
namespace {

DType parse_param_dtype(Op op, Name name, int32_t dtype) {
  const DtypeCodes& c = codes();
  if (dtype == c.bfloat16) return DType::kBFloat16;
  if (dtype == c.float32) return DType::kFloat32;
  if (dtype == c.float16) return DType::kFloat16;
  op.fail(name.str() + " has dtype " + dtype_name(dtype) + "; allowed are float32, bfloat16, float16");
}

/// dtype of the correction, or -1 where there is none.
int32_t correction_dtype(MasterWeights master_weights) {
  switch (master_weights) {
    case MasterWeights::kCorrection8:
    case MasterWeights::kCorrection8Nearest:
      return codes().int8;
    case MasterWeights::kCorrection16:
    case MasterWeights::kCorrection16Nearest:
      return codes().int16;
    case MasterWeights::kNone:
    case MasterWeights::kNoneStochastic:
      break;
  }
  return -1;
}

/// A parameter that can be stepped or converted.
TensorInfo read_param(Op op, Name name, const Tensor& tensor) {
  TensorInfo info = read_tensor(op, name, tensor);
  if (!is_dense(info)) {
    op.fail(name.str() + " has shape " + ints(info.sizes, info.dim) + " and strides " + ints(info.strides, info.dim) +
            "; its elements must fill their memory without gaps or overlap (dense)");
  }
  return info;
}

void check_master(Op op, Name name, DType dtype, MasterWeights master_weights, Name param) {
  if (dtype == DType::kFloat32 && master_weights != MasterWeights::kNone) {
    op.fail(name.str() + " = " + std::to_string(static_cast<int>(master_weights)) + " for the float32 " + param.str() +
            ", which has no bits to correct; allowed is 0 (none)");
  }
}

void* unpack_correction(Op op, Name name, const Tensor& tensor, MasterWeights master_weights, Name param_name,
                        const TensorInfo& param) {
  const int32_t wanted = correction_dtype(master_weights);
  if (wanted < 0) return nullptr;
  const TensorInfo info = read_tensor(op, name, tensor);
  check_dtype(op, name, info.dtype, wanted, "its master_weights");
  check_like(op, name, info, param_name, param);
  return param.device.type == aoti_torch_device_type_meta() ? nullptr : mutable_data(tensor);
}

GroupLayout unpack_layout(Op op, Name name, int64_t rows, Name like_name, const TensorInfo& like) {
  if (like.numel == 0 && rows >= 0) return {0, 0};
  if (rows < 1 || like.numel % rows != 0) {
    op.fail(name.str() + " = " + std::to_string(rows) + " for " + like_name.str() + " of " +
            std::to_string(like.numel) + " elements; rows must be at least 1 and divide it");
  }
  return {rows, like.numel / rows};
}

/// One slot's codes (or fp32 values) and headers; returns what was read of the states.
TensorInfo unpack_slot(Op op, OptimizerKind optimizer, int slot, Name state_name, const Tensor& state, Name scale_name,
                       const Tensor& scale, bool is_meta, ParameterTensors* t) {
  const DtypeCodes& c = codes();
  const TensorInfo info = read_tensor(op, state_name, state);
  const bool quantized = t->state_codec != StateCodec::kFloat32;
  const int32_t wanted =
      !quantized ? c.float32 : (state_slot(optimizer, slot).int8_codes(t->state_codec) ? c.int8 : c.uint8);
  check_dtype(op, state_name, info.dtype, wanted, "its state codec");
  t->states[slot] = is_meta ? nullptr : mutable_data(state);
  if (!quantized) return info;
  const TensorInfo scales = read_tensor(op, scale_name, scale);
  const bool is_paper = t->state_codec == StateCodec::kPaper;
  if (scales.dtype != c.int16 && scales.dtype != c.uint16 && !(is_paper && scales.dtype == c.float16)) {
    op.fail(scale_name.str() + " has dtype " + dtype_name(scales.dtype) + "; allowed are int16, uint16" +
            (is_paper ? ", float16" : ""));
  }
  const int64_t groups = t->layout.groups();
  if (scales.numel != groups) {
    op.fail(scale_name.str() + " has shape " + ints(scales.sizes, scales.dim) + "; needed are " +
            std::to_string(t->layout.rows) + " x " + std::to_string(t->layout.groups_per_row()) + " elements");
  }
  check_contiguous(op, scale_name, scales);
  check_device(op, scale_name, scales.device, state_name, info.device);
  t->scales[slot] = is_meta ? nullptr : mutable_data(scale);
  return info;
}

/// k = how many tensors of `list` there are per parameter, and whether that means momentum.
int slots_per_tensor(Op op, OptimizerKind optimizer, const char* argument, size_t size, size_t tensors,
                     bool* has_momentum) {
  const size_t with = static_cast<size_t>(state_count(optimizer, true)),
               without = static_cast<size_t>(state_count(optimizer, false));
  if (size != with * tensors && size != without * tensors) {
    std::string allowed = std::to_string(with * tensors);
    if (without != with) allowed += " (with momentum) or " + std::to_string(without * tensors) + " (without)";
    op.fail(std::string(argument) + " has " + std::to_string(size) + " tensors; needed for " + std::to_string(tensors) +
            " params are " + allowed);
  }
  *has_momentum = size == with * tensors;
  return static_cast<int>(*has_momentum ? with : without);
}

void check_count(Op op, const char* argument, size_t size, size_t wanted) {
  if (size != wanted) {
    op.fail(std::string(argument) + " has " + std::to_string(size) + " entries; needed are " + std::to_string(wanted) +
            ", one per tensor of params");
  }
}

}  // namespace

void unpack_hypers(Op op, const std::vector<double>& values, OptimizerKind optimizer, bool holds_momentum_slot,
                   std::vector<Hyperparameters>* hypers) {
  const auto count = static_cast<size_t>(hyperparameter_count(optimizer));
  if (values.size() % count != 0) {
    op.fail("hypers has " + std::to_string(values.size()) + " numbers; needed for " + optimizer_name(optimizer) +
            " are " + std::to_string(count) + " per set");
  }
  for (size_t set = 0; set * count < values.size(); ++set) {
    const auto where = [&](size_t field) {
      return "hypers[" + std::to_string(set * count + field) + "] (set " + std::to_string(set) + "): ";
    };
    Hyperparameters& p = hypers->emplace_back();
    for (size_t field = 0; field < count; ++field) {
      const double value = values[set * count + field];
      const Status status = set_hyperparameter(optimizer, static_cast<int64_t>(field), value, &p);
      if (!status.is_ok()) op.fail(where(field) + status.message());
    }
    const bool momentum_decides = state_count(optimizer, true) != state_count(optimizer, false);
    if (momentum_decides && holds_momentum(optimizer, p) != holds_momentum_slot) {
      op.fail("hypers, set " + std::to_string(set) + ": momentum = " + number(p.momentum) + "; " +
              (holds_momentum_slot ? "must not be 0 where states holds momentum buffers"
                                   : "must be 0 where states holds no momentum buffers"));
    }
  }
}

float checked_grad_scale(Op op, double value) {
  const auto scale = static_cast<float>(value);
  if (!std::isfinite(scale)) op.fail("grad_scale = " + number(value) + "; must be a finite float32");
  return scale;
}

void check_hyper_index(Op op, size_t index, int64_t value, size_t sets) {
  if (value < 0 || value >= static_cast<int64_t>(sets)) {
    op.fail(Name{"hyper_index", static_cast<int64_t>(index)}.str() + " = " + std::to_string(value) + "; hypers has " +
            std::to_string(sets) + " sets");
  }
}

void* unpack_array(Op op, Name name, const Tensor& tensor, int32_t dtype, int64_t count, Device device) {
  if (!tensor.has_value()) return nullptr;
  const TensorInfo info = read_tensor(op, name, tensor);
  check_dtype(op, name, info.dtype, dtype, "this argument");
  if (info.numel != count) {
    op.fail(name.str() + " has shape " + ints(info.sizes, info.dim) + "; needed is " + std::to_string(count) +
            (count == 1 ? " element" : " elements"));
  }
  check_contiguous(op, name, info);
  check_device(op, name, info.device, {"params", 0}, device);
  return mutable_data(tensor);
}

OptimizerKind parse_optimizer(Op op, const std::string& name) {
  OptimizerKind kind{};
  const Status status = find_optimizer(name.c_str(), &kind);
  if (!status.is_ok()) op.fail(status.message());
  return kind;
}

MasterWeights parse_master_weights(Op op, const std::string& argument, int64_t value) {
  if (value < 0 || value > static_cast<int64_t>(MasterWeights::kCorrection16Nearest)) {
    op.fail(
        argument + " = " + std::to_string(value) +
        "; allowed are 0 (none), 1 (none, stochastic), 2 (8 bit), 3 (16 bit), 4 (8 bit, nearest), 5 (16 bit, nearest)");
  }
  return static_cast<MasterWeights>(value);
}

StateCodec parse_state_codec(Op op, const std::string& argument, int64_t value) {
  if (value < 0 || value > static_cast<int64_t>(StateCodec::kDefault)) {
    op.fail(argument + " = " + std::to_string(value) + "; allowed are 0 (float32), 1 (paper), 2 (default)");
  }
  return static_cast<StateCodec>(value);
}

void unpack_step(Op op, const StepArguments& a, StepInput* input) {
  const size_t n = a.params.size();
  input->optimizer = parse_optimizer(op, a.optimizer);
  input->tensors.clear();
  input->hypers.clear();
  check_count(op, "grads", a.grads.size(), n);
  check_count(op, "corrections", a.corrections.size(), n);
  check_count(op, "master_weights", a.master_weights.size(), n);
  check_count(op, "state_codecs", a.state_codecs.size(), n);
  check_count(op, "rows", a.rows.size(), n);
  check_count(op, "first_elements", a.first_elements.size(), n);
  check_count(op, "hyper_index", a.hyper_index.size(), n);
  const int slots = slots_per_tensor(op, input->optimizer, "states", a.states.size(), n, &input->has_momentum);
  if (a.scales.size() != a.states.size()) {
    op.fail("scales has " + std::to_string(a.scales.size()) + " tensors; needed are " +
            std::to_string(a.states.size()) + ", one per tensor of states (of 0 elements for float32 states)");
  }
  if (n > 0) unpack_hypers(op, a.hypers, input->optimizer, input->has_momentum, &input->hypers);
  const float grad_scale = checked_grad_scale(op, a.grad_scale);

  const DtypeCodes& c = codes();
  Device& device = input->device;
  input->backend = Backend::kCpu;
  input->tensors.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t index = static_cast<int64_t>(i);
    const Name param_name{"params", index}, grad_name{"grads", index};
    const TensorInfo param = read_param(op, param_name, a.params[i]);
    if (i == 0) {
      device = param.device;
      input->backend = select_backend(op.name, "params[0]", device);
    } else {
      check_device(op, param_name, param.device, {"params", 0}, device);
    }
    const bool is_meta = input->backend == Backend::kMeta;
    ParameterTensors& t = input->tensors.emplace_back();
    t.parameter_dtype = parse_param_dtype(op, param_name, param.dtype);
    t.parameter = is_meta ? nullptr : mutable_data(a.params[i]);

    const TensorInfo grad = read_tensor(op, grad_name, a.grads[i]);
    if (grad.dtype != param.dtype && grad.dtype != c.float32) {
      op.fail(grad_name.str() + " has dtype " + dtype_name(grad.dtype) + "; allowed for the " +
              dtype_name(param.dtype) + " " + param_name.str() + " are " + dtype_name(param.dtype) + " and float32");
    }
    check_like(op, grad_name, grad, param_name, param);
    t.gradient_dtype = grad.dtype == param.dtype ? t.parameter_dtype : DType::kFloat32;
    t.gradient = is_meta ? nullptr : const_data(a.grads[i]);

    const Name master_name{"master_weights", index};
    t.master_weights = static_cast<MasterWeights>(a.master_weights[i]);
    if (a.master_weights[i] < 0 || a.master_weights[i] > 5)
      parse_master_weights(op, master_name.str(), a.master_weights[i]);
    check_master(op, master_name, t.parameter_dtype, t.master_weights, param_name);
    t.correction = unpack_correction(op, {"corrections", index}, a.corrections[i], t.master_weights, param_name, param);
    t.layout = unpack_layout(op, {"rows", index}, a.rows[i], param_name, param);
    t.state_codec = static_cast<StateCodec>(a.state_codecs[i]);
    if (a.state_codecs[i] < 0 || a.state_codecs[i] > 2) {
      parse_state_codec(op, Name{"state_codecs", index}.str(), a.state_codecs[i]);
    }
    for (int k = 0; k < slots; ++k) {
      const size_t at = i * static_cast<size_t>(slots) + static_cast<size_t>(k);
      const Name state_name{"states", static_cast<int64_t>(at)}, scale_name{"scales", static_cast<int64_t>(at)};
      const TensorInfo state =
          unpack_slot(op, input->optimizer, k, state_name, a.states[at], scale_name, a.scales[at], is_meta, &t);
      check_like(op, state_name, state, param_name, param);
    }
    t.first_element = a.first_elements[i];
    if (t.first_element < 0) {
      op.fail(Name{"first_elements", index}.str() + " = " + std::to_string(t.first_element) + "; must be at least 0");
    }
    check_hyper_index(op, i, a.hyper_index[i], input->hypers.size());
    t.hyper_index = static_cast<int32_t>(a.hyper_index[i]);
  }
  input->controls = {};
  input->controls.gradient_scale = grad_scale;
  if (input->backend == Backend::kMeta || n == 0) return;
  input->controls.found_inf =
      static_cast<const float*>(unpack_array(op, {"found_inf"}, a.found_inf, c.float32, 1, device));
  input->controls.nonfinite_gradients =
      static_cast<int64_t*>(unpack_array(op, {"nonfinite"}, a.nonfinite, c.int64, 1, device));
}

void check_no_overlap(Op op, const std::vector<ParameterTensors>& tensors) {
  struct Range {
    const char* begin;
    const char* end;
    const char* argument;
    size_t tensor;
  };
  std::vector<Range> ranges;
  ranges.reserve(tensors.size() * 6);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ParameterTensors& t = tensors[i];
    const auto add = [&](const void* data, int64_t bytes, const char* argument) {
      const char* begin = static_cast<const char*>(data);
      if (data != nullptr && bytes > 0) ranges.push_back({begin, begin + bytes, argument, i});
    };
    const int64_t numel = t.layout.numel(), width = t.parameter_dtype == DType::kFloat32 ? 4 : 2;
    const bool is_wide = correction_dtype(t.master_weights) == codes().int16;
    add(t.parameter, numel * width, "params");
    add(t.correction, numel * (is_wide ? 2 : 1), "corrections");
    for (int k = 0; k < kMaxSlots; ++k) {
      add(t.states[k], t.state_codec == StateCodec::kFloat32 ? numel * 4 : numel, "states");
      add(t.scales[k], t.layout.groups() * 2, "scales");
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    const Range &a = ranges[i - 1], &b = ranges[i];
    if (b.begin >= a.end) continue;
    op.fail(std::string(b.argument) + " of tensor " + std::to_string(b.tensor) + " and " + a.argument + " of tensor " +
            std::to_string(a.tensor) + " share memory; every parameter must be listed once, with arrays of its own");
  }
}

WeightInput unpack_weight(Op op, const Tensor& param, const Tensor& correction, int64_t master_weights) {
  WeightInput input;
  const Name param_name{"param"};
  input.param = read_param(op, param_name, param);
  input.backend = select_backend(op.name, "param", input.param.device);
  input.dtype = parse_param_dtype(op, param_name, input.param.dtype);
  input.master_weights = parse_master_weights(op, "master_weights", master_weights);
  check_master(op, {"master_weights"}, input.dtype, input.master_weights, param_name);
  if (correction_dtype(input.master_weights) >= 0 && !correction.has_value()) {
    op.fail("correction is None; master_weights = " + std::to_string(master_weights) + " needs one");
  }
  input.correction = unpack_correction(op, {"correction"}, correction, input.master_weights, param_name, input.param);
  if (input.backend != Backend::kMeta) input.param.data = mutable_data(param);
  return input;
}

TensorInfo unpack_float_like(Op op, const std::string& argument, const Tensor& tensor, const TensorInfo& like,
                             const std::string& like_name) {
  const Name name{argument.c_str()};
  TensorInfo info = read_tensor(op, name, tensor);
  check_dtype(op, name, info.dtype, codes().float32, "this argument");
  check_like(op, name, info, {like_name.c_str()}, like);
  if (info.device.type != aoti_torch_device_type_meta()) info.data = const_cast<void*>(const_data(tensor));
  return info;
}

StatesInput unpack_states(Op op, const std::string& optimizer, const TensorList& states, const TensorList& scales,
                          int64_t state_codec, int64_t rows) {
  StatesInput input;
  input.optimizer = parse_optimizer(op, optimizer);
  input.backend = Backend::kCpu;
  input.tensor.state_codec = parse_state_codec(op, "state_codec", state_codec);
  const int slots = slots_per_tensor(op, input.optimizer, "states", states.size(), 1, &input.has_momentum);
  if (scales.size() != states.size()) {
    op.fail("scales has " + std::to_string(scales.size()) + " tensors; needed are " + std::to_string(states.size()) +
            ", one per tensor of states (of 0 elements for float32 states)");
  }
  for (int k = 0; k < slots; ++k) {
    const Name state_name{"states", k};
    const Tensor& state = states[static_cast<size_t>(k)];
    if (k == 0) {
      const TensorInfo first = read_param(op, state_name, state);
      input.backend = select_backend(op.name, "states[0]", first.device);
      input.tensor.layout = unpack_layout(op, {"rows"}, rows, state_name, first);
    }
    const TensorInfo info = unpack_slot(op, input.optimizer, k, state_name, state, {"scales", k},
                                        scales[static_cast<size_t>(k)], input.backend == Backend::kMeta, &input.tensor);
    if (k > 0) check_like(op, state_name, info, {"states", 0}, input.infos[0]);
    input.infos.push_back(info);
  }
  return input;
}

}  // namespace flashoptim::ops
