// front_end_bytes DIR: runs every optimizer of the C++ front end in several formats on inputs made by a formula and
// writes the bytes of parameters, corrections, states and scales to DIR/<case>.bin. The Python package does the same on
// the same inputs (tests/python/test_front_ends.py); the files must be equal.
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "flashoptim/torch/flashoptim.h"

namespace {

using flashoptim::torch::FlashOptimizer;

const std::vector<std::vector<int64_t>> kShapes = {{64, 100}, {5000}, {33}, {3, 7}, {8, 32, 3, 3}};
constexpr int kSteps = 7;

torch::Tensor ramp(const std::vector<int64_t>& shape, double slope, double offset) {
  int64_t numel = 1;
  for (int64_t size : shape) numel *= size;
  return torch::sin(torch::arange(numel, torch::kFloat64) * slope + offset).reshape(shape);
}

template <class Optimizer, class Options>
std::unique_ptr<FlashOptimizer> make(const std::vector<torch::Tensor>& params, Options options,
                                     const std::string& codec, int64_t bits) {
  options.weight_decay(0.1).state_codec(codec).master_weight_bits(bits).seed(7);
  return std::make_unique<Optimizer>(params, options);
}

std::unique_ptr<FlashOptimizer> make_optimizer(const std::string& name, const std::vector<torch::Tensor>& params,
                                               const std::string& codec, int64_t bits) {
  namespace ft = flashoptim::torch;
  if (name == "adamw")
    return make<ft::FlashAdamW>(params, ft::FlashAdamWOptions(3e-3).betas({0.8, 0.95}).eps(1e-6), codec, bits);
  if (name == "adam")
    return make<ft::FlashAdam>(params, ft::FlashAdamOptions(3e-3).betas({0.8, 0.95}).eps(1e-6), codec, bits);
  if (name == "sgd")
    return make<ft::FlashSGD>(params, ft::FlashSGDOptions(3e-3).momentum(0.8).dampening(0.2), codec, bits);
  if (name == "sgdw")
    return make<ft::FlashSGDW>(params, ft::FlashSGDWOptions(3e-3).momentum(0.8).nesterov(true), codec, bits);
  return make<ft::FlashLion>(params, ft::FlashLionOptions(3e-3).betas({0.8, 0.95}), codec, bits);
}

void write(std::ofstream& out, const torch::Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return;
  const torch::Tensor flat = tensor.detach().contiguous();
  out.write(static_cast<const char*>(flat.data_ptr()), static_cast<std::streamsize>(flat.nbytes()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: front_end_bytes DIR\n";
    return 2;
  }
  for (const std::string optimizer : {"adamw", "adam", "sgd", "sgdw", "lion"}) {
    for (const std::string codec : {"default", "paper"}) {
      for (const int64_t bits : {0, 24, 32}) {
        for (const auto dtype : {torch::kBFloat16, torch::kFloat16, torch::kFloat32}) {
          std::vector<torch::Tensor> params;
          for (size_t i = 0; i < kShapes.size(); ++i) {
            params.push_back((ramp(kShapes[i], 0.37, static_cast<double>(i)) * 0.5).to(dtype).requires_grad_());
          }
          const auto opt = make_optimizer(optimizer, params, codec, bits);
          for (int t = 0; t < kSteps; ++t) {
            for (size_t i = 0; i < params.size(); ++i) {
              params[i].mutable_grad() = (ramp(kShapes[i], 0.11 * (t + 1), static_cast<double>(i)) * 1e-2).to(dtype);
            }
            opt->step();
          }
          const std::string name = optimizer + "-" + codec + "-" + std::to_string(bits) + "-" +
                                   (dtype == torch::kBFloat16  ? "bfloat16"
                                    : dtype == torch::kFloat16 ? "float16"
                                                               : "float32");
          std::ofstream out(std::filesystem::path(argv[1]) / (name + ".bin"), std::ios::binary);
          for (const torch::Tensor& param : params) {
            write(out, param);
            const auto* state = opt->param_state(param);
            write(out, state->correction);
            for (size_t k = 0; k < state->states.size(); ++k) {
              write(out, state->states[k]);
              write(out, state->scales[k]);
            }
          }
          if (!out) {
            std::cerr << "cannot write " << name << "\n";
            return 1;
          }
        }
      }
    }
  }
  return 0;
}
