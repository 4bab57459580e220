// bfloat16 and binary16 in integer arithmetic, written from IEEE 754 and shared with nothing under test.
#pragma once

#include <cmath>
#include <cstdint>

namespace flashoptim::test {

struct ReferenceFormat {
  const char* name;
  int mantissa_bits;
  int exponent_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t largest_exponent() const { return (1u << exponent_bits) - 1; }
  uint32_t canonical_nan() const { return (largest_exponent() << mantissa_bits) | (1u << (mantissa_bits - 1)); }
  uint32_t infinity() const { return largest_exponent() << mantissa_bits; }
  bool is_nan(uint32_t bits) const { return (bits & 0x7fffu) > infinity(); }
  bool is_infinite(uint32_t bits) const { return (bits & 0x7fffu) == infinity(); }

  /// Value of a 16-bit pattern.
  double decode(uint32_t bits) const {
    const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
    const int exponent = static_cast<int>((bits & 0x7fffu) >> mantissa_bits);
    const double mantissa = bits & ((1u << mantissa_bits) - 1u);
    if (static_cast<uint32_t>(exponent) == largest_exponent()) return mantissa != 0 ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias() - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias() - mantissa_bits);
  }

  /// Half of the distance between neighbours at a finite pattern (h of docs/numerics.md).
  double half_ulp(uint32_t bits) const {
    const int exponent = static_cast<int>((bits & 0x7fffu) >> mantissa_bits);
    return std::ldexp(1.0, (exponent == 0 ? 1 : exponent) - bias() - mantissa_bits - 1);
  }

  /// Pattern nearest to an fp32 pattern, ties to even; overflow to infinity; every NaN the canonical one.
  uint32_t encode(uint32_t fp32) const {
    const uint32_t sign = (fp32 >> 16) & 0x8000u;
    const int exponent = static_cast<int>((fp32 >> 23) & 0xffu);
    const uint64_t fraction = fp32 & 0x7fffffu;
    if (exponent == 255) return fraction != 0 ? canonical_nan() : sign | infinity();
    // The value is significand * 2^power.
    const uint64_t significand = exponent == 0 ? fraction : fraction | 0x800000u;
    const int power = (exponent == 0 ? 1 : exponent) - 127 - 23;
    if (significand == 0) return sign;
    const int leading = power + 63 - __builtin_clzll(significand);
    const int smallest = 1 - bias();
    const int quantum = (leading < smallest ? smallest : leading) - mantissa_bits;
    uint64_t rounded;
    const int shift = quantum - power;
    if (shift <= 0) {
      rounded = significand << -shift;
    } else if (shift > 40) {
      rounded = 0;  // the significand has 24 bits: less than half a quantum
    } else {
      const uint64_t below = significand & ((uint64_t{1} << shift) - 1), half = uint64_t{1} << (shift - 1);
      rounded = significand >> shift;
      if (below > half || (below == half && (rounded & 1u) != 0)) ++rounded;
    }
    // A carry out of the mantissa is the next exponent's first value.
    const uint64_t hidden = uint64_t{1} << mantissa_bits;
    const uint64_t field = static_cast<uint64_t>(quantum + mantissa_bits + bias());
    const uint64_t pattern = rounded < hidden ? rounded : (field << mantissa_bits) + (rounded - hidden);
    return pattern >= infinity() ? sign | infinity() : sign | static_cast<uint32_t>(pattern);
  }
};

inline constexpr ReferenceFormat kReferenceBFloat16{"bfloat16", 7, 8};
inline constexpr ReferenceFormat kReferenceFloat16{"float16", 10, 5};

}  // namespace flashoptim::test
