// Corrections alone: do many updates below a weight's resolution move it as far as they should?
#pragma once

#include <string>
#include <vector>

#include "flashoptim/types.h"

namespace flashoptim::fidelity {

struct StallCase {
  double start = 1.0;
  double lr = 1e-5;  ///< every update's size
  DType dtype = DType::kBFloat16;
  MasterWeights master_weights = MasterWeights::kCorrection8;
  int64_t elements = 16384;
  int64_t steps = 1000;
  bool random_updates = false;   ///< lr (1/2 + N(0, 1)) instead of lr
  std::string row_name() const;  ///< without the updates
  std::string name() const;
};

struct StallResult {
  double moved = 0.0;        ///< mean over the weights of the way gone, over the exact one
  double worst_steps = 0.0;  ///< largest error of one weight in steps of its correction at the start
};

/// start x lr x dtype of issue 4, item 4, for the given kinds of master weight.
std::vector<StallCase> make_stall_cases(const std::vector<MasterWeights>& kinds);
StallResult run_stall(const StallCase& c, uint64_t seed);

}  // namespace flashoptim::fidelity
