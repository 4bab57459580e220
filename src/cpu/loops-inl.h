// The loops, compiled once per instruction set: F is that set's lane type. Every formula is core/'s.
#pragma once

#include "flashoptim/core/default_codec.h"
#include "flashoptim/core/optimizer_list.h"
#include "flashoptim/core/paper_codec.h"
#include "flashoptim/core/weight_split.h"
#include "src/cpu/kernels.h"

namespace flashoptim::cpu {

template <class F>
struct Loops {
  using I = core::IntOf<F>;
  static constexpr int kWidth = core::LaneTraits<F>::kWidth;
  static constexpr int kGroup = static_cast<int>(kGroupSize);

  // ---- weights and gradients ------------------------------------------------------------------------------------

  static constexpr bool has_correction(MasterWeights m) { return m != MasterWeights::kNone && m != MasterWeights::kNoneStochastic; }
  static constexpr int correction_bits(MasterWeights m) {
    return m == MasterWeights::kCorrection8 || m == MasterWeights::kCorrection8Nearest ? 8 : 16;
  }
  static constexpr bool is_nearest(MasterWeights m) {
    return m == MasterWeights::kCorrection8Nearest || m == MasterWeights::kCorrection16Nearest;
  }

  template <MasterWeights kMaster>
  static FLASHOPTIM_HD F load_correction(const void* base, int i) {
    if constexpr (correction_bits(kMaster) == 8) {
      return core::int_to_float(core::load_i8<F>(static_cast<const int8_t*>(base) + i));
    } else {
      return core::int_to_float(core::load_i16<F>(static_cast<const int16_t*>(base) + i));
    }
  }

  template <MasterWeights kMaster>
  static FLASHOPTIM_HD void store_correction(void* base, int i, I value) {
    if constexpr (correction_bits(kMaster) == 8) {
      core::store_8(static_cast<int8_t*>(base) + i, value);
    } else {
      core::store_16(static_cast<int16_t*>(base) + i, value);
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static void load_narrow_weights(Block& b) {
    const auto* parameter = static_cast<const uint16_t*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      F w = Narrow::template widen<F>(core::load_u16<F>(parameter + i));
      if constexpr (has_correction(kMaster)) {
        w = core::merge<Narrow, correction_bits(kMaster), F>(w, load_correction<kMaster>(b.correction, i));
      }
      core::store_f32(b.weight + i, w);
    }
  }

  static void load_f32_weights(Block& b) {
    const auto* parameter = static_cast<const float*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      core::store_f32(b.weight + i, core::load_f32<F>(parameter + i));
    }
  }

  template <class Load>
  static FLASHOPTIM_HD void load_gradients(Block& b, Load load) {
    const F scale = core::splat<F>(b.gradient_scale);
    F poison = core::splat<F>(0.0f);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      const F g = load(i) * scale;
      poison = poison + g * core::splat<F>(0.0f);
      core::store_f32(b.gradient_f32 + i, g);
    }
    // 0 * g is NaN exactly for non-finite g: the count, which is rarely wanted, is only taken where there is one.
    float lanes[kWidth];
    core::store_f32(lanes, poison);
    float any = 0.0f;
    for (float lane : lanes) any += lane;
    if (any != 0.0f || any != any) {
      for (int i = 0; i < b.groups * kGroup; ++i) {
        const float g = b.gradient_f32[i];
        b.nonfinite += !(g - g == 0.0f);
      }
    }
  }

  template <class Narrow>
  static void load_narrow_gradient(Block& b) {
    const auto* gradient = static_cast<const uint16_t*>(b.gradient);
    load_gradients(b, [gradient](int i) { return Narrow::template widen<F>(core::load_u16<F>(gradient + i)); });
  }

  static void load_f32_gradient(Block& b) {
    const auto* gradient = static_cast<const float*>(b.gradient);
    load_gradients(b, [gradient](int i) { return core::load_f32<F>(gradient + i); });
  }

