// What the passes of AVX2's hot path are made of: the order of lanes, bytes, dither, extremes of groups.
//
// A group is four vectors of 8 lanes: the lower four lanes of vector j hold elements 4 j ... 4 j + 3, the upper four 16
// + 4 j ... Bytes and words are then spread out and packed within the halves of a register: no operation crosses them,
// which costs one more each on AVX2. Block's arrays of fp32 are in this order between these passes.
#pragma once

#include <immintrin.h>

#include "src/cpu/bounded_lane-inl.h"
#include "src/cpu/lanes_avx2-inl.h"
#include "src/cpu/lanes_pair-inl.h"
//
#include "src/cpu/loops-inl.h"

namespace flashoptim::cpu::avx2 {

struct Pieces {
  using F = core::Avx2Float;
  using I = core::Avx2Int;
  /// Half of a group: vectors 0 and 1, or 2 and 3. What is written for it interleaves two chains of operations.
  using Pair = core::PairFloat<F>;
  using Generic = Loops<F>;
  static constexpr int kGroup = static_cast<int>(kGroupSize);
  static constexpr int kLanes = core::LaneTraits<F>::kWidth;
  static constexpr int kHalf = 2 * kLanes;  ///< of a group, where its fp32 numbers stand
  static constexpr int kRows = kLanes;      ///< groups whose extremes are found together
  static_assert(kBlockGroups % 16 == 0 && kGroup == 4 * kLanes);

  static FLASHOPTIM_HD __m256i all(uint32_t bits) { return _mm256_set1_epi32(static_cast<int>(bits)); }
  static FLASHOPTIM_HD __m256i all_words(uint16_t bits) { return _mm256_set1_epi16(static_cast<int16_t>(bits)); }
  static FLASHOPTIM_HD __m256i all_bytes(uint8_t bits) { return _mm256_set1_epi8(static_cast<char>(bits)); }
  static FLASHOPTIM_HD __m256 all_f(float value) { return _mm256_set1_ps(value); }
  /// Of constants of passes, before their loops: where registers are short, the compiler keeps these in memory, and
  /// lets operations read them there. Those that it knows it makes anew, by two operations each.
  static FLASHOPTIM_HD __m256i held(__m256i constant) {
    asm("" : "+x"(constant));
    return constant;
  }
  static FLASHOPTIM_HD __m256i held(uint32_t bits) { return held(all(bits)); }
  static FLASHOPTIM_HD __m256i held_words(uint16_t bits) { return held(all_words(bits)); }
  static FLASHOPTIM_HD __m256i held_bytes(uint8_t bits) { return held(all_bytes(bits)); }
  static FLASHOPTIM_HD __m256i bits_of(__m256 a) { return _mm256_castps_si256(a); }
  static FLASHOPTIM_HD __m256 float_of(__m256i a) { return _mm256_castsi256_ps(a); }
  static FLASHOPTIM_HD __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static FLASHOPTIM_HD void store(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static FLASHOPTIM_HD __m256i load_halves(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                   _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
  }
  static FLASHOPTIM_HD void store_halves(void* low, void* high, __m256i a) {
    _mm_storeu_si128(static_cast<__m128i*>(low), _mm256_castsi256_si128(a));
    _mm_storeu_si128(static_cast<__m128i*>(high), _mm256_extracti128_si256(a, 1));
  }

  /// Element of a group that stands at place `at` of its fp32 numbers.
  static constexpr int element(int at) { return at / kLanes * 4 + at % kLanes % 4 + at % kLanes / 4 * 16; }

  /// One number a group.
  struct PerGroup {
    alignas(32) uint32_t bits[kBlockGroups];
    FLASHOPTIM_HD void store(int first, __m256i value) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(bits + first), value);
    }
    FLASHOPTIM_HD __m256i spread(int group) const { return all(bits[group]); }
  };
  /// Headers are handled one group per lane.
  static FLASHOPTIM_HD bool takes(const Block& b) { return b.groups % 16 == 0; }
  /// body(first) for the first of every 8 groups.
  template <class Body>
  static FLASHOPTIM_HD void for_each_header(const Block& b, Body body) {
    for (int first = 0; first < b.groups; first += kLanes) body(first);
  }

  // ---- bytes ----------------------------------------------------------------------------------------------------

