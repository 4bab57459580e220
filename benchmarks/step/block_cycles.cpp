// Cycles an element of a step's stages, without threads, walks or memory: blocks in the first-level cache, or some
// hundred kilobytes of them in the second. Of every instruction set that the machine has.
//
// For machines that are busy with something else: each turn takes some 20 us, and beside it a chain of dependent
// additions, one cycle each, is timed; the least of both over all turns counts.
//
// usage: block_cycles [turns] [name]      name: a part of the names that are printed
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "flashoptim/core/narrow_float.h"
#include "src/cpu/run_block.h"
#include "src/rules.h"

namespace flashoptim {
namespace {

using cpu::Block;
using cpu::kBlockElements;
using cpu::kBlockGroups;

struct Case {
  const char* name;
  cpu::BlockKind kind;
};
constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16, kFp32 = DType::kFloat32;
constexpr auto kDefault = StateCodec::kDefault, kPaper = StateCodec::kPaper;
constexpr auto k8 = MasterWeights::kCorrection8, k16 = MasterWeights::kCorrection16, kNone = MasterWeights::kNone;
const Case kCases[] = {
    {"adamw default bf16 24bit", {cpu::RuleKind::kAdamW, kDefault, kBf16, kBf16, k8}},
    {"adamw default bf16 24bit_nearest",
     {cpu::RuleKind::kAdamW, kDefault, kBf16, kBf16, MasterWeights::kCorrection8Nearest}},
    {"adamw default bf16 32bit", {cpu::RuleKind::kAdamW, kDefault, kBf16, kBf16, k16}},
    {"adamw paper bf16 24bit", {cpu::RuleKind::kAdamW, kPaper, kBf16, kBf16, k8}},
    {"adam default bf16 24bit", {cpu::RuleKind::kAdam, kDefault, kBf16, kBf16, k8}},
    {"adamw default bf16 24bit, fp32 gradients", {cpu::RuleKind::kAdamW, kDefault, kBf16, kFp32, k8}},
    {"adamw paper bf16 24bit, fp32 gradients", {cpu::RuleKind::kAdamW, kPaper, kBf16, kFp32, k8}},
    {"adamw default fp16 24bit", {cpu::RuleKind::kAdamW, kDefault, kFp16, kFp16, k8}},
    {"adamw default fp16 32bit", {cpu::RuleKind::kAdamW, kDefault, kFp16, kFp16, k16}},
    {"adamw default fp16 24bit, fp32 gradients", {cpu::RuleKind::kAdamW, kDefault, kFp16, kFp32, k8}},
    {"adamw default bf16 none", {cpu::RuleKind::kAdamW, kDefault, kBf16, kBf16, kNone}},
    {"adamw default fp16 none", {cpu::RuleKind::kAdamW, kDefault, kFp16, kFp16, kNone}},
    {"adamw default fp32 none", {cpu::RuleKind::kAdamW, kDefault, kFp32, kFp32, kNone}},
    {"lion default bf16 24bit", {cpu::RuleKind::kLion, kDefault, kBf16, kBf16, k8}},
    {"sgd default bf16 24bit", {cpu::RuleKind::kSgd, kDefault, kBf16, kBf16, k8}},
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Some 20 us.
constexpr int kChain = 80000;
double chain_time() {
  const double start = now();
#if defined(__x86_64__)
  uint64_t x = 1;
  for (int i = 0; i < kChain / 32; ++i) asm volatile(".rept 32\n\tadd %0, %0\n\t.endr" : "+r"(x));
#endif
  return now() - start;
}

/// Arrays of `blocks` blocks, with gradients and weights as in training.
class Arrays {
 public:
  Arrays(const Case& c, int blocks) : kind_(c.kind), blocks_(blocks) {
    const auto bytes = [&](int each) { return std::make_unique<char[]>(size_t(blocks) * kBlockElements * each + 64); };
    const auto aligned = [](std::unique_ptr<char[]>& p) {
      return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p.get()) + 63) / 64 * 64);
    };
    for (int i = 0; i < 3; ++i) memory_[i] = bytes(4);
    for (int i = 0; i < 2; ++i) memory_[3 + i] = bytes(1);
    for (int i = 0; i < 2; ++i) memory_[5 + i] = bytes(1);
    for (int i = 0; i < 7; ++i) at_[i] = aligned(memory_[i]);
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    Block& b = *block_;
    Hyperparameters p;
    p.lr = 1e-3;
    p.step = 1000;
    make_hyper(kind_.rule, p, &hyper_);
    b.hyper = &hyper_;
    b.groups = kBlockGroups;
    b.gradient_scale = 1.0f;
    b.nonfinite = 0;
    for (int g = 0; g < kBlockGroups; ++g) {
      b.group_first_low[g] = static_cast<uint32_t>(32 * g);
      b.group_first_high[g] = 0;
    }
    for (int n = 0; n < blocks; ++n) {
      set(n);
      for (int i = 0; i < kBlockElements; ++i) {
        put(kind_.parameter, b.parameter, i, 0.02f * normal(random));
        put(kind_.gradient, const_cast<void*>(b.gradient), i, 1e-3f * normal(random));
      }
      for (int i = 0; i < 2 * kBlockElements; ++i) static_cast<char*>(b.correction)[i % kBlockElements] = 0;
      for (int k = 0; k < 2; ++k) {
        std::fill_n(static_cast<char*>(b.states[k]), kBlockElements, 0);
        std::fill_n(b.scales[k], kBlockGroups, uint16_t{0});
      }
    }
  }

