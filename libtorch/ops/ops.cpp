// The operators: schemas, boxed kernels, registration against torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <functional>

#include "libtorch/ops/boxed.h"
#include "libtorch/ops/checks.h"
#include "libtorch/ops/device.h"
#include "libtorch/ops/plan_cache.h"

namespace flashoptim::ops {
namespace {

/// Elements of one slice of a conversion, and how many of them are worth a thread.
constexpr int64_t kSliceElements = 64 * 512;

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
      for (int k = 0; k < kMaxStates; ++k) {
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

void step_on_cpu(Op op, const StepInput& input) {
  PlanCache& cache = PlanCache::instance();
  std::unique_ptr<PlanCache::Entry> entry = cache.take(input.optimizer, input.has_momentum, input.tensors);
  if (entry == nullptr) {
    check_no_overlap(op, input.tensors);
    entry = std::make_unique<PlanCache::Entry>();
    entry->hash = PlanCache::hash(input.optimizer, input.has_momentum, input.tensors);
    entry->optimizer = input.optimizer;
    entry->has_momentum = input.has_momentum;
    op.check(Plan::make(input.optimizer, input.has_momentum, input.tensors.data(),
                        static_cast<int64_t>(input.tensors.size()), &entry->plan));
  } else {
    for (size_t i = 0; i < input.tensors.size(); ++i) {
      op.check(entry->plan.set_gradient(static_cast<int64_t>(i), input.tensors[i].gradient));
      op.check(entry->plan.set_hyper_index(static_cast<int64_t>(i), input.tensors[i].hyper_index));
    }
  }
  const Status status = entry->plan.step(input.hypers.data(), static_cast<int64_t>(input.hypers.size()),
                                         with_torch_threads(input.options));
  cache.put(std::move(entry));
  op.check(status);
}

void step_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"step_"};
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
  arguments.hyper_index = take_ints(stack[10]);
  arguments.hypers = take_floats(stack[11]);
  arguments.grad_scale = take_float(stack[12]);
  arguments.found_inf = take_optional_tensor(stack[13]);
  arguments.nonfinite = take_optional_tensor(stack[14]);

  thread_local StepInput input;  // keeps its memory from step to step
  unpack_step(op, arguments, &input);
  if (input.tensors.empty()) return;
  switch (input.backend) {
    case Backend::kMeta:
      return;
    case Backend::kCpu:
      return step_on_cpu(op, input);
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------

constexpr const char* kMergeSchema = "merge_weights(Tensor param, Tensor? correction, int master_weights) -> Tensor";

void merge_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"merge_weights"};
  const Tensor param = take_tensor(stack[0]), correction = take_optional_tensor(stack[1]);
  const WeightInput input = unpack_weight(op, param, correction, take_int(stack[2]));
  Tensor weights = new_float_like(input.param);
  if (input.backend != Backend::kMeta) {
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
    float* to[kMaxStates] = {};
    for (size_t k = 0; k < values.size(); ++k) to[k] = float_data(values[k]);
    convert_state_slices(op, input.tensor, [&](const ParameterTensors& slice, int64_t first) {
      float* slice_to[kMaxStates];
      for (int k = 0; k < kMaxStates; ++k) slice_to[k] = to[k] == nullptr ? nullptr : to[k] + first;
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
  const float* from[kMaxStates] = {};
  for (size_t k = 0; k < values.size(); ++k) {
    const std::string index = std::to_string(k);
    from[k] = static_cast<const float*>(
        unpack_float_like(op, "values[" + index + "]", values[k], input.infos[k], "states[" + index + "]").data);
  }
  if (input.backend == Backend::kMeta) return;
  convert_state_slices(op, input.tensor, [&](const ParameterTensors& slice, int64_t first) {
    const float* slice_from[kMaxStates];
    for (int k = 0; k < kMaxStates; ++k) slice_from[k] = from[k] == nullptr ? nullptr : from[k] + first;
    return encode_states(input.optimizer, input.has_momentum, slice, slice_from);
  });
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
  for (const char* schema : {kStepSchema, kMergeSchema, kSplitSchema, kDecodeSchema, kEncodeSchema, kGroupLayoutSchema,
                             kCpuIsaSchema, kStateNamesSchema, kStateSignsSchema}) {
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
}
