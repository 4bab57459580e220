// What the codecs of slots share (slot_codecs.h).
#pragma once

#include "flashoptim/core/lanes.h"

namespace flashoptim::core {

/// 0 for NaN and infinity.
template <class F>
FLASHOPTIM_HD F finite_or_zero(F value) {
  return select(greater(splat<F>(0x1p127f * 2.0f), abs(value)), value, splat<F>(0.0f));
}

template <class F>
struct Coded {
  IntOf<F> code;    ///< in the low 8 bits
  IntOf<F> stored;  ///< of unsigned slots of the default codec the pattern of what the code is read as; else the code
};

/// A group's one constant.
template <class F>
struct Factor {
  F factor;

  static constexpr int kCount = 1;
  template <class Body>
  FLASHOPTIM_HD void each(const Body& body) {
    body(0, factor);
  }
};

}  // namespace flashoptim::core
