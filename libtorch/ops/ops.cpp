// The operators: schemas, boxed kernels, registration against torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>

#include "libtorch/ops/boxed.h"
#include "libtorch/ops/checks.h"
#include "libtorch/ops/device.h"
#include "libtorch/ops/plan_cache.h"
#include "libtorch/ops/prepared.h"

namespace flashoptim::ops {
namespace {

/// Elements of one slice of a conversion, and how many of them are worth a thread.
constexpr int64_t kSliceElements = 64 * 512;

/// int64 places of one tensor's telemetry.
constexpr int64_t kTelemetryNumbers = 6;

/// float32 places of a gradient norm.
constexpr int64_t kNormNumbers = 4;

Tensor new_float_like(const TensorInfo& like) {
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(like.dim, like.sizes, like.strides, aoti_torch_dtype_float32(), like.device.type,
                                       like.device.index, &handle),
              "empty_strided");
  return Tensor(handle);
}

float* float_data(const Tensor& tensor) {
  void* data = nullptr;
  check_torch(torch_get_mutable_data_ptr(tensor.get(), &data), "get_mutable_data_ptr");
  return static_cast<float*>(data);
}

/// Pointer to element `first` of an array of elements of `bytes` bytes; null stays null.
void* advance(void* data, int64_t first, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + first * bytes;
}

/// Runs convert(first, count) over slices of [0, numel) in torch's pool; throws the first failure.
void convert_slices(Op op, int64_t numel, const std::function<Status(int64_t first, int64_t count)>& convert) {
  const int64_t slices = (numel + kSliceElements - 1) / kSliceElements;
  std::vector<Status> failed(static_cast<size_t>(slices));
  parallel_for(slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      failed[static_cast<size_t>(s)] =
          convert(s * kSliceElements, std::min(kSliceElements, numel - s * kSliceElements));
    }
  });
  for (const Status& status : failed) op.check(status);
}

/// Runs convert(tensor, first) over slices of a tensor's states that begin at group boundaries.
void convert_state_slices(Op op, const ParameterTensors& whole,
                          const std::function<Status(const ParameterTensors& slice, int64_t first)>& convert) {
  const GroupLayout& layout = whole.layout;
  if (layout.numel() == 0) return;
  const int64_t width = whole.state_codec == StateCodec::kFloat32 ? 4 : 1;
  const bool by_row = layout.rows > 1;
  const int64_t unit = by_row ? layout.row_size : kGroupSize, units = by_row ? layout.rows : layout.groups();
  const int64_t unit_groups = by_row ? layout.groups_per_row() : 1;
  const int64_t per_slice = std::max<int64_t>(1, kSliceElements / unit), slices = (units + per_slice - 1) / per_slice;
  std::vector<Status> failed(static_cast<size_t>(slices));
  parallel_for(slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first_unit = s * per_slice, count = std::min(per_slice, units - first_unit),
                    first = first_unit * unit;
      ParameterTensors slice = whole;
      slice.layout =
          by_row ? GroupLayout{count, unit} : GroupLayout{1, std::min(count * unit, layout.row_size - first)};
      for (int k = 0; k < kMaxSlots; ++k) {
        slice.states[k] = advance(whole.states[k], first, width);
        slice.scales[k] = advance(whole.scales[k], first_unit * unit_groups, 2);
      }
      failed[static_cast<size_t>(s)] = convert(slice, first);
    }
  });
  for (const Status& status : failed) op.check(status);
}

int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

int64_t correction_bytes(MasterWeights master) {
  return master == MasterWeights::kCorrection16 || master == MasterWeights::kCorrection16Nearest ? 2 : 1;
}

// ---- step_ ----------------------------------------------------------------------------------------------------------

constexpr const char* kStepSchema =
    "step_(str optimizer, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] corrections, Tensor(c!)[] states, "
    "Tensor(d!)[] scales, int[] master_weights, int[] state_codecs, int[] rows, int[] first_elements, "
    "int[] hyper_index, float[] hypers, float grad_scale, Tensor? found_inf, Tensor(e!)? nonfinite) -> ()";

