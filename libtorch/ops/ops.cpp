// The operators: schemas, boxed kernels, registration against torch's stable ABI. What they do is the store's.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <functional>
#include <iomanip>
#include <sstream>

#include "libtorch/ops/boxed.h"
#include "libtorch/ops/checks.h"
#include "libtorch/store/host_memory.h"
#include "libtorch/store/store.h"

namespace flashoptim::ops {
namespace {

std::vector<AtenTensorHandle> handles(const TensorList& tensors) { return {tensors.begin(), tensors.end()}; }

// ---- step_ ----------------------------------------------------------------------------------------------------------

// One step over tensors that are all given, by a store of its own: nothing is kept from call to call. states, scales:
// slot by slot for every parameter; scales and corrections of 0 elements where there is none. hypers: sets of numbers
// (checks.h), among which hyper_index chooses.
constexpr const char* kStepSchema =
    "step_(str optimizer, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] corrections, Tensor(c!)[] states, "
    "Tensor(d!)[] scales, int[] master_weights, int[] state_codecs, int[] first_elements, int[] hyper_index, "
    "float[] hypers, float grad_scale, Tensor? found_inf, Tensor(e!)? nonfinite) -> ()";

DType gradient_dtype(Op op, Name name, AtenTensorHandle gradient) {
  return parse_param_dtype(op, name, read_tensor(op, name, gradient).dtype);
}

void step_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"step_"};
  const std::string name = take_string(stack[0]);
  const TensorList params = take_tensors(stack[1]), grads = take_tensors(stack[2]),
                   corrections = take_tensors(stack[3]), states = take_tensors(stack[4]),
                   scales = take_tensors(stack[5]);
  const std::vector<int64_t> master_weights = take_ints(stack[6]), codecs = take_ints(stack[7]),
                             first_elements = take_ints(stack[8]), hyper_index = take_ints(stack[9]);
  const std::vector<double> values = take_floats(stack[10]);
  const double grad_scale = take_float(stack[11]);
  const Tensor found_inf = take_optional_tensor(stack[12]), nonfinite = take_optional_tensor(stack[13]);

  const OptimizerKind optimizer = parse_optimizer(op, name);
  const size_t count = params.size();
  check_count(op, "grads", grads.size(), count);
  check_count(op, "corrections", corrections.size(), count);
  check_count(op, "master_weights", master_weights.size(), count);
  check_count(op, "state_codecs", codecs.size(), count);
  check_count(op, "first_elements", first_elements.size(), count);
  check_count(op, "hyper_index", hyper_index.size(), count);
  if (scales.size() != states.size()) {
    op.fail("scales has " + std::to_string(scales.size()) + " tensors; needed are " + std::to_string(states.size()) +
            ", one per tensor of states (of 0 elements for float32 states)");
  }
  bool has_momentum = false;
  const auto slots =
      static_cast<size_t>(slots_per_tensor(op, optimizer, "states", states.size(), count, &has_momentum));
  if (count == 0) return;
  std::vector<Hyperparameters> sets;
  unpack_hypers(op, values, optimizer, StepNumber::kGiven, &sets);

