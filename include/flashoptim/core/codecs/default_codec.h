// The default 8-bit state codec: float codes in a window of the group's own, rounded without bias.
//
// An fp32 number is piecewise linear in its bit pattern, so keeping the top bits of the pattern is a logarithmic code
// that needs neither division nor root nor table, and adding a random number below the kept bits before cutting them
// is exact unbiased rounding: E[decode(encode(x))] = x. docs/numerics.md derives the error bounds.
//
// Variance (unsigned slots). A group's header holds a shift s in 8 ... 23 and a base; the code is
//     q = ((bits(v) + dither) >> s) - base + 1,   1 ... 255,   dither uniform in [0, 2^s)
// and 0 for v = 0 alone. s is the smallest for which the group's own range fits, so a homogeneous group gets steps of
// 0.2 % and a group that spans 254 octaves still keeps every element within a factor of 2. The base is a multiple of
// 2^max(s, 19): codes lie on one grid for the whole line, and a window that moves re-rounds nothing.
//
// Momentum (signed slots). Where the optimizer names a variance, x = m / S with S the power of two nearest below
// sqrt(v) as stored (Adam bounds |x|, whatever the spread of the group); otherwise x = m. A group's header is a scale
// G (the top 16 bits of fp32 below the sign: 8 of exponent, 8 of mantissa), and the code a sign and 7 bits a of
//     |x| / G = float(bits(2.0) | a << (23 - K)) - 2     (mu-law: K bits of mantissa, 127 / 2^K octaves)
//
// A slow average's G is a power of two: rounded up finely it would follow its group's largest, whose own code moves,
// nearly every step, and all codes would be rounded anew. What an average of 10,000 steps keeps of that is most of its
// error (docs/numerics.md).
//
// Momentum whose K a group chooses (Lion: MuLawGroupCodec). The header gives 2 bits of G's mantissa to K = 3 ... 6, and
// code 1 keeps the sign of what is far below the first step d = 2^(1 - K):
//     |x| / G = float(bits(2.0) | a << (23 - K)) - (2 + d - f),  f = d / 8, for a >= 1;  a = 0 is x = 0 alone
//
// At the end: the codecs of slots (slot_codecs.h says what those have), made of these.
#pragma once

#include "flashoptim/core/codecs/coded.h"
#include "flashoptim/core/lanes.h"

namespace flashoptim::core {

/// Codec of unsigned slots.
struct WindowCodec {
  static constexpr uint32_t kSmallestShift = 8;
  static constexpr uint32_t kBaseShift = 19;  ///< header = (base >> 19 in bit space) << 4 | (shift - 8)
  static constexpr float kSmallestNormal = 0x1p-126f;
  static constexpr uint32_t kLargestBits = 0x7f000000u;  ///< pattern of 2^127, the largest that is stored

  /// Pattern of what is encoded for a state v: 0 for 0 and for non-finite values, otherwise between the smallest normal
  /// number, so that a positive v never becomes 0, and 2^127, so that none rounds up to infinity. v is not negative.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> storable(F v) {
    const IntOf<F> bits = to_bits(v);
    const MaskOf<F> stays = unsigned_less(bits - splat_bits<F>(1u), splat_bits<F>(0x7f7fffffu));
    const IntOf<F> bounded = int_min(int_max(bits, splat_bits<F>(0x00800000u)), splat_bits<F>(kLargestBits));
    return select(stays, bounded, splat_bits<F>(0u));
  }

  /// Whether a finite v is above what storable() gives: it is stored as 2^127.
  static FLASHOPTIM_HD bool saturates(float v) {
    return int_greater(to_bits(v), kLargestBits) && int_greater(0x7f800000u, to_bits(v));
  }

