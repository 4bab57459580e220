// The loops over states, over F, an instruction set's lane type: a rule over decoded states, and what is stored of
// them.
#pragma once

#include <tuple>

#include "flashoptim/core/codecs/slot_codecs.h"
#include "src/cpu/loop_pieces-inl.h"

namespace flashoptim::cpu {

/// What every rule's loops are made of, and the loops over fp32 states.
template <class F>
struct PlainStateLoops : LoopPieces<F> {
  using Pieces = LoopPieces<F>;
  using Pieces::ask_ahead;
  static constexpr int kGroup = Pieces::kGroup, kWidth = Pieces::kWidth;
  using typename Pieces::H;
  using typename Pieces::HI;
  using typename Pieces::I;

  /// The body of a step: decoded states in and out, delta to the block. Holds its own copy of the hyperparameters, so
  /// that the compiler can keep them in registers across stores.
  template <core::Rule Rule>
  static FLASHOPTIM_HD auto update_body(Block& b) {
    return [&b, h = *static_cast<const typename Rule::Hyper*>(b.hyper) ](int i, F(&s)[core::kSlotArray<Rule>])
        __attribute__((always_inline)) {
      const F delta = Rule::update(core::load_f32<F>(b.weight + i), core::load_f32<F>(b.gradient_f32 + i), s, h);
      core::store_f32(b.delta + i, delta);
    };
  }
  /// Bodies of decode and encode: states to and from the block's fp32 arrays.
  template <core::Rule Rule>
  static auto keep_decoded(Block& b) {
    return [&b](int i, F(&s)[core::kSlotArray<Rule>]) {
      for (int k = 0; k < Rule::kSlotCount; ++k) core::store_f32(b.state_f32[k] + i, s[k]);
    };
  }
  template <core::Rule Rule>
  static auto take_decoded(Block& b) {
    return [&b](int i, F(&s)[core::kSlotArray<Rule>]) {
      for (int k = 0; k < Rule::kSlotCount; ++k) s[k] = core::load_f32<F>(b.state_f32[k] + i);
    };
  }

  // ---- fp32 states ----------------------------------------------------------------------------------------------

  template <core::Rule Rule>
  struct Float32States {
    static constexpr int kSlots = core::kSlotArray<Rule>;

    static FLASHOPTIM_HD void load(const Block& b, int i, F (&s)[kSlots]) {
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        ask_ahead(b, static_cast<const float*>(b.states[k]), i);
        s[k] = core::load_f32<F>(static_cast<const float*>(b.states[k]) + i);
      }
    }
    static FLASHOPTIM_HD void store(Block& b, int i, const F (&s)[kSlots]) {
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        core::store_f32(static_cast<float*>(b.states[k]) + i, core::canonical_nan(s[k]));
      }
    }
    static void update(Block& b) {
      const auto body = update_body<Rule>(b);
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[kSlots];
        load(b, i, s);
        body(i, s);
        store(b, i, s);
      }
    }
    static void decode(Block& b) {
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[kSlots];
        load(b, i, s);
        for (int k = 0; k < Rule::kSlotCount; ++k) core::store_f32(b.state_f32[k] + i, s[k]);
      }
    }
    static void encode(Block& b) {
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[kSlots];
        for (int k = 0; k < Rule::kSlotCount; ++k) s[k] = core::load_f32<F>(b.state_f32[k] + i);
        store(b, i, s);
      }
    }
  };

  // ---- a group's constants in the block -------------------------------------------------------------------------

  struct StoreConstant {
    uint32_t* at;
    FLASHOPTIM_HD void operator()(int n, HI value) const { core::store_u32(at + n * kBlockGroups, value); }
    FLASHOPTIM_HD void operator()(int n, H value) const { (*this)(n, core::to_bits(value)); }
  };
  /// One group's, in every lane.
  struct SpreadConstant {
    const uint32_t* at;
    FLASHOPTIM_HD void operator()(int n, I& value) const { value = core::splat_bits<F>(at[n * kBlockGroups]); }
    FLASHOPTIM_HD void operator()(int n, F& value) const {
      value = core::from_bits(core::splat_bits<F>(at[n * kBlockGroups]));
    }
  };
  template <class Constants>
  static FLASHOPTIM_HD void store_constants(Block& b, int slot, int group, Constants constants) {
    static_assert(Constants::kCount <= kGroupConstants);
    constants.each(StoreConstant{b.constants[slot][0] + group});
  }
  template <class Constants>
  static FLASHOPTIM_HD Constants constants_of(const Block& b, int slot, int group) {
    Constants constants;
    constants.each(SpreadConstant{b.constants[slot][0] + group});
    return constants;
  }
};