void step_on_device(Op op, StepInput& input) {
  PlanCache& cache = PlanCache::instance();
  std::unique_ptr<PlanCache::Entry> entry = cache.take(input.optimizer, input.has_momentum, input.tensors);
  if (entry == nullptr) {
    check_no_overlap(op, input.tensors);
    entry = std::make_unique<PlanCache::Entry>();
    entry->hash = PlanCache::hash(input.optimizer, input.has_momentum, input.tensors);
    entry->optimizer = input.optimizer;
    entry->has_momentum = input.has_momentum;
    op.check(DevicePlan::make(input.backend, input.device, input.optimizer, input.has_momentum, input.tensors,
                              &entry->plan));
  } else {
    for (size_t i = 0; i < input.tensors.size(); ++i) {
      op.check(entry->plan.set_gradient(static_cast<int64_t>(i), input.tensors[i].gradient));
      op.check(entry->plan.set_hyper_index(static_cast<int64_t>(i), input.tensors[i].hyper_index));
    }
  }
  const Status status = entry->plan.step(input.hypers, input.controls);
  cache.put(std::move(entry));
  op.check(status);
}

/// Takes over what the stacks of step_ and plan_new begin with: optimizer ... first_elements.
StepArguments take_step_lists(StableIValue* stack) {
  StepArguments arguments;
  arguments.optimizer = take_string(stack[0]);
  arguments.params = take_tensors(stack[1]);
  arguments.grads = take_tensors(stack[2]);
  arguments.corrections = take_tensors(stack[3]);
  arguments.states = take_tensors(stack[4]);
  arguments.scales = take_tensors(stack[5]);
  arguments.master_weights = take_ints(stack[6]);
  arguments.state_codecs = take_ints(stack[7]);
  arguments.rows = take_ints(stack[8]);
  arguments.first_elements = take_ints(stack[9]);
  return arguments;
}

void step_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"step_"};
  StepArguments arguments = take_step_lists(stack);
  arguments.hyper_index = take_ints(stack[10]);
  arguments.hypers = take_floats(stack[11]);
  arguments.grad_scale = take_float(stack[12]);
  arguments.found_inf = take_optional_tensor(stack[13]);
  arguments.nonfinite = take_optional_tensor(stack[14]);

  thread_local StepInput input;  // keeps its memory from step to step
  unpack_step(op, arguments, &input);
  if (input.tensors.empty()) return;
  if (input.backend != Backend::kMeta) step_on_device(op, input);
}

// ---- plans that callers hold ----------------------------------------------------------------------------------------

constexpr const char* kPlanNewSchema =
    "plan_new(str optimizer, Tensor[] params, Tensor[] grads, Tensor[] corrections, Tensor[] states, Tensor[] scales, "
    "int[] master_weights, int[] state_codecs, int[] rows, int[] first_elements) -> int";

void plan_new_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"plan_new"};
  StepArguments arguments = take_step_lists(stack);
  arguments.hyper_index.assign(arguments.params.size(), 0);
  // Hyperparameters come with the steps; what they must say about momentum follows from the states.
  const OptimizerKind optimizer = parse_optimizer(op, arguments.optimizer);
  const auto with = static_cast<size_t>(state_count(optimizer, true));
  const bool has_momentum = arguments.states.size() == with * arguments.params.size();
  Hyperparameters any = default_hyperparameters(optimizer);
  any.momentum = has_momentum ? 0.5 : 0.0;
  for (int64_t i = 0; i < hyperparameter_count(optimizer); ++i) {
    arguments.hypers.push_back(get_hyperparameter(optimizer, i, any));
  }

  if (arguments.params.empty()) op.fail("params is empty; a plan needs at least one tensor");
  StepInput input;
  unpack_step(op, arguments, &input);
  stack[0] = give_int(PreparedPlans::instance().add(std::make_shared<PreparedPlan>(op, input, arguments.params)));
}

constexpr const char* kPlanFreeSchema = "plan_free(int plan) -> ()";

void plan_free_kernel(StableIValue* stack, uint64_t, uint64_t) { PreparedPlans::instance().remove(take_int(stack[0])); }

constexpr const char* kPlanCheckSchema = "plan_check(int plan, Tensor[] grads) -> ()";

void plan_check_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"plan_check"};
  const int64_t plan_number = take_int(stack[0]);
  const TensorList grads = take_tensors(stack[1]);
  const std::shared_ptr<PreparedPlan> plan = PreparedPlans::instance().find(op, plan_number);
  const std::lock_guard lock(plan->mutex());
  plan->set_gradients(op, grads);
}

