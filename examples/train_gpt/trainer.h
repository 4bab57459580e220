// One run from options to summary.
#pragma once

#include <flashoptim/torch/gradient_release.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint.h"
#include "data.h"
#include "memory.h"
#include "metrics.h"
#include "model.h"
#include "options.h"
#include "schedule.h"
#include "tokenizer.h"

namespace train_gpt {

// Holds everything a run consists of and takes its steps. Prints nothing: main shows what it returns.
class Trainer {
 public:
  // Loads text, builds or restores model, optimizer and schedule. UserError for anything the user can mend.
  explicit Trainer(Options options);

  // Takes the next step and returns what there is to say about it.
  StepMetrics train_step();

  // Mean loss over a fixed set of windows of a split (--eval-windows), in nats a token.
  double evaluate(Dataset::Split split);

  // Saves to the run's folder; returns the file's bytes.
  std::int64_t save();

  // Final losses, bytes, speeds and fingerprint of the run, for summary.json.
  nlohmann::json summarize();

  // Text continued from the start of the validation split.
  std::string sample(std::int64_t tokens);

  // Steps taken, those before a resume included.
  std::int64_t step() const { return step_; }

  // A line each about data, model and arithmetic, for the top of a run's output.
  std::string describe() const;

  // The options with everything that was automatic decided.
  const Options& options() const { return options_; }

  // The text the run learns from.
  const Dataset& dataset() const { return *dataset_; }

 private:
  void load_data(const nlohmann::json& stored_tokenizer);
  double clip_gradients();
  // backward(), and what goes with it; the norm of all gradients.
  double run_backward(const torch::Tensor& loss);

  Options options_;
  torch::Device device_;
  Tokenizer tokenizer_;
  std::unique_ptr<Dataset> dataset_;
  std::string prompt_;
  Gpt model_{nullptr};
  std::unique_ptr<torch::optim::Optimizer> optimizer_;
  std::optional<flashoptim::torch::GradientReleaseHandle> release_;
  std::unique_ptr<CosineSchedule> schedule_;
  std::int64_t step_ = 0;
  std::optional<MemoryReport> memory_;
  std::vector<double> step_ms_, optimizer_ms_;
};

}  // namespace train_gpt