/// The loops over states in codes, and the table of all.
template <class F>
struct StateLoops : PlainStateLoops<F> {
  using Plain = PlainStateLoops<F>;
  using Pieces = LoopPieces<F>;
  using Pieces::ask_ahead;
  using Pieces::codes;
  using Pieces::for_each_header;
  using Plain::store_constants;
  static constexpr int kGroup = Pieces::kGroup, kVectors = Pieces::kVectors, kWidth = Pieces::kWidth;
  using typename Pieces::GroupVectors;
  using typename Pieces::H;
  using typename Pieces::HI;
  using typename Pieces::I;
  using typename Pieces::PerGroup;

  /// Which stage codes what: bases where there are any, and the others behind them; all, where there are none.
  enum class Coding { kBases, kOthers, kAll };

  template <core::Rule Rule, StateCodec kCodec>
  struct CodedStates {
    using Slots = core::SlotCodecs<Rule, kCodec>;
    static constexpr int kSlots = core::kSlotArray<Rule>;
    template <int k>
    using Slot = typename Slots::template Of<k>;
    /// What is not finite is only looked for where a group's largest shows it.
    template <int k>
    static constexpr bool kDropsLater = Slot<k>::kDropsNonfinite && !Slots::is_relative(k);

    struct Extremes {
      GroupVectors largest, smallest;
    };

    template <int k>
    static FLASHOPTIM_HD auto group_constants(const Block& b, int group) {
      return Plain::template constants_of<typename Slot<k>::template Constants<F>>(b, k, group);
    }

    template <int... k>
    static FLASHOPTIM_HD auto all_constants(const Block& b, [[maybe_unused]] int group,
                                            std::integer_sequence<int, k...>) {
      return std::tuple(group_constants<k>(b, group)...);
    }

    template <int k>
    static FLASHOPTIM_HD void open(Block& b) {
      const PerGroup headers = Pieces::load_headers(b, k);
      for_each_header(
          [&](int group) { store_constants(b, k, group, Slot<k>::template decoding<H>(headers.load(group))); });
    }

    template <int k, class Constants>
    static FLASHOPTIM_HD void decode_slot(const Block& b, int i, const Constants& constants, F (&s)[kSlots]) {
      if constexpr (Slot<k>::kSignedCodes) {
        s[k] = Slot<k>::template decode<F>(core::load_i8<F>(codes(b, k) + i), constants);
      } else {
        s[k] = Slot<k>::template decode<F>(core::load_u8<F>(codes(b, k) + i), constants);
      }
      if constexpr (Slots::is_relative(k)) s[k] = s[k] * core::root_scale<F>(core::to_bits(s[Slots::base_of(k)]));
    }

    /// Keeps what is coded of a slot, and takes it into its group's extremes.
    template <int k>
    static FLASHOPTIM_HD void keep(Block& b, int i, F kept, I& largest, I& smallest) {
      core::store_f32(b.state_f32[k] + i, kept);
      const I magnitude = Slot<k>::magnitude(kept);
      largest = core::int_max(largest, magnitude);
      if constexpr (Slot<k>::kUsesSmallest) {
        smallest = core::unsigned_min(smallest, magnitude - core::splat_bits<F>(1u));
      }
    }

    /// Not finite becomes 0, and the extremes are taken again.
    template <int k>
    [[gnu::cold, gnu::noinline]] static void drop_nonfinite(Block& b, Extremes& extremes) {
      for (int group = 0; group < b.groups; ++group) {
        I high = core::splat_bits<F>(0u), low = core::splat_bits<F>(0xffffffffu);
        for (int i = group * kGroup; i < (group + 1) * kGroup; i += kWidth) {
          keep<k>(b, i, Slot<k>::kept(core::load_f32<F>(b.state_f32[k] + i)), high, low);
        }
        store_extremes<k>(extremes, group, high, low);
      }
    }

    template <int k>
    static FLASHOPTIM_HD void store_extremes(Extremes& extremes, int group, I largest, I smallest) {
      extremes.largest.store(group, core::fold_int_max(largest));
      if constexpr (Slot<k>::kUsesSmallest) extremes.smallest.store(group, core::fold_unsigned_min(smallest));
    }

