// Bits are the contract: a compiler that contracts a * b + c into an fma breaks it silently. These fail
// then; kernels/isa_equality_test.cpp checks the same of the compiled kernels.
#include <gtest/gtest.h>

namespace flashoptim::test {
namespace {

// (1 + 2^-12)^2 - (1 + 2^-11): 2^-24 exactly, which is what an fma gives; the product alone is a tie that rounds to the
// even 1 + 2^-11, and the difference is 0.
constexpr float kFactor = 1.0f + 0x1p-12f, kMinusSquare = -(1.0f + 0x1p-11f);

float multiply_add(float a, float b, float c) { return a * b + c; }

TEST(Contraction, ThisTranslationUnitDoesNotContract) {
  volatile float a = kFactor, b = kFactor, c = kMinusSquare;
  EXPECT_EQ(multiply_add(a, b, c), 0.0f) << "flashoptim::core must bring -ffp-contract=off";
}

#if defined(__x86_64__)
// The same with fma instructions at the compiler's disposal, as in the AVX-512 kernels.
__attribute__((target("fma"), noinline)) float multiply_add_with_fma_allowed(float a, float b, float c) {
  return a * b + c;
}

TEST(Contraction, NotEvenWhereTheCompilerMayUseFma) {
  if (!__builtin_cpu_supports("fma")) GTEST_SKIP() << "this processor has no fma";
  volatile float a = kFactor, b = kFactor, c = kMinusSquare;
  EXPECT_EQ(multiply_add_with_fma_allowed(a, b, c), 0.0f) << "flashoptim::core must bring -ffp-contract=off";
}
#endif

}  // namespace
}  // namespace flashoptim::test
