// What Plan::inspect reports: what a step would lose to its storage formats, found by a dry run beside the step.
#pragma once

#include <cstdint>

namespace flashoptim {

/// Of one tensor. All counts are of elements but those of codes, of which an element has one per state slot.
struct StepTelemetry {
  /// Elements looked at.
  int64_t examined;
  /// NaN or infinite gradients, after their scale.
  int64_t nonfinite_gradients;
  /// Updates (decay included, in fp32) other than 0 and NaN that would leave every bit of the stored weight, correction
  /// included, as it is. Where weights are rounded without bias the mean over steps still moves.
  int64_t lost_updates;
  /// New states other than 0 that would be read back as 0, in all slots: too small for their group, or NaN or infinite,
  /// which quantized codecs store as 0.
  int64_t floored_codes;
  /// New finite states above the largest that their codec stores, in all slots: |m| or sqrt(v) above the paper codec's
  /// largest scale, 65504; v above 2^127 in the default codec, whose signed codes never saturate.
  int64_t saturated_codes;
  /// Largest |update without decoupled weight decay| over the rule's bound (Rule::largest_update in core/optimizers);
  /// NaN apart. 0 for rules without a bound (SGD, SGDW) and where lr is 0.
  float largest_update_ratio;
};

struct InspectOptions {
  /// Every stride-th group of 32 of a tensor is looked at. Where it starts follows seed, step and tensor: `stride`
  /// steps in a row look at every group once. At least 1.
  int64_t stride = 1;
};

}  // namespace flashoptim