  /// For vpshufb: byte e of a group to its lane, into byte kByte of it; zeros elsewhere.
  template <int kByte>
  struct SpreadPlaces {
    alignas(32) uint8_t of[4][32];
    constexpr SpreadPlaces() : of() {
      for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < 32; ++i) of[j][i] = static_cast<uint8_t>(i % 4 == kByte ? 4 * j + i % 16 / 4 : 0x80);
      }
    }
  };
  template <int kByte>
  static constexpr SpreadPlaces<kByte> kSpreadPlaces{};
  /// Vector j of 32 bytes.
  template <int kByte>
  static FLASHOPTIM_HD __m256i spread_bytes(__m256i bytes, int j) {
    return _mm256_shuffle_epi8(bytes, _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpreadPlaces<kByte>.of[j])));
  }

  // ---- dither ---------------------------------------------------------------------------------------------------

  template <core::DitherStream kStream>
  struct LaneSteps {
    alignas(32) uint32_t of[8];
    constexpr LaneSteps() : of() {
      for (int i = 0; i < 8; ++i) of[i] = static_cast<uint32_t>(element(i)) * core::kDitherLaneStep<kStream>;
    }
  };
  template <core::DitherStream kStream>
  static constexpr LaneSteps<kStream> kLaneSteps{};

  /// Words of one stream over the groups of a block.
  template <core::DitherStream kStream>
  struct Dither {
    PerGroup start;
    __m256i lanes = held(_mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneSteps<kStream>.of)));
    __m256i further[3] = {held(4u * core::kDitherLaneStep<kStream>), held(8u * core::kDitherLaneStep<kStream>),
                          held(12u * core::kDitherLaneStep<kStream>)};

    explicit FLASHOPTIM_HD Dither(const Block& b) {
      for_each_header(
          b, [&](int first) __attribute__((always_inline)) {
            start.store(first,
                        core::dither_group_start<kStream, F>(b.dither, core::load_u32<F>(b.group_hash + first)).v);
          });
    }
    /// Of vector 0; of() goes on to vector j.
    FLASHOPTIM_HD __m256i group(int group) const { return _mm256_add_epi32(lanes, start.spread(group)); }
    FLASHOPTIM_HD __m256i of(__m256i group, int j) const {
      return j == 0 ? group : _mm256_add_epi32(group, further[j - 1]);
    }
  };
  struct NoDither {
    explicit FLASHOPTIM_HD NoDither(const Block&) {}
    FLASHOPTIM_HD __m256i group(int) const { return __m256i{}; }
    static FLASHOPTIM_HD __m256i of(__m256i group, int) { return group; }
  };

  // ---- memory ahead ---------------------------------------------------------------------------------------------

  /// Asks for the memory of two arrays of codes, 64 bytes of one or the other a group.
  struct CodesAhead {
    const char* of[2];
    explicit FLASHOPTIM_HD CodesAhead(const Block& b)
        : of{static_cast<const char*>(b.states[0]) + b.ahead, static_cast<const char*>(b.states[1]) + b.ahead} {}
    FLASHOPTIM_HD void ask(int group) const { __builtin_prefetch(of[group & 1] + (group & ~1) * kGroup, 1, 3); }
  };
  /// The same of an array of elements of kBytes; kWrite as __builtin_prefetch has it.
  template <int kBytes>
  static FLASHOPTIM_HD const char* ahead_of(const Block& b, const void* array) {
    return static_cast<const char*>(array) + b.ahead * kBytes;
  }
  template <int kBytes, int kWrite>
  static FLASHOPTIM_HD void ask(const char* ahead, int group) {
    // Every line once, or twice, which costs less than to ask whether.
    __builtin_prefetch(ahead + group * kGroup * kBytes, kWrite, 3);
    if constexpr (kBytes == 4) __builtin_prefetch(ahead + group * kGroup * 4 + 64, kWrite, 3);
  }

  // ---- extremes of groups ---------------------------------------------------------------------------------------

  struct Largest {
    FLASHOPTIM_HD __m256i operator()(__m256i a, __m256i b) const { return _mm256_max_epi32(a, b); }
  };
  struct LargestUnsigned {
    FLASHOPTIM_HD __m256i operator()(__m256i a, __m256i b) const { return _mm256_max_epu32(a, b); }
  };
  struct Smallest {
    FLASHOPTIM_HD __m256i operator()(__m256i a, __m256i b) const { return _mm256_min_epi32(a, b); }
  };
  /// A vector per group, reduced for 8 groups together.
  template <class Pick>
  struct Extremes {
    alignas(32) uint32_t rows[kBlockGroups * kLanes];
    FLASHOPTIM_HD void store(int group, __m256i row) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(rows + group * kLanes), row);
    }
    FLASHOPTIM_HD I of_groups(int first) const { return core::reduce_8_rows(rows + first * kLanes, Pick{}); }
  };
};

}  // namespace flashoptim::cpu::avx2
