// From what is stored for a parameter to what its format wants now.
#include <cstring>
#include <utility>

#include "libtorch/store/arrays.h"
#include "libtorch/store/host_memory.h"

namespace flashoptim::store {
namespace {

bool same_sizes(const TensorInfo& a, const std::vector<int64_t>& sizes) {
  return std::vector<int64_t>(a.sizes, a.sizes + a.dim) == sizes;
}

StorageOrder order_of_spec(const ArraySpec& spec) {
  return storage_order(spec.sizes.data(), spec.strides.data(), static_cast<int64_t>(spec.sizes.size()));
}

StorageOrder order_of(const TensorInfo& info) { return storage_order(info.sizes, info.strides, info.dim); }

int32_t dtype_code(DType dtype) {
  if (dtype == DType::kBFloat16) return codes().bfloat16;
  return dtype == DType::kFloat16 ? codes().float16 : codes().float32;
}

/// aten::equal.
bool equal(AtenTensorHandle a, AtenTensorHandle b) {
  AtenTensorHandle copies[2] = {nullptr, nullptr};
  check_torch(aoti_torch_new_tensor_handle(a, &copies[0]), "new_tensor_handle");
  check_torch(aoti_torch_new_tensor_handle(b, &copies[1]), "new_tensor_handle");
  StableIValue stack[2];  // owns the copies from here on; the result takes the place of the first
  static_assert(sizeof stack == sizeof copies);
  std::memcpy(stack, copies, sizeof stack);
  check_torch(aoti_torch_call_dispatcher("aten::equal", "", stack), "equal");
  bool result = false;
  std::memcpy(&result, stack, sizeof result);
  return result;
}

/// A dense copy where the tensor is not dense or not on `device`; else the tensor itself, borrowed.
class Dense {
 public:
  Dense(Op op, Name name, AtenTensorHandle tensor, Device device) : handle_(tensor) {
    const TensorInfo info = read_tensor(op, name, tensor);
    if (is_dense(info) && info.device == device) return;
    const std::vector<int64_t> sizes(info.sizes, info.sizes + info.dim);
    owned_ = empty(sizes, dense_strides(sizes, order_of(info)), info.dtype, device);
    check_torch(aoti_torch_copy_(owned_, tensor, /*non_blocking=*/0), "copy_");
    handle_ = owned_;
  }
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_;
  Tensor owned_;
};

/// A correction of the same narrow weights in another width, on the host: rare, so it may wait for the device.
Tensor rescaled(Op op, AtenTensorHandle correction, MasterWeights from, MasterWeights to) {
  const TensorInfo info = read_dense(op, {"correction"}, correction);
  const Device host{aoti_torch_device_type_cpu(), 0};
  const Tensor source = copy_like(correction, info, info.dtype, host);
  Tensor result = copy_like(correction, info, correction_dtype(to), host);
  op.check(rescale_corrections(from, const_data(source), to, mutable_data(result), info.numel));
  if (info.device == host) return result;
  return copy_like(result, info, correction_dtype(to), info.device);
}

/// Element by element, whatever their shapes: both are contiguous and of equal numbers of elements.
void copy_elements(AtenTensorHandle to, AtenTensorHandle from) {
  const TensorInfo info = read_tensor({"copy_"}, {"scales"}, to);
  AtenTensorHandle view = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(from, info.dim, info.sizes, info.strides, /*offset_increment=*/0, &view),
              "reinterpret_tensor");
  const Tensor owned(view);
  check_torch(aoti_torch_copy_(to, owned, /*non_blocking=*/0), "copy_");
}

/// Dimensions of more than one element, the outermost in memory first.
std::vector<int64_t> extended(const std::vector<int64_t>& sizes, const StorageOrder& order) {
  std::vector<int64_t> dims;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t d = order.empty() ? static_cast<int64_t>(i) : order[i];
    if (sizes[static_cast<size_t>(d)] != 1) dims.push_back(d);
  }
  return dims;
}

