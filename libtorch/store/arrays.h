// Memory for states and weights: making, zeroing, converting. Everything works on tensors of any device that this build
// knows, in the order in which their elements lie. Throws std::runtime_error with messages that begin with the operator
// and name the argument; on the device nothing is waited for, but where corrections change their width.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "libtorch/store/format.h"
#include "libtorch/store/tensor.h"

namespace flashoptim::store {

DType parse_param_dtype(Op op, Name name, int32_t dtype);
/// A strided tensor whose elements fill one stretch of memory.
TensorInfo read_dense(Op op, Name name, AtenTensorHandle tensor);
/// Throws where master_weights do not go with the dtype.
void check_master(Op op, Name name, DType dtype, MasterWeights master_weights, Name param);

/// Uninitialized.
Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype, Device device);
/// A copy of the sizes and strides of `like`, in another dtype or on another device, with the values of `from`.
Tensor copy_like(AtenTensorHandle from, const TensorInfo& like, int32_t dtype, Device device);

/// Zeroes dense tensors of one device and any dtypes; on CUDA in one launch.
void zero(Op op, const std::vector<AtenTensorHandle>& tensors);
/// Arrays of zero bytes, which every codec reads as 0: each an allocation of its own, all zeroed together.
TensorList new_arrays(Op op, const std::vector<ArraySpec>& specs, Device device);

/// fp32 master weights, of the parameter's sizes and strides. correction: null where master_weights has none.
Tensor merge_weights(Op op, AtenTensorHandle param, AtenTensorHandle correction, MasterWeights master_weights);
/// Nearest parameter and correction for fp32 weights of the parameter's sizes and strides.
void split_weights(Op op, AtenTensorHandle weights, AtenTensorHandle param, AtenTensorHandle correction,
                   MasterWeights master_weights);

/// The codes (or fp32 values) and scales of one parameter: one per slot; scales empty or null where states are fp32.
struct StateTensors {
  std::vector<AtenTensorHandle> states, scales;
};

/// How a state of these sizes is grouped, as the sizes of its scales tell: scale_sizes_of()'s, or, of a parameter that
/// is no shard, state format 1's [rows, groups] of RowRule::kFirstDimension. Throws for others; `name` is the scales'.
GroupLayout stored_layout(Op op, const std::string& name, const std::vector<int64_t>& sizes, const StorageOrder& order,
                          const Shard& shard, const TensorInfo& scale);

/// fp32 values of every slot, of the states' sizes and strides.
TensorList decode_states(Op op, OptimizerKind optimizer, const StateTensors& stored, StateCodec codec,
                         const Shard& shard = {});
/// Codes and scales from fp32 values of the states' sizes and strides, rounded to nearest.
void encode_states(Op op, OptimizerKind optimizer, const std::vector<AtenTensorHandle>& values,
                   const StateTensors& stored, StateCodec codec, const Shard& shard = {});

/// The codec that a parameter's states are in, from their dtypes; throws std::runtime_error for a mixture or an unknown
/// one. `name` stands for the parameter.
StateCodec stored_codec(Op op, OptimizerKind optimizer, const StateTensors& stored, const std::string& name);

/// What is stored for one parameter, as a checkpoint or an earlier format holds it; on any device.
struct Stored {
  StateTensors arrays;                    ///< empty: no state yet, zeros
  AtenTensorHandle correction = nullptr;  ///< null: none
  DType correction_of = DType::kFloat32;  ///< dtype of the parameter that the correction belongs to
};

/// What became of a correction.
enum class CorrectionFate : int64_t {
  kNone = 0,     ///< there was none
  kKept = 1,     ///< as it was, or in another width
  kMerged = 2,   ///< the parameter changed its dtype: parameter and correction were made anew from the master weight
  kDropped = 3,  ///< the format keeps none
  kLost = 4,     ///< the parameter's digits that it belongs to are gone: zeros, or nothing, in its place
};

/// A state in another format.
struct Converted {
  TensorList arrays;  ///< in arrays_of()'s order
  Tensor param;       ///< kMerged: the parameter's new values, for the caller to copy into it
  CorrectionFate fate = CorrectionFate::kNone;
};

/// What `to` wants for `param`, from what is stored. The same bytes where codec and storage order are the same;
/// otherwise through fp32, rounded to nearest. Where the parameter has changed its dtype since, its values are taken to
/// be those of before in the new dtype, and looked at (kMerged, kLost). Changes nothing but what it returns. `name`
/// stands for the parameter in messages.
Converted convert(Op op, const std::string& name, OptimizerKind optimizer, bool has_momentum, AtenTensorHandle param,
                  const Stored& stored, Format to, const Shard& shard = {});

/// Whether a step can run on what is stored as it is. `name` stands for the parameter in messages, of storages that are
/// too small. `on_host`: its arrays must be in host_arrays()' memory, wherever the parameter is.
enum class Fit : int64_t {
  kNo = 0,        ///< it must be converted
  kYes = 1,       ///< and lies as the parameter does
  kOwnOrder = 2,  ///< in a storage order of its own: the parameter must be copied to be stepped
};
Fit fit(OptimizerKind optimizer, bool has_momentum, AtenTensorHandle param, const Stored& stored, Format format,
        const Shard& shard = {}, const std::string& name = "param", bool on_host = false);

}  // namespace flashoptim::store
