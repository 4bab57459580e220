// AVX-512's hot path: weights and their corrections, updated without a stage between; and bf16 ones loaded and stored
// for the general stages.
#pragma once

#include "src/cpu/avx512/formats-inl.h"

namespace flashoptim::cpu {
inline namespace FLASHOPTIM_AVX512 {

/// Stages that load and store bf16 weights and gradients.
struct HotStages : HotFormats {
  template <MasterWeights kMaster>
  static void load_weights(Block& b) {
    const auto* const parameter = static_cast<const uint16_t*>(b.parameter);
    using Correction = std::conditional_t<core::correction_bits(kMaster) == 8, uint8_t, uint16_t>;
    const auto* const corrections = static_cast<const Correction*>(b.correction);
    const int groups = b.groups;
    const Widen widen;
    const NotNormal not_normal;
    const CorrectionValue<core::BFloat16, core::correction_bits(kMaster)> correction_value;
    for (int group = 0; group < groups; ++group) {
      const int i = group * kGroup;
      const __m512i words = _mm512_loadu_si512(parameter + i);
      LoopPieces<Pair>::ask_ahead(b, parameter, i);
      LoopPieces<Pair>::ask_ahead(b, corrections, i);
      if (not_normal(words) != 0) [[unlikely]] {
        Generic::load_narrow_weights_of<core::BFloat16, kMaster>(b, group, group + 1);
        continue;
      }
      const __m512 low = widen.low(words), high = widen.high(words);
      const __m512 value_low = correction_value(low, corrections, i),
                   value_high = correction_value(high, corrections, i + kLanes);
      _mm512_store_ps(b.correction_value + i, value_low);
      _mm512_store_ps(b.correction_value + i + kLanes, value_high);
      _mm512_store_ps(b.weight + i, _mm512_add_ps(low, value_low));
      _mm512_store_ps(b.weight + i + kLanes, _mm512_add_ps(high, value_high));
    }
  }

  /// A factor of at most 1 makes nothing infinite, so not finite are those of exponent 255.
  template <bool kScaled>
  static FLASHOPTIM_HD bool widen_gradient(Block& b) {
    const auto* const gradient = static_cast<const uint16_t*>(b.gradient);
    const int elements = b.groups * kGroup;
    const __m512 scale = all_f(b.gradient_scale);
    const Widen widen;
    __mmask32 nonfinite = 0;
    for (int i = 0; i < elements; i += kGroup) {
      const __m512i words = _mm512_loadu_si512(gradient + i);
      LoopPieces<Pair>::ask_ahead(b, gradient, i);
      nonfinite |=
          _mm512_testn_epi16_mask(_mm512_add_epi16(words, _mm512_set1_epi16(0x0080)), _mm512_set1_epi16(0x7f80));
      const __m512 low = widen.low(words), high = widen.high(words);
      _mm512_store_ps(b.gradient_f32 + i, kScaled ? _mm512_mul_ps(low, scale) : low);
      _mm512_store_ps(b.gradient_f32 + i + kLanes, kScaled ? _mm512_mul_ps(high, scale) : high);
    }
    return nonfinite == 0;
  }
  static void load_gradient(Block& b) {
    const float scale = b.gradient_scale;
    const bool finite = scale == 1.0f ? widen_gradient<false>(b) : core::abs(scale) <= 1.0f && widen_gradient<true>(b);
    if (!finite) [[unlikely]]
      Generic::load_narrow_gradient<core::BFloat16>(b);
  }

  template <class Narrow, MasterWeights kMaster>
  [[gnu::noinline]] static void store_group_generic(Block& b, int group) {
    const int begin = b.store_begin, end = b.store_end;
    b.store_begin = group;
    b.store_end = group + 1;
    Generic::store_narrow_weights<Narrow, kMaster>(b);
    b.store_begin = begin;
    b.store_end = end;
  }

  template <MasterWeights kMaster>
  static void store_weights(Block& b) {
    auto* const parameter = static_cast<uint16_t*>(b.parameter);
    void* const corrections = b.correction;
    const int end = b.store_end;
    const Dither<core::DitherStream::kWeight> dither(b);
    const Widen widen;
    const FarFromOne far_from_one;
    const CutCorrection<core::BFloat16, core::correction_bits(kMaster), false> cut;
    for (int group = b.store_begin; group < end; ++group) {
      const int i = group * kGroup;
      const __m512i words = _mm512_loadu_si512(parameter + i);
      const Pair narrow = {{widen.low(words)}, {widen.high(words)}}, delta = core::load_f32<Pair>(b.delta + i);
      const Pair rest = core::load_f32<Pair>(b.correction_value + i) - delta;
      const Pair moved = narrow + rest;
      const __m512i rounded = round_to_words(moved.lo.v, moved.hi.v);
      if (far_from_one(rounded) != 0 || !have_no_zero(delta.lo.v, delta.hi.v)) [[unlikely]] {
        store_group_generic<core::BFloat16, kMaster>(b, group);
        continue;
      }
      _mm512_storeu_si512(parameter + i, rounded);
      const Pair rounded_narrow = {{widen.low(rounded)}, {widen.high(rounded)}};
      const Pair new_rest = (narrow - rounded_narrow) + rest;
      cut.store(corrections, i, cut(new_rest.lo.v, rounded_narrow.lo.v, dither.low(group)),
                cut(new_rest.hi.v, rounded_narrow.hi.v, dither.high(group)));
    }
  }
};

/// Usual blocks: straight from gradients to weights.
struct HotWeights : HotStages {
  /// Reads a group's gradient, and its weight, which is bf16, where the rule takes weight decay into the gradient.
  template <core::Rule Rule, DType kGradient, MasterWeights kMaster, bool kScaled>
  struct NarrowInputs {
    using Gradient = Format<kGradient>;
    const void* gradient;
    const uint16_t* parameter;
    const void* corrections;
    const char* gradient_ahead;
    __m512 scale;
    Gradient format;
    Widen widen;
    NotNormal not_normal;
    CorrectionValue<core::BFloat16, core::correction_bits(kMaster)> correction_value;
    __mmask32 unusual = 0;  ///< weights whose corrections have been taken for what they are not

    explicit FLASHOPTIM_HD NarrowInputs(const Block& b)
        : gradient(b.gradient),
          parameter(static_cast<const uint16_t*>(b.parameter)),
          corrections(b.correction),
          gradient_ahead(static_cast<const char*>(gradient) + b.ahead * Gradient::kBytes),
          scale(all_f(b.gradient_scale)) {}

    FLASHOPTIM_HD void operator()(int group, Pair* w, Pair* g) {
      const int i = group * kGroup;
      __builtin_prefetch(gradient_ahead + i * Gradient::kBytes, 0, 3);
      if constexpr (Gradient::kBytes == 4) __builtin_prefetch(gradient_ahead + i * 4 + 64, 0, 3);
      *g = format.load(gradient, i);
      if constexpr (kScaled) *g = {{_mm512_mul_ps(g->lo.v, scale)}, {_mm512_mul_ps(g->hi.v, scale)}};
      if constexpr (!Rule::kDecoupledDecay) {
        const __m512i weights = _mm512_loadu_si512(parameter + i);
        unusual |= not_normal(weights);
        const __m512 low = widen.low(weights), high = widen.high(weights);
        *w = {{_mm512_add_ps(low, correction_value(low, corrections, i))},
              {_mm512_add_ps(high, correction_value(high, corrections, i + kLanes))}};
      }
    }
  };

  /// The same, of what the stages before have loaded.
  struct LoadedInputs {
    const float* weight;
    const float* gradient;
    __mmask32 unusual = 0;

    explicit FLASHOPTIM_HD LoadedInputs(const Block& b) : weight(b.weight), gradient(b.gradient_f32) {}
    FLASHOPTIM_HD void operator()(int group, Pair* w, Pair* g) {
      *w = core::load_f32<Pair>(weight + group * kGroup);
      *g = core::load_f32<Pair>(gradient + group * kGroup);
    }
  };

  /// Takes a group's new states: leaves its step for finish(), or delta for the stages that store weights.
  template <core::Rule Rule>
  struct KeepStep {
    typename Rule::Hyper h;
    float* steps;

    FLASHOPTIM_HD KeepStep(Block& b, const typename Rule::Hyper& hyper) : h(hyper), steps(b.delta) {}
    FLASHOPTIM_HD void operator()(int group, const BoundedLane<Pair> (&s)[Rule::kSlotCount]) const {
      core::store_f32(steps + group * kGroup, Rule::template step<BoundedLane<Pair>>(s, h).v);
    }
  };
  template <core::Rule Rule>
  struct KeepDelta {
    typename Rule::Hyper h;
    float* deltas;
    const float* weight;

    FLASHOPTIM_HD KeepDelta(Block& b, const typename Rule::Hyper& hyper)
        : h(hyper), deltas(b.delta), weight(b.weight) {}
    FLASHOPTIM_HD void operator()(int group, const BoundedLane<Pair> (&s)[Rule::kSlotCount]) const {
      using Lane = BoundedLane<Pair>;
      const Lane w{core::load_f32<Pair>(weight + group * kGroup)};
      core::store_f32(deltas + group * kGroup, Rule::template decayed<Lane>(w, Rule::template step<Lane>(s, h), h).v);
    }
  };

  /// The two ways into a codec's passes, which names its Headers, bounds_hold(h), advance(b, headers, h, inputs, keep)
  /// and the general States.
  template <core::Rule Rule, class Codec>
  struct Entries {
    using Hyper = typename Rule::Hyper;

    /// The rule's first stage, where weights and gradients have been loaded.
    static void update(Block& b) {
      const Hyper h = *static_cast<const Hyper*>(b.hyper);
      typename Codec::Headers headers;
      b.usual = opens(b, h, &headers) && Codec::advance(b, headers, h, LoadedInputs(b), KeepDelta<Rule>(b, h));
      if (!b.usual) [[unlikely]]
        Codec::States::update(b);
    }

    /// begin() of UsualStages.
    template <DType kGradient, MasterWeights kMaster>
    static bool begin(Block& b) {
      const Hyper h = *static_cast<const Hyper*>(b.hyper);
      typename Codec::Headers headers;
      if (!opens(b, h, &headers)) return false;
      const KeepStep<Rule> keep(b, h);
      b.usual = b.gradient_scale == 1.0f
                    ? Codec::advance(b, headers, h, NarrowInputs<Rule, kGradient, kMaster, false>(b), keep)
                    : Codec::advance(b, headers, h, NarrowInputs<Rule, kGradient, kMaster, true>(b), keep);
      return b.usual;
    }

   private:
    static FLASHOPTIM_HD bool opens(const Block& b, const Hyper& h, typename Codec::Headers* headers) {
      return takes(b) && Codec::bounds_hold(h) && headers->open(b);
    }
  };

  template <core::Rule Rule, class Narrow, MasterWeights kMaster>
  [[gnu::noinline]] static void finish_group_generic(Block& b, int group) {
    using Lane = BoundedLane<Pair>;
    const int i = group * kGroup;
    Generic::load_narrow_weights_of<Narrow, kMaster>(b, group, group + 1);
    const Lane w{core::load_f32<Pair>(b.weight + i)}, step{core::load_f32<Pair>(b.delta + i)};
    core::store_f32(b.delta + i,
                    Rule::template decayed<Lane>(w, step, *static_cast<const typename Rule::Hyper*>(b.hyper)).v);
    store_group_generic<Narrow, kMaster>(b, group);
  }

  /// finish() of UsualStages: weights of groups store_begin ... store_end - 1, whose steps stand in delta.
  template <core::Rule Rule, DType kParameter, MasterWeights kMaster>
  static void finish(Block& b) {
    if constexpr (core::has_correction(kMaster)) {
      finish_corrected<Rule, kParameter, kMaster>(b);
    } else {
      finish_alone<Rule, kParameter, kMaster>(b);
    }
  }

  template <core::Rule Rule, DType kParameter, MasterWeights kMaster>
  static FLASHOPTIM_HD void finish_alone(Block& b) {
    using Lane = BoundedLane<Pair>;
    using Parameter = Format<kParameter>;
    const auto h = *static_cast<const typename Rule::Hyper*>(b.hyper);
    void* const parameter = b.parameter;
    const float* const steps = b.delta;
    const char* const ahead = static_cast<const char*>(parameter) + b.ahead * Parameter::kBytes;
    const int end = b.store_end;
    const Parameter format;
    for (int group = b.store_begin; group < end; ++group) {
      const int i = group * kGroup;
      __builtin_prefetch(ahead + i * Parameter::kBytes, 1, 3);
      if constexpr (Parameter::kBytes == 4) __builtin_prefetch(ahead + i * 4 + 64, 1, 3);
      const Pair w = format.load(parameter, i);
      const Pair moved = w - Rule::template decayed<Lane>({w}, {core::load_f32<Pair>(steps + i)}, h).v;
      if constexpr (kParameter == DType::kFloat32) {
        format.store(parameter, i, core::canonical_nan(moved));
      } else {
        const auto rounded = format.round(moved);
        if (format.outside(rounded)) [[unlikely]] {
          finish_group_generic<Rule, typename Parameter::Narrow, kMaster>(b, group);
        } else {
          format.store(parameter, i, rounded);
        }
      }
    }
  }

  template <core::Rule Rule, DType kParameter, MasterWeights kMaster>
  static FLASHOPTIM_HD void finish_corrected(Block& b) {
    using Lane = BoundedLane<Pair>;
    using Parameter = Format<kParameter>;
    using Narrow = typename Parameter::Narrow;
    constexpr int kBits = core::correction_bits(kMaster);
    constexpr bool kNearest = core::is_nearest(kMaster);
    using Dithering = std::conditional_t<kNearest, NoDither, Dither<core::DitherStream::kWeight>>;
    const auto h = *static_cast<const typename Rule::Hyper*>(b.hyper);
    auto* const parameter = static_cast<uint16_t*>(b.parameter);
    void* const corrections = b.correction;
    const float* const steps = b.delta;
    const auto* const parameter_ahead = parameter + b.ahead;
    const auto* const corrections_ahead = static_cast<const char*>(corrections) + b.ahead * (kBits / 8);
    const int end = b.store_end;
    const Dithering dither(b);
    const Parameter format;
    const CorrectionValue<Narrow, kBits> correction_value;
    const CutCorrection<Narrow, kBits, kNearest> cut;
    struct Group {
      Pair narrow, delta;
      Pair rest;  ///< what the narrow value is too small by; or, where corrections are rounded to nearest, the new
                  ///< weight
    };
    const auto update = [&](int group) __attribute__((always_inline)) {
      const int i = group * kGroup;
      __builtin_prefetch(parameter_ahead + i, 1, 3);
      Group of;
      of.narrow = format.load(parameter, i);
      // Their corrections' values, fraction * scale, are exact, so that an fma rounds as the sum does.
      const Pair fraction = {{correction_value.fraction(corrections, i)},
                             {correction_value.fraction(corrections, i + kLanes)}};
      const Pair scale = {{correction_value.scale(of.narrow.lo.v)}, {correction_value.scale(of.narrow.hi.v)}};
      const Pair w = {{_mm512_fmadd_ps(fraction.lo.v, scale.lo.v, of.narrow.lo.v)},
                      {_mm512_fmadd_ps(fraction.hi.v, scale.hi.v, of.narrow.hi.v)}};
      of.delta = Rule::template decayed<Lane>({w}, {core::load_f32<Pair>(steps + i)}, h).v;
      if constexpr (kNearest) {
        of.rest = w - of.delta;
      } else {
        of.rest = {{_mm512_fmsub_ps(fraction.lo.v, scale.lo.v, of.delta.lo.v)},
                   {_mm512_fmsub_ps(fraction.hi.v, scale.hi.v, of.delta.hi.v)}};
      }
      return of;
    };
    const auto store = [&](int group, const Group& of) __attribute__((always_inline)) {
      const int i = group * kGroup;
      const Pair moved = kNearest ? of.rest : of.narrow + of.rest;
      const auto rounded = format.round(moved);
      if (format.outside(rounded) || !have_no_zero(of.delta.lo.v, of.delta.hi.v)) [[unlikely]] {
        return finish_group_generic<Rule, Narrow, kMaster>(b, group);
      }
      format.store(parameter, i, rounded);
      const Pair now = format.widened(rounded);
      const __m512 low = now.lo.v, high = now.hi.v;
      if constexpr (kNearest) {
        cut.store(corrections, i, cut(_mm512_sub_ps(moved.lo.v, low), low), cut(_mm512_sub_ps(moved.hi.v, high), high));
      } else {
        const __m512 rest_low = _mm512_add_ps(_mm512_sub_ps(of.narrow.lo.v, low), of.rest.lo.v);
        const __m512 rest_high = _mm512_add_ps(_mm512_sub_ps(of.narrow.hi.v, high), of.rest.hi.v);
        cut.store(corrections, i, cut(rest_low, low, dither.low(group)), cut(rest_high, high, dither.high(group)));
      }
    };
    // The first half of one group beside the second of the one before: chains of half the length, of which more fit
    // into the processor's window.
    Group next = update(b.store_begin);
    for (int group = b.store_begin; group < end; group += 2) {
      __builtin_prefetch(corrections_ahead + group * kGroup * (kBits / 8), 1, 3);
      if constexpr (kBits == 16) __builtin_prefetch(corrections_ahead + (group + 1) * kGroup * 2, 1, 3);
      const Group first = next;
      const Group second = update(group + 1);
      store(group, first);
      if (group + 2 < end) next = update(group + 2);
      store(group + 1, second);
    }
  }
};

}  // namespace FLASHOPTIM_AVX512
}  // namespace flashoptim::cpu
