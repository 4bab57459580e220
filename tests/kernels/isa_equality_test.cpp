// scalar == AVX2 == AVX-512 (on Arm: scalar == NEON), byte for byte, over every optimizer, codec, dtype, gradient dtype
// and master-weights kind.
//
// Nothing in this program calls the library outside a child process (in_child.h).
#include <gtest/gtest.h>

#include "tests/kernels/in_child.h"
#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

enum class Configurations { kAll, kSome, kFew };

struct Run {
  std::vector<std::vector<int64_t>> shapes;
  int64_t steps;
  Gradients gradients;
  Configurations configurations;
  Hyperparameters (*hyperparameters)(int64_t) = busy_hyperparameters;
  float gradient_scale = 1.0f;

  /// kSome: one master-weights kind for each dtype. kFew: of those, bfloat16 and float32 with AdamW and Lion.
  bool includes(const OptimizerChoice& optimizer, const Storage& storage) const {
    if (configurations == Configurations::kAll) return true;
    const bool some = storage.dtype == storage.gradient_dtype &&
                      (storage.master == MasterWeights::kCorrection8 || storage.dtype == DType::kFloat32);
    if (configurations == Configurations::kSome) return some;
    return some && storage.dtype != DType::kFloat16 &&
           (optimizer.kind == OptimizerKind::kAdamW || optimizer.kind == OptimizerKind::kLion);
  }
};

/// Writes the number of bytes and the bytes of every tensor after the steps, for one configuration after the other.
int write_results(std::FILE* file, const char* isa, const Run& run) {
  const char* used = nullptr;
  if (!cpu_isa(&used).is_ok() || std::string(used) != isa) return 10;
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      for (const Storage& storage : all_storages()) {
        if (!run.includes(optimizer, storage)) continue;
        std::vector<std::unique_ptr<TestTensor>> tensors;
        for (size_t i = 0; i < run.shapes.size(); ++i) {
          // Every other tensor lies one element off.
          tensors.push_back(std::make_unique<TestTensor>(optimizer, codec, storage, run.shapes[i], 100 + i,
                                                         static_cast<int64_t>(i % 2), run.gradients));
        }
        StepOptions options;
        options.gradient_scale = run.gradient_scale;
        const Status status = run_steps(optimizer, tensors, 1, run.steps, options, run.hyperparameters);
        if (!status.is_ok()) {
          std::fprintf(stderr, "%s: %s\n", describe(optimizer, codec, storage).c_str(), status.message().c_str());
          return 11;
        }
        for (const auto& t : tensors) {
          if (!t->guards_intact()) {
            std::fprintf(stderr, "%s: wrote outside of an array of %lld elements\n",
                         describe(optimizer, codec, storage).c_str(), static_cast<long long>(t->numel()));
            return 12;
          }
          const std::vector<unsigned char> bytes = t->bytes();
          const uint64_t size = bytes.size();
          if (std::fwrite(&size, sizeof size, 1, file) != 1) return 13;
          if (size != 0 && std::fwrite(bytes.data(), 1, size, file) != size) return 13;
        }
      }
    }
  }
  return 0;
}

/// Which configuration and tensor the byte at `offset` of a child's output belongs to.
std::string locate(const std::vector<unsigned char>& bytes, size_t offset, const Run& run) {
  size_t at = 0;
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      for (const Storage& storage : all_storages()) {
        if (!run.includes(optimizer, storage)) continue;
        for (size_t i = 0; i < run.shapes.size(); ++i) {
          uint64_t size = 0;
          std::memcpy(&size, bytes.data() + at, sizeof size);
          if (offset < at + sizeof size + size) {
            return describe(optimizer, codec, storage) + ", tensor " + std::to_string(i) + ", byte " +
                   std::to_string(offset - at - sizeof size) + " of " + std::to_string(size) +
                   " (parameter, correction, states, scales)";
          }
          at += sizeof size + size;
        }
      }
    }
  }
  return "?";
}

void expect_all_isas_agree(const Run& run) {
  const std::vector<std::string> isas = machine_isas();
  for (size_t i = isas.size(); i < std::size(kIsas); ++i)
    std::printf("  NOTE: this machine lacks %s; it is not compared\n", kIsas[i]);
  std::vector<std::unique_ptr<Child>> children;
  for (const std::string& isa : isas) {
    children.push_back(
        std::make_unique<Child>(isa.c_str(), [&](std::FILE* file) { return write_results(file, isa.c_str(), run); }));
  }
  std::vector<unsigned char> reference;
  for (size_t i = 0; i < isas.size(); ++i) {
    const std::vector<unsigned char> bytes = children[i]->read();
    ASSERT_EQ(children[i]->exit_status(), 0) << isas[i] << " (10: FLASHOPTIM_ISA was not obeyed, 12: guard bytes)";
    if (i == 0) {
      reference = bytes;
      ASSERT_FALSE(reference.empty());
      continue;
    }
    ASSERT_EQ(bytes.size(), reference.size());
    if (std::memcmp(bytes.data(), reference.data(), bytes.size()) != 0) {
      size_t at = 0;
      while (bytes[at] == reference[at]) ++at;
      FAIL() << isas[i] << " differs from scalar: " << locate(reference, at, run);
    }
  }
}

