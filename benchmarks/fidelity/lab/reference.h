// The optimizers in float64, on the gradients of a case.
#pragma once

#include <vector>

#include "lab/cases.h"

namespace flashoptim::fidelity {

/// What the exact run leaves behind for comparison.
struct Reference {
  std::vector<int64_t> weight_steps;         ///< steps after which weights were kept; the last is the case's last
  std::vector<std::vector<double>> weights;  ///< per kept step
  std::vector<int64_t> update_steps;         ///< steps whose updates were kept
  std::vector<std::vector<float>> updates;   ///< decrease of every weight in these steps, without weight decay
  double largest_update = 0.0;               ///< over the bound of Case::update_bound, if there is one
};

Reference run_reference(const Case& c, const CaseData& data);

}  // namespace flashoptim::fidelity
