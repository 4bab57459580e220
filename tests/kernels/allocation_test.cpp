// Memory: steps allocate nothing, and an allocation that fails is a Status. A program of its own, for its operator new
// is the whole program's.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/kernels/test_tensors.h"

namespace {

std::atomic<int64_t> g_allocations{0};
std::atomic<int64_t> g_left{-1};  ///< allocations that succeed before all fail; -1: no end

void* allocate(std::size_t bytes) {
  g_allocations.fetch_add(1);
  const int64_t left = g_left.load();
  if (left == 0) throw std::bad_alloc();
  if (left > 0) g_left.store(left - 1);
  void* const p = std::malloc(bytes == 0 ? 1 : bytes);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void* allocate(std::size_t bytes, std::align_val_t alignment) {
  static_cast<void>(alignment);
  void* p = nullptr;
  g_allocations.fetch_add(1);
  const int64_t left = g_left.load();
  if (left > 0) g_left.store(left - 1);
  if (left == 0 || posix_memalign(&p, static_cast<std::size_t>(alignment), bytes) != 0) throw std::bad_alloc();
  return p;
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return allocate(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return allocate(bytes, alignment); }
void* operator new[](std::size_t bytes, std::align_val_t alignment) { return allocate(bytes, alignment); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace flashoptim::test {
namespace {

const OptimizerChoice& kAdamW = kOptimizers[0];
const Storage kNarrow{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8};

TEST(Allocation, StepsAndChangesToAPlanTakeNone) {
  TestTensor a(kAdamW, StateCodec::kDefault, kNarrow, {5000}, 1), b(kAdamW, StateCodec::kDefault, kNarrow, {7, 33}, 2);
  const ParameterTensors list[] = {a.tensors(), b.tensors()};
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, list, 2, &plan).is_ok());
  const Hyperparameters hyper = busy_hyperparameters(1);
  const void* const gradients[] = {list[0].gradient, list[1].gradient};
  const int64_t indices[] = {1, 0};
  std::vector<float> first(5000), second(5000);
  float* values[] = {first.data(), second.data()};
  StepTelemetry telemetry[2] = {};
  const int64_t before = g_allocations.load();
  const bool ok = plan.step(&hyper, 1).is_ok() && plan.step_some(indices, 2, &hyper, 1).is_ok() &&
                  plan.check_step(&hyper, 1).is_ok() && plan.set_gradient(0, nullptr).is_ok() &&
                  plan.set_gradients(gradients).is_ok() && plan.set_tensor(1, list[1]).is_ok() &&
                  plan.set_hyper_index(1, 0).is_ok() && plan.inspect(&hyper, 1, {}, {}, telemetry).is_ok() &&
                  decode_states(OptimizerKind::kAdamW, true, list[0], values).is_ok();
  const int64_t after = g_allocations.load();
  EXPECT_TRUE(ok);
  EXPECT_EQ(after, before);
}

/// Fails the first, the second, ... allocation of a call until it succeeds; every failure is a Status.
template <class Call>
int64_t failures_of(Call call, StatusCode expected) {
  for (int64_t n = 0;; ++n) {
    g_left.store(n);
    const Status status = call();
    g_left.store(-1);
    if (status.code() == expected) return n;
    if (status.code() != StatusCode::kOutOfMemory || n > 1000) {
      ADD_FAILURE() << "allocation " << n << ": " << status.message();
      return n;
    }
  }
}

TEST(Allocation, WhereItFailsMakeIsOutOfMemoryAndThePlanIsAsItWas) {
  TestTensor a(kAdamW, StateCodec::kDefault, kNarrow, {5000}, 1);
  const std::vector<ParameterTensors> list(100, a.tensors());
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, list.data(), 3, &plan).is_ok());
  const int64_t failed = failures_of(
      [&] {
        Status status = Plan::make(OptimizerKind::kAdamW, true, list.data(), 100, &plan);
        if (!status.is_ok() && plan.size() != 3) status = Status::device_error("the plan has changed");
        return status;
      },
      StatusCode::kOk);
  EXPECT_GE(failed, 6) << "an allocation for each array";
  EXPECT_EQ(plan.size(), 100);
}

TEST(Allocation, WhereItFailsForAMessageThatIsAStatusToo) {
  TestTensor a(kAdamW, StateCodec::kDefault, kNarrow, {5000}, 1);
  Plan plan;
  ASSERT_TRUE(Plan::make(OptimizerKind::kAdamW, true, &a.tensors(), 1, &plan).is_ok());
  Hyperparameters hyper = busy_hyperparameters(1);
  hyper.lr = -1.0;
  const std::vector<unsigned char> before = a.bytes();
  const int64_t index = 5;
  const StatusCode bad = StatusCode::kInvalidArgument;
  EXPECT_GE(failures_of([&] { return plan.step(&hyper, 1); }, bad), 1);
  EXPECT_GE(failures_of([&] { return plan.check_step(&hyper, 1); }, bad), 1);
  EXPECT_GE(failures_of([&] { return plan.step_some(&index, 1, &hyper, 1); }, bad), 1);
  EXPECT_GE(failures_of([&] { return plan.set_gradient(7, nullptr); }, bad), 1);
  EXPECT_GE(failures_of([&] { return plan.set_hyper_index(0, -7); }, bad), 1);
  EXPECT_GE(failures_of([&] { return plan.set_tensor(7, a.tensors()); }, bad), 1);
  EXPECT_GE(failures_of([&] { return plan.inspect(&hyper, 1, {}, {-1}, nullptr); }, bad), 1);
  EXPECT_GE(failures_of([&] { return decode_states(OptimizerKind::kAdamW, true, a.tensors(), nullptr); }, bad), 1);
  EXPECT_GE(failures_of([&] { return encode_states(OptimizerKind::kAdamW, true, a.tensors(), nullptr); }, bad), 1);
  const DType none = static_cast<DType>(9);
  float weight = 0.0f;
  EXPECT_GE(failures_of([&] { return merge_weights(none, MasterWeights::kNone, nullptr, nullptr, &weight, 1); }, bad),
            1);
  EXPECT_GE(failures_of([&] { return split_weights(none, MasterWeights::kNone, &weight, nullptr, nullptr, 1); }, bad),
            1);
  EXPECT_TRUE(a.bytes() == before);
}

}  // namespace
}  // namespace flashoptim::test
