// What a run writes about itself for other programs: one JSON line per step, and a summary.
#pragma once

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace train_gpt {

// One optimizer step.
struct StepMetrics {
  std::int64_t step = 0;  // counted from 1: steps taken
  double loss = 0;        // of this step's batch, nats a token
  std::optional<double> validation_loss;
  double lr = 0;
  double gradient_norm = 0;  // before clipping
  double step_ms = 0;        // the whole step, validation excluded
  double optimizer_ms = 0;
  double tokens_per_second = 0;
};

// The file metrics.jsonl of a run.
class MetricsLog {
 public:
  // Keeps the lines of steps up to `resume_step` (a crash may have left later ones) and appends to them.
  MetricsLog(const std::string& path, std::int64_t resume_step);

  // Appends a step and hands the line to the system, so that it survives a crash of the program.
  void write(const StepMetrics& metrics);

 private:
  std::string path_;
  std::ofstream file_;
};

// Writes `json`, indented, replacing the file as a whole.
void write_json(const std::string& path, const nlohmann::json& json);

// The middle value, 0 of nothing; robust against the few steps that something else on the machine disturbed.
double median(std::vector<double> values);

}  // namespace train_gpt
