// One lane: the loops' memory operations for F = float. The arithmetic is core/lanes.h itself.
#pragma once

#include "src/cpu/lane_memory.h"

namespace flashoptim::core {

// Memory, and what only the loops need.

FLASHOPTIM_HD void store_f32(float* p, float a) { std::memcpy(p, &a, sizeof a); }

FLASHOPTIM_HD void store_u32(uint32_t* p, uint32_t a) { *p = a; }

/// Low 8 or 16 bits.
FLASHOPTIM_HD void store_8(uint8_t* p, uint32_t a) { *p = static_cast<uint8_t>(a); }

FLASHOPTIM_HD void store_16(uint16_t* p, uint32_t a) {
  const uint16_t value = static_cast<uint16_t>(a);
  std::memcpy(p, &value, sizeof value);
}

template <>
struct LaneMemory<float> {
  static FLASHOPTIM_HD float load_f32(const float* p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }

  static FLASHOPTIM_HD uint32_t load_u32(const uint32_t* p) { return *p; }

  static FLASHOPTIM_HD uint32_t load_u8(const uint8_t* p) { return *p; }

  static FLASHOPTIM_HD uint32_t load_i8(const uint8_t* p) {
    return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(*p)));
  }

  static FLASHOPTIM_HD uint32_t load_u16(const uint16_t* p) {
    uint16_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }

  static FLASHOPTIM_HD uint32_t load_i16(const uint16_t* p) {
    int16_t value;
    std::memcpy(&value, p, sizeof value);
    return static_cast<uint32_t>(static_cast<int32_t>(value));
  }

  /// j * step for lane j: the only lane is 0.
  static FLASHOPTIM_HD uint32_t lane_multiples(uint32_t) { return 0u; }

  /// out[r] = max (min) over the lanes of row r, r = 0 ... 15: rows have one lane.
  static FLASHOPTIM_HD void max_of_rows(const uint32_t* rows, uint32_t* out) {
    std::memcpy(out, rows, 16 * sizeof *out);
  }

  static FLASHOPTIM_HD void unsigned_min_of_rows(const uint32_t* rows, uint32_t* out) {
    std::memcpy(out, rows, 16 * sizeof *out);
  }
};

}  // namespace flashoptim::core