/// The scales of a tensor that lies in order `from`, as a view in the shape and order of one that lies in order `to`;
/// none where rows consist of other elements there, or of the same in another order.
Tensor permuted_scales(const std::vector<int64_t>& sizes, const StorageOrder& from, const StorageOrder& to,
                       AtenTensorHandle scales) {
  const std::vector<int64_t> before = extended(sizes, from), after = extended(sizes, to);
  int64_t row = 1;
  size_t inner = 0;  // dimensions of a row
  while (inner < before.size() && row < kGroupSize) {
    const int64_t d = before[before.size() - ++inner];
    if (after[after.size() - inner] != d) return {};
    row *= sizes[static_cast<size_t>(d)];
  }
  const std::vector<int64_t> shape = scale_sizes_of(sizes, to, {});
  std::vector<int64_t> strides(shape.size(), 1);
  std::vector<int64_t> of_dim(sizes.size(), 1);
  int64_t next = shape.back();
  for (size_t i = before.size() - inner; i-- > 0;) {
    of_dim[static_cast<size_t>(before[i])] = next;
    next *= sizes[static_cast<size_t>(before[i])];
  }
  for (size_t i = 0; i + 1 < shape.size(); ++i) strides[i] = of_dim[to.empty() ? i : static_cast<size_t>(to[i])];
  AtenTensorHandle view = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(scales, static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                             /*offset_increment=*/0, &view),
              "reinterpret_tensor");
  return Tensor(view);
}

void convert_states(Op op, const std::string& name, OptimizerKind optimizer, const TensorInfo& param,
                    const StateTensors& saved, Format to, const Shard& shard, const StateTensors& made) {
  const std::vector<int64_t> sizes(param.sizes, param.sizes + param.dim);
  const StateCodec codec = stored_codec(op, optimizer, saved, name);
  std::vector<Dense> states, scales;
  bool same = codec == to.codec, same_order = true;
  for (size_t k = 0; k < saved.states.size(); ++k) {
    states.emplace_back(op, Name{"states", static_cast<int64_t>(k)}, saved.states[k], param.device);
    same_order = same_order && order_of(read_tensor(op, {"states"}, states[k].get())) == order_of(param);
    if (codec == StateCodec::kFloat32) continue;
    scales.emplace_back(op, Name{"scales", static_cast<int64_t>(k)}, saved.scales[k], param.device);
  }
  const StorageOrder from_order = order_of(read_tensor(op, {"states"}, states[0].get()));
  const GroupLayout layout = layout_of(sizes, order_of(param), shard);
  for (size_t k = 0; k < scales.size(); ++k) {
    const std::string array = array_name(optimizer, Role::kScale, static_cast<int>(k), codec);
    const GroupLayout found = stored_layout(op, "state '" + array + "' of " + name, sizes, from_order, shard,
                                            read_tensor(op, {"scales"}, scales[k].get()));
    // Whole groups in every row: the same groups, however rows are counted.
    const bool has_whole_groups = found.row_size % kGroupSize == 0 && layout.row_size % kGroupSize == 0;
    same = same && (found == layout || has_whole_groups);
  }
  // In another order rows of the same elements are the same groups, too: codes and scales move with their elements.
  TensorList permuted;
  for (size_t k = 0; same && !same_order && codec != StateCodec::kFloat32 && k < scales.size(); ++k) {
    permuted.push_back(permuted_scales(sizes, from_order, order_of(param), scales[k].get()));
    same = !shard.is_set() && permuted.back().has_value();
  }
  if (same && (same_order || codec != StateCodec::kFloat32)) {
    for (size_t k = 0; k < states.size(); ++k) {
      check_torch(aoti_torch_copy_(made.states[k], states[k].get(), 0), "copy_");
      if (codec == StateCodec::kFloat32) continue;
      if (same_order) {
        copy_elements(made.scales[k], scales[k].get());
      } else {
        check_torch(aoti_torch_copy_(made.scales[k], permuted[k], 0), "copy_");
      }
    }
    return;
  }
  TensorList values;
  if (codec != StateCodec::kFloat32) {
    StateTensors dense;
    for (const Dense& state : states) dense.states.push_back(state.get());
    for (const Dense& scale : scales) dense.scales.push_back(scale.get());
    values = decode_states(op, optimizer, dense, codec, shard);
  }
  TensorList in_order;
  for (size_t k = 0; k < states.size(); ++k) {
    const AtenTensorHandle from = values.empty() ? states[k].get() : values[k].get();
    in_order.push_back(empty(sizes, dense_strides(sizes, order_of(param)), codes().float32, param.device));
    check_torch(aoti_torch_copy_(in_order.back(), from, 0), "copy_");
  }
  if (to.codec == StateCodec::kFloat32) {
    for (size_t k = 0; k < states.size(); ++k) check_torch(aoti_torch_copy_(made.states[k], in_order[k], 0), "copy_");
    return;
  }
  encode_states(op, optimizer, {in_order.begin(), in_order.end()}, made, to.codec, shard);
}

/// Width of a stored correction by its dtype.
MasterWeights width_of(Op op, const std::string& name, int32_t dtype) {
  if (dtype == codes().int8) return MasterWeights::kCorrection8;
  if (dtype == codes().int16) return MasterWeights::kCorrection16;
  op.fail("state 'correction' of " + name + " has dtype " + dtype_name(dtype) + "; allowed are int8 and int16");
}

