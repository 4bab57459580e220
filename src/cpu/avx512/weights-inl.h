// AVX-512's hot path: bf16 weights and their corrections, and gradients, loaded and stored.
#pragma once

#include "src/cpu/avx512/pieces-inl.h"

namespace flashoptim::cpu {
inline namespace FLASHOPTIM_AVX512 {

struct HotWeights : HotPieces {
  template <int kBits>
  struct CorrectionConstants {
    static constexpr int kFraction = kBits == 8 ? 23 : 15;
    static constexpr uint32_t kLargest = static_cast<uint32_t>(core::Correction<kBits>::kMax);
    float inverse_high = core::Correction<kBits>::kInverseHigh * core::half_ulp_of_unit_scale<core::BFloat16>();
    float inverse_low = core::Correction<kBits>::kInverseLow * core::half_ulp_of_unit_scale<core::BFloat16>();
    /// Pattern of twice_inverse_scale(0) * kUnits: split_update_dithered's two factors as one, which loses nothing
    /// where the scale is not far from 1.
    uint32_t units = std::bit_cast<uint32_t>(static_cast<float>(1 << core::BFloat16::kMantissaBits) *
                                             core::Correction<kBits>::kMax * static_cast<float>(1 << kFraction)) +
                     (128u << 23);
    uint32_t above = ((kLargest + 1u) << kFraction) - 1u, below = 0u - (kLargest << kFraction);
  };

  /// core::correction_value for normal n. c * kInverseHigh is exact, so an fma rounds as the sum does, and half an ULP
  /// of 1 is a power of two.
  template <int kBits>
  struct CorrectionValue {
    __m512 inverse_high = all_f(known<CorrectionConstants<kBits>>().inverse_high);
    __m512 inverse_low = all_f(known<CorrectionConstants<kBits>>().inverse_low);
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
    static constexpr int kFraction = CorrectionConstants<kBits>::kFraction;
    __m512i units = all(known<CorrectionConstants<kBits>>().units);
    __m512i above = all(known<CorrectionConstants<kBits>>().above),
            below = all(known<CorrectionConstants<kBits>>().below);
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
    __m512i units = all(known<CorrectionConstants<kBits>>().units -
                        (static_cast<uint32_t>(CorrectionConstants<kBits>::kFraction) << 23));
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
};

}  // namespace FLASHOPTIM_AVX512
}  // namespace flashoptim::cpu
