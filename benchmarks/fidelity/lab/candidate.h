// A way to hold an optimizer's states, with a name: a row of the laboratory's tables.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lab/cases.h"

namespace flashoptim::fidelity {

/// One optimizer run on one tensor.
class Candidate {
 public:
  virtual ~Candidate() = default;
  /// `gradient` has the case's elements, in its gradient dtype.
  virtual void step(const Hyperparameters& hyper, const uint16_t* gradient) = 0;
  /// Master weights after the last step.
  virtual const float* weights() = 0;
  /// Largest error of one weight's representation in units of the weight: what a step may move beside its update.
  virtual double weight_resolution() const = 0;
};

struct CandidateInfo {
  std::string name;
  std::string what;
  bool in_library = false;   ///< the real kernels, by the Plan API
  bool by_default = true;    ///< whether a run without --codec includes it
  double state_bytes = 0.0;  ///< per parameter, scales included
  std::function<std::unique_ptr<Candidate>(const Case&, const CaseData&, uint64_t seed)> make;
};

/// All candidates that an optimizer has.
std::vector<CandidateInfo> make_candidates(OptimizerKind optimizer);

/// The library's own: fp32, paper, default.
void add_library_candidates(OptimizerKind optimizer, std::vector<CandidateInfo>& out);
/// Written here for comparison; see lab_candidates.cpp.
void add_lab_candidates(OptimizerKind optimizer, std::vector<CandidateInfo>& out);

}  // namespace flashoptim::fidelity