    template <int k>
    static FLASHOPTIM_HD void make_header(Block& b, Extremes& extremes) {
      PerGroup high, low, header;
      extremes.largest.maxima(high);
      if constexpr (kDropsLater<k>) {
        // Patterns order as magnitudes, infinity and NaN last.
        if (*std::max_element(std::begin(high.bits), std::end(high.bits)) >= 0x7f800000u) {
          drop_nonfinite<k>(b, extremes);
          extremes.largest.maxima(high);
        }
      }
      if constexpr (Slot<k>::kUsesSmallest) extremes.smallest.unsigned_minima(low);
      for_each_header([&](int group) {
        const HI largest = high.load(group);
        const HI smallest = Slot<k>::kUsesSmallest ? low.load(group) : largest;
        const HI h = Slot<k>::template header<H>(largest, smallest);
        header.store(group, h);
        store_constants(b, k, group, Slot<k>::template encoding<H>(h, largest));
      });
      Pieces::store_headers(b, k, header);
    }

    /// body(i, states) over decoded states; then, if kEncode, headers of what it left, but for relative slots.
    template <bool kDecode, bool kEncode, class Body>
    static FLASHOPTIM_HD void run(Block& b, Body body) {
      if constexpr (kDecode) Slots::for_each([&](auto index) { open<decltype(index)::value>(b); });
      Extremes extremes[kSlots];
      if constexpr (kEncode) {
        for (Extremes& e : extremes) {
          e.largest.pad(b.groups);
          e.smallest.pad(b.groups);
        }
      }
      for (int group = 0; group < b.groups; ++group) {
        I largest[kSlots], smallest[kSlots];
        for (int k = 0; k < kSlots; ++k) {
          largest[k] = core::splat_bits<F>(0u);
          smallest[k] = core::splat_bits<F>(0xffffffffu);
        }
        const auto constants = all_constants(b, group, std::make_integer_sequence<int, Rule::kSlotCount>{});
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const int i = group * kGroup + j * kWidth;
          F s[kSlots];
          if constexpr (kDecode) {
            for (int k = 0; k < Rule::kSlotCount; ++k) ask_ahead(b, codes(b, k), i);
            Slots::for_each([&](auto index) __attribute__((always_inline)) {
              constexpr int k = decltype(index)::value;
              decode_slot<k>(b, i, std::get<k>(constants), s);
            });
          }
          body(i, s);
          if constexpr (kEncode) {
            Slots::for_each([&](auto index) __attribute__((always_inline)) {
              constexpr int k = decltype(index)::value;
              if constexpr (Slots::is_relative(k)) {
                core::store_f32(b.state_f32[k] + i, s[k]);
              } else {
                keep<k>(b, i, kDropsLater<k> ? s[k] : Slot<k>::kept(s[k]), largest[k], smallest[k]);
              }
            });
          }
        }
        if constexpr (kEncode) {
          Slots::for_each([&](auto index) __attribute__((always_inline)) {
            constexpr int k = decltype(index)::value;
            if constexpr (!Slots::is_relative(k)) store_extremes<k>(extremes[k], group, largest[k], smallest[k]);
          });
        }
      }
      if constexpr (kEncode) {
        Slots::for_each([&](auto index) {
          constexpr int k = decltype(index)::value;
          if constexpr (!Slots::is_relative(k)) make_header<k>(b, extremes[k]);
        });
      }
    }

    /// Half a step everywhere instead of dither: rounding to nearest.
    template <bool kDithered>
    static FLASHOPTIM_HD I rounding_word(I dither) {
      return kDithered ? dither : core::splat_bits<F>(0x80000000u);
    }

