// AVX2's hot path: what it has to know of a format of parameters or gradients, and of corrections.
#pragma once

#include "src/cpu/avx2/pieces-inl.h"

namespace flashoptim::cpu::avx2 {

/// Halves of groups of a dtype, from and to memory. `i` is the half's first element; 16 further on stands the rest.
template <DType kDType>
struct Format;

template <>
struct Format<DType::kFloat32> : Pieces {
  static constexpr int kBytes = 4;
  static FLASHOPTIM_HD Pair load(const void* base, int i) {
    const auto* const p = static_cast<const float*>(base) + i;
    return {{float_of(load_halves(p, p + 16))}, {float_of(load_halves(p + 4, p + 20))}};
  }
  static FLASHOPTIM_HD void store(void* base, int i, Pair value) {
    auto* const p = static_cast<float*>(base) + i;
    store_halves(p, p + 16, bits_of(value.lo.v));
    store_halves(p + 4, p + 20, bits_of(value.hi.v));
  }
};

template <>
struct Format<DType::kBFloat16> : Pieces {
  using Narrow = core::BFloat16;
  static constexpr int kBytes = 2;
  static FLASHOPTIM_HD __m256i words(const void* base, int i) {
    const auto* const p = static_cast<const uint16_t*>(base) + i;
    return load_halves(p, p + 16);
  }
  static FLASHOPTIM_HD Pair widen(__m256i words) {
    const __m256i zero = _mm256_setzero_si256();
    return {{float_of(_mm256_unpacklo_epi16(zero, words))}, {float_of(_mm256_unpackhi_epi16(zero, words))}};
  }
  static FLASHOPTIM_HD Pair load(const void* base, int i) { return widen(words(base, i)); }

  /// Of weights that are not normal.
  static FLASHOPTIM_HD __m256i not_normal(const void* base, int i) {
    // Exponents 0 and 255, which one more makes 1 and 0.
    const __m256i sum = _mm256_add_epi16(words(base, i), all_words(0x0080));
    return _mm256_cmpeq_epi16(_mm256_and_si256(sum, all_words(0x7f00)), _mm256_setzero_si256());
  }

  /// The scale of a correction, core::scale_bits: of normal numbers their exponent. If the old weight was not normal,
  /// and the new is, and not far from 1, the old was 0 or subnormal, and its correction is too small to count.
  __m256i exponent = held(0x7f800000u);
  FLASHOPTIM_HD __m256i scale(__m256 narrow) const { return _mm256_and_si256(bits_of(narrow), exponent); }

  /// New weights: the pair is `value` rounded to nearest, ties to even.
  struct Rounded {
    Pair value;
    __m256i words;
    FLASHOPTIM_HD void store(void* base, int i) const {
      auto* const p = static_cast<uint16_t*>(base) + i;
      store_halves(p, p + 16, words);
    }
  };
  /// In `outside` those that the hot path leaves to core's formulas: not between 2^-63 and 2^65 in magnitude.
  FLASHOPTIM_HD __m256i flags(const Rounded& to) const { return _mm256_sub_epi16(to.words, exponent_of_64); }
  __m256i outside = held_words(0x4000), exponent_of_64 = held_words(64 << 7);
  __m256i last_digit = held((16u << 23) | 0x00400000u);

