// The loops, compiled once per instruction set: F is that set's lane type. Every formula is core/'s.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "flashoptim/core/default_codec.h"
#include "flashoptim/core/optimizer_list.h"
#include "flashoptim/core/paper_codec.h"
#include "flashoptim/core/weight_split.h"
#include "src/cpu/kernels.h"

namespace flashoptim::cpu {

template <class F>
struct Loops {
  using I = core::IntOf<F>;
  using H = typename core::Half<F>::type;  ///< lanes are groups: headers and their constants
  using HI = core::IntOf<H>;
  static constexpr int kWidth = core::LaneTraits<F>::kWidth;
  static constexpr int kGroup = static_cast<int>(kGroupSize);
  static constexpr int kVectors = kGroup / kWidth;  ///< per group

  /// Asks for the memory of the next block where vector i of this one is taken, a line at a time: asking for all of it
  /// at once costs up to a third of a step, because the processor can wait for some 24 lines. (Seven streams of a few
  /// hundred bytes a block, with page boundaries in them, are more than hardware prefetchers follow.)
  template <class T>
  static FLASHOPTIM_HD void ask_ahead(const Block& b, const T* array, int i) {
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    if (i % kLine != 0) return;
    for (int k = 0; k < std::max(kWidth, kLine); k += kLine) __builtin_prefetch(array + i + k + b.ahead, 1, 3);
  }

  /// Runs body(group) for the first of every kWidth groups: headers are made and read one group per lane.
  template <class Body>
  static FLASHOPTIM_HD void for_each_header(Body body) {
    for (int group = 0; group < kBlockGroups; group += core::LaneTraits<H>::kWidth) body(group);
  }

  /// One uint32 or float per group of a block.
  struct PerGroup {
    alignas(64) uint32_t bits[kBlockGroups];

    FLASHOPTIM_HD HI load(int group) const { return core::load_u32<H>(bits + group); }
    FLASHOPTIM_HD void store(int group, HI value) { core::store_u32(bits + group, value); }
    /// One group's value in every lane.
    FLASHOPTIM_HD I spread(int group) const { return core::splat_bits<F>(bits[group]); }
    FLASHOPTIM_HD F spread_f32(int group) const { return core::from_bits(spread(group)); }
  };

  /// Dither hashes of the block's groups.
  static void hash_groups(Block& b) {
    for_each_header([&](int group) {
      core::store_u32(b.group_hash + group,
                      core::dither_group_hash<H>(b.dither, core::load_u32<H>(b.group_first_low + group),
                                                 core::load_u32<H>(b.group_first_high + group)));
    });
  }

  // ---- weights and gradients ------------------------------------------------------------------------------------

  template <MasterWeights kMaster>
  static FLASHOPTIM_HD I load_correction(const void* base, int i) {
    if constexpr (core::correction_bits(kMaster) == 8) {
      return core::load_i8<F>(static_cast<const uint8_t*>(base) + i);
    } else {
      return core::load_i16<F>(static_cast<const uint16_t*>(base) + i);
    }
  }

  template <MasterWeights kMaster>
  static FLASHOPTIM_HD void store_correction(void* base, int i, I value) {
    if constexpr (core::correction_bits(kMaster) == 8) {
      core::store_8(static_cast<uint8_t*>(base) + i, value);
    } else {
      core::store_16(static_cast<uint16_t*>(base) + i, value);
    }
  }

