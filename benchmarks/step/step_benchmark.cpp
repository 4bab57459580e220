// Times one optimizer step on the CPU, beside torch's own AdamW in the same run and on the same memory.
//
//   step_benchmark [--full] [Google Benchmark's options]
//
// Names read  step/<optimizer>/<states>/<parameter>/<master weights>/<workload>/threads:<n>/<instruction set>, e.g.
//   --benchmark_filter='adamw/default/bf16/24bit/n:67108864'
// and  inspect/<optimizer>/<states>/<parameter>/<master weights>/stride:<n>/<workload>/...  for telemetry beside a
// step. Without --full, a subset that takes a few minutes is registered; with it, every optimizer, codec, dtype and
// width at every size. To compare, let repetitions of all benchmarks take turns, and look at medians:
//   --benchmark_enable_random_interleaving=true --benchmark_repetitions=9
// Counters: ns (per element), held_B and moved_B (bytes per parameter), GB_per_s, cycles (per element and core, with
// the clock measured right before and after), of_rmw (share of the read-modify-write bandwidth measured at the start;
// the benchmarks rmw/threads:<n> measure it again in between).
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "benchmarks/step/machine.h"
#include "benchmarks/step/shapes.h"
#include "flashoptim/optimizer_info.h"
#include "flashoptim/step.h"
#if defined(FLASHOPTIM_BENCHMARK_TORCH)
#include "benchmarks/step/torch_adamw.h"
#endif

