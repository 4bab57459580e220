// Lane types of the CUDA kernels, and what the threads that hold a group (4, or 2 in the hot kernels) do together.
//
// UpdateLane computes the update rule by shorter sequences that give the same bits wherever its guard holds, which is
// nearly always; elsewhere the kernel computes the unit again with ExactLane, which is exact for every input.
#pragma once

#include "flashoptim/core/lanes.h"
#include "src/cuda/tuning.h"

namespace flashoptim::cuda {

inline constexpr uint32_t kSmallestRadicand = (127u - 101u) << 23;  ///< a pattern: sqrt_in_range()'s bound

/// What the values of one thread's update had in common.
struct UpdateGuard {
  uint32_t smallest_radicand_minus_one = 0xffffffffu;  ///< patterns; as unsigned numbers, so that 0 is no small one
  uint32_t largest_divisor = 0u;
  bool ok = true;  // by & throughout: && would make branches

  __device__ __forceinline__ bool holds() const {
    return ok && smallest_radicand_minus_one >= kSmallestRadicand - 1u && largest_divisor <= (127u + 40u) << 23;
  }
};

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
/// 2^-80 <= |a|, 0 < b <= 2^40. Divisors below 2^-126, and quotients that overflow, give NaN, which the caller looks
/// for.
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

/// CUDA's own sequence for the correctly rounded root, for 2^-101 <= a; infinity and negative numbers give NaN.
__device__ __forceinline__ float sqrt_in_range(float a) {
  const float y = approximate_reciprocal_root(a);
  const float s = __fmul_rn(a, y);
  return __fmaf_rn(__fmaf_rn(-s, s, a), __fmul_rn(0.5f, y), s);
}

/// kZeros: dividends and radicands may be 0. kBounded: the caller knows that no bound of the rule is reached, that
/// divisors are at most 2^40 and, without kZeros, that radicands are at least kSmallestRadicand.
template <bool kZeros, bool kBounded>
struct UpdateLane {
  static constexpr bool kKnowsRadicands = kBounded && !kZeros;
  float v;
  UpdateGuard* guard = nullptr;  ///< null for constants
  float lower = 0.0f;            ///< a bound below 0 that max() left to min()

  UpdateLane() = default;
  __device__ __forceinline__ UpdateLane(float value, UpdateGuard* g = nullptr) : v(value), guard(g) {}

  friend __device__ __forceinline__ UpdateGuard* either(UpdateLane a, UpdateLane b) {
    return a.guard != nullptr ? a.guard : b.guard;
  }

  friend __device__ __forceinline__ UpdateLane operator+(UpdateLane a, UpdateLane b) {
    return {a.v + b.v, either(a, b)};
  }
  friend __device__ __forceinline__ UpdateLane operator-(UpdateLane a, UpdateLane b) {
    return {a.v - b.v, either(a, b)};
  }
  friend __device__ __forceinline__ UpdateLane operator*(UpdateLane a, UpdateLane b) {
    return {a.v * b.v, either(a, b)};
  }
  friend __device__ __forceinline__ UpdateLane operator/(UpdateLane a, UpdateLane b) {
    UpdateGuard& guard = *either(a, b);
    const bool is_zero = kZeros && a.v == 0.0f;
    guard.ok &= (fabsf(a.v) >= 0x1p-80f) | is_zero;
    if constexpr (!kBounded) guard.largest_divisor = core::int_max(guard.largest_divisor, core::to_bits(b.v));
    const float q = divide_in_range(a.v, b.v);
    return {is_zero ? a.v : q, &guard};
  }
  friend __device__ __forceinline__ UpdateLane sqrt(UpdateLane a) {
    if constexpr (!kKnowsRadicands) {
      UpdateGuard& guard = *a.guard;
      guard.smallest_radicand_minus_one =
          core::unsigned_min(guard.smallest_radicand_minus_one, core::to_bits(a.v) - 1u);
    }
    const float s = sqrt_in_range(a.v);
    return {kZeros && a.v == 0.0f ? a.v : s, a.guard};
  }