  store::Store store(optimizer);
  store.reset(static_cast<int64_t>(count));
  for (size_t i = 0; i < count; ++i) {
    const auto index = static_cast<int64_t>(i);
    store::RecordOptions options;
    options.group = hyper_index[i];
    if (options.group < 0 || options.group >= static_cast<int64_t>(sets.size())) {
      op.fail(Name{"hyper_index", index}.str() + " = " + std::to_string(options.group) + "; hypers has " +
              std::to_string(sets.size()) + " sets");
    }
    options.format.master_weights = parse_master_weights(op, Name{"master_weights", index}.str(), master_weights[i]);
    options.format.codec = parse_state_codec(op, Name{"state_codecs", index}.str(), codecs[i]);
    options.has_momentum = has_momentum;
    options.gradient_dtype = gradient_dtype(op, {"grads", index}, grads[i]);
    options.shard.place.first_element = first_elements[i];
    store::StateTensors stored;
    for (size_t k = 0; k < slots; ++k) {
      stored.states.push_back(states[i * slots + k]);
      stored.scales.push_back(scales[i * slots + k]);
    }
    store.describe(op, index, Name{"params", index}.str(), options, params[i], stored, corrections[i]);
    const Device device = store.record(index).device();
    check_device(op, {"params", index}, device, {"params", 0}, store.record(0).device());
    check_like(op, {"grads", index}, read_tensor(op, {"grads", index}, grads[i]), {"params", index},
               read_tensor(op, {"params", index}, params[i]));
  }
  store.plan(op);
  if (store.record(0).backend() == Backend::kMeta) return;
  store.begin();
  std::vector<store::GroupHyperparameters> groups;
  for (const Hyperparameters& set : sets) groups.push_back({set, nullptr});
  for (size_t i = 0; i < count; ++i) {
    const auto index = static_cast<int64_t>(i);
    store.take(index, const_data(grads[i]), {sets[static_cast<size_t>(hyper_index[i])].step - 1, nullptr});
  }
  const Device device = store.record(0).device();
  store::Controls controls;
  controls.gradient_scale = checked_grad_scale(op, grad_scale);
  controls.found_inf =
      static_cast<const float*>(unpack_array(op, {"found_inf"}, found_inf, codes().float32, 1, device));
  controls.nonfinite_gradients =
      static_cast<int64_t*>(unpack_array(op, {"nonfinite"}, nonfinite, codes().int64, 1, device));
  store.step(op, groups, {controls});
}

// ---- weights --------------------------------------------------------------------------------------------------------

constexpr const char* kMergeSchema = "merge_weights(Tensor param, Tensor? correction, int master_weights) -> Tensor";

void merge_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"merge_weights"};
  const Tensor param = take_tensor(stack[0]), correction = take_optional_tensor(stack[1]);
  const MasterWeights master = parse_master_weights(op, "master_weights", take_int(stack[2]));
  stack[0] = give_tensor(merge_weights(op, param, correction, master));
}

constexpr const char* kSplitSchema =
    "split_weights_(Tensor weights, Tensor(a!) param, Tensor(b!)? correction, int master_weights) -> ()";

void split_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"split_weights_"};
  const Tensor weights = take_tensor(stack[0]), param = take_tensor(stack[1]),
               correction = take_optional_tensor(stack[2]);
  split_weights(op, weights, param, correction, parse_master_weights(op, "master_weights", take_int(stack[3])));
}

// ---- states ---------------------------------------------------------------------------------------------------------

constexpr const char* kPlaceOfBoxSchema = "place_of_box(int[] whole_sizes, int[] offsets, int[] sizes) -> int[]";

/// The place of a shard as kPlaceNumbers numbers, which other operators take (checks.h).
void place_of_box_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"place_of_box"};
  store::Shard shard;
  op.check(store::shard_of_box(take_ints(stack[0]), take_ints(stack[1]), take_ints(stack[2]), &shard));
  const Place& p = shard.place;
  stack[0] = give_ints({p.first_element, p.run, p.stride, p.whole.rows, p.whole.row_size, shard.leading});
}

constexpr const char* kScaleSizesSchema = "scale_sizes(int[] sizes) -> int[]";

void scale_sizes_kernel(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = give_ints(store::scale_sizes_of(take_ints(stack[0]), {}));
}

constexpr const char* kDecodeSchema =
    "decode_states(str optimizer, Tensor[] states, Tensor[] scales, int state_codec, int[] place) -> Tensor[]";

