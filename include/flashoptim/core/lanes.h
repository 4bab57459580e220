// Lanes: the small set of operations in which every formula of core/ is written.
//
// A formula is a template over a lane type F. F = float is one element, on the host and in CUDA; a SIMD back end
// defines a struct of 4 to 16 elements with the same functions (src/cpu/lanes_*-inl.h: NEON, AVX2, AVX-512). Every
// operation is exact or IEEE round-to-nearest, so that all of them produce the same bits (docs/numerics.md). That
// holds only when the compiler neither contracts a * b + c into an fma nor flushes subnormals: targets that include
// core/ get -ffp-contract=off (--fmad=false) from the CMake package.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FLASHOPTIM_HD __host__ __device__ __forceinline__
#else
#define FLASHOPTIM_HD inline __attribute__((always_inline))
#endif

/// Before a loop of a few elements: that all of them stand in registers on a device.
#if defined(__CUDA_ARCH__)
#define FLASHOPTIM_UNROLL _Pragma("unroll")
#else
#define FLASHOPTIM_UNROLL
#endif

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace flashoptim::core {

/// What a lane type is: Int holds a 32-bit pattern per lane, Mask a truth value per lane; splat and splat_bits put one
/// number in every lane.
template <class F>
struct LaneTraits;

template <>
struct LaneTraits<float> {
  using Int = uint32_t;
  using Mask = bool;
  static constexpr int kWidth = 1;
  static FLASHOPTIM_HD float splat(float value) { return value; }
  static FLASHOPTIM_HD uint32_t splat_bits(uint32_t bits) { return bits; }
};

template <class F>
using IntOf = typename LaneTraits<F>::Int;
template <class F>
using MaskOf = typename LaneTraits<F>::Mask;

template <class F>
FLASHOPTIM_HD F splat(float value) {
  return LaneTraits<F>::splat(value);
}
template <class F>
FLASHOPTIM_HD IntOf<F> splat_bits(uint32_t bits) {
  return LaneTraits<F>::splat_bits(bits);
}

FLASHOPTIM_HD uint32_t to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FLASHOPTIM_HD float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FLASHOPTIM_HD float select(bool mask, float if_true, float if_false) { return mask ? if_true : if_false; }
FLASHOPTIM_HD uint32_t select(bool mask, uint32_t if_true, uint32_t if_false) { return mask ? if_true : if_false; }

/// a > b ? a : b, so that a NaN in either operand gives b.
FLASHOPTIM_HD float max(float a, float b) { return a > b ? a : b; }
/// a < b ? a : b, so that a NaN in either operand gives b.
FLASHOPTIM_HD float min(float a, float b) { return a < b ? a : b; }
FLASHOPTIM_HD float abs(float a) { return from_bits(to_bits(a) & 0x7fffffffu); }

FLASHOPTIM_HD float sqrt(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#elif defined(__CUDACC__)
  return ::sqrtf(a);
#else
  return __builtin_sqrtf(a);
#endif
}

/// Integer comparisons and max/min read the patterns as signed 32-bit numbers (AVX2 has no other kind).
FLASHOPTIM_HD bool int_greater(uint32_t a, uint32_t b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b); }
FLASHOPTIM_HD bool int_equal(uint32_t a, uint32_t b) { return a == b; }
FLASHOPTIM_HD uint32_t int_max(uint32_t a, uint32_t b) { return int_greater(a, b) ? a : b; }
FLASHOPTIM_HD uint32_t int_min(uint32_t a, uint32_t b) { return int_greater(b, a) ? a : b; }

/// Shifts take one count for all lanes, 0 to 31.
FLASHOPTIM_HD uint32_t shift_left(uint32_t a, uint32_t count) { return a << count; }
FLASHOPTIM_HD uint32_t shift_right(uint32_t a, uint32_t count) { return a >> count; }

/// Keeps the sign.
FLASHOPTIM_HD uint32_t shift_right_signed(uint32_t a, uint32_t count) {
  return static_cast<uint32_t>(static_cast<int32_t>(a) >> count);
}
/// One count per lane, 0 to 31.
FLASHOPTIM_HD uint32_t shift_left_each(uint32_t a, uint32_t count) { return a << (count & 31u); }
FLASHOPTIM_HD uint32_t shift_right_each(uint32_t a, uint32_t count) { return a >> (count & 31u); }

/// Smallest of patterns read as unsigned numbers.
FLASHOPTIM_HD uint32_t unsigned_min(uint32_t a, uint32_t b) { return a < b ? a : b; }

FLASHOPTIM_HD bool unsigned_less(uint32_t a, uint32_t b) { return a < b; }

/// All ones where a > b as signed numbers, 0 elsewhere.
template <class F>
FLASHOPTIM_HD IntOf<F> int_greater_bits(IntOf<F> a, IntOf<F> b) {
  return select(int_greater(a, b), splat_bits<F>(0xffffffffu), splat_bits<F>(0u));
}

/// Number of significant bits of a pattern below 2^31: 0 for 0.
FLASHOPTIM_HD uint32_t bit_length(uint32_t a) {
#if defined(__CUDA_ARCH__)
  return 32u - static_cast<uint32_t>(__clz(static_cast<int>(a)));
#else
  return a == 0 ? 0u : 32u - static_cast<uint32_t>(__builtin_clz(a));
#endif
}

/// Signed integer to float, exact for |a| <= 2^24.
FLASHOPTIM_HD float int_to_float(uint32_t a) { return static_cast<float>(static_cast<int32_t>(a)); }

/// Towards zero; the caller keeps |a| < 2^31 and not NaN.
FLASHOPTIM_HD uint32_t truncate_to_int(float a) { return static_cast<uint32_t>(static_cast<int32_t>(a)); }

FLASHOPTIM_HD bool is_nan(float a) { return !(a == a); }
FLASHOPTIM_HD bool equals(float a, float b) { return a == b; }
FLASHOPTIM_HD bool greater(float a, float b) { return a > b; }

/// |a| with the sign of `sign` toggled in: a for a positive sign bit, -a for a negative one.
template <class F>
FLASHOPTIM_HD F flip_sign(F a, IntOf<F> sign_bits) {
  return from_bits(to_bits(a) ^ sign_bits);
}

/// The quiet NaN that every back end stores, whatever NaN its hardware computed.
inline constexpr uint32_t kCanonicalNan = 0x7fc00000u;

template <class F>
FLASHOPTIM_HD F canonical_nan(F a) {
  return select(is_nan(a), from_bits(splat_bits<F>(kCanonicalNan)), a);
}

}  // namespace flashoptim::core