namespace flashoptim::benchmarks {
namespace {

struct Optimizer {
  std::string name;  ///< "sgd0" is SGD without momentum
  OptimizerKind kind;
  double momentum;
};
const Optimizer kAdamW{"adamw", OptimizerKind::kAdamW, 0};

/// Every rule: optimizers with momentum and without where that makes two.
std::vector<Optimizer> all_optimizers() {
  std::vector<Optimizer> all;
  for (int64_t i = 0; i < optimizer_count(); ++i) {
    const OptimizerKind kind = optimizer_at(i);
    const bool is_one_rule = state_count(kind, true) == state_count(kind, false);
    all.push_back({optimizer_name(kind), kind, is_one_rule ? 0.0 : 0.9});
    if (!is_one_rule) all.push_back({std::string(optimizer_name(kind)) + "0", kind, 0.0});
  }
  return all;
}

struct Codec {
  const char* name;
  StateCodec codec;
};
constexpr Codec kCodecs[] = {
    {"default", StateCodec::kDefault}, {"paper", StateCodec::kPaper}, {"fp32states", StateCodec::kFloat32}};

struct Parameter {
  const char* name;
  DType dtype;
};
constexpr Parameter kParameters[] = {{"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}, {"fp32", DType::kFloat32}};

struct Master {
  const char* name;
  MasterWeights kind;
};
constexpr Master kMasters[] = {{"none", MasterWeights::kNone},
                               {"stochastic", MasterWeights::kNoneStochastic},
                               {"24bit", MasterWeights::kCorrection8},
                               {"32bit", MasterWeights::kCorrection16},
                               {"24bit_nearest", MasterWeights::kCorrection8Nearest},
                               {"32bit_nearest", MasterWeights::kCorrection16Nearest}};
constexpr Master kNoMaster = kMasters[0], k24Bit = kMasters[2];

/// Tensors smaller than this keep fp32 states, as in the front ends.
constexpr int64_t kSmallestQuantized = 4096;

struct Case {
  Optimizer optimizer;
  Codec codec;
  Parameter parameter;
  Master master;
};

int64_t parameter_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
int64_t correction_bytes(MasterWeights master) {
  switch (master) {
    case MasterWeights::kCorrection8:
    case MasterWeights::kCorrection8Nearest:
      return 1;
    case MasterWeights::kCorrection16:
    case MasterWeights::kCorrection16Nearest:
      return 2;
    default:
      return 0;
  }
}

void check(const Status& status) {
  if (status.is_ok()) return;
  std::fprintf(stderr, "step_benchmark: %s\n", status.message().c_str());
  std::exit(1);
}

/// Gradients like those of a network, as patterns of the dtype: normal, of standard deviation 1e-3. A period of a prime
/// length repeats with no relation to groups and blocks.
void fill_gradient(void* memory, DType dtype, int64_t count) {
  static std::map<DType, std::vector<unsigned char>> patterns;
  constexpr int64_t kPeriod = 65521;
  const int64_t size = parameter_bytes(dtype);
  std::vector<unsigned char>& pattern = patterns[dtype];
  if (pattern.empty()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0.0f, 1e-3f);
    std::vector<float> values(kPeriod);
    for (float& value : values) value = normal(random);
    pattern.resize(static_cast<size_t>(kPeriod * size));
    check(split_weights(dtype, MasterWeights::kNone, values.data(), pattern.data(), nullptr, kPeriod));
  }
  for (int64_t i = 0; i < count; i += kPeriod) {
    std::memcpy(static_cast<unsigned char*>(memory) + i * size, pattern.data(),
                static_cast<size_t>(std::min(kPeriod, count - i) * size));
  }
}

/// Our tensors in the arena, and the plan over them.
struct Ours {
  Plan plan;
  int64_t held = 0, moved = 0;

  Ours(const Case& c, const Workload& workload) {
    const int states = state_count(c.optimizer.kind, c.optimizer.momentum != 0);
    std::vector<ParameterTensors> tensors;
    Arena& arena = Arena::instance();
    const auto zeros = [&arena](int64_t bytes) {
      return std::memset(arena.take(bytes), 0, static_cast<size_t>(bytes));
    };
    for (const Shape& shape : workload.shapes) {
      ParameterTensors t;
      t.layout = group_layout(shape.data(), dimensions(shape));
      const int64_t n = t.layout.numel(), size = parameter_bytes(c.parameter.dtype);
      t.parameter_dtype = t.gradient_dtype = c.parameter.dtype;
      t.master_weights = c.master.kind;
      t.state_codec = n < kSmallestQuantized && workload.shapes.size() > 1 ? StateCodec::kFloat32 : c.codec.codec;
      t.parameter = arena.take(n * size);
      fill_gradient(t.parameter, c.parameter.dtype, n);
      void* gradient = arena.take(n * size);
      fill_gradient(gradient, c.parameter.dtype, n);
      t.gradient = gradient;
      const int64_t correction = correction_bytes(c.master.kind) * n;
      if (correction != 0) t.correction = zeros(correction);
      int64_t state_bytes = 0;
      for (int k = 0; k < states; ++k) {
        const int64_t code_bytes = t.state_codec == StateCodec::kFloat32 ? 4 * n : n;
        const int64_t scale_bytes = t.state_codec == StateCodec::kFloat32 ? 0 : 2 * t.layout.groups();
        t.states[k] = zeros(code_bytes);
        if (scale_bytes != 0) t.scales[k] = zeros(scale_bytes);
        state_bytes += code_bytes + scale_bytes;
      }
      held += 2 * n * size + correction + state_bytes;
      moved += 3 * n * size + 2 * (correction + state_bytes);
      tensors.push_back(t);
    }
    check(Plan::make(c.optimizer.kind, c.optimizer.momentum != 0, tensors.data(), static_cast<int64_t>(tensors.size()),
                     &plan));
  }

  /// An upper bound of what the constructor takes from the arena.
  static int64_t arena_bytes(const Case& c, const Workload& workload) {
    const int64_t states = 4 * state_count(c.optimizer.kind, c.optimizer.momentum != 0);
    const bool wide = c.codec.codec == StateCodec::kFloat32;
    int64_t bytes = 0;
    for (const Shape& shape : workload.shapes) {
      const int64_t n = numel(shape);
      const bool fp32_states = wide || n < kSmallestQuantized;
      bytes += n * (2 * parameter_bytes(c.parameter.dtype) + correction_bytes(c.master.kind)) +
               (fp32_states ? n * states : n * states / 4 + n * states / 64) + 16 * 64;
    }
    return bytes;
  }
};

double bandwidth(int threads) {
  static std::map<int, double> measured;
  double& value = measured[threads];
  if (value == 0) value = read_modify_write_bandwidth(threads);
  return value;
}

/// Runs `step` as Google Benchmark asks and sets the counters.
void measure(benchmark::State& state, int threads, int64_t elements, double held, double moved,
             const std::function<void()>& step) {
  for (int i = 0; i < 2; ++i) step();
  const double clock_before = core_clock();
  double total = 0;
  for ([[maybe_unused]] auto _ : state) {
    const double start = omp_get_wtime();
    step();
    const double elapsed = omp_get_wtime() - start;
    state.SetIterationTime(elapsed);
    total += elapsed;
  }
  const double clock = 0.5 * (clock_before + core_clock());
  const double n = static_cast<double>(elements);
  const double seconds = total / static_cast<double>(state.iterations());
  state.counters["ns"] = 1e9 * seconds / n;
  state.counters["held_B"] = held / n;
  state.counters["moved_B"] = moved / n;
  state.counters["GB_per_s"] = 1e-9 * moved / seconds;
  if (clock > 0) state.counters["cycles"] = seconds * clock * threads / n;
  state.counters["of_rmw"] = moved / seconds / bandwidth(threads);
}

struct Registered {
  int64_t memory_limit = 0;
  std::set<std::string> names;
};

template <class Run>
void add(Registered& registered, const std::string& name, const Workload& workload, int64_t arena_bytes, Run run) {
  if (arena_bytes > registered.memory_limit || !registered.names.insert(name).second) return;
  benchmark::RegisterBenchmark(name.c_str(),
                               [run, arena_bytes](benchmark::State& state) {
                                 Arena::instance().reserve(arena_bytes);
                                 run(state);
                               })
      ->UseManualTime()
      ->Unit(workload.numel() < (1 << 20) ? benchmark::kMicrosecond : benchmark::kMillisecond);
}

/// The bandwidth again, in turn with the steps: what the table divides by is the best of all.
void add_bandwidth(int threads) {
  const std::string name = "rmw/threads:" + std::to_string(threads);
  benchmark::RegisterBenchmark(name.c_str(),
                               [threads](benchmark::State& state) {
                                 double measured = 0;
                                 for ([[maybe_unused]] auto _ : state) {
                                   const double start = omp_get_wtime();
                                   measured = read_modify_write_bandwidth(threads);
                                   state.SetIterationTime(omp_get_wtime() - start);
                                 }
                                 state.counters["GB_per_s"] = 1e-9 * measured;
                               })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMillisecond);
}

/// The library runs small plans on one thread: more would only be divided by, not used.
bool worth_threads(const Workload& workload, int threads) { return threads == 1 || workload.numel() > (1 << 16); }

Hyperparameters hyperparameters(const Case& c, int64_t step) {
  Hyperparameters hyper;
  hyper.lr = 1e-4;
  hyper.weight_decay = 0.01;
  hyper.momentum = c.optimizer.momentum;
  hyper.step = step;
  return hyper;
}

void add_ours(Registered& registered, const Case& c, const Workload& workload, int threads) {
  const char* isa = "";
  check(cpu_isa(&isa));
  const std::string name = std::string("step/") + c.optimizer.name + "/" + c.codec.name + "/" + c.parameter.name + "/" +
                           c.master.name + "/" + workload.name + "/threads:" + std::to_string(threads) + "/" + isa;
  if (!worth_threads(workload, threads)) return;
  add(registered, name, workload, Ours::arena_bytes(c, workload), [c, workload, threads](benchmark::State& state) {
    omp_set_num_threads(threads);
    Ours ours(c, workload);
    Hyperparameters hyper = hyperparameters(c, 0);
    measure(state, threads, workload.numel(), static_cast<double>(ours.held), static_cast<double>(ours.moved), [&] {
      ++hyper.step;
      check(ours.plan.step(&hyper, 1));
    });
  });
}

/// The dry run beside a step (Plan::inspect), which reads what is held of every stride-th group.
void add_inspect(Registered& registered, const Case& c, const Workload& workload, int threads, int64_t stride) {
  const char* isa = "";
  check(cpu_isa(&isa));
  const std::string name = std::string("inspect/") + c.optimizer.name + "/" + c.codec.name + "/" + c.parameter.name +
                           "/" + c.master.name + "/stride:" + std::to_string(stride) + "/" + workload.name +
                           "/threads:" + std::to_string(threads) + "/" + isa;
  if (!worth_threads(workload, threads)) return;
  add(registered, name, workload, Ours::arena_bytes(c, workload),
      [c, workload, threads, stride](benchmark::State& state) {
        omp_set_num_threads(threads);
        Ours ours(c, workload);
        Hyperparameters hyper = hyperparameters(c, 1);
        check(ours.plan.step(&hyper, 1));
        std::vector<StepTelemetry> telemetry(workload.shapes.size());
        const double held = static_cast<double>(ours.held);
        measure(state, threads, workload.numel(), held, held / static_cast<double>(stride), [&] {
          ++hyper.step;
          check(ours.plan.inspect(&hyper, 1, {}, {stride}, telemetry.data()));
        });
      });
}

void add_torch([[maybe_unused]] Registered& registered, [[maybe_unused]] const Workload& workload,
               [[maybe_unused]] int threads) {
#if defined(FLASHOPTIM_BENCHMARK_TORCH)
  constexpr std::pair<const char*, TorchKind> kKinds[] = {{"fused/fp32", TorchKind::kFusedFloat32},
                                                          {"fused/bf16", TorchKind::kFusedBFloat16},
                                                          {"foreach/fp32", TorchKind::kForeach}};
  for (const auto& [kind_name, kind] : kKinds) {
    const std::string name =
        std::string("torch/adamw/") + kind_name + "/" + workload.name + "/threads:" + std::to_string(threads);
    const double held = static_cast<double>(torch_bytes_held(kind) * workload.numel());
    const int64_t bytes = static_cast<int64_t>(held) + static_cast<int64_t>(workload.shapes.size()) * 4 * 64;
    if (!worth_threads(workload, threads)) return;
    add(registered, name, workload, bytes, [kind = kind, workload, threads, held](benchmark::State& state) {
      omp_set_num_threads(threads);
      set_torch_threads(threads);
      const std::function<void()> step = make_torch_adamw(kind, workload);
      // What the fused form must move; the foreach form moves several times that.
      measure(state, threads, workload.numel(), held, 1.75 * held, step);
    });
  }
#endif
}

bool is_valid(const Case& c) { return c.parameter.dtype != DType::kFloat32 || c.master.kind == MasterWeights::kNone; }

void add_full(Registered& registered, const std::vector<int>& threads) {
  std::vector<Workload> workloads;
  for (int log2 : {10, 12, 14, 16, 18, 20, 22, 24, 26, 28}) workloads.push_back(one_tensor(log2));
  workloads.push_back(resnet50_workload());
  workloads.push_back(gpt2_workload());
  workloads.push_back(llama_layer_workload());
  for (const Workload& workload : workloads) {
    for (int t : threads) {
      add_torch(registered, workload, t);
      for (const Optimizer& optimizer : all_optimizers())
        for (const Codec& codec : kCodecs)
          for (const Parameter& parameter : kParameters)
            for (const Master& master : kMasters) {
              const Case c{optimizer, codec, parameter, master};
              if (is_valid(c)) add_ours(registered, c, workload, t);
            }
    }
  }
}

/// One dimension varied at a time around AdamW, 24 bit, bf16, 64 Mi elements, all threads.
void add_subset(Registered& registered, const std::vector<int>& threads) {
  const Workload large = one_tensor(26);
  const int all = threads.back();
  for (int t : threads) {
    add_torch(registered, large, t);
    for (const Codec& codec : kCodecs) add_ours(registered, {kAdamW, codec, kParameters[0], k24Bit}, large, t);
    for (int64_t stride : {1, 64})
      add_inspect(registered, {kAdamW, kCodecs[0], kParameters[0], k24Bit}, large, t, stride);
  }
  for (const Optimizer& optimizer : all_optimizers())
    for (int codec : {0, 1}) add_ours(registered, {optimizer, kCodecs[codec], kParameters[0], k24Bit}, large, all);
  for (const Parameter& parameter : kParameters)
    for (const Master& master : kMasters) {
      const Case c{kAdamW, kCodecs[0], parameter, master};
      if (is_valid(c)) add_ours(registered, c, large, all);
    }
  add_ours(registered, {kAdamW, kCodecs[2], kParameters[2], kNoMaster}, large, all);
  std::vector<Workload> workloads;
  for (int log2 : {10, 14, 18, 22}) workloads.push_back(one_tensor(log2));
  workloads.push_back(resnet50_workload());
  workloads.push_back(gpt2_workload());
  workloads.push_back(llama_layer_workload());
  for (const Workload& workload : workloads) {
    const int t = worth_threads(workload, all) ? all : 1;
    add_torch(registered, workload, t);
    for (int codec : {0, 1}) add_ours(registered, {kAdamW, kCodecs[codec], kParameters[0], k24Bit}, workload, t);
  }
}

/// Takes `flag` out of the arguments; true if it was there.
bool take_flag(int* argc, char** argv, const char* flag) {
  for (int i = 1; i < *argc; ++i) {
    if (std::strcmp(argv[i], flag) != 0) continue;
    std::copy(argv + i + 1, argv + *argc, argv + i);
    --*argc;
    return true;
  }
  return false;
}

int run(int argc, char** argv) {
  const bool full = take_flag(&argc, argv, "--full");
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;

  std::vector<int> threads = {1};
  if (omp_get_max_threads() > 1) threads.push_back(omp_get_max_threads());
  Registered registered;
  registered.memory_limit = available_memory() / 10 * 7;
  for (int t : threads) add_bandwidth(t);
  full ? add_full(registered, threads) : add_subset(registered, threads);

  const char* isa = "";
  check(cpu_isa(&isa));
  benchmark::AddCustomContext("isa", isa);
  char text[32];
  std::snprintf(text, sizeof text, "%.3f", 1e-9 * core_clock());
  benchmark::AddCustomContext("clock_GHz", text);
  for (int t : threads) {
    std::snprintf(text, sizeof text, "%.1f", 1e-9 * bandwidth(t));
    benchmark::AddCustomContext("rmw_GB_per_s/threads:" + std::to_string(t), text);
  }
#if defined(FLASHOPTIM_BENCHMARK_TORCH)
  benchmark::AddCustomContext("torch", torch_version());
#endif
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace flashoptim::benchmarks

int main(int argc, char** argv) { return flashoptim::benchmarks::run(argc, argv); }
