// The LibTorch front end on CUDA: the CPU's bits, and everything a user does with an optimizer there. Skipped without a
// device; built there against that machine's torch by tools/gpu_check.sh.

#include <cmath>
#include <limits>
#include <sstream>

#include "tests/libtorch/support.h"

#if FLASHOPTIM_TORCH_HAS_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace flashoptim_test {
namespace {

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  }
};

std::vector<Tensor> on_device(const std::vector<Tensor>& params) {
  std::vector<Tensor> result;
  for (const Tensor& param : params) {
    result.push_back(param.detach().to(torch::kCUDA, /*non_blocking=*/false, /*copy=*/true).set_requires_grad(true));
  }
  return result;
}

/// The CPU's gradients, moved: a generator on the device would draw others.
void step_both(flash::FlashOptimizer& host, const std::vector<Tensor>& host_params, flash::FlashOptimizer& device,
               const std::vector<Tensor>& device_params, int64_t number) {
  set_gradients(host_params, number);
  for (size_t i = 0; i < host_params.size(); ++i) {
    Tensor(device_params[i]).mutable_grad() = host_params[i].grad().to(torch::kCUDA);
  }
  host.step();
  device.step();
}

Snapshot on_host(const flash::FlashOptimizer& optimizer) {
  Snapshot snapshot(optimizer);
  for (Tensor& tensor : snapshot.tensors) tensor = tensor.cpu();
  return snapshot;
}

TEST_F(Cuda, EveryOptimizerHasTheCpusBits) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const std::vector<Tensor> host_params = mixed_parameters(), params = on_device(host_params);
    const auto host = named.make(host_params), device = named.make(params);
    for (int64_t i = 0; i < 20; ++i) step_both(*host, host_params, *device, params, i);
    for (const Tensor& tensor : device->state_tensors()) EXPECT_TRUE(tensor.is_cuda());
    EXPECT_TRUE(on_host(*host) == on_host(*device));
  }
}

TEST_F(Cuda, ParametersOfBothDevicesInOneOptimizer) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const std::vector<Tensor> host_params = mixed_parameters();
    std::vector<Tensor> params = on_device(host_params);
    for (size_t i = 0; i < params.size(); i += 2) params[i] = host_params[i].detach().clone().set_requires_grad(true);
    const auto host = named.make(host_params), mixed = named.make(params);
    for (int64_t i = 0; i < 5; ++i) {
      set_gradients(host_params, i);
      for (size_t k = 0; k < params.size(); ++k) {
        params[k].mutable_grad() = host_params[k].grad().to(params[k].device(), /*non_blocking=*/false, /*copy=*/true);
      }
      host->step();
      mixed->step();
    }
    EXPECT_TRUE(on_host(*host) == on_host(*mixed));
  }
}

TEST_F(Cuda, ResumedEqualsUninterrupted) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const std::vector<Tensor> host_params = mixed_parameters(), params = on_device(host_params);
    const auto host = named.make(host_params), device = named.make(params);
    for (int64_t i = 0; i < 4; ++i) step_both(*host, host_params, *device, params, i);
    std::stringstream stream;
    torch::serialize::OutputArchive written;
    device->save(written);
    written.save_to(stream);

    const std::vector<Tensor> resumed_params = on_device(params);
    const auto resumed = named.make(resumed_params);
    torch::serialize::InputArchive read;
    read.load_from(stream);
    resumed->load(read);
    for (int64_t i = 4; i < 8; ++i) {
      step_both(*host, host_params, *device, params, i);
      for (size_t k = 0; k < params.size(); ++k) {
        Tensor(resumed_params[k]).mutable_grad() = params[k].grad().clone();
      }
      resumed->step();
    }
    EXPECT_TRUE(on_host(*device) == on_host(*resumed));
    EXPECT_TRUE(on_host(*host) == on_host(*resumed));
  }
}

TEST_F(Cuda, EveryStateHasMemoryOfItsOwnAndAnArchiveHoldsItOnce) {
  std::vector<Tensor> host_params;
  for (int i = 0; i < 30; ++i) host_params.push_back(parameter({64, 64}, i));
  const std::vector<Tensor> params = on_device(host_params);
  const auto options = flash::FlashAdamWOptions(1e-2).min_quantized_numel(64);
  flash::FlashAdamW host(host_params, options), device(params, options);
  step_both(host, host_params, device, params, 0);
  size_t bytes = 0;
  for (const Tensor& tensor : device.state_tensors()) {
    EXPECT_EQ(tensor.storage().nbytes(), tensor.nbytes());
    bytes += tensor.nbytes();
  }
  std::stringstream stream;
  torch::serialize::OutputArchive written;
  device.save(written);
  written.save_to(stream);
  EXPECT_LT(stream.str().size(), 2 * bytes);
  EXPECT_TRUE(on_host(host) == on_host(device));
}

