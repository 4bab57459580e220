// What is stored for a parameter, and how it lies in memory: the policy of both front ends. No tensors here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flashoptim/step.h"

namespace flashoptim::store {

/// A group's options about formats.
struct FormatOptions {
  bool quantize = true;
  StateCodec codec = StateCodec::kDefault;  ///< of quantized states
  int64_t master_weight_bits = 24;          ///< 24, 32, or 0: no correction
  bool stochastic_rounding = false;         ///< of weights without correction
  int64_t min_quantized_numel = 4096;       ///< parameters of fewer elements, of the whole, keep fp32 states
};

/// Parameters whose rows are shorter than a group are grouped across rows, so that shards could not be cut between
/// rows. They keep fp32 states below this many elements of the whole, sharded or not (unless min_quantized_numel is 0).
inline constexpr int64_t kMinFlatNumel = int64_t{1} << 20;

/// How one parameter's weight and states are stored.
struct Format {
  MasterWeights master_weights = MasterWeights::kNone;
  StateCodec codec = StateCodec::kFloat32;
  bool operator==(const Format&) const = default;
};

/// What a group's options mean for a parameter of these sizes, those of the whole where it is a shard. A paper's codec
/// comes with the paper's rounding of corrections.
Format format_of(DType dtype, const std::vector<int64_t>& whole_sizes, const FormatOptions& options);

/// 0, 8 or 16.
int correction_bits(MasterWeights master_weights);

/// The dimensions from the outermost in memory to the innermost; empty: in their own order.
using StorageOrder = std::vector<int64_t>;

/// The order of a tensor of these sizes and strides, larger strides first; dimensions of one element stand anywhere.
StorageOrder storage_order(const int64_t* sizes, const int64_t* strides, int64_t dim);
/// Strides of a dense tensor of these sizes that lies in `order`.
std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const StorageOrder& order);

/// Dimensions before those that form a row, RowRule::kShortest: 0 where the whole tensor is one row (1-D, or rows
/// shorter than a group, which are then taken together).
int64_t leading_dimensions(const std::vector<int64_t>& sizes);

/// Where a local tensor lies in the parameter that it is a shard of.
struct Shard {
  Place place;
  int64_t leading = 0;  ///< leading_dimensions() of the whole
  bool is_set() const { return place.whole.numel() != 0; }
};
/// Of the box [offsets, offsets + sizes) of a parameter of `whole_sizes`.
Status shard_of_box(const std::vector<int64_t>& whole_sizes, const std::vector<int64_t>& offsets,
                    const std::vector<int64_t>& sizes, Shard* shard);

/// Rows and groups run along memory: the layout of `sizes` taken in `order`.
/// That of a shard is its whole's; it lies in its dimensions' own order.
GroupLayout layout_of(const std::vector<int64_t>& sizes, const StorageOrder& order, const Shard& shard = {});
/// The same by state format 1, of what is no shard.
GroupLayout format1_layout_of(const std::vector<int64_t>& sizes, const StorageOrder& order);

/// Of the scales: the leading dimensions, then groups. Taken in `order`.
std::vector<int64_t> scale_sizes_of(const std::vector<int64_t>& sizes, const StorageOrder& order,
                                    const Shard& shard = {});

/// What an array of a parameter's state is.
enum class Role : int32_t { kState = 0, kScale = 1, kCorrection = 2 };

/// One array of a state, before there is memory for it.
struct ArraySpec {
  Role role;
  int slot;       ///< of kState and kScale
  int32_t dtype;  ///< torch's code
  std::vector<int64_t> sizes, strides;
};

/// The arrays that a parameter's state consists of: slot by slot codes (or fp32 values) and scale, then the correction.
std::vector<ArraySpec> arrays_of(OptimizerKind optimizer, bool has_momentum, Format format,
                                 const std::vector<int64_t>& sizes, const StorageOrder& order, const Shard& shard = {});

/// How many slots a parameter of the optimizer has.
int slot_count(OptimizerKind optimizer, bool has_momentum);
/// Name in `state[p]`: "exp_avg" (fp32 values), "exp_avg_codes", "exp_avg_scale", "correction". Codes have a name that
/// torch's own optimizers do not know: they would take them for values.
std::string array_name(OptimizerKind optimizer, Role role, int slot, StateCodec codec);

int32_t state_dtype(OptimizerKind optimizer, int slot, StateCodec codec);
/// Of the scales that are made; an equal number of bytes under another name is read as well (accepts_scale_dtype).
int32_t scale_dtype(StateCodec codec);
bool accepts_scale_dtype(StateCodec codec, int32_t dtype);
/// -1 where there is no correction.
int32_t correction_dtype(MasterWeights master_weights);

/// The codec that scales of this dtype belong to; kFloat32 where none does.
StateCodec codec_of_scale(int32_t dtype);

}  // namespace flashoptim::store
