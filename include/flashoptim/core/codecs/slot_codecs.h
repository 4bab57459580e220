// Which codec each slot of a rule has, which slot is relative to which, in which order they are coded and with which
// dither: said here once, for the CPU's loops, AVX-512's and CUDA's hot paths, CUDA's general kernels and telemetry.
//
// A slot's codec:
//
//   struct SlotCodec {
//     static constexpr bool kSignedCodes;     // codes are read with their sign
//     static constexpr bool kUsesSmallest;    // header() needs the smallest magnitude, too
//     static constexpr bool kIsDithered;
//     static constexpr bool kDropsNonfinite;  // kept() does nothing else
//     template <class F> static F kept(F state);             // what is coded, and what statistics are taken of
//     template <class F> static IntOf<F> magnitude(F kept);  // its pattern, whose extremes over the group are taken
//     template <class F> static IntOf<F> header(IntOf<F> largest, IntOf<F> smallest_minus_one);
//     template <class F> struct Constants;                   // of a group, from its header; each(body) visits them
//     template <class F> static Constants<F> decoding(IntOf<F> header);
//     template <class F> static Constants<F> encoding(IntOf<F> header, IntOf<F> largest);
//     template <class F> static F decode(IntOf<F> code, const Constants<F>&);
//     template <class F> static Coded<F> encode(F kept, const Constants<F>&, IntOf<F> dither);
//     static bool saturates(float state);                    // a finite state above all codes
//   };
//
// smallest_minus_one is the least of magnitude - 1 as unsigned numbers, so that zeros are no small ones. In header(),
// decoding() and encoding() a lane is a group. A relative slot is decoded as decode(code) times root_scale() of its
// base as decoded, and what is kept of it is relative_to_root() of its base as stored (default_codec.h).
#pragma once

#include <utility>

#include "flashoptim/core/codecs/default_codec.h"
#include "flashoptim/core/codecs/paper_codec.h"
#include "flashoptim/core/dither.h"
#include "flashoptim/core/optimizers/rule.h"

namespace flashoptim::core {

/// A slot's number as a type.
template <int k>
struct SlotIndex {
  static constexpr int value = k;
};

/// `kCodec` is kPaper or kDefault.
template <Rule R, StateCodec kCodec>
struct SlotCodecs {
  static constexpr int kCount = R::kSlotCount;

  static FLASHOPTIM_HD constexpr bool is_signed(int k) { return R::kSlots[k].kind == StateKind::kSigned; }
  /// The slot that slot k is stored relative to the root of, or kNoSlot.
  static FLASHOPTIM_HD constexpr int base_of(int k) {
    return kCodec == StateCodec::kDefault ? R::kSlots[k].relative_to : kNoSlot;
  }
  static FLASHOPTIM_HD constexpr bool is_relative(int k) { return base_of(k) != kNoSlot; }
  static FLASHOPTIM_HD constexpr bool is_base(int k) {
    for (int other = 0; other < kCount; ++other) {
      if (base_of(other) == k) return true;
    }
    return false;
  }
  static FLASHOPTIM_HD constexpr bool has_bases() {
    for (int k = 0; k < kCount; ++k) {
      if (is_base(k)) return true;
    }
    return false;
  }
  static constexpr bool kHasBases = has_bases();

  /// The i-th slot to be coded: bases before the others.
  static FLASHOPTIM_HD constexpr int in_order(int i) {
    for (const bool bases : {true, false}) {
      for (int k = 0; k < kCount; ++k) {
        if (is_base(k) == bases && i-- == 0) return k;
      }
    }
    return kNoSlot;
  }

  /// Where slot k's dither comes from: unsigned slots kVariance; of signed ones the first kMomentum, the second
  /// kSecondMomentum, so that no two of an element round together.
  static FLASHOPTIM_HD constexpr DitherStream stream(int k) {
    if (!is_signed(k)) return DitherStream::kVariance;
    for (int other = 0; other < k; ++other) {
      if (is_signed(other)) return DitherStream::kSecondMomentum;
    }
    return DitherStream::kMomentum;
  }
  static FLASHOPTIM_HD constexpr bool are_streams_distinct() {
    for (int a = 0; a < kCount; ++a) {
      for (int b = 0; b < a; ++b) {
        if (stream(a) == stream(b)) return false;
      }
    }
    return true;
  }
  static_assert(are_streams_distinct(), "a third signed or a second unsigned slot needs a stream of its own");

 private:
  template <int k, StateCodec>
  struct Choose {
    using type = PaperSlot<is_signed(k)>;
  };
  template <int k>
  struct Choose<k, StateCodec::kDefault> {
    using type =
        typename DefaultSlot<is_signed(k), is_relative(k), R::kSlots[k].mantissa_bits, R::kSlots[k].is_slow>::type;
  };

  template <class Body, int... kPlaces>
  static FLASHOPTIM_HD void visit(const Body& body, std::integer_sequence<int, kPlaces...>) {
    (body(SlotIndex<in_order(kPlaces)>{}), ...);
  }

 public:
  /// Slot k's codec.
  template <int k>
  using Of = typename Choose<k, kCodec>::type;

  /// body(SlotIndex<k>) for every slot, in the order in which they are coded.
  template <class Body>
  static FLASHOPTIM_HD void for_each(const Body& body) {
    visit(body, std::make_integer_sequence<int, kCount>{});
  }
};

/// The slots of a rule that hot paths are written for: one momentum, stored relative to one variance.
template <Rule R>
struct MomentumOverVariance {
  using Slots = SlotCodecs<R, StateCodec::kDefault>;
  static constexpr int kVariance = Slots::kCount == 2 ? Slots::in_order(0) : kNoSlot;
  static constexpr int kMomentum = Slots::kCount == 2 ? Slots::in_order(1) : kNoSlot;
  static FLASHOPTIM_HD constexpr bool fits() {
    if constexpr (Slots::kCount != 2)
      return false;
    else
      return Slots::base_of(kMomentum) == kVariance;
  }
  static constexpr bool kFits = fits();
};

}  // namespace flashoptim::core
