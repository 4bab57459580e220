// The states of N elements of a group, held by one caller (all 32 by the CPU's telemetry, a few by each thread of a
// device), to and from what is stored. The caller joins the group's extremes by its `Group`.
#pragma once

#include "flashoptim/core/codecs/slot_codecs.h"
#include "flashoptim/core/dither.h"

namespace flashoptim::core {

/// Where N elements of a group get their dither from.
struct GroupDither {
  DitherKey key;
  uint32_t group_hash;
  int lane;  ///< the first element's place in its group

  template <DitherStream kStream>
  FLASHOPTIM_HD uint32_t start() const {
    return dither_group_start<kStream, float>(key, group_hash) + static_cast<uint32_t>(lane) * kDitherLaneStep<kStream>;
  }
  template <DitherStream kStream>
  static FLASHOPTIM_HD uint32_t word(uint32_t start, int i) {
    return start + static_cast<uint32_t>(i) * kDitherLaneStep<kStream>;
  }
};

/// Half a step everywhere instead: rounding to nearest.
struct NearestDither {
  template <DitherStream kStream>
  FLASHOPTIM_HD uint32_t start() const {
    return 0x80000000u;
  }
  template <DitherStream kStream>
  static FLASHOPTIM_HD uint32_t word(uint32_t start, int) {
    return start;
  }
};

/// A group all of whose elements one caller has.
struct WholeGroup {
  static FLASHOPTIM_HD uint32_t largest(uint32_t a) { return a; }
  static FLASHOPTIM_HD uint32_t smallest(uint32_t a) { return a; }
};

/// A lane's number, for lanes of one element.
FLASHOPTIM_HD float lane_value(float v) { return v; }

/// Lane: the lane type that decode() and encode() of the codec compute in. Stored: header[k], and
///   template <int k, bool kSigned> uint32_t code(int i) const;         element i of slot k
///   template <int k> void set_codes(const uint32_t (&codes)[N]);       by their low 8 bits
template <Rule R, StateCodec kCodec, int N, class Lane = float>
struct GroupStates {
  using Slots = SlotCodecs<R, kCodec>;
  using Values = float[N][kSlotArray<R>];

  template <class Stored>
  static FLASHOPTIM_HD void decode(const Stored& stored, Values& s) {
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      using Slot = typename Slots::template Of<k>;
      const auto constants = Slot::template decoding<float>(stored.header[k]);
      FLASHOPTIM_UNROLL
      for (int i = 0; i < N; ++i) {
        s[i][k] = lane_value(Slot::template decode<Lane>(stored.template code<k, Slot::kSignedCodes>(i), constants));
        if constexpr (Slots::is_relative(k)) s[i][k] = s[i][k] * root_scale<float>(to_bits(s[i][Slots::base_of(k)]));
      }
    });
  }

  /// Leaves in s what was coded.
  template <class Group, class Dither, class Stored>
  static FLASHOPTIM_HD void encode(Values& s, const Group& group, const Dither& dither, Stored& stored) {
    Slots::for_each([&](auto index) { encode_slot<decltype(index)::value>(s, group, dither, stored); });
  }

 private:
  template <int k, class Group, class Dither, class Stored>
  static FLASHOPTIM_HD void encode_slot(Values& s, const Group& group, const Dither& dither, Stored& stored) {
    using Slot = typename Slots::template Of<k>;
    constexpr DitherStream kStream = Slots::stream(k);
    uint32_t largest = 0u, smallest = 0xffffffffu;
    FLASHOPTIM_UNROLL
    for (int i = 0; i < N; ++i) {
      // What is kept of a relative slot its base has left here.
      if constexpr (!Slots::is_relative(k)) s[i][k] = lane_value(Slot::template kept<Lane>(s[i][k]));
      const uint32_t magnitude = Slot::template magnitude<float>(s[i][k]);
      largest = int_max(largest, magnitude);
      if constexpr (Slot::kUsesSmallest) smallest = unsigned_min(smallest, magnitude - 1u);
    }
    largest = group.largest(largest);
    if constexpr (Slot::kUsesSmallest) smallest = group.smallest(smallest);
    stored.header[k] = Slot::template header<float>(largest, smallest);
    const auto constants = Slot::template encoding<float>(stored.header[k], largest);
    uint32_t start = 0u;
    if constexpr (Slot::kIsDithered) start = dither.template start<kStream>();
    uint32_t codes[N];
    FLASHOPTIM_UNROLL
    for (int i = 0; i < N; ++i) {
      const auto coded = Slot::template encode<Lane>(s[i][k], constants, Dither::template word<kStream>(start, i));
      codes[i] = coded.code;
      if constexpr (Slots::is_base(k)) make_relative<k>(s[i], coded.stored);
    }
    stored.template set_codes<k>(codes);
  }

  template <int kBase>
  static FLASHOPTIM_HD void make_relative(float (&s)[kSlotArray<R>], uint32_t stored) {
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (Slots::base_of(k) == kBase) s[k] = relative_to_root(s[k], stored);
    });
  }
};

/// fp32 states have neither headers nor codes: a code is the pattern.
template <Rule R, int N, class Lane>
struct GroupStates<R, StateCodec::kFloat32, N, Lane> {
  using Values = float[N][kSlotArray<R>];

  template <class Stored>
  static FLASHOPTIM_HD void decode(const Stored& stored, Values& s) {
    decode_slots(stored, s, std::make_integer_sequence<int, R::kSlotCount>{});
  }
  template <class Group, class Dither, class Stored>
  static FLASHOPTIM_HD void encode(Values& s, const Group&, const Dither&, Stored& stored) {
    encode_slots(s, stored, std::make_integer_sequence<int, R::kSlotCount>{});
  }

 private:
  template <class Stored, int... kSlots>
  static FLASHOPTIM_HD void decode_slots(const Stored& stored, Values& s, std::integer_sequence<int, kSlots...>) {
    FLASHOPTIM_UNROLL
    for (int i = 0; i < N; ++i) ((s[i][kSlots] = from_bits(stored.template code<kSlots, false>(i))), ...);
  }
  template <class Stored, int... kSlots>
  static FLASHOPTIM_HD void encode_slots(const Values& s, Stored& stored, std::integer_sequence<int, kSlots...>) {
    (encode_slot<kSlots>(s, stored), ...);
  }
  template <int k, class Stored>
  static FLASHOPTIM_HD void encode_slot(const Values& s, Stored& stored) {
    uint32_t patterns[N];
    FLASHOPTIM_UNROLL
    for (int i = 0; i < N; ++i) patterns[i] = to_bits(canonical_nan(s[i][k]));
    stored.template set_codes<k>(patterns);
  }
};

}  // namespace flashoptim::core
