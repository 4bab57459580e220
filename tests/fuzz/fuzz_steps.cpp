// Differential fuzzing of instruction sets: a step of any rule over any values in any format gives the same bytes with
// every one that this machine has, and through Plan::step. The input chooses the rule, formats, rows, hyperparameters,
// and what the arrays hold, bit for bit or by a distribution.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>

#include "flashoptim/core/optimizer_list.h"
#include "flashoptim/step.h"
#include "src/blocks.h"
#include "src/cpu/run_block.h"
#include "src/rules.h"
#include "tests/fuzz/input.h"

namespace flashoptim::fuzz {
namespace {

struct Choice {
  OptimizerKind kind;
  bool has_momentum;
};
#define FLASHOPTIM_CHOICE(name) {core::name::kKind, !core::kIsWithoutMomentum<core::name>},
constexpr Choice kChoices[] = {FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CHOICE)};
#undef FLASHOPTIM_CHOICE

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz_steps: %s\n", what.c_str());
  std::abort();
}

/// Fields by their ranges, or whatever bits, where they are allowed.
Hyperparameters hyperparameters(OptimizerKind kind, Input& input) {
  Hyperparameters p = default_hyperparameters(kind);
  constexpr double kSome[] = {0.0,  1.0,  0.5,    0.9,   0.999, 0.9999, 1e-3,     1e-8, 0.1,
                              10.0, 1e30, 1e-300, 1e300, 3.0,   1e6,    0x1p-149, 7.0,  100.0};
  for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
    const int64_t how = input.below(4);
    if (how == 0) continue;
    const double value = how == 1 ? input.take<double>() : kSome[input.below(std::size(kSome))];
    (void)set_hyperparameter(kind, i, how == 3 ? -value : value, &p);  // what is not allowed is left as it was
  }
  return p;
}

/// All arrays of one tensor, in one piece each.
struct Tensor {
  ParameterTensors t;
  std::vector<std::vector<unsigned char>> arrays;

  Tensor(const ParameterTensors& format, int states) : t(format) {
    const cpu::ElementSizes sizes = cpu::element_sizes(t);
    const auto numel = static_cast<size_t>(t.layout.numel()), groups = static_cast<size_t>(t.layout.groups());
    const auto add = [this](size_t bytes) { arrays.emplace_back(bytes); };
    add(numel * static_cast<size_t>(sizes.parameter));
    add(numel * static_cast<size_t>(sizes.gradient));
    add(numel * static_cast<size_t>(sizes.correction));
    for (int k = 0; k < states; ++k) {
      add(numel * static_cast<size_t>(sizes.state));
      add(t.state_codec == StateCodec::kFloat32 ? 0 : groups * 2);
    }
    point();
  }
  Tensor(const Tensor& other) : t(other.t), arrays(other.arrays) { point(); }

  void fill(Input& input) {
    for (std::vector<unsigned char>& array : arrays) fill(array, input);
  }

 private:
  void point() {
    const auto at = [this](size_t a) -> void* { return arrays[a].empty() ? nullptr : arrays[a].data(); };
    t.parameter = at(0);
    t.gradient = at(1);
    t.correction = at(2);
    for (size_t k = 0; 2 * k + 4 < arrays.size(); ++k) {
      t.states[k] = at(2 * k + 3);
      t.scales[k] = at(2 * k + 4);
    }
  }
  static void fill(std::vector<unsigned char>& bytes, Input& input) {
    const int64_t how = input.below(5);
    Stream stream(input.take<uint64_t>());
    const uint8_t constant = input.take<uint8_t>();
    for (unsigned char& byte : bytes) {
      const uint64_t bits = stream.next();
      byte = static_cast<unsigned char>(how == 0 ? bits : how == 1 ? constant : how == 2 ? 0 : bits & 0x3fu);
      if (how == 4 && (bits >> 32) % 64 == 0) byte = static_cast<unsigned char>(bits >> 8);
    }
    // And the input's own bytes in front.
    const auto own = std::min(bytes.size(), static_cast<size_t>(input.below(64)));
    for (size_t i = 0; i < own; ++i) bytes[i] = input.take<uint8_t>();
  }
};

