// AVX-512's hot path: states of the paper's codec, momentum and variance.
#pragma once

#include "src/cpu/avx512/weights-inl.h"

namespace flashoptim::cpu {
inline namespace FLASHOPTIM_AVX512 {

template <core::Rule Rule>
struct HotPaperStates : HotWeights {
  static constexpr int kMomentum = core::MomentumOverVariance<Rule>::kMomentum;
  static constexpr int kVariance = core::MomentumOverVariance<Rule>::kVariance;
  using Hyper = typename Rule::Hyper;
  using Lane = BoundedLane<Pair>;
  static constexpr float kLargestRoot = 0x1p27f;  ///< of variances that vouch for the rule's bounds

  using States = Generic::CodedStates<Rule, StateCodec::kPaper>;
  using Slots = typename States::Slots;
  struct Headers {
    PerGroup of[Rule::kSlotCount];

    /// False where one is not finite.
    FLASHOPTIM_HD bool open(const Block& b) {
      __mmask16 infinite = 0;
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            for (int k = 0; k < Rule::kSlotCount; ++k) {
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

  /// New momentum and roots of new variances into state_f32, and headers. As for HotDefaultStates.
  template <class Inputs, class Keep>
  static FLASHOPTIM_HD bool advance(Block& b, const Headers& scales, Hyper h, Inputs inputs, Keep keep) {
    const int groups = b.groups;
    const auto* const m_codes = static_cast<const uint8_t*>(b.states[kMomentum]);
    const auto* const v_codes = static_cast<const uint8_t*>(b.states[kVariance]);
    float* const m = b.state_f32[kMomentum];
    float* const root = b.state_f32[kVariance];
    const CodesAhead codes_ahead(b);
    const auto& k = known<PaperConstants>();
    const __m512 inverse_high = all_f(k.inverse_high), inverse_low = all_f(k.inverse_low);
    Extremes<Largest> largest_m;
    Extremes<LargestUnsigned> largest_root;
    for (int first = 0; first < groups; first += 4) {
      __m512i most_m[4], most_root[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int group = first + j, i = group * kGroup;
        const __m512 m_scale = float_of(scales.of[kMomentum].spread(group)),
                     v_scale = float_of(scales.of[kVariance].spread(group));
        const auto decode_m = [&](int at) __attribute__((always_inline)) {
          return core::PaperMomentum::decode<F>(I{_mm512_cvtepi8_epi32(load_16_bytes(m_codes + at))}, F{m_scale}).v;
        };
        // code * kInverse255High is exact, so an fma rounds as the sum does.
        const auto decode_v = [&](int at) __attribute__((always_inline)) {
          const __m512 c = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_16_bytes(v_codes + at)));
          const __m512 r = _mm512_mul_ps(_mm512_fmadd_ps(c, inverse_high, _mm512_mul_ps(c, inverse_low)), v_scale);
          return _mm512_mul_ps(r, r);
        };
        Lane w, g, s[Rule::kSlotCount];
        s[kMomentum].v = {{decode_m(i)}, {decode_m(i + kLanes)}};
        s[kVariance].v = {{decode_v(i)}, {decode_v(i + kLanes)}};
        codes_ahead.ask(group);
        inputs(group, &w.v, &g.v);
        Rule::template advance<Lane>(w, g, s, h);
        const Pair r = core::sqrt(s[kVariance].v);
        core::store_f32(m + i, s[kMomentum].v);
        core::store_f32(root + i, r);
        keep(group, s);
        most_m[j] = bits_of(_mm512_range_ps(s[kMomentum].v.lo.v, s[kMomentum].v.hi.v, 0x0b));  // the larger magnitude
        most_root[j] = _mm512_max_epu32(bits_of(r.lo.v), bits_of(r.hi.v));                     // a NaN is above all
      }
      largest_m.store(first, most_m);
      largest_root.store(first, most_root);
    }
    I largest[Rule::kSlotCount][kBlockGroups / kLanes];
    __mmask16 unusual = 0;
    for_each_header(
        b, [&](int first) __attribute__((always_inline)) {
          largest[kMomentum][first / kLanes] = largest_m.of_groups(first);
          largest[kVariance][first / kLanes] = largest_root.of_groups(first);
          unusual |= _mm512_cmpgt_epu32_mask(largest[kVariance][first / kLanes].v, bits_of(all_f(kLargestRoot)));
        });
    if (unusual != 0 || inputs.unusual != 0) return false;
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
    if (!b.usual) [[unlikely]]
      return States::template encode_slots<Generic::Coding::kAll, true>(b);
    const int groups = b.groups;
    const float* const m = b.state_f32[kMomentum];
    const float* const root = b.state_f32[kVariance];
    auto* const m_codes = static_cast<uint8_t*>(b.states[kMomentum]);
    auto* const v_codes = static_cast<uint8_t*>(b.states[kVariance]);
    const auto& k = known<PaperConstants>();
    const __m512 half = all_f(k.half), n = all_f(k.n), n_and_half = all_f(k.n_and_half);
    const PackBytes<0> low_bytes;
    for (int group = 0; group < groups; ++group) {
      const int i = group * kGroup;
      const __m512 half_absmax = float_of(all(b.constants[kMomentum][0][group]));
      const __m512 factor = float_of(all(b.constants[kVariance][0][group]));
      const auto encode_m = [&](int at) __attribute__((always_inline)) {
        const __m512 x = _mm512_load_ps(m + at);
        const __m512 y = _mm512_div_ps(x, _mm512_add_ps(half_absmax, _mm512_mul_ps(_mm512_abs_ps(x), half)));
        return _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(y, n), n_and_half));
      };
      const auto encode_v = [&](int at) __attribute__((always_inline)) {
        return core::PaperVariance::encode<F>(core::load_f32<F>(root + at), F{factor}).v;
      };
      // 128 less is another top bit.
      store_32_bytes(m_codes + i,
                     _mm256_xor_si256(low_bytes(encode_m(i), encode_m(i + kLanes)), _mm256_set1_epi8(-128)));
      store_32_bytes(v_codes + i, low_bytes(encode_v(i), encode_v(i + kLanes)));
    }
  }
};

}  // namespace FLASHOPTIM_AVX512
}  // namespace flashoptim::cpu
