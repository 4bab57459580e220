#include "libtorch/store/arrays.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "flashoptim/cuda.h"

namespace flashoptim::store {
namespace {

/// Elements of one slice of a conversion, and how many of them are worth a thread.
constexpr int64_t kSliceElements = 64 * 512;

/// Pointer to element `first` of an array of elements of `bytes` bytes; null stays null.
void* advance(void* data, int64_t first, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + first * bytes;
}

int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

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

/// A parameter and its correction, checked.
struct Weight {
  Backend backend;
  DType dtype;
  TensorInfo param;
  void* correction = nullptr;
};

Weight read_weight(Op op, AtenTensorHandle param, AtenTensorHandle correction, MasterWeights master_weights) {
  Weight weight;
  const Name name{"param"};
  weight.param = read_dense(op, name, param);
  weight.backend = select_backend(op.name, "param", weight.param.device);
  weight.dtype = parse_param_dtype(op, name, weight.param.dtype);
  check_master(op, {"master_weights"}, weight.dtype, master_weights, name);
  const int32_t wanted = correction_dtype(master_weights);
  if (wanted >= 0) {
    if (correction == nullptr) {
      op.fail("correction is None; master_weights = " + std::to_string(static_cast<int>(master_weights)) +
              " needs one");
    }
    const Name correction_name{"correction"};
    const TensorInfo info = read_tensor(op, correction_name, correction);
    check_dtype(op, correction_name, info.dtype, wanted, "its master_weights");
    check_like(op, correction_name, info, name, weight.param);
    if (weight.backend != Backend::kMeta) weight.correction = mutable_data(correction);
  }
  if (weight.backend != Backend::kMeta) weight.param.data = mutable_data(param);
  return weight;
}

/// An fp32 tensor of the sizes and element order of `like`.
TensorInfo read_values(Op op, Name name, AtenTensorHandle tensor, Name like_name, const TensorInfo& like) {
  TensorInfo info = read_tensor(op, name, tensor);
  check_dtype(op, name, info.dtype, codes().float32, "this argument");
  check_like(op, name, info, like_name, like);
  if (info.device.type != aoti_torch_device_type_meta()) info.data = const_cast<void*>(const_data(tensor));
  return info;
}

/// States and scales of one parameter, checked.
struct States {
  Backend backend = Backend::kCpu;
  bool has_momentum = false;
  ParameterTensors tensor;
  std::vector<TensorInfo> infos;  // of the states
};

States read_states(Op op, OptimizerKind optimizer, const StateTensors& stored, StateCodec codec, const Shard& shard) {
  States states;
  const auto slots = static_cast<int>(stored.states.size());
  states.has_momentum = slots == state_count(optimizer, true);
  if (!states.has_momentum && slots != state_count(optimizer, false)) {
    op.fail("states has " + std::to_string(slots) + " tensors; needed are " +
            std::to_string(state_count(optimizer, true)) + ", one per slot of the optimizer");
  }
  const bool quantized = codec != StateCodec::kFloat32;
  if (quantized && stored.scales.size() != stored.states.size()) {
    op.fail("scales has " + std::to_string(stored.scales.size()) + " tensors; needed are " + std::to_string(slots) +
            ", one per tensor of states");
  }
  states.tensor.state_codec = codec;
  std::vector<int64_t> sizes;
  StorageOrder order;
  for (int k = 0; k < slots; ++k) {
    const auto at = static_cast<size_t>(k);
    const Name name{"states", k}, scale_name{"scales", k};
    const TensorInfo info = read_dense(op, name, stored.states[at]);
    if (k == 0) {
      states.backend = select_backend(op.name, "states[0]", info.device);
      sizes.assign(info.sizes, info.sizes + info.dim);
      order = storage_order(info.sizes, info.strides, info.dim);
      states.tensor.layout = layout_of(sizes, order, shard);
    } else {
      check_like(op, name, info, {"states", 0}, states.infos[0]);
    }
    check_dtype(op, name, info.dtype, state_dtype(optimizer, k, codec), "its state codec");
    states.infos.push_back(info);
    const bool is_meta = states.backend == Backend::kMeta;
    if (!is_meta) states.tensor.states[k] = mutable_data(stored.states[at]);
    if (!quantized) continue;
    const TensorInfo scale = read_tensor(op, scale_name, stored.scales[at]);
    if (!accepts_scale_dtype(codec, scale.dtype)) {
      op.fail(scale_name.str() + " has dtype " + dtype_name(scale.dtype) + "; its state codec needs " +
              dtype_name(scale_dtype(codec)));
    }
    const GroupLayout layout = stored_layout(op, scale_name.str(), sizes, order, shard, scale);
    if (k == 0) states.tensor.layout = layout;
    if (!(layout == states.tensor.layout)) {
      op.fail(scale_name.str() + " has shape " + ints(scale.sizes, scale.dim) + ", unlike the scales of states[0]");
    }
    check_contiguous(op, scale_name, scale);
    check_device(op, scale_name, scale.device, name, info.device);
    if (!is_meta) states.tensor.scales[k] = mutable_data(stored.scales[at]);
  }
  return states;
}

}  // namespace

DType parse_param_dtype(Op op, Name name, int32_t dtype) {
  const DtypeCodes& c = codes();
  if (dtype == c.bfloat16) return DType::kBFloat16;
  if (dtype == c.float32) return DType::kFloat32;
  if (dtype == c.float16) return DType::kFloat16;
  op.fail(name.str() + " has dtype " + dtype_name(dtype) + "; allowed are float32, bfloat16, float16");
}

TensorInfo read_dense(Op op, Name name, AtenTensorHandle tensor) {
  const TensorInfo info = read_tensor(op, name, tensor);
  if (!is_dense(info)) {
    op.fail(name.str() + " has shape " + ints(info.sizes, info.dim) + " and strides " + ints(info.strides, info.dim) +
            "; its elements must fill their memory without gaps or overlap (dense)");
  }
  return info;
}

GroupLayout stored_layout(Op op, const std::string& name, const std::vector<int64_t>& sizes, const StorageOrder& order,
                          const Shard& shard, const TensorInfo& scale) {
  const std::vector<int64_t> found(scale.sizes, scale.sizes + scale.dim), wanted = scale_sizes_of(sizes, order, shard);
  if (found == wanted) return layout_of(sizes, order, shard);
  if (!shard.is_set()) {
    const GroupLayout old = format1_layout_of(sizes, order);
    if (found == std::vector<int64_t>{old.rows, old.groups_per_row()}) return old;
  }
  const auto dim = static_cast<int64_t>(sizes.size());
  op.fail(name + " has shape " + ints(scale.sizes, scale.dim) + "; allowed for codes of shape " +
          ints(sizes.data(), dim) + " is " + ints(wanted.data(), static_cast<int64_t>(wanted.size())));
}

void check_master(Op op, Name name, DType dtype, MasterWeights master_weights, Name param) {
  if (dtype == DType::kFloat32 && master_weights != MasterWeights::kNone) {
    op.fail(name.str() + " = " + std::to_string(static_cast<int>(master_weights)) + " for the float32 " + param.str() +
            ", which has no bits to correct; allowed is 0 (none)");
  }
}

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype, Device device) {
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                       device.type, device.index, &handle),
              "empty_strided");
  return Tensor(handle);
}

