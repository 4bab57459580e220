#include "libtorch/store/format.h"

#include <algorithm>
#include <numeric>

#include "libtorch/store/tensor.h"

namespace flashoptim::store {

Format format_of(DType dtype, int64_t whole_numel, const FormatOptions& options) {
  const bool is_paper = options.codec == StateCodec::kPaper;
  Format format;
  if (options.quantize && whole_numel >= options.min_quantized_numel) format.codec = options.codec;
  if (dtype == DType::kFloat32) return format;
  switch (options.master_weight_bits) {
    case 24:
      format.master_weights = is_paper ? MasterWeights::kCorrection8Nearest : MasterWeights::kCorrection8;
      break;
    case 32:
      format.master_weights = is_paper ? MasterWeights::kCorrection16Nearest : MasterWeights::kCorrection16;
      break;
    default:
      if (options.stochastic_rounding) format.master_weights = MasterWeights::kNoneStochastic;
  }
  return format;
}

int correction_bits(MasterWeights master_weights) {
  switch (master_weights) {
    case MasterWeights::kCorrection8:
    case MasterWeights::kCorrection8Nearest:
      return 8;
    case MasterWeights::kCorrection16:
    case MasterWeights::kCorrection16Nearest:
      return 16;
    case MasterWeights::kNone:
    case MasterWeights::kNoneStochastic:
      break;
  }
  return 0;
}

StorageOrder storage_order(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  int64_t expected = 1, numel = 1;
  bool is_contiguous = true;
  for (int64_t d = dim - 1; d >= 0; --d) {
    numel *= sizes[d];
    if (sizes[d] == 1) continue;
    is_contiguous = is_contiguous && strides[d] == expected;
    expected *= sizes[d];
  }
  if (is_contiguous || numel == 0) return {};
  StorageOrder order(static_cast<size_t>(dim));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const StorageOrder& order) {
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    const size_t d = order.empty() ? i : static_cast<size_t>(order[i]);
    strides[d] = next;
    next *= std::max<int64_t>(1, sizes[d]);
  }
  return strides;
}

GroupLayout layout_of(const std::vector<int64_t>& sizes, const StorageOrder& order, const Place& place) {
  if (place.whole.numel() != 0) {
    int64_t numel = 1;
    for (const int64_t size : sizes) numel *= size;
    return shard_layout(place, numel);
  }
  if (order.empty()) return group_layout(sizes.data(), static_cast<int64_t>(sizes.size()));
  std::vector<int64_t> in_order(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) in_order[i] = sizes[static_cast<size_t>(order[i])];
  return group_layout(in_order.data(), static_cast<int64_t>(in_order.size()));
}

std::vector<ArraySpec> arrays_of(OptimizerKind optimizer, bool has_momentum, Format format,
                                 const std::vector<int64_t>& sizes, const StorageOrder& order, const Place& place) {
  const std::vector<int64_t> strides = dense_strides(sizes, order);
  const GroupLayout layout = layout_of(sizes, order, place);
  std::vector<ArraySpec> arrays;
  for (int slot = 0; slot < state_count(optimizer, has_momentum); ++slot) {
    arrays.push_back({Role::kState, slot, state_dtype(optimizer, slot, format.codec), sizes, strides});
    if (format.codec == StateCodec::kFloat32) continue;
    const std::vector<int64_t> scale_sizes = {layout.rows, layout.groups_per_row()};
    arrays.push_back({Role::kScale, slot, scale_dtype(format.codec), scale_sizes, dense_strides(scale_sizes, {})});
  }
  if (correction_bits(format.master_weights) != 0) {
    arrays.push_back({Role::kCorrection, 0, correction_dtype(format.master_weights), sizes, strides});
  }
  return arrays;
}

std::string array_name(OptimizerKind optimizer, Role role, int slot) {
  if (role == Role::kCorrection) return "correction";
  std::string name = state_slot(optimizer, slot).name;
  return role == Role::kScale ? name + "_scale" : name;
}

int32_t state_dtype(OptimizerKind optimizer, int slot, StateCodec codec) {
  if (codec == StateCodec::kFloat32) return codes().float32;
  return state_slot(optimizer, slot).int8_codes(codec) ? codes().int8 : codes().uint8;
}

int32_t scale_dtype(StateCodec codec) { return codec == StateCodec::kPaper ? codes().float16 : codes().int16; }

bool accepts_scale_dtype(StateCodec codec, int32_t dtype) {
  if (codec == StateCodec::kFloat32) return false;
  return dtype == scale_dtype(codec) || dtype == codes().int16 || dtype == codes().uint16;
}

int32_t correction_dtype(MasterWeights master_weights) {
  switch (correction_bits(master_weights)) {
    case 8:
      return codes().int8;
    case 16:
      return codes().int16;
    default:
      return -1;
  }
}

StateCodec codec_of_scale(int32_t dtype) {
  if (dtype == codes().float16) return StateCodec::kPaper;
  return dtype == codes().int16 ? StateCodec::kDefault : StateCodec::kFloat32;
}

}  // namespace flashoptim::store
