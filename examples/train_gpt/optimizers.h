// The only file of this program that knows which optimizers exist.
#pragma once

#include <torch/torch.h>

#include <memory>
#include <vector>

#include "options.h"

namespace train_gpt {

// Puts the parameters into the type the optimizer keeps them in: bf16 for a flash optimizer, fp32 as they are else.
void cast_parameters(torch::nn::Module& model, const TrainOptions& options);

// Makes the optimizer that `options` names, over two groups: matrices, and norms and biases without weight decay.
std::unique_ptr<torch::optim::Optimizer> make_optimizer(torch::nn::Module& model, const TrainOptions& options);

// The tensors the optimizer keeps between steps (averages, scales, corrections ...), as they are in memory, in the
// order of its parameters.
std::vector<torch::Tensor> optimizer_tensors(torch::optim::Optimizer& optimizer);

}  // namespace train_gpt