Tensor copy_like(AtenTensorHandle from, const TensorInfo& like, int32_t dtype, Device device) {
  Tensor copy = empty(std::vector<int64_t>(like.sizes, like.sizes + like.dim),
                      std::vector<int64_t>(like.strides, like.strides + like.dim), dtype, device);
  check_torch(aoti_torch_copy_(copy, from, /*non_blocking=*/0), "copy_");
  return copy;
}

void zero(Op op, const std::vector<AtenTensorHandle>& tensors) {
  std::vector<void*> arrays;
  std::vector<int64_t> bytes;
  Device device;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name name{"tensors", static_cast<int64_t>(i)};
    const TensorInfo info = read_dense(op, name, tensors[i]);
    if (i == 0) device = info.device;
    check_device(op, name, info.device, {"tensors", 0}, device);
    bytes.push_back(info.numel * static_cast<int64_t>(aoti_torch_dtype_element_size(info.dtype)));
  }
  if (tensors.empty()) return;
  const Backend backend = select_backend(op.name, "tensors[0]", device);
  if (backend == Backend::kMeta) return;
  for (const AtenTensorHandle tensor : tensors) arrays.push_back(mutable_data(tensor));
#if FLASHOPTIM_HAS_CUDA
  if (backend == Backend::kCuda) {
    const auto count = static_cast<int64_t>(arrays.size());
    return op.check(cuda::zero(arrays.data(), bytes.data(), count, device.index, current_stream(device)));
  }
#endif
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (bytes[i] != 0) std::memset(arrays[i], 0, static_cast<size_t>(bytes[i]));
  }
}

TensorList new_arrays(Op op, const std::vector<ArraySpec>& specs, Device device) {
  TensorList made;
  for (const ArraySpec& spec : specs) made.push_back(empty(spec.sizes, spec.strides, spec.dtype, device));
  zero(op, {made.begin(), made.end()});
  return made;
}

