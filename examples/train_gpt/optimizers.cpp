#include "optimizers.h"

#include "model.h"
#include "optimizer_names.h"

#include <flashoptim/torch/flashoptim.h>

namespace train_gpt {
namespace {

using OptimizerPtr = std::unique_ptr<torch::optim::Optimizer>;
using Groups = std::vector<torch::optim::OptimizerParamGroup>;

const std::tuple<double, double> kAdamBetas{0.9, 0.95};
const std::tuple<double, double> kLionBetas{0.9, 0.99};
constexpr double kMomentum = 0.9;

// What --lr 0 and a negative --weight-decay stand for; found on the tiny model with the demo's text.
struct Defaults {
  double lr;
  double weight_decay;
};

Defaults defaults_of(const TrainOptions& options) {
  const std::string& name = options.optimizer;
  if (name == "flash-sgd") return {0.3, 0.0};
  if (name == "flash-sgdw") return {0.3, 1e-4};
  // Steps of Adam and Lion have a size of their own, and wider layers add up more of them.
  const double scale =
      static_cast<double>(model_preset("tiny").width) / static_cast<double>(model_preset(options.model).width);
  if (name == "torch-adamw" || name == "flash-adamw") return {4e-3 * scale, 0.1};
  if (name == "flash-adam") return {4e-3 * scale, 0.0};
  if (name == "flash-lion") return {5e-4 * scale, 0.5};
  throw UserError("--optimizer " + name + ": not in this build");
}

template <class GroupOptions>
Groups make_groups(torch::nn::Module& model, const GroupOptions& options) {
  std::vector<torch::Tensor> matrices, vectors;
  for (const auto& parameter : model.parameters()) (parameter.dim() >= 2 ? matrices : vectors).push_back(parameter);
  GroupOptions without_decay = options;
  without_decay.weight_decay(0);
  Groups groups;
  groups.emplace_back(matrices, std::make_unique<GroupOptions>(options));
  groups.emplace_back(vectors, std::make_unique<GroupOptions>(without_decay));
  return groups;
}

template <class Optimizer, class GroupOptions>
OptimizerPtr make(torch::nn::Module& model, const GroupOptions& options) {
  return std::make_unique<Optimizer>(make_groups(model, options), options);
}

OptimizerPtr make_flash(torch::nn::Module& model, const TrainOptions& options, double lr, double weight_decay) {
  namespace flash = flashoptim::torch;
  const auto with_common = [&](auto flash_options) {
    flash_options.weight_decay(weight_decay);
    flash_options.master_weight_bits(options.master_weight_bits);
    flash_options.state_codec(options.state_codec);
    flash_options.seed(options.seed);
    return flash_options;
  };
  const std::string& name = options.optimizer;
  if (name == "flash-adamw") {
    return make<flash::FlashAdamW>(model, with_common(flash::FlashAdamWOptions(lr).betas(kAdamBetas)));
  }
  if (name == "flash-adam") {
    return make<flash::FlashAdam>(model, with_common(flash::FlashAdamOptions(lr).betas(kAdamBetas)));
  }
  if (name == "flash-sgd") {
    return make<flash::FlashSGD>(model, with_common(flash::FlashSGDOptions(lr).momentum(kMomentum)));
  }
  if (name == "flash-sgdw") {
    return make<flash::FlashSGDW>(model, with_common(flash::FlashSGDWOptions(lr).momentum(kMomentum)));
  }
  return make<flash::FlashLion>(model, with_common(flash::FlashLionOptions(lr).betas(kLionBetas)));
}

}  // namespace

void cast_parameters(torch::nn::Module& model, const TrainOptions& options) {
  if (!is_flash(options.optimizer)) return;
  flashoptim::torch::cast_model(model, torch::kBFloat16);
}

OptimizerPtr make_optimizer(torch::nn::Module& model, const TrainOptions& options) {
  const Defaults defaults = defaults_of(options);
  const double lr = options.lr > 0 ? options.lr : defaults.lr;
  const double weight_decay = options.weight_decay >= 0 ? options.weight_decay : defaults.weight_decay;
  if (is_flash(options.optimizer)) return make_flash(model, options, lr, weight_decay);
  return make<torch::optim::AdamW>(model, torch::optim::AdamWOptions(lr).betas(kAdamBetas).weight_decay(weight_decay));
}

std::vector<torch::Tensor> optimizer_tensors(torch::optim::Optimizer& optimizer) {
  if (dynamic_cast<torch::optim::AdamW*>(&optimizer) == nullptr) return flashoptim::torch::state_tensors(optimizer);
  std::vector<torch::Tensor> tensors;
  for (const auto& group : optimizer.param_groups()) {
    for (const auto& parameter : group.params()) {
      const auto found = optimizer.state().find(parameter.unsafeGetTensorImpl());
      if (found == optimizer.state().end()) continue;
      const auto& state = static_cast<const torch::optim::AdamWParamState&>(*found->second);
      for (const auto& tensor : {state.exp_avg(), state.exp_avg_sq(), state.max_exp_avg_sq()}) {
        if (tensor.defined()) tensors.push_back(tensor);
      }
    }
  }
  return tensors;
}

}  // namespace train_gpt
