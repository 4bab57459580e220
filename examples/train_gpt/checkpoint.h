// A run on disk: everything that is needed to continue it bit for bit, in one file.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "options.h"

namespace train_gpt {

// What a checkpoint says about itself.
struct CheckpointHeader {
  TrainOptions options;
  nlohmann::json tokenizer;
  std::uint64_t data_fingerprint = 0;
  std::int64_t step = 0;  // optimizer steps taken
};

// Writes header, model, optimizer and torch's random state. The file appears under its name complete or not at all:
// a crash, or an error (c10::Error), leaves the previous checkpoint. Returns its size in bytes.
std::int64_t save_checkpoint(const std::string& path, const CheckpointHeader& header, const torch::nn::Module& model,
                             const torch::optim::Optimizer& optimizer, const torch::Device& device);

// Reads the header alone. UserError if there is no checkpoint or it cannot be read.
CheckpointHeader read_checkpoint_header(const std::string& path);

// Puts the saved state into a model and an optimizer of the kind that was saved. c10::Error where it is not what was
// written.
void load_checkpoint(const std::string& path, torch::nn::Module& model, torch::optim::Optimizer& optimizer,
                     const torch::Device& device);

// A hash of all parameters and of all that the optimizer keeps: equal for runs that are in the same state.
std::string state_fingerprint(torch::nn::Module& model, torch::optim::Optimizer& optimizer);

}  // namespace train_gpt