/// The correction `made` (null: the format keeps none) of `param` from the stored one.
CorrectionFate convert_correction(Op op, const std::string& name, AtenTensorHandle param, const Stored& stored,
                                  Format to, AtenTensorHandle made, Tensor* rewritten) {
  const TensorInfo info = read_dense(op, {"param"}, param);
  const DType now = parse_param_dtype(op, {"param"}, info.dtype), before = stored.correction_of;
  const Dense correction(op, {"correction"}, stored.correction, info.device);
  const TensorInfo saved = read_tensor(op, {"correction"}, correction.get());
  const MasterWeights width = width_of(op, name, saved.dtype);
  if (before == now || before == DType::kFloat32) {
    if (made == nullptr) return CorrectionFate::kDropped;
    if (correction_bits(width) == correction_bits(to.master_weights)) {
      check_torch(aoti_torch_copy_(made, correction.get(), 0), "copy_");
    } else {
      check_torch(aoti_torch_copy_(made, rescaled(op, correction.get(), width, to.master_weights), 0), "copy_");
    }
    return CorrectionFate::kKept;
  }
  // The weight's digits of before, from what they were cast to: they must come back.
  const Tensor narrow = copy_like(param, info, dtype_code(before), info.device);
  if (!equal(copy_like(narrow, info, info.dtype, info.device), param) || now == DType::kBFloat16) {
    return CorrectionFate::kLost;
  }
  Tensor in_order = empty(std::vector<int64_t>(info.sizes, info.sizes + info.dim),
                          std::vector<int64_t>(info.strides, info.strides + info.dim), saved.dtype, info.device);
  check_torch(aoti_torch_copy_(in_order, correction.get(), 0), "copy_");
  const Tensor weights = merge_weights(op, narrow, in_order, width);
  *rewritten = copy_like(param, info, info.dtype, info.device);
  split_weights(op, weights, *rewritten, made, made == nullptr ? MasterWeights::kNone : to.master_weights);
  return CorrectionFate::kMerged;
}

}  // namespace

StateCodec stored_codec(Op op, OptimizerKind optimizer, const StateTensors& stored, const std::string& name) {
  StateCodec found = StateCodec::kFloat32;
  for (size_t k = 0; k < stored.states.size(); ++k) {
    const AtenTensorHandle scale = k < stored.scales.size() ? stored.scales[k] : nullptr;
    const int32_t state = read_tensor(op, {"states", static_cast<int64_t>(k)}, stored.states[k]).dtype;
    const int32_t scales = scale == nullptr ? -1 : read_tensor(op, {"scales", static_cast<int64_t>(k)}, scale).dtype;
    const StateCodec codec = scale == nullptr ? StateCodec::kFloat32 : codec_of_scale(scales);
    const auto slot = static_cast<int>(k);
    const bool is_float = state == codes().float32 || state == codes().bfloat16 || state == codes().float16 ||
                          state == aoti_torch_dtype_float64();
    const bool known =
        scale == nullptr ? is_float : codec != StateCodec::kFloat32 && state == state_dtype(optimizer, slot, codec);
    if (!known) {
      op.fail("state '" + array_name(optimizer, Role::kState, slot, codec) + "' of " + name + " of dtype " +
              dtype_name(state) +
              (scale == nullptr ? " without scales" : " with scales of dtype " + dtype_name(scales)) +
              " is no known format; allowed are floating-point values without scales, 8-bit codes with int16 scales "
              "(state_codec 'default') and with float16 scales (state_codec 'paper')");
    }
    if (k > 0 && codec != found) {
      op.fail("the states of " + name + " are in different formats: " + std::to_string(static_cast<int>(found)) +
              " and " + std::to_string(static_cast<int>(codec)) +
              " (0: float32, 1: paper, 2: default); allowed is one for all");
    }
    found = codec;
  }
  return found;
}