TEST_F(Cuda, DenseLayoutsAndOtherGradientLayouts) {
  const Tensor host = parameter({6, 5, 8, 8}, 3).detach().to(torch::MemoryFormat::ChannelsLast).set_requires_grad(true);
  const Tensor param = on_device({host})[0];
  ASSERT_TRUE(param.is_contiguous(torch::MemoryFormat::ChannelsLast));
  const auto options = flash::FlashAdamWOptions(1e-2).min_quantized_numel(0);
  flash::FlashAdamW on_cpu(std::vector<Tensor>{host}, options), on_cuda(std::vector<Tensor>{param}, options);
  for (int64_t i = 0; i < 4; ++i) {
    Tensor grad = gradient(host, i);  // contiguous: another layout than the parameter's
    if (i == 1) grad = grad.to(torch::kFloat);
    if (i == 2) grad = torch::full({1}, 0.25, torch::kBFloat16).expand_as(host);
    Tensor(host).mutable_grad() = grad;
    Tensor(param).mutable_grad() =
        i == 2 ? torch::full({1}, 0.25, param.options().requires_grad(false)).expand_as(param) : grad.to(torch::kCUDA);
    on_cpu.step();
    on_cuda.step();
    EXPECT_TRUE(on_host(on_cpu) == on_host(on_cuda)) << "step " << i;
  }
}

TEST_F(Cuda, ModelIsCastTrainedExportedAndImported) {
  at::manual_seed(3);
  torch::nn::Sequential net(torch::nn::Linear(16, 48), torch::nn::Tanh(), torch::nn::Linear(48, 1));
  net->to(torch::kCUDA);
  flash::cast_model(*net, torch::kBFloat16, {"2.bias"});
  EXPECT_EQ(net->named_parameters()["0.weight"].scalar_type(), torch::kBFloat16);
  EXPECT_EQ(net->named_parameters()["2.bias"].scalar_type(), torch::kFloat);
  flash::FlashAdamW optimizer(net->parameters(), flash::FlashAdamWOptions(3e-3).min_quantized_numel(0));
  const Tensor x = torch::randn({64, 16}, torch::kCUDA), y = torch::sin(x.sum(1, true));
  double first = 0, last = 0;
  for (int i = 0; i < 300; ++i) {
    net->zero_grad();
    const auto* hidden = net->children()[0]->as<torch::nn::Linear>();
    const auto* head = net->children()[2]->as<torch::nn::Linear>();
    const Tensor activations = torch::tanh(torch::linear(x.to(torch::kBFloat16), hidden->weight, hidden->bias));
    const Tensor output = torch::linear(activations.to(torch::kFloat), head->weight.to(torch::kFloat), head->bias);
    const Tensor loss = torch::mse_loss(output, y);
    loss.backward();
    optimizer.step();
    (i == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, 0.5 * first);
  const auto exported = flash::get_fp32_model_state(*net, optimizer);
  EXPECT_TRUE(exported["0.weight"].is_cuda());
  EXPECT_FALSE(torch::equal(exported["0.weight"], net->named_parameters()["0.weight"].to(torch::kFloat)));
  for (Tensor& param : net->parameters()) {
    torch::NoGradGuard no_grad;
    param.zero_();
  }
  flash::set_fp32_model_state(*net, optimizer, exported);
  const auto again = flash::get_fp32_model_state(*net, optimizer);
  for (const auto& item : exported) EXPECT_TRUE(torch::equal(item.value(), again[item.key()])) << item.key();
  const auto decoded = optimizer.decoded_state(net->named_parameters()["0.weight"]);
  EXPECT_GT(decoded["exp_avg_sq"].max().item<double>(), 0.0);
}

TEST_F(Cuda, NonfiniteGradientsAreCounted) {
  const Tensor param = on_device({parameter({100}, 1)})[0];
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions().min_quantized_numel(0));
  Tensor grad = torch::ones_like(param.detach());
  grad[3] = std::numeric_limits<float>::quiet_NaN();
  grad[90] = std::numeric_limits<float>::infinity();
  Tensor(param).mutable_grad() = grad;
  optimizer.step();
  EXPECT_EQ(optimizer.nonfinite_gradients(), 2);
  EXPECT_TRUE(torch::isfinite(param.detach().slice(0, 32, 64)).all().item<bool>()) << "another group";
}