  /// Runs body(i, dither) over the block's vectors of one dither stream.
  template <core::DitherStream kStream, class Body>
  static FLASHOPTIM_HD void for_each_dithered(const Block& b, Body body) {
    constexpr uint32_t kLaneStep = core::kDitherLaneStep<kStream>;
    const I lanes = core::lane_multiples<F>(kLaneStep);
    for (int group = 0; group < b.groups; ++group) {
      const uint32_t start = core::dither_group_start<kStream>(b.dither, b.group_hash[group]);
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; j += kWidth) {
        const I word = lanes + core::splat_bits<F>(start + static_cast<uint32_t>(j) * kLaneStep);
        body(group * kGroup + j, group, word);
      }
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static void store_narrow_weights(Block& b) {
    auto* parameter = static_cast<uint16_t*>(b.parameter);
    if constexpr (has_correction(kMaster) && !is_nearest(kMaster)) {
      for_each_dithered<core::DitherStream::kWeight>(b, [&](int i, int, I dither) {
        const auto out = core::split_update_dithered<Narrow, correction_bits(kMaster), F>(
            core::load_u16<F>(parameter + i), load_correction<kMaster>(b.correction, i),
            core::load_f32<F>(b.delta + i), dither);
        core::store_16(parameter + i, out.narrow);
        store_correction<kMaster>(b.correction, i, out.correction);
      });
    } else if constexpr (kMaster == MasterWeights::kNoneStochastic) {
      for_each_dithered<core::DitherStream::kWeight>(b, [&](int i, int, I dither) {
        const F w = core::load_f32<F>(b.weight + i) - core::load_f32<F>(b.delta + i);
        core::store_16(parameter + i, core::round_dithered<Narrow, F>(w, dither));
      });
    } else {
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        const F w = core::load_f32<F>(b.weight + i) - core::load_f32<F>(b.delta + i);
        store_nearest<Narrow, kMaster>(b, i, w);
      }
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static FLASHOPTIM_HD void store_nearest(Block& b, int i, F w) {
    auto* parameter = static_cast<uint16_t*>(b.parameter);
    if constexpr (has_correction(kMaster)) {
      const auto out = core::split<Narrow, correction_bits(kMaster), F>(w);
      core::store_16(parameter + i, out.narrow);
      store_correction<kMaster>(b.correction, i, out.correction);
    } else {
      core::store_16(parameter + i, Narrow::template round<F>(w));
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static void split_narrow_weights(Block& b) {
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      store_nearest<Narrow, kMaster>(b, i, core::load_f32<F>(b.weight + i));
    }
  }

  static void store_f32_weights(Block& b) {
    auto* parameter = static_cast<float*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
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

  template <class Rule>
  static FLASHOPTIM_HD void update_vector(Block& b, int i, F (&s)[kMaxStates]) {
    const F delta = Rule::update(core::load_f32<F>(b.weight + i), core::load_f32<F>(b.gradient_f32 + i), s,
                                 *static_cast<const typename Rule::Hyper*>(b.hyper));
    core::store_f32(b.delta + i, delta);
  }

  /// Runs body(values) per group with one value per group and lane: headers are made for kWidth groups at a time.
  template <class Body>
  static FLASHOPTIM_HD void for_each_header(Body body) {
    for (int group = 0; group < kBlockGroups; group += kWidth) body(group);
  }

  template <class Rule>
  struct Float32States {
    static FLASHOPTIM_HD void load(const Block& b, int i, F (&s)[kMaxStates]) {
      for (int k = 0; k < Rule::kStateCount; ++k) s[k] = core::load_f32<F>(static_cast<const float*>(b.states[k]) + i);
    }
    static FLASHOPTIM_HD void store(Block& b, int i, const F (&s)[kMaxStates]) {
      for (int k = 0; k < Rule::kStateCount; ++k) {
        core::store_f32(static_cast<float*>(b.states[k]) + i, core::canonical_nan(s[k]));
      }
    }
    static void step(Block& b) {
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[kMaxStates];
        load(b, i, s);
        update_vector<Rule>(b, i, s);
        store(b, i, s);
      }
    }
    static void decode(Block& b) {
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[kMaxStates];
        load(b, i, s);
        for (int k = 0; k < Rule::kStateCount; ++k) core::store_f32(b.state_f32[k] + i, s[k]);
      }
    }
    static void encode(Block& b) {
      for (int i = 0; i < b.groups * kGroup; i += kWidth) {
        F s[kMaxStates];
        for (int k = 0; k < Rule::kStateCount; ++k) s[k] = core::load_f32<F>(b.state_f32[k] + i);
        store(b, i, s);
      }
    }
  };

  template <class Rule>
  struct PaperStates {
    static constexpr bool is_signed(int k) { return Rule::kStates[k].kind == core::StateKind::kSigned; }

    template <int k>
    static FLASHOPTIM_HD F decode_slot(const Block& b, int i, F scale) {
      if constexpr (is_signed(k)) {
        return core::PaperMomentum::decode<F>(core::load_i8<F>(static_cast<const uint8_t*>(b.states[k]) + i), scale);
      } else {
        return core::PaperVariance::decode<F>(core::load_u8<F>(static_cast<const uint8_t*>(b.states[k]) + i), scale);
      }
    }
    /// What is divided by the group's maximum: m, or sqrt(v). Kept in state_f32 between the two passes.
    template <int k>
    static FLASHOPTIM_HD void keep(Block& b, int i, F value, I& largest) {
      F kept = core::finite_or_zero(value);
      if constexpr (!is_signed(k)) kept = core::sqrt(kept);
      largest = core::int_max(largest, core::to_bits(core::abs(kept)));
      core::store_f32(b.state_f32[k] + i, kept);
    }
    template <int k>
    static FLASHOPTIM_HD void encode_slot(Block& b, const uint32_t* largest) {
      alignas(64) float absmax[kBlockGroups];
      alignas(64) uint32_t header[kBlockGroups];
      for_each_header([&](int group) {
        const F a = core::max(core::splat<F>(core::kPaperSmallestAbsmax), core::from_bits(core::load_u32<F>(largest + group)));
        core::store_f32(absmax + group, a);
        core::store_u32(header + group, core::paper_header(a));
      });
      for (int group = 0; group < b.groups; ++group) {
        b.scales[k][group] = static_cast<uint16_t>(header[group]);
        const F a = core::splat<F>(absmax[group]);
#pragma GCC unroll 4
        for (int j = 0; j < kGroup; j += kWidth) {
          const int i = group * kGroup + j;
          const F value = core::load_f32<F>(b.state_f32[k] + i);
          uint8_t* codes = static_cast<uint8_t*>(b.states[k]) + i;
          if constexpr (is_signed(k)) {
            core::store_8(codes, core::PaperMomentum::encode<F>(value, a));
          } else {
            core::store_8(codes, core::PaperVariance::encode<F>(value, a));
          }
        }
      }
    }
    /// body(i, states): states in and out; afterwards they are encoded if kEncode.
    template <bool kDecode, bool kEncode, class Body>
    static FLASHOPTIM_HD void run(Block& b, Body body) {
      alignas(64) uint32_t largest[kMaxStates][kBlockGroups] = {};
      for (int group = 0; group < b.groups; ++group) {
        F scale[kMaxStates];
        if constexpr (kDecode) {
          for (int k = 0; k < Rule::kStateCount; ++k) scale[k] = core::splat<F>(core::half_to_float(static_cast<uint32_t>(b.scales[k][group])));
        }
        I group_largest[kMaxStates];
        for (int k = 0; k < kMaxStates; ++k) group_largest[k] = core::splat_bits<F>(0u);
#pragma GCC unroll 4
        for (int j = 0; j < kGroup; j += kWidth) {
          const int i = group * kGroup + j;
          F s[kMaxStates];
          if constexpr (kDecode) {
            if constexpr (Rule::kStateCount > 0) s[0] = decode_slot<0>(b, i, scale[0]);
            if constexpr (Rule::kStateCount > 1) s[1] = decode_slot<1>(b, i, scale[1]);
          }
          body(i, s);
          if constexpr (kEncode) {
            if constexpr (Rule::kStateCount > 0) keep<0>(b, i, s[0], group_largest[0]);
            if constexpr (Rule::kStateCount > 1) keep<1>(b, i, s[1], group_largest[1]);
          }
        }
        for (int k = 0; k < Rule::kStateCount; ++k) largest[k][group] = core::reduce_int_max(group_largest[k]);
      }
      if constexpr (kEncode && Rule::kStateCount > 0) encode_slot<0>(b, largest[0]);
      if constexpr (kEncode && Rule::kStateCount > 1) encode_slot<1>(b, largest[1]);
    }
    static void step(Block& b) {
      run<true, true>(b, [&](int i, F(&s)[kMaxStates]) { update_vector<Rule>(b, i, s); });
    }
    static void decode(Block& b) {
      run<true, false>(b, [&](int i, F(&s)[kMaxStates]) {
        for (int k = 0; k < Rule::kStateCount; ++k) core::store_f32(b.state_f32[k] + i, s[k]);
      });
    }
    static void encode(Block& b) {
      run<false, true>(b, [&](int i, F(&s)[kMaxStates]) {
        for (int k = 0; k < Rule::kStateCount; ++k) s[k] = core::load_f32<F>(b.state_f32[k] + i);
      });
    }
  };

  template <class Rule>
  struct DefaultStates {
    static constexpr bool is_signed(int k) { return Rule::kStates[k].kind == core::StateKind::kSigned; }
    static constexpr int relative_to(int k) { return Rule::kStates[k].relative_to; }
    template <int k>
    using MuLaw = core::MuLawCodec<Rule::kStates[k].mantissa_bits>;

    static const uint8_t* codes(const Block& b, int k) { return static_cast<const uint8_t*>(b.states[k]); }
    static uint8_t* codes(Block& b, int k) { return static_cast<uint8_t*>(b.states[k]); }

    /// Decodes the unsigned slots first: the signed ones may be relative to them.
    static FLASHOPTIM_HD void decode_vector(const Block& b, int group, int i, F (&s)[kMaxStates]) {
      if constexpr (Rule::kStateCount > 1 && !is_signed(1)) {
        s[1] = core::WindowCodec::decode<F>(core::load_u8<F>(codes(b, 1) + i), core::WindowCodec::window(b.scales[1][group]));
      }
      if constexpr (Rule::kStateCount > 0) {
        static_assert(is_signed(0));
        const F scale = MuLaw<0>::template scale<F>(core::splat_bits<F>(b.scales[0][group]));
        s[0] = MuLaw<0>::template decode<F>(core::load_u8<F>(codes(b, 0) + i)) * scale;
        if constexpr (relative_to(0) != core::kNoSlot) s[0] = s[0] * core::root_scale(s[relative_to(0)]);
      }
    }

    /// Encodes slot 1 (a variance) from state_f32 and leaves in state_f32[0] momentum relative to it.
    template <bool kDithered>
    static FLASHOPTIM_HD void encode_variance(Block& b, const uint32_t* largest, const uint32_t* smallest, uint32_t* momentum_largest) {
      alignas(64) uint32_t header[kBlockGroups];
      for_each_header([&](int group) {
        core::store_u32(header + group, core::WindowCodec::header<F>(core::load_u32<F>(largest + group),
                                                                     core::load_u32<F>(smallest + group)));
      });
      I momentum_max = core::splat_bits<F>(0u);
      for_each_dithered<core::DitherStream::kVariance>(b, [&](int i, int group, I dither) {
        const auto window = core::WindowCodec::window(header[group]);
        const I word = kDithered ? dither : core::splat_bits<F>(0x80000000u);
        const F v = core::load_f32<F>(b.state_f32[1] + i);
        const I code = core::WindowCodec::encode<F>(v, window, word);
        core::store_8(codes(b, 1) + i, code);
        if constexpr (relative_to(0) == 1) {
          const F stored = core::WindowCodec::decode<F>(code, window);
          const F x = core::load_f32<F>(b.state_f32[0] + i) * core::inverse_root_scale(stored);
          core::store_f32(b.state_f32[0] + i, x);
          momentum_max = core::int_max(momentum_max, core::to_bits(core::abs(x)));
          if (i % kGroup == kGroup - kWidth) {
            momentum_largest[group] = core::reduce_int_max(momentum_max);
            momentum_max = core::splat_bits<F>(0u);
          }
        }
      });
      for (int group = 0; group < b.groups; ++group) b.scales[1][group] = static_cast<uint16_t>(header[group]);
    }

    template <bool kDithered>
    static FLASHOPTIM_HD void encode_momentum(Block& b, const uint32_t* largest) {
      using Codec = MuLaw<0>;
      alignas(64) uint32_t header[kBlockGroups];
      alignas(64) float inverse[kBlockGroups];
      for_each_header([&](int group) {
        const I h = Codec::template header<F>(core::from_bits(core::load_u32<F>(largest + group)));
        core::store_u32(header + group, h);
        core::store_f32(inverse + group, Codec::template inverse_scale<F>(h));
      });
      for_each_dithered<core::DitherStream::kMomentum>(b, [&](int i, int group, I dither) {
        const I word = kDithered ? dither : core::splat_bits<F>(0x80000000u);
        const F x = core::load_f32<F>(b.state_f32[0] + i);
        core::store_8(codes(b, 0) + i, Codec::template encode<F>(x, core::splat<F>(inverse[group]), word));
      });
      for (int group = 0; group < b.groups; ++group) b.scales[0][group] = static_cast<uint16_t>(header[group]);
    }

    template <bool kDecode, bool kEncode, bool kDithered, class Body>
    static FLASHOPTIM_HD void run(Block& b, Body body) {
      alignas(64) uint32_t largest[kMaxStates][kBlockGroups] = {};
      alignas(64) uint32_t smallest[kBlockGroups] = {};
      for (int group = 0; group < b.groups; ++group) {
        I group_largest[kMaxStates];
        for (int k = 0; k < kMaxStates; ++k) group_largest[k] = core::splat_bits<F>(0u);
        I group_smallest = core::splat_bits<F>(0xffffffffu);
#pragma GCC unroll 4
        for (int j = 0; j < kGroup; j += kWidth) {
          const int i = group * kGroup + j;
          F s[kMaxStates];
          if constexpr (kDecode) decode_vector(b, group, i, s);
          body(i, s);
          if constexpr (kEncode && Rule::kStateCount > 1) {
            const F v = core::WindowCodec::storable(s[1]);
            core::store_f32(b.state_f32[1] + i, v);
            group_largest[1] = core::int_max(group_largest[1], core::to_bits(v));
            group_smallest = core::unsigned_min(group_smallest, core::to_bits(v) - core::splat_bits<F>(1u));
          }
          if constexpr (kEncode && Rule::kStateCount > 0) {
            const F m = core::finite_or_zero(s[0]);
            core::store_f32(b.state_f32[0] + i, m);
            if constexpr (relative_to(0) == core::kNoSlot) {
              group_largest[0] = core::int_max(group_largest[0], core::to_bits(core::abs(m)));
            }
          }
        }
        if constexpr (kEncode) {
          if constexpr (Rule::kStateCount > 0 && relative_to(0) == core::kNoSlot) largest[0][group] = core::reduce_int_max(group_largest[0]);
          if constexpr (Rule::kStateCount > 1) {
            largest[1][group] = core::reduce_int_max(group_largest[1]);
            smallest[group] = core::reduce_unsigned_min(group_smallest);
          }
        }
      }
      if constexpr (kEncode && Rule::kStateCount > 1) encode_variance<kDithered>(b, largest[1], smallest, largest[0]);
      if constexpr (kEncode && Rule::kStateCount > 0) encode_momentum<kDithered>(b, largest[0]);
    }
    static void step(Block& b) {
      run<true, true, true>(b, [&](int i, F(&s)[kMaxStates]) { update_vector<Rule>(b, i, s); });
    }
    static void decode(Block& b) {
      run<true, false, false>(b, [&](int i, F(&s)[kMaxStates]) {
        for (int k = 0; k < Rule::kStateCount; ++k) core::store_f32(b.state_f32[k] + i, s[k]);
      });
    }
    static void encode(Block& b) {
      run<false, true, false>(b, [&](int i, F(&s)[kMaxStates]) {
        for (int k = 0; k < Rule::kStateCount; ++k) s[k] = core::load_f32<F>(b.state_f32[k] + i);
      });
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
    const int fast = static_cast<int>(StateCodec::kDefault);
    t.rule[r][f32] = Float32States<Rule>::step;
    t.decode[r][f32] = Float32States<Rule>::decode;
    t.encode[r][f32] = Float32States<Rule>::encode;
    t.rule[r][paper] = PaperStates<Rule>::step;
    t.decode[r][paper] = PaperStates<Rule>::decode;
    t.encode[r][paper] = PaperStates<Rule>::encode;
    t.rule[r][fast] = DefaultStates<Rule>::step;
    t.decode[r][fast] = DefaultStates<Rule>::decode;
    t.encode[r][fast] = DefaultStates<Rule>::encode;
  }

  static constexpr KernelTable table(const char* isa) {
    KernelTable t{};
    t.isa = isa;
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
