// The paper's 8-bit state codec (section 3.2; FlashOptim 0.1.3), groups of 32 with an fp16 absmax scale.
//
//   momentum:  a = max |m|, x = m / a, y = 2 x / (1 + |x|), q = floor(127 y + 1/2) as int8
//              back: y = q / 127, x = y / (2 - |y|), m = x * fp16(a)
//   variance:  r = sqrt(v), a = max r, q = floor(255 r / a + 1/2) as uint8
//              back: v = (fp16(a) * q / 255)^2
//
// As the reference does, a is at least 1e-12 and values are divided by the exact maximum, not by the stored scale.
// Fractions are reduced before they are rounded, y = m / (a/2 + |m|/2) and x = q / (254 - |q|): the same numbers with
// one rounding instead of three, and one division instead of two. One deviation, where the reference makes NaN of
// finite gradients: a scale above fp16's range saturates at 65504. A non-finite state is stored as 0; its weight is NaN
// already, and the rest of the group keeps its scale.
#pragma once

#include <type_traits>

#include "flashoptim/core/codecs/coded.h"
#include "flashoptim/core/narrow_float.h"

namespace flashoptim::core {

inline constexpr float kPaperSmallestAbsmax = 1e-12f;
inline constexpr float kPaperLargestScale = 65504.0f;

/// Header (fp16 pattern) of a group whose largest magnitude is `absmax`.
template <class F>
FLASHOPTIM_HD IntOf<F> paper_header(F absmax) {
  return Float16::template round<F>(min(absmax, splat<F>(kPaperLargestScale)));
}

/// What a group is divided by, from the pattern of its largest magnitude.
template <class F>
FLASHOPTIM_HD F paper_absmax(IntOf<F> largest) {
  return max(splat<F>(kPaperSmallestAbsmax), from_bits(largest));
}

/// Whether a finite |m| or sqrt(v) is above every scale. Its group is stored under the scale 65504, so that it is read
/// back as 65504 at most, and the rest of the group as less than it was.
FLASHOPTIM_HD bool paper_saturates(float value) {
  return greater(abs(value), kPaperLargestScale) && greater(0x1p127f * 2.0f, abs(value));
}

struct PaperMomentum {
  /// Per-group constant of encode(): half of the group's largest |m|, which is at least 1e-12.
  template <class F>
  static FLASHOPTIM_HD F encoding_factor(F absmax) {
    return absmax * splat<F>(0.5f);
  }

  /// int8 code in two's complement, low 8 bits of each lane.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> encode(F m, F half_absmax) {
    const F y = m / (half_absmax + abs(m) * splat<F>(0.5f));
    // 127 y + 1/2 lies in [-126.5, 127.5]: 128 more is positive, where truncation is floor.
    return (truncate_to_int(y * splat<F>(127.0f) + splat<F>(128.5f)) - splat_bits<F>(128u)) & splat_bits<F>(0xffu);
  }

  /// What a code, sign-extended, stands for at scale 1.
  template <class F>
  static FLASHOPTIM_HD F fraction(IntOf<F> code) {
    const F q = int_to_float(code);
    return q / (splat<F>(254.0f) - abs(q));
  }

  /// `scale` is the header's fp16 value.
  template <class F>
  static FLASHOPTIM_HD F decode(IntOf<F> code, F scale) {
    return fraction<F>(code) * scale;
  }
};

struct PaperVariance {
  static constexpr float kInverse255High = 0x1.01p-8f;
  static constexpr float kInverse255Low = static_cast<float>(1.0 / 255.0 - static_cast<double>(kInverse255High));

  /// Per-group constant of encode(): 255 over the group's largest r, which is at least 1e-12.
  template <class F>
  static FLASHOPTIM_HD F encoding_factor(F absmax) {
    return splat<F>(255.0f) / absmax;
  }

  /// uint8 code of r = sqrt(v).
  template <class F>
  static FLASHOPTIM_HD IntOf<F> encode(F root, F factor) {
    return truncate_to_int(root * factor + splat<F>(0.5f));
  }

  /// code / 255, correctly rounded: the first factor of 1/255 is short enough for an exact product.
  template <class F>
  static FLASHOPTIM_HD F fraction(IntOf<F> code) {
    const F c = int_to_float(code);
    return c * splat<F>(kInverse255High) + c * splat<F>(kInverse255Low);
  }

  template <class F>
  static FLASHOPTIM_HD F decode(IntOf<F> code, F scale) {
    const F root = fraction<F>(code) * scale;
    return root * root;
  }
};

/// The codec of a slot (slot_codecs.h). `kept` is m or sqrt(v), 0 where that is not finite.
template <bool kIsSigned>
struct PaperSlot {
  using Values = std::conditional_t<kIsSigned, PaperMomentum, PaperVariance>;
  static constexpr bool kSignedCodes = kIsSigned, kUsesSmallest = false, kIsDithered = false, kDropsNonfinite = false;
  template <class F>
  using Constants = Factor<F>;  ///< the scale, or encode()'s factor

  template <class F>
  static FLASHOPTIM_HD F kept(F state) {
    if constexpr (!kIsSigned) state = sqrt(state);
    return finite_or_zero(state);
  }
  template <class F>
  static FLASHOPTIM_HD IntOf<F> magnitude(F kept) {
    return to_bits(abs(kept));
  }
  template <class F>
  static FLASHOPTIM_HD IntOf<F> header(IntOf<F> largest, IntOf<F>) {
    return paper_header(paper_absmax<F>(largest));
  }
  template <class F>
  static FLASHOPTIM_HD Constants<F> decoding(IntOf<F> header) {
    return {half_to_float(header)};
  }
  template <class F>
  static FLASHOPTIM_HD Constants<F> encoding(IntOf<F>, IntOf<F> largest) {
    return {Values::encoding_factor(paper_absmax<F>(largest))};
  }
  template <class F, class C>
  static FLASHOPTIM_HD F decode(IntOf<F> code, const C& constants) {
    return Values::template decode<F>(code, constants.factor);
  }
  template <class F, class C>
  static FLASHOPTIM_HD Coded<F> encode(F kept, const C& constants, IntOf<F>) {
    const IntOf<F> code = Values::template encode<F>(kept, constants.factor);
    return {code, code};
  }
  static FLASHOPTIM_HD bool saturates(float state) { return paper_saturates(kIsSigned ? state : sqrt(state)); }
};

}  // namespace flashoptim::core
