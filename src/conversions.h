// What the element-wise conversions check before they run, on every device.
#pragma once

#include "flashoptim/step.h"

namespace flashoptim {

/// *t becomes one row of `count` weights; kInvalidArgument or kUnsupported as Plan::make says it.
Status weights_tensor(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                      int64_t count, ParameterTensors* t);

/// Checks the states and scales of *t; its parameter and correction are set aside (null), for they are not touched.
Status check_states_tensor(OptimizerKind optimizer, bool has_momentum, ParameterTensors* t);

}  // namespace flashoptim