TEST_F(Cuda, AGradientOfAnotherDeviceIsRefused) {
  const Tensor param = on_device({parameter({100}, 1)})[0];
  const Tensor before = param.detach().clone();
  flash::FlashAdamW optimizer(std::vector<Tensor>{param});
  optimizer.step();  // nothing has a gradient
  EXPECT_TRUE(torch::equal(param, before));
  const Tensor host = torch::ones({100}, torch::kBFloat16);
  EXPECT_NE(error_of([&] {
              Tensor(param).mutable_grad() = host;
              optimizer.step();
            }),
            "");
  EXPECT_TRUE(torch::equal(param, before));
}

// ---- release, clipping, graphs --------------------------------------------------------------------------------------

/// Whose gradients are those of set_gradients(), on the parameters' device.
Tensor loss_of(const std::vector<Tensor>& params, int64_t number) {
  Tensor loss = torch::zeros({}, params[0].device());
  int64_t i = 0;
  for (const Tensor& param : params) {
    const Tensor grad = gradient(param.cpu(), number * 100 + i++).to(param.device());
    loss = loss + (param * grad).sum().to(torch::kFloat);
  }
  return loss;
}

TEST_F(Cuda, ReleasedAndClippedGradientsHaveTheBitsOfAStep) {
  for (const std::string way : {"", "two_pass", "previous", "parameter"}) {
    SCOPED_TRACE(way);
    const std::vector<Tensor> host_params = mixed_parameters(), params = on_device(host_params);
    const auto options = flash::FlashAdamWOptions(1e-2).min_quantized_numel(64);
    flash::FlashAdamW host(host_params, options), device(params, options);
    flash::GradientReleaseOptions release;
    if (!way.empty()) release.clip(way).max_norm(0.5);
    auto of_host = flash::enable_gradient_release(host_params, host, release);
    auto of_device = flash::enable_gradient_release(params, device, release);
    for (int64_t t = 0; t < 4; ++t) {
      for (const bool is_host : {true, false}) {
        const Tensor loss = loss_of(is_host ? host_params : params, t);
        if (way == "two_pass") {
          (is_host ? of_host : of_device).measure_norm([&] { loss.backward({}, /*keep_graph=*/true); });
        }
        loss.backward();
        is_host ? host.step() : device.step();
      }
      for (const Tensor& param : params) EXPECT_FALSE(param.grad().defined());
    }
    if (way.empty()) {
      EXPECT_TRUE(on_host(host) == on_host(device));
    } else {
      // Norms are summed in another order there; coefficients may differ in the last bit.
      EXPECT_NEAR(of_host.grad_norm().item<double>(), of_device.grad_norm().item<double>(), 1e-4);
      for (size_t i = 0; i < params.size(); ++i) {
        EXPECT_TRUE(torch::allclose(host.fp32_weight(host_params[i]), device.fp32_weight(params[i]).cpu(), 1e-3, 1e-3));
      }
    }
  }
}

TEST_F(Cuda, ClipGradNormIsFusedIntoTheStep) {
  const std::vector<Tensor> host_params = mixed_parameters(), params = on_device(host_params);
  flash::FlashAdamW clipped(params, flash::FlashAdamWOptions(1e-2));
  const std::vector<Tensor> twins = on_device(host_params);
  flash::FlashAdamW scaled(twins, flash::FlashAdamWOptions(1e-2));
  for (int64_t t = 0; t < 3; ++t) {
    set_gradients(host_params, t);
    double square = 0;
    for (size_t i = 0; i < params.size(); ++i) {
      params[i].mutable_grad() = host_params[i].grad().to(torch::kCUDA);
      twins[i].mutable_grad() = params[i].grad().clone();
      square += params[i].grad().to(torch::kDouble).square().sum().item<double>();
    }
    const Tensor before = params[0].grad().clone();
    const Tensor norm = clipped.clip_grad_norm_(0.5);
    EXPECT_NEAR(norm.item<double>(), std::sqrt(square), 1e-5 * std::sqrt(square));
    EXPECT_TRUE(torch::equal(params[0].grad(), before)) << "nothing is written";
    EXPECT_EQ(clipped.param_state(params[0])->steps(), t);
    clipped.step();
    for (const Tensor& twin : twins) {
      twin.mutable_grad() = twin.grad().to(torch::kFloat).mul(std::min(1.0, 0.5 / (std::sqrt(square) + 1e-6)));
    }
    scaled.step();
  }
  for (size_t i = 0; i < params.size(); ++i) {
    EXPECT_TRUE(torch::allclose(clipped.fp32_weight(params[i]), scaled.fp32_weight(twins[i]), 1e-3, 1e-3));
  }
  clipped.clip_grad_norm_(0.5);
  clipped.zero_grad();
  for (size_t i = 0; i < params.size(); ++i) {
    params[i].mutable_grad() = torch::ones_like(params[i].detach());
    twins[i].mutable_grad() = torch::ones_like(twins[i].detach());
  }
  flash::FlashAdamW fresh(params, flash::FlashAdamWOptions(1e-2)),
      other(on_device(params), flash::FlashAdamWOptions(1e-2));
  fresh.clip_grad_norm_(0.5);
  fresh.zero_grad(/*set_to_none=*/false);
  for (const Tensor& param : params) param.mutable_grad().fill_(1);
  for (const Tensor& param : other.parameters()) param.mutable_grad() = torch::ones_like(param.detach());
  fresh.step();
  other.step();
  EXPECT_TRUE(on_host(fresh) == on_host(other)) << "zero_grad() forgets the clip";
}

