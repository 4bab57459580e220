// 8 lanes of AVX2 (with F16C and FMA): the operations of core/lanes.h, each bit-equal to the scalar one.
// Only included by translation units compiled for AVX2.
#pragma once

#include <immintrin.h>

#include "src/cpu/lane_memory.h"

namespace flashoptim::core {

struct Avx2Int {
  __m256i v;
};
struct Avx2Float {
  __m256 v;
};
/// All ones in the lanes that are true.
struct Avx2Mask {
  __m256i v;
};

template <>
struct LaneTraits<Avx2Float> {
  using Int = Avx2Int;
  using Mask = Avx2Mask;
  static constexpr int kWidth = 8;
  static FLASHOPTIM_HD Avx2Float splat(float value) { return {_mm256_set1_ps(value)}; }
  static FLASHOPTIM_HD Avx2Int splat_bits(uint32_t bits) { return {_mm256_set1_epi32(static_cast<int>(bits))}; }
};

FLASHOPTIM_HD Avx2Float operator+(Avx2Float a, Avx2Float b) { return {_mm256_add_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Float operator-(Avx2Float a, Avx2Float b) { return {_mm256_sub_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Float operator*(Avx2Float a, Avx2Float b) { return {_mm256_mul_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Float operator/(Avx2Float a, Avx2Float b) { return {_mm256_div_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int operator+(Avx2Int a, Avx2Int b) { return {_mm256_add_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int operator-(Avx2Int a, Avx2Int b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int operator*(Avx2Int a, Avx2Int b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int operator&(Avx2Int a, Avx2Int b) { return {_mm256_and_si256(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int operator|(Avx2Int a, Avx2Int b) { return {_mm256_or_si256(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int operator^(Avx2Int a, Avx2Int b) { return {_mm256_xor_si256(a.v, b.v)}; }

FLASHOPTIM_HD Avx2Int to_bits(Avx2Float a) { return {_mm256_castps_si256(a.v)}; }
FLASHOPTIM_HD Avx2Float from_bits(Avx2Int a) { return {_mm256_castsi256_ps(a.v)}; }

FLASHOPTIM_HD Avx2Float select(Avx2Mask m, Avx2Float a, Avx2Float b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(m.v))};
}
FLASHOPTIM_HD Avx2Int select(Avx2Mask m, Avx2Int a, Avx2Int b) { return {_mm256_blendv_epi8(b.v, a.v, m.v)}; }

// vmaxps returns its second operand when either is NaN or both are zero: a > b ? a : b.
FLASHOPTIM_HD Avx2Float max(Avx2Float a, Avx2Float b) { return {_mm256_max_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Float min(Avx2Float a, Avx2Float b) { return {_mm256_min_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Float abs(Avx2Float a) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)))};
}
FLASHOPTIM_HD Avx2Float sqrt(Avx2Float a) { return {_mm256_sqrt_ps(a.v)}; }

FLASHOPTIM_HD Avx2Mask int_greater(Avx2Int a, Avx2Int b) { return {_mm256_cmpgt_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Mask int_equal(Avx2Int a, Avx2Int b) { return {_mm256_cmpeq_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int int_max(Avx2Int a, Avx2Int b) { return {_mm256_max_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int int_min(Avx2Int a, Avx2Int b) { return {_mm256_min_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx2Int unsigned_min(Avx2Int a, Avx2Int b) { return {_mm256_min_epu32(a.v, b.v)}; }

FLASHOPTIM_HD Avx2Mask unsigned_less(Avx2Int a, Avx2Int b) {
  const __m256i flip = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  return {_mm256_cmpgt_epi32(_mm256_xor_si256(b.v, flip), _mm256_xor_si256(a.v, flip))};
}

FLASHOPTIM_HD Avx2Int shift_left(Avx2Int a, uint32_t count) {
  return {_mm256_sll_epi32(a.v, _mm_cvtsi32_si128(static_cast<int>(count)))};
}
FLASHOPTIM_HD Avx2Int shift_right(Avx2Int a, uint32_t count) {
  return {_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(static_cast<int>(count)))};
}
FLASHOPTIM_HD Avx2Int shift_right_signed(Avx2Int a, uint32_t count) {
  return {_mm256_sra_epi32(a.v, _mm_cvtsi32_si128(static_cast<int>(count)))};
}
FLASHOPTIM_HD Avx2Int shift_left_each(Avx2Int a, Avx2Int count) { return {_mm256_sllv_epi32(a.v, count.v)}; }
FLASHOPTIM_HD Avx2Int shift_right_each(Avx2Int a, Avx2Int count) { return {_mm256_srlv_epi32(a.v, count.v)}; }

FLASHOPTIM_HD Avx2Int bit_length(Avx2Int a) {
  // See lanes_avx512-inl.h: the exponent of a float whose conversion cannot carry.
  const __m256i thinned = _mm256_andnot_si256(_mm256_srli_epi32(a.v, 1), a.v);
  const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(thinned)), 23);
  return {_mm256_max_epi32(_mm256_sub_epi32(exponent, _mm256_set1_epi32(126)), _mm256_setzero_si256())};
}

FLASHOPTIM_HD Avx2Float int_to_float(Avx2Int a) { return {_mm256_cvtepi32_ps(a.v)}; }
FLASHOPTIM_HD Avx2Int truncate_to_int(Avx2Float a) { return {_mm256_cvttps_epi32(a.v)}; }

FLASHOPTIM_HD Avx2Mask is_nan(Avx2Float a) { return {_mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))}; }
FLASHOPTIM_HD Avx2Mask equals(Avx2Float a, Avx2Float b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}
FLASHOPTIM_HD Avx2Mask greater(Avx2Float a, Avx2Float b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}

/// Eight 16-bit values from the low halves of eight lanes.
FLASHOPTIM_HD __m128i low_halves(__m256i a) {
  const __m256i masked = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_packus_epi32(masked, masked);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

FLASHOPTIM_HD Avx2Float half_to_float(Avx2Int bits) {
  return canonical_nan(Avx2Float{_mm256_cvtph_ps(low_halves(bits.v))});
}
FLASHOPTIM_HD Avx2Int float_to_half(Avx2Float a) {
  const __m256i half = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return select(is_nan(a), splat_bits<Avx2Float>(0x7e00u), Avx2Int{half});
}

// Memory, and what only the loops need.

FLASHOPTIM_HD void store_f32(float* p, Avx2Float a) { _mm256_storeu_ps(p, a.v); }

FLASHOPTIM_HD void store_u32(uint32_t* p, Avx2Int a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }

/// Low 8 or 16 bits of each lane.
FLASHOPTIM_HD void store_8(uint8_t* p, Avx2Int a) {
  const __m128i halves = low_halves(_mm256_and_si256(a.v, _mm256_set1_epi32(0xff)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}

FLASHOPTIM_HD void store_16(uint16_t* p, Avx2Int a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(a.v));
}

/// Lane r is the maximum (minimum) over row r of 8 rows of 8 lanes, by a tree that reduces within halves of registers
/// and then across them: 21 operations, where separate reductions take 56.
template <class Pick>
FLASHOPTIM_HD Avx2Int reduce_8_rows(const uint32_t* rows, Pick pick) {
  const auto row = [rows](int r) __attribute__((always_inline)) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + 8 * r));
  };
  const auto quarter = [&](int r) __attribute__((always_inline)) {
    const __m256i r0 = row(r), r1 = row(r + 1), r2 = row(r + 2), r3 = row(r + 3);
    const __m256i m01 = pick(_mm256_unpacklo_epi32(r0, r1), _mm256_unpackhi_epi32(r0, r1));
    const __m256i m23 = pick(_mm256_unpacklo_epi32(r2, r3), _mm256_unpackhi_epi32(r2, r3));
    return pick(_mm256_unpacklo_epi64(m01, m23), _mm256_unpackhi_epi64(m01, m23));
  };
  const __m256i low = quarter(0), high = quarter(4);
  return {pick(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31))};
}

template <>
struct LaneMemory<Avx2Float> {
  static FLASHOPTIM_HD Avx2Float load_f32(const float* p) { return {_mm256_loadu_ps(p)}; }

  static FLASHOPTIM_HD Avx2Int load_u32(const uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }

  static FLASHOPTIM_HD Avx2Int load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }

  static FLASHOPTIM_HD Avx2Int load_i8(const uint8_t* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }

  static FLASHOPTIM_HD Avx2Int load_u16(const uint16_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  static FLASHOPTIM_HD Avx2Int load_i16(const uint16_t* p) {
    return {_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  /// j * step for lane j, modulo 2^32.
  static FLASHOPTIM_HD Avx2Int lane_multiples(uint32_t step) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(step)))};
  }

  /// out[r] = max (as signed numbers) over lanes of rows[r * kWidth ...], r = 0 ... 15.
  static FLASHOPTIM_HD void max_of_rows(const uint32_t* rows, uint32_t* out) {
    const auto pick = [](__m256i a, __m256i b) { return _mm256_max_epi32(a, b); };
    for (int r = 0; r < 16; r += 8) store_u32(out + r, reduce_8_rows(rows + 8 * r, pick));
  }

  /// The same for minima as unsigned numbers.
  static FLASHOPTIM_HD void unsigned_min_of_rows(const uint32_t* rows, uint32_t* out) {
    const auto pick = [](__m256i a, __m256i b) { return _mm256_min_epu32(a, b); };
    for (int r = 0; r < 16; r += 8) store_u32(out + r, reduce_8_rows(rows + 8 * r, pick));
  }
};

}  // namespace flashoptim::core