Converted convert(Op op, const std::string& name, OptimizerKind optimizer, bool has_momentum, AtenTensorHandle param,
                  const Stored& stored, Format to, const Shard& shard) {
  const TensorInfo info = read_dense(op, {name.c_str()}, param);
  const std::vector<int64_t> sizes(info.sizes, info.sizes + info.dim);
  const std::vector<ArraySpec> specs = arrays_of(optimizer, has_momentum, to, sizes, order_of(info), shard);
  const auto check_sizes = [&](AtenTensorHandle tensor, const std::string& array) {
    const TensorInfo read = read_tensor(op, {array.c_str()}, tensor);
    if (same_sizes(read, sizes)) return;
    op.fail("state '" + array + "' of " + name + " has shape " + ints(read.sizes, read.dim) +
            "; allowed is the parameter's, " + ints(info.sizes, info.dim));
  };
  for (size_t k = 0; k < stored.arrays.states.size(); ++k) {
    const StateCodec codec = stored.arrays.scales.empty() ? StateCodec::kFloat32 : StateCodec::kDefault;
    check_sizes(stored.arrays.states[k], array_name(optimizer, Role::kState, static_cast<int>(k), codec));
  }
  if (stored.correction != nullptr) check_sizes(stored.correction, "correction");

  Converted converted;
  converted.arrays = new_arrays(op, specs, info.device);
  const TensorList& made = converted.arrays;
  StateTensors arrays;
  AtenTensorHandle correction = nullptr;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].role == Role::kState) arrays.states.push_back(made[i]);
    if (specs[i].role == Role::kScale) arrays.scales.push_back(made[i]);
    if (specs[i].role == Role::kCorrection) correction = made[i];
  }
  if (info.device.type == aoti_torch_device_type_meta()) return converted;
  if (!stored.arrays.states.empty() && stored.arrays.states.size() == arrays.states.size()) {
    convert_states(op, name, optimizer, info, stored.arrays, to, shard, arrays);
  }
  if (stored.correction != nullptr) {
    converted.fate = convert_correction(op, name, param, stored, to, correction, &converted.param);
  }
  return converted;
}

Fit fit(OptimizerKind optimizer, bool has_momentum, AtenTensorHandle param, const Stored& stored, Format format,
        const Shard& shard, const std::string& name, bool on_host) {
  const Op op{"fit"};
  const TensorInfo info = read_tensor(op, {name.c_str()}, param);
  const std::vector<int64_t> sizes(info.sizes, info.sizes + info.dim);
  const bool wants_correction = correction_bits(format.master_weights) != 0;
  const auto slots = static_cast<size_t>(state_count(optimizer, has_momentum));
  if (stored.arrays.states.size() != slots || wants_correction != (stored.correction != nullptr)) return Fit::kNo;
  if (wants_correction && stored.correction_of != DType::kFloat32 &&
      stored.correction_of != parse_param_dtype(op, {"param"}, info.dtype)) {
    return Fit::kNo;
  }
  // All arrays lie in one order: that of the first.
  AtenTensorHandle const first = slots > 0 ? stored.arrays.states[0] : stored.correction;
  const std::string first_name =
      "state '" + array_name(optimizer, slots > 0 ? Role::kState : Role::kCorrection, 0, format.codec) + "' of " + name;
  const TensorInfo like = first == nullptr ? info : read_tensor(op, {first_name.c_str()}, first);
  const StorageOrder order = order_of(like);
  for (const ArraySpec& spec : arrays_of(optimizer, has_momentum, format, sizes, order, shard)) {
    const auto slot = static_cast<size_t>(spec.slot);
    const AtenTensorHandle tensor = spec.role == Role::kState            ? stored.arrays.states[slot]
                                    : spec.role == Role::kCorrection     ? stored.correction
                                    : slot < stored.arrays.scales.size() ? stored.arrays.scales[slot]
                                                                         : nullptr;
    if (tensor == nullptr) return Fit::kNo;
    const std::string array = "state '" + array_name(optimizer, spec.role, spec.slot, format.codec) + "' of " + name;
    const TensorInfo read = read_tensor(op, {array.c_str()}, tensor);
    const bool same_dtype =
        read.dtype == spec.dtype || (spec.role == Role::kScale && accepts_scale_dtype(format.codec, read.dtype));
    const bool is_on_cpu = read.device.type == aoti_torch_device_type_cpu();
    const bool is_in_host_memory = is_on_cpu && is_host_memory(const_data(tensor));
    const bool is_there = on_host ? is_on_cpu && (is_in_host_memory || read.numel == 0)
                                  : read.device == info.device && !is_in_host_memory;
    if (!same_dtype || !is_there || !same_sizes(read, spec.sizes)) return Fit::kNo;
    if (!is_dense(read) || (read.numel != 0 && order_of(read) != order_of_spec(spec))) return Fit::kNo;
  }
  if (format.codec == StateCodec::kFloat32) {
    for (const AtenTensorHandle scale : stored.arrays.scales) {
      if (scale != nullptr) return Fit::kNo;
    }
  }
  return is_dense(info) && order == order_of(info) ? Fit::kYes : Fit::kOwnOrder;
}

}  // namespace flashoptim::store
