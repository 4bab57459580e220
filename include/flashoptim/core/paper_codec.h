// The paper's 8-bit state codec (section 3.2; FlashOptim 0.1.3), groups of 32 with an fp16 absmax scale.
//
//   momentum:  a = max |m|, x = m / a, y = 2 x / (1 + |x|), q = floor(127 y + 1/2) as int8
//              back: y = q / 127, x = y / (2 - |y|), m = x * fp16(a)
//   variance:  r = sqrt(v), a = max r, q = floor(255 r / a + 1/2) as uint8
//              back: v = (fp16(a) * q / 255)^2
//
// As the reference does, a is at least 1e-12 and values are divided by the exact maximum, not by the stored scale.
// One deviation, where the reference makes NaN of finite gradients: a scale above fp16's range saturates at 65504.
// A non-finite state is stored as 0; its weight is NaN already, and the rest of the group keeps its scale.
#pragma once

#include "flashoptim/core/weight_split.h"

namespace flashoptim::core {

inline constexpr float kPaperSmallestAbsmax = 1e-12f;
inline constexpr float kPaperLargestScale = 65504.0f;

/// Header (fp16 pattern) of a group whose largest magnitude is `absmax`.
template <class F>
FLASHOPTIM_HD IntOf<F> paper_header(F absmax) {
  return Float16::template round<F>(min(absmax, splat<F>(kPaperLargestScale)));
}

/// 0 for NaN and infinity.
template <class F>
FLASHOPTIM_HD F finite_or_zero(F value) {
  return select(greater(splat<F>(0x1p127f * 2.0f), abs(value)), value, splat<F>(0.0f));
}

struct PaperMomentum {
  /// int8 code in two's complement, low 8 bits of each lane. `absmax` as max over |m|, at least 1e-12.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> encode(F m, F absmax) {
    const F x = m / absmax;
    const F y = (x + x) / (splat<F>(1.0f) + abs(x));
    // 127 y + 1/2 >= -126.5: shifted by 128 it is positive, where truncation is floor. The sum is exact to 2^-16,
    // which moves no result except at distance below 2^-17 from a half; the reference has the same single rounding.
    const F scaled = y * splat<F>(127.0f) + splat<F>(0.5f);
    const IntOf<F> towards_zero = truncate_to_int(scaled);
    const IntOf<F> floored =
        select(greater(int_to_float(towards_zero), scaled), towards_zero - splat_bits<F>(1u), towards_zero);
    return floored & splat_bits<F>(0xffu);
  }

  /// `code` sign-extended; `scale` the header's fp16 value.
  template <class F>
  static FLASHOPTIM_HD F decode(IntOf<F> code, F scale) {
    const F y = correction_fraction<8>(int_to_float(code));  // code / 127
    return (y / (splat<F>(2.0f) - abs(y))) * scale;
  }
};

struct PaperVariance {
  static constexpr float kInverse255High = 0x1.01p-8f;
  static constexpr float kInverse255Low = static_cast<float>(1.0 / 255.0 - static_cast<double>(kInverse255High));

  /// uint8 code of r = sqrt(v); `absmax` the group's largest r, at least 1e-12.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> encode(F root, F absmax) {
    return truncate_to_int((root / absmax) * splat<F>(255.0f) + splat<F>(0.5f));
  }

  template <class F>
  static FLASHOPTIM_HD F decode(IntOf<F> code, F scale) {
    // code / 255, correctly rounded: the first factor of 1/255 is short enough for an exact product.
    const F c = int_to_float(code);
    const F root = (c * splat<F>(kInverse255High) + c * splat<F>(kInverse255Low)) * scale;
    return root * root;
  }
};

}  // namespace flashoptim::core