  /// Header of a group from the largest pattern and the smallest non-zero pattern minus 1 (as unsigned: zeros give
  /// 2^32 - 1), over storable() values. A group of zeros has header 0.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> header(IntOf<F> largest, IntOf<F> smallest_minus_one) {
    using I = IntOf<F>;
    const I smallest = smallest_minus_one + splat_bits<F>(1u);
    // Up to s = 19 the base is smallest rounded down to 2^19, and s must satisfy (largest - base) <= 254 << s.
    const I base19 = shift_left(shift_right(smallest, kBaseShift), kBaseShift);
    const I extent = largest - base19;
    I s = int_max(bit_length(extent) - splat_bits<F>(8u), splat_bits<F>(kSmallestShift));
    s = select(int_greater(extent, shift_left_each(splat_bits<F>(254u), s)), s + splat_bits<F>(1u), s);
    // Above, the base is smallest rounded down to 2^s, which can take one more.
    const I base = shift_left_each(shift_right_each(smallest, s), s);
    const I wide = int_greater_bits<F>(s, splat_bits<F>(kBaseShift));
    const I steps = shift_right_each(largest - base + shift_left_each(splat_bits<F>(1u), s) - splat_bits<F>(1u), s);
    s = s + (wide & int_greater_bits<F>(steps, splat_bits<F>(254u)) & splat_bits<F>(1u));
    const I wide_base = shift_right(shift_left_each(shift_right_each(smallest, s), s), kBaseShift);
    const I field = select(int_greater(s, splat_bits<F>(kBaseShift)), wide_base, shift_right(smallest, kBaseShift));
    const I packed = shift_left(field, 4) | (s - splat_bits<F>(kSmallestShift));
    return select(int_equal(largest, splat_bits<F>(0u)), splat_bits<F>(0u), packed);
  }

  /// Per-group constants unpacked from headers, one group per lane.
  template <class I>
  struct Window {
    I shift;
    I dither_shift;    ///< 32 - shift
    I base_minus_one;  ///< in units of 2^shift; 0 for header 0
    I below;           ///< the pattern below that of code 1

    enum Place : int { kShift, kDitherShift, kBaseMinusOne, kBelow, kCount };
    template <class Body>
    FLASHOPTIM_HD void each(const Body& body) {
      body(kShift, shift);
      body(kDitherShift, dither_shift);
      body(kBaseMinusOne, base_minus_one);
      body(kBelow, below);
    }
  };

  template <class F>
  static FLASHOPTIM_HD Window<IntOf<F>> window(IntOf<F> header) {
    Window<IntOf<F>> w;
    w.shift = (header & splat_bits<F>(15u)) + splat_bits<F>(kSmallestShift);
    w.dither_shift = splat_bits<F>(32u) - w.shift;
    const IntOf<F> base = shift_right_each(shift_left(shift_right(header, 4), kBaseShift), w.shift);
    w.base_minus_one = int_max(base, splat_bits<F>(1u)) - splat_bits<F>(1u);
    w.below = shift_left_each(w.base_minus_one, w.shift);
    return w;
  }

  /// 0 for code 0, and for codes that only damaged bytes hold: patterns from 2^31 on, where signed comparison sees them
  /// below the window. So a variance is never negative.
  template <class F>
  static FLASHOPTIM_HD F decode(IntOf<F> code, const Window<IntOf<F>>& w) {
    const IntOf<F> bits = shift_left_each(code + w.base_minus_one, w.shift);
    return from_bits(select(int_greater(bits, w.below), bits, splat_bits<F>(0u)));
  }

  /// `bits` is storable(v); `dither` the stream's word.
  template <class F>
  static FLASHOPTIM_HD Coded<F> encode(IntOf<F> bits, const Window<IntOf<F>>& w, IntOf<F> dither) {
    const IntOf<F> cut = shift_right_each(bits + shift_right_each(dither, w.dither_shift), w.shift);
    // Zero has cut 0, below the base of every window; it and only it becomes code 0.
    return {int_max(cut - w.base_minus_one, splat_bits<F>(0u)), shift_left_each(cut, w.shift)};
  }
};

/// Codec of signed slots; kMantissaBits is K above.
template <int kMantissaBits>
struct MuLawCodec {
  static constexpr uint32_t kShift = 23 - kMantissaBits;
  static constexpr uint32_t kTwoBits = 0x40000000u;  ///< its low bits are 0 where codes go, for every K >= 1

  /// Largest |x| / G, that of code 127.
  static FLASHOPTIM_HD float largest() { return from_bits((127u << kShift) | kTwoBits) - 2.0f; }

