// Plans that change: steps over some tensors, tensors that move, graphs that outlive their plan, memory from an
// allocator, errors that leave everything as it was.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/cuda/device_tensors.h"

namespace flashoptim::cuda_test {
namespace {

/// Every kind of kernel, some tensors misaligned, neighbours and loners in each launch, two hyperparameter sets.
void add_mixture(PlanPair& pair, const Config& config) {
  Config wide = config, paper = config;
  wide.codec = StateCodec::kFloat32;
  paper.codec = StateCodec::kPaper;
  for (int i = 0; i < 6; ++i) {
    pair.add(config, {17 + i, 64 + 32 * (i % 3)}, i == 3 ? 2 : 0);
    pair.add(config, {3, 40 + i});
    pair.add(wide, {1, 64 + i});
    pair.tensor(pair.size() - 1).host().hyper_index = pair.tensor(pair.size() - 1).device().hyper_index = 1;
    pair.add(paper, {1, 1000 + i});
  }
  pair.add(config, {0, 0});
  pair.add(config, {1, 300001});
}

std::vector<Hyperparameters> two_sets(const Config& config, int64_t step) {
  std::vector<Hyperparameters> hypers = {test_hyper(config, step), test_hyper(config, step)};
  hypers[1].weight_decay = 0.0;
  hypers[1].lr *= 0.5;
  return hypers;
}

std::vector<ParameterTensors> device_tensors(PlanPair& pair) {
  std::vector<ParameterTensors> list;
  for (size_t i = 0; i < pair.size(); ++i) list.push_back(pair.tensor(i).device());
  return list;
}

/// A stream, and a graph of what is done to it.
class Capture {
 public:
  Capture() { EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess); }
  ~Capture() {
    destroy_graph();
    cudaStreamDestroy(stream_);
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  cudaStream_t stream() const { return stream_; }
  template <class Body>
  void record(Body body) {
    ASSERT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    body();
    ASSERT_CUDA(cudaStreamEndCapture(stream_, &graph_));
    ASSERT_CUDA(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  void replay() {
    ASSERT_CUDA(cudaDeviceSynchronize());  // what the test has set
    ASSERT_CUDA(cudaGraphLaunch(executable_, stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
  }
  size_t nodes() const {
    size_t count = 0;
    EXPECT_EQ(cudaGraphGetNodes(graph_, nullptr, &count), cudaSuccess);
    return count;
  }
  /// Blocks of the graph's only kernel.
  unsigned int blocks() const {
    cudaGraphNode_t node;
    size_t count = 1;
    cudaKernelNodeParams params{};
    EXPECT_EQ(cudaGraphGetNodes(graph_, &node, &count), cudaSuccess);
    EXPECT_EQ(cudaGraphKernelNodeGetParams(node, &params), cudaSuccess);
    return params.gridDim.x;
  }
  void destroy_graph() {
    if (executable_ != nullptr) {
      EXPECT_EQ(cudaGraphExecDestroy(executable_), cudaSuccess);
    }
    if (graph_ != nullptr) {
      EXPECT_EQ(cudaGraphDestroy(graph_), cudaSuccess);
    }
    executable_ = nullptr;
    graph_ = nullptr;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

/// Counts, and gives what it is told to.
struct CountingAllocator {
  int allocated = 0, freed = 0;
  int64_t bytes = 0;
  void* stream = nullptr;
  bool fails = false;
  size_t offset = 0;

  static void* allocate(void* user, int64_t bytes, void* stream) {
    auto* const self = static_cast<CountingAllocator*>(user);
    void* memory = nullptr;
    if (self->fails || cudaMalloc(&memory, static_cast<size_t>(bytes) + 256) != cudaSuccess) return nullptr;
    ++self->allocated;
    self->bytes = bytes;
    self->stream = stream;
    // What an allocator hands out holds anything at all.
    cudaMemset(memory, 0xa5, static_cast<size_t>(bytes) + 256);
    return static_cast<char*>(memory) + self->offset;
  }
  static void free(void* user, void* memory) {
    auto* const self = static_cast<CountingAllocator*>(user);
    ++self->freed;
    cudaFree(static_cast<char*>(memory) - self->offset);
  }
  cuda::MakeOptions options(void* stream = nullptr) {
    cuda::MakeOptions options;
    options.stream = stream;
    options.allocator = {allocate, free, this};
    return options;
  }
};

TEST(CudaStepSome, InAnyPartsAndOrderIsTheStep) {
  const Config configs[] = {{},
                            {OptimizerKind::kSgd, true, StateCodec::kDefault, DType::kFloat16, DType::kFloat16},
                            {OptimizerKind::kSgdw, false},
                            {OptimizerKind::kLion, false, StateCodec::kDefault, DType::kBFloat16, DType::kFloat32}};
  for (const Config& config : configs) {
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    add_mixture(pair, config);
    ASSERT_OK(pair.make());
    std::mt19937 random(3);
    for (int64_t step = 1; step <= 6; ++step) {
      pair.new_gradients({step == 4, 1e-3f});
      const auto hypers = two_sets(config, step);
      std::vector<int64_t> order(pair.size());
      std::iota(order.begin(), order.end(), 0);
      // In order, so that all parts have neighbours; backwards, as gradients come; and anyhow.
      if (step % 3 == 1) std::reverse(order.begin(), order.end());
      if (step % 3 == 2) std::shuffle(order.begin(), order.end(), random);
      for (size_t at = 0; at < order.size();) {
        const size_t count = std::min<size_t>(step == 6 ? order.size() : 1 + random() % 5, order.size() - at);
        ASSERT_OK(pair.cuda().step_some(order.data() + at, static_cast<int64_t>(count), hypers.data(), 2));
        at += count;
      }
      ASSERT_OK(pair.cpu().step(hypers.data(), 2));
      ASSERT_EQ(pair.difference(), "") << "step " << step;
      // And a whole step behind them.
      ASSERT_OK(pair.cpu().step(hypers.data(), 2));
      ASSERT_OK(pair.cuda().step(hypers.data(), 2));
      ASSERT_EQ(pair.difference(), "") << "the step behind step " << step;
    }
  }
}

/// Gradients, indices and arrays that have changed reach parts and whole steps alike, whichever comes first.
TEST(CudaStepSome, WhatHasChangedArrives) {
  const Config config;
  PlanPair pair(config), other(config);
  for (PlanPair* p : {&pair, &other}) {
    for (int i = 0; i < 50; ++i) p->add({3 + i, 96});
  }
  ASSERT_OK(pair.make());
  ASSERT_OK(other.make());
  pair.new_gradients({});
  other.new_gradients({});
  std::vector<Hyperparameters> hypers(50, test_hyper(config, 1));
  for (size_t i = 0; i < hypers.size(); ++i) hypers[i].lr = 1e-3 * static_cast<double>(i + 1);
  std::mt19937 random(5);
  for (int round = 0; round < 30; ++round) {
    const auto i = static_cast<int64_t>(random() % 50);
    const TensorPair &here = pair.tensor(static_cast<size_t>(i)), &there = other.tensor(static_cast<size_t>(i));
    const auto set = static_cast<int32_t>(random() % 50);
    switch (random() % 3) {
      case 0:
        ASSERT_OK(pair.cpu().set_gradient(i, there.host().gradient));
        ASSERT_OK(pair.cuda().set_gradient(i, there.device().gradient));
        break;
      case 1:
        ASSERT_OK(pair.cpu().set_hyper_index(i, set));
        ASSERT_OK(pair.cuda().set_hyper_index(i, set));
        break;
      default:
        // All of its arrays: the others' in every other round, and back.
        ParameterTensors host = round % 2 == 0 ? there.host() : here.host();
        ParameterTensors device = round % 2 == 0 ? there.device() : here.device();
        host.hyper_index = device.hyper_index = set;
        ASSERT_OK(pair.cpu().set_tensor(i, host));
        ASSERT_OK(pair.cuda().set_tensor(i, device));
    }
    if (round % 5 == 4) {
      ASSERT_OK(pair.cpu().step(hypers.data(), 50));
      ASSERT_OK(pair.cuda().step(hypers.data(), 50));
    } else {
      const int64_t some[] = {i, (i + 1) % 50, (i + 7) % 50};
      const int64_t count = round % 2 == 0 ? 1 : 3;
      ASSERT_OK(pair.cpu().step_some(some, count, hypers.data(), 50));
      ASSERT_OK(pair.cuda().step_some(some, count, hypers.data(), 50));
    }
    ASSERT_EQ(pair.difference(), "") << "round " << round;
    ASSERT_EQ(other.difference(), "") << "round " << round;
  }
}

TEST(CudaStepSome, NumbersOfTheDeviceAndSetsBeyondTheInlineOnes) {
  const Config config;
  PlanPair pair(config);
  constexpr int kTensors = 60;
  for (int i = 0; i < kTensors; ++i) {
    pair.add({1, 100 + i});
    pair.tensor(pair.size() - 1).host().hyper_index = pair.tensor(pair.size() - 1).device().hyper_index = i;
  }
  ASSERT_OK(pair.make());
  std::vector<Hyperparameters> hypers(kTensors, test_hyper(config, 1));
  DeviceValue<float> lr(3e-3f), divisor(4.0f), found_inf(0.0f);
  DeviceValue<int64_t> counter(7);
  std::vector<const float*> lrs(kTensors, nullptr);
  std::vector<const int64_t*> steps(kTensors, nullptr);
  lrs[41] = lr.pointer();
  steps[41] = counter.pointer();
  cuda::StepOptions options;
  options.lr = lrs.data();
  options.step = steps.data();
  const std::vector<std::vector<int64_t>> parts = {{41}, {40, 41, 42}, {59, 3}, {5, 6, 7}, {41, 20}};
  for (const bool scaled : {false, true}) {
    flashoptim::StepOptions host_options;
    options.gradient_divisor = scaled ? divisor.pointer() : nullptr;
    options.found_inf = scaled ? found_inf.pointer() : nullptr;
    host_options.gradient_scale = scaled ? 0.25f : 1.0f;
    for (const std::vector<int64_t>& some : parts) {
      pair.new_gradients({});
      hypers[41].lr = static_cast<double>(3e-3f);
      hypers[41].step = 7;
      const auto count = static_cast<int64_t>(some.size());
      ASSERT_OK(pair.cpu().step_some(some.data(), count, hypers.data(), kTensors, host_options));
      hypers[41].lr = -1.0;  // the device's stand for these
      hypers[41].step = 0;
      ASSERT_OK(pair.cuda().step_some(some.data(), count, hypers.data(), kTensors, options));
      ASSERT_EQ(pair.difference(), "");
      if (!scaled) continue;
      found_inf.set(1.0f);
      ASSERT_OK(pair.cuda().step_some(some.data(), count, hypers.data(), kTensors, options));
      ASSERT_EQ(pair.difference(), "") << "found_inf";
      found_inf.set(0.0f);
    }
  }
}

/// What a call costs, counted in launches rather than timed: of one tensor, one launch of its own blocks, whatever has
/// changed and however many others there are.
TEST(CudaStepSome, OneTensorIsOneLaunch) {
  const Config config;
  PlanPair pair(config);
  pair.add({1, 768});
  pair.add({1, 64 * 32 * 16});
  std::vector<ParameterTensors> list;
  for (int i = 0; i < 10000; ++i) {
    list.push_back(pair.tensor(0).device());
    list.push_back(pair.tensor(1).device());
  }
  cuda::Plan plan;
  const auto count = static_cast<int64_t>(list.size());
  ASSERT_OK(cuda::Plan::make(config.optimizer, false, list.data(), count, 0, &plan));
  const Hyperparameters hyper = test_hyper(config, 1);
  for (const int64_t index : {int64_t{10000}, int64_t{10001}}) {
    for (int64_t i = 0; i < count; ++i) ASSERT_OK(plan.set_tensor(i, list[static_cast<size_t>(i)]));
    Capture capture;
    cuda::StepOptions options;
    options.stream = capture.stream();
    capture.record([&] { EXPECT_OK(plan.step_some(&index, 1, &hyper, 1, options)); });
    EXPECT_EQ(capture.nodes(), 1u);
    // Blocks of 4 warps, tiles of 16 groups.
    EXPECT_EQ(capture.blocks(), index == 10000 ? 1u : 16u);
  }
  const int64_t neighbours[] = {10000, 10001, 10002};
  Capture capture;
  cuda::StepOptions options;
  options.stream = capture.stream();
  capture.record([&] { EXPECT_OK(plan.step_some(neighbours, 3, &hyper, 1, options)); });
  EXPECT_EQ(capture.nodes(), 2u) << "what has changed, and the step";
}

TEST(CudaGraph, OutlivesItsPlan) {
  const Config config;
  CountingAllocator allocator;
  PlanPair pair(config);
  add_mixture(pair, config);
  ASSERT_OK(pair.make());
  const auto list = device_tensors(pair);
  const auto hypers = two_sets(config, 1);
  const int64_t some[] = {0, 1, 4, 5};
  DeviceValue<cuda::GradientNorm> norm({});
  for (const bool remade : {false, true}) {
    allocator = {};
    Capture capture;
    {
      cuda::Plan plan;
      ASSERT_OK(cuda::Plan::make(config.optimizer, false, list.data(), static_cast<int64_t>(list.size()), 0, &plan,
                                 allocator.options()));
      cuda::StepOptions options;
      options.stream = capture.stream();
      cuda::NormOptions norm_options;
      norm_options.stream = capture.stream();
      capture.record([&] {
        EXPECT_OK(plan.gradient_norm(norm_options, norm.pointer()));
        EXPECT_OK(plan.step(hypers.data(), 2, options));
        EXPECT_OK(plan.step_some(some, 4, hypers.data(), 2, options));
        EXPECT_OK(plan.step_some(some, 1, hypers.data(), 2, options));
      });
      EXPECT_FALSE(plan.retains_memory_forever());
      // Both ways a plan goes.
      if (remade) {
        ASSERT_OK(cuda::Plan::make(config.optimizer, false, list.data(), 1, 0, &plan));
      }
    }
    EXPECT_EQ(allocator.allocated, 1);
    EXPECT_EQ(allocator.freed, 0) << "the graph can still be replayed";
    for (int replay = 0; replay < 3; ++replay) {
      pair.new_gradients({});
      // Whoever gets freed memory fills it.
      void* filler = nullptr;
      ASSERT_CUDA(cudaMalloc(&filler, static_cast<size_t>(allocator.bytes)));
      ASSERT_CUDA(cudaMemset(filler, 0xff, static_cast<size_t>(allocator.bytes)));
      ASSERT_OK(pair.cpu().step(hypers.data(), 2));
      ASSERT_OK(pair.cpu().step_some(some, 4, hypers.data(), 2));
      ASSERT_OK(pair.cpu().step_some(some, 1, hypers.data(), 2));
      norm.set({});
      capture.replay();
      ASSERT_EQ(pair.difference(), "");
      EXPECT_GT(norm.get().norm, 0.0f);
      ASSERT_CUDA(cudaFree(filler));
    }
    capture.destroy_graph();
    ASSERT_CUDA(cudaDeviceSynchronize());
    // The graph's last word comes on a thread of CUDA's own; a plan made behind it takes the memory back.
    for (int attempt = 0; attempt < 200 && allocator.freed == 0; ++attempt) {
      cuda::Plan plan;
      ASSERT_OK(cuda::Plan::make(config.optimizer, false, list.data(), 1, 0, &plan));
    }
    EXPECT_EQ(allocator.freed, 1);
  }
}

/// A replay steps with what there was at the capture; launches that follow with what there is now.
TEST(CudaGraph, ReplaysWhatWasCapturedWhateverIsSetBehindIt) {
  const Config config;
  PlanPair pair(config), other(config);
  for (PlanPair* p : {&pair, &other}) {
    for (int i = 0; i < 30; ++i) p->add({3 + i, 96});
    ASSERT_OK(p->make());
    p->new_gradients({});
  }
  const auto hypers = two_sets(config, 1);
  const int64_t single = 3, run[] = {10, 11, 12};
  Capture capture;
  cuda::StepOptions options;
  options.stream = capture.stream();
  capture.record([&] {
    EXPECT_OK(pair.cuda().step(hypers.data(), 2, options));
    EXPECT_OK(pair.cuda().step_some(&single, 1, hypers.data(), 2, options));
    EXPECT_OK(pair.cuda().step_some(run, 3, hypers.data(), 2, options));
  });
  const auto step_captured = [&](Plan& plan) {
    ASSERT_OK(plan.step(hypers.data(), 2));
    ASSERT_OK(plan.step_some(&single, 1, hypers.data(), 2));
    ASSERT_OK(plan.step_some(run, 3, hypers.data(), 2));
  };
  step_captured(pair.cpu());
  capture.replay();
  ASSERT_EQ(pair.difference(), "");
  for (size_t i = 0; i < pair.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    ASSERT_OK(pair.cuda().set_tensor(index, other.tensor(i).device()));
    ASSERT_OK(pair.cuda().set_hyper_index(index, 1));
    if (i % 3 == 0) {
      ASSERT_OK(pair.cuda().set_gradient(index, nullptr));
    }
  }
  for (int round = 0; round < 3; ++round) {
    // The graph: the tensors of the capture.
    step_captured(pair.cpu());
    capture.replay();
    ASSERT_EQ(pair.difference(), "") << "replay " << round;
    ASSERT_EQ(other.difference(), "") << "replay " << round;
    // The plan: the others, with the gradients that are left.
    for (size_t i = 0; i < other.size(); ++i) {
      ASSERT_OK(other.cpu().set_hyper_index(static_cast<int64_t>(i), 1));
      if (i % 3 == 0) {
        ASSERT_OK(other.cpu().set_gradient(static_cast<int64_t>(i), nullptr));
      }
    }
    ASSERT_OK(other.cpu().step(hypers.data(), 2));
    ASSERT_OK(pair.cuda().step(hypers.data(), 2, options));
    ASSERT_CUDA(cudaStreamSynchronize(capture.stream()));
    ASSERT_EQ(pair.difference(), "") << "step " << round;
    ASSERT_EQ(other.difference(), "") << "step " << round;
  }
}

TEST(CudaGraph, AnotherPlanIsMadeAndDestroyedDuringACapture) {
  const Config config;
  PlanPair pair(config);
  pair.add({5, 96});
  ASSERT_OK(pair.make());
  pair.new_gradients({});
  const Hyperparameters hyper = test_hyper(config, 1);
  Capture capture;
  cudaStream_t uploads;
  ASSERT_CUDA(cudaStreamCreateWithFlags(&uploads, cudaStreamNonBlocking));
  cuda::StepOptions options;
  options.stream = capture.stream();
  capture.record([&] {
    cuda::Plan plan, refused;
    cuda::MakeOptions make_options;
    make_options.stream = uploads;
    EXPECT_OK(cuda::Plan::make(config.optimizer, false, &pair.tensor(0).device(), 1, 0, &plan, make_options));
    make_options.stream = capture.stream();
    EXPECT_EQ(cuda::Plan::make(config.optimizer, false, &pair.tensor(0).device(), 1, 0, &refused, make_options).code(),
              StatusCode::kInvalidArgument);
    EXPECT_OK(pair.cuda().step(&hyper, 1, options));
  });
  ASSERT_OK(pair.cpu().step(&hyper, 1));
  capture.replay();
  EXPECT_EQ(pair.difference(), "");
  ASSERT_CUDA(cudaStreamDestroy(uploads));
}

TEST(CudaMemory, ComesFromTheCallersAllocatorAndGoesBack) {
  const Config config;
  PlanPair pair(config);
  add_mixture(pair, config);
  ASSERT_OK(pair.make());
  const auto list = device_tensors(pair);
  const auto count = static_cast<int64_t>(list.size());
  cudaStream_t stream, other;
  ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  ASSERT_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  CountingAllocator allocator;
  {
    cuda::Plan plan;
    ASSERT_OK(cuda::Plan::make(config.optimizer, false, list.data(), count, 0, &plan, allocator.options(stream)));
    EXPECT_EQ(allocator.allocated, 1);
    EXPECT_EQ(allocator.stream, stream);
    for (int64_t step = 1; step <= 3; ++step) {
      pair.new_gradients({});
      const auto hypers = two_sets(config, step);
      cuda::StepOptions options;
      options.stream = step == 2 ? other : stream;
      ASSERT_OK(pair.cpu().step(hypers.data(), 2));
      ASSERT_OK(plan.step(hypers.data(), 2, options));
      ASSERT_CUDA(cudaDeviceSynchronize());
      ASSERT_EQ(pair.difference(), "");
    }
    // Remade: the old memory goes back, new memory comes.
    ASSERT_OK(cuda::Plan::make(config.optimizer, false, list.data(), count, 0, &plan, allocator.options(stream)));
    EXPECT_EQ(allocator.allocated, 2);
    EXPECT_EQ(allocator.freed, 1);
    // Not made: the plan is as it was.
    allocator.fails = true;
    const Status none = cuda::Plan::make(config.optimizer, false, list.data(), 1, 0, &plan, allocator.options(stream));
    EXPECT_EQ(none.code(), StatusCode::kOutOfMemory);
    EXPECT_NE(none.message().find("allocator"), std::string::npos) << none.message();
    allocator.fails = false;
    allocator.offset = 8;
    EXPECT_EQ(cuda::Plan::make(config.optimizer, false, list.data(), 1, 0, &plan, allocator.options(stream)).code(),
              StatusCode::kInvalidArgument);
    allocator.offset = 0;
    cuda::MakeOptions half = allocator.options(stream);
    half.allocator.free = nullptr;
    EXPECT_EQ(cuda::Plan::make(config.optimizer, false, list.data(), 1, 0, &plan, half).code(),
              StatusCode::kInvalidArgument);
    EXPECT_EQ(plan.size(), count);
  }
  EXPECT_EQ(allocator.freed, allocator.allocated);
  ASSERT_CUDA(cudaStreamDestroy(stream));
  ASSERT_CUDA(cudaStreamDestroy(other));
}

TEST(CudaErrors, HyperparametersAreCheckedAsOnTheCpu) {
  const Config config;
  PlanPair pair(config);
  pair.add({1, 1000});
  ASSERT_OK(pair.make());
  pair.new_gradients({});
  void (*const spoils[])(Hyperparameters&) = {
      [](Hyperparameters& h) { h.step = 0; },         [](Hyperparameters& h) { h.lr = NAN; },
      [](Hyperparameters& h) { h.lr = -0.5; },        [](Hyperparameters& h) { h.beta1 = 1.0; },
      [](Hyperparameters& h) { h.beta2 = NAN; },      [](Hyperparameters& h) { h.eps = -1e-8; },
      [](Hyperparameters& h) { h.decay_lr = -1e-8; }, [](Hyperparameters& h) { h.weight_decay = INFINITY; },
  };
  const int64_t index = 0;
  for (const auto spoil : spoils) {
    Hyperparameters hyper = test_hyper(config, 1);
    spoil(hyper);
    const Status expected = pair.cpu().step(&hyper, 1);
    ASSERT_FALSE(expected.is_ok());
    DeviceValue<StepTelemetry> telemetry({});
    for (const Status& status :
         {pair.cuda().step(&hyper, 1), pair.cuda().check_step(&hyper, 1), pair.cuda().step_some(&index, 1, &hyper, 1),
          pair.cuda().inspect(&hyper, 1, {}, {}, telemetry.pointer())}) {
      EXPECT_EQ(status.code(), expected.code());
      EXPECT_EQ(status.message(), expected.message());
    }
  }
  EXPECT_EQ(pair.difference(), "");
  cuda::StepOptions options;
  options.gradient_scale = NAN;
  const Hyperparameters hyper = test_hyper(config, 1);
  EXPECT_EQ(pair.cuda().step(&hyper, 1, options).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pair.cuda().step(nullptr, 1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pair.cuda().set_gradients(nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pair.cuda().step_some(nullptr, 1, &hyper, 1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pair.cuda().tensor(7).parameter, nullptr);
  EXPECT_EQ(cuda::Plan::make(config.optimizer, false, &pair.tensor(0).device(), 1, 0, nullptr).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(cuda::zero(nullptr, nullptr, 1, 0, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(cuda::zero(nullptr, nullptr, -1, 0, nullptr).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(
      cuda::merge_weights(DType::kBFloat16, MasterWeights::kNone, nullptr, nullptr, nullptr, 1, 0, nullptr).code(),
      StatusCode::kInvalidArgument);
  EXPECT_EQ(cuda::decode_states(config.optimizer, false, pair.tensor(0).device(), nullptr, 0, nullptr).code(),
            StatusCode::kInvalidArgument);
  ParameterTensors odd = pair.tensor(0).device();
  odd.scales[1] = static_cast<char*>(odd.scales[1]) + 1;
  EXPECT_EQ(pair.cuda().set_tensor(0, odd).code(), StatusCode::kInvalidArgument);
  ASSERT_OK(pair.cpu().step(&hyper, 1));
  ASSERT_OK(pair.cuda().step(&hyper, 1));
  EXPECT_EQ(pair.difference(), "");
}

/// Behind the first of several launches, the library looks for its own errors: those of others must not be among them.
TEST(CudaErrors, AnErrorThatSomebodyLeftIsSaidBeforeAnythingIsLaunched) {
  const Config config;
  PlanPair pair(config);
  add_mixture(pair, config);
  ASSERT_OK(pair.make());
  ASSERT_GT(pair.cuda().launches(), 1);
  pair.new_gradients({});
  const auto hypers = two_sets(config, 1);
  const int64_t some[] = {0, 2};
  ASSERT_EQ(cudaSetDevice(12345), cudaErrorInvalidDevice);
  const Status status = pair.cuda().step(hypers.data(), 2);
  EXPECT_EQ(status.code(), StatusCode::kDeviceError);
  EXPECT_NE(status.message().find("cudaErrorInvalidDevice"), std::string::npos) << status.message();
  EXPECT_EQ(pair.difference(), "");
  ASSERT_EQ(cudaSetDevice(12345), cudaErrorInvalidDevice);
  EXPECT_EQ(pair.cuda().step_some(some, 2, hypers.data(), 2).code(), StatusCode::kDeviceError);
  EXPECT_EQ(pair.difference(), "");
  // Said once: the next step is not held up by it.
  ASSERT_OK(pair.cpu().step(hypers.data(), 2));
  ASSERT_OK(pair.cuda().step(hypers.data(), 2));
  EXPECT_EQ(pair.difference(), "");
}

}  // namespace
}  // namespace flashoptim::cuda_test
