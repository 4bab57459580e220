// The hot path of AVX-512: passes over a block in about half of the operations that core's formulas compile to. The
// same bits: every step is an identity of core's, said beside it, under conditions that are tested before anything is
// written. Where one fails (zeros, subnormals, infinities, NaN, absurd magnitudes), the group or the block takes core's
// formulas in loops-inl.h. tests/kernels compares both with the scalar loops.
//
// Compiled once per instruction set: with VBMI and BF16 (Ice Lake, Sapphire Rapids, Zen 4 and later) a few sequences
// are shorter. Costs named here are those of Zen 5, which starts four simple operations a cycle, but two shuffles or
// shifts.
#pragma once

#include <immintrin.h>

#include <bit>

#include "src/cpu/lanes_avx512-inl.h"
#include "src/cpu/lanes_pair-inl.h"
//
#include "src/cpu/loops-inl.h"

namespace flashoptim::cpu {

/// F for a rule whose bounds are known to change nothing.
template <class F>
struct BoundedLane {
  F v;

  friend FLASHOPTIM_HD BoundedLane operator+(BoundedLane a, BoundedLane b) { return {a.v + b.v}; }
  friend FLASHOPTIM_HD BoundedLane operator-(BoundedLane a, BoundedLane b) { return {a.v - b.v}; }
  friend FLASHOPTIM_HD BoundedLane operator*(BoundedLane a, BoundedLane b) { return {a.v * b.v}; }
  friend FLASHOPTIM_HD BoundedLane operator/(BoundedLane a, BoundedLane b) { return {a.v / b.v}; }
  friend FLASHOPTIM_HD BoundedLane sqrt(BoundedLane a) { return {core::sqrt(a.v)}; }
  /// Rules name the bound first.
  friend FLASHOPTIM_HD BoundedLane max(BoundedLane, BoundedLane a) { return a; }
  friend FLASHOPTIM_HD BoundedLane min(BoundedLane, BoundedLane a) { return a; }
};

}  // namespace flashoptim::cpu

namespace flashoptim::core {

template <class F>
struct LaneTraits<cpu::BoundedLane<F>> {
  using Int = IntOf<F>;
  using Mask = MaskOf<F>;
  static constexpr int kWidth = LaneTraits<F>::kWidth;
  static FLASHOPTIM_HD cpu::BoundedLane<F> splat(float value) { return {core::splat<F>(value)}; }
};

}  // namespace flashoptim::core

