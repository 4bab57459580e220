#include "data.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "hash.h"
#include "options.h"

namespace train_gpt {
namespace {

namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw UserError("--data: cannot read " + path.string());
  std::ostringstream content;
  content << file.rdbuf();
  return std::move(content).str();
}

// A zero byte in its first kilobytes is how git and grep tell a binary file, too.
bool looks_like_text(const std::string& content) {
  constexpr std::size_t kProbe = 8192;
  return content.find('\0') >= std::min(kProbe, content.size());
}

std::string read_folder(const fs::path& folder) {
  std::vector<fs::path> paths;
  for (const auto& entry : fs::recursive_directory_iterator(folder, fs::directory_options::skip_permission_denied)) {
    const bool hidden = entry.path().filename().string().front() == '.';
    if (entry.is_regular_file() && !hidden) paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());  // the order a folder is listed in differs between machines
  std::string text;
  for (const auto& path : paths) {
    const std::string content = read_file(path);
    if (content.empty() || !looks_like_text(content)) continue;
    if (!text.empty()) text += "\n\n";
    text += content;
  }
  return text;
}

}  // namespace

std::string load_text(const std::string& path) {
  if (!fs::exists(path)) throw UserError("--data: " + path + " does not exist");
  std::string text = fs::is_directory(path) ? read_folder(path) : read_file(path);
  if (text.empty()) throw UserError("--data: " + path + " holds no text");
  return text;
}

std::size_t split_position(const std::string& text, double validation_fraction) {
  return text.size() - static_cast<std::size_t>(static_cast<double>(text.size()) * validation_fraction);
}

Dataset::Dataset(const std::string& text, const Tokenizer& tokenizer, double validation_fraction, std::int64_t context)
    : context_(context), vocab_size_(tokenizer.vocab_size()) {
  const std::size_t cut = split_position(text, validation_fraction);
  const std::string_view view(text);
  train_ = tokenizer.encode(view.substr(0, cut));
  validation_ = tokenizer.encode(view.substr(cut));
  for (Split split : {Split::kTrain, Split::kValidation}) {
    if (size(split) > context_) continue;
    const std::string name = split == Split::kTrain ? "training" : "validation";
    throw UserError("--data: too short: its " + name + " part has " + std::to_string(size(split)) +
                    " tokens, and one window with --context " + std::to_string(context_) + " takes " +
                    std::to_string(context_ + 1));
  }
  bytes_per_token_ = static_cast<double>(text.size() - cut) / static_cast<double>(validation_.size());
}

Batch Dataset::gather(Split split, const std::vector<std::int64_t>& starts) const {
  const auto rows = static_cast<std::int64_t>(starts.size());
  Batch batch{torch::empty({rows, context_}, torch::kLong), torch::empty({rows, context_}, torch::kLong)};
  auto* inputs = batch.inputs.mutable_data_ptr<std::int64_t>();
  auto* targets = batch.targets.mutable_data_ptr<std::int64_t>();
  for (std::int64_t start : starts) {
    const std::int32_t* window = tokens(split).data() + start;
    inputs = std::copy(window, window + context_, inputs);
    targets = std::copy(window + 1, window + context_ + 1, targets);
  }
  return batch;
}

Batch Dataset::train_batch(std::int64_t seed, std::int64_t step, std::int64_t batch) const {
  const auto choices = static_cast<std::uint64_t>(size(Split::kTrain) - context_);
  std::vector<std::int64_t> starts(static_cast<std::size_t>(batch));
  for (std::size_t row = 0; row < starts.size(); ++row) {
    // By counter, not by generator: there is no state that a checkpoint would have to carry.
    const std::uint64_t key = mix(mix(static_cast<std::uint64_t>(seed)) ^ static_cast<std::uint64_t>(step));
    starts[row] = static_cast<std::int64_t>(mix(key + row) % choices);
  }
  return gather(Split::kTrain, starts);
}

std::vector<Batch> Dataset::evaluation_batches(Split split, std::int64_t max_windows, std::int64_t batch) const {
  const std::int64_t available = (size(split) - 1) / context_;
  const std::int64_t windows = std::min(available, max_windows);
  std::vector<Batch> batches;
  for (std::int64_t first = 0; first < windows; first += batch) {
    std::vector<std::int64_t> starts;
    for (std::int64_t i = first; i < std::min(first + batch, windows); ++i) {
      starts.push_back(i * available / windows * context_);
    }
    batches.push_back(gather(split, starts));
  }
  return batches;
}

double Dataset::unigram_loss() const {
  // One is added to every count, so that a token that only the validation part has does not cost infinity.
  std::vector<double> counts(static_cast<std::size_t>(vocab_size_), 1.0);
  for (std::int32_t token : train_) counts[static_cast<std::size_t>(token)] += 1;
  const double total = static_cast<double>(train_.size()) + static_cast<double>(vocab_size_);
  double loss = 0;
  for (std::int32_t token : validation_) loss -= std::log(counts[static_cast<std::size_t>(token)] / total);
  return loss / static_cast<double>(validation_.size());
}

std::uint64_t Dataset::fingerprint() const {
  const std::uint64_t train_hash = hash_bytes(train_.data(), train_.size() * sizeof(train_[0]));
  return hash_bytes(validation_.data(), validation_.size() * sizeof(validation_[0]), train_hash);
}

}  // namespace train_gpt