  /// Header (pattern of G >> 15) of a group whose largest |x| is `absmax`: absmax / largest() rounded up to 8 bits of
  /// mantissa, so that no code saturates. Below the normal range the group is stored as zeros, with header 0.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> header(F absmax) {
    // The factor is 2^-22 above 1 / largest(), which covers the two roundings of this product and of encode().
    const F scale = absmax * splat<F>((1.0f / largest()) * (1.0f + 0x1p-22f));
    const IntOf<F> up = shift_right(to_bits(scale) + splat_bits<F>(0x7fffu), 15);
    return select(int_greater(splat_bits<F>(0x0100u), up), splat_bits<F>(0u), up);
  }

  /// Per-group constants: G and 1 / G, both 0 for header 0.
  template <class F>
  static FLASHOPTIM_HD F scale(IntOf<F> header) {
    return from_bits(shift_left(header, 15));
  }
  /// G as decoding takes it. Relative to a variance at most 2^30, so that a damaged header gives no infinity. (From
  /// zero states, with beta2 > beta1^2, |m| over the root of v is at most (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 /
  /// beta2)): 7.3 for 0.9 and 0.999. A smaller beta2 forgets v before m; an m that is then above the bound shrinks to
  /// it.)
  template <bool kRelative, class F>
  static FLASHOPTIM_HD F decoding_scale(IntOf<F> header) {
    if constexpr (!kRelative) return scale<F>(header);
    return from_bits(int_min(shift_left(header, 15), splat_bits<F>((127u + 30u) << 23)));
  }
  template <class F>
  static FLASHOPTIM_HD F inverse_scale(IntOf<F> header) {
    const F g = from_bits(shift_left(header, 15));
    return select(int_equal(header, splat_bits<F>(0u)), splat<F>(0.0f), splat<F>(1.0f) / g);
  }

  /// x / G with its sign, from a code's 8 bits.
  template <class F>
  static FLASHOPTIM_HD F decode(IntOf<F> code) {
    const IntOf<F> bits = (shift_left(code, kShift) & splat_bits<F>(127u << kShift)) | splat_bits<F>(kTwoBits);
    const F magnitude = from_bits(bits) - splat<F>(2.0f);
    return from_bits(to_bits(magnitude) ^ (shift_left(code, 24) & splat_bits<F>(0x80000000u)));
  }

  /// `inverse_scale` that of the header made from the group's largest |x|: the code then stays within 127.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> encode(F x, F inverse_scale, IntOf<F> dither) {
    const F y = abs(x) * inverse_scale + splat<F>(2.0f);
    const IntOf<F> cut = shift_right(to_bits(y) + shift_right(dither, 32u - kShift), kShift);
    const IntOf<F> sign = shift_right(to_bits(x), 24);
    return (cut & splat_bits<F>(0x7fu)) | (sign & splat_bits<F>(0x80u));
  }
};

/// Codec of signed slots alone in their group, which choose K themselves: 6 where magnitudes lie within 6.5 octaves, 3
/// where they span 12.5 and more (of fp32's pattern: docs/numerics.md).
struct MuLawGroupCodec {
  static constexpr uint32_t kFinestShift = 17;  ///< K = 6; the header's low 2 bits are the shift above this
  static constexpr uint32_t kTwoBits = 0x40000000u;
  /// Octaves, in patterns, from a group's smallest non-zero |x| to its largest, from which on K is 5, 4, 3.
  static constexpr uint32_t kWide5 = 13u << 22, kWide4 = 17u << 22, kWide3 = 25u << 22;

  /// Per-group constants unpacked from headers, one group per lane.
  template <class F>
  struct Group {
    IntOf<F> shift;  ///< 23 - K
    IntOf<F> dither_shift;
    IntOf<F> mask;    ///< the code's 7 bits in place
    F offset;         ///< 2 + d - f
    IntOf<F> lowest;  ///< pattern of 2 + d, that of code 1

