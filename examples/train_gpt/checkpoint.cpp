#include "checkpoint.h"

#include <flashoptim/torch/file.h>

#include <cstdio>
#include <filesystem>

#include "hash.h"
#include "optimizers.h"

namespace train_gpt {
namespace {

constexpr int kFormatVersion = 2;

void hash_tensors(const std::vector<torch::Tensor>& tensors, std::uint64_t& hash) {
  for (const auto& tensor : tensors) {
    const torch::Tensor bytes = tensor.detach().cpu().contiguous();
    hash = hash_bytes(bytes.const_data_ptr(), bytes.nbytes(), hash);
  }
}

// A handle to torch's own generator: setting its state sets torch's.
at::Generator default_generator(const torch::Device& device) { return at::globalContext().defaultGenerator(device); }

std::string stored_string(torch::serialize::InputArchive& archive, const std::string& key) {
  c10::IValue value;
  archive.read(key, value);
  return value.toStringRef();
}

}  // namespace

std::int64_t save_checkpoint(const std::string& path, const CheckpointHeader& header, const torch::nn::Module& model,
                             const torch::optim::Optimizer& optimizer, const torch::Device& device) {
  const nlohmann::json json = {{"format", kFormatVersion},
                               {"options", header.options},
                               {"tokenizer", header.tokenizer},
                               {"data_fingerprint", header.data_fingerprint},
                               {"step", header.step}};
  torch::serialize::OutputArchive archive, model_archive, optimizer_archive;
  archive.write("header", c10::IValue(json.dump()));
  model.save(model_archive);
  archive.write("model", model_archive);
  optimizer.save(optimizer_archive);
  archive.write("optimizer", optimizer_archive);
  archive.write("random", default_generator(torch::kCPU).get_state(), /*is_buffer=*/true);
  if (device.is_cuda()) {
    archive.write("random_cuda", default_generator(device).get_state(), /*is_buffer=*/true);
  }
  flashoptim::torch::save_archive(path, archive);
  return static_cast<std::int64_t>(std::filesystem::file_size(path));
}

CheckpointHeader read_checkpoint_header(const std::string& path) {
  if (!std::filesystem::exists(path)) throw UserError("--resume: there is no checkpoint " + path);
  try {
    torch::serialize::InputArchive archive;
    flashoptim::torch::load_archive(path, archive, torch::kCPU);
    const auto json = nlohmann::json::parse(stored_string(archive, "header"));
    if (json.at("format") != kFormatVersion) throw std::runtime_error("written by another version of train_gpt");
    CheckpointHeader header;
    header.options = json.at("options").get<TrainOptions>();
    header.tokenizer = json.at("tokenizer");
    header.data_fingerprint = json.at("data_fingerprint");
    header.step = json.at("step");
    return header;
  } catch (const c10::Error& error) {
    throw UserError("--resume: cannot read " + path + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    throw UserError("--resume: cannot read " + path + ": " + error.what());
  }
}

void load_checkpoint(const std::string& path, torch::nn::Module& model, torch::optim::Optimizer& optimizer,
                     const torch::Device& device) {
  torch::serialize::InputArchive archive, model_archive, optimizer_archive;
  flashoptim::torch::load_archive(path, archive, device);
  archive.read("model", model_archive);
  model.load(model_archive);
  archive.read("optimizer", optimizer_archive);
  optimizer.load(optimizer_archive);
  torch::Tensor random;
  archive.read("random", random, /*is_buffer=*/true);
  default_generator(torch::kCPU).set_state(random.cpu());
  if (device.is_cuda()) {
    archive.read("random_cuda", random, /*is_buffer=*/true);
    default_generator(device).set_state(random.cpu());
  }
}

std::string state_fingerprint(torch::nn::Module& model, torch::optim::Optimizer& optimizer) {
  std::uint64_t hash = 0;
  hash_tensors(model.parameters(), hash);
  hash_tensors(optimizer_tensors(optimizer), hash);
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace train_gpt
