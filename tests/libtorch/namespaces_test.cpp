// The usual `using namespace` lines of LibTorch programs beside ours: torch:: stays torch, and every spelling is one
// name.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <type_traits>

#include "flashoptim/torch/flashoptim.h"

using namespace torch;       // NOLINT: what is tested
using namespace flashoptim;  // NOLINT

namespace {

static_assert(std::is_same_v<flashoptim::torch::FlashAdamW, flashoptim::libtorch::FlashAdamW>);
static_assert(std::is_same_v<torch::FlashAdamW, flashoptim::libtorch::FlashAdamW>);
static_assert(std::is_same_v<torch::Tensor, at::Tensor>);
static_assert(std::is_same_v<flashoptim::torch::Tensor, at::Tensor>);

namespace short_name = flashoptim::torch;

TEST(Namespaces, TorchIsNotAmbiguous) {
  torch::Tensor param = torch::ones({4}).requires_grad_();
  Tensor twin = torch::ones({4}, kFloat).requires_grad_();
  torch::nn::Linear theirs(4, 4);
  nn::Linear model(4, 4);
  short_name::cast_model(*model);
  EXPECT_EQ(model->weight.scalar_type(), kBFloat16);

  flashoptim::torch::FlashSGD optimizer(std::vector<torch::Tensor>{param}, flashoptim::torch::FlashSGDOptions(0.5));
  FlashSGD same({optim::OptimizerParamGroup({twin})}, FlashSGDOptions(0.5));
  for (const torch::Tensor& p : {param, twin}) torch::Tensor(p).mutable_grad() = torch::ones({4});
  optimizer.step();
  same.step();
  EXPECT_TRUE(param.equal(twin));
  EXPECT_EQ(state_tensors(optimizer).size(), short_name::state_tensors(same).size());
}

}  // namespace
