// Times the CUDA step against the floor: the bytes it must move over the copy bandwidth measured in the same run.
//
//   flashoptim_cuda_benchmark [filter]      only rows whose name contains `filter`
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "flashoptim/cuda.h"
#include "flashoptim/optimizer_info.h"

namespace {

using namespace flashoptim;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
void check(const Status& status) {
  if (status.is_ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

double median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return static_cast<double>(values[values.size() / 2]);
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Times `run` `count` times on the device, one at a time, with the next ones queued behind.
std::vector<float> device_times(int count, const std::function<void()>& run) {
  std::vector<cudaEvent_t> events(static_cast<size_t>(count) + 1);
  for (cudaEvent_t& event : events) check(cudaEventCreate(&event), "cudaEventCreate");
  check(cudaEventRecord(events[0]), "cudaEventRecord");
  for (int i = 0; i < count; ++i) {
    run();
    check(cudaEventRecord(events[static_cast<size_t>(i) + 1]), "cudaEventRecord");
  }
  check(cudaDeviceSynchronize(), "timed work");
  std::vector<float> times(static_cast<size_t>(count));
  for (size_t i = 0; i < times.size(); ++i)
    check(cudaEventElapsedTime(&times[i], events[i], events[i + 1]), "cudaEventElapsedTime");
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  return times;
}

/// GB/s of a large device-to-device copy, bytes read plus bytes written.
double copy_bandwidth() {
  constexpr size_t kBytes = size_t{1} << 31;
  void *from, *to;
  check(cudaMalloc(&from, kBytes), "cudaMalloc");
  check(cudaMalloc(&to, kBytes), "cudaMalloc");
  check(cudaMemset(from, 0x3c, kBytes), "cudaMemset");
  const auto times =
      device_times(20, [&] { check(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice), "copy"); });
  cudaFree(from);
  cudaFree(to);
  return 2.0 * static_cast<double>(kBytes) / (median(times) * 1e-3) * 1e-9;
}

struct Format {
  OptimizerKind optimizer = OptimizerKind::kAdamW;
  bool has_momentum = false;
  StateCodec codec = StateCodec::kDefault;
  DType parameter = DType::kBFloat16;
  DType gradient = DType::kBFloat16;
  MasterWeights master = MasterWeights::kCorrection8;
};

int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
int64_t correction_bytes(MasterWeights m) {
  if (m == MasterWeights::kCorrection8 || m == MasterWeights::kCorrection8Nearest) return 1;
  return m == MasterWeights::kNone || m == MasterWeights::kNoneStochastic ? 0 : 2;
}

/// Device memory that is filled with a repeated random pattern.
class Memory {
 public:
  Memory() {
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0.0f, 1e-2f);
    floats_.resize(kPattern);
    for (float& x : floats_) x = normal(random);
  }
  ~Memory() { release(); }
  void release() {
    for (void* p : blocks_) cudaFree(p);
    blocks_.clear();
  }
  void* zeros(int64_t bytes) {
    void* p = nullptr;
    check(cudaMalloc(&p, static_cast<size_t>(std::max<int64_t>(bytes, 1))), "cudaMalloc");
    check(cudaMemset(p, 0, static_cast<size_t>(bytes)), "cudaMemset");
    blocks_.push_back(p);
    return p;
  }
  void* numbers(DType dtype, int64_t count) {
    const int64_t size = dtype_bytes(dtype);
    auto* p = static_cast<unsigned char*>(zeros(count * size));
    std::vector<unsigned char> pattern(static_cast<size_t>(kPattern * size));
    check(split_weights(dtype, MasterWeights::kNone, floats_.data(), pattern.data(), nullptr, kPattern));
    for (int64_t i = 0; i < count; i += kPattern) {
      const int64_t n = std::min(kPattern, count - i);
      check(cudaMemcpy(p + i * size, pattern.data(), static_cast<size_t>(n * size), cudaMemcpyHostToDevice), "upload");
    }
    return p;
  }

 private:
  static constexpr int64_t kPattern = (int64_t{1} << 20) + 32 * 17;
  std::vector<float> floats_;
  std::vector<void*> blocks_;
};

struct Model {
  std::string name;
  std::vector<GroupLayout> layouts;
  int64_t min_quantized = 4096;
  int64_t touched_every = 1;  ///< only every n-th row ever has gradients other than 0
};

Model one_tensor(int64_t numel) { return {std::to_string(numel >> 20) + "Mi, one tensor", {{1, numel}}}; }

Model llama_layer() {
  Model m{"Llama-3.1-8B layer", {}};
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{4096, 4096},
                                      {1024, 4096},
                                      {1024, 4096},
                                      {4096, 4096},
                                      {14336, 4096},
                                      {14336, 4096},
                                      {4096, 14336}}) {
    m.layouts.push_back({rows, columns});
  }
  m.layouts.push_back({1, 4096});
  m.layouts.push_back({1, 4096});
  return m;
}

