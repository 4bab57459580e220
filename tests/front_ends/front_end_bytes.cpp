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

#include "flashoptim/optimizer_info.h"
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

/// The same as of_hyperparameters in tests/python/test_front_ends.py: of what is not named here, counts are 5 and
/// numbers above 1.
double value_of(const std::string& optimizer, const flashoptim::HyperparameterInfo& info) {
  const std::string name = info.name;
  if (name == "beta1") return 0.8;
  if (name == "beta2") return 0.95;
  if (info.highest == 1.0 && info.kind == flashoptim::HyperparameterKind::kNumber) return 0.975;
  if (name == "eps") return 1e-6;
  if (name == "momentum") return 0.8;
  if (name == "dampening") return optimizer == "sgdw" ? 0.0 : 0.2;
  if (name == "nesterov") return optimizer == "sgdw" ? 1.0 : 0.0;
  if (info.kind == flashoptim::HyperparameterKind::kWhole) return 5.0;
  return 0.5 * info.default_value + 1.0;
}

template <class Optimizer>
std::unique_ptr<FlashOptimizer> make(const std::vector<torch::Tensor>& params, const std::string& codec, int64_t bits) {
  using Options = typename Optimizer::Options;
  auto options = Options(3e-3).weight_decay(0.1).state_codec(codec).master_weight_bits(bits).seed(7);
  for (int64_t i = flashoptim::kCommonHyperparameters; i < flashoptim::hyperparameter_count(Options::kKind); ++i) {
    const flashoptim::HyperparameterInfo info = flashoptim::hyperparameter(Options::kKind, i);
    options.set_number(info.name, value_of(flashoptim::optimizer_name(Options::kKind), info));
  }
  return std::make_unique<Optimizer>(params, options);
}

std::unique_ptr<FlashOptimizer> make_optimizer(const std::string& name, const std::vector<torch::Tensor>& params,
                                               const std::string& codec, int64_t bits) {
#define MAKE_OPTIMIZER(title)                                                              \
  if (name == flashoptim::optimizer_name(flashoptim::torch::Flash##title::Options::kKind)) \
    return make<flashoptim::torch::Flash##title>(params, codec, bits);
  FLASHOPTIM_FOR_EACH_OPTIMIZER(MAKE_OPTIMIZER)
#undef MAKE_OPTIMIZER
  return nullptr;
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
  for (int64_t number = 0; number < flashoptim::optimizer_count(); ++number) {
    const std::string optimizer = flashoptim::optimizer_name(flashoptim::optimizer_at(number));
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
