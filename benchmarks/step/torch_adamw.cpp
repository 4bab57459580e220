#include "benchmarks/step/torch_adamw.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/version.h>

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "benchmarks/step/machine.h"

namespace flashoptim::benchmarks {
namespace {

constexpr double kLr = 1e-4, kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8, kWeightDecay = 0.01;

struct Tensors {
  std::vector<at::Tensor> parameters, gradients, exp_avgs, exp_avg_sqs, steps;

  Tensors(const Workload& workload, at::ScalarType dtype) {
    const auto allocate = [dtype](const Shape& shape, double scale) {
      const at::IntArrayRef sizes(shape.data(), static_cast<size_t>(dimensions(shape)));
      void* memory = Arena::instance().take(numel(shape) * static_cast<int64_t>(at::elementSize(dtype)));
      at::Tensor tensor = at::from_blob(memory, sizes, at::TensorOptions().dtype(dtype));
      // Cheap to fill, of the size that matters: no subnormals, no constant.
      tensor.fill_(scale);
      tensor.view({-1}).slice(0, 0, std::nullopt, 2).fill_(-0.5 * scale);
      return tensor;
    };
    for (const Shape& shape : workload.shapes) {
      parameters.push_back(allocate(shape, 0.02));
      gradients.push_back(allocate(shape, 1e-3));
      exp_avgs.push_back(allocate(shape, 0.0));
      exp_avg_sqs.push_back(allocate(shape, 0.0));
      steps.push_back(at::zeros({}, at::kFloat));
    }
  }

  void fused_step() {
    at::_foreach_add_(steps, 1.0);
    at::_fused_adamw_(parameters, gradients, exp_avgs, exp_avg_sqs, {}, steps, kLr, kBeta1, kBeta2, kWeightDecay, kEps,
                      false, false);
  }

  /// torch/optim/adam.py, _multi_tensor_adam, with capturable=False and decoupled weight decay.
  void foreach_step() {
    at::_foreach_add_(steps, at::scalar_tensor(1.0), 1.0);
    at::_foreach_mul_(parameters, 1 - kLr * kWeightDecay);
    at::_foreach_lerp_(exp_avgs, gradients, 1 - kBeta1);
    at::_foreach_mul_(exp_avg_sqs, kBeta2);
    at::_foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - kBeta2);
    std::vector<at::Scalar> step_sizes, root_biases2;
    for (const at::Tensor& step : steps) {
      const double t = step.item<double>();
      step_sizes.emplace_back(-kLr / (1 - std::pow(kBeta1, t)));
      root_biases2.emplace_back(std::sqrt(1 - std::pow(kBeta2, t)));
    }
    const std::vector<at::Tensor> denominators = at::_foreach_sqrt(exp_avg_sqs);
    at::_foreach_div_(denominators, root_biases2);
    at::_foreach_add_(denominators, kEps);
    at::_foreach_addcdiv_(parameters, exp_avgs, denominators, step_sizes);
  }
};

}  // namespace

int64_t torch_bytes_held(TorchKind kind) { return kind == TorchKind::kFusedBFloat16 ? 8 : 16; }

std::function<void()> make_torch_adamw(TorchKind kind, const Workload& workload) {
  const auto tensors =
      std::make_shared<Tensors>(workload, kind == TorchKind::kFusedBFloat16 ? at::kBFloat16 : at::kFloat);
  const auto guarded = [tensors](void (Tensors::*step)()) {
    return [tensors, step] {
      const at::NoGradGuard no_gradient;
      ((*tensors).*step)();
    };
  };
  return guarded(kind == TorchKind::kForeach ? &Tensors::foreach_step : &Tensors::fused_step);
}

void set_torch_threads(int threads) { at::set_num_threads(threads); }
std::string torch_version() { return TORCH_VERSION; }

}  // namespace flashoptim::benchmarks
