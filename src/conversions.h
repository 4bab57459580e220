// What the element-wise conversions check before they run, on every device.
#pragma once

#include "flashoptim/step.h"

namespace flashoptim {

/// *t becomes one row of `count` weights, to or from `weights`; kInvalidArgument or kUnsupported as Plan::make says it.
Status weights_tensor(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                      const float* weights, int64_t count, ParameterTensors* t);

/// Checks the states and scales of *t, and `values`, one array for each slot; parameter and correction are set aside
/// (null), for they are not touched, as are slots that the optimizer does not have.
Status check_states_tensor(OptimizerKind optimizer, bool has_momentum, const float* const* values, ParameterTensors* t);

}  // namespace flashoptim