void decode_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"decode_states"};
  const std::string optimizer = take_string(stack[0]);
  const TensorList states = take_tensors(stack[1]), scales = take_tensors(stack[2]);
  const StateCodec codec = parse_state_codec(op, "state_codec", take_int(stack[3]));
  const std::vector<int64_t> place = take_ints(stack[4]);
  stack[0] = give_tensors(decode_states(op, parse_optimizer(op, optimizer), {handles(states), handles(scales)}, codec,
                                        parse_shard(op, place)));
}

constexpr const char* kEncodeSchema =
    "encode_states_(str optimizer, Tensor[] values, Tensor(a!)[] states, Tensor(b!)[] scales, int state_codec, "
    "int[] place) -> ()";

void encode_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"encode_states_"};
  const std::string optimizer = take_string(stack[0]);
  const TensorList values = take_tensors(stack[1]), states = take_tensors(stack[2]), scales = take_tensors(stack[3]);
  const StateCodec codec = parse_state_codec(op, "state_codec", take_int(stack[4]));
  const std::vector<int64_t> place = take_ints(stack[5]);
  encode_states(op, parse_optimizer(op, optimizer), handles(values), {handles(states), handles(scales)}, codec,
                parse_shard(op, place));
}

// ---- formats --------------------------------------------------------------------------------------------------------

// Which master_weights and codec a group's options mean for a parameter. codec: 1 (paper) or 2 (default), of states
// that are quantized; master_weight_bits: 0, 24 or 32.
constexpr const char* kFormatSchema =
    "format_of(int dtype, int[] whole_sizes, bool quantize, int codec, int master_weight_bits, bool "
    "stochastic_rounding, "
    "int min_quantized_numel) -> int[]";

void format_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"format_of"};
  store::FormatOptions options;
  const DType dtype = parse_dtype(op, "dtype", take_int(stack[0]));
  options.quantize = take_bool(stack[2]);
  options.codec = parse_state_codec(op, "codec", take_int(stack[3]));
  options.master_weight_bits = take_int(stack[4]);
  options.stochastic_rounding = take_bool(stack[5]);
  options.min_quantized_numel = take_int(stack[6]);
  const store::Format format = store::format_of(dtype, take_ints(stack[1]), options);
  stack[0] = give_ints({static_cast<int64_t>(format.master_weights), static_cast<int64_t>(format.codec)});
}

constexpr const char* kArrayNamesSchema =
    "array_names(str optimizer, bool has_momentum, int master_weights, int codec) -> str";

/// Names of the arrays of a state, in new_states' order, joined by commas.
void array_names_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"array_names"};
  const OptimizerKind optimizer = parse_optimizer(op, take_string(stack[0]));
  const store::Format format{parse_master_weights(op, "master_weights", take_int(stack[2])),
                             parse_state_codec(op, "codec", take_int(stack[3]))};
  std::string names;
  for (const store::ArraySpec& spec : store::arrays_of(optimizer, take_bool(stack[1]), format, {1}, {})) {
    names += (names.empty() ? "" : ",") + store::array_name(optimizer, spec.role, spec.slot, format.codec);
  }
  stack[0] = give_string(names);
}

// Arrays of zeros for the states of parameters of one device, one parameter's behind the other's. places: kPlaceNumbers
// a parameter (place_of_box; zeros for one that is no shard), or none at all.
constexpr const char* kNewStatesSchema =
    "new_states(str optimizer, Tensor[] params, int[] has_momentum, int[] master_weights, int[] codecs, int[] places) "
    "-> Tensor[]";

