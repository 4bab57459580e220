#include "metrics.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>

namespace train_gpt {
namespace {

std::string kept_lines(const std::string& path, std::int64_t last_step) {
  std::ifstream file(path);
  std::string kept;
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_discarded() || json.value("step", last_step + 1) > last_step) break;
    kept += line + "\n";
  }
  return kept;
}

/// The file is the old one or the new one; nothing is left beside it where that fails.
void replace_file(const std::string& path, const std::string& text) {
  const std::string partial = path + ".partial";
  std::ofstream file(partial);
  file << text << std::flush;
  std::error_code error;
  if (file) std::filesystem::rename(partial, path, error);
  if (file && !error) return;
  std::error_code unused;
  std::filesystem::remove(partial, unused);
  throw std::runtime_error("cannot write " + path + ": " + (error ? error.message() : "is there room on the disk?"));
}

}  // namespace

MetricsLog::MetricsLog(const std::string& path, std::int64_t resume_step) : path_(path) {
  replace_file(path, resume_step > 0 ? kept_lines(path, resume_step) : "");
  file_.open(path, std::ios::app);
  if (!file_) throw std::runtime_error("cannot write " + path);
}

void MetricsLog::write(const StepMetrics& metrics) {
  nlohmann::ordered_json line = {{"step", metrics.step}, {"loss", metrics.loss}};
  if (metrics.validation_loss) line["val_loss"] = *metrics.validation_loss;
  line["lr"] = metrics.lr;
  line["grad_norm"] = metrics.gradient_norm;
  line["step_ms"] = metrics.step_ms;
  line["optimizer_ms"] = metrics.optimizer_ms;
  line["tokens_per_s"] = metrics.tokens_per_second;
  file_ << line.dump() << "\n" << std::flush;
  if (!file_) throw std::runtime_error("cannot write " + path_ + ": is there room on the disk?");
}

void write_json(const std::string& path, const nlohmann::json& json) { replace_file(path, json.dump(2) + "\n"); }

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace train_gpt