namespace flashoptim::cpu {

#if defined(__AVX512VBMI__)
/// |x| / G of momentum codes of K = 6 as bf16: 128 low bytes, 128 high bytes.
struct Magnitudes {
  alignas(64) uint8_t bytes[256];
  constexpr Magnitudes() : bytes() {
    for (uint32_t code = 0; code < 128; ++code) {
      const float value =
          std::bit_cast<float>((code << core::MuLawCodec<6>::kShift) | core::MuLawCodec<6>::kTwoBits) - 2.0f;
      const uint32_t bits = std::bit_cast<uint32_t>(value);
      bytes[code] = static_cast<uint8_t>(bits >> 16);
      bytes[128 + code] = static_cast<uint8_t>(bits >> 24);
    }
  }
  FLASHOPTIM_HD __m512i load(int quarter) const { return _mm512_load_si512(bytes + 64 * quarter); }
};
inline constexpr Magnitudes kMagnitudes{};
#endif

inline namespace FLASHOPTIM_AVX512 {

struct HotAvx512 {
  using F = core::Avx512Float;  ///< half a group; or, of headers, 16 groups
  using I = core::Avx512Int;
  using Pair = core::PairFloat<F>;
  using Generic = Loops<Pair>;
  static constexpr int kGroup = static_cast<int>(kGroupSize);
  static constexpr int kLanes = core::LaneTraits<F>::kWidth;
  static_assert(kBlockGroups % kLanes == 0 && kGroup == 2 * kLanes);

  static FLASHOPTIM_HD __m512i all(uint32_t bits) { return _mm512_set1_epi32(static_cast<int>(bits)); }
  static FLASHOPTIM_HD __m512 all_f(float value) { return _mm512_set1_ps(value); }
  static FLASHOPTIM_HD __m512i bits_of(__m512 a) { return _mm512_castps_si512(a); }
  static FLASHOPTIM_HD __m512 float_of(__m512i a) { return _mm512_castsi512_ps(a); }
  /// a & b | c.
  static FLASHOPTIM_HD __m512i and_or(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0xea);
  }

  // ---- constants ------------------------------------------------------------------------------------------------
  //
  // Passes load their constants before their loops, from memory that the compiler does not know: constants that it
  // knows it makes anew in every iteration, by two operations each, as soon as registers are short. (The others it
  // reads again.)

  struct Constants {
    alignas(64) uint16_t low_places[32];    ///< 0 0 0 1 0 2 ...: of words in the upper halves of lanes
    alignas(64) uint16_t high_places[32];   ///< 16 16 16 17 ...
    alignas(64) uint16_t upper_halves[32];  ///< 1 3 5 ...
    alignas(64) uint8_t lowest_bytes[64];   ///< 0 4 8 ...
    alignas(64) uint8_t low_pairs[64];      ///< - - 0 64, - - 1 65, ...
    alignas(64) uint8_t high_pairs[64];     ///< - - 16 80, ...
    uint32_t exponent = 0x7f800000u, sign = 0x80000000u;
    uint32_t half_down = (255u << 23) - 1u - (127u << 22);  ///< inverse_root_scale's
    uint16_t one_more = 0x0080, exponent_but_last = 0x7f00;
    uint16_t exponent_of_64 = 64 << 7, upper_exponents = 0x4000;
    float two = 2.0f, last_digit_is_one = 0x1.8p23f;

    constexpr Constants() : low_places(), high_places(), upper_halves(), lowest_bytes(), low_pairs(), high_pairs() {
      for (uint32_t i = 0; i < 32; ++i) {
        low_places[i] = static_cast<uint16_t>(i / 2);
        high_places[i] = static_cast<uint16_t>(16 + i / 2);
        upper_halves[i] = static_cast<uint16_t>(2 * i + 1);
        lowest_bytes[i] = static_cast<uint8_t>(4 * i);
      }
      for (uint32_t i = 0; i < 64; ++i) {
        low_pairs[i] = static_cast<uint8_t>(i / 4 + 64 * (i % 2));
        high_pairs[i] = static_cast<uint8_t>(low_pairs[i] + 16);
      }
    }
  };
  struct PaperConstants {
    float inverse_high = core::PaperVariance::kInverse255High, inverse_low = core::PaperVariance::kInverse255Low;
    float n = 127.0f, two_n = 254.0f, half = 0.5f, n_and_half = 128.5f;
  };
  template <class T>
  static FLASHOPTIM_HD const T& known() {
    static constexpr T kConstants{};
    const T* p = &kConstants;
    asm("" : "+r"(p));
    return *p;
  }
  template <class T>
  static FLASHOPTIM_HD __m512i vector(const T& array) {
    static_assert(sizeof(T) == 64);
    return _mm512_load_si512(&array);
  }

  /// One number a group.
  struct PerGroup {
    alignas(64) uint32_t bits[kBlockGroups];
    FLASHOPTIM_HD void store(int first, __m512i value) { _mm512_store_si512(bits + first, value); }
    FLASHOPTIM_HD __m512i spread(int group) const { return all(bits[group]); }
  };
  /// Headers are handled one group per lane, so the passes over states take blocks of 16 or 32 groups.
  static FLASHOPTIM_HD bool takes(const Block& b) { return b.groups % kLanes == 0; }
  /// body(first) for the first of every 16 groups.
  template <class Body>
  static FLASHOPTIM_HD void for_each_header(const Block& b, Body body) {
    for (int first = 0; first < b.groups; first += kLanes) body(first);
  }

  // ---- bf16 -----------------------------------------------------------------------------------------------------

  /// 32 bf16 numbers as fp32, each word in the upper half of a lane.
  struct Widen {
    __m512i low_places = vector(known<Constants>().low_places), high_places = vector(known<Constants>().high_places);
    FLASHOPTIM_HD __m512 low(__m512i words) const {
      return float_of(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, low_places, words));
    }
    FLASHOPTIM_HD __m512 high(__m512i words) const {
      return float_of(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, high_places, words));
    }
  };

  /// Which words are zero, subnormal, infinite or NaN: exponents 0 and 255, which one more makes 1 and 0.
  struct NotNormal {
    __m512i one_more = _mm512_set1_epi16(static_cast<int16_t>(known<Constants>().one_more));
    __m512i exponent_but_last = _mm512_set1_epi16(static_cast<int16_t>(known<Constants>().exponent_but_last));
    FLASHOPTIM_HD __mmask32 operator()(__m512i words) const {
      return _mm512_testn_epi16_mask(_mm512_add_epi16(words, one_more), exponent_but_last);
    }
  };

  /// Which words are not between 2^-63 and 2^65 in magnitude: exponents but 64 ... 191.
  struct FarFromOne {
    __m512i exponent_of_64 = _mm512_set1_epi16(static_cast<int16_t>(known<Constants>().exponent_of_64));
    __m512i upper_exponents = _mm512_set1_epi16(static_cast<int16_t>(known<Constants>().upper_exponents));
    FLASHOPTIM_HD __mmask32 operator()(__m512i words) const {
      return _mm512_test_epi16_mask(_mm512_sub_epi16(words, exponent_of_64), upper_exponents);
    }
  };

  static FLASHOPTIM_HD __m512i upper_halves(__m512i low, __m512i high) {
    return _mm512_permutex2var_epi16(low, vector(known<Constants>().upper_halves), high);
  }

  /// Nearest, ties to even, where the result is normal. (Of others, only that they are not.)
  static FLASHOPTIM_HD __m512i round_to_words(__m512 low, __m512 high) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#else
    const auto rounded = [](__m512i bits) __attribute__((always_inline)) {
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all(1u));
      return _mm512_add_epi32(_mm512_add_epi32(bits, all(0x7fffu)), odd);
    };
    return upper_halves(rounded(bits_of(low)), rounded(bits_of(high)));
