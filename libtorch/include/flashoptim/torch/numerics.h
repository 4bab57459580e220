// What an optimizer tells of its steps' precision and of what it keeps.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <map>
#include <string>
#include <vector>

#include "flashoptim/torch/namespace.h"

namespace flashoptim::libtorch {

/// Counts of one parameter, in a sample of its groups of 32 elements (all of them in small models).
struct ParameterNumerics {
  int64_t examined = 0;             ///< elements looked at
  int64_t nonfinite_gradients = 0;  ///< of those
  int64_t lost_updates = 0;         ///< updates other than 0 that left every bit of the weight as it was
  int64_t floored_codes = 0;        ///< states other than 0 that were stored as 0
  int64_t saturated_codes = 0;      ///< states beyond the largest that their codec stores
  float largest_update_ratio = 0;   ///< largest update over what the rule allows (docs/numerics.md, "Telemetry")
};

/// Counts since the optimizer was made or reset_numerics() was called.
struct NumericsReport {
  /// Elements of gradients that were NaN or infinite, in all steps.
  int64_t nonfinite_gradients = 0;
  // Sums over `parameters`: 0 unless check_numerics() is on.
  int64_t sampled_updates = 0;
  /// Weights that kept every bit. With nearest rounding such an update is lost; with unbiased rounding (the default
  /// codec's corrections, stochastic_rounding) it is not: others round the other way.
  int64_t unchanged_weights = 0;
  int64_t floored_codes = 0;
  int64_t saturated_codes = 0;
  float largest_update_ratio = 0;
  /// By name; parameters without a name are called "param_groups[0].params[1]".
  std::map<std::string, ParameterNumerics> parameters;
};

/// The parameters of one group that are stored alike.
struct FormatDescription {
  size_t group = 0;
  std::vector<std::string> parameters;  ///< by name, or "param_groups[0].params[1]"
  int64_t elements = 0;
  std::string weights;  ///< how a weight is kept, by bits: "bfloat16 + 8", "float32"
  std::string states;   ///< "8-bit", "8-bit paper", "fp32", "none"
  int64_t bytes = 0;    ///< of parameters, corrections and states; without gradients
  std::string options;  ///< those of the group that differ from the first group's: "lr=0.0001, quantize=0"
};

/// One row for every group and format. Written to a stream it is a table.
struct OptimizerDescription : std::vector<FormatDescription> {
  int64_t bytes() const;
  int64_t elements() const;
  std::string str() const;
};
std::ostream& operator<<(std::ostream& out, const OptimizerDescription& description);

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::FormatDescription;
using ::flashoptim::libtorch::NumericsReport;
using ::flashoptim::libtorch::OptimizerDescription;
using ::flashoptim::libtorch::ParameterNumerics;
}  // namespace torch
