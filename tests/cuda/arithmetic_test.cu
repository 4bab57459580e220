// Our divisions and square roots against CUDA's own correctly rounded ones: roots of every number, the hot path's
// division for a sample of mantissas or, with FLASHOPTIM_TEST_ALL=1, for all 2^46 pairs (a minute on an H100).
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "flashoptim/core/dither.h"
#include "src/cuda/lane.cuh"

namespace flashoptim::cuda {
namespace {

__global__ void roots(unsigned long long* wrong) {
  const uint64_t threads = uint64_t{gridDim.x} * blockDim.x;
  unsigned long long count = 0;
  for (uint64_t i = (uint64_t{127 - 101} << 23) + blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < 0x7f800000u;
       i += threads) {
    const float x = __uint_as_float(static_cast<uint32_t>(i));
    count += sqrt_in_range(x) != __fsqrt_rn(x);
  }
  if (count != 0) atomicAdd(wrong, count);
}

/// Divisors of all mantissas; dividends of mantissas first, first + stride, ...
__global__ void quotients(uint32_t stride, unsigned long long* wrong) {
  const uint32_t b_bits = blockIdx.x * blockDim.x + threadIdx.x;
  if (b_bits >= 1u << 23) return;
  const float b = __uint_as_float(0x3f800000u | b_bits);
  unsigned long long count = 0;
  const uint32_t first = (b_bits * 0x9e3779b9u) % stride;
  for (uint32_t a_bits = first; a_bits < 1u << 23; a_bits += stride) {
    const float a = __uint_as_float(0x3f800000u | a_bits);
    count += divide_in_range(a, b) != __fdiv_rn(a, b);
  }
  if (count != 0) atomicAdd(wrong, count);
}

/// Exponents at the ends of the range, random mantissas.
__global__ void quotients_at_ends(unsigned long long* wrong) {
  uint32_t state = core::mix32<float>(blockIdx.x * blockDim.x + threadIdx.x + 1u);
  unsigned long long count = 0;
  for (int i = 0; i < 4096; ++i) {
    state = core::mix32<float>(state + 0x9e3779b9u);
    const int a_exponent = i % 3 == 0 ? -80 : i % 3 == 1 ? 60 : static_cast<int>(state >> 24) % 140 - 80;
    const int b_exponent = i % 5 == 0 ? -62 : i % 5 == 1 ? 39 : static_cast<int>(state % 100u) - 62;
    const float a =
        __uint_as_float((static_cast<uint32_t>(127 + a_exponent) << 23) | (state & 0x7fffffu) | (state & 0x80000000u));
    const float b =
        __uint_as_float((static_cast<uint32_t>(127 + b_exponent) << 23) | (core::mix32<float>(state) & 0x7fffffu));
    count += divide_in_range(a, b) != __fdiv_rn(a, b);
  }
  if (count != 0) atomicAdd(wrong, count);
}

__device__ bool same(float a, float b) { return __float_as_uint(a) == __float_as_uint(b) || (a != a && b != b); }

__global__ void roots_of_everything(unsigned long long* wrong) {
  const uint64_t threads = uint64_t{gridDim.x} * blockDim.x;
  unsigned long long count = 0;
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < uint64_t{1} << 32; i += threads) {
    const float x = __uint_as_float(static_cast<uint32_t>(i));
    count += !same(root(x), __fsqrt_rn(x));
  }
  if (count != 0) atomicAdd(wrong, count);
}

/// Any patterns, and what lies about the bounds within which divide() is short.
__global__ void quotients_of_everything(unsigned long long* wrong) {
  constexpr uint32_t kEdges[] = {0u,
                                 1u,
                                 0x007fffffu,
                                 0x00800000u,
                                 (127u - 80u) << 23,
                                 (127u - 62u) << 23,
                                 0x3f800000u,
                                 (127u + 40u) << 23,
                                 (127u + 60u) << 23,
                                 0x7f7fffffu,
                                 0x7f800000u,
                                 0x7fc00000u};
  uint32_t state = core::mix32<float>(blockIdx.x * blockDim.x + threadIdx.x + 77u);
  const auto draw = [&state, &kEdges] {
    state = core::mix32<float>(state + 0x9e3779b9u);
    const uint32_t pattern = state;
    if (pattern % 3u != 0u) return __uint_as_float(core::mix32<float>(pattern));
    return __uint_as_float((kEdges[(pattern / 3u) % 12u] + (pattern >> 24) % 5u - 2u) ^ (pattern & 0x80000000u));
  };
  unsigned long long count = 0;
  for (int i = 0; i < 4096; ++i) {
    const float a = draw(), b = draw();
    count += !same(divide(a, b), __fdiv_rn(a, b));
  }
  if (count != 0) atomicAdd(wrong, count);
}

class CudaArithmetic : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(cudaMalloc(&wrong_, sizeof *wrong_), cudaSuccess);
    ASSERT_EQ(cudaMemset(wrong_, 0, sizeof *wrong_), cudaSuccess);
  }
  void TearDown() override { cudaFree(wrong_); }
  unsigned long long wrong() {
    unsigned long long value = ~0ull;
    EXPECT_EQ(cudaMemcpy(&value, wrong_, sizeof value, cudaMemcpyDeviceToHost), cudaSuccess);
    return value;
  }
  unsigned long long* wrong_ = nullptr;
};

TEST_F(CudaArithmetic, EveryRoot) {
  roots<<<4096, 256>>>(wrong_);
  EXPECT_EQ(wrong(), 0u);
}

TEST_F(CudaArithmetic, Quotients) {
  const char* all = std::getenv("FLASHOPTIM_TEST_ALL");
  quotients<<<(1 << 23) / 256, 256>>>(all != nullptr && *all == '1' ? 1u : 1021u, wrong_);
  EXPECT_EQ(wrong(), 0u);
}

TEST_F(CudaArithmetic, RootsOfEverything) {
  roots_of_everything<<<4096, 256>>>(wrong_);
  EXPECT_EQ(wrong(), 0u);
}

TEST_F(CudaArithmetic, QuotientsOfEverything) {
  quotients_of_everything<<<4096, 256>>>(wrong_);
  EXPECT_EQ(wrong(), 0u);
}

TEST_F(CudaArithmetic, QuotientsAtTheEndsOfTheRange) {
  quotients_at_ends<<<4096, 256>>>(wrong_);
  EXPECT_EQ(wrong(), 0u);
}

}  // namespace
}  // namespace flashoptim::cuda
