// The dry run of Plan::inspect on the CPU: walks the groups of a tensor and adds up what core/inspect.h finds. And the
// checks that it shares with the one on the device.
#pragma once

#include <cstdint>

#include "flashoptim/step.h"
#include "src/cpu/kernels.h"
#include "src/place.h"

namespace flashoptim {

/// What is wrong with the arguments that Plan::inspect has beside step()'s, on any device. `where` ends the message
/// about the telemetry's `entries`.
Status check_inspection(const InspectOptions& options, const StepTelemetry* telemetry, int64_t entries,
                        const char* where = "");

/// What the groups of a tensor share.
struct TensorInspection {
  const ParameterTensors& tensor;
  const TensorGroups& groups;
  int64_t index;  ///< of the tensor in its plan
  cpu::RuleKind rule;
  const cpu::HyperStorage& hyper;
  core::DitherKey dither;
  float gradient_scale;
  float largest_update;
  int64_t stride;
};

/// Adds the telemetry of groups (or pieces) begin ... end - 1 of a tensor to `out`, which other threads may be adding
/// to.
void inspect_groups(const TensorInspection& inspection, int64_t begin, int64_t end, StepTelemetry* out);

}  // namespace flashoptim
