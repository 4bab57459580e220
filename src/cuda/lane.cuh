// Lane types of the CUDA kernels, and what the quad of threads that holds a group does together.
//
// F = float is exact for every input. UpdateLane computes the update rule by shorter sequences that give the same bits
// wherever `ok` comes out true, which is nearly always; elsewhere the kernel computes the unit again with float.
#pragma once

#include "flashoptim/core/lanes.h"
#include "src/cuda/tuning.h"

namespace flashoptim::cuda {

struct UpdateLane {
  float v;
  bool ok = true;

  UpdateLane() = default;
  __device__ __forceinline__ UpdateLane(float value) : v(value) {}
  __device__ __forceinline__ UpdateLane(float value, bool is_ok) : v(value), ok(is_ok) {}
};

__device__ __forceinline__ UpdateLane operator+(UpdateLane a, UpdateLane b) { return {a.v + b.v, a.ok && b.ok}; }
__device__ __forceinline__ UpdateLane operator-(UpdateLane a, UpdateLane b) { return {a.v - b.v, a.ok && b.ok}; }
__device__ __forceinline__ UpdateLane operator*(UpdateLane a, UpdateLane b) { return {a.v * b.v, a.ok && b.ok}; }

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

/// The sequence of CUDA's own correctly rounded division inside the range where it needs no scaling, here
/// 2^-80 <= |a|, |b| <= 2^40. Below 2^-126 b, and a quotient that overflows, give NaN, which the caller looks for.
__device__ __forceinline__ UpdateLane operator/(UpdateLane a, UpdateLane b) {
  float y = approximate_reciprocal(b.v);
  y = __fmaf_rn(y, __fmaf_rn(-b.v, y, 1.0f), y);
  float q = __fmul_rn(a.v, y);
  q = __fmaf_rn(y, __fmaf_rn(-b.v, q, a.v), q);
  q = __fmaf_rn(y, __fmaf_rn(-b.v, q, a.v), q);
  return {q, a.ok && b.ok && fabsf(a.v) >= 0x1p-80f && fabsf(b.v) <= 0x1p40f};
}

/// CUDA's own sequence for the correctly rounded root, for 2^-101 <= a; infinity gives NaN.
__device__ __forceinline__ UpdateLane sqrt(UpdateLane a) {
  const float y = approximate_reciprocal_root(a.v);
  const float s = __fmul_rn(a.v, y);
  const float root = __fmaf_rn(__fmaf_rn(-s, s, a.v), __fmul_rn(0.5f, y), s);
  return {root, a.ok && a.v >= 0x1p-101f};
}

/// Rules bound a variable by a constant, which they name first: usually the variable stays.
__device__ __forceinline__ UpdateLane max(UpdateLane bound, UpdateLane a) { return {a.v, bound.ok && a.ok && a.v >= bound.v}; }
__device__ __forceinline__ UpdateLane min(UpdateLane bound, UpdateLane a) { return {a.v, bound.ok && a.ok && a.v <= bound.v}; }
__device__ __forceinline__ bool greater(UpdateLane a, UpdateLane b) { return a.v > b.v; }
__device__ __forceinline__ UpdateLane select(bool mask, UpdateLane a, UpdateLane b) {
  return {mask ? a.v : b.v, a.ok && b.ok};
}

/// Reductions over a group; every thread of the warp takes part and gets its group's result.
__device__ __forceinline__ uint32_t group_int_max(uint32_t a) {
#pragma unroll
  for (int step = 1; step < kThreadsPerGroup; step *= 2) a = core::int_max(a, __shfl_xor_sync(0xffffffffu, a, step));
  return a;
}
__device__ __forceinline__ uint32_t group_unsigned_min(uint32_t a) {
#pragma unroll
  for (int step = 1; step < kThreadsPerGroup; step *= 2) a = core::unsigned_min(a, __shfl_xor_sync(0xffffffffu, a, step));
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