// grads: one per tensor of the plan, of 0 elements where one is left out; none where take_gradients() of python.cpp has
// just given the plan theirs. hyper_index: one per tensor, or empty for those of the step before. lrs, steps: one per
// set of hypers, or empty; 0 elements where a set has none. telemetry: [tensors, 6].
constexpr const char* kPlanStepSchema =
    "plan_step_(int plan, Tensor[] grads, int[] hyper_index, float[] hypers, float grad_scale, Tensor? grad_divisor, "
    "Tensor? clip_coefficient, Tensor? found_inf, Tensor[] lrs, Tensor(a!)[] steps, Tensor(b!)? nonfinite, "
    "Tensor(c!)? telemetry, int telemetry_stride) -> ()";

/// Addresses of one optional scalar per set.
template <class T>
std::vector<T*> unpack_per_set(Op op, const char* argument, const TensorList& tensors, size_t sets, int32_t dtype,
                               Device device) {
  if (!tensors.empty() && tensors.size() != sets) {
    op.fail(std::string(argument) + " has " + std::to_string(tensors.size()) + " entries; needed are none or " +
            std::to_string(sets) + ", one per set of hypers");
  }
  std::vector<T*> out;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name name{argument, static_cast<int64_t>(i)};
    const bool absent = read_tensor(op, name, tensors[i]).numel == 0;
    out.push_back(absent ? nullptr : static_cast<T*>(unpack_array(op, name, tensors[i], dtype, 1, device)));
  }
  return out;
}

void plan_step_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"plan_step_"};
  const int64_t number = take_int(stack[0]);
  const TensorList grads = take_tensors(stack[1]);
  const std::vector<int64_t> hyper_index = take_ints(stack[2]);
  const std::vector<double> values = take_floats(stack[3]);
  const double grad_scale = take_float(stack[4]);
  const Tensor grad_divisor = take_optional_tensor(stack[5]), clip_coefficient = take_optional_tensor(stack[6]),
               found_inf = take_optional_tensor(stack[7]);
  const TensorList lrs = take_tensors(stack[8]), steps = take_tensors(stack[9]);
  const Tensor nonfinite = take_optional_tensor(stack[10]), telemetry = take_optional_tensor(stack[11]);
  const int64_t stride = take_int(stack[12]);

  const std::shared_ptr<PreparedPlan> plan = PreparedPlans::instance().find(op, number);
  const std::lock_guard lock(plan->mutex());
  const size_t sets = plan->set_hypers(op, values, hyper_index);
  if (stride < 1) op.fail("telemetry_stride = " + std::to_string(stride) + "; must be at least 1");
  const Device device = plan->device();
  StepControls controls;
  controls.gradient_scale = checked_grad_scale(op, grad_scale);
  const DtypeCodes& c = codes();
  const bool is_meta = plan->backend() == Backend::kMeta;
  if (!is_meta) {
    const auto scalar = [&](const char* name, const Tensor& tensor, int32_t dtype) {
      return unpack_array(op, {name}, tensor, dtype, 1, device);
    };
    controls.gradient_divisor = static_cast<const float*>(scalar("grad_divisor", grad_divisor, c.float32));
    controls.clip_coefficient = static_cast<const float*>(scalar("clip_coefficient", clip_coefficient, c.float32));
    controls.found_inf = static_cast<const float*>(scalar("found_inf", found_inf, c.float32));
    controls.nonfinite_gradients = static_cast<int64_t*>(scalar("nonfinite", nonfinite, c.int64));
    controls.lrs = unpack_per_set<const float>(op, "lrs", lrs, sets, c.float32, device);
    controls.steps = unpack_per_set<int64_t>(op, "steps", steps, sets, c.int64, device);
    static_assert(sizeof(StepTelemetry) == kTelemetryNumbers * sizeof(int64_t));
    controls.telemetry = static_cast<StepTelemetry*>(
        unpack_array(op, {"telemetry"}, telemetry, c.int64, plan->size() * kTelemetryNumbers, device));
    controls.telemetry_stride = stride;
  }
  plan->set_or_use_gradients(op, grads);
  if (!is_meta) plan->step(op, controls);
}

// grads: as for plan_step_. result: 4 float32: the sum of squares as one double, the norm, the clipping coefficient.
constexpr const char* kPlanNormSchema =
    "plan_norm_(int plan, Tensor[] grads, float grad_scale, Tensor? grad_divisor, float max_norm, Tensor(a!) result) "
    "-> ()";