  /// Of groups begin ... end - 1.
  template <class Narrow, MasterWeights kMaster>
  static void load_narrow_weights_of(Block& b, int begin, int end) {
    const auto* parameter = static_cast<const uint16_t*>(b.parameter);
    for (int i = begin * kGroup; i < end * kGroup; i += kWidth) {
      ask_ahead(b, parameter, i);
      if constexpr (core::has_correction(kMaster)) {
        using Correction = std::conditional_t<core::correction_bits(kMaster) == 8, uint8_t, uint16_t>;
        ask_ahead(b, static_cast<const Correction*>(b.correction), i);
      }
      F w = Narrow::template widen<F>(core::load_u16<F>(parameter + i));
      if constexpr (core::has_correction(kMaster)) {
        const F value = core::correction_value<Narrow, core::correction_bits(kMaster), F>(
            w, load_correction<kMaster>(b.correction, i));
        core::store_f32(b.correction_value + i, value);
        w = w + value;
      }
      core::store_f32(b.weight + i, w);
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static void load_narrow_weights(Block& b) {
    load_narrow_weights_of<Narrow, kMaster>(b, 0, b.groups);
  }

  static void load_f32_weights(Block& b) {
    const auto* parameter = static_cast<const float*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      ask_ahead(b, parameter, i);
      core::store_f32(b.weight + i, core::load_f32<F>(parameter + i));
    }
  }

  template <class Load>
  static FLASHOPTIM_HD void load_gradients(Block& b, Load load) {
    const F scale = core::splat<F>(b.gradient_scale);
    I largest = core::splat_bits<F>(0u);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      const F g = load(i) * scale;
      largest = core::int_max(largest, core::to_bits(core::abs(g)));
      core::store_f32(b.gradient_f32 + i, g);
    }
    // Patterns order as magnitudes, infinity and NaN last. The count is only taken where there is one.
    alignas(64) uint32_t lanes[core::LaneTraits<H>::kWidth];
    core::store_u32(lanes, core::fold_int_max(largest));
    if (*std::max_element(std::begin(lanes), std::end(lanes)) >= 0x7f800000u) {
      for (int i = 0; i < b.groups * kGroup; ++i) {
        b.nonfinite += (core::to_bits(b.gradient_f32[i]) & 0x7f800000u) == 0x7f800000u;
      }
    }
  }

  template <class Narrow>
  static void load_narrow_gradient(Block& b) {
    const auto* gradient = static_cast<const uint16_t*>(b.gradient);
    load_gradients(b, [&b, gradient](int i) {
      ask_ahead(b, gradient, i);
      return Narrow::template widen<F>(core::load_u16<F>(gradient + i));
    });
  }

  static void load_f32_gradient(Block& b) {
    const auto* gradient = static_cast<const float*>(b.gradient);
    load_gradients(b, [&b, gradient](int i) {
      ask_ahead(b, gradient, i);
      return core::load_f32<F>(gradient + i);
    });
  }

  /// Runs body(i, group, dither word) over the vectors of groups begin ... end - 1, for one dither stream.
  template <core::DitherStream kStream, class Body>
  static FLASHOPTIM_HD void for_each_dithered(const Block& b, int begin, int end, Body body) {
    I lanes[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      lanes[j] = core::lane_multiples<F>(core::kDitherLaneStep<kStream>) +
                 core::splat_bits<F>(static_cast<uint32_t>(j * kWidth) * core::kDitherLaneStep<kStream>);
    }
    PerGroup start;
    for_each_header([&](int group) {
      start.store(group, core::dither_group_start<kStream, H>(b.dither, core::load_u32<H>(b.group_hash + group)));
    });
    for (int group = begin; group < end; ++group) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) body(group * kGroup + j * kWidth, group, start.spread(group) + lanes[j]);
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static void store_narrow_weights(Block& b) {
    auto* parameter = static_cast<uint16_t*>(b.parameter);
    if constexpr (core::has_correction(kMaster) && !core::is_nearest(kMaster)) {
      void* const corrections = b.correction;
      for_each_dithered<core::DitherStream::kWeight>(
          b, b.store_begin, b.store_end,
          [&b, parameter, corrections ](int i, int, I dither) __attribute__((always_inline)) {
            const auto out = core::split_update_dithered<Narrow, core::correction_bits(kMaster), F>(
                core::load_u16<F>(parameter + i), load_correction<kMaster>(corrections, i),
                core::load_f32<F>(b.correction_value + i), core::load_f32<F>(b.delta + i), dither);
            core::store_16(parameter + i, out.narrow);
            store_correction<kMaster>(corrections, i, out.correction);
          });
    } else if constexpr (kMaster == MasterWeights::kNoneStochastic) {
      for_each_dithered<core::DitherStream::kWeight>(b, b.store_begin, b.store_end, [&](int i, int, I dither) {
        const F w = core::load_f32<F>(b.weight + i) - core::load_f32<F>(b.delta + i);
        core::store_16(parameter + i, core::round_dithered<Narrow, F>(w, dither));
      });
    } else if constexpr (core::is_nearest(kMaster)) {
      for (int i = b.store_begin * kGroup; i < b.store_end * kGroup; i += kWidth) {
        const auto out = core::split_update_nearest<Narrow, core::correction_bits(kMaster), F>(
            core::load_u16<F>(parameter + i), load_correction<kMaster>(b.correction, i),
            core::load_f32<F>(b.weight + i), core::load_f32<F>(b.delta + i));
        core::store_16(parameter + i, out.narrow);
        store_correction<kMaster>(b.correction, i, out.correction);
      }
    } else {
      for (int i = b.store_begin * kGroup; i < b.store_end * kGroup; i += kWidth) {
        const F w = core::load_f32<F>(b.weight + i) - core::load_f32<F>(b.delta + i);
        core::store_16(parameter + i, Narrow::template round<F>(w));
      }
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static void split_narrow_weights(Block& b) {
    auto* parameter = static_cast<uint16_t*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      const F w = core::load_f32<F>(b.weight + i);
      if constexpr (core::has_correction(kMaster)) {
        const auto out = core::split<Narrow, core::correction_bits(kMaster), F>(w);
        core::store_16(parameter + i, out.narrow);
        store_correction<kMaster>(b.correction, i, out.correction);
      } else {
        core::store_16(parameter + i, Narrow::template round<F>(w));
      }
    }
  }

  static void store_f32_weights(Block& b) {
    auto* parameter = static_cast<float*>(b.parameter);
    for (int i = b.store_begin * kGroup; i < b.store_end * kGroup; i += kWidth) {
      const F w = core::load_f32<F>(b.weight + i) - core::load_f32<F>(b.delta + i);
      core::store_f32(parameter + i, core::canonical_nan(w));
    }
  }

  static void split_f32_weights(Block& b) {
    auto* parameter = static_cast<float*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      core::store_f32(parameter + i, core::canonical_nan(core::load_f32<F>(b.weight + i)));
    }
  }