/// The arrays that new_states' arguments ask for, and the parameters' device.
std::vector<store::ArraySpec> wanted_arrays(Op op, StableIValue* stack, Device* device) {
  const std::string name = take_string(stack[0]);
  const TensorList params = take_tensors(stack[1]);
  const std::vector<int64_t> has_momentum = take_ints(stack[2]), master_weights = take_ints(stack[3]),
                             codecs = take_ints(stack[4]), places = take_ints(stack[5]);
  const OptimizerKind optimizer = parse_optimizer(op, name);
  check_count(op, "has_momentum", has_momentum.size(), params.size());
  check_count(op, "master_weights", master_weights.size(), params.size());
  check_count(op, "codecs", codecs.size(), params.size());
  if (!places.empty()) check_count(op, "places", places.size(), static_cast<size_t>(kPlaceNumbers) * params.size());
  std::vector<store::ArraySpec> specs;
  for (size_t i = 0; i < params.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    const TensorInfo info = read_tensor(op, {"params", index}, params[i]);
    if (i == 0) *device = info.device;
    check_device(op, {"params", index}, info.device, {"params", 0}, *device);
    const store::Format format{parse_master_weights(op, Name{"master_weights", index}.str(), master_weights[i]),
                               parse_state_codec(op, Name{"codecs", index}.str(), codecs[i])};
    store::Shard shard;
    if (!places.empty()) {
      const auto first = places.begin() + static_cast<std::ptrdiff_t>(i * kPlaceNumbers);
      shard = parse_shard(op, {first, first + kPlaceNumbers});
    }
    const std::vector<store::ArraySpec> arrays =
        store::arrays_of(optimizer, has_momentum[i] != 0, format, {info.sizes, info.sizes + info.dim},
                         store::storage_order(info.sizes, info.strides, info.dim), shard);
    specs.insert(specs.end(), arrays.begin(), arrays.end());
  }
  return specs;
}

void new_states_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"new_states"};
  Device device;
  const std::vector<store::ArraySpec> specs = wanted_arrays(op, stack, &device);
  stack[0] = give_tensors(store::new_arrays(op, specs, device));
}

// The same on the host, for offloaded states: in one stretch of memory, pinned where asked (store::host_arrays).
constexpr const char* kHostStatesSchema =
    "host_states(str optimizer, Tensor[] params, int[] has_momentum, int[] master_weights, int[] codecs, int[] places, "
    "bool pin) -> Tensor[]";

void host_states_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"host_states"};
  Device device;
  const bool pin = take_bool(stack[6]);
  const std::vector<store::ArraySpec> specs = wanted_arrays(op, stack, &device);
  stack[0] = give_tensors(store::host_arrays(op, specs, device, pin));
}

// Arrays like these, in such memory.
constexpr const char* kHostBuffersSchema = "host_buffers(Tensor[] like, bool pin) -> Tensor[]";

void host_buffers_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"host_buffers"};
  const TensorList like = take_tensors(stack[0]);
  std::vector<store::ArraySpec> specs;
  Device device;
  for (size_t i = 0; i < like.size(); ++i) {
    const TensorInfo info = store::read_dense(op, {"like", static_cast<int64_t>(i)}, like[i]);
    device = info.device;
    specs.push_back({store::Role::kState,
                     0,
                     info.dtype,
                     {info.sizes, info.sizes + info.dim},
                     {info.strides, info.strides + info.dim}});
  }
  stack[0] = give_tensors(store::host_arrays(op, specs, device, take_bool(stack[1])));
}

constexpr const char* kHostMemorySchema = "host_memory() -> int";

/// Bytes of memory for offloaded states that the process has.
void host_memory_kernel(StableIValue* stack, uint64_t, uint64_t) { stack[0] = give_int(store::host_memory_held()); }

/// states ... correction of fit_state and convert_state, taken off the stack.
struct StoredArguments {
  TensorList states, scales;
  Tensor correction;
  DType correction_of;

  StoredArguments(Op op, const StableIValue* stack)
      : states(take_tensors(stack[0])),
        scales(take_tensors(stack[1])),
        correction(take_optional_tensor(stack[2])),
        correction_of(parse_dtype(op, "correction_of", take_int(stack[3]))) {}
  store::Stored stored() const { return {{handles(states), handles(scales)}, correction, correction_of}; }
};