void plan_norm_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"plan_norm_"};
  const int64_t plan_number = take_int(stack[0]);
  const TensorList grads = take_tensors(stack[1]);
  const double grad_scale = take_float(stack[2]);
  const Tensor grad_divisor = take_optional_tensor(stack[3]);
  const double max_norm = take_float(stack[4]);
  const Tensor result = take_tensor(stack[5]);
  const std::shared_ptr<PreparedPlan> plan = PreparedPlans::instance().find(op, plan_number);
  const std::lock_guard lock(plan->mutex());
  const float scale = checked_grad_scale(op, grad_scale);
  if (!(max_norm >= 0.0)) op.fail("max_norm = " + number(max_norm) + "; must be at least 0 (0: no clipping)");
  const int32_t float32 = codes().float32;
  const Device device = plan->device();
  const bool is_meta = plan->backend() == Backend::kMeta;
  const float* const divisor =
      is_meta ? nullptr
              : static_cast<const float*>(unpack_array(op, {"grad_divisor"}, grad_divisor, float32, 1, device));
  static_assert(sizeof(cuda::GradientNorm) == kNormNumbers * sizeof(float));
  auto* const out =
      is_meta ? nullptr
              : static_cast<cuda::GradientNorm*>(unpack_array(op, {"result"}, result, float32, kNormNumbers, device));
  plan->set_or_use_gradients(op, grads);
  if (!is_meta) op.check(plan->plan().gradient_norm(scale, divisor, static_cast<float>(max_norm), out));
}

// ---- weights --------------------------------------------------------------------------------------------------------

constexpr const char* kMergeSchema = "merge_weights(Tensor param, Tensor? correction, int master_weights) -> Tensor";

void merge_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"merge_weights"};
  const Tensor param = take_tensor(stack[0]), correction = take_optional_tensor(stack[1]);
  const WeightInput input = unpack_weight(op, param, correction, take_int(stack[2]));
  Tensor weights = new_float_like(input.param);
  if (input.backend == Backend::kCuda) {
#if FLASHOPTIM_HAS_CUDA
    const Device device = input.param.device;
    op.check(cuda::merge_weights(input.dtype, input.master_weights, input.param.data, input.correction,
                                 float_data(weights), input.param.numel, device.index, current_stream(device)));
#endif
  } else if (input.backend != Backend::kMeta) {
    float* const to = float_data(weights);
    convert_slices(op, input.param.numel, [&](int64_t first, int64_t count) {
      return merge_weights(input.dtype, input.master_weights,
                           advance(input.param.data, first, dtype_bytes(input.dtype)),
                           advance(input.correction, first, correction_bytes(input.master_weights)), to + first, count);
    });
  }
  stack[0] = give_tensor(std::move(weights));
}

constexpr const char* kSplitSchema =
    "split_weights_(Tensor weights, Tensor(a!) param, Tensor(b!)? correction, int master_weights) -> ()";

void split_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"split_weights_"};
  const Tensor weights = take_tensor(stack[0]), param = take_tensor(stack[1]),
               correction = take_optional_tensor(stack[2]);
  const WeightInput input = unpack_weight(op, param, correction, take_int(stack[3]));
  const TensorInfo from = unpack_float_like(op, "weights", weights, input.param, "param");
  if (input.backend == Backend::kMeta) return;
#if FLASHOPTIM_HAS_CUDA
  if (input.backend == Backend::kCuda) {
    const Device device = input.param.device;
    return op.check(cuda::split_weights(input.dtype, input.master_weights, static_cast<const float*>(from.data),
                                        input.param.data, input.correction, input.param.numel, device.index,
                                        current_stream(device)));
  }
#endif
  convert_slices(op, input.param.numel, [&](int64_t first, int64_t count) {
    return split_weights(input.dtype, input.master_weights, static_cast<const float*>(from.data) + first,
                         advance(input.param.data, first, dtype_bytes(input.dtype)),
                         advance(input.correction, first, correction_bytes(input.master_weights)), count);
  });
}

// ---- states ---------------------------------------------------------------------------------------------------------

constexpr const char* kDecodeSchema =
    "decode_states(str optimizer, Tensor[] states, Tensor[] scales, int state_codec, int rows) -> Tensor[]";