std::vector<std::vector<int64_t>> flat(std::initializer_list<int64_t> sizes) {
  std::vector<std::vector<int64_t>> shapes;
  for (int64_t n : sizes) shapes.push_back({n});
  return shapes;
}

const std::vector<std::vector<int64_t>> kRows{{7, 33},    {3, 1000}, {100, 31}, {5, 64},
                                              {2, 3, 40}, {1, 31},   {0, 64},   {64, 32}};

TEST(IsaEquality, FlatTensorsOfEverySizeInEveryConfigurationOver100Steps) {
  expect_all_isas_agree(
      {flat({0, 1, 31, 32, 33, 63, 64, 511, 512, 513, 1000, 1023, 1024, 1025, kSanitized ? 65 : 4097}),
       kSanitized ? 3 : 100, Gradients::kOrdinary, Configurations::kAll});
}

TEST(IsaEquality, RowsOfEveryKindInEveryConfiguration) {
  expect_all_isas_agree({kRows, kSanitized ? 2 : 20, Gradients::kOrdinary, Configurations::kAll});
}

TEST(IsaEquality, HostileGradientsInEveryConfiguration) {
  expect_all_isas_agree(
      {{{33}, {513}, {7, 33}, {5, 64}, {1000}}, kSanitized ? 3 : 20, Gradients::kHostile, Configurations::kAll});
}

// What AVX-512's hot path takes and what it leaves to the general one lies side by side in these.
TEST(IsaEquality, RareHostileWeightsAndGradientsUnderSeveralHyperparameters) {
  const std::vector<std::vector<int64_t>> shapes{{1024}, {4096}, {3000}, {3, 2048}, {5, 1056}};
  const Configurations configurations = kSanitized ? Configurations::kFew : Configurations::kAll;
  expect_all_isas_agree({shapes, kSanitized ? 4 : 12, Gradients::kRarelyHostile, configurations});
  expect_all_isas_agree(
      {shapes, kSanitized ? 4 : 12, Gradients::kRarelyHostile, configurations, default_hyperparameters});
  expect_all_isas_agree({shapes, 3, Gradients::kRarelyHostile, configurations, frozen_hyperparameters});
  expect_all_isas_agree({shapes, 4, Gradients::kRarelyHostile, configurations, default_hyperparameters, 0.37f});
  expect_all_isas_agree({shapes, 4, Gradients::kRarelyHostile, configurations, default_hyperparameters, 3e30f});
}

TEST(IsaEquality, AHundredThousandAndThreeElements) {
  if (kSanitized) GTEST_SKIP() << "too slow under sanitizers";
  expect_all_isas_agree({flat({100003}), test_all() ? 100 : 5, Gradients::kOrdinary, Configurations::kSome});
}

TEST(IsaEquality, AMillionAndSevenElements) {
  if (kSanitized) GTEST_SKIP() << "too slow under sanitizers";
  expect_all_isas_agree({flat({1000007}), test_all() ? 20 : 2, Gradients::kOrdinary,
                         test_all() ? Configurations::kSome : Configurations::kFew});
}

// ---- exactness of the compiled kernels (core/contraction_test.cpp)
// ---------------------------------------------------

/// SGD's buffer after one step in fp32, momentum * buffer + (1 - dampening) * gradient; exit status 0 if it is
/// `expected`.
int buffer_is(double momentum, float buffer, double dampening, float gradient, float expected) {
  std::vector<float> weights(64, 0.0f), buffers(64, buffer), gradients(64, gradient);
  ParameterTensors t;
  t.parameter = weights.data();
  t.gradient = gradients.data();
  t.states[0] = buffers.data();
  t.layout = {1, 64};
  Plan plan;
  Hyperparameters hyper;
  hyper.momentum = momentum;
  hyper.dampening = dampening;
  hyper.step = 2;
  if (!Plan::make(OptimizerKind::kSgd, true, &t, 1, &plan).is_ok() || !plan.step(&hyper, 1).is_ok()) return 1;
  for (float b : buffers) {
    if (b != expected) return 2;
  }
  return 0;
}