  /// Rules bound a variable by a constant, in either order: usually the variable stays. A bound below 0 is one half of
  /// a clamp, min(c, max(-c, a)), which is a single comparison.
  friend __device__ __forceinline__ UpdateLane max(UpdateLane bound, UpdateLane a) {
    if (a.guard == nullptr) {
      if (bound.guard == nullptr) return core::max(bound.v, a.v);
      const UpdateLane constant = a;
      a = bound;
      bound = constant;
    }
    if constexpr (kBounded) return a;
    if (bound.v < 0.0f) {
      a.lower = bound.v;
    } else {
      a.guard->ok &= a.v >= bound.v;
    }
    return a;
  }
  friend __device__ __forceinline__ UpdateLane min(UpdateLane bound, UpdateLane a) {
    if (a.guard == nullptr) {
      if (bound.guard == nullptr) return core::min(bound.v, a.v);
      const UpdateLane constant = a;
      a = bound;
      bound = constant;
    }
    if constexpr (kBounded) return a;
    if (a.lower == -bound.v) {
      a.guard->ok &= fabsf(a.v) <= bound.v;
    } else {
      a.guard->ok &= (a.v <= bound.v) & (a.lower == 0.0f || a.v >= a.lower);
    }
    return {a.v, a.guard};
  }

  friend __device__ __forceinline__ bool greater(UpdateLane a, UpdateLane b) { return a.v > b.v; }
  friend __device__ __forceinline__ UpdateLane select(bool mask, UpdateLane a, UpdateLane b) {
    return {mask ? a.v : b.v, either(a, b)};
  }
};

/// a / b, correctly rounded, for every a and b. CUDA's own has no short way for a dividend of 0, which is what
/// untouched elements have: a call of 60 instructions.
__device__ __forceinline__ float divide(float a, float b) {
  constexpr uint32_t kSmallestA = (127u - 80u) << 23, kLargestA = (127u + 60u) << 23;
  constexpr uint32_t kSmallestB = (127u - 62u) << 23, kLargestB = (127u + 40u) << 23;
  const bool is_zero = a == 0.0f;
  const bool a_in_range = core::to_bits(core::abs(a)) - kSmallestA <= kLargestA - kSmallestA;
  const bool b_in_range = core::to_bits(b) - kSmallestB <= kLargestB - kSmallestB;
  if ((a_in_range | is_zero) & b_in_range) return is_zero ? a : divide_in_range(a, b);
  return __fdiv_rn(a, b);
}

/// The root, correctly rounded, for every a; likewise.
__device__ __forceinline__ float root(float a) {
  constexpr uint32_t kSmallestNormal = 1u << 23, kInfinity = 0x7f800000u;
  if (core::to_bits(a) - kSmallestNormal < kInfinity - kSmallestNormal) {
    const bool is_small = a < 0x1p-101f;
    const float s = sqrt_in_range(is_small ? a * 0x1p48f : a);
    return is_small ? s * 0x1p-24f : s;
  }
  return a == 0.0f ? a : __fsqrt_rn(a);
}

/// float with this division and root.
struct ExactLane {
  float v;

  ExactLane() = default;
  __device__ __forceinline__ ExactLane(float value) : v(value) {}
};
__device__ __forceinline__ ExactLane operator+(ExactLane a, ExactLane b) { return a.v + b.v; }
__device__ __forceinline__ ExactLane operator-(ExactLane a, ExactLane b) { return a.v - b.v; }
__device__ __forceinline__ ExactLane operator*(ExactLane a, ExactLane b) { return a.v * b.v; }
__device__ __forceinline__ ExactLane operator/(ExactLane a, ExactLane b) { return divide(a.v, b.v); }
__device__ __forceinline__ ExactLane sqrt(ExactLane a) { return root(a.v); }
__device__ __forceinline__ ExactLane abs(ExactLane a) { return core::abs(a.v); }
__device__ __forceinline__ ExactLane max(ExactLane a, ExactLane b) { return core::max(a.v, b.v); }
__device__ __forceinline__ ExactLane min(ExactLane a, ExactLane b) { return core::min(a.v, b.v); }
__device__ __forceinline__ bool greater(ExactLane a, ExactLane b) { return a.v > b.v; }
__device__ __forceinline__ ExactLane select(bool mask, ExactLane a, ExactLane b) { return mask ? a.v : b.v; }
FLASHOPTIM_HD float lane_value(ExactLane a) { return a.v; }
__device__ __forceinline__ uint32_t truncate_to_int(ExactLane a) { return core::truncate_to_int(a.v); }

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

template <bool kZeros, bool kBounded>
struct LaneTraits<cuda::UpdateLane<kZeros, kBounded>> {
  using Int = uint32_t;
  using Mask = bool;
  static constexpr int kWidth = 1;
  static __device__ __forceinline__ cuda::UpdateLane<kZeros, kBounded> splat(float value) { return value; }
};
template <>
struct LaneTraits<cuda::ExactLane> {
  using Int = uint32_t;
  using Mask = bool;
  static constexpr int kWidth = 1;
  static __device__ __forceinline__ cuda::ExactLane splat(float value) { return value; }
  static __device__ __forceinline__ uint32_t splat_bits(uint32_t bits) { return bits; }
};

}  // namespace flashoptim::core