// Whether a step can run on a state as it is: store::Fit. correction_of: dtype of the parameter that the correction
// belongs to, 0: the parameter's own. name: the parameter's, for messages.
constexpr const char* kFitSchema =
    "fit_state(str optimizer, bool has_momentum, Tensor param, Tensor[] states, Tensor[] scales, Tensor? correction, "
    "int correction_of, int master_weights, int codec, int[] place, str name, bool on_host) -> int";

void fit_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"fit_state"};
  const OptimizerKind optimizer = parse_optimizer(op, take_string(stack[0]));
  const bool has_momentum = take_bool(stack[1]);
  const Tensor param = take_tensor(stack[2]);
  const StoredArguments arguments(op, stack + 3);
  const store::Format format{parse_master_weights(op, "master_weights", take_int(stack[7])),
                             parse_state_codec(op, "codec", take_int(stack[8]))};
  const store::Shard shard = parse_shard(op, take_ints(stack[9]));
  const std::string name = take_string(stack[10]);
  const bool on_host = take_bool(stack[11]);
  stack[0] = give_int(static_cast<int64_t>(
      store::fit(optimizer, has_momentum, param, arguments.stored(), format, shard, name, on_host)));
}

// The arrays of a state in another format (store::convert): the arrays, the parameter's new values (one tensor, or
// none), and the correction's fate.
constexpr const char* kConvertSchema =
    "convert_state(str optimizer, bool has_momentum, Tensor param, Tensor[] states, Tensor[] scales, "
    "Tensor? correction, int correction_of, int master_weights, int codec, int[] place, str name) -> (Tensor[], "
    "Tensor[], int)";

void convert_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Op op{"convert_state"};
  const OptimizerKind optimizer = parse_optimizer(op, take_string(stack[0]));
  const bool has_momentum = take_bool(stack[1]);
  const Tensor param = take_tensor(stack[2]);
  const StoredArguments arguments(op, stack + 3);
  const store::Format format{parse_master_weights(op, "master_weights", take_int(stack[7])),
                             parse_state_codec(op, "codec", take_int(stack[8]))};
  const std::vector<int64_t> place = take_ints(stack[9]);
  const std::string name = take_string(stack[10]);
  store::Converted converted =
      store::convert(op, name, optimizer, has_momentum, param, arguments.stored(), format, parse_shard(op, place));
  TensorList rewritten;
  if (converted.param.has_value()) rewritten.push_back(std::move(converted.param));
  stack[0] = give_tensors(std::move(converted.arrays));
  stack[1] = give_tensors(std::move(rewritten));
  stack[2] = give_int(static_cast<int64_t>(converted.fate));
}

constexpr const char* kZeroSchema = "zero_(Tensor(a!)[] tensors) -> ()";

void zero_kernel(StableIValue* stack, uint64_t, uint64_t) { store::zero({"zero_"}, handles(take_tensors(stack[0]))); }

// ---- facts ----------------------------------------------------------------------------------------------------------

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

/// What the numbers of a set of step_'s hypers are, in their order.
void hyperparameter_names_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const OptimizerKind optimizer = parse_optimizer({"hyperparameter_names"}, take_string(stack[0]));
  std::string names;
  for (int64_t i = 0; i < hyperparameter_count(optimizer); ++i) {
    if (i > 0) names += ',';
    names += hyperparameter(optimizer, i).name;
  }
  stack[0] = give_string(names);
}

constexpr const char* kOptimizerNamesSchema = "optimizer_names() -> str";

void optimizer_names_kernel(StableIValue* stack, uint64_t, uint64_t) {
  std::string names;
  for (int64_t i = 0; i < optimizer_count(); ++i) {
    if (i > 0) names += ',';
    names += optimizer_name(optimizer_at(i));
  }
  stack[0] = give_string(names);
}

constexpr const char* kDescribeSchema = "describe_optimizer(str optimizer) -> str";

