// Runs one candidate on one case and compares it with float64.
#pragma once

#include <array>

#include "lab/candidate.h"
#include "lab/reference.h"

namespace flashoptim::fidelity {

/// Bins of update / exact update: kRatioBins of kRatioWidth from kRatioFirst, the first and last taking what lies
/// beyond.
inline constexpr int kRatioBins = 160;
inline constexpr double kRatioFirst = -0.6;
inline constexpr double kRatioWidth = 0.02;

struct Result {
  /// |w - w64| / |w64 - w at the start|, L2 norms over the elements, after the last step.
  double error = 0.0;
  std::vector<double> error_over_time;  ///< at Reference::weight_steps
  /// Largest single update over the bound, beyond the weight's own resolution; 0 where there is no bound.
  double largest_update = 0.0;
  /// RMS of update - exact update over RMS of exact update, over the kept steps.
  double update_noise = 0.0;
  std::array<int64_t, kRatioBins> ratios{};
  double seconds = 0.0;
};

Result evaluate(const Case& c, const CaseData& data, const Reference& reference, Candidate& candidate);

}  // namespace flashoptim::fidelity
