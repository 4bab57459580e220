// AVX-512's hot path: bf16 weights and their corrections, loaded, stored, and updated without a stage between.
#pragma once

#include "src/cpu/avx512/pieces-inl.h"

namespace flashoptim::cpu {
inline namespace FLASHOPTIM_AVX512 {

struct HotWeights : HotPieces {
  // ---- weights and gradients ------------------------------------------------------------------------------------

  /// core::correction_value for normal n. c * kInverseHigh is exact, so an fma rounds as the sum does, and half an ULP
  /// of 1 is a power of two.
  template <int kBits>
  struct CorrectionValue {
    __m512 inverse_high = all_f(known<CorrectionConstants<core::BFloat16, kBits>>().inverse_high);
    __m512 inverse_low = all_f(known<CorrectionConstants<core::BFloat16, kBits>>().inverse_low);
    __m512i exponent = all(known<Constants>().exponent);

    FLASHOPTIM_HD __m512 fraction(const void* corrections, int i) const {
      const __m512 c = _mm512_cvtepi32_ps(load(corrections, i));
      return _mm512_fmadd_ps(c, inverse_high, _mm512_mul_ps(c, inverse_low));
    }
    FLASHOPTIM_HD __m512 scale(__m512 n) const { return float_of(_mm512_and_si512(bits_of(n), exponent)); }
    FLASHOPTIM_HD __m512 operator()(__m512 n, const void* corrections, int i) const {
      return _mm512_mul_ps(fraction(corrections, i), scale(n));
    }
    static FLASHOPTIM_HD __m512i load(const void* base, int i) {
      if constexpr (kBits == 8) {
        return _mm512_cvtepi8_epi32(load_16_bytes(static_cast<const uint8_t*>(base) + i));
      } else {
        return _mm512_cvtepi16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + i)));
      }
    }
  };

  /// The correction of core::split_update_dithered, for new narrow values that are not far from 1. Clamped are
  /// integers, which exceed N by roundings alone: by less than 1 of 127, and 3 of 32767.
  template <int kBits, bool kNearest>
  struct CutCorrection {
    static constexpr int kFraction = CorrectionConstants<core::BFloat16, kBits>::kFraction;
    __m512i units = all(known<CorrectionConstants<core::BFloat16, kBits>>().units);
    __m512i above = all(known<CorrectionConstants<core::BFloat16, kBits>>().above),
            below = all(known<CorrectionConstants<core::BFloat16, kBits>>().below);
    __m512i exponent = all(known<Constants>().exponent);
    PackBytes<3> top_bytes;

    /// With kFraction digits behind the point. `rest` is the weight less its new narrow value.
    FLASHOPTIM_HD __m512i operator()(__m512 rest, __m512 narrow, __m512i dither) const {
      const __m512i factor = _mm512_sub_epi32(units, _mm512_and_si512(bits_of(narrow), exponent));
      const __m512 x = _mm512_mul_ps(rest, float_of(factor));
      return _mm512_add_epi32(_mm512_cvttps_epi32(x), _mm512_srli_epi32(dither, 32 - kFraction));
    }
    FLASHOPTIM_HD void store(void* base, int i, __m512i low, __m512i high) const {
      if constexpr (kBits == 8) {
        // Upper halves hold 7 digits behind the point. Twice that, saturated, has floor(x), at most 127, in its top
        // byte.
        const __m256i packed = top_bytes(_mm512_adds_epi16(low, low), _mm512_adds_epi16(high, high));
        store_32_bytes(static_cast<uint8_t*>(base) + i, _mm256_max_epi8(packed, _mm256_set1_epi8(-127)));
      } else {
        const auto clamped = [this](__m512i c) __attribute__((always_inline)) {
          const __m512i inside = _mm512_max_epi32(_mm512_min_epi32(c, above), below);
          return _mm512_add_epi32(inside, inside);
        };
        _mm512_storeu_si512(static_cast<uint16_t*>(base) + i, upper_halves(clamped(low), clamped(high)));
      }
    }
  };

  /// That of core::split. What a weight is rounded by, a single time, is at most half an ULP: there is nothing to
  /// clamp.
  template <int kBits>
  struct CutCorrection<kBits, true> {
    __m512i units = all(known<CorrectionConstants<core::BFloat16, kBits>>().nearest_units);
    __m512i exponent = all(known<Constants>().exponent);
    __m512 magic = all_f(known<Constants>().last_digit_is_one);
    PackBytes<0> low_bytes;

    /// In the low digits.
    FLASHOPTIM_HD __m512i operator()(__m512 rest, __m512 narrow) const {
      const __m512i factor = _mm512_sub_epi32(units, _mm512_and_si512(bits_of(narrow), exponent));
      return bits_of(_mm512_add_ps(_mm512_mul_ps(rest, float_of(factor)), magic));
    }
    FLASHOPTIM_HD void store(void* base, int i, __m512i low, __m512i high) const {
      if constexpr (kBits == 8) {
        store_32_bytes(static_cast<uint8_t*>(base) + i, low_bytes(low, high));
      } else {
        auto* const to = static_cast<uint16_t*>(base) + i;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(low));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kLanes), _mm512_cvtepi32_epi16(high));
      }
    }
  };

  template <MasterWeights kMaster>
  static void load_weights(Block& b) {
    const auto* const parameter = static_cast<const uint16_t*>(b.parameter);
    using Correction = std::conditional_t<core::correction_bits(kMaster) == 8, uint8_t, uint16_t>;
    const auto* const corrections = static_cast<const Correction*>(b.correction);
    const int groups = b.groups;
    const Widen widen;
    const NotNormal not_normal;
    const CorrectionValue<core::correction_bits(kMaster)> correction_value;
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

  template <MasterWeights kMaster>
  [[gnu::noinline]] static void store_group_generic(Block& b, int group) {
    const int begin = b.store_begin, end = b.store_end;
    b.store_begin = group;
    b.store_end = group + 1;
    Generic::store_narrow_weights<core::BFloat16, kMaster>(b);
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
    const CutCorrection<core::correction_bits(kMaster), false> cut;
    for (int group = b.store_begin; group < end; ++group) {
      const int i = group * kGroup;
      const __m512i words = _mm512_loadu_si512(parameter + i);
      const Pair narrow = {{widen.low(words)}, {widen.high(words)}}, delta = core::load_f32<Pair>(b.delta + i);
      const Pair rest = core::load_f32<Pair>(b.correction_value + i) - delta;
      const Pair moved = narrow + rest;
      const __m512i rounded = round_to_words(moved.lo.v, moved.hi.v);
      if (far_from_one(rounded) != 0 || !have_no_zero(delta.lo.v, delta.hi.v)) [[unlikely]] {
        store_group_generic<kMaster>(b, group);
        continue;
      }
      _mm512_storeu_si512(parameter + i, rounded);
      const Pair rounded_narrow = {{widen.low(rounded)}, {widen.high(rounded)}};
      const Pair new_rest = (narrow - rounded_narrow) + rest;
      cut.store(corrections, i, cut(new_rest.lo.v, rounded_narrow.lo.v, dither.low(group)),
                cut(new_rest.hi.v, rounded_narrow.hi.v, dither.high(group)));
    }
  }

  // ---- usual blocks: straight from bf16 gradients to bf16 weights ------------------------------------------------

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
