// AVX-512's hot path: what it has to know of a format of weights or gradients, and of corrections.
#pragma once

#include "src/cpu/avx512/pieces-inl.h"

namespace flashoptim::cpu {
inline namespace FLASHOPTIM_AVX512 {

struct HotFormats : HotPieces {
  // ---- formats --------------------------------------------------------------------------------------------------

  /// Groups of a dtype, from and to memory. Of weights of 16 bits, Words are what they are rounded to, nearest, ties to
  /// even, and outside() which of them the hot path leaves to core's formulas.
  template <DType kDType, bool = true>
  struct Format;

  template <bool kAlways>
  struct Format<DType::kFloat32, kAlways> {
    static constexpr int kBytes = 4;
    FLASHOPTIM_HD Pair load(const void* base, int i) const {
      return core::load_f32<Pair>(static_cast<const float*>(base) + i);
    }
    static FLASHOPTIM_HD void store(void* base, int i, Pair value) {
      core::store_f32(static_cast<float*>(base) + i, value);
    }
  };

  template <bool kAlways>
  struct Format<DType::kBFloat16, kAlways> {
    using Narrow = core::BFloat16;
    using Words = __m512i;
    static constexpr int kBytes = 2;
    Widen widen;
    FarFromOne far_from_one;

    FLASHOPTIM_HD Pair load(const void* base, int i) const {
      return widened(_mm512_loadu_si512(static_cast<const uint16_t*>(base) + i));
    }
    FLASHOPTIM_HD Pair widened(Words words) const { return {{widen.low(words)}, {widen.high(words)}}; }
    static FLASHOPTIM_HD Words round(Pair value) { return round_to_words(value.lo.v, value.hi.v); }
    /// Not between 2^-63 and 2^65. If the old weight was not normal, and the new one is in between, the old was 0 or
    /// subnormal, and its correction, taken for what it is not, is too small to count.
    FLASHOPTIM_HD bool outside(Words words) const { return far_from_one(words) != 0; }
    static FLASHOPTIM_HD void store(void* base, int i, Words words) {
      _mm512_storeu_si512(static_cast<uint16_t*>(base) + i, words);
    }
  };

  template <bool kAlways>
  struct Format<DType::kFloat16, kAlways> {
    using Narrow = core::Float16;
    struct Words {
      __m256i low, high;
    };
    static constexpr int kBytes = 2;
    __m256i one_more = _mm256_set1_epi16(0x0400), exponent = _mm256_set1_epi16(0x7c00);

    static FLASHOPTIM_HD Words words(const void* base, int i) {
      const auto* const p = static_cast<const uint16_t*>(base) + i;
      return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kLanes))};
    }
    FLASHOPTIM_HD Pair load(const void* base, int i) const { return widened(words(base, i)); }
    static FLASHOPTIM_HD Pair widened(Words words) {
      return {{_mm512_cvtph_ps(words.low)}, {_mm512_cvtph_ps(words.high)}};
    }
    static FLASHOPTIM_HD Words round(Pair value) {
      return {_mm512_cvtps_ph(value.lo.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
              _mm512_cvtps_ph(value.hi.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    /// Infinities and NaN, whose exponent one more makes 0.
    FLASHOPTIM_HD bool outside(Words words) const {
      return (_mm256_testn_epi16_mask(_mm256_add_epi16(words.low, one_more), exponent) |
              _mm256_testn_epi16_mask(_mm256_add_epi16(words.high, one_more), exponent)) != 0;
    }
    static FLASHOPTIM_HD void store(void* base, int i, Words words) {
      auto* const p = static_cast<uint16_t*>(base) + i;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words.low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), words.high);
    }
  };

  // ---- corrections ----------------------------------------------------------------------------------------------

  /// core::scale_bits. Of bf16, for normal numbers: their exponent.
  template <class Narrow>
  struct CorrectionScale {
    static constexpr bool kHasSubnormals = Narrow::kBias != 127;
    __m512i exponent = all(known<Constants>().exponent);
    __m512i smallest = all(static_cast<uint32_t>(1 - Narrow::kBias + 127) << 23);
    FLASHOPTIM_HD __m512i operator()(__m512 n) const {
      const __m512i bits = _mm512_and_si512(bits_of(n), exponent);
      if constexpr (kHasSubnormals) return _mm512_max_epi32(bits, smallest);
      return bits;
    }
  };

  /// core::correction_value. c * kInverseHigh is exact, so an fma rounds as the sum does, and half an ULP
  /// of 1 is a power of two.
  template <class Narrow, int kBits>
  struct CorrectionValue {
    __m512 inverse_high = all_f(known<CorrectionConstants<Narrow, kBits>>().inverse_high);
    __m512 inverse_low = all_f(known<CorrectionConstants<Narrow, kBits>>().inverse_low);
    CorrectionScale<Narrow> scale_of;

    FLASHOPTIM_HD __m512 fraction(const void* corrections, int i) const {
      const __m512 c = _mm512_cvtepi32_ps(load(corrections, i));
      return _mm512_fmadd_ps(c, inverse_high, _mm512_mul_ps(c, inverse_low));
    }
    FLASHOPTIM_HD __m512 scale(__m512 n) const { return float_of(scale_of(n)); }
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
  template <class Narrow, int kBits, bool kNearest>
  struct CutCorrection {
    static constexpr int kFraction = CorrectionConstants<Narrow, kBits>::kFraction;
    __m512i units = all(known<CorrectionConstants<Narrow, kBits>>().units);
    __m512i above = all(known<CorrectionConstants<Narrow, kBits>>().above),
            below = all(known<CorrectionConstants<Narrow, kBits>>().below);
    CorrectionScale<Narrow> scale_of;
    PackBytes<3> top_bytes;

    /// With kFraction digits behind the point. `rest` is the weight less its new narrow value.
    FLASHOPTIM_HD __m512i operator()(__m512 rest, __m512 narrow, __m512i dither) const {
      const __m512i factor = _mm512_sub_epi32(units, scale_of(narrow));
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
  template <class Narrow, int kBits>
  struct CutCorrection<Narrow, kBits, true> {
    __m512i units = all(known<CorrectionConstants<Narrow, kBits>>().nearest_units);
    CorrectionScale<Narrow> scale_of;
    __m512 magic = all_f(known<Constants>().last_digit_is_one);
    PackBytes<0> low_bytes;

    /// In the low digits.
    FLASHOPTIM_HD __m512i operator()(__m512 rest, __m512 narrow) const {
      const __m512i factor = _mm512_sub_epi32(units, scale_of(narrow));
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
};

}  // namespace FLASHOPTIM_AVX512
}  // namespace flashoptim::cpu