TEST(IsaExactness, NoKernelContractsItsRule) {
  for (const std::string& isa : machine_isas()) {
    // (1/2 + 2^-13) (1 + 2^-12) rounds to 1/2 + 2^-12, a tie; an fma would keep 2^-25 of it. Either product may be the
    // fused one.
    Child first(isa.c_str(),
                [](std::FILE*) { return buffer_is(0.5 + 0x1p-13, 1.0f + 0x1p-12f, 0.0, -(0.5f + 0x1p-12f), 0.0f); });
    first.read();
    EXPECT_EQ(first.exit_status(), 0) << isa << ": momentum * buffer";
    Child second(isa.c_str(),
                 [](std::FILE*) { return buffer_is(0.5, -(1.0f + 0x1p-11f), 0.5 - 0x1p-13, 1.0f + 0x1p-12f, 0.0f); });
    second.read();
    EXPECT_EQ(second.exit_status(), 0) << isa << ": share * gradient";
  }
}

TEST(IsaExactness, NoKernelFlushesSubnormals) {
  for (const std::string& isa : machine_isas()) {
    Child child(isa.c_str(), [](std::FILE*) { return buffer_is(0.5, 0x1p-140f, 0.0, 0.0f, 0x1p-141f); });
    child.read();
    EXPECT_EQ(child.exit_status(), 0) << isa;
  }
}

// ---- the choice itself ----------------------------------------------------------------------------------------------

int write_choice(std::FILE* file) {
  const char* name = "";
  const Status status = cpu_isa(&name);
  std::fprintf(file, "%d %s %s", static_cast<int>(status.code()), name, status.message().c_str());
  return 0;
}

std::string choice_under(const char* isa) {
  Child child(isa, write_choice);
  const std::vector<unsigned char> bytes = child.read();
  EXPECT_EQ(child.exit_status(), 0);
  return {bytes.begin(), bytes.end()};
}

TEST(IsaChoice, TheVariableForcesEveryInstructionSetThatTheMachineHas) {
  for (const std::string& isa : machine_isas()) EXPECT_EQ(choice_under(isa.c_str()), "0 " + isa + " ");
}

TEST(IsaChoice, WithoutTheVariableTheBestIsUsedAndEmptyIsUnset) {
  EXPECT_EQ(choice_under(nullptr), "0 " + machine_isas().back() + " ");
  EXPECT_EQ(choice_under(""), "0 " + machine_isas().back() + " ");
}

TEST(IsaChoice, AnUnknownNameIsAnErrorThatNamesItAndWhatIsAllowed) {
  for (const char* isa : {"avx1024", "AVX2", "avx", "avx2 "}) {
    const std::string answer = choice_under(isa);
    EXPECT_EQ(answer.substr(0, 2), std::to_string(static_cast<int>(StatusCode::kUnsupported)) + " ") << answer;
    EXPECT_NE(answer.find(std::string("FLASHOPTIM_ISA=") + isa), std::string::npos) << answer;
    std::string allowed;
    for (const char* known : kIsas) allowed += (allowed.empty() ? "" : ", ") + std::string(known);
    EXPECT_NE(answer.find("allowed are " + allowed), std::string::npos) << answer;
  }
}

TEST(IsaChoice, AnInstructionSetThatTheMachineLacksIsAnErrorAndNoFallback) {
  const std::vector<std::string> isas = machine_isas();
  if (isas.size() == std::size(kIsas)) GTEST_SKIP() << "this machine lacks none";
  const std::string lacking = kIsas[isas.size()];
  const std::string answer = choice_under(lacking.c_str());
  EXPECT_EQ(answer.substr(0, 2), std::to_string(static_cast<int>(StatusCode::kUnsupported)) + " ") << answer;
  EXPECT_NE(answer.find(lacking), std::string::npos) << answer;
}

TEST(IsaChoice, AWrongVariableFailsPlansAndConversionsAndChangesNothing) {
  Child child("avx1024", [](std::FILE*) {
    TestTensor t(kOptimizers[0], StateCodec::kDefault,
                 {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8}, {100}, 1);
    const std::vector<unsigned char> before = t.bytes();
    Plan plan;
    if (Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).code() != StatusCode::kUnsupported) return 1;
    if (plan.size() != 0) return 2;
    std::vector<float> w(100);
    if (merge_weights(DType::kBFloat16, MasterWeights::kCorrection8, t.tensors().parameter, t.tensors().correction,
                      w.data(), 100)
            .is_ok())
      return 3;
    return t.bytes() == before ? 0 : 4;
  });
  child.read();
  EXPECT_EQ(child.exit_status(), 0);
}

}  // namespace
}  // namespace flashoptim::test
