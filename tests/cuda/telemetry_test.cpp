// The device's telemetry against the CPU's: every number equal, and no byte changed.
#include <gtest/gtest.h>

#include <limits>

#include "tests/cuda/device_tensors.h"

namespace flashoptim::cuda_test {
namespace {

/// One entry per tensor in device memory, from `first` on.
class DeviceTelemetry {
 public:
  explicit DeviceTelemetry(const std::vector<StepTelemetry>& first) : count_(first.size()) {
    (void)cudaMalloc(reinterpret_cast<void**>(&pointer_), count_ * sizeof(StepTelemetry));
    cudaMemcpy(pointer_, first.data(), count_ * sizeof(StepTelemetry), cudaMemcpyHostToDevice);
  }
  ~DeviceTelemetry() { cudaFree(pointer_); }
  DeviceTelemetry(const DeviceTelemetry&) = delete;
  StepTelemetry* pointer() const { return pointer_; }
  std::vector<StepTelemetry> get() const {
    std::vector<StepTelemetry> out(count_);
    EXPECT_EQ(cudaMemcpy(out.data(), pointer_, count_ * sizeof(StepTelemetry), cudaMemcpyDeviceToHost), cudaSuccess);
    return out;
  }

 private:
  size_t count_;
  StepTelemetry* pointer_ = nullptr;
};

std::string text(const StepTelemetry& t) {
  return std::to_string(t.examined) + " examined, " + std::to_string(t.nonfinite_gradients) + " nonfinite, " +
         std::to_string(t.lost_updates) + " lost, " + std::to_string(t.floored_codes) + " floored, " +
         std::to_string(t.saturated_codes) + " saturated, ratio " + std::to_string(t.largest_update_ratio);
}

bool equal(const StepTelemetry& a, const StepTelemetry& b) {
  return a.examined == b.examined && a.nonfinite_gradients == b.nonfinite_gradients &&
         a.lost_updates == b.lost_updates && a.floored_codes == b.floored_codes &&
         a.saturated_codes == b.saturated_codes &&
         std::memcmp(&a.largest_update_ratio, &b.largest_update_ratio, sizeof(float)) == 0;
}

void expect_equal(const std::vector<StepTelemetry>& device, const std::vector<StepTelemetry>& host) {
  ASSERT_EQ(device.size(), host.size());
  for (size_t i = 0; i < device.size(); ++i) {
    EXPECT_TRUE(equal(device[i], host[i]))
        << "tensor " << i << ": device " << text(device[i]) << "; host " << text(host[i]);
  }
}

/// Inspects on both sides; the device's tensors stay as they were.
void inspect_both(PlanPair& pair, const std::vector<Hyperparameters>& hypers, int64_t stride,
                  std::vector<StepTelemetry>* out = nullptr) {
  const int64_t count = static_cast<int64_t>(hypers.size());
  const std::vector<StepTelemetry> zeros(pair.size());
  std::vector<StepTelemetry> host = zeros;
  const DeviceTelemetry device(zeros);
  ASSERT_OK(pair.cpu().inspect(hypers.data(), count, {}, {stride}, host.data()));
  ASSERT_OK(pair.cuda().inspect(hypers.data(), count, {}, {stride}, device.pointer()));
  ASSERT_CUDA(cudaDeviceSynchronize());
  expect_equal(device.get(), host);
  ASSERT_EQ(pair.difference(), "") << "inspect changed a byte";
  if (out != nullptr) *out = host;
}

TEST(CudaTelemetry, EveryConfiguration) {
  StepTelemetry sum{};
  for (const Config& config : all_configs()) {
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    int64_t first = 0;
    for (const GroupLayout layout :
         {GroupLayout{1, 1}, GroupLayout{1, 33}, GroupLayout{0, 0}, GroupLayout{5, 100}, GroupLayout{1, 70001}}) {
      pair.add(layout, first % 3 == 1 ? 2 : 0, first * 32);
      first = first * 1003 + 1;
    }
    ASSERT_OK(pair.make());
    for (int64_t step = 1; step <= 4; ++step) {
      pair.new_gradients({step >= 3, step == 2 ? 1e6f : 1e-3f});
      Hyperparameters hyper = test_hyper(config, step);
      if (step == 4) hyper.lr = 1e-7;
      hyper.maximize = step == 2;
      std::vector<StepTelemetry> told;
      inspect_both(pair, {hyper}, 1, &told);
      inspect_both(pair, {hyper}, 5);
      if (HasFailure()) return;
      for (size_t i = 0; i < told.size(); ++i) {
        EXPECT_EQ(told[i].examined, pair.tensor(i).host().layout.numel());
        sum.nonfinite_gradients += told[i].nonfinite_gradients;
        sum.lost_updates += told[i].lost_updates;
        sum.floored_codes += told[i].floored_codes;
        sum.saturated_codes += told[i].saturated_codes;
        sum.largest_update_ratio = std::max(sum.largest_update_ratio, told[i].largest_update_ratio);
      }
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      ASSERT_EQ(pair.difference(), "") << "step " << step;
    }
  }
  // Everything that is compared has occurred.
  EXPECT_GT(sum.nonfinite_gradients, 0);
  EXPECT_GT(sum.lost_updates, 0);
  EXPECT_GT(sum.floored_codes, 0);
  EXPECT_GT(sum.saturated_codes, 0);
  EXPECT_GT(sum.largest_update_ratio, 0.0f);
}

/// Tensors of two codecs and two hyperparameter sets, some without gradient, at strides below and above their groups.
TEST(CudaTelemetry, ModelAtEveryStride) {
  const Config config;
  Config small = config, paper = config;
  small.codec = StateCodec::kFloat32;
  paper.codec = StateCodec::kPaper;
  PlanPair pair(config);
  for (int i = 0; i < 20; ++i) {
    pair.add(i % 4 == 1 ? paper : config, {17 + i, 64 + 32 * (i % 3)});
    pair.add(small, {1, 64 + i});
    pair.tensor(pair.size() - 1).host().hyper_index = pair.tensor(pair.size() - 1).device().hyper_index = 1;
  }
  pair.add(config, {1, 3000001});
  ASSERT_OK(pair.make());
  pair.new_gradients({true, 1e-3f});
  for (const int64_t i : {3, 8}) {
    ASSERT_OK(pair.cpu().set_gradient(i, nullptr));
    ASSERT_OK(pair.cuda().set_gradient(i, nullptr));
  }
  for (const int64_t stride :
       {int64_t{1}, int64_t{2}, int64_t{63}, int64_t{64}, int64_t{5000}, std::numeric_limits<int64_t>::max()}) {
    SCOPED_TRACE(stride);
    std::vector<Hyperparameters> hypers = {test_hyper(config, 7), test_hyper(config, 1000)};
    hypers[1].lr = 1e-6;
    std::vector<StepTelemetry> told;
    inspect_both(pair, hypers, stride, &told);
    EXPECT_EQ(told[3].examined, 0);
  }
  // More sets than travel with a launch.
  std::vector<Hyperparameters> many(61, test_hyper(config, 3));
  many[60].beta2 = 0.9999;
  ASSERT_OK(pair.cpu().set_hyper_index(5, 40));
  ASSERT_OK(pair.cuda().set_hyper_index(5, 40));
  inspect_both(pair, many, 3);
}

/// Learning rate, step, scale and skip that only the device knows; in a graph, replayed.
TEST(CudaTelemetry, CapturedWithValuesOnTheDevice) {
  Config config;
  config.codec = StateCodec::kPaper;
  PlanPair pair(config);
  pair.add({1, 50000});
  pair.add({31, 147});
  ASSERT_OK(pair.make());
  pair.new_gradients({true, 1.0f});
  DeviceValue<float> lr(0.0f), found_inf(0.0f), divisor(1024.0f), clip(0.37f);
  DeviceValue<int64_t> step_counter(1);
  const float* lr_pointer = lr.pointer();
  const int64_t* step_pointer = step_counter.pointer();
  Hyperparameters hyper = test_hyper(config, 1);
  cuda::StepOptions options;
  options.gradient_scale = 3.0f;
  options.gradient_divisor = divisor.pointer();
  options.clip_coefficient = clip.pointer();
  options.found_inf = found_inf.pointer();
  options.lr = &lr_pointer;
  options.step = &step_pointer;
  cudaStream_t stream;
  ASSERT_CUDA(cudaStreamCreate(&stream));
  options.stream = stream;
  const DeviceTelemetry device(std::vector<StepTelemetry>(2));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  ASSERT_OK(pair.cuda().inspect(&hyper, 1, options, {3}, device.pointer()));
  ASSERT_OK(pair.cuda().step(&hyper, 1, options));
  ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<StepTelemetry> host(2);
  for (int64_t step = 1; step <= 6; ++step) {
    const bool skips = step == 4;
    const float this_lr = 1e-3f / static_cast<float>(step);
    lr.set(this_lr);
    step_counter.set(step);
    found_inf.set(skips ? 1.0f : 0.0f);
    hyper.lr = static_cast<double>(this_lr);
    hyper.step = step;
    flashoptim::StepOptions host_options;
    host_options.gradient_scale = (3.0f / 1024.0f) * 0.37f;
    if (!skips) {
      ASSERT_OK(pair.cpu().inspect(&hyper, 1, host_options, {3}, host.data()));
      ASSERT_OK(pair.cpu().step(&hyper, 1, host_options));
    }
    ASSERT_CUDA(cudaGraphLaunch(executable, stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    expect_equal(device.get(), host);
    ASSERT_EQ(pair.difference(), "") << "step " << step;
  }
  EXPECT_GT(host[0].floored_codes, 0);
  ASSERT_CUDA(cudaGraphExecDestroy(executable));
  ASSERT_CUDA(cudaGraphDestroy(graph));
  ASSERT_CUDA(cudaStreamDestroy(stream));
}

TEST(CudaTelemetry, IsAddedToWhatIsThere) {
  const Config config;
  PlanPair pair(config);
  pair.add({1, 10000});
  ASSERT_OK(pair.make());
  pair.new_gradients({true, 1e-3f});
  const Hyperparameters hyper = test_hyper(config, 1);
  for (const float ratio : {1e-9f, 1e9f}) {
    std::vector<StepTelemetry> host = {{int64_t{1} << 40, 20, 30, 40, 50, ratio}};
    const DeviceTelemetry device(host);
    ASSERT_OK(pair.cpu().inspect(&hyper, 1, {}, {}, host.data()));
    ASSERT_OK(pair.cuda().inspect(&hyper, 1, {}, {}, device.pointer()));
    expect_equal(device.get(), host);
    EXPECT_EQ(host[0].examined, (int64_t{1} << 40) + 10000);
  }
}

TEST(CudaTelemetry, Errors) {
  const Config config;
  PlanPair pair(config);
  pair.add({1, 100});
  ASSERT_OK(pair.make());
  Hyperparameters hyper;
  const DeviceTelemetry device(std::vector<StepTelemetry>(1));
  cuda::Plan empty;
  EXPECT_EQ(empty.inspect(&hyper, 1, {}, {}, device.pointer()).code(), StatusCode::kInvalidArgument);
  const Status null = pair.cuda().inspect(&hyper, 1, {}, {}, nullptr);
  EXPECT_EQ(null.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(null.message().find("telemetry is null"), std::string::npos);
  const Status stride = pair.cuda().inspect(&hyper, 1, {}, {0}, device.pointer());
  EXPECT_EQ(stride.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(stride.message().find("stride = 0"), std::string::npos);
  EXPECT_EQ(pair.cuda().inspect(&hyper, 0, {}, {}, device.pointer()).code(), StatusCode::kInvalidArgument);
  hyper.step = 0;
  EXPECT_EQ(pair.cuda().inspect(&hyper, 1, {}, {}, device.pointer()).code(), StatusCode::kInvalidArgument);
  expect_equal(device.get(), {StepTelemetry{}});
}

}  // namespace
}  // namespace flashoptim::cuda_test
