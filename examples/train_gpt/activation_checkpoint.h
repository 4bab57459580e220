// Activation checkpointing for LibTorch, which has none of its own.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <vector>

namespace train_gpt {

// A part of a network from one tensor to one tensor. It must give the same result each time it is called with the
// same input (no dropout), since the backward pass calls it again.
using Segment = std::function<torch::Tensor(const torch::Tensor&)>;

// segment(input), keeping only `input` for the backward pass, which runs the segment again to get what autograd
// needs. `parameters` are the leaves the segment uses; their gradients are those of the plain call, bit for bit.
torch::Tensor checkpoint(Segment segment, const torch::Tensor& input, const std::vector<torch::Tensor>& parameters);

}  // namespace train_gpt