  // ---- the rule over decoded states -----------------------------------------------------------------------------

  /// The body of a step: decoded states in and out, delta to the block. Holds its own copy of the hyperparameters, so
  /// that the compiler can keep them in registers across stores.
  template <class Rule>
  static FLASHOPTIM_HD auto update_body(Block& b) {
    return [&b, h = *static_cast<const typename Rule::Hyper*>(b.hyper) ](int i, F(&s)[core::kSlotArray<Rule>])
        __attribute__((always_inline)) {
      const F delta = Rule::update(core::load_f32<F>(b.weight + i), core::load_f32<F>(b.gradient_f32 + i), s, h);
      core::store_f32(b.delta + i, delta);
    };
  }

  template <class Rule>
  struct Float32States {
    static FLASHOPTIM_HD void load(const Block& b, int i, F (&s)[core::kSlotArray<Rule>]) {
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        ask_ahead(b, static_cast<const float*>(b.states[k]), i);
        s[k] = core::load_f32<F>(static_cast<const float*>(b.states[k]) + i);
      }
    }
    static FLASHOPTIM_HD void store(Block& b, int i, const F (&s)[core::kSlotArray<Rule>]) {
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        core::store_f32(static_cast<float*>(b.states[k]) + i, core::canonical_nan(s[k]));
      }
    }
    static void update(Block& b) {
      const auto body = update_body<Rule>(b);
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[core::kSlotArray<Rule>];
        load(b, i, s);
        body(i, s);
        store(b, i, s);
      }
    }
    static void decode(Block& b) {
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[core::kSlotArray<Rule>];
        load(b, i, s);
        for (int k = 0; k < Rule::kSlotCount; ++k) core::store_f32(b.state_f32[k] + i, s[k]);
      }
    }
    static void encode(Block& b) {
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[core::kSlotArray<Rule>];
        for (int k = 0; k < Rule::kSlotCount; ++k) s[k] = core::load_f32<F>(b.state_f32[k] + i);
        store(b, i, s);
      }
    }
  };

  /// A vector per group, for a reduction over the lanes of all groups at once.
  struct GroupVectors {
    static constexpr int kRow = core::LaneTraits<H>::kWidth;
    alignas(64) uint32_t bits[kBlockGroups * kRow];
    explicit GroupVectors(int groups) {
      // Groups behind the block's last are read by the reduction.
      for (int group = groups; group < kBlockGroups; ++group) store(group, core::splat_bits<H>(0u));
    }
    FLASHOPTIM_HD void store(int group, HI value) { core::store_u32(bits + group * kRow, value); }
    FLASHOPTIM_HD void maxima(PerGroup& out) const {
      for (int group = 0; group < kBlockGroups; group += 16)
        core::LaneMemory<H>::max_of_rows(bits + group * kRow, out.bits + group);
    }
    FLASHOPTIM_HD void unsigned_minima(PerGroup& out) const {
      for (int group = 0; group < kBlockGroups; group += 16)
        core::LaneMemory<H>::unsigned_min_of_rows(bits + group * kRow, out.bits + group);
    }
  };

  static FLASHOPTIM_HD PerGroup load_headers(const Block& b, int slot) {
    constexpr int kAtOnce = core::LaneTraits<H>::kWidth;
    PerGroup headers{};
    int group = 0;
    for (; group + kAtOnce <= b.groups; group += kAtOnce)
      headers.store(group, core::load_u16<H>(b.scales[slot] + group));
    for (; group < b.groups; ++group) headers.bits[group] = b.scales[slot][group];
    return headers;
  }
  static FLASHOPTIM_HD void store_headers(Block& b, int slot, const PerGroup& headers) {
    constexpr int kAtOnce = core::LaneTraits<H>::kWidth;
    int group = 0;
    for (; group + kAtOnce <= b.groups; group += kAtOnce) core::store_16(b.scales[slot] + group, headers.load(group));
    for (; group < b.groups; ++group) b.scales[slot][group] = static_cast<uint16_t>(headers.bits[group]);
  }

  static FLASHOPTIM_HD uint8_t* codes(const Block& b, int slot) { return static_cast<uint8_t*>(b.states[slot]); }
  template <int kSlots>
  static FLASHOPTIM_HD void ask_ahead_codes(const Block& b, int i) {
    for (int k = 0; k < kSlots; ++k) ask_ahead(b, codes(b, k), i);
  }

  template <class Rule>
  struct PaperStates {
    static constexpr int kSlots = Rule::kSlotCount;
    static constexpr bool is_signed(int k) { return Rule::kSlots[k].kind == core::StateKind::kSigned; }

    template <int k>
    using Codec = std::conditional_t<is_signed(k), core::PaperMomentum, core::PaperVariance>;

    template <int k>
    static FLASHOPTIM_HD F decode_slot(const Block& b, int i, F scale) {
      if constexpr (is_signed(k)) {
        return Codec<k>::decode(core::load_i8<F>(codes(b, k) + i), scale);
      } else {
        return Codec<k>::decode(core::load_u8<F>(codes(b, k) + i), scale);
      }
    }

    /// What is divided by the group's maximum: m, or sqrt(v). Kept in state_f32 for encode_slots.
    template <int k>
    static FLASHOPTIM_HD void keep(Block& b, int i, F value, I& largest) {
      F kept = value;
      if constexpr (!is_signed(k)) kept = core::sqrt(kept);
      kept = core::finite_or_zero(kept);
      largest = core::int_max(largest, core::to_bits(core::abs(kept)));
      core::store_f32(b.state_f32[k] + i, kept);
    }

    template <int k>
    static FLASHOPTIM_HD void make_header(Block& b, const GroupVectors& largest) {
      PerGroup absmax, header;
      largest.maxima(absmax);
      for_each_header([&](int group) {
        const H a = core::max(core::splat<H>(core::kPaperSmallestAbsmax), core::from_bits(absmax.load(group)));
        header.store(group, core::paper_header(a));
        core::store_f32(b.encoding_factor[k] + group, Codec<k>::encoding_factor(a));
      });
      store_headers(b, k, header);
    }

    template <int k>
    static FLASHOPTIM_HD void encode_slot(Block& b) {
      for (int group = 0; group < b.groups; ++group) {
        const F factor = core::splat<F>(b.encoding_factor[k][group]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const int i = group * kGroup + j * kWidth;
          core::store_8(codes(b, k) + i, Codec<k>::encode(core::load_f32<F>(b.state_f32[k] + i), factor));
        }
      }
    }
    static void encode_slots(Block& b) {
      if constexpr (kSlots > 0) encode_slot<0>(b);
      if constexpr (kSlots > 1) encode_slot<1>(b);
    }

    /// body(i, states) over decoded states; then, if kEncode, the headers of what it left.
    template <bool kDecode, bool kEncode, class Body>
    static FLASHOPTIM_HD void run(Block& b, Body body) {
      PerGroup scale[core::kSlotArray<Rule>];
      if constexpr (kDecode) {
        for (int k = 0; k < kSlots; ++k) {
          scale[k] = load_headers(b, k);
          for_each_header(
              [&](int group) { scale[k].store(group, core::to_bits(core::half_to_float(scale[k].load(group)))); });
        }
      }
      GroupVectors largest[2] = {GroupVectors(b.groups), GroupVectors(b.groups)};
      for (int group = 0; group < b.groups; ++group) {
        I group_largest[2] = {core::splat_bits<F>(0u), core::splat_bits<F>(0u)};
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const int i = group * kGroup + j * kWidth;
          F s[core::kSlotArray<Rule>];
          if constexpr (kDecode) ask_ahead_codes<kSlots>(b, i);
          if constexpr (kDecode && kSlots > 0) s[0] = decode_slot<0>(b, i, scale[0].spread_f32(group));
          if constexpr (kDecode && kSlots > 1) s[1] = decode_slot<1>(b, i, scale[1].spread_f32(group));
          body(i, s);
          if constexpr (kEncode && kSlots > 0) keep<0>(b, i, s[0], group_largest[0]);
          if constexpr (kEncode && kSlots > 1) keep<1>(b, i, s[1], group_largest[1]);
        }
        if constexpr (kEncode) {
          for (int k = 0; k < kSlots; ++k) largest[k].store(group, core::fold_int_max(group_largest[k]));
        }
      }
      if constexpr (kEncode && kSlots > 0) make_header<0>(b, largest[0]);
      if constexpr (kEncode && kSlots > 1) make_header<1>(b, largest[1]);
    }

    static void update(Block& b) { run<true, true>(b, update_body<Rule>(b)); }
    static void decode(Block& b) { run<true, false>(b, keep_decoded<Rule>(b)); }
    static void encode(Block& b) {
      run<false, true>(b, take_decoded<Rule>(b));
      encode_slots(b);
    }
  };

  /// Bodies of decode and encode: states to and from the block's fp32 arrays.
  template <class Rule>
  static auto keep_decoded(Block& b) {
    return [&b](int i, F(&s)[core::kSlotArray<Rule>]) {
      for (int k = 0; k < Rule::kSlotCount; ++k) core::store_f32(b.state_f32[k] + i, s[k]);
    };
  }
  template <class Rule>
  static auto take_decoded(Block& b) {
    return [&b](int i, F(&s)[core::kSlotArray<Rule>]) {
      for (int k = 0; k < Rule::kSlotCount; ++k) s[k] = core::load_f32<F>(b.state_f32[k] + i);
    };
  }

  /// Slot 0 is signed; slot 1, if there is one, a variance that slot 0 is relative to.
  template <class Rule>
  struct DefaultStates {
    static constexpr int kSlots = Rule::kSlotCount;
    static constexpr bool kHasVariance = kSlots > 1;
    using MuLaw = typename core::SignedCodec<Rule::kSlots[0].mantissa_bits>::type;
    static constexpr bool kGroupChooses = kSlots > 0 && Rule::kSlots[0].mantissa_bits == 0;  ///< K of momentum
    static_assert(kSlots == 0 || Rule::kSlots[0].kind == core::StateKind::kSigned);
    static_assert(!kHasVariance || !kGroupChooses);
    static_assert(!kHasVariance ||
                  (Rule::kSlots[1].kind == core::StateKind::kUnsigned && Rule::kSlots[0].relative_to == 1));

    static FLASHOPTIM_HD void make_variance_header(Block& b, const GroupVectors& largest,
                                                   const GroupVectors& smallest) {
      PerGroup high, low, header;
      largest.maxima(high);
      smallest.unsigned_minima(low);
      for_each_header([&](int group) {
        const HI h = core::WindowCodec::header<H>(high.load(group), low.load(group));
        header.store(group, h);
        store_window(b, group, core::WindowCodec::window<H>(h));
      });
      store_headers(b, 1, header);
    }

    /// Stores momentum alone of vector i and takes it into its group's extremes.
    static FLASHOPTIM_HD void keep_momentum(Block& b, int i, F m, I& largest, I& smallest) {
      core::store_f32(b.state_f32[0] + i, m);
      const I bits = core::to_bits(core::abs(m));
      largest = core::int_max(largest, bits);
      if constexpr (kGroupChooses) smallest = core::unsigned_min(smallest, bits - core::splat_bits<F>(1u));
    }

    /// Not finite becomes 0, and the extremes are taken again.
    [[gnu::cold, gnu::noinline]] static void drop_nonfinite(Block& b, GroupVectors& largest, GroupVectors& smallest) {
      for (int group = 0; group < b.groups; ++group) {
        I high = core::splat_bits<F>(0u), low = core::splat_bits<F>(0xffffffffu);
        for (int i = group * kGroup; i < (group + 1) * kGroup; i += kWidth) {
          keep_momentum(b, i, core::finite_or_zero(core::load_f32<F>(b.state_f32[0] + i)), high, low);
        }
        largest.store(group, core::fold_int_max(high));
        smallest.store(group, core::fold_unsigned_min(low));
      }
    }

    /// Patterns order as magnitudes, infinity and NaN last: that a group has one shows in its largest.
    static FLASHOPTIM_HD void make_chosen_header(Block& b, GroupVectors& largest, GroupVectors& smallest) {
      PerGroup high, low, header;
      largest.maxima(high);
      if (*std::max_element(std::begin(high.bits), std::end(high.bits)) >= 0x7f800000u) {
        drop_nonfinite(b, largest, smallest);
        largest.maxima(high);
      }
      smallest.unsigned_minima(low);
      for_each_header([&](int group) {
        const HI h = MuLaw::template header<H>(high.load(group), low.load(group));
        header.store(group, h);
        core::store_f32(b.encoding_factor[0] + group, MuLaw::template inverse_scale<H>(h));
        store_chosen(b, group, MuLaw::template group<H>(h));
      });
      store_headers(b, 0, header);
    }

    static FLASHOPTIM_HD void make_momentum_header(Block& b, const GroupVectors& largest) {
      PerGroup header;
      largest.maxima(header);
      for_each_header([&](int group) {
        const HI h = MuLaw::template header<H>(core::from_bits(header.load(group)));
        header.store(group, h);
        core::store_f32(b.encoding_factor[0] + group, MuLaw::template inverse_scale<H>(h));
      });
      store_headers(b, 0, header);
    }

    static FLASHOPTIM_HD void store_window(Block& b, int group, const core::WindowCodec::Window<HI>& w) {
      core::store_u32(b.window_shift + group, w.shift);
      core::store_u32(b.window_dither_shift + group, w.dither_shift);
      core::store_u32(b.window_base_minus_one + group, w.base_minus_one);
      core::store_u32(b.window_below + group, w.below);
    }
    static FLASHOPTIM_HD void store_chosen(Block& b, int group, const core::MuLawGroupCodec::Group<H>& g) {
      core::store_u32(b.window_shift + group, g.shift);
      core::store_u32(b.window_dither_shift + group, g.dither_shift);
      core::store_u32(b.mu_law_mask + group, g.mask);
      core::store_f32(b.mu_law_offset + group, g.offset);
      core::store_u32(b.mu_law_lowest + group, g.lowest);
    }
    static FLASHOPTIM_HD core::MuLawGroupCodec::Group<F> chosen(const Block& b, int group) {
      return {core::splat_bits<F>(b.window_shift[group]), core::splat_bits<F>(b.window_dither_shift[group]),
              core::splat_bits<F>(b.mu_law_mask[group]), core::splat<F>(b.mu_law_offset[group]),
              core::splat_bits<F>(b.mu_law_lowest[group])};
    }
    /// One group's window in every lane.
    static FLASHOPTIM_HD core::WindowCodec::Window<I> window(const Block& b, int group) {
      return {core::splat_bits<F>(b.window_shift[group]), core::splat_bits<F>(b.window_dither_shift[group]),
              core::splat_bits<F>(b.window_base_minus_one[group]), core::splat_bits<F>(b.window_below[group])};
    }

    /// Codes of the variance from the patterns in state_f32[1]; leaves momentum relative to it in state_f32[0], and its
    /// headers.
    template <bool kDithered>
    static void encode_variance(Block& b) {
      GroupVectors largest(b.groups);
      I group_largest = core::splat_bits<F>(0u);
      for_each_dithered<core::DitherStream::kVariance>(b, 0, b.groups, [&](int i, int group, I dither) {
        if (i % kGroup == 0) group_largest = core::splat_bits<F>(0u);
        const I bits = core::to_bits(core::load_f32<F>(b.state_f32[1] + i));
        const auto v = core::WindowCodec::encode<F>(bits, window(b, group), rounding_word<kDithered>(dither));
        core::store_8(codes(b, 1) + i, v.code);
        const F x = core::relative_to_root(core::load_f32<F>(b.state_f32[0] + i), v.stored);
        core::store_f32(b.state_f32[0] + i, x);
        group_largest = core::int_max(group_largest, core::to_bits(core::abs(x)));
        if (i % kGroup == kGroup - kWidth) largest.store(group, core::fold_int_max(group_largest));
      });
      make_momentum_header(b, largest);
    }

    template <bool kDithered>
    static void encode_momentum(Block& b) {
      for_each_dithered<core::DitherStream::kMomentum>(b, 0, b.groups, [&](int i, int group, I dither) {
        const F x = core::load_f32<F>(b.state_f32[0] + i);
        const F inverse = core::splat<F>(b.encoding_factor[0][group]);
        const I word = rounding_word<kDithered>(dither);
        if constexpr (kGroupChooses) {
          core::store_8(codes(b, 0) + i, MuLaw::template encode<F>(x, inverse, chosen(b, group), word));
        } else {
          core::store_8(codes(b, 0) + i, MuLaw::template encode<F>(x, inverse, word));
        }
      });
    }

    /// Half a step everywhere instead of dither: rounding to nearest.
    template <bool kDithered>
    static FLASHOPTIM_HD I rounding_word(I dither) {
      return kDithered ? dither : core::splat_bits<F>(0x80000000u);
    }

    /// body(i, states) over decoded states; then, if kEncode, what the first encoder needs of what it left.
    template <bool kDecode, bool kEncode, class Body>
    static FLASHOPTIM_HD void run(Block& b, Body body) {
      PerGroup scale;
      if constexpr (kDecode && kSlots > 0) {
        scale = load_headers(b, 0);
        for_each_header([&](int group) {
          const HI header = scale.load(group);
          if constexpr (kGroupChooses) {
            store_chosen(b, group, MuLaw::template group<H>(header));
            scale.store(group, core::to_bits(MuLaw::template scale<H>(header)));
          } else {
            scale.store(group, core::to_bits(MuLaw::template decoding_scale<kHasVariance, H>(header)));
          }
        });
      }
      if constexpr (kDecode && kHasVariance) {
        const PerGroup headers = load_headers(b, 1);
        for_each_header([&](int group) { store_window(b, group, core::WindowCodec::window<H>(headers.load(group))); });
      }
      GroupVectors largest(b.groups), smallest(b.groups);
      for (int group = 0; group < b.groups; ++group) {
        I group_largest = core::splat_bits<F>(0u);
        I group_smallest = core::splat_bits<F>(0xffffffffu);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const int i = group * kGroup + j * kWidth;
          F s[core::kSlotArray<Rule>];
          if constexpr (kDecode) ask_ahead_codes<kSlots>(b, i);
          if constexpr (kDecode && kSlots > 0) {
            if constexpr (kGroupChooses) {
              s[0] = MuLaw::template decode<F>(core::load_i8<F>(codes(b, 0) + i), chosen(b, group));
            } else {
              s[0] = MuLaw::template decode<F>(core::load_u8<F>(codes(b, 0) + i));
            }
            s[0] = s[0] * scale.spread_f32(group);
          }
          if constexpr (kDecode && kHasVariance) {
            s[1] = core::WindowCodec::decode<F>(core::load_u8<F>(codes(b, 1) + i), window(b, group));
            s[0] = s[0] * core::root_scale<F>(core::to_bits(s[1]));
          }
          body(i, s);
          if constexpr (kEncode && kHasVariance) {
            const I bits = core::WindowCodec::storable(s[1]);
            core::store_f32(b.state_f32[0] + i, s[0]);
            core::store_f32(b.state_f32[1] + i, core::from_bits(bits));
            group_largest = core::int_max(group_largest, bits);
            group_smallest = core::unsigned_min(group_smallest, bits - core::splat_bits<F>(1u));
          } else if constexpr (kEncode && kSlots > 0) {
            keep_momentum(b, i, kGroupChooses ? s[0] : core::finite_or_zero(s[0]), group_largest, group_smallest);
          }
        }
        if constexpr (kEncode && kSlots > 0) largest.store(group, core::fold_int_max(group_largest));
        if constexpr (kEncode && (kHasVariance || kGroupChooses))
          smallest.store(group, core::fold_unsigned_min(group_smallest));
      }
      if constexpr (kEncode && kHasVariance) {
        make_variance_header(b, largest, smallest);
      } else if constexpr (kEncode && kGroupChooses) {
        make_chosen_header(b, largest, smallest);
      } else if constexpr (kEncode && kSlots > 0) {
        make_momentum_header(b, largest);
      }
    }

    static void update(Block& b) { run<true, true>(b, update_body<Rule>(b)); }
    static void decode(Block& b) { run<true, false>(b, keep_decoded<Rule>(b)); }
    static void encode(Block& b) {
      run<false, true>(b, take_decoded<Rule>(b));
      if constexpr (kHasVariance) encode_variance<false>(b);
      if constexpr (kSlots > 0) encode_momentum<false>(b);
    }
  };

  // ---- the table ------------------------------------------------------------------------------------------------

  template <class Narrow, MasterWeights kMaster>
  static constexpr void add_weights(KernelTable& t, DType dtype) {
    const int d = static_cast<int>(dtype), m = static_cast<int>(kMaster);
    t.load_weights[d][m] = load_narrow_weights<Narrow, kMaster>;
    t.store_weights[d][m] = store_narrow_weights<Narrow, kMaster>;
    t.split_weights[d][m] = split_narrow_weights<Narrow, kMaster>;
  }

  template <class Narrow>
  static constexpr void add_narrow(KernelTable& t, DType dtype) {
    add_weights<Narrow, MasterWeights::kNone>(t, dtype);
    add_weights<Narrow, MasterWeights::kNoneStochastic>(t, dtype);
    add_weights<Narrow, MasterWeights::kCorrection8>(t, dtype);
    add_weights<Narrow, MasterWeights::kCorrection16>(t, dtype);
    add_weights<Narrow, MasterWeights::kCorrection8Nearest>(t, dtype);
    add_weights<Narrow, MasterWeights::kCorrection16Nearest>(t, dtype);
    t.load_gradient[static_cast<int>(dtype)] = load_narrow_gradient<Narrow>;
  }

  template <class Rule>
  static constexpr void add_rule(KernelTable& t, RuleKind kind) {
    static_assert(sizeof(typename Rule::Hyper) <= sizeof(HyperStorage));
    const int r = static_cast<int>(kind);
    const int f32 = static_cast<int>(StateCodec::kFloat32), paper = static_cast<int>(StateCodec::kPaper);
    const int window = static_cast<int>(StateCodec::kDefault);
    t.rule[r][f32][0] = Float32States<Rule>::update;
    t.decode[r][f32] = Float32States<Rule>::decode;
    t.encode[r][f32] = Float32States<Rule>::encode;
    t.rule[r][paper][0] = PaperStates<Rule>::update;
    if constexpr (Rule::kSlotCount > 0) t.rule[r][paper][1] = PaperStates<Rule>::encode_slots;
    t.decode[r][paper] = PaperStates<Rule>::decode;
    t.encode[r][paper] = PaperStates<Rule>::encode;
    t.rule[r][window][0] = DefaultStates<Rule>::update;
    if constexpr (Rule::kSlotCount > 0) t.rule[r][window][1] = DefaultStates<Rule>::template encode_momentum<true>;
    if constexpr (Rule::kSlotCount > 1) {
      t.rule[r][window][2] = t.rule[r][window][1];
      t.rule[r][window][1] = DefaultStates<Rule>::template encode_variance<true>;
    }
    t.decode[r][window] = DefaultStates<Rule>::decode;
    t.encode[r][window] = DefaultStates<Rule>::encode;
  }

  static constexpr KernelTable table(const char* isa) {
    KernelTable t{};
    t.isa = isa;
    t.hash_groups = hash_groups;
    add_narrow<core::BFloat16>(t, DType::kBFloat16);
    add_narrow<core::Float16>(t, DType::kFloat16);
    const int f32 = static_cast<int>(DType::kFloat32);
    t.load_weights[f32][static_cast<int>(MasterWeights::kNone)] = load_f32_weights;
    t.store_weights[f32][static_cast<int>(MasterWeights::kNone)] = store_f32_weights;
    t.split_weights[f32][static_cast<int>(MasterWeights::kNone)] = split_f32_weights;
    t.load_gradient[f32] = load_f32_gradient;
#define FLASHOPTIM_ADD_RULE(name) add_rule<core::name>(t, RuleKind::k##name);
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_ADD_RULE)
#undef FLASHOPTIM_ADD_RULE
    return t;
  }
};

}  // namespace flashoptim::cpu
