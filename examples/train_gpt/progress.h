// What a person sees while a run goes on.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace train_gpt {

// A bar that is redrawn in place on a terminal; elsewhere (a file, a pipe) a plain line every few seconds.
class Progress {
 public:
  // A run of `steps` steps that starts after `start` of them.
  Progress(std::int64_t start, std::int64_t steps);

  // Shows the state after a step; speeds are averaged over recent steps.
  void update(std::int64_t step, double loss, std::optional<double> validation_loss, double tokens_per_second);

  // Ends the line, so that other output can follow.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  std::string describe(std::int64_t step, double tokens_per_second);

  bool terminal_;
  std::int64_t start_;
  std::int64_t steps_;
  Clock::time_point begin_;
  Clock::time_point last_shown_;
  double smooth_loss_ = 0;
  double smooth_speed_ = 0;
  std::optional<double> validation_loss_;
  bool line_open_ = false;
};

// Minutes and seconds ("2:05"), with hours where there are any ("1:02:05").
std::string format_duration(double seconds);

}  // namespace train_gpt