/// Most of a vocabulary is in no batch.
Model embedding() {
  Model m{"embedding, 1 row in 64", {{128256, 4096}}};
  m.touched_every = 64;
  return m;
}

Model gpt2() {
  Model m{"GPT-2 124M", {{50257, 768}, {1024, 768}}};
  for (int layer = 0; layer < 12; ++layer) {
    for (const GroupLayout& l : {GroupLayout{1, 768},
                                 {1, 768},
                                 {768, 2304},
                                 {1, 2304},
                                 {768, 768},
                                 {1, 768},
                                 {1, 768},
                                 {1, 768},
                                 {768, 3072},
                                 {1, 3072},
                                 {3072, 768},
                                 {1, 768}}) {
      m.layouts.push_back(l);
    }
  }
  m.layouts.push_back({1, 768});
  m.layouts.push_back({1, 768});
  return m;
}

Model resnet50() {
  Model m{"ResNet-50", {}};
  const auto conv = [&m](int64_t out, int64_t in, int64_t kernel) {
    m.layouts.push_back({out, in * kernel * kernel});
    m.layouts.push_back({1, out});
    m.layouts.push_back({1, out});
  };
  conv(64, 3, 7);
  int64_t in = 64;
  const int64_t widths[] = {64, 128, 256, 512}, depths[] = {3, 4, 6, 3};
  for (int stage = 0; stage < 4; ++stage) {
    const int64_t width = widths[stage];
    for (int64_t block = 0; block < depths[stage]; ++block) {
      conv(width, in, 1);
      conv(width, width, 3);
      conv(4 * width, width, 1);
      if (block == 0) conv(4 * width, in, 1);
      in = 4 * width;
    }
  }
  m.layouts.push_back({1000, 2048});
  m.layouts.push_back({1, 1000});
  return m;
}

const char* const kDTypes[] = {"fp32", "bf16", "fp16"};
const char* const kCodecs[] = {"fp32 states", "paper", "default"};
const char* const kMasters[] = {"none", "stochastic", "24", "32", "24 nearest", "32 nearest"};

class Benchmark {
 public:
  Benchmark(double copy, const char* filter) : copy_(copy), filter_(filter) {
    std::printf("%-28s %-32s %10s %8s %8s %8s %7s %9s %8s\n", "tensors", "format", "Melements", "ms", "best ms", "GB/s",
                "of copy", "wall ms", "host us");
  }