/// The step that Plan::step does, with a table of its own.
void step(const cpu::KernelTable& kernels, const Choice& choice, const Hyperparameters& p, float scale,
          Tensor& tensor) {
  const ParameterTensors& t = tensor.t;
  const cpu::RuleKind rule = rule_kind(choice.kind, choice.has_momentum);
  cpu::HyperStorage hyper;
  make_hyper(rule, p, &hyper);
  static cpu::Block block;
  block.nonfinite = 0;
  for (int64_t b = 0; b < cpu::block_count(t, t.layout.groups()); ++b) {
    block.hyper = &hyper;
    block.dither = core::make_dither_key(p.seed, static_cast<uint64_t>(p.step));
    block.gradient_scale = core::directed_factor(scale, p);
    block.ahead = 0;
    const cpu::BlockAccess access{true, true, true};
    cpu::BlockWalker walker(t, b);
    walker.open(block, access);
    kernels.hash_groups(block);
    cpu::run_block(kernels, {rule, t.state_codec, t.parameter_dtype, t.gradient_dtype, t.master_weights}, block);
    walker.close(access);
  }
}

void compare(const Tensor& expected, const Tensor& found, const char* isa, const Choice& choice) {
  for (size_t a = 0; a < expected.arrays.size(); ++a) {
    if (expected.arrays[a] == found.arrays[a]) continue;
    const size_t at = static_cast<size_t>(
        std::mismatch(expected.arrays[a].begin(), expected.arrays[a].end(), found.arrays[a].begin()).first -
        expected.arrays[a].begin());
    fail(std::string(optimizer_name(choice.kind)) + ", codec " +
         std::to_string(static_cast<int>(expected.t.state_codec)) + ", dtype " +
         std::to_string(static_cast<int>(expected.t.parameter_dtype)) + ", master_weights " +
         std::to_string(static_cast<int>(expected.t.master_weights)) + ": array " + std::to_string(a) + " (of " +
         std::to_string(expected.arrays.size()) + ") differs at byte " + std::to_string(at) + " with " + isa);
  }
}

void run(Input& input) {
  const Choice& choice = kChoices[input.below(std::size(kChoices))];
  ParameterTensors format;
  format.state_codec = static_cast<StateCodec>(input.below(3));
  format.parameter_dtype = static_cast<DType>(input.below(3));
  format.gradient_dtype = input.flip() ? DType::kFloat32 : format.parameter_dtype;
  if (format.parameter_dtype != DType::kFloat32) format.master_weights = static_cast<MasterWeights>(input.below(6));
  constexpr int64_t kRows[] = {1, 31, 32, 33, 40, 64, 96, 147, 1024, 1100, 2500};
  format.layout = {1 + input.below(4), kRows[input.below(std::size(kRows))]};
  if (format.layout.row_size < 32) format.layout.rows = 1;
  // As a shard of a long tensor, whole rows of it.
  if (input.flip()) format.place.first_element = format.layout.row_size * static_cast<int64_t>(input.take<uint32_t>());
  const Hyperparameters p = hyperparameters(choice.kind, input);
  const float scale = input.flip() ? 1.0f : std::ldexp(1.0f, static_cast<int>(input.below(200)) - 100);
  const bool has_momentum = choice.has_momentum;
  Tensor before(format, state_count(choice.kind, has_momentum));
  before.fill(input);

  Tensor expected = before;
  step(*cpu::find_kernels("scalar"), choice, p, scale, expected);
  for (const char* isa : {"avx2", "avx512", "avx512_bf16"}) {
    const cpu::KernelTable* kernels = cpu::find_kernels(isa);
    if (kernels == nullptr) continue;
    Tensor found = before;
    step(*kernels, choice, p, scale, found);
    compare(expected, found, isa, choice);
  }
  Tensor planned = before;
  Plan plan;
  Status status = Plan::make(choice.kind, has_momentum, &planned.t, 1, &plan);
  if (!status.is_ok()) fail("Plan::make: " + status.message());
  StepOptions options;
  options.gradient_scale = scale;
  StepTelemetry telemetry{};
  status = plan.inspect(&p, 1, options, {}, &telemetry);
  if (!status.is_ok()) fail("Plan::inspect: " + status.message());
  compare(before, planned, "inspect, which changes nothing", choice);
  status = plan.step(&p, 1, options);
  if (!status.is_ok()) fail("Plan::step: " + status.message());
  compare(expected, planned, "Plan::step", choice);
}

}  // namespace
}  // namespace flashoptim::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::fprintf(stderr, "fuzz_steps: scalar");
  for (const char* isa : {"avx2", "avx512", "avx512_bf16"}) {
    std::fprintf(stderr, ", %s%s", isa, flashoptim::cpu::find_kernels(isa) == nullptr ? " (not this machine's)" : "");
  }
  std::fprintf(stderr, "\n");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  flashoptim::fuzz::Input input(data, size);
  flashoptim::fuzz::run(input);
  return 0;
}
