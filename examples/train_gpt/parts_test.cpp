// Tests of the parts that can be wrong without a run looking wrong.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>

#include "activation_checkpoint.h"
#include "data.h"
#include "memory.h"
#include "metrics.h"
#include "model.h"
#include "optimizers.h"
#include "options.h"
#include "schedule.h"
#include "tokenizer.h"

namespace train_gpt {
namespace {

GptConfig small_config(bool checkpointing, bool bias, torch::Dtype compute_dtype) {
  GptConfig config;
  config.layers = 3;
  config.width = 64;
  config.heads = 2;
  config.context = 24;
  config.bias = bias;
  config.activation_checkpointing = checkpointing;
  config.compute_dtype = compute_dtype;
  return config;
}

// Gradients of one loss, in the order of the parameters, behind the loss itself.
std::vector<torch::Tensor> loss_and_gradients(const GptConfig& config, torch::Dtype parameter_dtype) {
  torch::manual_seed(3);
  Gpt model(config);
  model->to(parameter_dtype);
  const torch::Tensor tokens = torch::randint(config.vocab_size, {2, config.context + 1});
  torch::Tensor loss = model->loss(tokens.slice(1, 0, config.context), tokens.slice(1, 1));
  loss.backward();
  std::vector<torch::Tensor> result{loss.detach()};
  for (const auto& parameter : model->parameters()) result.push_back(parameter.grad());
  return result;
}

std::string sample_words() {
  std::string text;
  for (int i = 0; i < 200; ++i)
    text += "the theory of these " + std::to_string(i % 7) + " others, \xc3\xa9t\xc3\xa9\n\n  x";
  return text;
}

TEST(ActivationCheckpoint, GradientsAreThoseOfThePlainCallBitForBit) {
  for (const bool bias : {false, true}) {
    for (const auto parameter_dtype : {torch::kFloat32, torch::kBFloat16}) {
      for (const auto compute_dtype : {torch::kFloat32, torch::kBFloat16}) {
        const auto plain = loss_and_gradients(small_config(false, bias, compute_dtype), parameter_dtype);
        const auto recomputed = loss_and_gradients(small_config(true, bias, compute_dtype), parameter_dtype);
        ASSERT_EQ(plain.size(), recomputed.size());
        for (std::size_t i = 0; i < plain.size(); ++i) {
          ASSERT_TRUE(plain[i].defined() && recomputed[i].defined());
          EXPECT_TRUE(torch::equal(plain[i], recomputed[i])) << "tensor " << i;
          EXPECT_TRUE(i == 0 || plain[i].scalar_type() == parameter_dtype);
        }
      }
    }
  }
}

TEST(ActivationCheckpoint, KeepsLessAndRecomputesOnce) {
  int calls = 0;
  const Segment segment = [&calls](const torch::Tensor& x) {
    ++calls;
    return x.sin().exp().mul(2);
  };
  const torch::Tensor x = torch::randn({5}, torch::requires_grad());
  const torch::Tensor y = checkpoint(segment, x, {});
  EXPECT_EQ(calls, 1);
  y.sum().backward();
  EXPECT_EQ(calls, 2);
  EXPECT_TRUE(torch::equal(x.grad(), (2 * x.sin().exp() * x.cos()).detach()));
  torch::NoGradGuard no_grad;
  EXPECT_FALSE(checkpoint(segment, x, {}).requires_grad());
}

TEST(Tokenizer, RoundTripsEveryByte) {
  std::string all;
  for (int i = 0; i < 512; ++i) all += static_cast<char>(i * 37);
  const Tokenizer bytes;
  EXPECT_EQ(bytes.decode(bytes.encode(all)), all);
  const Tokenizer merged = Tokenizer::train(sample_words(), 300);
  EXPECT_GT(merged.vocab_size(), 280);
  EXPECT_EQ(merged.decode(merged.encode(all)), all);
  EXPECT_EQ(merged.decode(merged.encode(sample_words())), sample_words());
  EXPECT_LT(merged.encode(sample_words()).size() * 2, sample_words().size());
}

TEST(Tokenizer, SurvivesJson) {
  const Tokenizer merged = Tokenizer::train(sample_words(), 300);
  const Tokenizer again = Tokenizer::from_json(nlohmann::json::parse(merged.to_json().dump()));
  EXPECT_EQ(again.vocab_size(), merged.vocab_size());
  EXPECT_EQ(again.encode(sample_words()), merged.encode(sample_words()));
}

TEST(Data, BatchesDependOnSeedAndStepAlone) {
  const Dataset dataset(sample_words(), Tokenizer(), 0.2, 16);
  const Batch first = dataset.train_batch(1, 5, 4);
  dataset.train_batch(1, 6, 4);
  EXPECT_TRUE(torch::equal(dataset.train_batch(1, 5, 4).inputs, first.inputs));
  EXPECT_FALSE(torch::equal(dataset.train_batch(1, 6, 4).inputs, first.inputs));
  EXPECT_FALSE(torch::equal(dataset.train_batch(2, 5, 4).inputs, first.inputs));
  EXPECT_TRUE(torch::equal(first.inputs.slice(1, 1), first.targets.slice(1, 0, 15)));
}

TEST(Data, SplitsDoNotOverlapAndEvaluationCoversItsSplit) {
  const std::string text(1000, 'a');
  const Dataset dataset(text, Tokenizer(), 0.3, 9);
  EXPECT_EQ(dataset.size(Dataset::Split::kTrain), 700);
  EXPECT_EQ(dataset.size(Dataset::Split::kValidation), 300);
  std::int64_t windows = 0;
  for (const auto& batch : dataset.evaluation_batches(Dataset::Split::kValidation, 1000, 4))
    windows += batch.inputs.size(0);
  EXPECT_EQ(windows, (300 - 1) / 9);
  EXPECT_NEAR(dataset.unigram_loss(), -std::log(701.0 / 956.0), 1e-12);
  EXPECT_THROW(Dataset(text, Tokenizer(), 0.3, 300), UserError);
}

TEST(Schedule, RisesThenFallsToATenth) {
  torch::optim::SGD optimizer({torch::zeros(1, torch::requires_grad())}, 2.0);
  CosineSchedule schedule(optimizer, 4, 20);
  std::vector<double> rates;
  for (int i = 0; i < 20; ++i) {
    schedule.step();
    rates.push_back(optimizer.param_groups()[0].options().get_lr());
  }
  EXPECT_DOUBLE_EQ(rates[0], 0.5);
  EXPECT_DOUBLE_EQ(rates[3], 2.0);
  EXPECT_DOUBLE_EQ(rates[4], 2.0);
  EXPECT_NEAR(rates[19], 0.2, 1e-12);
  schedule.restore(7);
  schedule.step();
  EXPECT_DOUBLE_EQ(optimizer.param_groups()[0].options().get_lr(), rates[7]);
}

TEST(Memory, CountsWhatTheAllocatorCounts) {
  count_cpu_allocations();
  TrainOptions options;
  options.optimizer = "torch-adamw";
  Gpt model(small_config(false, true, torch::kFloat32));
  const auto optimizer = make_optimizer(*model, options);
  const torch::Tensor tokens = torch::randint(256, {2, 25});
  const auto step = [&] { model->loss(tokens.slice(1, 0, 24), tokens.slice(1, 1)).backward(); };
  step();
  const std::int64_t before = live_cpu_bytes();
  optimizer->step();
  const MemoryReport report = measure_memory(*model, *optimizer);
  EXPECT_DOUBLE_EQ(report.bytes_per_parameter(), 16.0);
  // Blocks of the C library are a little larger than what was asked for.
  const double counted = static_cast<double>(live_cpu_bytes() - before);
  EXPECT_NEAR(counted, static_cast<double>(report.optimizer_bytes), 0.02 * counted);
}

TEST(Metrics, ResumeDropsLaterLines) {
  const std::string path = ::testing::TempDir() + "train_gpt_metrics.jsonl";
  for (const std::int64_t resume : {0, 3}) {
    MetricsLog log(path, resume);
    for (std::int64_t step = resume + 1; step <= 5; ++step) {
      StepMetrics metrics;
      metrics.step = step;
      log.write(metrics);
    }
  }
  std::ifstream file(path);
  std::int64_t expected = 0;
  for (std::string line; std::getline(file, line);) EXPECT_EQ(nlohmann::json::parse(line).at("step"), ++expected);
  EXPECT_EQ(expected, 5);
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace train_gpt
