// For compute-sanitizer: every kernel beside the step's own (CudaSmall.EveryKernel) at sizes 1, 33 and 1e5 + 7.
#include <gtest/gtest.h>

#include <limits>

#include "src/cuda/tuning.h"
#include "tests/cuda/device_tensors.h"

namespace flashoptim::cuda_test {
namespace {

constexpr int64_t kSizes[] = {1, 33, 100007};

/// Two steps: what is known on the device alone, new gradients and another set of hyperparameters, telemetry.
void step_with_everything(PlanPair& pair, const Config& config) {
  DeviceValue<float> lr(1e-3f), divisor(2.0f), clip(0.5f), found_inf(0.0f);
  DeviceValue<int64_t> counter(0);
  std::vector<StepTelemetry> host_telemetry(pair.size());
  StepTelemetry* telemetry = nullptr;
  ASSERT_CUDA(cudaMalloc(reinterpret_cast<void**>(&telemetry), pair.size() * sizeof(StepTelemetry)));
  ASSERT_CUDA(
      cudaMemcpy(telemetry, host_telemetry.data(), pair.size() * sizeof(StepTelemetry), cudaMemcpyHostToDevice));
  for (int64_t step = 1; step <= 2; ++step) {
    pair.new_gradients({});
    std::vector<Hyperparameters> hypers(2, test_hyper(config, step));
    for (Hyperparameters& hyper : hypers) hyper.lr = static_cast<double>(1e-3f);
    flashoptim::StepOptions host_options;
    host_options.gradient_scale = 0.25f;
    ASSERT_OK(pair.cpu().inspect(hypers.data(), 2, host_options, {1}, host_telemetry.data()));
    ASSERT_OK(pair.cpu().step(hypers.data(), 2, host_options));
    const float* lrs[] = {lr.pointer(), lr.pointer()};
    const int64_t* steps[] = {counter.pointer(), counter.pointer()};
    cuda::StepOptions options;
    options.lr = lrs;
    options.step = steps;
    options.gradient_divisor = divisor.pointer();
    options.clip_coefficient = clip.pointer();
    options.found_inf = found_inf.pointer();
    ASSERT_OK(cuda::advance_step(counter.pointer(), found_inf.pointer(), 0, nullptr));
    ASSERT_OK(pair.cuda().inspect(hypers.data(), 2, options, {1}, telemetry));
    ASSERT_OK(pair.cuda().step(hypers.data(), 2, options));
    ASSERT_EQ(pair.difference(), "") << "step " << step;
    ASSERT_OK(pair.cpu().set_hyper_index(0, 1));
    ASSERT_OK(pair.cuda().set_hyper_index(0, 1));
  }
  std::vector<StepTelemetry> device_telemetry(pair.size());
  EXPECT_EQ(cudaMemcpy(device_telemetry.data(), telemetry, pair.size() * sizeof(StepTelemetry), cudaMemcpyDeviceToHost),
            cudaSuccess);
  for (size_t i = 0; i < pair.size(); ++i) EXPECT_EQ(device_telemetry[i].examined, host_telemetry[i].examined);
  cudaFree(telemetry);
}

TEST(CudaSmall, PreparationAndTelemetry) {
  for (const StateCodec codec : {StateCodec::kFloat32, StateCodec::kPaper, StateCodec::kDefault}) {
    for (const OptimizerKind optimizer : {OptimizerKind::kAdamW, OptimizerKind::kLion}) {
      Config config;
      config.optimizer = optimizer;
      config.codec = codec;
      SCOPED_TRACE(name(config));
      PlanPair pair(config);
      for (const int64_t size : kSizes) pair.add({1, size});
      pair.tensor(1).host().hyper_index = pair.tensor(1).device().hyper_index = 1;
      ASSERT_OK(pair.make());
      step_with_everything(pair, config);
    }
  }
}

/// New gradients for few tensors and for more than the small launch takes.
TEST(CudaSmall, GradientsThatMove) {
  Config config;
  config.optimizer = OptimizerKind::kSgd;
  config.codec = StateCodec::kFloat32;
  for (const int tensors : {33, cuda::kGradientsPerLaunch + 1}) {
    PlanPair pair(config);
    for (int i = 0; i < tensors; ++i) pair.add({1, 1});
    ASSERT_OK(pair.make());
    const Hyperparameters hyper = test_hyper(config, 1);
    for (const bool absent : {true, false}) {
      for (int i = 0; i < tensors; ++i) {
        const TensorPair& t = pair.tensor(static_cast<size_t>(i));
        const bool skipped = absent && i != 1;
        ASSERT_OK(pair.cpu().set_gradient(i, skipped ? nullptr : t.host().gradient));
        ASSERT_OK(pair.cuda().set_gradient(i, skipped ? nullptr : t.device().gradient));
      }
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      ASSERT_EQ(pair.difference(), "");
    }
  }
}

TEST(CudaSmall, Zero) {
  for (const int64_t size : kSizes) {
    for (const size_t offset : {size_t{0}, size_t{5}}) {
      Mirror array(static_cast<size_t>(size), offset);
      ASSERT_TRUE(array.ok());
      std::memset(array.data(), 0x5a, array.size());
      array.to_device();
      std::memset(array.data(), 0, array.size());
      void* pointer = array.device();
      ASSERT_OK(cuda::zero(&pointer, &size, 1, 0, nullptr));
      std::string difference;
      EXPECT_TRUE(array.same(&difference)) << difference;
    }
  }
}

/// Both ways: weights, and states of either codec.
TEST(CudaSmall, Conversions) {
  for (const StateCodec codec : {StateCodec::kPaper, StateCodec::kDefault}) {
    for (const int64_t size : kSizes) {
      Config config;
      config.codec = codec;
      SCOPED_TRACE(name(config) + " " + std::to_string(size));
      PlanPair pair(config);
      pair.add({1, size});
      ASSERT_OK(pair.make());
      pair.new_gradients({});
      const Hyperparameters hyper = test_hyper(config, 1);
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      const ParameterTensors &host = pair.tensor(0).host(), &device = pair.tensor(0).device();
      const size_t bytes = static_cast<size_t>(size) * sizeof(float);
      Mirror values[2] = {Mirror(bytes, 0), Mirror(bytes, 0)};
      float* host_values[kMaxSlots] = {};
      float* device_values[kMaxSlots] = {};
      for (int k = 0; k < 2; ++k) {
        ASSERT_TRUE(values[k].ok());
        host_values[k] = reinterpret_cast<float*>(values[k].data());
        device_values[k] = reinterpret_cast<float*>(values[k].device());
      }
      std::string difference;
      const auto expect_same = [&](int count) {
        for (int k = 0; k < count; ++k) EXPECT_TRUE(values[k].same(&difference)) << k << ": " << difference;
        EXPECT_EQ(pair.difference(), "");
      };
      ASSERT_OK(
          merge_weights(config.parameter_dtype, config.master, host.parameter, host.correction, host_values[0], size));
      ASSERT_OK(cuda::merge_weights(config.parameter_dtype, config.master, device.parameter, device.correction,
                                    device_values[0], size, 0, nullptr));
      expect_same(1);
      ASSERT_OK(
          split_weights(config.parameter_dtype, config.master, host_values[0], host.parameter, host.correction, size));
      ASSERT_OK(cuda::split_weights(config.parameter_dtype, config.master, device_values[0], device.parameter,
                                    device.correction, size, 0, nullptr));
      expect_same(1);
      ASSERT_OK(decode_states(config.optimizer, false, host, host_values));
      ASSERT_OK(cuda::decode_states(config.optimizer, false, device, device_values, 0, nullptr));
      expect_same(2);
      ASSERT_OK(encode_states(config.optimizer, false, host, host_values));
      ASSERT_OK(cuda::encode_states(config.optimizer, false, device, device_values, 0, nullptr));
      expect_same(2);
    }
  }
}

}  // namespace
}  // namespace flashoptim::cuda_test