Tensor merge_weights(Op op, AtenTensorHandle param, AtenTensorHandle correction, MasterWeights master_weights) {
  const Weight weight = read_weight(op, param, correction, master_weights);
  const TensorInfo& info = weight.param;
  Tensor merged = empty(std::vector<int64_t>(info.sizes, info.sizes + info.dim),
                        std::vector<int64_t>(info.strides, info.strides + info.dim), codes().float32, info.device);
  if (weight.backend == Backend::kMeta) return merged;
  auto* const to = static_cast<float*>(mutable_data(merged));
#if FLASHOPTIM_HAS_CUDA
  if (weight.backend == Backend::kCuda) {
    op.check(cuda::merge_weights(weight.dtype, master_weights, info.data, weight.correction, to, info.numel,
                                 info.device.index, current_stream(info.device)));
    return merged;
  }
#endif
  const int64_t bytes = correction_bits(master_weights) / 8;
  convert_slices(op, info.numel, [&](int64_t first, int64_t count) {
    return flashoptim::merge_weights(weight.dtype, master_weights, advance(info.data, first, dtype_bytes(weight.dtype)),
                                     advance(weight.correction, first, bytes), to + first, count);
  });
  return merged;
}

void split_weights(Op op, AtenTensorHandle weights, AtenTensorHandle param, AtenTensorHandle correction,
                   MasterWeights master_weights) {
  const Weight weight = read_weight(op, param, correction, master_weights);
  const TensorInfo& info = weight.param;
  const TensorInfo values = read_values(op, {"weights"}, weights, {"param"}, info);
  if (weight.backend == Backend::kMeta) return;
  const auto* const from = static_cast<const float*>(values.data);
#if FLASHOPTIM_HAS_CUDA
  if (weight.backend == Backend::kCuda) {
    return op.check(cuda::split_weights(weight.dtype, master_weights, from, info.data, weight.correction, info.numel,
                                        info.device.index, current_stream(info.device)));
  }
#endif
  const int64_t bytes = correction_bits(master_weights) / 8;
  convert_slices(op, info.numel, [&](int64_t first, int64_t count) {
    return flashoptim::split_weights(weight.dtype, master_weights, from + first,
                                     advance(info.data, first, dtype_bytes(weight.dtype)),
                                     advance(weight.correction, first, bytes), count);
  });
}

TensorList decode_states(Op op, OptimizerKind optimizer, const StateTensors& stored, StateCodec codec,
                         const Shard& shard) {
  const States states = read_states(op, optimizer, stored, codec, shard);
  TensorList values;
  float* to[kMaxSlots] = {};
  for (size_t k = 0; k < states.infos.size(); ++k) {
    const TensorInfo& info = states.infos[k];
    values.push_back(empty(std::vector<int64_t>(info.sizes, info.sizes + info.dim),
                           std::vector<int64_t>(info.strides, info.strides + info.dim), codes().float32, info.device));
    if (states.backend != Backend::kMeta) to[k] = static_cast<float*>(mutable_data(values[k]));
  }
  if (states.backend == Backend::kMeta || values.empty()) return values;
#if FLASHOPTIM_HAS_CUDA
  if (states.backend == Backend::kCuda) {
    const Device device = states.infos[0].device;
    op.check(
        cuda::decode_states(optimizer, states.has_momentum, states.tensor, to, device.index, current_stream(device)));
    return values;
  }
#endif
  convert_state_slices(op, states.tensor, [&](const ParameterTensors& slice, int64_t first) {
    float* slice_to[kMaxSlots];
    for (int k = 0; k < kMaxSlots; ++k) slice_to[k] = to[k] == nullptr ? nullptr : to[k] + first;
    return flashoptim::decode_states(optimizer, states.has_momentum, slice, slice_to);
  });
  return values;
}

void encode_states(Op op, OptimizerKind optimizer, const std::vector<AtenTensorHandle>& values,
                   const StateTensors& stored, StateCodec codec, const Shard& shard) {
  const States states = read_states(op, optimizer, stored, codec, shard);
  if (values.size() != stored.states.size()) {
    op.fail("values has " + std::to_string(values.size()) + " tensors; needed are " +
            std::to_string(stored.states.size()) + ", one per tensor of states");
  }
  const float* from[kMaxSlots] = {};
  for (size_t k = 0; k < values.size(); ++k) {
    const auto index = static_cast<int64_t>(k);
    from[k] = static_cast<const float*>(
        read_values(op, {"values", index}, values[k], {"states", index}, states.infos[k]).data);
  }
  if (states.backend == Backend::kMeta || values.empty()) return;
#if FLASHOPTIM_HAS_CUDA
  if (states.backend == Backend::kCuda) {
    const Device device = states.infos[0].device;
    return op.check(
        cuda::encode_states(optimizer, states.has_momentum, states.tensor, from, device.index, current_stream(device)));
  }
#endif
  convert_state_slices(op, states.tensor, [&](const ParameterTensors& slice, int64_t first) {
    const float* slice_from[kMaxSlots];
    for (int k = 0; k < kMaxSlots; ++k) slice_from[k] = from[k] == nullptr ? nullptr : from[k] + first;
    return flashoptim::encode_states(optimizer, states.has_momentum, slice, slice_from);
  });
}

}  // namespace flashoptim::store
