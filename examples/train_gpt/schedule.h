// The learning rate over the steps of a run.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

namespace train_gpt {

// Share of the peak learning rate at a step (from 0): a linear rise over `warmup` steps, then half a cosine down to
// `kFinalShare` at the last step.
double cosine_with_warmup(std::int64_t step, std::int64_t warmup, std::int64_t steps);

// Sets every parameter group to its own initial rate times cosine_with_warmup(). Call step() before each optimizer
// step: the first call gives the rate of step 0.
class CosineSchedule : public torch::optim::LRScheduler {
 public:
  // Takes each group's present rate as its peak.
  CosineSchedule(torch::optim::Optimizer& optimizer, std::int64_t warmup, std::int64_t steps);

  // Continues as if `step` steps had been taken.
  void restore(std::int64_t step);

 private:
  std::vector<double> get_lrs() override;

  std::vector<double> peaks_;
  std::int64_t warmup_;
  std::int64_t steps_;
};

}  // namespace train_gpt