TEST_F(Cuda, TelemetryIsTheCpus) {
  const std::vector<Tensor> host_params = mixed_parameters(), params = on_device(host_params);
  const auto options = flash::FlashAdamWOptions(1.0).min_quantized_numel(64).state_codec("paper");
  flash::FlashAdamW host(host_params, options), device(params, options);
  host.check_numerics();
  device.check_numerics();
  for (int64_t t = 0; t < 4; ++t) step_both(host, host_params, device, params, t);
  const auto ours = device.numerics_report(), theirs = host.numerics_report();
  EXPECT_GT(ours.sampled_updates, 0);
  EXPECT_EQ(ours.sampled_updates, theirs.sampled_updates);
  EXPECT_EQ(ours.unchanged_weights, theirs.unchanged_weights);
  EXPECT_EQ(ours.floored_codes, theirs.floored_codes);
  EXPECT_EQ(ours.largest_update_ratio, theirs.largest_update_ratio);
}

#if FLASHOPTIM_TORCH_HAS_CUDA
TEST_F(Cuda, AGraphOfAStepReplaysIt) {
  const std::vector<Tensor> host_params = mixed_parameters(), params = on_device(host_params);
  const std::vector<Tensor> twins = on_device(host_params);
  const auto options = flash::FlashAdamWOptions(1e-2).min_quantized_numel(64);
  flash::FlashAdamW captured(params, flash::FlashAdamWOptions(options).capturable(true)), eager(twins, options);
  const Tensor lr = torch::full({}, 0.0078125f, torch::kCUDA);  // a power of two: the same number as a double
  captured.set_lr_tensor(0, lr);
  for (const Tensor& param : params) param.mutable_grad() = torch::zeros_like(param.detach());
  const auto set = [&](int64_t number) {
    set_gradients(host_params, number);
    for (size_t i = 0; i < params.size(); ++i) {
      params[i].mutable_grad().copy_(host_params[i].grad());
      twins[i].mutable_grad() = params[i].grad().clone();
    }
  };
  const auto step_eager = [&](double rate) {
    eager.param_groups()[0].options().set_lr(rate);
    eager.step();
  };
  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(stream);
  {
    flash::FlashAdamW other(on_device(params), options);
    for (const Tensor& param : other.parameters()) param.mutable_grad() = torch::zeros_like(param.detach());
    other.step();
    at::cuda::CUDAGraph refused;
    refused.capture_begin();
    const std::string message = error_of([&] { other.step(); });
    refused.capture_end();
    EXPECT_NE(message.find("capturable = false"), std::string::npos) << message;
  }
  set(0);
  captured.step();  // states, counters and plans are made
  step_eager(0.0078125);
  torch::cuda::synchronize();
  at::cuda::CUDAGraph graph;
  graph.capture_begin();
  captured.step();
  graph.capture_end();
  for (int64_t t = 1; t < 6; ++t) {
    const double rate = t < 3 ? 0.0078125 : 0.00390625;
    lr.fill_(rate);
    set(t);
    graph.replay();
    step_eager(rate);
    torch::cuda::synchronize();
    EXPECT_TRUE(on_host(captured).tensors.size() == on_host(eager).tensors.size());
    for (size_t i = 0; i < params.size(); ++i) {
      EXPECT_TRUE(same_bytes(params[i].cpu(), twins[i].cpu())) << "replay " << t << ", parameter " << i;
      EXPECT_EQ(captured.param_state(params[i])->steps(), t + 1);
    }
  }
}
#endif

}  // namespace
}  // namespace flashoptim_test