void decode_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"decode_states"};
  const std::string optimizer = take_string(stack[0]);
  const TensorList states = take_tensors(stack[1]), scales = take_tensors(stack[2]);
  const StatesInput input = unpack_states(op, optimizer, states, scales, take_int(stack[3]), take_int(stack[4]));
  TensorList values;
  for (const TensorInfo& info : input.infos) values.push_back(new_float_like(info));
  if (input.backend != Backend::kMeta) {
    float* to[kMaxSlots] = {};
    for (size_t k = 0; k < values.size(); ++k) to[k] = float_data(values[k]);
#if FLASHOPTIM_HAS_CUDA
    if (input.backend == Backend::kCuda && !values.empty()) {
      const Device device = input.infos[0].device;
      op.check(cuda::decode_states(input.optimizer, input.has_momentum, input.tensor, to, device.index,
                                   current_stream(device)));
    }
#endif
    if (input.backend == Backend::kCpu)
      convert_state_slices(op, input.tensor, [&](const ParameterTensors& slice, int64_t first) {
        float* slice_to[kMaxSlots];
        for (int k = 0; k < kMaxSlots; ++k) slice_to[k] = to[k] == nullptr ? nullptr : to[k] + first;
        return decode_states(input.optimizer, input.has_momentum, slice, slice_to);
      });
  }
  stack[0] = give_tensors(std::move(values));
}

constexpr const char* kEncodeSchema =
    "encode_states_(str optimizer, Tensor[] values, Tensor(a!)[] states, Tensor(b!)[] scales, int state_codec, "
    "int rows) -> ()";

void encode_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"encode_states_"};
  const std::string optimizer = take_string(stack[0]);
  const TensorList values = take_tensors(stack[1]), states = take_tensors(stack[2]), scales = take_tensors(stack[3]);
  const StatesInput input = unpack_states(op, optimizer, states, scales, take_int(stack[4]), take_int(stack[5]));
  if (values.size() != states.size()) {
    op.fail("values has " + std::to_string(values.size()) + " tensors; needed are " + std::to_string(states.size()) +
            ", one per tensor of states");
  }
  const float* from[kMaxSlots] = {};
  for (size_t k = 0; k < values.size(); ++k) {
    const std::string index = std::to_string(k);
    from[k] = static_cast<const float*>(
        unpack_float_like(op, "values[" + index + "]", values[k], input.infos[k], "states[" + index + "]").data);
  }
  if (input.backend == Backend::kMeta) return;
#if FLASHOPTIM_HAS_CUDA
  if (input.backend == Backend::kCuda) {
    const Device device = input.infos[0].device;
    return op.check(cuda::encode_states(input.optimizer, input.has_momentum, input.tensor, from, device.index,
                                        current_stream(device)));
  }
#endif
  convert_state_slices(op, input.tensor, [&](const ParameterTensors& slice, int64_t first) {
    const float* slice_from[kMaxSlots];
    for (int k = 0; k < kMaxSlots; ++k) slice_from[k] = from[k] == nullptr ? nullptr : from[k] + first;
    return encode_states(input.optimizer, input.has_momentum, slice, slice_from);
  });
}

constexpr const char* kZeroSchema = "zero_(Tensor(a!)[] tensors) -> ()";

/// Dense tensors of one device and any dtypes; on CUDA in one launch, which torch._foreach_zero_ is not.
void zero_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"zero_"};
  const TensorList tensors = take_tensors(stack[0]);
  std::vector<void*> arrays;
  std::vector<int64_t> bytes;
  Device device;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name name{"tensors", static_cast<int64_t>(i)};
    const TensorInfo info = read_tensor(op, name, tensors[i]);
    if (i == 0) device = info.device;
    check_device(op, name, info.device, {"tensors", 0}, device);
    if (!is_dense(info)) {
      op.fail(name.str() + " has shape " + ints(info.sizes, info.dim) + " and strides " + ints(info.strides, info.dim) +
              "; its elements must fill their memory without gaps or overlap");
    }
    bytes.push_back(info.numel * static_cast<int64_t>(aoti_torch_dtype_element_size(info.dtype)));
  }
  if (tensors.empty()) return;
  const Backend backend = select_backend(op.name, "tensors[0]", device);
  if (backend == Backend::kMeta) return;
  for (const Tensor& tensor : tensors) arrays.push_back(mutable_data(tensor));
#if FLASHOPTIM_HAS_CUDA
  if (backend == Backend::kCuda) {
    return op.check(cuda::zero(arrays.data(), bytes.data(), static_cast<int64_t>(arrays.size()), device.index,
                               current_stream(device)));
  }
#endif
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (bytes[i] != 0) std::memset(arrays[i], 0, static_cast<size_t>(bytes[i]));
  }
}

// ---- facts ----------------------------------------------------------------------------------------------------------

constexpr const char* kGroupLayoutSchema = "group_layout(int[] sizes) -> int[]";