  void run(const Model& model, const Format& f) {
    const std::string format = std::string(optimizer_title(f.optimizer)) + (f.has_momentum ? "+m " : " ") +
                               kCodecs[static_cast<int>(f.codec)] + ", " + kDTypes[static_cast<int>(f.parameter)] +
                               " g " + kDTypes[static_cast<int>(f.gradient)] + ", " +
                               kMasters[static_cast<int>(f.master)];
    if (filter_ != nullptr && (model.name + " " + format).find(filter_) == std::string::npos) return;
    const int states = state_count(f.optimizer, f.has_momentum);
    std::vector<ParameterTensors> tensors;
    int64_t bytes = 0, elements = 0;
    for (const GroupLayout& layout : model.layouts) {
      ParameterTensors t;
      const int64_t n = layout.numel();
      t.layout = layout;
      t.parameter_dtype = f.parameter;
      t.gradient_dtype = f.gradient;
      t.master_weights = f.master;
      t.state_codec = n < model.min_quantized ? StateCodec::kFloat32 : f.codec;
      t.parameter = memory_.numbers(f.parameter, n);
      t.gradient = memory_.numbers(f.gradient, n);
      leave_untouched(t, model.touched_every);
      t.correction = correction_bytes(f.master) == 0 ? nullptr : memory_.zeros(n * correction_bytes(f.master));
      const bool quantized = t.state_codec != StateCodec::kFloat32;
      for (int k = 0; k < states; ++k) {
        t.states[k] = memory_.zeros(n * (quantized ? 1 : 4));
        if (quantized) t.scales[k] = memory_.zeros(layout.groups() * 2);
        bytes += 2 * (n * (quantized ? 1 : 4) + (quantized ? layout.groups() * 2 : 0));
      }
      bytes += n * (2 * dtype_bytes(f.parameter) + dtype_bytes(f.gradient) + 2 * correction_bytes(f.master));
      elements += n;
      tensors.push_back(t);
    }
    cuda::Plan plan;
    check(
        cuda::Plan::make(f.optimizer, f.has_momentum, tensors.data(), static_cast<int64_t>(tensors.size()), 0, &plan));
    Hyperparameters hyper;
    hyper.lr = 1e-4;
    hyper.weight_decay = 0.01;
    hyper.momentum = f.has_momentum ? 0.9 : 0.0;
    hyper.step = 0;
    const auto step = [&] {
      ++hyper.step;
      check(plan.step(&hyper, 1));
    };
    for (int i = 0; i < 12; ++i) step();
    check(cudaDeviceSynchronize(), "warm-up");
    std::vector<float> times = device_times(40, step);
    // Wall time of a step that is waited for, and the host's share of it.
    std::vector<float> wall, host;
    for (int i = 0; i < 20; ++i) {
      const double start = seconds_now();
      step();
      host.push_back(static_cast<float>((seconds_now() - start) * 1e6));
      check(cudaDeviceSynchronize(), "step");
      wall.push_back(static_cast<float>((seconds_now() - start) * 1e3));
    }
    const double ms = median(times), best = static_cast<double>(*std::min_element(times.begin(), times.end()));
    const double rate = static_cast<double>(bytes) / (ms * 1e-3) * 1e-9;
    std::printf("%-28s %-32s %10.1f %8.4f %8.4f %8.0f %6.1f%% %9.4f %8.1f\n", model.name.c_str(), format.c_str(),
                static_cast<double>(elements) * 1e-6, ms, best, rate, 100.0 * rate / copy_, median(wall), median(host));
    std::fflush(stdout);
    if (f.codec == StateCodec::kDefault && f.optimizer == OptimizerKind::kAdamW &&
        f.master == MasterWeights::kCorrection8 && f.parameter == DType::kBFloat16 && f.gradient == DType::kBFloat16) {
      run_norm(model, plan, elements * dtype_bytes(f.gradient));
      run_inspect(model, plan, hyper);
    }
    memory_.release();
  }

 private:
  static void leave_untouched(const ParameterTensors& t, int64_t touched_every) {
    const int64_t row_bytes = t.layout.row_size * dtype_bytes(t.gradient_dtype);
    auto* gradient = static_cast<unsigned char*>(const_cast<void*>(t.gradient));
    for (int64_t row = 0; row < t.layout.rows && touched_every > 1; ++row) {
      if (row % touched_every != 0)
        check(cudaMemsetAsync(gradient + row * row_bytes, 0, static_cast<size_t>(row_bytes)), "cudaMemset");
    }
  }

