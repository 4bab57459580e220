// What surrounds the kernels: streams, graphs, values on the device, changed gradients, the norm, errors.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "src/cuda/tuning.h"
#include "tests/cuda/device_tensors.h"

namespace flashoptim::cuda_test {
namespace {

/// A model in small: quantized matrices and fp32-state vectors, some misaligned, two hyperparameter sets.
void add_model(PlanPair& pair, const Config& config) {
  Config small = config;
  small.codec = StateCodec::kFloat32;
  for (int i = 0; i < 40; ++i) {
    pair.add(config, {17 + i, 64 + 32 * (i % 3)}, i % 8 == 3 ? 2 : 0);
    pair.add(small, {1, 64 + i});
    pair.tensor(pair.size() - 1).host().hyper_index = pair.tensor(pair.size() - 1).device().hyper_index = 1;
  }
  pair.add(config, {1, 300001});
}

std::vector<Hyperparameters> model_hypers(const Config& config, int64_t step) {
  std::vector<Hyperparameters> hypers = {test_hyper(config, step), test_hyper(config, step)};
  hypers[1].weight_decay = 0.0;
  hypers[1].lr *= 0.5;
  return hypers;
}

TEST(CudaPlan, ModelInTwoLaunches) {
  const Config config;
  PlanPair pair(config);
  add_model(pair, config);
  ASSERT_OK(pair.make());
  EXPECT_EQ(pair.cuda().launches(), 2);
  for (int64_t step = 1; step <= 5; ++step) {
    pair.new_gradients({});
    const auto hypers = model_hypers(config, step);
    ASSERT_OK(pair.cpu().step(hypers.data(), 2));
    ASSERT_OK(pair.cuda().step(hypers.data(), 2));
    ASSERT_EQ(pair.difference(), "");
  }
}

TEST(CudaPlan, OtherStream) {
  const Config config;
  PlanPair pair(config);
  add_model(pair, config);
  ASSERT_OK(pair.make());
  cudaStream_t stream;
  ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int64_t step = 1; step <= 3; ++step) {
    pair.new_gradients({});
    const auto hypers = model_hypers(config, step);
    cuda::StepOptions options;
    options.stream = stream;
    ASSERT_OK(pair.cpu().step(hypers.data(), 2));
    ASSERT_OK(pair.cuda().step(hypers.data(), 2, options));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    ASSERT_EQ(pair.difference(), "");
  }
  ASSERT_CUDA(cudaStreamDestroy(stream));
}

/// The same tensors in plans of other shapes: one tensor per plan instead of all in one.
TEST(CudaPlan, LaunchShapeDoesNotMatter) {
  const Config config;
  PlanPair pair(config);
  for (int i = 0; i < 6; ++i) pair.add({31, 1024 + 32 * i});
  // Large enough for several passes of a block.
  pair.add({1, 42000003});
  ASSERT_OK(pair.make());
  pair.new_gradients({});
  const Hyperparameters hyper = test_hyper(config, 1);
  ASSERT_OK(pair.cpu().step(&hyper, 1));
  for (size_t i = 0; i < pair.size(); ++i) {
    cuda::Plan plan;
    ASSERT_OK(cuda::Plan::make(config.optimizer, false, &pair.tensor(i).device(), 1, 0, &plan));
    ASSERT_OK(plan.step(&hyper, 1));
  }
  ASSERT_EQ(pair.difference(), "");
  const Hyperparameters second = test_hyper(config, 2);
  ASSERT_OK(pair.cpu().step(&second, 1));
  ASSERT_OK(pair.cuda().step(&second, 1));
  ASSERT_EQ(pair.difference(), "");
}

TEST(CudaPlan, ManyHyperparameterSetsAndTensors) {
  const Config config;
  PlanPair pair(config);
  constexpr int kTensors = 600;
  for (int i = 0; i < kTensors; ++i) {
    pair.add({1, 100 + i});
    pair.tensor(pair.size() - 1).host().hyper_index = pair.tensor(pair.size() - 1).device().hyper_index = i % 61;
  }
  ASSERT_OK(pair.make());
  pair.new_gradients({});
  std::vector<Hyperparameters> hypers(61, test_hyper(config, 3));
  for (int i = 0; i < 61; ++i) {
    hypers[static_cast<size_t>(i)].lr = 1e-3 * (i + 1);
    hypers[static_cast<size_t>(i)].step = 1 + i;
    hypers[static_cast<size_t>(i)].maximize = i % 3 == 0;
    hypers[static_cast<size_t>(i)].decay_lr = i % 2 == 0 ? 0.0 : 1e-2;
  }
  ASSERT_OK(pair.cpu().step(hypers.data(), 61));
  ASSERT_OK(pair.cuda().step(hypers.data(), 61));
  ASSERT_EQ(pair.difference(), "");
  // Every pointer changes: no gradient for some, another index for others.
  for (int i = 0; i < kTensors; ++i) {
    if (i % 4 == 0) {
      ASSERT_OK(pair.cpu().set_gradient(i, nullptr));
      ASSERT_OK(pair.cuda().set_gradient(i, nullptr));
    }
    if (i % 4 == 1) {
      ASSERT_OK(pair.cpu().set_hyper_index(i, i % 60));
      ASSERT_OK(pair.cuda().set_hyper_index(i, i % 60));
    }
  }
  ASSERT_OK(pair.cpu().step(hypers.data(), 61));
  ASSERT_OK(pair.cuda().step(hypers.data(), 61));
  ASSERT_EQ(pair.difference(), "");
}

/// New gradient addresses for as many tensors as each way of uploading them takes, and one more.
TEST(CudaPlan, GradientsThatMove) {
  const Config config;
  for (const int tensors :
       {cuda::kGradientsPerLaunch, cuda::kGradientsPerLaunch + 1, cuda::kLargeGradientsPerLaunch + 1}) {
    SCOPED_TRACE(tensors);
    PlanPair pair(config);
    // Room for every gradient, in another place than the tensors' own.
    constexpr int64_t kElements = 40, kStride = 64;
    std::vector<uint16_t> values(static_cast<size_t>(tensors) * kStride);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(0x3a00 + i % 512);
    Mirror moved(values.size() * sizeof(uint16_t), 0);
    ASSERT_TRUE(moved.ok());
    std::memcpy(moved.data(), values.data(), moved.size());
    moved.to_device();
    for (int i = 0; i < tensors; ++i) pair.add({1, kElements});
    ASSERT_OK(pair.make());
    pair.new_gradients({});
    for (int64_t step = 1; step <= 4; ++step) {
      // All, then one at either end, then all back.
      for (int i = 0; i < tensors; ++i) {
        if (step == 3 && i > 0 && i < tensors - 1) continue;
        const bool away = step == 2;
        const size_t at = static_cast<size_t>(i) * kStride * sizeof(uint16_t);
        ParameterTensors& host = pair.tensor(static_cast<size_t>(i)).host();
        ParameterTensors& device = pair.tensor(static_cast<size_t>(i)).device();
        ASSERT_OK(pair.cpu().set_gradient(i, away ? moved.data() + at : host.gradient));
        ASSERT_OK(pair.cuda().set_gradient(i, away ? moved.device() + at : device.gradient));
      }
      const Hyperparameters hyper = test_hyper(config, step);
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      ASSERT_EQ(pair.difference(), "") << "step " << step;
    }
  }
}

TEST(CudaPlan, Zero) {
  // Sizes and starts that are no multiples of 16, more arrays than one launch takes, one of more than a block's pass.
  std::vector<Mirror> arrays;
  std::vector<void*> pointers;
  std::vector<int64_t> bytes;
  for (int i = 0; i < cuda::kZeroArrays + 3; ++i) {
    const size_t size = i == 1 ? 70000001 : i == 2 ? 0 : static_cast<size_t>(i) * 5 % 97;
    Mirror& array = arrays.emplace_back(size, static_cast<size_t>(i % 17));
    ASSERT_TRUE(array.ok());
    std::memset(array.data(), 0x5a, size);
    array.to_device();
    std::memset(array.data(), 0, size);
    pointers.push_back(array.device());
    bytes.push_back(static_cast<int64_t>(size));
  }
  ASSERT_OK(cuda::zero(pointers.data(), bytes.data(), static_cast<int64_t>(bytes.size()), 0, nullptr));
  for (size_t i = 0; i < arrays.size(); ++i) {
    std::string difference;
    EXPECT_TRUE(arrays[i].same(&difference)) << "array " << i << ": " << difference;
  }
  bytes[0] = -1;
  EXPECT_EQ(cuda::zero(pointers.data(), bytes.data(), 1, 0, nullptr).code(), StatusCode::kInvalidArgument);
  bytes[0] = 1;
  pointers[0] = nullptr;
  EXPECT_EQ(cuda::zero(pointers.data(), bytes.data(), 1, 0, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(cuda::zero(pointers.data() + 1, bytes.data() + 1, 1, 99, nullptr).code(), StatusCode::kDeviceError);
  EXPECT_OK(cuda::zero(nullptr, nullptr, 0, 0, nullptr));
}

TEST(CudaPlan, PreparedOnTheDeviceLikeOnTheHost) {
  for (const Config& config : all_configs()) {
    const bool usual = config.codec == StateCodec::kDefault && config.parameter_dtype == DType::kBFloat16 &&
                       config.gradient_dtype == DType::kBFloat16 && config.master == MasterWeights::kCorrection8;
    if (!usual) continue;
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    pair.add({1, 5000});
    ASSERT_OK(pair.make());
    DeviceValue<float> lr(0.0f);
    DeviceValue<int64_t> step_counter(0);
    DeviceValue<float> found_inf(0.0f), divisor(1024.0f), clip(0.37f);
    for (int64_t step = 1; step <= 40; ++step) {
      pair.new_gradients({false, 1.0f});
      Hyperparameters hyper = test_hyper(config, step);
      const float this_lr = 1e-3f / static_cast<float>(step);
      hyper.lr = this_lr;
      hyper.beta1 = 0.9 - 1e-3 * static_cast<double>(step);
      flashoptim::StepOptions host_options;
      host_options.gradient_scale = (3.0f / 1024.0f) * 0.37f;
      ASSERT_OK(pair.cpu().step(&hyper, 1, host_options));
      lr.set(this_lr);
      hyper.lr = 123.0;
      hyper.step = 0;
      cuda::StepOptions options;
      options.gradient_scale = 3.0f;
      options.gradient_divisor = divisor.pointer();
      options.clip_coefficient = clip.pointer();
      options.found_inf = found_inf.pointer();
      const float* lrs[] = {lr.pointer()};
      const int64_t* steps[] = {step_counter.pointer()};
      options.lr = lrs;
      options.step = steps;
      ASSERT_OK(cuda::advance_step(step_counter.pointer(), found_inf.pointer(), 0, nullptr));
      ASSERT_OK(pair.cuda().step(&hyper, 1, options));
      ASSERT_EQ(pair.difference(), "") << "step " << step;
      // A step with found_inf changes nothing, the counter included.
      found_inf.set(1.0f);
      ASSERT_OK(cuda::advance_step(step_counter.pointer(), found_inf.pointer(), 0, nullptr));
      ASSERT_OK(pair.cuda().step(&hyper, 1, options));
      ASSERT_EQ(pair.difference(), "") << "found_inf at step " << step;
      EXPECT_EQ(step_counter.get(), step);
      found_inf.set(0.0f);
    }
  }
}

TEST(CudaPlan, GraphReplaysLikeEager) {
  const Config config;
  PlanPair pair(config);
  add_model(pair, config);
  ASSERT_OK(pair.make());
  cudaStream_t stream;
  ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  DeviceValue<float> lr0(0.0f), lr1(0.0f), found_inf(0.0f);
  DeviceValue<int64_t> counter(0);
  const float* lrs[] = {lr0.pointer(), lr1.pointer()};
  const int64_t* steps[] = {counter.pointer(), counter.pointer()};
  cuda::StepOptions options;
  options.stream = stream;
  options.lr = lrs;
  options.step = steps;
  options.found_inf = found_inf.pointer();
  auto hypers = model_hypers(config, 1);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  EXPECT_OK(cuda::advance_step(counter.pointer(), found_inf.pointer(), 0, stream));
  EXPECT_OK(pair.cuda().step(hypers.data(), 2, options));
  ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  ASSERT_EQ(pair.difference(), "");
  for (int64_t step = 1; step <= 10; ++step) {
    pair.new_gradients({});
    hypers = model_hypers(config, step);
    hypers[0].lr = static_cast<double>(1e-3f * static_cast<float>(step));
    hypers[1].lr = static_cast<double>(2e-3f * static_cast<float>(step));
    lr0.set(static_cast<float>(hypers[0].lr));
    lr1.set(static_cast<float>(hypers[1].lr));
    ASSERT_CUDA(cudaDeviceSynchronize());
    ASSERT_OK(pair.cpu().step(hypers.data(), 2));
    if (step % 4 == 3) {
      // An eager step between replays, with another gradient address and back.
      std::vector<const void*> none(pair.size(), nullptr);
      ASSERT_OK(pair.cuda().set_gradients(none.data()));
      ASSERT_OK(pair.cuda().step(hypers.data(), 2, options));
      for (size_t i = 0; i < pair.size(); ++i) none[i] = pair.tensor(i).device().gradient;
      ASSERT_OK(pair.cuda().set_gradients(none.data()));
      ASSERT_OK(cuda::advance_step(counter.pointer(), nullptr, 0, stream));
      ASSERT_OK(pair.cuda().step(hypers.data(), 2, options));
    } else {
      ASSERT_CUDA(cudaGraphLaunch(executable, stream));
    }
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    ASSERT_EQ(pair.difference(), "") << "step " << step;
    found_inf.set(1.0f);
    ASSERT_CUDA(cudaDeviceSynchronize());
    ASSERT_CUDA(cudaGraphLaunch(executable, stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    ASSERT_EQ(pair.difference(), "") << "found_inf at step " << step;
    found_inf.set(0.0f);
    ASSERT_CUDA(cudaDeviceSynchronize());
  }
  ASSERT_CUDA(cudaGraphExecDestroy(executable));
  ASSERT_CUDA(cudaGraphDestroy(graph));
  ASSERT_CUDA(cudaStreamDestroy(stream));
}

TEST(CudaPlan, CountsNonfiniteGradients) {
  Config config;
  config.gradient_dtype = DType::kFloat32;
  PlanPair pair(config);
  add_model(pair, config);
  ASSERT_OK(pair.make());
  pair.new_gradients({true, 1e-3f});
  const auto hypers = model_hypers(config, 1);
  int64_t expected = 5;
  flashoptim::StepOptions host_options;
  host_options.nonfinite_gradients = &expected;
  ASSERT_OK(pair.cpu().step(hypers.data(), 2, host_options));
  DeviceValue<int64_t> counter(5);
  cuda::StepOptions options;
  options.nonfinite_gradients = counter.pointer();
  ASSERT_OK(pair.cuda().step(hypers.data(), 2, options));
  EXPECT_EQ(counter.get(), expected);
  EXPECT_GT(expected, 100);
  EXPECT_EQ(pair.difference(), "");
}

TEST(CudaPlan, GradientNorm) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const size_t offset : {size_t{0}, size_t{2}}) {
      Config config;
      config.gradient_dtype = dtype;
      config.parameter_dtype = dtype;
      if (dtype == DType::kFloat32) config.master = MasterWeights::kNone;
      PlanPair pair(config);
      pair.add({1, 700001}, offset);
      pair.add({30, 147}, offset);
      pair.add({1, 5}, offset);
      pair.add({0, 0});
      ASSERT_OK(pair.make());
      pair.new_gradients({});
      double sum = 0.0;
      for (size_t i = 0; i < pair.size(); ++i) {
        const ParameterTensors& t = pair.tensor(i).host();
        std::vector<float> g(static_cast<size_t>(t.layout.numel()));
        ASSERT_OK(merge_weights(dtype, MasterWeights::kNone, t.gradient, nullptr, g.data(), t.layout.numel()));
        for (const float x : g) sum += static_cast<double>(x * 0.5f) * static_cast<double>(x * 0.5f);
      }
      DeviceValue<cuda::GradientNorm> result({-1.0, -1.0f, -1.0f});
      cuda::NormOptions options;
      options.gradient_scale = 2.0f;
      DeviceValue<float> divisor(4.0f);
      options.gradient_divisor = divisor.pointer();
      options.max_norm = 0.01f;
      ASSERT_OK(pair.cuda().gradient_norm(options, result.pointer()));
      const cuda::GradientNorm first = result.get();
      EXPECT_NEAR(first.sum_of_squares, sum, 1e-12 * sum);
      EXPECT_FLOAT_EQ(first.norm, static_cast<float>(std::sqrt(sum)));
      EXPECT_FLOAT_EQ(first.coefficient, std::min(1.0f, static_cast<float>(0.01 / (std::sqrt(sum) + 1e-6))));
      for (int i = 0; i < 5; ++i) {
        result.set({});
        ASSERT_OK(pair.cuda().gradient_norm(options, result.pointer()));
        const cuda::GradientNorm again = result.get();
        EXPECT_EQ(std::memcmp(&again, &first, sizeof first), 0);
      }
    }
  }
}

TEST(CudaPlan, Errors) {
  const Config config;
  PlanPair pair(config);
  pair.add({1, 100});
  ASSERT_OK(pair.make());
  cuda::Plan plan;
  const Hyperparameters hyper;
  EXPECT_EQ(plan.step(&hyper, 1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pair.cuda().step(&hyper, 0).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pair.cuda().set_gradient(1, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pair.cuda().set_hyper_index(0, 7).code(), StatusCode::kInvalidArgument);
  ParameterTensors t = pair.tensor(0).device();
  t.scales[0] = static_cast<char*>(t.scales[0]) + 1;
  EXPECT_EQ(cuda::Plan::make(config.optimizer, false, &t, 1, 0, &plan).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(cuda::Plan::make(config.optimizer, false, &pair.tensor(0).device(), 1, 99, &plan).code(),
            StatusCode::kDeviceError);
  cuda::Plan empty;
  ASSERT_OK(cuda::Plan::make(config.optimizer, false, nullptr, 0, 0, &empty));
  EXPECT_OK(empty.step(nullptr, 0));
}

}  // namespace
}  // namespace flashoptim::cuda_test
