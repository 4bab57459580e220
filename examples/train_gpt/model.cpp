#include "model.h"

#include <cmath>

#include "activation_checkpoint.h"
#include "options.h"

namespace train_gpt {
namespace {

namespace F = torch::nn::functional;

constexpr double kNormEps = 1e-5;

// GPT-2's 0.02 at its width of 768, carried over to other widths: narrower models start too small with 0.02 itself and
// spend hundreds of steps on a plateau.
double init_std(const GptConfig& config) { return 0.02 * std::sqrt(768.0 / static_cast<double>(config.width)); }

// Parameters may be kept in another type than activations. The cast stands inside the graph, so its backward casts the
// gradient to the parameter's type; it is free where the types agree.
torch::Tensor cast(const torch::Tensor& parameter, torch::Dtype dtype) {
  return parameter.defined() ? parameter.to(dtype) : parameter;
}

torch::Tensor cast_linear(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) {
  return F::linear(x, cast(weight, x.scalar_type()), cast(bias, x.scalar_type()));
}

torch::Tensor cast_norm(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) {
  return torch::layer_norm(x, {x.size(-1)}, cast(weight, x.scalar_type()), cast(bias, x.scalar_type()), kNormEps);
}

}  // namespace

GptConfig model_preset(const std::string& name) {
  GptConfig config;
  if (name == "tiny") return config;
  if (name == "micro") {
    config.layers = 2;
    config.heads = 2;
    config.width = 64;
    return config;
  }
  if (name == "small") {
    config.layers = 6;
    config.heads = 6;
    config.width = 384;
    config.context = 256;
    return config;
  }
  if (name == "gpt2") {
    config.layers = 12;
    config.heads = 12;
    config.width = 768;
    config.context = 1024;
    config.bias = true;
    return config;
  }
  throw UserError("--model " + name + ": unknown; there are micro, tiny, small and gpt2");
}

BlockImpl::BlockImpl(const GptConfig& config) : config_(config) {
  const std::int64_t width = config.width;
  // Each block adds twice to the stream; this keeps the stream's size at the start independent of depth (GPT-2).
  const double weight_std = init_std(config);
  const double residual_std = weight_std / std::sqrt(2.0 * static_cast<double>(config.layers));
  const auto matrix = [&](const char* name, std::int64_t out, std::int64_t in, double std) {
    return register_parameter(name, torch::randn({out, in}) * std);
  };
  const auto bias = [&](const char* name, std::int64_t size) {
    return config.bias ? register_parameter(name, torch::zeros(size)) : torch::Tensor();
  };
  attention_norm_ = register_parameter("attention_norm", torch::ones(width));
  attention_norm_bias_ = bias("attention_norm_bias", width);
  qkv_ = matrix("qkv", 3 * width, width, weight_std);
  qkv_bias_ = bias("qkv_bias", 3 * width);
  projection_ = matrix("projection", width, width, residual_std);
  projection_bias_ = bias("projection_bias", width);
  mlp_norm_ = register_parameter("mlp_norm", torch::ones(width));
  mlp_norm_bias_ = bias("mlp_norm_bias", width);
  mlp_in_ = matrix("mlp_in", 4 * width, width, weight_std);
  mlp_in_bias_ = bias("mlp_in_bias", 4 * width);
  mlp_out_ = matrix("mlp_out", width, 4 * width, residual_std);
  mlp_out_bias_ = bias("mlp_out_bias", width);
}

torch::Tensor BlockImpl::forward(const torch::Tensor& stream) {
  const torch::Tensor middle = stream + attention(cast_norm(stream, attention_norm_, attention_norm_bias_));
  return middle + mlp(cast_norm(middle, mlp_norm_, mlp_norm_bias_));
}

torch::Tensor BlockImpl::attention(const torch::Tensor& x) {
  const std::int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  const torch::Tensor qkv = cast_linear(x, qkv_, qkv_bias_)
                                .view({batch, length, 3, config_.heads, width / config_.heads})
                                .permute({2, 0, 3, 1, 4});
  const torch::Tensor mixed = torch::scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], /*attn_mask=*/{},
                                                                  /*dropout_p=*/0.0, /*is_causal=*/true);
  return cast_linear(mixed.transpose(1, 2).reshape({batch, length, width}), projection_, projection_bias_);
}

torch::Tensor BlockImpl::mlp(const torch::Tensor& x) {
  return cast_linear(torch::gelu(cast_linear(x, mlp_in_, mlp_in_bias_), "tanh"), mlp_out_, mlp_out_bias_);
}

GptImpl::GptImpl(const GptConfig& config) : config_(config) {
  TORCH_CHECK(config.width % config.heads == 0, "width ", config.width, " is not a multiple of heads ", config.heads);
  const double std = init_std(config);
  token_embedding_ = register_parameter("token_embedding", torch::randn({config.vocab_size, config.width}) * std);
  position_embedding_ = register_parameter("position_embedding", torch::randn({config.context, config.width}) * std);
  blocks_ = register_module("blocks", torch::nn::ModuleList());
  for (std::int64_t i = 0; i < config.layers; ++i) blocks_->push_back(Block(config));
  final_norm_ = register_parameter("final_norm", torch::ones(config.width));
  if (config.bias) final_norm_bias_ = register_parameter("final_norm_bias", torch::zeros(config.width));
}

torch::Tensor GptImpl::forward(const torch::Tensor& tokens) {
  const std::int64_t length = tokens.size(1);
  TORCH_CHECK(length <= config_.context, "length ", length, " exceeds the context of ", config_.context);
  // The lookup is done in fp32: its backward adds up every occurrence of a token, and in bf16 a frequent token's sum
  // stops growing after some hundred terms.
  torch::Tensor stream = F::embedding(tokens, cast(token_embedding_, torch::kFloat32)) +
                         cast(position_embedding_, torch::kFloat32).slice(0, 0, length);
  stream = stream.to(config_.compute_dtype);
  for (const auto& module : *blocks_) {
    auto block = std::static_pointer_cast<BlockImpl>(module);
    if (config_.activation_checkpointing && is_training()) {
      stream = checkpoint([block](const torch::Tensor& x) { return block->forward(x); }, stream, block->parameters());
    } else {
      stream = block->forward(stream);
    }
  }
  return cast_linear(cast_norm(stream, final_norm_, final_norm_bias_), token_embedding_, torch::Tensor());
}

torch::Tensor GptImpl::loss(const torch::Tensor& tokens, const torch::Tensor& targets) {
  const torch::Tensor logits = forward(tokens).to(torch::kFloat32);
  return F::cross_entropy(logits.reshape({-1, config_.vocab_size}), targets.reshape({-1}));
}

std::int64_t GptImpl::parameter_count() const {
  std::int64_t count = 0;
  for (const auto& parameter : parameters()) count += parameter.numel();
  return count;
}

}  // namespace train_gpt
