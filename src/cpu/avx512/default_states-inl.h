// AVX-512's hot path: states of the default codec, momentum relative to a variance.
#pragma once

#include <bit>

#include "src/cpu/avx512/weights-inl.h"

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

template <core::Rule Rule>
struct HotDefaultStates : HotWeights {
  using States = Generic::CodedStates<Rule, StateCodec::kDefault>;
  using Slots = typename States::Slots;
  using Coding = Generic::Coding;
  static constexpr int kMomentum = core::MomentumOverVariance<Rule>::kMomentum;
  static constexpr int kVariance = core::MomentumOverVariance<Rule>::kVariance;
  using MomentumSlot = typename Slots::template Of<kMomentum>;
  using VarianceSlot = typename Slots::template Of<kVariance>;
  using MuLaw = typename MomentumSlot::MuLaw;
  using Window = core::WindowCodec::Window<uint32_t>;  ///< for its constants' places
  using Hyper = typename Rule::Hyper;
  using Lane = BoundedLane<Pair>;
  static constexpr uint32_t kSmallestG = (127u - 50u) << 23;  ///< a pattern
  static constexpr uint32_t kExponent = 0x7f800000u;

  static FLASHOPTIM_HD bool bounds_hold(const Hyper& h) { return Rule::variance_bounds(h); }

  /// What decodes a block's codes, per group.
  struct Headers {
    PerGroup shift, base_minus_one;  ///< of variances
    PerGroup mantissa, exponent;     ///< of G, and what is added to half of a variance's pattern

    /// False where a variance is 0, or damaged, or a G smaller than usual.
    FLASHOPTIM_HD bool open(const Block& b) {
      const auto* const variance_codes = static_cast<const uint8_t*>(b.states[kVariance]);
      __m512i smallest = _mm512_loadu_si512(variance_codes);
      for (int i = 64; i < b.groups * kGroup; i += 64)
        smallest = _mm512_min_epu8(smallest, _mm512_loadu_si512(variance_codes + i));
      const __mmask64 zeros = _mm512_testn_epi8_mask(smallest, smallest);
      __mmask16 unusual = 0;
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            const __m512i g = _mm512_min_epi32(_mm512_slli_epi32(core::load_u16<F>(b.scales[kMomentum] + first).v, 15),
                                               all((127u + 30u) << 23));
            const auto window = core::WindowCodec::window<F>(core::load_u16<F>(b.scales[kVariance] + first));
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
          momentum_codes(static_cast<const uint8_t*>(b.states[kMomentum])),
          variance_codes(static_cast<const uint8_t*>(b.states[kVariance])) {}

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

    FLASHOPTIM_HD void operator()(int group, Lane (&s)[Rule::kSlotCount]) const {
      const int i = group * kGroup;
      __m512 low, high;
      momentum(i, &low, &high);
      const __m512i v_low = variance(group, i), v_high = variance(group, i + kLanes);
      s[kMomentum].v = {{scale(group, low, v_low)}, {scale(group, high, v_high)}};
      s[kVariance].v = {{float_of(v_low)}, {float_of(v_high)}};
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
    float* const m = b.state_f32[kMomentum];
    float* const v = b.state_f32[kVariance];
    Extremes<Largest> largest;
    Extremes<Smallest> smallest;
    for (int first = 0; first < groups; first += 4) {
      __m512i most[4], least[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const int group = first + k, i = group * kGroup;
        Lane w, g, s[Rule::kSlotCount];
        codes_ahead.ask(group);
        inputs(group, &w.v, &g.v);
        decode(group, s);
        Rule::template advance<Lane>(w, g, s, h);
        core::store_f32(m + i, s[kMomentum].v);
        core::store_f32(v + i, s[kVariance].v);
        const __m512i low = bits_of(s[kVariance].v.lo.v), high = bits_of(s[kVariance].v.hi.v);
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
              VarianceSlot::template header<F>(high[first / kLanes], low[first / kLanes] - core::splat_bits<F>(1u));
          Generic::store_constants(b, kVariance, first,
                                   VarianceSlot::template encoding<F>(header, high[first / kLanes]));
          core::store_16(b.scales[kVariance] + first, header);
        });
    return true;
  }

  /// WindowCodec::encode of variances that are not 0; leaves momentum relative to them, and its headers.
  static void encode_variance(Block& b) {
    if (!b.usual) [[unlikely]]
      return States::template encode_slots<Coding::kBases, true>(b);
    const Dither<Slots::stream(kVariance)> dither(b);
    const int groups = b.groups;
    float* const m = b.state_f32[kMomentum];
    const float* const v = b.state_f32[kVariance];
    auto* const codes = static_cast<uint8_t*>(b.states[kVariance]);
    const PackBytes<0> low_bytes;
    Extremes<Largest> largest;
    for (int first = 0; first < groups; first += 4) {
      __m512i rows[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const int group = first + k, i = group * kGroup;
        const auto& window = b.constants[kVariance];
        const __m512i shift = all(window[Window::kShift][group]), right = all(window[Window::kDitherShift][group]);
        const __m256i base = _mm256_set1_epi8(static_cast<char>(window[Window::kBaseMinusOne][group]));
        const auto encode = [&](int at, __m512i word, __m512* x) __attribute__((always_inline)) {
          const __m512i sum = _mm512_add_epi32(_mm512_load_si512(v + at), _mm512_srlv_epi32(word, right));
          // The sum's exponent is that of the stored variance: cutting takes away less.
          *x = _mm512_mul_ps(_mm512_load_ps(m + at), core::inverse_root_scale<F>(I{sum}).v);
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
          const I most = largest.of_groups(first);
          const I header = MomentumSlot::template header<F>(most, most);
          Generic::store_constants(b, kMomentum, first, MomentumSlot::template encoding<F>(header, most));
          core::store_16(b.scales[kMomentum] + first, header);
        });
  }

  /// MuLaw::encode.
  static void encode_momentum(Block& b) {
    if (!b.usual) [[unlikely]]
      return States::template encode_slots<Coding::kOthers, true>(b);
    const Dither<Slots::stream(kMomentum)> dither(b);
    const int groups = b.groups;
    const float* const relative = b.state_f32[kMomentum];
    auto* const codes = static_cast<uint8_t*>(b.states[kMomentum]);
    const __m512 two = all_f(known<Constants>().two);
    const PackBytes<2> third_bytes;
    const PackBytes<3> top_bytes;
    static_assert(MuLaw::kShift == 17);
    for (int group = 0; group < groups; ++group) {
      const int i = group * kGroup;
      const __m512 inverse = float_of(all(b.constants[kMomentum][0][group]));
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

}  // namespace FLASHOPTIM_AVX512
}  // namespace flashoptim::cpu