    static constexpr int kCount = 5;
    template <class Body>
    FLASHOPTIM_HD void each(const Body& body) {
      body(0, shift);
      body(1, dither_shift);
      body(2, mask);
      body(3, offset);
      body(4, lowest);
    }
  };
  template <class F>
  static FLASHOPTIM_HD Group<F> group(IntOf<F> header) {
    Group<F> g;
    g.shift = (header & splat_bits<F>(3u)) + splat_bits<F>(kFinestShift);
    g.dither_shift = splat_bits<F>(32u) - g.shift;
    const IntOf<F> step = shift_left_each(splat_bits<F>(1u), g.shift);
    g.mask = shift_left(step, 7) - step;
    g.lowest = splat_bits<F>(kTwoBits) + step;
    g.offset = from_bits(g.lowest - shift_right(step, 3));
    return g;
  }

  /// Largest |x| / G of a shift, that of code 127.
  static FLASHOPTIM_HD float largest(uint32_t shift) {
    return from_bits((127u << shift) | kTwoBits) - group<float>(shift - kFinestShift).offset;
  }

  /// Header of a group, (pattern of G >> 17) << 2 | shift - 17, from the pattern of its largest |x| and that of the
  /// smallest non-zero one minus 1 (as unsigned: zeros give 2^32 - 1). G is the largest |x| over largest(), rounded up
  /// to 6 bits of mantissa, so that no code saturates. Below the normal range the group is stored as zeros, header 0.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> header(IntOf<F> largest_bits, IntOf<F> smallest_minus_one) {
    using I = IntOf<F>;
    const I one = splat_bits<F>(1u);
    const I octaves = largest_bits - (smallest_minus_one + one);  // 0 for a group of zeros
    const I at5 = int_greater_bits<F>(octaves, splat_bits<F>(kWide5 - 1u)) & one;
    const I at4 = int_greater_bits<F>(octaves, splat_bits<F>(kWide4 - 1u)) & one;
    const I at3 = int_greater_bits<F>(octaves, splat_bits<F>(kWide3 - 1u)) & one;
    const F wide = select(int_equal(at3, one), splat<F>(inverse_largest(20)), splat<F>(inverse_largest(19)));
    const F narrow = select(int_equal(at5, one), splat<F>(inverse_largest(18)), splat<F>(inverse_largest(17)));
    const F scale = from_bits(largest_bits) * select(int_equal(at4, one), wide, narrow);
    const I up = shift_right(to_bits(scale) + splat_bits<F>(0x1ffffu), 17);
    const I packed = shift_left(up, 2) + (at5 + at4 + at3);
    return select(int_greater(splat_bits<F>(0x0040u), up), splat_bits<F>(0u), packed);
  }

  /// G, and 1 / G; both 0 for header 0.
  template <class F>
  static FLASHOPTIM_HD F scale(IntOf<F> header) {
    return from_bits(shift_left(shift_right(header, 2), 17));
  }
  template <class F>
  static FLASHOPTIM_HD F inverse_scale(IntOf<F> header) {
    return select(int_equal(header, splat_bits<F>(0u)), splat<F>(0.0f), splat<F>(1.0f) / scale<F>(header));
  }

  /// x / G with its sign, from a code extended by its sign. Every operation is exact; code 0 is f - d before max().
  template <class F>
  static FLASHOPTIM_HD F decode(IntOf<F> code, const Group<F>& g) {
    const IntOf<F> y = (shift_left_each(code, g.shift) & g.mask) | splat_bits<F>(kTwoBits);
    const F magnitude = max(from_bits(y) - g.offset, splat<F>(0.0f));
    return from_bits(to_bits(magnitude) | (code & splat_bits<F>(0x80000000u)));
  }

  /// `inverse_scale` and `g` those of the header made from the group: the code then stays within 127. Its 7 bits are 0
  /// where |x| / G is 0 as fp32: for x = 0, in a group stored as zeros, and from 2^-150 down.
  template <class F>
  static FLASHOPTIM_HD IntOf<F> encode(F x, F inverse_scale, const Group<F>& g, IntOf<F> dither) {
    const F ratio = abs(x) * inverse_scale;
    const IntOf<F> y =
        select(greater(ratio, splat<F>(0.0f)), int_max(to_bits(ratio + g.offset), g.lowest), splat_bits<F>(0u));
    const IntOf<F> cut = shift_right_each(y + shift_right_each(dither, g.dither_shift), g.shift);
    const IntOf<F> sign = shift_right(to_bits(x), 24);
    return (cut & splat_bits<F>(0x7fu)) | (sign & splat_bits<F>(0x80u));
  }

 private:
  /// 2^-21 above 1 / largest(), which covers the roundings of header()'s product and of encode().
  static FLASHOPTIM_HD float inverse_largest(uint32_t shift) { return (1.0f / largest(shift)) * (1.0f + 0x1p-21f); }
};

