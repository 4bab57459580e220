// The text: loading, the split into training and validation, and batches that depend on nothing but seed and step.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tokenizer.h"

namespace train_gpt {

// Reads a file, or all text files under a folder joined in the order of their paths. UserError if there is none.
std::string load_text(const std::string& path);

// Inputs and the tokens that follow them, both int64 of shape [windows, context].
struct Batch {
  torch::Tensor inputs;
  torch::Tensor targets;
};

// Where a text is cut: everything before is for training, everything from there on for validation.
std::size_t split_position(const std::string& text, double validation_fraction);

// The tokens of both splits and the windows cut out of them.
class Dataset {
 public:
  enum class Split { kTrain, kValidation };

  // Encodes both sides of split_position(). UserError if a side is too short for one window.
  Dataset(const std::string& text, const Tokenizer& tokenizer, double validation_fraction, std::int64_t context);

  // Random training windows; a function of (seed, step) alone, so that a resumed run sees the same ones.
  Batch train_batch(std::int64_t seed, std::int64_t step, std::int64_t batch) const;

  // Windows spread evenly over a split without overlap, at most `max_windows`, in batches of at most `batch`:
  // always the same ones, so that losses of different steps and runs compare.
  std::vector<Batch> evaluation_batches(Split split, std::int64_t max_windows, std::int64_t batch) const;

  // Number of tokens in a split.
  std::int64_t size(Split split) const { return static_cast<std::int64_t>(tokens(split).size()); }

  // Validation loss, in nats a token, of the model that knows only how often each token occurs in training.
  double unigram_loss() const;

  // Bytes of validation text per validation token, to turn nats a token into bits a byte.
  double bytes_per_token() const { return bytes_per_token_; }

  // A hash of all tokens: tells a resumed run that its text is the same.
  std::uint64_t fingerprint() const;

 private:
  const std::vector<std::int32_t>& tokens(Split split) const { return split == Split::kTrain ? train_ : validation_; }
  Batch gather(Split split, const std::vector<std::int64_t>& starts) const;

  std::vector<std::int32_t> train_;
  std::vector<std::int32_t> validation_;
  std::int64_t context_;
  std::int64_t vocab_size_;
  double bytes_per_token_;
};

}  // namespace train_gpt