  void run_norm(const Model& model, cuda::Plan& plan, int64_t bytes) {
    auto* result = static_cast<cuda::GradientNorm*>(memory_.zeros(sizeof(cuda::GradientNorm)));
    cuda::NormOptions options;
    options.max_norm = 1.0f;
    const auto times = device_times(20, [&] { check(plan.gradient_norm(options, result)); });
    const double ms = median(times), rate = static_cast<double>(bytes) / (ms * 1e-3) * 1e-9;
    std::printf("%-28s %-32s %10s %8.4f %8s %8.0f %6.1f%%\n", model.name.c_str(), "  gradient norm", "", ms, "", rate,
                100.0 * rate / copy_);
  }

  void run_inspect(const Model& model, cuda::Plan& plan, const Hyperparameters& hyper) {
    auto* telemetry =
        static_cast<StepTelemetry*>(memory_.zeros(plan.size() * static_cast<int64_t>(sizeof(StepTelemetry))));
    for (const int64_t stride : {1, 64}) {
      const auto times = device_times(10, [&] { check(plan.inspect(&hyper, 1, {}, {stride}, telemetry)); });
      std::printf("%-28s %-32s %10s %8.4f\n", model.name.c_str(),
                  ("  inspect, stride " + std::to_string(stride)).c_str(), "", median(times));
    }
  }

  double copy_;
  const char* filter_;
  Memory memory_;
};

const Model& large() {
  static const Model kLarge = one_tensor(int64_t{1} << 26);
  return kLarge;
}

/// Every optimizer and codec, bf16 with 24 bits.
void run_optimizers(Benchmark& benchmark) {
  for (const StateCodec codec : {StateCodec::kDefault, StateCodec::kPaper, StateCodec::kFloat32}) {
    for (int64_t number = 0; number < 2 * optimizer_count(); ++number) {
      const OptimizerKind optimizer = optimizer_at(number / 2);
      const bool momentum = number % 2 != 0,
                 is_one_rule = state_count(optimizer, true) == state_count(optimizer, false);
      if (momentum && is_one_rule) continue;
      if (state_count(optimizer, momentum) == 0 && codec != StateCodec::kFloat32) continue;
      Format f;
      f.optimizer = optimizer;
      f.has_momentum = momentum;
      f.codec = codec;
      // As the front ends do: the paper's codec with the paper's rounding.
      if (codec == StateCodec::kPaper) f.master = MasterWeights::kCorrection8Nearest;
      benchmark.run(large(), f);
    }
  }
}

/// AdamW with every parameter dtype, gradient dtype and kind of master weights.
void run_formats(Benchmark& benchmark) {
  for (const StateCodec codec : {StateCodec::kDefault, StateCodec::kPaper}) {
    for (const DType parameter : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const DType gradient : {parameter, DType::kFloat32}) {
        for (int m = 0; m < 6; ++m) {
          Format f;
          f.codec = codec;
          f.parameter = parameter;
          f.gradient = gradient;
          f.master = static_cast<MasterWeights>(m);
          if (parameter == DType::kFloat32 && m > 0) continue;
          benchmark.run(large(), f);
        }
        if (parameter == DType::kFloat32) break;
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "no CUDA device");
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const double copy = copy_bandwidth();
  std::printf("%s, %d multiprocessors, CUDA driver %d.%d, copy %.0f GB/s\n", properties.name,
              properties.multiProcessorCount, driver / 1000, driver % 1000 / 10, copy);
  Benchmark benchmark(copy, argc > 1 ? argv[1] : nullptr);
  const Format adamw;
  const Model largest = one_tensor(int64_t{1} << 28);
  benchmark.run(largest, adamw);
  Format other = adamw;
  other.gradient = DType::kFloat32;
  benchmark.run(largest, other);
  other.parameter = DType::kFloat32;
  other.master = MasterWeights::kNone;
  benchmark.run(largest, other);
  other = adamw;
  other.codec = StateCodec::kPaper;
  other.master = MasterWeights::kCorrection8Nearest;
  benchmark.run(largest, other);
  benchmark.run(llama_layer(), adamw);
  benchmark.run(gpt2(), adamw);
  benchmark.run(resnet50(), adamw);
  benchmark.run(embedding(), adamw);
  benchmark.run({"rows of 147", {{456522, 147}}}, adamw);
  run_optimizers(benchmark);
  run_formats(benchmark);
  return 0;
}
