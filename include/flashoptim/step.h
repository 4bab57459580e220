// The torch-free entry: describe the tensors once (Plan), then step them.
//
//   flashoptim::Plan plan;
//   flashoptim::Status status = flashoptim::Plan::make(flashoptim::OptimizerKind::kAdamW, tensors, count, &plan);
//   ...
//   flashoptim::Hyperparameters hyper;  hyper.step = t;
//   status = plan.step(&hyper, 1);
//
// Plan::make validates and allocates; step() allocates nothing, prints nothing and never exits. Memory stays the
// caller's. A plan holds raw pointers: it is valid while they are. One thread uses a plan at a time. Whatever is wrong
// with an argument is a Status and has changed nothing; where memory runs out, it is kOutOfMemory.
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
  bool operator==(const GroupLayout&) const = default;
};

/// Layout of a tensor of shape [d0, ...]: d0 rows of numel / d0 elements; flat (one row) for 1-D tensors and for rows
/// shorter than 32. `sizes` has `dimensions` entries, all >= 0; where that is not so, or their product is above 2^63 -
/// 1, the layout has -1 rows of -1 elements, which every function here refuses.
GroupLayout group_layout(const int64_t* sizes, int64_t dimensions);

/// What a row is. The two differ for tensors of three and more dimensions alone, and in stored bytes only where the
/// shorter row is no multiple of 32: [64, 3, 7, 7] has 64 rows of 147 or 192 of 49.
enum class RowRule : int32_t {
  kFirstDimension = 1,  ///< state format 1: all dimensions but the first
  kShortest = 2,        ///< state format 2: the shortest trailing run of dimensions that has 32 elements or more
};
GroupLayout group_layout(const int64_t* sizes, int64_t dimensions, RowRule rule);

/// Where a tensor lies in the whole that it is a shard of, so that its dither, and with it every stored bit, is the
/// whole's (docs/numerics.md, "Places"). Its local element i, counted row-major, is the whole's element
///
///     first_element + (i / run) * stride + i % run
///
/// run = 0: the shard is one stretch of the whole, element i is first_element + i.
struct Place {
  int64_t first_element = 0;
  /// Local elements that follow each other in the whole, and whole elements from the start of one such run to that of
  /// the next: a [d0, d1] matrix cut along its second dimension into columns [b, e) has first_element = b, run = e - b,
  /// stride = d1; experts [E, d1, d2] cut along d1 have run = (e - b) * d2, stride = d1 * d2.
  int64_t run = 0;
  int64_t stride = 0;
  /// Layout of the whole. Not set (no elements): the whole's rows are `layout`'s, the first of them at first_element;
  /// there is no inner cut then. Set: with fp32 states any cut gives the whole's bits; with quantized states every cut
  /// must lie between two groups of the whole, at a multiple of 32 within a row or at a row's end.
  GroupLayout whole;
  bool operator==(const Place&) const = default;
};

/// Place of the box [offsets, offsets + sizes) of a whole of `whole_sizes`, as torch's DTensor describes a shard, all
/// of `dimensions` entries. kInvalidArgument for a box that does not lie in the whole, or a whole of more elements than
/// 2^63 - 1; kUnsupported where two dimensions are cut and the box has several indices of one before them, for its runs
/// are not evenly spaced then.
Status place_of_box(const int64_t* whole_sizes, const int64_t* offsets, const int64_t* sizes, int64_t dimensions,
                    RowRule rule, Place* place);

/// Layout of a shard of `numel` elements, whose place has `whole` set: the whole's rows, or the parts of them that the
/// shard has; -1 rows of -1 elements where `numel` is negative or no multiple of the place's run.
GroupLayout shard_layout(const Place& place, int64_t numel);

/// Hyperparameter sets of a plan: ParameterTensors::hyper_index is less than this.
inline constexpr int32_t kMaxHyperparameterSets = 1 << 20;

/// One parameter and everything that is stored for it. Arrays are contiguous in element order and lie apart (checked of
/// those of one tensor that are written, not of gradients and other tensors). Any alignment is right; off a multiple of
/// their element's size, steps go through aligned copies (CUDA: byte by byte; scales must be even), which is slower.
struct ParameterTensors {
  void* parameter = nullptr;       ///< [numel] of parameter_dtype, read and written
  const void* gradient = nullptr;  ///< [numel] of gradient_dtype; null: this parameter is skipped by step()
  void* correction = nullptr;      ///< [numel] int8 or int16 as master_weights says, else null
  /// Slot k of the optimizer: fp32 [numel] for StateCodec::kFloat32, else one byte per element. Null where unused.
  void* states[kMaxSlots] = {};
  /// 16-bit headers [rows, groups_per_row] of the quantized slots.
  void* scales[kMaxSlots] = {};
  GroupLayout layout;  ///< of a shard: shard_layout()
  Place place;         ///< the last element's number in the whole must be below 2^63
  DType parameter_dtype = DType::kFloat32;
  DType gradient_dtype = DType::kFloat32;
  MasterWeights master_weights = MasterWeights::kNone;
  StateCodec state_codec = StateCodec::kFloat32;
  /// Which of step()'s hyperparameters apply: 0 ... kMaxHyperparameterSets - 1.
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
  /// Null: OpenMP's threads for large plans, in a build with OpenMP; otherwise, and where is_forked_child(), the
  /// calling thread alone.
  ParallelFor parallel_for = nullptr;
  void* parallel_for_user = nullptr;
};

