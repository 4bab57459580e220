// Text to tokens and back: plain bytes, or byte pairs merged by how often they occur in the training text.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace train_gpt {

// Tokens 0..255 are the bytes themselves, so any input can be encoded; each merge adds one token.
class Tokenizer {
 public:
  // A tokenizer without merges: one token per byte.
  Tokenizer();

  // Learns merges from `text` until the vocabulary has `vocab_size` tokens or no pair occurs twice.
  static Tokenizer train(std::string_view text, std::int64_t vocab_size);

  // Rebuilds a tokenizer from what to_json() gave.
  static Tokenizer from_json(const nlohmann::json& json);

  // The merges, enough to rebuild the tokenizer.
  nlohmann::json to_json() const;

  // Tokens of `text`; decode(encode(text)) == text for every text.
  std::vector<std::int32_t> encode(std::string_view text) const;

  // Bytes of `tokens`.
  std::string decode(const std::vector<std::int32_t>& tokens) const;

  // Number of different tokens.
  std::int64_t vocab_size() const { return static_cast<std::int64_t>(pieces_.size()); }

 private:
  using Pair = std::pair<std::int32_t, std::int32_t>;
  void add_merge(Pair pair);

  std::vector<Pair> merges_;         // in the order learnt; merge i makes token 256 + i
  std::vector<std::string> pieces_;  // the bytes of each token
};

}  // namespace train_gpt
