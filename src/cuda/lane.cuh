// Lane types of the CUDA kernels, and what the quad of threads that holds a group does together.
//
// F = float is exact for every input. UpdateLane computes the update rule by shorter sequences that give the same bits
// wherever its guard holds, which is nearly always; elsewhere the kernel computes the unit again with float.
#pragma once

#include "flashoptim/core/lanes.h"
#include "src/cuda/tuning.h"

namespace flashoptim::cuda {

/// What the values of one thread's update had in common.
struct UpdateGuard {
  uint32_t smallest_radicand = 0xffffffffu;  ///< patterns
  uint32_t largest_divisor = 0u;
  bool ok = true;  // by & throughout: && would make branches

  __device__ __forceinline__ bool holds() const {
    return ok && smallest_radicand >= (127u - 101u) << 23 && largest_divisor <= (127u + 40u) << 23;
  }
};

struct UpdateLane {
  float v;
  UpdateGuard* guard = nullptr;  ///< null for constants
  float lower = 0.0f;  ///< a bound below 0 that max() left to min()

  UpdateLane() = default;
  __device__ __forceinline__ UpdateLane(float value, UpdateGuard* g = nullptr) : v(value), guard(g) {}
};

__device__ __forceinline__ UpdateGuard* either(UpdateLane a, UpdateLane b) { return a.guard != nullptr ? a.guard : b.guard; }

__device__ __forceinline__ UpdateLane operator+(UpdateLane a, UpdateLane b) { return {a.v + b.v, either(a, b)}; }
__device__ __forceinline__ UpdateLane operator-(UpdateLane a, UpdateLane b) { return {a.v - b.v, either(a, b)}; }
__device__ __forceinline__ UpdateLane operator*(UpdateLane a, UpdateLane b) { return {a.v * b.v, either(a, b)}; }

__device__ __forceinline__ float approximate_reciprocal(float a) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}
__device__ __forceinline__ float approximate_reciprocal_root(float a) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}

/// The sequence of CUDA's own correctly rounded division, inside the range where it needs no scaling: here
/// 2^-80 <= |a|, 0 < b <= 2^40. Divisors below 2^-126, and quotients that overflow, give NaN, which the caller looks for.
__device__ __forceinline__ float divide_in_range(float a, float b) {
  float y = approximate_reciprocal(b);
  y = __fmaf_rn(y, __fmaf_rn(-b, y, 1.0f), y);
  float q = __fmul_rn(a, y);
  q = __fmaf_rn(y, __fmaf_rn(-b, q, a), q);
#if __CUDA_ARCH__ != 900
  // CUDA's has this second correction. On sm_90 it never changes anything: all 2^46 pairs of mantissas were tried
  // (tests/cuda/arithmetic_test.cu with FLASHOPTIM_TEST_ALL=1, 48 s on an H100).
  q = __fmaf_rn(y, __fmaf_rn(-b, q, a), q);
#endif
  return q;
}
__device__ __forceinline__ UpdateLane operator/(UpdateLane a, UpdateLane b) {
  UpdateGuard& guard = *either(a, b);
  guard.ok &= fabsf(a.v) >= 0x1p-80f;
  guard.largest_divisor = guard.largest_divisor > core::to_bits(b.v) ? guard.largest_divisor : core::to_bits(b.v);
  return {divide_in_range(a.v, b.v), &guard};
}

/// CUDA's own sequence for the correctly rounded root, for 2^-101 <= a; infinity and negative numbers give NaN.
__device__ __forceinline__ float sqrt_in_range(float a) {
  const float y = approximate_reciprocal_root(a);
  const float s = __fmul_rn(a, y);
  return __fmaf_rn(__fmaf_rn(-s, s, a), __fmul_rn(0.5f, y), s);
}
__device__ __forceinline__ UpdateLane sqrt(UpdateLane a) {
  a.guard->smallest_radicand = core::unsigned_min(a.guard->smallest_radicand, core::to_bits(a.v));
  return {sqrt_in_range(a.v), a.guard};
}

/// Rules bound a variable by a constant, which they name first: usually the variable stays. A bound below 0 is one half of
/// a clamp, min(c, max(-c, a)), which is a single comparison.
__device__ __forceinline__ UpdateLane max(UpdateLane bound, UpdateLane a) {
  if (bound.v < 0.0f) {
    a.lower = bound.v;
  } else {
    a.guard->ok &= a.v >= bound.v;
  }
  return a;
}
__device__ __forceinline__ UpdateLane min(UpdateLane bound, UpdateLane a) {
  if (a.lower == -bound.v) {
    a.guard->ok &= fabsf(a.v) <= bound.v;
  } else {
    a.guard->ok &= (a.v <= bound.v) & (a.lower == 0.0f || a.v >= a.lower);
  }
  return {a.v, a.guard};
}
__device__ __forceinline__ bool greater(UpdateLane a, UpdateLane b) { return a.v > b.v; }
__device__ __forceinline__ UpdateLane select(bool mask, UpdateLane a, UpdateLane b) { return {mask ? a.v : b.v, either(a, b)}; }

/// Reductions over a group; every thread of the warp takes part and gets its group's result.
template <int kThreadCount = kThreadsPerGroup>
__device__ __forceinline__ uint32_t group_int_max(uint32_t a) {
#pragma unroll
  for (int step = 1; step < kThreadCount; step *= 2) a = core::int_max(a, __shfl_xor_sync(0xffffffffu, a, step));
  return a;
}
template <int kThreadCount = kThreadsPerGroup>
__device__ __forceinline__ uint32_t group_unsigned_min(uint32_t a) {
#pragma unroll
  for (int step = 1; step < kThreadCount; step *= 2) a = core::unsigned_min(a, __shfl_xor_sync(0xffffffffu, a, step));
  return a;
}

}  // namespace flashoptim::cuda

namespace flashoptim::core {

template <>
struct LaneTraits<cuda::UpdateLane> {
  using Int = uint32_t;
  using Mask = bool;
  static constexpr int kWidth = 1;
};
template <>
__device__ __forceinline__ cuda::UpdateLane splat<cuda::UpdateLane>(float value) {
  return value;
}

}  // namespace flashoptim::core
