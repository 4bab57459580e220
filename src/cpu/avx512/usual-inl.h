// AVX-512's hot path: usual blocks, straight from bf16 gradients to bf16 weights without a stage between.
#pragma once

#include "src/cpu/avx512/weights-inl.h"

namespace flashoptim::cpu {
inline namespace FLASHOPTIM_AVX512 {

struct HotUsual : HotWeights {
  /// Reads a group's gradient, and its weight where the rule takes weight decay into the gradient.
  template <core::Rule Rule, MasterWeights kMaster, bool kScaled>
  struct NarrowInputs {
    const uint16_t* gradient;
    const uint16_t* parameter;
    const void* corrections;
    const uint16_t* gradient_ahead;
    __m512 scale;
    Widen widen;
    NotNormal not_normal;
    CorrectionValue<core::correction_bits(kMaster)> correction_value;
    __mmask32 unusual = 0;  ///< weights whose corrections have been taken for what they are not

    explicit FLASHOPTIM_HD NarrowInputs(const Block& b)
        : gradient(static_cast<const uint16_t*>(b.gradient)),
          parameter(static_cast<const uint16_t*>(b.parameter)),
          corrections(b.correction),
          gradient_ahead(gradient + b.ahead),
          scale(all_f(b.gradient_scale)) {}

    FLASHOPTIM_HD void operator()(int group, Pair* w, Pair* g) {
      const int i = group * kGroup;
      __builtin_prefetch(gradient_ahead + i, 0, 3);
      const __m512i words = _mm512_loadu_si512(gradient + i);
      *g = {{widen.low(words)}, {widen.high(words)}};
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
    template <MasterWeights kMaster>
    static bool begin(Block& b) {
      const Hyper h = *static_cast<const Hyper*>(b.hyper);
      typename Codec::Headers headers;
      if (!opens(b, h, &headers)) return false;
      const KeepStep<Rule> keep(b, h);
      b.usual = b.gradient_scale == 1.0f ? Codec::advance(b, headers, h, NarrowInputs<Rule, kMaster, false>(b), keep)
                                         : Codec::advance(b, headers, h, NarrowInputs<Rule, kMaster, true>(b), keep);
      return b.usual;
    }

   private:
    static FLASHOPTIM_HD bool opens(const Block& b, const Hyper& h, typename Codec::Headers* headers) {
      return takes(b) && Codec::bounds_hold(h) && headers->open(b);
    }
  };

  template <core::Rule Rule, MasterWeights kMaster>
  [[gnu::noinline]] static void finish_group_generic(Block& b, int group) {
    using Lane = BoundedLane<Pair>;
    const int i = group * kGroup;
    Generic::load_narrow_weights_of<core::BFloat16, kMaster>(b, group, group + 1);
    const Lane w{core::load_f32<Pair>(b.weight + i)}, step{core::load_f32<Pair>(b.delta + i)};
    core::store_f32(b.delta + i,
                    Rule::template decayed<Lane>(w, step, *static_cast<const typename Rule::Hyper*>(b.hyper)).v);
    store_group_generic<kMaster>(b, group);
  }

  /// finish() of UsualStages: weights of groups store_begin ... store_end - 1, whose steps stand in delta.
  template <core::Rule Rule, MasterWeights kMaster>
  static void finish(Block& b) {
    using Lane = BoundedLane<Pair>;
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
    const Widen widen;
    const FarFromOne far_from_one;
    const CorrectionValue<kBits> correction_value;
    const CutCorrection<kBits, kNearest> cut;
    struct Group {
      Pair narrow, delta;
      Pair rest;  ///< what the narrow value is too small by; or, where corrections are rounded to nearest, the new
                  ///< weight
    };
    const auto update = [&](int group) __attribute__((always_inline)) {
      const int i = group * kGroup;
      __builtin_prefetch(parameter_ahead + i, 1, 3);
      const __m512i words = _mm512_loadu_si512(parameter + i);
      Group of;
      of.narrow = {{widen.low(words)}, {widen.high(words)}};
      // Their corrections' values, fraction * scale, are exact, so that an fma rounds as the sum does. They are wrong
      // where a narrow value is not normal. If the new one is normal nevertheless, and not far from 1, the old was 0 or
      // subnormal, and its correction is too small to count.
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
      const __m512i rounded = round_to_words(moved.lo.v, moved.hi.v);
      if (far_from_one(rounded) != 0 || !have_no_zero(of.delta.lo.v, of.delta.hi.v)) [[unlikely]] {
        return finish_group_generic<Rule, kMaster>(b, group);
      }
      _mm512_storeu_si512(parameter + i, rounded);
      const __m512 low = widen.low(rounded), high = widen.high(rounded);
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
