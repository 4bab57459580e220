// Tables and JSON of a run.
#pragma once

#include <string>
#include <vector>

#include "lab/evaluate.h"
#include "lab/stall.h"

namespace flashoptim::fidelity {

struct CaseReport {
  Case c;
  double exact_largest_update = 0.0;
  std::vector<int64_t> weight_steps;
  std::vector<Result> results;  ///< one per candidate
};

struct OptimizerReport {
  OptimizerKind optimizer = OptimizerKind::kAdamW;
  std::vector<CandidateInfo> candidates;
  std::vector<CaseReport> cases;
};

struct StallReport {
  StallCase c;
  StallResult result;
};

/// Largest update that a codec may make on a case, over the bound: 10 % above it, or above exact Adam where that itself
/// exceeds it.
double allowed_update(const CaseReport& report);

/// Markdown tables: errors, then largest updates. Number of figures of issue 4 that the default codec misses.
int print_tables(const std::vector<OptimizerReport>& reports);
int print_stalls(const std::vector<StallReport>& stalls);
void write_json(const std::string& path, const std::vector<OptimizerReport>& reports,
                const std::vector<StallReport>& stalls, uint64_t seed, double seconds);

}  // namespace flashoptim::fidelity
