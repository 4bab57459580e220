// A decoder-only transformer in the manner of GPT-2.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

namespace train_gpt {

// Shape of a model and how it computes.
struct GptConfig {
  std::int64_t layers = 4;
  std::int64_t heads = 4;
  std::int64_t width = 128;
  std::int64_t context = 64;
  std::int64_t vocab_size = 256;
  bool bias = false;  // GPT-2 has biases in its linear layers and norms
  bool activation_checkpointing = false;
  torch::Dtype compute_dtype = torch::kFloat32;  // of activations; parameters are cast where they are used
};

// The configuration of a named model ("micro", "tiny", "small" or "gpt2"). UserError for another name.
GptConfig model_preset(const std::string& name);

// One layer: attention and MLP, each behind a norm and added to the stream.
class BlockImpl : public torch::nn::Module {
 public:
  explicit BlockImpl(const GptConfig& config);

  // Maps activations of shape [batch, context, width] to the same shape.
  torch::Tensor forward(const torch::Tensor& stream);

 private:
  torch::Tensor attention(const torch::Tensor& x);
  torch::Tensor mlp(const torch::Tensor& x);

  GptConfig config_;
  torch::Tensor attention_norm_, attention_norm_bias_;
  torch::Tensor mlp_norm_, mlp_norm_bias_;
  torch::Tensor qkv_, qkv_bias_;
  torch::Tensor projection_, projection_bias_;
  torch::Tensor mlp_in_, mlp_in_bias_;
  torch::Tensor mlp_out_, mlp_out_bias_;
};
TORCH_MODULE(Block);

// Token and position embeddings, blocks, a final norm, and a head that shares the token embedding.
class GptImpl : public torch::nn::Module {
 public:
  // Draws initial weights from torch's default generator, in fp32.
  explicit GptImpl(const GptConfig& config);

  // Logits [batch, length, vocabulary] for tokens [batch, length], length <= context.
  torch::Tensor forward(const torch::Tensor& tokens);

  // Mean cross entropy in nats, a scalar in fp32.
  torch::Tensor loss(const torch::Tensor& tokens, const torch::Tensor& targets);

  // The configuration the model was built with.
  const GptConfig& config() const { return config_; }

  // Number of parameters; the head counts with the embedding it shares.
  std::int64_t parameter_count() const;

 private:
  GptConfig config_;
  torch::Tensor token_embedding_, position_embedding_;
  torch::nn::ModuleList blocks_;
  torch::Tensor final_norm_, final_norm_bias_;
};
TORCH_MODULE(Gpt);

}  // namespace train_gpt