void group_layout_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const std::vector<int64_t> sizes = take_ints(stack[0]);
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] < 0) {
      Op{"group_layout"}.fail("sizes[" + std::to_string(d) + "] = " + std::to_string(sizes[d]) +
                              "; must be at least 0");
    }
  }
  const GroupLayout layout = group_layout(sizes.data(), static_cast<int64_t>(sizes.size()));
  stack[0] = give_ints({layout.rows, layout.row_size, layout.groups_per_row()});
}

constexpr const char* kCpuIsaSchema = "cpu_isa() -> str";

void cpu_isa_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const char* name = "";
  Op{"cpu_isa"}.check(cpu_isa(&name));
  stack[0] = give_string(name);
}

constexpr const char* kHasCudaSchema = "has_cuda() -> bool";

/// Whether this build steps CUDA tensors; not whether there is a device.
void has_cuda_kernel(StableIValue* stack, uint64_t, uint64_t) { stack[0] = give_bool(kHasCuda); }

constexpr const char* kStateNamesSchema = "state_names(str optimizer, bool has_momentum) -> str";

void state_names_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const OptimizerKind optimizer = parse_optimizer({"state_names"}, take_string(stack[0]));
  std::string names;
  for (int k = 0; k < state_count(optimizer, take_bool(stack[1])); ++k) {
    if (k > 0) names += ',';
    names += state_slot(optimizer, k).name;
  }
  stack[0] = give_string(names);
}

constexpr const char* kHyperparameterNamesSchema = "hyperparameter_names(str optimizer) -> str";

/// What the numbers of a set of step_'s and plan_step_'s hypers are, in their order.
void hyperparameter_names_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const OptimizerKind optimizer = parse_optimizer({"hyperparameter_names"}, take_string(stack[0]));
  std::string names;
  for (int64_t i = 0; i < hyperparameter_count(optimizer); ++i) {
    if (i > 0) names += ',';
    names += hyperparameter(optimizer, i).name;
  }
  stack[0] = give_string(names);
}

constexpr const char* kStateSignsSchema = "state_signs(str optimizer, bool has_momentum) -> int[]";

/// 1 for slots that take both signs (the paper's codec stores them as int8), 0 for the others (uint8).
void state_signs_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const OptimizerKind optimizer = parse_optimizer({"state_signs"}, take_string(stack[0]));
  std::vector<int64_t> signs;
  for (int k = 0; k < state_count(optimizer, take_bool(stack[1])); ++k) {
    signs.push_back(state_slot(optimizer, k).is_signed ? 1 : 0);
  }
  stack[0] = give_ints(signs);
}

}  // namespace
}  // namespace flashoptim::ops

/// A symbol that C++ programs refer to, so that the linker keeps this library and its operators get registered.
extern "C" __attribute__((visibility("default"))) int flashoptim_ops_version() { return 1; }

STABLE_TORCH_LIBRARY(flashoptim, m) {
  using namespace flashoptim::ops;
  for (const char* schema :
       {kStepSchema, kMergeSchema, kSplitSchema, kDecodeSchema, kEncodeSchema, kGroupLayoutSchema, kCpuIsaSchema,
        kStateNamesSchema, kStateSignsSchema, kHasCudaSchema, kPlanNewSchema, kPlanFreeSchema, kPlanCheckSchema,
        kPlanStepSchema, kPlanNormSchema, kZeroSchema, kHyperparameterNamesSchema}) {
    m.def(schema);
  }
}

// One kernel for every device; the device is looked at in one place (device.h), where its messages can say what to do.
STABLE_TORCH_LIBRARY_IMPL(flashoptim, CompositeExplicitAutograd, m) {
  using namespace flashoptim::ops;
  m.impl("step_", step_kernel);
  m.impl("merge_weights", merge_kernel);
  m.impl("split_weights_", split_kernel);
  m.impl("decode_states", decode_kernel);
  m.impl("encode_states_", encode_kernel);
  m.impl("group_layout", group_layout_kernel);
  m.impl("cpu_isa", cpu_isa_kernel);
  m.impl("state_names", state_names_kernel);
  m.impl("state_signs", state_signs_kernel);
  m.impl("hyperparameter_names", hyperparameter_names_kernel);
  m.impl("has_cuda", has_cuda_kernel);
  m.impl("plan_new", plan_new_kernel);
  m.impl("plan_free", plan_free_kernel);
  m.impl("plan_check", plan_check_kernel);
  m.impl("plan_step_", plan_step_kernel);
  m.impl("plan_norm_", plan_norm_kernel);
  m.impl("zero_", zero_kernel);
}
