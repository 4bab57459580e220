// Loads, and what else the CPU loops ask of a lane type: LaneMemory<F> is specialised beside each lane type.
#pragma once

#include "flashoptim/core/lanes.h"

namespace flashoptim::core {

template <class F>
struct LaneMemory;

template <class F>
FLASHOPTIM_HD F load_f32(const float* p) {
  return LaneMemory<F>::load_f32(p);
}
template <class F>
FLASHOPTIM_HD IntOf<F> load_u32(const uint32_t* p) {
  return LaneMemory<F>::load_u32(p);
}
/// 8- or 16-bit integers, extended with zeros (u) or their sign (i).
template <class F>
FLASHOPTIM_HD IntOf<F> load_u8(const uint8_t* p) {
  return LaneMemory<F>::load_u8(p);
}
template <class F>
FLASHOPTIM_HD IntOf<F> load_i8(const uint8_t* p) {
  return LaneMemory<F>::load_i8(p);
}
template <class F>
FLASHOPTIM_HD IntOf<F> load_u16(const uint16_t* p) {
  return LaneMemory<F>::load_u16(p);
}
template <class F>
FLASHOPTIM_HD IntOf<F> load_i16(const uint16_t* p) {
  return LaneMemory<F>::load_i16(p);
}
/// j * step for lane j, modulo 2^32.
template <class F>
FLASHOPTIM_HD IntOf<F> lane_multiples(uint32_t step) {
  return LaneMemory<F>::lane_multiples(step);
}

/// The lane type in which per-group numbers are handled: F itself, or half of a pair.
template <class F>
struct Half {
  using type = F;
};
template <class I>
FLASHOPTIM_HD I fold_int_max(I a) {
  return a;
}
template <class I>
FLASHOPTIM_HD I fold_unsigned_min(I a) {
  return a;
}

}  // namespace flashoptim::core
