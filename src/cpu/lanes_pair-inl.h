// Two vectors as one lane type: every operation is issued for both halves in turn.
//
// A step is one long chain of dependent operations per vector. Interleaving two chains in program order keeps twice as
// many ready operations within the processor's scheduling window: measured on Zen 5, the weight store went from 18.5 to
// [see docs/benchmarks.md] cycles per 16 elements. The arithmetic is the half's, so the bits are too.
#pragma once

#include "src/cpu/lane_memory.h"

namespace flashoptim::core {

template <class F>
struct PairFloat {
  F lo, hi;
};
template <class F>
struct PairInt {
  IntOf<F> lo, hi;
};
template <class F>
struct PairMask {
  MaskOf<F> lo, hi;
};

template <class F>
struct LaneTraits<PairFloat<F>> {
  using Int = PairInt<F>;
  using Mask = PairMask<F>;
  static constexpr int kWidth = 2 * LaneTraits<F>::kWidth;
  static FLASHOPTIM_HD PairFloat<F> splat(float value) { return {core::splat<F>(value), core::splat<F>(value)}; }
  static FLASHOPTIM_HD PairInt<F> splat_bits(uint32_t bits) {
    return {core::splat_bits<F>(bits), core::splat_bits<F>(bits)};
  }
};

/// Half of a pair, and what a group's statistics are folded to before the lanes of all groups are reduced together.
template <class F>
struct Half<PairFloat<F>> {
  using type = F;
};

template <class F>
FLASHOPTIM_HD PairFloat<F> operator+(PairFloat<F> a, PairFloat<F> b) {
  return {a.lo + b.lo, a.hi + b.hi};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> operator-(PairFloat<F> a, PairFloat<F> b) {
  return {a.lo - b.lo, a.hi - b.hi};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> operator*(PairFloat<F> a, PairFloat<F> b) {
  return {a.lo * b.lo, a.hi * b.hi};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> operator/(PairFloat<F> a, PairFloat<F> b) {
  return {a.lo / b.lo, a.hi / b.hi};
}

template <class F>
FLASHOPTIM_HD PairInt<F> operator+(PairInt<F> a, PairInt<F> b) {
  return {a.lo + b.lo, a.hi + b.hi};
}

template <class F>
FLASHOPTIM_HD PairInt<F> operator-(PairInt<F> a, PairInt<F> b) {
  return {a.lo - b.lo, a.hi - b.hi};
}

template <class F>
FLASHOPTIM_HD PairInt<F> operator*(PairInt<F> a, PairInt<F> b) {
  return {a.lo * b.lo, a.hi * b.hi};
}

template <class F>
FLASHOPTIM_HD PairInt<F> operator&(PairInt<F> a, PairInt<F> b) {
  return {a.lo & b.lo, a.hi & b.hi};
}

template <class F>
FLASHOPTIM_HD PairInt<F> operator|(PairInt<F> a, PairInt<F> b) {
  return {a.lo | b.lo, a.hi | b.hi};
}

template <class F>
FLASHOPTIM_HD PairInt<F> operator^(PairInt<F> a, PairInt<F> b) {
  return {a.lo ^ b.lo, a.hi ^ b.hi};
}

template <class F>
FLASHOPTIM_HD PairInt<F> to_bits(PairFloat<F> a) {
  return {to_bits(a.lo), to_bits(a.hi)};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> from_bits(PairInt<F> a) {
  return {from_bits(a.lo), from_bits(a.hi)};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> select(PairMask<F> m, PairFloat<F> a, PairFloat<F> b) {
  return {select(m.lo, a.lo, b.lo), select(m.hi, a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> select(PairMask<F> m, PairInt<F> a, PairInt<F> b) {
  return {select(m.lo, a.lo, b.lo), select(m.hi, a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> max(PairFloat<F> a, PairFloat<F> b) {
  return {max(a.lo, b.lo), max(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> min(PairFloat<F> a, PairFloat<F> b) {
  return {min(a.lo, b.lo), min(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> abs(PairFloat<F> a) {
  return {abs(a.lo), abs(a.hi)};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> sqrt(PairFloat<F> a) {
  return {sqrt(a.lo), sqrt(a.hi)};
}

template <class F>
FLASHOPTIM_HD PairMask<F> int_greater(PairInt<F> a, PairInt<F> b) {
  return {int_greater(a.lo, b.lo), int_greater(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairMask<F> int_equal(PairInt<F> a, PairInt<F> b) {
  return {int_equal(a.lo, b.lo), int_equal(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairMask<F> unsigned_less(PairInt<F> a, PairInt<F> b) {
  return {unsigned_less(a.lo, b.lo), unsigned_less(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> int_max(PairInt<F> a, PairInt<F> b) {
  return {int_max(a.lo, b.lo), int_max(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> int_min(PairInt<F> a, PairInt<F> b) {
  return {int_min(a.lo, b.lo), int_min(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> unsigned_min(PairInt<F> a, PairInt<F> b) {
  return {unsigned_min(a.lo, b.lo), unsigned_min(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> shift_left_each(PairInt<F> a, PairInt<F> b) {
  return {shift_left_each(a.lo, b.lo), shift_left_each(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> shift_right_each(PairInt<F> a, PairInt<F> b) {
  return {shift_right_each(a.lo, b.lo), shift_right_each(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> shift_left(PairInt<F> a, uint32_t count) {
  return {shift_left(a.lo, count), shift_left(a.hi, count)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> shift_right(PairInt<F> a, uint32_t count) {
  return {shift_right(a.lo, count), shift_right(a.hi, count)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> shift_right_signed(PairInt<F> a, uint32_t count) {
  return {shift_right_signed(a.lo, count), shift_right_signed(a.hi, count)};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> int_to_float(PairInt<F> a) {
  return {int_to_float(a.lo), int_to_float(a.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> truncate_to_int(PairFloat<F> a) {
  return {truncate_to_int(a.lo), truncate_to_int(a.hi)};
}

template <class F>
FLASHOPTIM_HD PairMask<F> is_nan(PairFloat<F> a) {
  return {is_nan(a.lo), is_nan(a.hi)};
}

template <class F>
FLASHOPTIM_HD PairMask<F> equals(PairFloat<F> a, PairFloat<F> b) {
  return {equals(a.lo, b.lo), equals(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairMask<F> greater(PairFloat<F> a, PairFloat<F> b) {
  return {greater(a.lo, b.lo), greater(a.hi, b.hi)};
}

template <class F>
FLASHOPTIM_HD PairFloat<F> half_to_float(PairInt<F> a) {
  return {half_to_float(a.lo), half_to_float(a.hi)};
}

template <class F>
FLASHOPTIM_HD PairInt<F> float_to_half(PairFloat<F> a) {
  return {float_to_half(a.lo), float_to_half(a.hi)};
}

// Memory: the halves are neighbours.

template <class F>
FLASHOPTIM_HD void store_f32(float* p, PairFloat<F> a) {
  store_f32(p, a.lo);
  store_f32(p + LaneTraits<F>::kWidth, a.hi);
}

template <class F>
FLASHOPTIM_HD void store_u32(uint32_t* p, PairInt<F> a) {
  store_u32(p, a.lo);
  store_u32(p + LaneTraits<F>::kWidth, a.hi);
}

template <class F>
FLASHOPTIM_HD void store_8(uint8_t* p, PairInt<F> a) {
  store_8(p, a.lo);
  store_8(p + LaneTraits<F>::kWidth, a.hi);
}

template <class F>
FLASHOPTIM_HD void store_16(uint16_t* p, PairInt<F> a) {
  store_16(p, a.lo);
  store_16(p + LaneTraits<F>::kWidth, a.hi);
}

template <class F>
FLASHOPTIM_HD IntOf<F> fold_int_max(PairInt<F> a) {
  return int_max(a.lo, a.hi);
}
template <class F>
FLASHOPTIM_HD IntOf<F> fold_unsigned_min(PairInt<F> a) {
  return unsigned_min(a.lo, a.hi);
}

template <class F>
struct LaneMemory<PairFloat<F>> {
  static constexpr int kHalf = LaneTraits<F>::kWidth;
  static FLASHOPTIM_HD PairFloat<F> load_f32(const float* p) {
    return {core::load_f32<F>(p), core::load_f32<F>(p + kHalf)};
  }
  static FLASHOPTIM_HD PairInt<F> load_u32(const uint32_t* p) {
    return {core::load_u32<F>(p), core::load_u32<F>(p + kHalf)};
  }
  static FLASHOPTIM_HD PairInt<F> load_u8(const uint8_t* p) {
    return {core::load_u8<F>(p), core::load_u8<F>(p + kHalf)};
  }
  static FLASHOPTIM_HD PairInt<F> load_i8(const uint8_t* p) {
    return {core::load_i8<F>(p), core::load_i8<F>(p + kHalf)};
  }
  static FLASHOPTIM_HD PairInt<F> load_u16(const uint16_t* p) {
    return {core::load_u16<F>(p), core::load_u16<F>(p + kHalf)};
  }
  static FLASHOPTIM_HD PairInt<F> load_i16(const uint16_t* p) {
    return {core::load_i16<F>(p), core::load_i16<F>(p + kHalf)};
  }
  static FLASHOPTIM_HD PairInt<F> lane_multiples(uint32_t step) {
    const IntOf<F> lo = core::lane_multiples<F>(step);
    return {lo, lo + core::splat_bits<F>(step * static_cast<uint32_t>(kHalf))};
  }
};

}  // namespace flashoptim::core