/// The power of two S that momentum is stored relative to, 2^floor(log2(v) / 2), and its inverse, for the pattern of a
/// stored v > 0. Their product is exactly 1. (Half of an exponent is a shift of the pattern.)
template <class F>
FLASHOPTIM_HD F root_scale(IntOf<F> v_bits) {
  return from_bits((shift_right(v_bits, 1) + splat_bits<F>(127u << 22)) & splat_bits<F>(0x7f800000u));
}
template <class F>
FLASHOPTIM_HD F inverse_root_scale(IntOf<F> v_bits) {
  constexpr uint32_t kTop = (255u << 23) - 1u - (127u << 22);
  return from_bits((splat_bits<F>(kTop) - shift_right(v_bits, 1)) & splat_bits<F>(0x7f800000u));
}

/// Largest |m| / S that is encoded, far above what decoding gives back. States from elsewhere, or a beta2 that forgets
/// far sooner than beta1, can bring a large m beside a tiny v: the quotient would be infinite, and the group's codes
/// digits of a NaN, which are not the same on every device.
inline constexpr float kLargestRelative = 0x1p126f;

/// Momentum relative to the stored variance: m / S, and 0 where the variance is 0 (nothing was ever seen, or the state
/// is not finite: a rule whose m can be non-finite beside a finite v must not ask for this).
template <class F>
FLASHOPTIM_HD F relative_to_root(F m, IntOf<F> v_bits) {
  const F x = m * inverse_root_scale<F>(v_bits);
  const F bounded = max(min(x, splat<F>(kLargestRelative)), splat<F>(-kLargestRelative));  // of a NaN: kLargestRelative
  return select(int_equal(v_bits, splat_bits<F>(0u)), splat<F>(0.0f), bounded);
}

// ---- codecs of slots ------------------------------------------------------------------------------------------------

/// An unsigned slot.
struct WindowSlot {
  static constexpr bool kSignedCodes = false, kUsesSmallest = true, kIsDithered = true, kDropsNonfinite = false;
  template <class F>
  using Constants = WindowCodec::Window<IntOf<F>>;

  template <class F>
  static FLASHOPTIM_HD F kept(F state) {
    return from_bits(WindowCodec::storable(state));
  }
  template <class F>
  static FLASHOPTIM_HD IntOf<F> magnitude(F kept) {
    return to_bits(kept);
  }
  template <class F>
  static FLASHOPTIM_HD IntOf<F> header(IntOf<F> largest, IntOf<F> smallest_minus_one) {
    return WindowCodec::header<F>(largest, smallest_minus_one);
  }
  template <class F>
  static FLASHOPTIM_HD Constants<F> decoding(IntOf<F> header) {
    return WindowCodec::window<F>(header);
  }
  template <class F>
  static FLASHOPTIM_HD Constants<F> encoding(IntOf<F> header, IntOf<F>) {
    return WindowCodec::window<F>(header);
  }
  template <class F, class C>
  static FLASHOPTIM_HD F decode(IntOf<F> code, const C& constants) {
    return WindowCodec::decode<F>(code, constants);
  }
  template <class F, class C>
  static FLASHOPTIM_HD Coded<F> encode(F kept, const C& constants, IntOf<F> dither) {
    return WindowCodec::encode<F>(to_bits(kept), constants, dither);
  }
  static FLASHOPTIM_HD bool saturates(float state) { return WindowCodec::saturates(state); }
};

