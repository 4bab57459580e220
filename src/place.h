// A shard's place as a plan sees it: what is allowed, and which pieces of the whole's groups it has.
#pragma once

#include "flashoptim/core/place.h"
#include "flashoptim/step.h"
#include "src/checks.h"

namespace flashoptim {

/// How a plan goes through a tensor: group by group of its layout, which are then groups of the whole that follow each
/// other there, too; or in pieces.
struct TensorGroups {
  int64_t count = 0;        ///< groups or pieces; where states are quantized, both have the same numbers
  int64_t first_group = 0;  ///< number of group 0 in the whole; 0 where that is not known
  bool in_pieces = false;
  core::PlacedGroups pieces{};

  const core::PlacedGroups* placed() const { return in_pieces ? &pieces : nullptr; }
};

/// Of a tensor that passed check_place.
TensorGroups tensor_groups(const ParameterTensors& tensor);

/// Of a tensor whose layout passed check_layout. `is_quantized`: it has states in a quantized codec.
Status check_place(const ParameterTensors& tensor, const TensorName& name, bool is_quantized);

}  // namespace flashoptim
