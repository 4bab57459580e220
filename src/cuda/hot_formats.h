// The formats that hot kernels are compiled for, each said once: what a kernel is a template over, which tensors it
// takes, and what the tests go through.
#pragma once

#include <iterator>

#include "flashoptim/core/weight_split.h"
#include "flashoptim/step.h"
#include "src/place.h"

namespace flashoptim::cuda {

/// Whether a tensor's groups follow each other in the whole, or are those of runs (core/place.h); none of them short.
enum class HotGroups { kInOneStretch, kInRuns };

struct HotFormat {
  DType parameter;
  DType gradient;
  MasterWeights master;
  StateCodec codec;
  HotGroups groups = HotGroups::kInOneStretch;
};

inline constexpr HotFormat kHotFormats[] = {
    {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8, StateCodec::kDefault},
    {DType::kFloat16, DType::kFloat16, MasterWeights::kCorrection8, StateCodec::kDefault},
    // From here on where memory is fast alone.
    {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8, StateCodec::kDefault, HotGroups::kInRuns},
    {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection16, StateCodec::kDefault},
    {DType::kBFloat16, DType::kBFloat16, MasterWeights::kNone, StateCodec::kDefault},
    {DType::kBFloat16, DType::kBFloat16, MasterWeights::kNoneStochastic, StateCodec::kDefault},
    {DType::kBFloat16, DType::kFloat32, MasterWeights::kCorrection8, StateCodec::kDefault},
    {DType::kFloat16, DType::kFloat16, MasterWeights::kCorrection16, StateCodec::kDefault},
    {DType::kFloat16, DType::kFloat16, MasterWeights::kNone, StateCodec::kDefault},
    {DType::kFloat32, DType::kFloat32, MasterWeights::kNone, StateCodec::kDefault},
    {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8Nearest, StateCodec::kPaper},
    {DType::kBFloat16, DType::kFloat32, MasterWeights::kCorrection8Nearest, StateCodec::kPaper},
    {DType::kBFloat16, DType::kBFloat16, MasterWeights::kNone, StateCodec::kPaper},
};
inline constexpr int kHotFormatCount = static_cast<int>(std::size(kHotFormats));
/// The first ones are hot on every device; the others only where memory is fast for the arithmetic there is
/// (kHasFastMemory in step-inl.cuh), for a build of seven architectures has its limits.
inline constexpr int kHotEverywhere = 2;

/// Position in kHotFormats, or -1. `states` is the number of an element's states: without any there is no codec.
inline int hot_format_of(const ParameterTensors& t, int states, const TensorGroups& groups) {
  if (states == 0) return -1;
  const bool full_runs = groups.in_pieces && groups.pieces.lane == 0 && groups.pieces.run % kGroupSize == 0;
  const bool has_short_groups = groups.in_pieces || (t.layout.rows > 1 && t.layout.row_size % kGroupSize != 0);
  if (has_short_groups && !full_runs) return -1;
  const HotGroups wanted = full_runs ? HotGroups::kInRuns : HotGroups::kInOneStretch;
  for (int i = 0; i < kHotFormatCount; ++i) {
    const HotFormat& f = kHotFormats[i];
    if (f.parameter == t.parameter_dtype && f.gradient == t.gradient_dtype && f.master == t.master_weights &&
        f.codec == t.state_codec && f.groups == wanted)
      return i;
  }
  return -1;
}

/// A format as a type, by which kernels are named.
template <DType kParameterOf, DType kGradientOf, MasterWeights kMasterOf, StateCodec kCodecOf, HotGroups kGroupsOf,
          bool kIsEverywhereOf>
struct HotFormatOf {
  static constexpr DType kParameter = kParameterOf, kGradient = kGradientOf;
  static constexpr MasterWeights kMaster = kMasterOf;
  static constexpr StateCodec kCodec = kCodecOf;
  static constexpr HotGroups kGroups = kGroupsOf;
  static constexpr bool kIsEverywhere = kIsEverywhereOf;
  static constexpr bool kIsCorrected = core::has_correction(kMaster);
  /// A product less for the one format that is used most: another way for each would cost a fifth of the build.
  static constexpr bool kHasWayForScale1 = kParameter == DType::kBFloat16 && kGradient == DType::kBFloat16 &&
                                           kMaster == MasterWeights::kCorrection8 && kCodec == StateCodec::kDefault &&
                                           kGroups == HotGroups::kInOneStretch;

  static constexpr int bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
  /// Bytes of an element.
  static constexpr int kParameterBytes = bytes(kParameter), kGradientBytes = bytes(kGradient);
  static constexpr int kCorrectionBytes = kIsCorrected ? core::correction_bits(kMaster) / 8 : 0;
};
template <int i>
using HotFormatAt = HotFormatOf<kHotFormats[i].parameter, kHotFormats[i].gradient, kHotFormats[i].master,
                                kHotFormats[i].codec, kHotFormats[i].groups, (i < kHotEverywhere)>;

}  // namespace flashoptim::cuda