/// What optimizer_info.h says of an optimizer, as JSON; null is an end of a range that is infinite.
void describe_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const OptimizerKind optimizer = parse_optimizer({"describe_optimizer"}, take_string(stack[0]));
  std::ostringstream out;
  out << std::setprecision(17) << std::boolalpha;
  const auto number = [](double value) {
    std::ostringstream text;
    text << std::setprecision(17) << value;
    return std::isfinite(value) ? text.str() : std::string("null");
  };
  out << "{\"title\":\"" << optimizer_title(optimizer) << "\",\"hyperparameters\":[";
  for (int64_t i = 0; i < hyperparameter_count(optimizer); ++i) {
    static const char* const kKinds[] = {"number", "flag", "whole"};
    const HyperparameterInfo info = hyperparameter(optimizer, i);
    out << (i > 0 ? "," : "") << "{\"name\":\"" << info.name << "\",\"kind\":\"" << kKinds[static_cast<int>(info.kind)]
        << "\",\"default\":" << number(info.default_value) << ",\"lowest\":" << number(info.lowest)
        << ",\"highest\":" << number(info.highest) << ",\"lowest_allowed\":" << info.lowest_allowed
        << ",\"highest_allowed\":" << info.highest_allowed << "}";
  }
  out << "],\"slots\":[";
  for (int k = 0; k < state_count(optimizer, true); ++k) {
    const StateSlotInfo slot = state_slot(optimizer, k);
    out << (k > 0 ? "," : "") << "{\"name\":\"" << slot.name << "\",\"signed\":" << slot.is_signed
        << ",\"relative_to\":" << slot.relative_to << ",\"mantissa_bits\":" << slot.mantissa_bits
        << ",\"slow\":" << slot.is_slow << "}";
  }
  out << "]}";
  stack[0] = give_string(out.str());
}

constexpr const char* kImplementationSchema = "implementation(Tensor tensor) -> int";

/// Address of the tensor's implementation, by which Python's objects are known (python_objects.h).
void implementation_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor tensor = take_tensor(stack[0]);
  stack[0] = give_int(*reinterpret_cast<const int64_t*>(tensor.get()));
}

}  // namespace
}  // namespace flashoptim::ops

STABLE_TORCH_LIBRARY(flashoptim, m) {
  using namespace flashoptim::ops;
  for (const char* schema :
       {kStepSchema,           kMergeSchema,      kSplitSchema,         kDecodeSchema,     kEncodeSchema,
        kFormatSchema,         kArrayNamesSchema, kNewStatesSchema,     kHostStatesSchema, kHostBuffersSchema,
        kHostMemorySchema,     kPlaceOfBoxSchema, kScaleSizesSchema,    kFitSchema,        kConvertSchema,
        kZeroSchema,           kCpuIsaSchema,     kHasCudaSchema,       kStateNamesSchema, kHyperparameterNamesSchema,
        kOptimizerNamesSchema, kDescribeSchema,   kImplementationSchema}) {
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
  m.impl("format_of", format_kernel);
  m.impl("array_names", array_names_kernel);
  m.impl("new_states", new_states_kernel);
  m.impl("host_states", host_states_kernel);
  m.impl("host_buffers", host_buffers_kernel);
  m.impl("host_memory", host_memory_kernel);
  m.impl("place_of_box", place_of_box_kernel);
  m.impl("scale_sizes", scale_sizes_kernel);
  m.impl("fit_state", fit_kernel);
  m.impl("convert_state", convert_kernel);
  m.impl("zero_", zero_kernel);
  m.impl("cpu_isa", cpu_isa_kernel);
  m.impl("has_cuda", has_cuda_kernel);
  m.impl("state_names", state_names_kernel);
  m.impl("hyperparameter_names", hyperparameter_names_kernel);
  m.impl("optimizer_names", optimizer_names_kernel);
  m.impl("describe_optimizer", describe_kernel);
  m.impl("implementation", implementation_kernel);
}