/// What signed slots have in common. `kept` is the state, finite, or what it is relative to its variance.
struct SignedSlot {
  static constexpr bool kIsDithered = true, kDropsNonfinite = true;
  template <class F>
  static FLASHOPTIM_HD F kept(F state) {
    return finite_or_zero(state);
  }
  template <class F>
  static FLASHOPTIM_HD IntOf<F> magnitude(F kept) {
    return to_bits(abs(kept));
  }
  static FLASHOPTIM_HD bool saturates(float) { return false; }
};

/// A signed slot of a given K; kIsSlow: whose scale is a power of two.
template <int kMantissaBits, bool kIsRelative, bool kIsSlow>
struct MuLawSlot : SignedSlot {
  using MuLaw = MuLawCodec<kMantissaBits>;
  static constexpr bool kSignedCodes = false, kUsesSmallest = false;
  template <class F>
  using Constants = Factor<F>;  ///< G, or 1 / G

  template <class F>
  static FLASHOPTIM_HD IntOf<F> header(IntOf<F> largest, IntOf<F>) {
    const IntOf<F> header = MuLaw::template header<F>(from_bits(largest));
    if constexpr (!kIsSlow) return header;
    return (header + splat_bits<F>(0xffu)) & splat_bits<F>(0xff00u);
  }
  template <class F>
  static FLASHOPTIM_HD Constants<F> decoding(IntOf<F> header) {
    return {MuLaw::template decoding_scale<kIsRelative, F>(header)};
  }
  template <class F>
  static FLASHOPTIM_HD Constants<F> encoding(IntOf<F> header, IntOf<F>) {
    return {MuLaw::template inverse_scale<F>(header)};
  }
  template <class F, class C>
  static FLASHOPTIM_HD F decode(IntOf<F> code, const C& constants) {
    return MuLaw::template decode<F>(code) * constants.factor;
  }
  template <class F, class C>
  static FLASHOPTIM_HD Coded<F> encode(F kept, const C& constants, IntOf<F> dither) {
    const IntOf<F> code = MuLaw::template encode<F>(kept, constants.factor, dither);
    return {code, code};
  }
};

/// A signed slot whose groups choose K.
struct MuLawGroupSlot : SignedSlot {
  using MuLaw = MuLawGroupCodec;
  static constexpr bool kSignedCodes = true, kUsesSmallest = true;
  template <class F>
  struct Constants {
    MuLaw::Group<F> group;
    F factor;  ///< G, or 1 / G

    static constexpr int kCount = MuLaw::Group<F>::kCount + 1;
    template <class Body>
    FLASHOPTIM_HD void each(const Body& body) {
      group.each(body);
      body(kCount - 1, factor);
    }
  };

  template <class F>
  static FLASHOPTIM_HD IntOf<F> header(IntOf<F> largest, IntOf<F> smallest_minus_one) {
    return MuLaw::header<F>(largest, smallest_minus_one);
  }
  template <class F>
  static FLASHOPTIM_HD Constants<F> decoding(IntOf<F> header) {
    return {MuLaw::group<F>(header), MuLaw::scale<F>(header)};
  }
  template <class F>
  static FLASHOPTIM_HD Constants<F> encoding(IntOf<F> header, IntOf<F>) {
    return {MuLaw::group<F>(header), MuLaw::inverse_scale<F>(header)};
  }
  template <class F, class C>
  static FLASHOPTIM_HD F decode(IntOf<F> code, const C& constants) {
    return MuLaw::decode<F>(code, constants.group) * constants.factor;
  }
  template <class F, class C>
  static FLASHOPTIM_HD Coded<F> encode(F kept, const C& constants, IntOf<F> dither) {
    const IntOf<F> code = MuLaw::encode<F>(kept, constants.factor, constants.group, dither);
    return {code, code};
  }
};

/// The codec of a slot by what its rule says of it.
template <bool kIsSigned, bool kIsRelative, int kMantissaBits, bool kIsSlow>
struct DefaultSlot {
  using type = MuLawSlot<kMantissaBits, kIsRelative, kIsSlow>;
};
template <>
struct DefaultSlot<true, false, 0, false> {
  using type = MuLawGroupSlot;
};
template <int kMantissaBits>
struct DefaultSlot<false, false, kMantissaBits, false> {
  using type = WindowSlot;
};

}  // namespace flashoptim::core
