// AVX2's hot path: states of the paper's codec, momentum and variance.
#pragma once

#include "src/cpu/avx2/weights-inl.h"

namespace flashoptim::cpu::avx2 {

template <core::Rule Rule>
struct PaperStates : Pieces {
  static constexpr int kMomentum = core::MomentumOverVariance<Rule>::kMomentum;
  static constexpr int kVariance = core::MomentumOverVariance<Rule>::kVariance;
  using Hyper = typename Rule::Hyper;
  using Lane = BoundedLane<Pair>;
  using Slots = core::SlotCodecs<Rule, StateCodec::kPaper>;
  using Variance = core::PaperVariance;
  static constexpr float kLargestRoot = 0x1p27f;  ///< of variances that vouch for the rule's bounds

  struct Headers {
    PerGroup of[Rule::kSlotCount];

    /// False where one is not finite.
    FLASHOPTIM_HD bool open(const Block& b) {
      __m256i infinite = _mm256_setzero_si256();
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            for (int k = 0; k < Rule::kSlotCount; ++k) {
              const __m256 s = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b.scales[k] + first)));
              const __m256i magnitude = _mm256_and_si256(bits_of(s), all(0x7fffffffu));
              infinite =
                  _mm256_or_si256(infinite, _mm256_cmpgt_epi32(magnitude, bits_of(all_f(core::kPaperLargestScale))));
              of[k].store(first, bits_of(s));
            }
          });
      return _mm256_testz_si256(infinite, infinite);
    }
  };
  /// Variances may be 0: eps keeps divisors from their bound.
  static FLASHOPTIM_HD bool bounds_hold(const Hyper& h) { return Rule::variance_bounds(h) && h.eps >= 0x1p-62f; }

  /// PaperMomentum::decode of codes in the top bytes of lanes: numerator and denominator are 2^24 times core's.
  static FLASHOPTIM_HD F decode_momentum(__m256i code, __m256 scale) {
    const F q = core::int_to_float(I{code});
    return q / (core::splat<F>(254.0f * 0x1p24f) - core::abs(q)) * F{scale};
  }
  /// PaperVariance::decode. code * kInverse255High is exact, so an fma rounds as the sum does.
  static FLASHOPTIM_HD F decode_variance(__m256i code, __m256 scale) {
    const __m256 c = _mm256_cvtepi32_ps(code);
    const __m256 fraction =
        _mm256_fmadd_ps(c, all_f(Variance::kInverse255High), _mm256_mul_ps(c, all_f(Variance::kInverse255Low)));
    const F root{_mm256_mul_ps(fraction, scale)};
    return root * root;
  }

  /// New momentum and roots of new variances into state_f32, and headers. As for DefaultStates.
  template <class Inputs>
  static FLASHOPTIM_HD bool advance(Block& b, const Headers& scales, Hyper h, Inputs inputs) {
    const CodesAhead codes_ahead(b);
    const int groups = b.groups;
    Extremes<Largest> largest_m;
    Extremes<LargestUnsigned> largest_root;
    for (int group = 0; group < groups; ++group) {
      const __m256i m_codes = load(static_cast<const uint8_t*>(b.states[kMomentum]) + group * kGroup);
      const __m256i v_codes = load(static_cast<const uint8_t*>(b.states[kVariance]) + group * kGroup);
      const __m256 m_scale = float_of(scales.of[kMomentum].spread(group)),
                   v_scale = float_of(scales.of[kVariance].spread(group));
      codes_ahead.ask(group);
      inputs.ask_ahead(group);
      __m256i most_m = _mm256_setzero_si256(), most_root = _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int at = group * kGroup + half * kHalf;
        Lane w, g, s[Rule::kSlotCount];
        inputs(group, half, &w.v, &g.v);
        s[kMomentum].v = {decode_momentum(spread_bytes<3>(m_codes, 2 * half), m_scale),
                          decode_momentum(spread_bytes<3>(m_codes, 2 * half + 1), m_scale)};
        s[kVariance].v = {decode_variance(spread_bytes<0>(v_codes, 2 * half), v_scale),
                          decode_variance(spread_bytes<0>(v_codes, 2 * half + 1), v_scale)};
        Rule::template advance<Lane>(w, g, s, h);
        const Pair root = core::sqrt(s[kVariance].v);
        core::store_f32(b.state_f32[kMomentum] + at, s[kMomentum].v);
        core::store_f32(b.state_f32[kVariance] + at, root);
        core::store_f32(b.delta + at, Rule::template step<Lane>(s, h).v);
        const Pair m = core::abs(s[kMomentum].v);
        most_m = _mm256_max_epi32(most_m, _mm256_max_epi32(bits_of(m.lo.v), bits_of(m.hi.v)));
        // A NaN is above all.
        most_root = _mm256_max_epu32(most_root, _mm256_max_epu32(bits_of(root.lo.v), bits_of(root.hi.v)));
      }
      largest_m.store(group, most_m);
      largest_root.store(group, most_root);
    }
    I largest[Rule::kSlotCount][kBlockGroups / kLanes];
    __m256i unusual = inputs.unusual;
    for_each_header(
        b, [&](int first) __attribute__((always_inline)) {
          const I root = largest_root.of_groups(first);
          largest[kMomentum][first / kLanes] = largest_m.of_groups(first);
          largest[kVariance][first / kLanes] = root;
          // Above it, or with a sign.
          const __m256i within = _mm256_cmpeq_epi32(_mm256_min_epu32(root.v, bits_of(all_f(kLargestRoot))), root.v);
          unusual = _mm256_or_si256(unusual, _mm256_xor_si256(within, all(0xffffffffu)));
        });
    if (!_mm256_testz_si256(unusual, unusual)) return false;
    for_each_header(
        b, [&](int first) __attribute__((always_inline)) {
          Slots::for_each([&](auto index) __attribute__((always_inline)) {
            constexpr int k = decltype(index)::value;
            using Slot = typename Slots::template Of<k>;
            const I most = largest[k][first / kLanes], header = Slot::template header<F>(most, most);
            core::store_16(b.scales[k] + first, header);
            Generic::store_constants(b, k, first, Slot::template encoding<F>(header, most));
          });
        });
    return true;
  }

  static void encode(Block& b) {
    const int groups = b.groups;
    const float* const m = b.state_f32[kMomentum];
    const float* const root = b.state_f32[kVariance];
    auto* const m_codes = static_cast<uint8_t*>(b.states[kMomentum]);
    auto* const v_codes = static_cast<uint8_t*>(b.states[kVariance]);
    for (int group = 0; group < groups; ++group) {
      const int first = group * kGroup;
      const F half_absmax{float_of(all(b.constants[kMomentum][0][group]))};
      const F factor{float_of(all(b.constants[kVariance][0][group]))};
      __m256i m_of[4], v_of[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        // PaperMomentum::encode, 128 more.
        const F x = core::load_f32<F>(m + first + j * kLanes);
        const F y = x / (half_absmax + core::abs(x) * core::splat<F>(0.5f));
        m_of[j] = core::truncate_to_int(y * core::splat<F>(127.0f) + core::splat<F>(128.5f)).v;
        v_of[j] = Variance::encode<F>(core::load_f32<F>(root + first + j * kLanes), factor).v;
      }
      const auto pack = [](const __m256i(&of)[4]) __attribute__((always_inline)) {
        return _mm256_packus_epi16(_mm256_packus_epi32(of[0], of[1]), _mm256_packus_epi32(of[2], of[3]));
      };
      // 128 less is another top bit.
      store(m_codes + first, _mm256_xor_si256(pack(m_of), all_bytes(0x80)));
      store(v_codes + first, pack(v_of));
    }
  }
};

}  // namespace flashoptim::cpu::avx2
