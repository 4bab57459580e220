// What travels to the device: the plan's tables and the arguments of every kernel. Plain data, host and device.
#pragma once

#include <cstdint>

#include "flashoptim/core/place.h"
#include "flashoptim/cuda.h"
#include "src/cpu/kernels.h"
#include "src/cuda/hot_formats.h"
#include "src/cuda/tuning.h"

namespace flashoptim::cuda {

using cpu::HyperStorage;
using cpu::RuleKind;

/// One tensor, as the kernels read it.
struct alignas(16) TensorEntry {
  void* parameter;
  const void* gradient;  ///< null: skipped
  void* correction;
  void* states[kMaxSlots];
  uint16_t* scales[kMaxSlots];
  int64_t row_size;
  int64_t groups_per_row;
  int64_t numel;
  int64_t first_element;
  int64_t first_group;               ///< number of group 0 in the whole, for inspect()
  const core::PlacedGroups* pieces;  ///< with kInPieces
  int32_t hyper_index;
  uint8_t parameter_dtype;
  uint8_t gradient_dtype;
  uint8_t master_weights;
  uint8_t flags;
};

enum TensorFlag : uint8_t {
  kVectorAligned = 1,  ///< every array but the gradient starts at a multiple of 16 bytes
  kShortRows = 2,      ///< rows end in groups of fewer than 32: group g does not start at element 32 g
  kPaperStates = 4,    ///< the codec, for kernels that take any; neither: fp32
  kDefaultStates = 8,
  kInPieces = 16,  ///< groups are pieces of the whole's (core/place.h)
};

/// A run of groups of one tensor: what one block works on.
struct alignas(16) Chunk {
  int64_t first_group;
  int32_t tensor;
  int32_t groups;
};

/// The same for the hot kernels, whose offsets have 32 bits: `first` counts from the segment's first group.
struct alignas(16) HotChunk {
  uint32_t first;
  int32_t groups;
  int32_t tensor;
  uint32_t segment;
};
static_assert(sizeof(HotChunk) == sizeof(Chunk));

/// Which work of a hot launch is taken: both 0 between launches.
struct alignas(8) WorkCounter {
  uint32_t taken;
  uint32_t finished;
};

/// One hyperparameter set, ready for the kernels.
struct alignas(16) PreparedHyper {
  HyperStorage rule;
  core::DitherKey dither;
  float gradient_scale;
  int32_t skip;  ///< found_inf: change nothing
};

struct StepArguments {
  const TensorEntry* tensors;  ///< null: inline_tensor, whose the chunks are
  const Chunk* chunks;         ///< HotChunk for the hot kernels
  WorkCounter* work;
  const PreparedHyper* hypers;  ///< null: inline_hypers
  unsigned long long* nonfinite;
  uint32_t chunk_count;
  uint32_t tile_count;  ///< of the chunks (hot kernels)
  uint32_t multiprocessors;
  uint32_t fixed_rounds;  ///< of tiles, one a warp, that are not handed out on demand (hot kernels)
  TensorEntry inline_tensor;
  PreparedHyper inline_hypers[kInlineHypers];
};
static_assert(sizeof(StepArguments) <= 4096);

struct PrepareArguments {
  RuleKind rule;
  int32_t count;
  PreparedHyper* out;
  float gradient_scale;
  const float* gradient_divisor;
  const float* clip_coefficient;
  const float* found_inf;
  float* largest_updates;  ///< of the rule, for inspect(); may be null
  Hyperparameters hypers[kHypersPerLaunch];
  const float* lr[kHypersPerLaunch];
  const int64_t* step[kHypersPerLaunch];
};
static_assert(sizeof(PrepareArguments) <= 4096);

template <int capacity>
struct GradientArguments {
  TensorEntry* tensors;
  int32_t count;
  const void* gradients[capacity];
};
static_assert(sizeof(GradientArguments<kGradientsPerLaunch>) <= 4096);
static_assert(sizeof(GradientArguments<kLargeGradientsPerLaunch>) <= 32764);

/// Whole entries, for tensors anywhere in the table.
template <int capacity>
struct EntryArguments {
  TensorEntry* tensors;
  int32_t count;
  int32_t indices[capacity];
  TensorEntry entries[capacity];
};
inline constexpr int kEntriesPerLaunch = (4096 - 32) / (sizeof(TensorEntry) + sizeof(int32_t));
inline constexpr int kLargeEntriesPerLaunch = (32764 - 32) / (sizeof(TensorEntry) + sizeof(int32_t));
static_assert(sizeof(EntryArguments<kEntriesPerLaunch>) <= 4096);
static_assert(sizeof(EntryArguments<kLargeEntriesPerLaunch>) <= 32764);

struct ZeroArguments {
  int32_t count;
  unsigned char* arrays[kZeroArrays];
  int64_t bytes[kZeroArrays];
};
static_assert(sizeof(ZeroArguments) <= 4096);

struct NormArguments {
  const TensorEntry* tensors;
  const Chunk* chunks;
  int64_t chunk_count;
  double* partial;         ///< one per chunk
  unsigned int* finished;  ///< blocks that have written theirs; 0 between launches
  GradientNorm* result;
  float gradient_scale;
  const float* gradient_divisor;
  float max_norm;
  float epsilon;
};

struct InspectArguments {
  const TensorEntry* tensors;
  const Chunk* chunks;
  const PreparedHyper* hypers;
  const float* largest_updates;  ///< one per hyperparameter set
  StepTelemetry* telemetry;      ///< one per tensor
  int64_t stride;
  uint32_t chunk_count;
};

enum class Conversion : int32_t { kMergeWeights, kSplitWeights, kDecodeStates, kEncodeStates };

/// One tensor's conversion from or to fp32.
struct ConvertArguments {
  TensorEntry tensor;
  float* values[kMaxSlots];  ///< fp32 weights (the first), or one array per state slot; read or written
  int64_t groups;
  Conversion conversion;
  RuleKind rule;     ///< states only
  StateCodec codec;  ///< states only
};

/// Launches a step over `chunk_count` chunks; `stream` is a cudaStream_t. No chunks: loads the kernel to the current
/// device, and launches nothing. Returns cudaError_t as int.
using StepLaunch = int (*)(const StepArguments& arguments, void* stream);

/// The step kernels of a rule: kernel i < kHotKernels is that of kHotFormats[i].
enum StepKernel : int {
  kHotKernels = kHotFormatCount,
  /// bf16 with 24 bits and its gradients, default codec, rows or runs that end in short groups.
  kShortGroups = kHotKernels,
  /// Any types and master weights: one for each codec.
  kAnyTypes,
  kStepKernels = kAnyTypes + cpu::kCodecs,
};

inline StepKernel step_kernel_of(const ParameterTensors& t, int states, const TensorGroups& groups) {
  const int hot = hot_format_of(t, states, groups);
  if (hot >= 0) return static_cast<StepKernel>(hot);
  const bool is_known = states > 0 && t.state_codec == StateCodec::kDefault &&
                        t.master_weights == MasterWeights::kCorrection8 && t.parameter_dtype == DType::kBFloat16 &&
                        t.gradient_dtype == DType::kBFloat16;
  if (is_known) return kShortGroups;
  return static_cast<StepKernel>(kAnyTypes + static_cast<int>(t.state_codec));
}

struct StepLaunches {
  StepLaunch kernel[kStepKernels];  ///< for rules without states those of kAnyTypes alone
};
const StepLaunches& step_launches(RuleKind rule);

int launch_prepare(const PrepareArguments& arguments, void* stream);
/// For the two capacities each of tuning.h and above.
template <int capacity>
int launch_gradients(const GradientArguments<capacity>& arguments, void* stream);
template <int capacity>
int launch_entries(const EntryArguments<capacity>& arguments, void* stream);
int launch_zero(const ZeroArguments& arguments, int blocks, void* stream);
int launch_inspect(RuleKind rule, const InspectArguments& arguments, void* stream);
int launch_convert(const ConvertArguments& arguments, void* stream);
int launch_norm(const NormArguments& arguments, void* stream);
int launch_advance(int64_t* counter, const float* found_inf, void* stream);

}  // namespace flashoptim::cuda