    /// Codes of a slot that no other is relative to.
    template <int k, bool kDithered>
    static FLASHOPTIM_HD void encode_slot(Block& b) {
      const auto encode = [&b](int i, const auto& constants, I word) __attribute__((always_inline)) {
        const F kept = core::load_f32<F>(b.state_f32[k] + i);
        core::store_8(codes(b, k) + i, Slot<k>::template encode<F>(kept, constants, word).code);
      };
      if constexpr (Slot<k>::kIsDithered) {
        Pieces::template for_each_dithered<Slots::stream(k)>(
            b, 0, b.groups, [&](int i, int group, I dither) __attribute__((always_inline)) {
              encode(i, group_constants<k>(b, group), rounding_word<kDithered>(dither));
            });
      } else {
        for (int group = 0; group < b.groups; ++group) {
          const auto constants = group_constants<k>(b, group);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) encode(group * kGroup + j * kWidth, constants, core::splat_bits<F>(0u));
        }
      }
    }

    /// Codes of a base; leaves what is relative to it in state_f32, and its headers.
    template <int kBase, bool kDithered>
    static FLASHOPTIM_HD void encode_base(Block& b) {
      Extremes extremes[kSlots];
      for (Extremes& e : extremes) e.largest.pad(b.groups);
      I largest[kSlots];
      for (int k = 0; k < kSlots; ++k) largest[k] = core::splat_bits<F>(0u);
      Pieces::template for_each_dithered<Slots::stream(kBase)>(
          b, 0, b.groups, [&](int i, int group, I dither) __attribute__((always_inline)) {
            if (i % kGroup == 0) {
              for (int k = 0; k < kSlots; ++k) largest[k] = core::splat_bits<F>(0u);
            }
            const F kept = core::load_f32<F>(b.state_f32[kBase] + i);
            const auto v = Slot<kBase>::template encode<F>(kept, group_constants<kBase>(b, group),
                                                           rounding_word<kDithered>(dither));
            core::store_8(codes(b, kBase) + i, v.code);
            Slots::for_each([&](auto index) __attribute__((always_inline)) {
              constexpr int k = decltype(index)::value;
              if constexpr (Slots::base_of(k) == kBase) {
                static_assert(!Slot<k>::kUsesSmallest);
                const F x = core::relative_to_root(core::load_f32<F>(b.state_f32[k] + i), v.stored);
                keep<k>(b, i, x, largest[k], largest[k]);
                if (i % kGroup == kGroup - kWidth) extremes[k].largest.store(group, core::fold_int_max(largest[k]));
              }
            });
          });
      Slots::for_each([&](auto index) {
        constexpr int k = decltype(index)::value;
        if constexpr (Slots::base_of(k) == kBase) make_header<k>(b, extremes[k]);
      });
    }

    template <Coding kWhich, bool kDithered>
    static void encode_slots(Block& b) {
      Slots::for_each([&](auto index) {
        constexpr int k = decltype(index)::value;
        if constexpr (Slots::is_base(k)) {
          if constexpr (kWhich != Coding::kOthers) encode_base<k, kDithered>(b);
        } else {
          if constexpr (kWhich != Coding::kBases) encode_slot<k, kDithered>(b);
        }
      });
    }

    static void update(Block& b) { run<true, true>(b, Plain::template update_body<Rule>(b)); }
    static void decode(Block& b) { run<true, false>(b, Plain::template keep_decoded<Rule>(b)); }
    static void encode(Block& b) {
      run<false, true>(b, Plain::template take_decoded<Rule>(b));
      encode_slots<Coding::kAll, false>(b);
    }

    static constexpr void add(KernelTable& t, RuleKind kind) {
      const int r = static_cast<int>(kind), c = static_cast<int>(kCodec);
      t.rule[r][c][0] = update;
      if constexpr (Slots::kHasBases) {
        t.rule[r][c][1] = encode_slots<Coding::kBases, true>;
        t.rule[r][c][2] = encode_slots<Coding::kOthers, true>;
      } else if constexpr (Rule::kSlotCount > 0) {
        t.rule[r][c][1] = encode_slots<Coding::kAll, true>;
      }
      t.decode[r][c] = decode;
      t.encode[r][c] = encode;
    }
  };

  // ---- the table ------------------------------------------------------------------------------------------------

  template <core::Rule Rule>
  static constexpr void add_rule(KernelTable& t, RuleKind kind) {
    static_assert(sizeof(typename Rule::Hyper) <= sizeof(HyperStorage));
    const int r = static_cast<int>(kind), f32 = static_cast<int>(StateCodec::kFloat32);
    t.rule[r][f32][0] = Plain::template Float32States<Rule>::update;
    t.decode[r][f32] = Plain::template Float32States<Rule>::decode;
    t.encode[r][f32] = Plain::template Float32States<Rule>::encode;
    CodedStates<Rule, StateCodec::kPaper>::add(t, kind);
    CodedStates<Rule, StateCodec::kDefault>::add(t, kind);
  }
};

}  // namespace flashoptim::cpu
