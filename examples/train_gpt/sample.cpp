#include "sample.h"

#include <ATen/CPUGeneratorImpl.h>

namespace train_gpt {

std::string sample_text(Gpt& model, const Tokenizer& tokenizer, const std::string& prompt, std::int64_t count,
                        double temperature, std::int64_t seed) {
  torch::NoGradGuard no_grad;
  const bool was_training = model->is_training();
  model->eval();
  // A generator of its own: sampling must not shift the random state that training goes on with.
  auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<std::uint64_t>(seed));
  const torch::Device device = model->parameters().front().device();
  const std::int64_t context = model->config().context;

  std::vector<std::int32_t> tokens = tokenizer.encode(prompt);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto seen = std::min<std::int64_t>(context, static_cast<std::int64_t>(tokens.size()));
    const torch::Tensor window = torch::tensor(std::vector<std::int64_t>(tokens.end() - seen, tokens.end()));
    const torch::Tensor logits = model->forward(window.unsqueeze(0).to(device)).select(1, seen - 1).squeeze(0);
    const torch::Tensor probabilities = torch::softmax(logits.to(torch::kCPU, torch::kFloat32) / temperature, -1);
    const torch::Tensor drawn = torch::multinomial(probabilities, 1, /*replacement=*/false, generator);
    tokens.push_back(static_cast<std::int32_t>(drawn.item<std::int64_t>()));
  }
  model->train(was_training);
  return tokenizer.decode(tokens);
}

}  // namespace train_gpt
