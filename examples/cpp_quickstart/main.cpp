// Trains a small network in bf16 with FlashAdamW: 7.125 bytes a parameter, where fp32 AdamW takes 16.
#include <flashoptim/torch/flashoptim.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(64, 256), torch::nn::GELU(), torch::nn::Linear(256, 1));
  flashoptim::torch::cast_model(*model);  // parameters become bfloat16
  flashoptim::torch::FlashAdamW optimizer(model->parameters(), flashoptim::torch::FlashAdamWOptions(3e-3));

  const torch::Tensor x = torch::randn({256, 64}).to(torch::kBFloat16), y = x.slice(1, 0, 8).sum(1, /*keepdim=*/true);
  for (int step = 1; step <= 200; ++step) {
    optimizer.zero_grad();
    const torch::Tensor loss = torch::mse_loss(model->forward(x), y);
    loss.backward();
    optimizer.step();
    if (step == 1 || step % 50 == 0) std::cout << "step " << step << "  loss " << loss.item<float>() << "\n";
  }
  torch::save(optimizer, "optimizer.pt");  // resumes bit for bit
}
