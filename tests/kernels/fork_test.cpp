// A child of fork() has none of its parent's threads; its steps must neither wait for them nor differ.
#include <gtest/gtest.h>

#include <unistd.h>

#include "tests/kernels/in_child.h"
#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

const OptimizerChoice& kAdamW = kOptimizers[0];
const Storage kNarrow{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8};

std::vector<unsigned char> stepped(Plan& plan, const TestTensor& t, int64_t step) {
  const Hyperparameters hyper = busy_hyperparameters(step);
  EXPECT_TRUE(plan.step(&hyper, 1).is_ok());
  return t.bytes();
}

TEST(Fork, AStepInAChildBehindAThreadedStepHasTheSameBits) {
  // Enough blocks for threads.
  TestTensor t(kAdamW, StateCodec::kDefault, kNarrow, {300 * 1024}, 1);
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &t.tensors(), 1, &plan).is_ok());
  stepped(plan, t, 1);
  EXPECT_FALSE(is_forked_child());
  Child child(nullptr, [&](std::FILE* file) {
    alarm(60);  // a child that hangs is ended, and that is a failure
    const bool knows = is_forked_child();
    const std::vector<unsigned char> bytes = stepped(plan, t, 2);
    return knows && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() ? 0 : 1;
  });
  const std::vector<unsigned char> there = child.read();
  EXPECT_EQ(child.exit_status(), 0);
  EXPECT_TRUE(there == stepped(plan, t, 2));
}

}  // namespace
}  // namespace flashoptim::test
