#include "progress.h"

#include <unistd.h>

#include <cstdio>

namespace train_gpt {
namespace {

constexpr double kTerminalInterval = 0.1;  // seconds
constexpr double kPlainInterval = 10;
constexpr double kSmoothing = 0.1;  // weight of the newest step
constexpr int kBarWidth = 24;

std::string bar(std::int64_t step, std::int64_t steps) {
  const auto filled = static_cast<int>(step * kBarWidth / steps);
  std::string text;
  for (int i = 0; i < kBarWidth; ++i) text += i < filled ? "━" : "╌";
  return text;
}

}  // namespace

std::string format_duration(double seconds) {
  const auto total = static_cast<long>(seconds + 0.5);
  char text[32];
  if (total >= 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", total / 3600, total / 60 % 60, total % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld", total / 60, total % 60);
  }
  return text;
}

Progress::Progress(std::int64_t start, std::int64_t steps)
    : terminal_(::isatty(STDOUT_FILENO) == 1), start_(start), steps_(steps), begin_(Clock::now()), last_shown_() {}

std::string Progress::describe(std::int64_t step, double tokens_per_second) {
  const double elapsed = std::chrono::duration<double>(Clock::now() - begin_).count();
  const double left = elapsed / static_cast<double>(step - start_) * static_cast<double>(steps_ - step);
  char text[160];
  int length = std::snprintf(text, sizeof text, "step %5lld/%lld  loss %.3f", static_cast<long long>(step),
                             static_cast<long long>(steps_), smooth_loss_);
  if (validation_loss_) {
    length += std::snprintf(text + length, sizeof text - static_cast<std::size_t>(length), "  validation %.3f",
                            *validation_loss_);
  }
  std::snprintf(text + length, sizeof text - static_cast<std::size_t>(length), "  %.0f tokens/s  %s left",
                tokens_per_second, format_duration(left).c_str());
  return text;
}

void Progress::update(std::int64_t step, double loss, std::optional<double> validation_loss, double tokens_per_second) {
  const bool first = step == start_ + 1;
  smooth_loss_ = first ? loss : smooth_loss_ + kSmoothing * (loss - smooth_loss_);
  smooth_speed_ = first ? tokens_per_second : smooth_speed_ + kSmoothing * (tokens_per_second - smooth_speed_);
  if (validation_loss) validation_loss_ = validation_loss;

  const auto now = Clock::now();
  const double since = std::chrono::duration<double>(now - last_shown_).count();
  const bool due = since >= (terminal_ ? kTerminalInterval : kPlainInterval);
  if (!due && step != steps_ && !(validation_loss && !terminal_)) return;
  last_shown_ = now;
  const std::string text = describe(step, smooth_speed_);
  if (terminal_) {
    std::printf("\r\033[K%s %s", bar(step, steps_).c_str(), text.c_str());
    line_open_ = true;
  } else {
    std::printf("%s\n", text.c_str());
  }
  std::fflush(stdout);
}

void Progress::finish() {
  if (line_open_) std::printf("\n");
  line_open_ = false;
  std::fflush(stdout);
}

}  // namespace train_gpt
