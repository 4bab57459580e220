#include "tokenizer.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <stdexcept>
#include <unordered_map>

namespace train_gpt {
namespace {

constexpr std::int32_t kByteTokens = 256;

enum class CharClass { kLetter, kDigit, kSpace, kOther };

// Bytes above 127 count as letters: they are parts of UTF-8 characters, mostly of words.
CharClass char_class(unsigned char c) {
  if (c >= 128 || std::isalpha(c) || c == '_') return CharClass::kLetter;
  if (std::isdigit(c)) return CharClass::kDigit;
  return std::isspace(c) ? CharClass::kSpace : CharClass::kOther;
}

// Cuts text into words that merges do not cross: runs of one class, with one leading blank where there is one.
// Without this cut the merges fill up with whole phrases of the training text.
template <class Visit>
void for_each_word(std::string_view text, Visit&& visit) {
  std::size_t begin = 0;
  while (begin < text.size()) {
    std::size_t end = begin;
    if (text[end] == ' ' && end + 1 < text.size() && char_class(text[end + 1]) != CharClass::kSpace) ++end;
    const CharClass first = char_class(text[end]);
    while (end < text.size() && char_class(text[end]) == first) {
      // The last blank of a run belongs to the word after it.
      const bool before_word = first == CharClass::kSpace && text[end] == ' ' && end > begin && end + 1 < text.size() &&
                               char_class(text[end + 1]) != CharClass::kSpace;
      if (before_word) break;
      ++end;
    }
    visit(text.substr(begin, end - begin));
    begin = end;
  }
}

std::vector<std::int32_t> bytes_of(std::string_view text) {
  std::vector<std::int32_t> tokens(text.size());
  std::transform(text.begin(), text.end(), tokens.begin(), [](char c) { return static_cast<unsigned char>(c); });
  return tokens;
}

void replace_pair(std::vector<std::int32_t>& tokens, std::pair<std::int32_t, std::int32_t> pair, std::int32_t merged) {
  std::size_t out = 0;
  for (std::size_t in = 0; in < tokens.size(); ++out) {
    const bool match = in + 1 < tokens.size() && tokens[in] == pair.first && tokens[in + 1] == pair.second;
    tokens[out] = match ? merged : tokens[in];
    in += match ? 2 : 1;
  }
  tokens.resize(out);
}

}  // namespace

Tokenizer::Tokenizer() {
  for (int byte = 0; byte < kByteTokens; ++byte) pieces_.emplace_back(1, static_cast<char>(byte));
}

void Tokenizer::add_merge(Pair pair) {
  const auto known = static_cast<std::int32_t>(pieces_.size());
  if (pair.first < 0 || pair.second < 0 || pair.first >= known || pair.second >= known) {
    throw std::runtime_error("tokenizer: a merge refers to a token that does not exist");
  }
  merges_.push_back(pair);
  pieces_.push_back(pieces_[pair.first] + pieces_[pair.second]);
}

Tokenizer Tokenizer::train(std::string_view text, std::int64_t vocab_size) {
  // Counting each distinct word once makes a merge cost thousands of operations, not one per byte of text.
  std::map<std::string_view, std::int64_t> word_counts;
  for_each_word(text, [&](std::string_view word) { ++word_counts[word]; });
  std::vector<std::pair<std::vector<std::int32_t>, std::int64_t>> words;
  for (const auto& [word, count] : word_counts) words.emplace_back(bytes_of(word), count);

  Tokenizer tokenizer;
  while (tokenizer.vocab_size() < vocab_size) {
    std::map<Pair, std::int64_t> pair_counts;  // ordered, so that a tie is decided the same way everywhere
    for (const auto& [tokens, count] : words) {
      for (std::size_t i = 0; i + 1 < tokens.size(); ++i) pair_counts[{tokens[i], tokens[i + 1]}] += count;
    }
    const auto best = std::max_element(pair_counts.begin(), pair_counts.end(),
                                       [](const auto& a, const auto& b) { return a.second < b.second; });
    if (best == pair_counts.end() || best->second < 2) break;
    const auto merged = static_cast<std::int32_t>(tokenizer.vocab_size());
    for (auto& [tokens, count] : words) replace_pair(tokens, best->first, merged);
    tokenizer.add_merge(best->first);
  }
  return tokenizer;
}

Tokenizer Tokenizer::from_json(const nlohmann::json& json) {
  Tokenizer tokenizer;
  for (const auto& merge : json.at("merges")) tokenizer.add_merge(merge.get<Pair>());
  return tokenizer;
}

nlohmann::json Tokenizer::to_json() const { return {{"merges", merges_}}; }

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  if (merges_.empty()) return bytes_of(text);
  std::map<Pair, std::int32_t> rank;
  for (std::size_t i = 0; i < merges_.size(); ++i) rank.emplace(merges_[i], static_cast<std::int32_t>(i));

  std::unordered_map<std::string_view, std::vector<std::int32_t>> cache;
  std::vector<std::int32_t> result;
  for_each_word(text, [&](std::string_view word) {
    auto [entry, is_new] = cache.try_emplace(word);
    std::vector<std::int32_t>& tokens = entry->second;
    if (is_new) {
      tokens = bytes_of(word);
      while (true) {  // apply the earliest learnt merge that still fits
        auto best = rank.end();
        for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
          const auto found = rank.find({tokens[i], tokens[i + 1]});
          if (found != rank.end() && (best == rank.end() || found->second < best->second)) best = found;
        }
        if (best == rank.end()) break;
        replace_pair(tokens, best->first, kByteTokens + best->second);
      }
    }
    result.insert(result.end(), tokens.begin(), tokens.end());
  });
  return result;
}

std::string Tokenizer::decode(const std::vector<std::int32_t>& tokens) const {
  std::string text;
  for (std::int32_t token : tokens) text += pieces_.at(static_cast<std::size_t>(token));
  return text;
}

}  // namespace train_gpt
