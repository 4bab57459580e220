// What the passes of AVX-512's hot path are made of: constants, bf16, bytes, dither, extremes of groups.
#pragma once

#include <immintrin.h>

#include "src/cpu/bounded_lane-inl.h"
#include "src/cpu/lanes_avx512-inl.h"
#include "src/cpu/lanes_pair-inl.h"
//
#include "src/cpu/loops-inl.h"

namespace flashoptim::cpu {
inline namespace FLASHOPTIM_AVX512 {

struct HotPieces {
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
    float n = 127.0f, half = 0.5f, n_and_half = 128.5f;
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
    const char* of[2];
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
};

}  // namespace FLASHOPTIM_AVX512
}  // namespace flashoptim::cpu
