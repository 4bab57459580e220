#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace train_gpt {
namespace {
constexpr double kFinalShare = 0.1;
}

double cosine_with_warmup(std::int64_t step, std::int64_t warmup, std::int64_t steps) {
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  const auto decay_steps = static_cast<double>(std::max<std::int64_t>(steps - warmup - 1, 1));
  const double progress = std::min(static_cast<double>(step - warmup) / decay_steps, 1.0);
  return kFinalShare + (1 - kFinalShare) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
}

CosineSchedule::CosineSchedule(torch::optim::Optimizer& optimizer, std::int64_t warmup, std::int64_t steps)
    : LRScheduler(optimizer), peaks_(get_current_lrs()), warmup_(warmup), steps_(steps) {}

void CosineSchedule::restore(std::int64_t step) { step_count_ = static_cast<unsigned>(step); }

std::vector<double> CosineSchedule::get_lrs() {
  std::vector<double> rates = peaks_;
  for (double& rate : rates) rate *= cosine_with_warmup(step_count_, warmup_, steps_);
  return rates;
}

}  // namespace train_gpt
