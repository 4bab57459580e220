// The torch-free entry: describe the tensors once (Plan), then step them.
//
//   flashoptim::Plan plan;
//   flashoptim::Status status = flashoptim::Plan::make(flashoptim::OptimizerKind::kAdamW, tensors, count, &plan);
//   ...
//   flashoptim::Hyperparameters hyper;  hyper.step = t;
//   status = plan.step(&hyper, 1);
//
// Plan::make validates and allocates; step() allocates nothing, prints nothing and never exits. Memory stays the
// caller's. A plan holds raw pointers: it is valid while they are.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "flashoptim/optimizer_info.h"
#include "flashoptim/telemetry.h"
#include "flashoptim/types.h"

namespace flashoptim {

/// How a tensor falls into groups: `rows` rows of `row_size` elements, each row cut into groups of 32, the last of a
/// row possibly shorter. Scales have shape [rows, groups_per_row].
struct GroupLayout {
  int64_t rows = 0;
  int64_t row_size = 0;
  int64_t groups_per_row() const { return (row_size + kGroupSize - 1) / kGroupSize; }
  int64_t groups() const { return rows * groups_per_row(); }
  int64_t numel() const { return rows * row_size; }
};

/// Layout of a tensor of shape [d0, ...]: d0 rows of numel / d0 elements; flat (one row) for 1-D tensors and for rows
/// shorter than 32. `sizes` has `dimensions` entries, all >= 0.
GroupLayout group_layout(const int64_t* sizes, int64_t dimensions);

/// One parameter and everything that is stored for it. All arrays are contiguous in element order, of any alignment.
struct ParameterTensors {
  void* parameter = nullptr;       ///< [numel] of parameter_dtype, read and written
  const void* gradient = nullptr;  ///< [numel] of gradient_dtype; null: this parameter is skipped by step()
  void* correction = nullptr;      ///< [numel] int8 or int16 as master_weights says, else null
  /// Slot k of the optimizer: fp32 [numel] for StateCodec::kFloat32, else one byte per element. Null where unused.
  void* states[kMaxSlots] = {};
  /// 16-bit headers [rows, groups_per_row] of the quantized slots.
  void* scales[kMaxSlots] = {};
  GroupLayout layout;
  /// Flat index of the first element in the whole tensor, where this is a shard of it (dither depends on it).
  int64_t first_element = 0;
  DType parameter_dtype = DType::kFloat32;
  DType gradient_dtype = DType::kFloat32;
  MasterWeights master_weights = MasterWeights::kNone;
  StateCodec state_codec = StateCodec::kFloat32;
  /// Which of step()'s hyperparameters apply.
  int32_t hyper_index = 0;
};

/// Runs body(context, begin, end) over disjoint ranges that cover [0, count), on as many threads as it likes, and
/// returns when all calls have. A call that has done its range may do parts of ranges whose calls have not come yet, or
/// take longer.
using ParallelFor = void (*)(void* user, int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);

struct StepOptions {
  /// Gradients are multiplied by this (an inverse loss scale, a clipping coefficient).
  float gradient_scale = 1.0f;
  /// Set and non-zero: the step changes nothing.
  const float* found_inf = nullptr;
  /// Where set, the number of elements with NaN or infinite gradients is added to it.
  int64_t* nonfinite_gradients = nullptr;
  /// Null: OpenMP's threads for large plans, in a build with OpenMP; otherwise the calling thread alone.
  ParallelFor parallel_for = nullptr;
  void* parallel_for_user = nullptr;
};

class Plan {
 public:
  Plan();
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  /// Checks every tensor and prepares a step over all of them. kInvalidArgument or kUnsupported with a message that
  /// names the tensor, the field, its value and what is allowed; *plan is unchanged then.
  static Status make(OptimizerKind optimizer, bool has_momentum, const ParameterTensors* tensors, int64_t count,
                     Plan* plan);

  int64_t size() const;
  const ParameterTensors& tensor(int64_t index) const;

  /// New gradient address for one tensor (null skips it). No allocation.
  Status set_gradient(int64_t index, const void* gradient);
  /// Which hyperparameters apply to one tensor from now on.
  Status set_hyper_index(int64_t index, int32_t hyper_index);

  /// One step over all tensors. `hypers` has `count` entries, indexed by ParameterTensors::hyper_index.
  Status step(const Hyperparameters* hypers, int64_t count, const StepOptions& options = {});

  /// What step() with the same arguments would do now, counted without doing it: changes no tensor. Entry i of
  /// `telemetry`, which has size() entries, is that of tensor i; counts are added to it, the ratio becomes the larger
  /// of both. Nothing is added for a tensor without gradient or a step that found_inf skips;
  /// options.nonfinite_gradients is left alone. Errors are those of step(), a null `telemetry` and a stride below 1. No
  /// allocation.
  Status inspect(const Hyperparameters* hypers, int64_t count, const StepOptions& options,
                 const InspectOptions& inspect_options, StepTelemetry* telemetry);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Name of the instruction set that CPU steps use: "scalar", "avx2", "avx512" (F, BW, DQ, VL) or "avx512_bf16" (and
/// VBMI, BF16). Chosen once from the processor, or by the environment variable FLASHOPTIM_ISA; kUnsupported when that
/// names one this machine lacks or is no name.
Status cpu_isa(const char** name);

// Element-wise conversions, the ones the step uses, for checkpoints, export and inspection. `count` elements.

/// fp32 master weights from parameter and correction (null where master_weights has none).
Status merge_weights(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                     float* weights, int64_t count);
/// Nearest parameter and correction for fp32 weights.
Status split_weights(DType dtype, MasterWeights master_weights, const float* weights, void* parameter, void* correction,
                     int64_t count);

/// fp32 values of every slot of one tensor, from its codes and scales; values[k] has numel floats.
Status decode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor, float* const* values);
/// Codes and scales of every slot from fp32 values, rounded to nearest: the inverse of decode_states up to rounding.
Status encode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor,
                     const float* const* values);

}  // namespace flashoptim
