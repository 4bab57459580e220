// The states of one thread's 8 elements of a group, in stored form: what core/codecs/group_states.h reads and writes.
#pragma once

#include "flashoptim/core/codecs/group_states.h"
#include "flashoptim/core/optimizer_list.h"
#include "src/cuda/lane.cuh"
#include "src/cuda/memory-inl.cuh"

namespace flashoptim::cuda {

using F = float;

/// Bytes of one state element.
template <StateCodec kCodec>
inline constexpr int kStateBytes = kCodec == StateCodec::kFloat32 ? 4 : 1;

/// A group's stored states, as one thread sees them.
template <core::Rule Rule, StateCodec kCodec>
struct StoredStates {
  static constexpr int kBytes = kStateBytes<kCodec>;
  Words<kBytes> words[core::kSlotArray<Rule>];
  uint32_t header[core::kSlotArray<Rule>];

  template <int k, bool kSigned>
  FLASHOPTIM_HD uint32_t code(int i) const {
    if constexpr (kSigned) return signed_element(words[k], i);
    return element(words[k], i);
  }
  template <int k>
  FLASHOPTIM_HD void set_codes(const uint32_t (&codes)[kUnit]) {
    words[k] = pack<kBytes>(codes);
  }
};

/// The group's extremes, from the quad of threads that holds it.
struct QuadGroup {
  static FLASHOPTIM_HD uint32_t largest(uint32_t a) {
#if defined(__CUDA_ARCH__)
    return group_int_max(a);
#else
    return a;
#endif
  }
  static FLASHOPTIM_HD uint32_t smallest(uint32_t a) {
#if defined(__CUDA_ARCH__)
    return group_unsigned_min(a);
#else
    return a;
#endif
  }
};

template <core::Rule Rule>
using States = F[kUnit][core::kSlotArray<Rule>];

/// The paper's formulas divide and take roots; the others' are quickest as plain numbers.
template <StateCodec kCodec>
using CodecLane = std::conditional_t<kCodec == StateCodec::kPaper, ExactLane, F>;
template <core::Rule Rule, StateCodec kCodec>
using Codec = core::GroupStates<Rule, kCodec, kUnit, CodecLane<kCodec>>;

}  // namespace flashoptim::cuda