  void step(const cpu::KernelTable& kernels) {
    Block& b = *block_;
    b.dither = core::make_dither_key(1, ++steps_);
    for (int n = 0; n < blocks_; ++n) {
      set(n);
      kernels.hash_groups(b);
      cpu::run_block(kernels, kind_, b);
    }
  }

 private:
  static void put(DType dtype, void* array, int i, float value) {
    const auto bits = core::to_bits(value);
    if (dtype == kFp32) static_cast<float*>(array)[i] = value;
    if (dtype == kBf16) static_cast<uint16_t*>(array)[i] = static_cast<uint16_t>(bits >> 16);
    if (dtype == kFp16) static_cast<uint16_t*>(array)[i] = static_cast<uint16_t>(core::float_to_half(value));
  }
  void set(int n) {
    Block& b = *block_;
    const auto at = [&](int array, int each) { return at_[array] + size_t(n) * kBlockElements * each; };
    b.parameter = at(0, kind_.parameter == kFp32 ? 4 : 2);
    b.gradient = at(1, kind_.gradient == kFp32 ? 4 : 2);
    b.correction = at(2, 2);
    for (int k = 0; k < 2; ++k) {
      b.states[k] = at(3 + k, 1);
      b.scales[k] = reinterpret_cast<uint16_t*>(at_[5 + k]) + size_t(n) * kBlockGroups;
    }
  }

  cpu::BlockKind kind_;
  int blocks_;
  std::unique_ptr<char[]> memory_[7];
  char* at_[7];
  cpu::HyperStorage hyper_;
  std::unique_ptr<Block> block_ = std::make_unique<Block>();
  uint64_t steps_ = 0;
};

double cycles(const Case& c, const cpu::KernelTable& kernels, int blocks, int turns) {
  Arrays arrays(c, blocks);
  for (int i = 0; i < 20; ++i) arrays.step(kernels);
  const int steps = std::max(1, 16 / blocks);
  double chain = 1e30, step = 1e30;
  for (int turn = 0; turn < turns; ++turn) {
    chain = std::min(chain, chain_time());
    const double start = now();
    for (int i = 0; i < steps; ++i) arrays.step(kernels);
    step = std::min(step, now() - start);
  }
  return step / chain * kChain / (steps * blocks * kBlockElements);
}

}  // namespace
}  // namespace flashoptim

int main(int argc, char** argv) {
  using namespace flashoptim;
  const int turns = argc > 1 ? std::atoi(argv[1]) : 2000;
  const std::string wanted = argc > 2 ? argv[2] : "";
  std::printf("cycles an element, 1 block / 64 blocks; of chains of additions, the least of %d turns\n", turns);
  for (const Case& c : kCases) {
    for (const char* isa : {"scalar", "avx2", "avx512", "avx512_bf16"}) {
      const std::string name = std::string(c.name) + " (" + isa + ")";
      const cpu::KernelTable* kernels = cpu::find_kernels(isa);
      if (kernels == nullptr || name.find(wanted) == std::string::npos) continue;
      const int slower = isa == std::string("scalar") ? 10 : 1;
      std::printf("%-60s %6.2f %6.2f\n", name.c_str(), cycles(c, *kernels, 1, turns / slower),
                  cycles(c, *kernels, 64, turns / 20 / slower + 10));
    }
  }
}