#endif
  }

  static FLASHOPTIM_HD bool have_no_zero(__m512 low, __m512 high) {
    const __m512 zero = _mm512_setzero_ps();
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(low, zero, _CMP_NEQ_UQ), high, zero, _CMP_NEQ_UQ) == 0xffffu;
  }

  // ---- bytes ----------------------------------------------------------------------------------------------------

  static FLASHOPTIM_HD __m128i load_16_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  static FLASHOPTIM_HD void store_32_bytes(uint8_t* p, __m256i bytes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
  }

  /// One byte of each lane of two vectors; 0 is the lowest.
  template <int kByte>
  struct PackBytes {
#if defined(__AVX512VBMI__)
    __m512i places = _mm512_add_epi8(vector(known<Constants>().lowest_bytes), _mm512_set1_epi8(kByte));
    FLASHOPTIM_HD __m256i operator()(__m512i low, __m512i high) const {
      return _mm512_castsi512_si256(_mm512_permutex2var_epi8(low, places, high));
    }
#else
    FLASHOPTIM_HD __m256i operator()(__m512i low, __m512i high) const {
      return _mm256_set_m128i(_mm512_cvtepi32_epi8(_mm512_srli_epi32(high, 8 * kByte)),
                              _mm512_cvtepi32_epi8(_mm512_srli_epi32(low, 8 * kByte)));
    }
#endif
  };

  // ---- dither ---------------------------------------------------------------------------------------------------

  /// Words of one stream over the groups of a block.
  template <core::DitherStream kStream>
  struct Dither {
    PerGroup start;
    __m512i lanes_low = core::lane_multiples<F>(core::kDitherLaneStep<kStream>).v;
    __m512i lanes_high = _mm512_add_epi32(lanes_low, all(16u * core::kDitherLaneStep<kStream>));

    explicit FLASHOPTIM_HD Dither(const Block& b) {
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            start.store(first,
                        core::dither_group_start<kStream, F>(b.dither, core::load_u32<F>(b.group_hash + first)).v);
          });
    }
    FLASHOPTIM_HD __m512i low(int group) const { return _mm512_add_epi32(lanes_low, start.spread(group)); }
    FLASHOPTIM_HD __m512i high(int group) const { return _mm512_add_epi32(lanes_high, start.spread(group)); }
  };

  struct NoDither {
    explicit FLASHOPTIM_HD NoDither(const Block&) {}
  };

  /// Asks for the memory of two arrays of codes, 64 bytes of one or the other a group.
  struct CodesAhead {
    const char* of[kMaxStates];
    explicit FLASHOPTIM_HD CodesAhead(const Block& b)
        : of{static_cast<const char*>(b.states[0]) + b.ahead, static_cast<const char*>(b.states[1]) + b.ahead} {}
    FLASHOPTIM_HD void ask(int group) const { __builtin_prefetch(of[group & 1] + (group & ~1) * kGroup, 1, 3); }
  };

  // ---- extremes of groups ---------------------------------------------------------------------------------------

  struct Largest {
    FLASHOPTIM_HD __m512i operator()(__m512i a, __m512i b) const { return _mm512_max_epi32(a, b); }
  };
  struct LargestUnsigned {
    FLASHOPTIM_HD __m512i operator()(__m512i a, __m512i b) const { return _mm512_max_epu32(a, b); }
  };
  struct Smallest {
    FLASHOPTIM_HD __m512i operator()(__m512i a, __m512i b) const { return _mm512_min_epi32(a, b); }
  };
  /// Rows of four groups are reduced in registers, the rest when all have come.
  template <class Pick>
  struct Extremes {
    alignas(64) uint32_t quarters[kBlockGroups / 4 * kLanes];

    FLASHOPTIM_HD void store(int first, const __m512i (&rows)[4]) {
      _mm512_store_si512(quarters + first / 4 * kLanes,
                         core::reduce_4_rows(rows[0], rows[1], rows[2], rows[3], Pick{}));
    }
    FLASHOPTIM_HD I of_groups(int first) const {
      return core::reduce_quarters(quarters + first * (kLanes / 4), Pick{});
    }
  };

  // ---- weights and gradients ------------------------------------------------------------------------------------

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
  /// integers, which exceed N by roundings alone, and by less than one.
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
      Generic::ask_ahead(b, parameter, i);
      Generic::ask_ahead(b, corrections, i);
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
      Generic::ask_ahead(b, gradient, i);
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
  template <class Rule, MasterWeights kMaster, bool kScaled>
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
  template <class Rule>
  struct KeepStep {
    typename Rule::Hyper h;
    float* steps;

    FLASHOPTIM_HD KeepStep(Block& b, const typename Rule::Hyper& hyper) : h(hyper), steps(b.delta) {}
    FLASHOPTIM_HD void operator()(int group, const BoundedLane<Pair> (&s)[kMaxStates]) const {
      core::store_f32(steps + group * kGroup, Rule::template step<BoundedLane<Pair>>(s, h).v);
    }
  };
  template <class Rule>
  struct KeepDelta {
    typename Rule::Hyper h;
    float* deltas;
    const float* weight;

    FLASHOPTIM_HD KeepDelta(Block& b, const typename Rule::Hyper& hyper)
        : h(hyper), deltas(b.delta), weight(b.weight) {}
    FLASHOPTIM_HD void operator()(int group, const BoundedLane<Pair> (&s)[kMaxStates]) const {
      using Lane = BoundedLane<Pair>;
      const Lane w{core::load_f32<Pair>(weight + group * kGroup)};
      core::store_f32(deltas + group * kGroup, Rule::template decayed<Lane>(w, Rule::template step<Lane>(s, h), h).v);
    }
  };

  template <class Rule, MasterWeights kMaster>
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
  template <class Rule, MasterWeights kMaster>
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

  // ---- states of the default codec: momentum relative to a variance ---------------------------------------------

  template <class Rule>
  struct RelativeHot {
    using States = Generic::DefaultStates<Rule>;
    using MuLaw = typename core::SignedCodec<Rule::kStates[0].mantissa_bits>::type;
    using Hyper = typename Rule::Hyper;
    using Lane = BoundedLane<Pair>;
    static constexpr uint32_t kSmallestG = (127u - 50u) << 23;  ///< a pattern
    static constexpr uint32_t kExponent = 0x7f800000u;

    /// What decodes a block's codes, per group.
    struct Headers {
      PerGroup shift, base_minus_one;  ///< of variances
      PerGroup mantissa, exponent;     ///< of G, and what is added to half of a variance's pattern

      /// False where a variance is 0, or damaged, or a G smaller than usual.
      FLASHOPTIM_HD bool open(const Block& b) {
        const auto* const variance_codes = static_cast<const uint8_t*>(b.states[1]);
        __m512i smallest = _mm512_loadu_si512(variance_codes);
        for (int i = 64; i < b.groups * kGroup; i += 64)
          smallest = _mm512_min_epu8(smallest, _mm512_loadu_si512(variance_codes + i));
        const __mmask64 zeros = _mm512_testn_epi8_mask(smallest, smallest);
        __mmask16 unusual = 0;
        for_each_header(
            b, [&](int first) __attribute__((always_inline)) {
              const __m512i g = _mm512_min_epi32(_mm512_slli_epi32(core::load_u16<F>(b.scales[0] + first).v, 15),
                                                 all((127u + 30u) << 23));
              const auto window = core::WindowCodec::window<F>(core::load_u16<F>(b.scales[1] + first));
              const __m512i largest = _mm512_add_epi32(window.below.v, _mm512_sllv_epi32(all(255u), window.shift.v));
              shift.store(first, window.shift.v);
              base_minus_one.store(first, window.base_minus_one.v);
              mantissa.store(first, _mm512_and_si512(g, all(0x007fffffu)));
              // root_scale(v) = (v / 2 + (127 << 22)) & kExponent, in patterns; the exponents of G and of
              // 2^floor(log2(v) / 2) add.
              exponent.store(first, _mm512_sub_epi32(_mm512_and_si512(g, all(kExponent)), all(127u << 22)));
              unusual |= _mm512_cmplt_epi32_mask(g, all(kSmallestG)) | _mm512_movepi32_mask(largest);
            });
        return zeros == 0 && unusual == 0;
      }
    };

    struct Decode {
      const Headers& headers;
      const uint8_t* momentum_codes;
      const uint8_t* variance_codes;
      __m512i exponent = all(known<Constants>().exponent);
#if defined(__AVX512VBMI__)
      // Of 128 magnitudes the two bytes of a bf16 number, which holds them exactly.
      __m512i first_0 = kMagnitudes.load(0), first_1 = kMagnitudes.load(1), second_0 = kMagnitudes.load(2),
              second_1 = kMagnitudes.load(3);
      __m512i low_pairs = vector(known<Constants>().low_pairs), high_pairs = vector(known<Constants>().high_pairs);
      __m512i signs = _mm512_set1_epi8(-128);
#else
      __m512i digits = all(127u << MuLaw::kShift), two_bits = all(MuLaw::kTwoBits), sign = all(known<Constants>().sign);
      __m512 two = all_f(known<Constants>().two);
#endif

      FLASHOPTIM_HD Decode(const Block& b, const Headers& h)
          : headers(h),
            momentum_codes(static_cast<const uint8_t*>(b.states[0])),
            variance_codes(static_cast<const uint8_t*>(b.states[1])) {}

      /// MuLaw::decode of a group.
      FLASHOPTIM_HD void momentum(int i, __m512* low, __m512* high) const {
#if defined(__AVX512VBMI__)
        const __m512i code =
            _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(momentum_codes + i)));
        const __m512i first = _mm512_permutex2var_epi8(first_0, code, first_1);
        const __m512i second = and_or(code, signs, _mm512_permutex2var_epi8(second_0, code, second_1));
        constexpr __mmask64 kUpper = 0xccccccccccccccccu;
        *low = float_of(_mm512_maskz_permutex2var_epi8(kUpper, first, low_pairs, second));
        *high = float_of(_mm512_maskz_permutex2var_epi8(kUpper, first, high_pairs, second));
#else
        const auto decode = [this](const uint8_t* from) __attribute__((always_inline)) {
          const __m512i code = _mm512_cvtepi8_epi32(load_16_bytes(from));
          const __m512i y = and_or(_mm512_slli_epi32(code, MuLaw::kShift), digits, two_bits);
          return float_of(and_or(code, sign, bits_of(_mm512_sub_ps(float_of(y), two))));
        };
        *low = decode(momentum_codes + i);
        *high = decode(momentum_codes + i + kLanes);
#endif
      }

      /// WindowCodec::decode where no variance is 0.
      FLASHOPTIM_HD __m512i variance(int group, int i) const {
        const __m512i code = _mm512_cvtepu8_epi32(load_16_bytes(variance_codes + i));
        return _mm512_sllv_epi32(_mm512_add_epi32(code, headers.base_minus_one.spread(group)),
                                 headers.shift.spread(group));
      }
      /// (x / G) * (G 2^k): as (x / G * G) 2^k, exact.
      FLASHOPTIM_HD __m512 scale(int group, __m512 x, __m512i bits) const {
        const __m512i sum = _mm512_add_epi32(_mm512_srli_epi32(bits, 1), headers.exponent.spread(group));
        return _mm512_mul_ps(x, float_of(and_or(sum, exponent, headers.mantissa.spread(group))));
      }

      FLASHOPTIM_HD void operator()(int group, Lane (&s)[kMaxStates]) const {
        const int i = group * kGroup;
        __m512 low, high;
        momentum(i, &low, &high);
        const __m512i v_low = variance(group, i), v_high = variance(group, i + kLanes);
        s[0].v = {{scale(group, low, v_low)}, {scale(group, high, v_high)}};
        s[1].v = {{float_of(v_low)}, {float_of(v_high)}};
      }
    };

    /// New states of all groups into state_f32, and the variances' headers. inputs(group, &w, &g) reads, keep(group, s)
    /// takes what a group's new states are for. False, and nothing written, where a new variance is not between those
    /// that vouch for the rule's bounds, or an input has been taken for what it is not.
    template <class Inputs, class Keep>
    static FLASHOPTIM_HD bool advance(Block& b, const Headers& headers, Hyper h, Inputs inputs, Keep keep) {
      const Decode decode(b, headers);
      const CodesAhead codes_ahead(b);
      const int groups = b.groups;
      float* const m = b.state_f32[0];
      float* const v = b.state_f32[1];
      Extremes<Largest> largest;
      Extremes<Smallest> smallest;
      for (int first = 0; first < groups; first += 4) {
        __m512i most[4], least[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const int group = first + k, i = group * kGroup;
          Lane w, g, s[kMaxStates];
          codes_ahead.ask(group);
          inputs(group, &w.v, &g.v);
          decode(group, s);
          Rule::template advance<Lane>(w, g, s, h);
          core::store_f32(m + i, s[0].v);
          core::store_f32(v + i, s[1].v);
          const __m512i low = bits_of(s[1].v.lo.v), high = bits_of(s[1].v.hi.v);
          most[k] = _mm512_max_epi32(low, high);
          least[k] = _mm512_min_epi32(low, high);
          keep(group, s);
        }
        largest.store(first, most);
        smallest.store(first, least);
      }
      // As signed numbers: a NaN is above or below all.
      I high[kBlockGroups / kLanes], low[kBlockGroups / kLanes];
      __mmask16 unusual = 0;
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            const I most = largest.of_groups(first), least = smallest.of_groups(first);
            unusual |= _mm512_cmpgt_epi32_mask(most.v, all(Rule::kLargestBoundingVariance)) |
                       _mm512_cmplt_epi32_mask(least.v, all(Rule::kSmallestBoundingVariance));
            high[first / kLanes] = most;
            low[first / kLanes] = least;
          });
      if (unusual != 0 || inputs.unusual != 0) return false;
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            const I header =
                core::WindowCodec::header<F>(high[first / kLanes], low[first / kLanes] - core::splat_bits<F>(1u));
            States::store_window(b, first, core::WindowCodec::window<F>(header));
            core::store_16(b.scales[1] + first, header);
          });
      return true;
    }

    /// The rule's first stage, where weights and gradients have been loaded.
    static void update(Block& b) {
      const Hyper h = *static_cast<const Hyper*>(b.hyper);
      Headers headers;
      b.usual = takes(b) && Rule::variance_bounds(h) && headers.open(b) &&
                advance(b, headers, h, LoadedInputs(b), KeepDelta<Rule>(b, h));
      if (!b.usual) [[unlikely]]
        States::update(b);
    }

    /// begin() of UsualStages.
    template <MasterWeights kMaster>
    static bool begin(Block& b) {
      const Hyper h = *static_cast<const Hyper*>(b.hyper);
      Headers headers;
      if (!takes(b) || !Rule::variance_bounds(h) || !headers.open(b)) return false;
      b.usual = b.gradient_scale == 1.0f
                    ? advance(b, headers, h, NarrowInputs<Rule, kMaster, false>(b), KeepStep<Rule>(b, h))
                    : advance(b, headers, h, NarrowInputs<Rule, kMaster, true>(b), KeepStep<Rule>(b, h));
      return b.usual;
    }

    /// WindowCodec::encode of variances that are not 0; leaves momentum relative to them, and its headers.
    static void encode_variance(Block& b) {
      if (!b.usual) [[unlikely]]
        return States::template encode_variance<true>(b);
      const Dither<core::DitherStream::kVariance> dither(b);
      const int groups = b.groups;
      float* const m = b.state_f32[0];
      const float* const v = b.state_f32[1];
      auto* const codes = static_cast<uint8_t*>(b.states[1]);
      const __m512i exponent = all(known<Constants>().exponent), half_down = all(known<Constants>().half_down);
      const PackBytes<0> low_bytes;
      Extremes<Largest> largest;
      for (int first = 0; first < groups; first += 4) {
        __m512i rows[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const int group = first + k, i = group * kGroup;
          const __m512i shift = all(b.window_shift[group]), right = all(b.window_dither_shift[group]);
          const __m256i base = _mm256_set1_epi8(static_cast<char>(b.window_base_minus_one[group]));
          const auto encode = [&](int at, __m512i word, __m512* x) __attribute__((always_inline)) {
            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(v + at), _mm512_srlv_epi32(word, right));
            // The sum's exponent is that of the stored variance: cutting takes away less.
            const __m512i inverse = _mm512_and_si512(_mm512_sub_epi32(half_down, _mm512_srli_epi32(sum, 1)), exponent);
            *x = _mm512_mul_ps(_mm512_load_ps(m + at), float_of(inverse));
            _mm512_store_ps(m + at, *x);
            return _mm512_srlv_epi32(sum, shift);
          };
          __m512 x_low, x_high;
          const __m512i low = encode(i, dither.low(group), &x_low),
                        high = encode(i + kLanes, dither.high(group), &x_high);
          store_32_bytes(codes + i, _mm256_sub_epi8(low_bytes(low, high), base));
          rows[k] = bits_of(_mm512_range_ps(x_low, x_high, 0x0b));  // the larger magnitude
        }
        largest.store(first, rows);
      }
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            const I header = MuLaw::template header<F>(core::from_bits(largest.of_groups(first)));
            core::store_f32(b.encoding_factor[0] + first, MuLaw::template inverse_scale<F>(header));
            core::store_16(b.scales[0] + first, header);
          });
    }

    /// MuLaw::encode.
    static void encode_momentum(Block& b) {
      if (!b.usual) [[unlikely]]
        return States::template encode_momentum<true>(b);
      const Dither<core::DitherStream::kMomentum> dither(b);
      const int groups = b.groups;
      const float* const relative = b.state_f32[0];
      auto* const codes = static_cast<uint8_t*>(b.states[0]);
      const __m512 two = all_f(known<Constants>().two);
      const PackBytes<2> third_bytes;
      const PackBytes<3> top_bytes;
      static_assert(MuLaw::kShift == 17);
      for (int group = 0; group < groups; ++group) {
        const int i = group * kGroup;
        const __m512 inverse = all_f(b.encoding_factor[0][group]);
        const __m512 x_low = _mm512_load_ps(relative + i), x_high = _mm512_load_ps(relative + i + kLanes);
        const auto encode = [&](__m512 x, __m512i word) __attribute__((always_inline)) {
          const __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_abs_ps(x), inverse), two);
          return _mm512_add_epi32(bits_of(y), _mm512_srli_epi32(word, 32 - MuLaw::kShift));
        };
        // Codes are bits 17 to 23, signs bit 31 of x.
        const __m256i magnitudes =
            _mm256_srli_epi16(third_bytes(encode(x_low, dither.low(group)), encode(x_high, dither.high(group))), 1);
        const __m256i signs = top_bytes(bits_of(x_low), bits_of(x_high));
        store_32_bytes(codes + i, _mm256_ternarylogic_epi32(_mm256_set1_epi8(127), magnitudes, signs, 0xca));
      }
    }
  };

  // ---- states of the paper's codec: momentum and variance -------------------------------------------------------

  template <class Rule>
  struct PaperHot {
    using Hyper = typename Rule::Hyper;
    using Lane = BoundedLane<Pair>;
    static constexpr float kLargestRoot = 0x1p27f;  ///< of variances that vouch for the rule's bounds

    using States = Generic::PaperStates<Rule>;
    struct Scales {
      PerGroup of[kMaxStates];

      /// False where one is not finite.
      FLASHOPTIM_HD bool open(const Block& b) {
        __mmask16 infinite = 0;
        for_each_header(
            b, [&](int first) __attribute__((always_inline)) {
              for (int k = 0; k < kMaxStates; ++k) {
                const __m512 s =
                    _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b.scales[k] + first)));
                infinite |= _mm512_cmp_ps_mask(_mm512_abs_ps(s), all_f(core::kPaperLargestScale), _CMP_NLE_UQ);
                of[k].store(first, bits_of(s));
              }
            });
        return infinite == 0;
      }
    };
    /// Variances may be 0: eps keeps divisors from their bound.
    static FLASHOPTIM_HD bool bounds_hold(const Hyper& h) { return Rule::variance_bounds(h) && h.eps >= 0x1p-62f; }

    /// The rule's first stage, where weights and gradients have been loaded.
    static void update(Block& b) {
      const Hyper h = *static_cast<const Hyper*>(b.hyper);
      Scales scales;
      b.usual =
          takes(b) && bounds_hold(h) && scales.open(b) && advance(b, scales, h, LoadedInputs(b), KeepDelta<Rule>(b, h));
      if (!b.usual) [[unlikely]]
        States::update(b);
    }

    /// begin() of UsualStages.
    template <MasterWeights kMaster>
    static bool begin(Block& b) {
      const Hyper h = *static_cast<const Hyper*>(b.hyper);
      Scales scales;
      if (!takes(b) || !bounds_hold(h) || !scales.open(b)) return false;
      b.usual = b.gradient_scale == 1.0f
                    ? advance(b, scales, h, NarrowInputs<Rule, kMaster, false>(b), KeepStep<Rule>(b, h))
                    : advance(b, scales, h, NarrowInputs<Rule, kMaster, true>(b), KeepStep<Rule>(b, h));
      return b.usual;
    }

    /// New momentum and roots of new variances into state_f32, and headers. As for RelativeHot.
    template <class Inputs, class Keep>
    static FLASHOPTIM_HD bool advance(Block& b, const Scales& scales, Hyper h, Inputs inputs, Keep keep) {
      const int groups = b.groups;
      const auto* const m_codes = static_cast<const uint8_t*>(b.states[0]);
      const auto* const v_codes = static_cast<const uint8_t*>(b.states[1]);
      float* const m = b.state_f32[0];
      float* const root = b.state_f32[1];
      const CodesAhead codes_ahead(b);
      const auto& k = known<PaperConstants>();
      const __m512 inverse_high = all_f(k.inverse_high), inverse_low = all_f(k.inverse_low), two_n = all_f(k.two_n);
      Extremes<Largest> largest_m;
      Extremes<LargestUnsigned> largest_root;
      for (int first = 0; first < groups; first += 4) {
        __m512i most_m[4], most_root[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const int group = first + j, i = group * kGroup;
          const __m512 m_scale = float_of(scales.of[0].spread(group)), v_scale = float_of(scales.of[1].spread(group));
          const auto decode_m = [&](int at) __attribute__((always_inline)) {
            const __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16_bytes(m_codes + at)));
            return _mm512_mul_ps(_mm512_div_ps(q, _mm512_sub_ps(two_n, _mm512_abs_ps(q))), m_scale);
          };
          // code * kInverse255High is exact, so an fma rounds as the sum does.
          const auto decode_v = [&](int at) __attribute__((always_inline)) {
            const __m512 c = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16_bytes(v_codes + at)));
            const __m512 r = _mm512_mul_ps(_mm512_fmadd_ps(c, inverse_high, _mm512_mul_ps(c, inverse_low)), v_scale);
            return _mm512_mul_ps(r, r);
          };
          Lane w, g,
              s[kMaxStates] = {{{{decode_m(i)}, {decode_m(i + kLanes)}}}, {{{decode_v(i)}, {decode_v(i + kLanes)}}}};
          codes_ahead.ask(group);
          inputs(group, &w.v, &g.v);
          Rule::template advance<Lane>(w, g, s, h);
          const Pair r = core::sqrt(s[1].v);
          core::store_f32(m + i, s[0].v);
          core::store_f32(root + i, r);
          keep(group, s);
          most_m[j] = bits_of(_mm512_range_ps(s[0].v.lo.v, s[0].v.hi.v, 0x0b));  // the larger magnitude
          most_root[j] = _mm512_max_epu32(bits_of(r.lo.v), bits_of(r.hi.v));     // a NaN is above all
        }
        largest_m.store(first, most_m);
        largest_root.store(first, most_root);
      }
      I absmax[kMaxStates][kBlockGroups / kLanes];
      __mmask16 unusual = 0;
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            absmax[0][first / kLanes] = largest_m.of_groups(first);
            absmax[1][first / kLanes] = largest_root.of_groups(first);
            unusual |= _mm512_cmpgt_epu32_mask(absmax[1][first / kLanes].v, bits_of(all_f(kLargestRoot)));
          });
      if (unusual != 0 || inputs.unusual != 0) return false;
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            for (int slot = 0; slot < kMaxStates; ++slot) {
              const F a =
                  core::max(core::splat<F>(core::kPaperSmallestAbsmax), core::from_bits(absmax[slot][first / kLanes]));
              core::store_16(b.scales[slot] + first, core::paper_header(a));
              core::store_f32(b.encoding_factor[slot] + first, slot == 0 ? core::PaperMomentum::encoding_factor(a)
                                                                         : core::PaperVariance::encoding_factor(a));
            }
          });
      return true;
    }

    static void encode(Block& b) {
      if (!b.usual) [[unlikely]]
        return States::encode_slots(b);
      const int groups = b.groups;
      const float* const m = b.state_f32[0];
      const float* const root = b.state_f32[1];
      auto* const m_codes = static_cast<uint8_t*>(b.states[0]);
      auto* const v_codes = static_cast<uint8_t*>(b.states[1]);
      const auto& k = known<PaperConstants>();
      const __m512 half = all_f(k.half), n = all_f(k.n), n_and_half = all_f(k.n_and_half);
      const PackBytes<0> low_bytes;
      for (int group = 0; group < groups; ++group) {
        const int i = group * kGroup;
        const __m512 half_absmax = all_f(b.encoding_factor[0][group]), factor = all_f(b.encoding_factor[1][group]);
        const auto encode_m = [&](int at) __attribute__((always_inline)) {
          const __m512 x = _mm512_load_ps(m + at);
          const __m512 y = _mm512_div_ps(x, _mm512_add_ps(half_absmax, _mm512_mul_ps(_mm512_abs_ps(x), half)));
          return _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(y, n), n_and_half));
        };
        const auto encode_v = [&](int at) __attribute__((always_inline)) {
          return _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(root + at), factor), half));
        };
        // 128 less is another top bit.
        store_32_bytes(m_codes + i,
                       _mm256_xor_si256(low_bytes(encode_m(i), encode_m(i + kLanes)), _mm256_set1_epi8(-128)));
        store_32_bytes(v_codes + i, low_bytes(encode_v(i), encode_v(i + kLanes)));
      }
    }
  };

  // ---- the table ------------------------------------------------------------------------------------------------

  template <MasterWeights kMaster>
  static constexpr void add_weights(KernelTable& t) {
    constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);
    t.load_weights[kBFloat16][static_cast<int>(kMaster)] = load_weights<kMaster>;
    if constexpr (!core::is_nearest(kMaster))
      t.store_weights[kBFloat16][static_cast<int>(kMaster)] = store_weights<kMaster>;
  }
  template <class Rule, MasterWeights kMaster>
  static constexpr void add_usual(KernelTable& t, RuleKind kind) {
    using Relative = RelativeHot<Rule>;
    using Paper = PaperHot<Rule>;
    auto& usual = t.usual[static_cast<int>(kind)];
    constexpr int kM = static_cast<int>(kMaster);
    usual[static_cast<int>(StateCodec::kDefault)][kM] = {Relative::template begin<kMaster>,
                                                         finish<Rule, kMaster>,
                                                         {Relative::encode_variance, Relative::encode_momentum}};
    usual[static_cast<int>(StateCodec::kPaper)][kM] = {
        Paper::template begin<kMaster>, finish<Rule, kMaster>, {Paper::encode, nullptr}};
  }
  template <class Rule>
  static constexpr void add_rule(KernelTable& t, RuleKind kind) {
    if constexpr (core::kHasBoundingVariance<Rule>) add_rule_with_variance<Rule>(t, kind);
  }
  template <class Rule>
  static constexpr void add_rule_with_variance(KernelTable& t, RuleKind kind) {
    add_usual<Rule, MasterWeights::kCorrection8>(t, kind);
    add_usual<Rule, MasterWeights::kCorrection16>(t, kind);
    add_usual<Rule, MasterWeights::kCorrection8Nearest>(t, kind);
    add_usual<Rule, MasterWeights::kCorrection16Nearest>(t, kind);
    auto& stages = t.rule[static_cast<int>(kind)];
    constexpr int kDefault = static_cast<int>(StateCodec::kDefault), kPaper = static_cast<int>(StateCodec::kPaper);
    stages[kDefault][0] = RelativeHot<Rule>::update;
    stages[kDefault][1] = RelativeHot<Rule>::encode_variance;
    stages[kDefault][2] = RelativeHot<Rule>::encode_momentum;
    stages[kPaper][0] = PaperHot<Rule>::update;
    stages[kPaper][1] = PaperHot<Rule>::encode;
  }

  static constexpr KernelTable table(const char* isa) {
    KernelTable t = Generic::table(isa);
    add_weights<MasterWeights::kCorrection8>(t);
    add_weights<MasterWeights::kCorrection16>(t);
    add_weights<MasterWeights::kCorrection8Nearest>(t);
    add_weights<MasterWeights::kCorrection16Nearest>(t);
    t.load_gradient[static_cast<int>(DType::kBFloat16)] = load_gradient;
#define FLASHOPTIM_ADD_RULE(name) add_rule<core::name>(t, RuleKind::k##name);
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_ADD_RULE)
#undef FLASHOPTIM_ADD_RULE
    return t;
  }
};

}  // namespace FLASHOPTIM_AVX512

}  // namespace flashoptim::cpu