/// Whether this process came from fork(): the threads of its parent's pools are gone, and a pool that does not know it
/// (OpenMP's) waits for them for ever. The default above runs on the calling thread there; callers who bring a
/// ParallelFor can ask here.
bool is_forked_child();

class Plan {
 public:
  Plan();
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  /// Checks every tensor and prepares a step over all of them. kInvalidArgument, kUnsupported or kOutOfMemory with a
  /// message that names the tensor, the field, its value and what is allowed; *plan is unchanged then.
  static Status make(OptimizerKind optimizer, bool has_momentum, const ParameterTensors* tensors, int64_t count,
                     Plan* plan);

  int64_t size() const;
  /// An empty one (every field as declared) where there is no tensor `index`.
  const ParameterTensors& tensor(int64_t index) const;

  // What may change without a new plan. None of these allocates, and each costs the same however large the plan is.

  /// New gradient address for one tensor (null skips it).
  Status set_gradient(int64_t index, const void* gradient);
  /// New gradient addresses for all tensors, size() entries.
  Status set_gradients(const void* const* gradients);
  /// Which hyperparameters apply to one tensor from now on: 0 to the largest index that make() was given, and at least
  /// to size() - 1.
  Status set_hyper_index(int64_t index, int32_t hyper_index);
  /// Where the arrays of one tensor are from now on, all of them, the gradient (null skips) and hyper_index included.
  /// Layout, place, dtypes, master_weights and state_codec must be those of before: what changes them is a new plan.
  Status set_tensor(int64_t index, const ParameterTensors& tensor);

  /// One step over all tensors. `hypers` has `count` entries, indexed by ParameterTensors::hyper_index. All entries up
  /// to the largest index of a tensor with a gradient must be valid.
  Status step(const Hyperparameters* hypers, int64_t count, const StepOptions& options = {});

  /// The same step, with the same bits, over the `count` tensors named by `indices` alone, each named once, in any
  /// order: for parameters that are stepped as their gradients come. Costs the same however many other tensors the plan
  /// has. `hypers` is indexed as in step(), and of its `hyper_count` entries those of the named tensors with gradients
  /// are read.
  Status step_some(const int64_t* indices, int64_t count, const Hyperparameters* hypers, int64_t hyper_count,
                   const StepOptions& options = {});

  /// Everything that step() would check, and nothing else: where this is ok, step() with the same arguments is. For a
  /// step over several plans that all change or none. (What found_inf points at is not read.)
  Status check_step(const Hyperparameters* hypers, int64_t count, const StepOptions& options = {}) const;

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

/// Name of the instruction set that CPU steps use: "scalar", "avx2", "avx512" (F, BW, DQ, VL), "avx512_bf16" (and
/// VBMI, BF16) or, on 64-bit Arm, "neon". Chosen once from the processor, or by the environment variable
/// FLASHOPTIM_ISA; kUnsupported when that names one this machine lacks or is no name.
Status cpu_isa(const char** name);

// Element-wise conversions, those of the step, of `count` elements. Arrays of any alignment, which must not overlap.

/// fp32 master weights from parameter and correction (null where master_weights has none).
Status merge_weights(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                     float* weights, int64_t count);
/// Nearest parameter and correction for fp32 weights.
Status split_weights(DType dtype, MasterWeights master_weights, const float* weights, void* parameter, void* correction,
                     int64_t count);

/// Corrections of the same narrow weights in another width, each the nearest: kInvalidArgument where either has none.
/// Host memory. In place where both have one width.
Status rescale_corrections(MasterWeights from, const void* corrections, MasterWeights to, void* rescaled,
                           int64_t count);

/// fp32 values of every slot of one tensor, from its codes and scales; values[k] has numel floats.
Status decode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor, float* const* values);
/// Codes and scales of every slot from fp32 values, rounded to nearest: the inverse of decode_states up to rounding.
Status encode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor,
                     const float* const* values);

}  // namespace flashoptim
