// AVX2's hot path: states of the default codec, momentum relative to a variance.
#pragma once

#include "src/cpu/avx2/weights-inl.h"

namespace flashoptim::cpu::avx2 {

template <core::Rule Rule>
struct DefaultStates : Pieces {
  using Slots = core::SlotCodecs<Rule, StateCodec::kDefault>;
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
  static_assert(MuLaw::kShift == 17);

  static FLASHOPTIM_HD bool bounds_hold(const Hyper& h) { return Rule::variance_bounds(h); }

  /// What decodes a block's codes, per group.
  struct Headers {
    PerGroup shift, base_minus_one;  ///< of variances
    PerGroup mantissa, exponent;     ///< of G, and what is added to half of a variance's pattern

    /// False where a variance is 0, or damaged, or a G smaller than usual.
    FLASHOPTIM_HD bool open(const Block& b) {
      const auto* const variance_codes = static_cast<const uint8_t*>(b.states[kVariance]);
      __m256i smallest = load(variance_codes);
      for (int i = kGroup; i < b.groups * kGroup; i += kGroup)
        smallest = _mm256_min_epu8(smallest, load(variance_codes + i));
      __m256i unusual = _mm256_cmpeq_epi8(smallest, _mm256_setzero_si256());
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            const __m256i g = _mm256_min_epi32(_mm256_slli_epi32(core::load_u16<F>(b.scales[kMomentum] + first).v, 15),
                                               all((127u + 30u) << 23));
            const auto window = core::WindowCodec::window<F>(core::load_u16<F>(b.scales[kVariance] + first));
            const __m256i largest = _mm256_add_epi32(window.below.v, _mm256_sllv_epi32(all(255u), window.shift.v));
            shift.store(first, window.shift.v);
            base_minus_one.store(first, window.base_minus_one.v);
            mantissa.store(first, _mm256_and_si256(g, all(0x007fffffu)));
            // root_scale(v) = (v / 2 + (127 << 22)) & kExponent, in patterns; the exponents of G and of
            // 2^floor(log2(v) / 2) add. Codes are decoded in units of 2^-5.
            exponent.store(first,
                           _mm256_sub_epi32(_mm256_and_si256(g, all(kExponent)), all((127u << 22) + (5u << 23))));
            unusual = _mm256_or_si256(unusual, _mm256_cmpgt_epi32(all(kSmallestG), g));
            unusual = _mm256_or_si256(unusual, _mm256_srai_epi32(largest, 31));
          });
      return _mm256_testz_si256(unusual, unusual);
    }
  };

  /// The codes of a group.
  struct Codes {
    __m256i units;  ///< |x| / G in units of 2^-5: a, and of a >= 64, 2 a - 64
    __m256i signs, variances;

    FLASHOPTIM_HD Codes(const Block& b, int group) {
      const __m256i code = load(static_cast<const uint8_t*>(b.states[kMomentum]) + group * kGroup);
      const __m256i a = _mm256_and_si256(code, all_bytes(0x7f));
      units = _mm256_add_epi8(a, _mm256_subs_epu8(a, all_bytes(64)));
      signs = _mm256_and_si256(code, all_bytes(0x80));
      variances = load(static_cast<const uint8_t*>(b.states[kVariance]) + group * kGroup);
    }
    /// WindowCodec::decode where no variance is 0.
    FLASHOPTIM_HD __m256i variance(const Headers& headers, int group, int j) const {
      return _mm256_sllv_epi32(_mm256_add_epi32(spread_bytes<0>(variances, j), headers.base_minus_one.spread(group)),
                               headers.shift.spread(group));
    }
    /// MuLaw::decode, and (x / G) * (G 2^k): as (x / G * G) 2^k, exact.
    FLASHOPTIM_HD __m256 momentum(const Headers& headers, int group, int j, __m256i variance) const {
      const __m256 x = _mm256_cvtepi32_ps(spread_bytes<0>(units, j));
      const __m256i sum = _mm256_add_epi32(_mm256_srli_epi32(variance, 1), headers.exponent.spread(group));
      const __m256i sign = _mm256_or_si256(spread_bytes<3>(signs, j), headers.mantissa.spread(group));
      return _mm256_mul_ps(x, float_of(_mm256_or_si256(_mm256_and_si256(sum, all(kExponent)), sign)));
    }
    FLASHOPTIM_HD void decode(const Headers& headers, int group, int half, Lane (&s)[Rule::kSlotCount]) const {
      const __m256i low = variance(headers, group, 2 * half), high = variance(headers, group, 2 * half + 1);
      s[kVariance].v = {{float_of(low)}, {float_of(high)}};
      s[kMomentum].v = {{momentum(headers, group, 2 * half, low)}, {momentum(headers, group, 2 * half + 1, high)}};
    }
  };

  /// New states of all groups into state_f32, steps into delta, and the variances' headers. False, and nothing of the
  /// block's memory written, where a new variance is not between those that vouch for the rule's bounds, or an input
  /// has been taken for what it is not.
  template <class Inputs>
  static FLASHOPTIM_HD bool advance(Block& b, const Headers& headers, Hyper h, Inputs inputs) {
    const CodesAhead codes_ahead(b);
    const int groups = b.groups;
    Extremes<Largest> largest;
    Extremes<Smallest> smallest;
    for (int group = 0; group < groups; ++group) {
      const Codes codes(b, group);
      codes_ahead.ask(group);
      inputs.ask_ahead(group);
      __m256i most[2], least[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int at = group * kGroup + half * kHalf;
        Lane w, g, s[Rule::kSlotCount];
        inputs(group, half, &w.v, &g.v);
        codes.decode(headers, group, half, s);
        Rule::template advance<Lane>(w, g, s, h);
        core::store_f32(b.state_f32[kMomentum] + at, s[kMomentum].v);
        core::store_f32(b.state_f32[kVariance] + at, s[kVariance].v);
        const __m256i low = bits_of(s[kVariance].v.lo.v), high = bits_of(s[kVariance].v.hi.v);
        most[half] = _mm256_max_epi32(low, high);
        least[half] = _mm256_min_epi32(low, high);
        core::store_f32(b.delta + at, Rule::template step<Lane>(s, h).v);
      }
      largest.store(group, _mm256_max_epi32(most[0], most[1]));
      smallest.store(group, _mm256_min_epi32(least[0], least[1]));
    }
    // As signed numbers: a NaN is above or below all.
    I high[kBlockGroups / kLanes], low[kBlockGroups / kLanes];
    __m256i unusual = inputs.unusual;
    for_each_header(
        b, [&](int first) __attribute__((always_inline)) {
          const I most = largest.of_groups(first), least = smallest.of_groups(first);
          unusual = _mm256_or_si256(unusual, _mm256_cmpgt_epi32(most.v, all(Rule::kLargestBoundingVariance)));
          unusual = _mm256_or_si256(unusual, _mm256_cmpgt_epi32(all(Rule::kSmallestBoundingVariance), least.v));
          high[first / kLanes] = most;
          low[first / kLanes] = least;
        });
    if (!_mm256_testz_si256(unusual, unusual)) return false;
    for_each_header(
        b, [&](int first) __attribute__((always_inline)) {
          const I most = high[first / kLanes];
          const I header = VarianceSlot::template header<F>(most, low[first / kLanes] - core::splat_bits<F>(1u));
          Generic::store_constants(b, kVariance, first, VarianceSlot::template encoding<F>(header, most));
          core::store_16(b.scales[kVariance] + first, header);
        });
    return true;
  }

  /// WindowCodec::encode of variances that are not 0; leaves momentum relative to them, and its headers.
  static void encode_variance(Block& b) {
    const Dither<Slots::stream(kVariance)> dither(b);
    const int groups = b.groups;
    float* const m = b.state_f32[kMomentum];
    const float* const v = b.state_f32[kVariance];
    auto* const codes = static_cast<uint8_t*>(b.states[kVariance]);
    Extremes<Largest> largest;
    for (int group = 0; group < groups; ++group) {
      const int first = group * kGroup;
      const auto& window = b.constants[kVariance];
      const __m256i shift = all(window[Window::kShift][group]), right = all(window[Window::kDitherShift][group]);
      const __m256i base = all(window[Window::kBaseMinusOne][group]);
      const __m256i words = dither.group(group);
      __m256i most = _mm256_setzero_si256();
      const auto encode = [&](int j) __attribute__((always_inline)) {
        const int at = first + j * kLanes;
        const __m256i sum = _mm256_add_epi32(_mm256_srlv_epi32(dither.of(words, j), right), load(v + at));
        // The sum's exponent is that of the stored variance: cutting takes away less.
        const __m256 x = _mm256_mul_ps(core::inverse_root_scale<F>(I{sum}).v, _mm256_loadu_ps(m + at));
        _mm256_storeu_ps(m + at, x);
        most = _mm256_max_epi32(most, _mm256_and_si256(bits_of(x), all(0x7fffffffu)));
        return _mm256_sub_epi32(_mm256_srlv_epi32(sum, shift), base);
      };
      const __m256i c0 = encode(0), c1 = encode(1), c2 = encode(2), c3 = encode(3);
      store(codes + first, _mm256_packus_epi16(_mm256_packus_epi32(c0, c1), _mm256_packus_epi32(c2, c3)));
      largest.store(group, most);
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
    const Dither<Slots::stream(kMomentum)> dither(b);
    const int groups = b.groups;
    const float* const relative = b.state_f32[kMomentum];
    auto* const codes = static_cast<uint8_t*>(b.states[kMomentum]);
    for (int group = 0; group < groups; ++group) {
      const int first = group * kGroup;
      const __m256 inverse = float_of(all(b.constants[kMomentum][0][group]));
      const __m256i words = dither.group(group);
      __m256i x[4], y[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        x[j] = load(relative + first + j * kLanes);
        const __m256 magnitude = float_of(_mm256_and_si256(x[j], all(0x7fffffffu)));
        const __m256i bits = bits_of(_mm256_add_ps(_mm256_mul_ps(magnitude, inverse), all_f(2.0f)));
        y[j] =
            _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_srli_epi32(dither.of(words, j), 32 - MuLaw::kShift)), 16);
      }
      // Codes are bits 17 to 23, signs bit 31 of x, which saturation keeps.
      const __m256i twice = all_words(0x00fe);
      const __m256i magnitudes = _mm256_packus_epi16(_mm256_and_si256(_mm256_packus_epi32(y[0], y[1]), twice),
                                                     _mm256_and_si256(_mm256_packus_epi32(y[2], y[3]), twice));
      const __m256i signs = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
      // Half of twice the code, and of 255 and 1 where the sign is set: 128.
      store(codes + first, _mm256_avg_epu8(magnitudes, _mm256_cmpgt_epi8(_mm256_setzero_si256(), signs)));
    }
  }
};

}  // namespace flashoptim::cpu::avx2
