// One lane: the loops' memory operations for F = float. The arithmetic is core/lanes.h itself.
#pragma once

#include "flashoptim/core/lanes.h"

namespace flashoptim::core {

template <class F>
F load_f32(const float* p);
template <>
FLASHOPTIM_HD float load_f32<float>(const float* p) {
  float value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
FLASHOPTIM_HD void store_f32(float* p, float a) { std::memcpy(p, &a, sizeof a); }

template <class F>
IntOf<F> load_u32(const uint32_t* p);
template <>
FLASHOPTIM_HD uint32_t load_u32<float>(const uint32_t* p) {
  return *p;
}
FLASHOPTIM_HD void store_u32(uint32_t* p, uint32_t a) { *p = a; }

template <class F>
IntOf<F> load_u8(const void* p);
template <>
FLASHOPTIM_HD uint32_t load_u8<float>(const void* p) {
  return *static_cast<const uint8_t*>(p);
}
template <class F>
IntOf<F> load_i8(const void* p);
template <>
FLASHOPTIM_HD uint32_t load_i8<float>(const void* p) {
  return static_cast<uint32_t>(static_cast<int32_t>(*static_cast<const int8_t*>(p)));
}
template <class F>
IntOf<F> load_u16(const void* p);
template <>
FLASHOPTIM_HD uint32_t load_u16<float>(const void* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class F>
IntOf<F> load_i16(const void* p);
template <>
FLASHOPTIM_HD uint32_t load_i16<float>(const void* p) {
  int16_t value;
  std::memcpy(&value, p, sizeof value);
  return static_cast<uint32_t>(static_cast<int32_t>(value));
}
/// Low 8 or 16 bits.
FLASHOPTIM_HD void store_8(void* p, uint32_t a) { *static_cast<uint8_t*>(p) = static_cast<uint8_t>(a); }
FLASHOPTIM_HD void store_16(void* p, uint32_t a) {
  const uint16_t value = static_cast<uint16_t>(a);
  std::memcpy(p, &value, sizeof value);
}

/// j * step for lane j: the only lane is 0.
template <class F>
IntOf<F> lane_multiples(uint32_t step);
template <>
FLASHOPTIM_HD uint32_t lane_multiples<float>(uint32_t) {
  return 0u;
}

/// out[r] = max (min) over the lanes of row r, r = 0 ... 15: rows have one lane.
template <class F>
void max_of_rows(const uint32_t* rows, uint32_t* out);
template <>
FLASHOPTIM_HD void max_of_rows<float>(const uint32_t* rows, uint32_t* out) {
  std::memcpy(out, rows, 16 * sizeof *out);
}
template <class F>
void unsigned_min_of_rows(const uint32_t* rows, uint32_t* out);
template <>
FLASHOPTIM_HD void unsigned_min_of_rows<float>(const uint32_t* rows, uint32_t* out) {
  std::memcpy(out, rows, 16 * sizeof *out);
}

}  // namespace flashoptim::core
