#include "trainer.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <numbers>

#include "optimizer_names.h"
#include "optimizers.h"
#include "sample.h"

namespace train_gpt {
namespace {

constexpr std::int64_t kEvaluationBatch = 16;
constexpr double kTemperature = 0.8;

// Wall time of work on a device: kernels run on after their launch, so both ends wait for them.
class Stopwatch {
 public:
  explicit Stopwatch(const torch::Device& device) : device_(device), begin_(now()) {}
  double milliseconds() const { return std::chrono::duration<double, std::milli>(now() - begin_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point now() const {
    if (device_.is_cuda()) torch::cuda::synchronize();
    return Clock::now();
  }
  torch::Device device_;
  Clock::time_point begin_;
};

bool multiplies_bf16(const torch::Device& device) {
  if (device.is_cuda()) return true;
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");  // every machine with AMX has it, too
#else
  return false;
#endif
}

// Without such instructions bf16 matrix products were measured 20 times slower than fp32 ones (AVX2); casting the
// weights inside the forward pass costs nearly nothing and leaves parameters and gradients in bf16 all the same.
std::string decide_compute_dtype(const TrainOptions& options, const torch::Device& device) {
  if (options.compute_dtype != "auto") return options.compute_dtype;
  return is_flash(options.optimizer) && multiplies_bf16(device) ? "bf16" : "fp32";
}

torch::Device find_device(const std::string& name) {
  if (name == "cuda" && !torch::cuda::is_available()) {
    throw UserError("--device cuda: this LibTorch finds no CUDA device");
  }
  return torch::Device(name);
}

}  // namespace

Trainer::Trainer(Options options) : options_(std::move(options)), device_(find_device(options_.train.device)) {
  TrainOptions& train = options_.train;
  if (train.threads > 0) torch::set_num_threads(static_cast<int>(train.threads));
  train.threads = torch::get_num_threads();
  CheckpointHeader header;
  if (options_.run.resume) header = read_checkpoint_header(checkpoint_path(options_.run.out));

  GptConfig config = model_preset(train.model);
  if (train.context > 0) config.context = train.context;
  train.context = config.context;
  train.compute_dtype = decide_compute_dtype(train, device_);
  config.compute_dtype = train.compute_dtype == "bf16" ? torch::kBFloat16 : torch::kFloat32;
  config.activation_checkpointing = train.activation_checkpointing;
  load_data(header.tokenizer);
  if (options_.run.resume && header.data_fingerprint != dataset_->fingerprint()) {
    throw UserError("--resume: the text in " + train.data + " is not the one this run was started with");
  }
  config.vocab_size = tokenizer_.vocab_size();

  torch::manual_seed(static_cast<std::uint64_t>(train.seed));
  model_ = Gpt(config);
  model_->to(device_);
  cast_parameters(*model_, train);
  optimizer_ = make_optimizer(*model_, train);
  schedule_ = std::make_unique<CosineSchedule>(*optimizer_, train.warmup, train.steps);
  if (options_.run.resume) {
    load_checkpoint(checkpoint_path(options_.run.out), *model_, *optimizer_, device_);
    step_ = header.step;
    schedule_->restore(step_);
  }
  if (train.gradient_release) {
    flashoptim::torch::GradientReleaseOptions release;
    if (train.clip > 0) release.clip(train.clip_way).max_norm(train.clip);
    release_ = flashoptim::torch::enable_gradient_release(*model_, *optimizer_, release);
  }
}

void Trainer::load_data(const nlohmann::json& stored_tokenizer) {
  const TrainOptions& train = options_.train;
  const std::string text = load_text(train.data);
  const std::size_t cut = split_position(text, train.validation_fraction);
  if (!stored_tokenizer.is_null()) {
    tokenizer_ = Tokenizer::from_json(stored_tokenizer);
  } else if (train.tokenizer == "bpe") {
    tokenizer_ = Tokenizer::train(std::string_view(text).substr(0, cut), train.vocab_size);
  }
  dataset_ = std::make_unique<Dataset>(text, tokenizer_, train.validation_fraction, train.context);
  // The prompt is the first whole line of the validation part, cut after a word if it is long.
  constexpr std::size_t kPromptBytes = 64;
  const std::size_t line = text.find('\n', cut);
  prompt_ = text.substr(line == std::string::npos ? cut : line + 1, kPromptBytes);
  prompt_.resize(prompt_.find_last_of(" \n") + 1);
  if (prompt_.empty()) prompt_ = "\n";
}

double Trainer::clip_gradients() {
  // torch::nn::utils::clip_grad_norm_ takes norms in the gradients' type, which in bf16 is off by up to half a percent.
  std::vector<torch::Tensor> norms, gradients;
  for (const auto& parameter : model_->parameters()) {
    if (!parameter.grad().defined()) continue;
    gradients.push_back(parameter.grad());
    norms.push_back(torch::linalg_vector_norm(parameter.grad(), 2, std::nullopt, false, torch::kFloat32));
  }
  const double norm = torch::linalg_vector_norm(torch::stack(norms)).item<double>();
  const double limit = options_.train.clip;
  if (limit > 0 && norm > limit) {
    for (auto& gradient : gradients) gradient.mul_(limit / norm);
  }
  return norm;
}

double Trainer::run_backward(const torch::Tensor& loss) {
  if (!release_) {
    loss.backward();
    return clip_gradients();
  }
  // Gradients are freed as they come, so the norm is what release tells: none without clipping.
  const bool measures = options_.train.clip > 0 && options_.train.clip_way == "two_pass";
  if (measures) release_->measure_norm([&] { loss.backward({}, /*keep_graph=*/true); });
  loss.backward();
  if (measures) return release_->grad_norm().item<double>();
  if (options_.train.clip == 0) return 0;
  return dynamic_cast<flashoptim::torch::FlashOptimizer&>(*optimizer_)
      .clip_grad_norm_(options_.train.clip)
      .item<double>();
}

StepMetrics Trainer::train_step() {
  const TrainOptions& train = options_.train;
  StepMetrics metrics;
  const Stopwatch whole(device_);
  model_->train();
  schedule_->step();
  const Batch batch = dataset_->train_batch(train.seed, step_, train.batch);
  const torch::Tensor loss = model_->loss(batch.inputs.to(device_), batch.targets.to(device_));
  metrics.loss = loss.item<double>();
  if (!std::isfinite(metrics.loss)) {
    throw UserError("the loss of step " + std::to_string(step_ + 1) + " is not finite: try a smaller --lr");
  }
  metrics.gradient_norm = run_backward(loss);
  const Stopwatch optimizer_only(device_);
  optimizer_->step();
  metrics.optimizer_ms = optimizer_only.milliseconds();
  if (!memory_) memory_ = measure_memory(*model_, *optimizer_);
  optimizer_->zero_grad();
  metrics.step_ms = whole.milliseconds();
  metrics.step = ++step_;
  metrics.lr = optimizer_->param_groups().front().options().get_lr();
  metrics.tokens_per_second = static_cast<double>(train.batch * train.context) / metrics.step_ms * 1e3;
  step_ms_.push_back(metrics.step_ms);
  optimizer_ms_.push_back(metrics.optimizer_ms);
  return metrics;
}

double Trainer::evaluate(Dataset::Split split) {
  torch::NoGradGuard no_grad;
  model_->eval();
  const std::int64_t limit = options_.run.eval_windows;
  const std::int64_t windows = limit > 0 ? limit : dataset_->size(split);  // no split has more windows than tokens
  double sum = 0, tokens = 0;
  for (const Batch& batch : dataset_->evaluation_batches(split, windows, kEvaluationBatch)) {
    const auto count = static_cast<double>(batch.targets.numel());
    sum += model_->loss(batch.inputs.to(device_), batch.targets.to(device_)).item<double>() * count;
    tokens += count;
  }
  return sum / tokens;
}

std::int64_t Trainer::save() {
  CheckpointHeader header;
  header.options = options_.train;
  header.tokenizer = tokenizer_.to_json();
  header.data_fingerprint = dataset_->fingerprint();
  header.step = step_;
  return save_checkpoint(checkpoint_path(options_.run.out), header, *model_, *optimizer_, device_);
}

nlohmann::json Trainer::summarize() {
  const double nats_to_bits_per_byte = 1 / std::numbers::ln2 / dataset_->bytes_per_token();
  const double validation_loss = evaluate(Dataset::Split::kValidation);
  nlohmann::json summary = {
      {"options", options_.train},
      {"steps", step_},
      {"parameters", model_->parameter_count()},
      {"train_loss", evaluate(Dataset::Split::kTrain)},
      {"val_loss", validation_loss},
      {"val_bits_per_byte", validation_loss * nats_to_bits_per_byte},
      {"unigram_loss", dataset_->unigram_loss()},
      {"unigram_bits_per_byte", dataset_->unigram_loss() * nats_to_bits_per_byte},
      {"checkpoint_bytes", save()},
      {"state_fingerprint", state_fingerprint(*model_, *optimizer_)},
      {"peak_tensor_bytes", peak_tensor_bytes(device_)},
      {"peak_resident_bytes", peak_resident_bytes()},
  };
  if (memory_) {
    summary["memory"] = {{"parameter_bytes", memory_->parameter_bytes},
                         {"gradient_bytes", memory_->gradient_bytes},
                         {"optimizer_bytes", memory_->optimizer_bytes},
                         {"bytes_per_parameter", memory_->bytes_per_parameter()}};
    const double step_ms = median(step_ms_);
    summary["step_ms"] = step_ms;
    summary["optimizer_ms"] = median(optimizer_ms_);
    summary["tokens_per_s"] = static_cast<double>(options_.train.batch * options_.train.context) / step_ms * 1e3;
  }
  return summary;
}

std::string Trainer::sample(std::int64_t tokens) {
  return sample_text(model_, tokenizer_, prompt_, tokens, kTemperature, options_.train.seed);
}

std::string Trainer::describe() const {
  const TrainOptions& train = options_.train;
  const GptConfig& config = model_->config();
  const std::string parameter_dtype = is_flash(train.optimizer) ? "bf16" : "fp32";
  char text[512];
  std::snprintf(text, sizeof text,
                "data       %s: %lld training and %lld validation tokens, vocabulary %lld\n"
                "model      %s: %.2f M parameters, %lld layers of width %lld, context %lld\n"
                "optimizer  %s, parameters in %s, activations in %s, %lld threads\n",
                train.data.c_str(), static_cast<long long>(dataset_->size(Dataset::Split::kTrain)),
                static_cast<long long>(dataset_->size(Dataset::Split::kValidation)),
                static_cast<long long>(config.vocab_size), train.model.c_str(),
                static_cast<double>(model_->parameter_count()) / 1e6, static_cast<long long>(config.layers),
                static_cast<long long>(config.width), static_cast<long long>(config.context), train.optimizer.c_str(),
                parameter_dtype.c_str(), train.compute_dtype.c_str(), static_cast<long long>(train.threads));
  return text;
}

}  // namespace train_gpt
