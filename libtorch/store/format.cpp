#include "libtorch/store/format.h"

#include <algorithm>
#include <numeric>

#include "libtorch/store/tensor.h"

namespace flashoptim::store {

Format format_of(DType dtype, const std::vector<int64_t>& whole_sizes, const FormatOptions& options) {
  int64_t whole_numel = 1;
  for (const int64_t size : whole_sizes) whole_numel *= size;
  int64_t least = options.min_quantized_numel;
  if (least != 0 && leading_dimensions(whole_sizes) == 0) least = std::max(least, kMinFlatNumel);
  const bool is_paper = options.codec == StateCodec::kPaper;
  Format format;
  if (options.quantize && whole_numel >= least) format.codec = options.codec;
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

namespace {

std::vector<int64_t> in_order(const std::vector<int64_t>& sizes, const StorageOrder& order) {
  if (order.empty()) return sizes;
  std::vector<int64_t> taken(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) taken[i] = sizes[static_cast<size_t>(order[i])];
  return taken;
}

}  // namespace

int64_t leading_dimensions(const std::vector<int64_t>& sizes) {
  int64_t row = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    row *= sizes[d];
    if (row >= kGroupSize) return static_cast<int64_t>(d);
  }
  return 0;
}

Status shard_of_box(const std::vector<int64_t>& whole_sizes, const std::vector<int64_t>& offsets,
                    const std::vector<int64_t>& sizes, Shard* shard) {
  if (offsets.size() != whole_sizes.size() || sizes.size() != whole_sizes.size()) {
    return Status::invalid_argument("a box of " + std::to_string(offsets.size()) + " offsets and " +
                                    std::to_string(sizes.size()) + " sizes in a whole of " +
                                    std::to_string(whole_sizes.size()) + " dimensions; all must be equal");
  }
  shard->leading = leading_dimensions(whole_sizes);
  return place_of_box(whole_sizes.data(), offsets.data(), sizes.data(), static_cast<int64_t>(sizes.size()),
                      RowRule::kShortest, &shard->place);
}

GroupLayout layout_of(const std::vector<int64_t>& sizes, const StorageOrder& order, const Shard& shard) {
  if (shard.is_set()) {
    int64_t numel = 1;
    for (const int64_t size : sizes) numel *= size;
    return shard_layout(shard.place, numel);
  }
  const std::vector<int64_t> taken = in_order(sizes, order);
  return group_layout(taken.data(), static_cast<int64_t>(taken.size()), RowRule::kShortest);
}

GroupLayout format1_layout_of(const std::vector<int64_t>& sizes, const StorageOrder& order) {
  const std::vector<int64_t> taken = in_order(sizes, order);
  return group_layout(taken.data(), static_cast<int64_t>(taken.size()), RowRule::kFirstDimension);
}

std::vector<int64_t> scale_sizes_of(const std::vector<int64_t>& sizes, const StorageOrder& order, const Shard& shard) {
  const std::vector<int64_t> taken = in_order(sizes, order);
  const auto leading = static_cast<size_t>(shard.is_set() ? shard.leading : leading_dimensions(taken));
  std::vector<int64_t> scale_sizes(taken.begin(), taken.begin() + static_cast<std::ptrdiff_t>(leading));
  int64_t row = 1;
  for (size_t d = leading; d < taken.size(); ++d) row *= taken[d];
  scale_sizes.push_back((row + kGroupSize - 1) / kGroupSize);
  return scale_sizes;
}

std::vector<ArraySpec> arrays_of(OptimizerKind optimizer, bool has_momentum, Format format,
                                 const std::vector<int64_t>& sizes, const StorageOrder& order, const Shard& shard) {
  const std::vector<int64_t> strides = dense_strides(sizes, order);
  const std::vector<int64_t> scale_sizes = scale_sizes_of(sizes, order, shard);
  std::vector<ArraySpec> arrays;
  for (int slot = 0; slot < state_count(optimizer, has_momentum); ++slot) {
    arrays.push_back({Role::kState, slot, state_dtype(optimizer, slot, format.codec), sizes, strides});
    if (format.codec == StateCodec::kFloat32) continue;
    arrays.push_back({Role::kScale, slot, scale_dtype(format.codec), scale_sizes, dense_strides(scale_sizes, {})});
  }
  if (correction_bits(format.master_weights) != 0) {
    arrays.push_back({Role::kCorrection, 0, correction_dtype(format.master_weights), sizes, strides});
  }
  return arrays;
}

int slot_count(OptimizerKind optimizer, bool has_momentum) { return state_count(optimizer, has_momentum); }

std::string array_name(OptimizerKind optimizer, Role role, int slot, StateCodec codec) {
  if (role == Role::kCorrection) return "correction";
  std::string name = state_slot(optimizer, slot).name;
  if (role == Role::kScale) return name + "_scale";
  return codec == StateCodec::kFloat32 ? name : name + "_codes";
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