  FLASHOPTIM_HD Rounded round(Pair value) const {
    const auto rounded = [this](__m256 x) __attribute__((always_inline)) {
      // 1.5 * 2^16 times the power of two below x: the last digit of a sum with it is bf16's of x. (Where that
      // overflows, the result is x itself, or a NaN.)
      const __m256 magic = float_of(_mm256_add_epi32(_mm256_and_si256(bits_of(x), exponent), last_digit));
      return _mm256_sub_ps(_mm256_add_ps(x, magic), magic);
    };
    const Pair to = {{rounded(value.lo.v)}, {rounded(value.hi.v)}};
    return {to, _mm256_packus_epi32(_mm256_srli_epi32(bits_of(to.lo.v), 16), _mm256_srli_epi32(bits_of(to.hi.v), 16))};
  }
};

template <>
struct Format<DType::kFloat16> : Pieces {
  using Narrow = core::Float16;
  static constexpr int kBytes = 2;
  static FLASHOPTIM_HD Pair load(const void* base, int i) {
    const auto* const p = static_cast<const uint16_t*>(base) + i;
    const auto widen = [](const uint16_t* from) __attribute__((always_inline)) {
      const __m128 low = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
      return _mm256_cvtph_ps(_mm_castps_si128(_mm_loadh_pi(low, reinterpret_cast<const __m64*>(from + 16))));
    };
    return {{widen(p)}, {widen(p + 4)}};
  }
  /// No finite weight is unusual: the scale of subnormals is that of the smallest normal numbers.
  __m256i exponent = held(0x7f800000u), smallest = held(static_cast<uint32_t>(1 - Narrow::kBias + 127) << 23);
  FLASHOPTIM_HD __m256i scale(__m256 narrow) const {
    return _mm256_max_epi32(_mm256_and_si256(bits_of(narrow), exponent), smallest);
  }
  struct Rounded {
    Pair value;
    __m128i low, high;  ///< of the lower and the upper vector
    FLASHOPTIM_HD void store(void* base, int i) const {
      auto* const p = static_cast<uint16_t*>(base) + i;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi64(low, high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm_unpackhi_epi64(low, high));
    }
  };
  /// In `outside` infinities and NaN.
  FLASHOPTIM_HD __m256i flags(const Rounded& to) const {
    return _mm256_add_epi16(_mm256_and_si256(_mm256_set_m128i(to.high, to.low), magnitude), one_more);
  }
  __m256i outside = held_words(0x8000), magnitude = held_words(0x7fff), one_more = held_words(0x0400);
  static FLASHOPTIM_HD Rounded round(Pair value) {
    Rounded to;
    to.low = _mm256_cvtps_ph(value.lo.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    to.high = _mm256_cvtps_ph(value.hi.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    to.value = {{_mm256_cvtph_ps(to.low)}, {_mm256_cvtph_ps(to.high)}};
    return to;
  }
};

/// Corrections of kBits beside weights of a narrow format.
template <DType kDType, int kBits>
struct Corrections : Pieces {
  using Of = Format<kDType>;
  /// Corrections are read into the top bits of lanes, which extends their sign.
  static constexpr CorrectionConstants<typename Of::Narrow, kBits, 32 - kBits> kConstants{};
  static constexpr int kFraction = kConstants.kFraction;
  Of format;
  __m256i units = held(kConstants.units), nearest_units = held(kConstants.nearest_units);
  __m256i least = kBits == 8 ? held_bytes(0x81) : held_words(0x8001);
  __m256 inverse_high = float_of(held(bits_of(all_f(kConstants.inverse_high))));
  __m256 inverse_low = float_of(held(bits_of(all_f(kConstants.inverse_low))));

  struct OfGroup {
    __m256i bytes;     ///< of 8 bits
    __m256i words[2];  ///< of 16, a half each
  };
  /// Those of a group whose first element is i.
  static FLASHOPTIM_HD OfGroup load(const void* base, int i) {
    OfGroup of;
    if constexpr (kBits == 8) {
      of.bytes = Pieces::load(static_cast<const char*>(base) + i);
    } else {
      const auto* const p = static_cast<const uint16_t*>(base) + i;
      of.words[0] = load_halves(p, p + 16);
      of.words[1] = load_halves(p + 8, p + 24);
    }
    return of;
  }
  /// Of a group, as words of its halves; saturated at N, which leaves what is below -N.
  FLASHOPTIM_HD void store(void* base, int i, __m256i first, __m256i second) const {
    if constexpr (kBits == 8) {
      Pieces::store(static_cast<char*>(base) + i, _mm256_max_epi8(_mm256_packs_epi16(first, second), least));
    } else {
      auto* const p = static_cast<uint16_t*>(base) + i;
      store_halves(p, p + 16, _mm256_max_epi16(first, least));
      store_halves(p + 8, p + 24, _mm256_max_epi16(second, least));
    }
  }

  /// core::correction_value's parts, whose product is exact. c * kInverseHigh is exact, so an fma rounds as the sum
  /// does, and half an ULP of 1 is a power of two.
  FLASHOPTIM_HD Pair fraction(const OfGroup& of, int half) const {
    if constexpr (kBits == 8) {
      return {{fraction_of(spread_bytes<3>(of.bytes, 2 * half))},
              {fraction_of(spread_bytes<3>(of.bytes, 2 * half + 1))}};
    } else {
      const __m256i zero = _mm256_setzero_si256();
      return {{fraction_of(_mm256_unpacklo_epi16(zero, of.words[half]))},
              {fraction_of(_mm256_unpackhi_epi16(zero, of.words[half]))}};
    }
  }
  FLASHOPTIM_HD __m256 fraction_of(__m256i correction) const {
    const __m256 c = _mm256_cvtepi32_ps(correction);
    return _mm256_fmadd_ps(c, inverse_high, _mm256_mul_ps(c, inverse_low));
  }
  FLASHOPTIM_HD Pair scale(Pair narrow) const {
    return {{float_of(format.scale(narrow.lo.v))}, {float_of(format.scale(narrow.hi.v))}};
  }

  /// The correction of core::split_update_dithered: clamped are integers, which exceed N by roundings alone: by less
  /// than 1 of 127, and 3 of 32767.
  FLASHOPTIM_HD __m256i cut(__m256 rest, __m256 narrow, __m256i dither) const {
    const __m256i factor = _mm256_sub_epi32(units, format.scale(narrow));
    const __m256i x = _mm256_cvttps_epi32(_mm256_mul_ps(rest, float_of(factor)));
    return _mm256_srai_epi32(_mm256_add_epi32(x, _mm256_srli_epi32(dither, 32 - kFraction)), kFraction);
  }
  /// That of core::split. What a weight is rounded by, a single time, is at most half an ULP: there is nothing to
  /// clamp.
  FLASHOPTIM_HD __m256i cut_nearest(__m256 rest, __m256 narrow) const {
    const __m256i factor = _mm256_sub_epi32(nearest_units, format.scale(narrow));
    return _mm256_cvtps_epi32(_mm256_mul_ps(rest, float_of(factor)));
  }
};

}  // namespace flashoptim::cpu::avx2
