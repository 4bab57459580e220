// 16 lanes of AVX-512 (F, BW, DQ, VL): the operations of core/lanes.h, each bit-equal to the scalar one.
// Only included by translation units compiled for AVX-512, which define FLASHOPTIM_AVX512, the name of theirs.
#pragma once

#include <immintrin.h>

#include "src/cpu/lane_memory.h"

namespace flashoptim::core {

// The same lanes are compiled for two instruction sets; a type each keeps the linker from taking one's code for the
// other's.
inline namespace FLASHOPTIM_AVX512 {

struct Avx512Int {
  __m512i v;
};
struct Avx512Float {
  __m512 v;
};
struct Avx512Mask {
  __mmask16 v;
};

}  // namespace FLASHOPTIM_AVX512

template <>
struct LaneTraits<Avx512Float> {
  using Int = Avx512Int;
  using Mask = Avx512Mask;
  static constexpr int kWidth = 16;
  static FLASHOPTIM_HD Avx512Float splat(float value) { return {_mm512_set1_ps(value)}; }
  static FLASHOPTIM_HD Avx512Int splat_bits(uint32_t bits) { return {_mm512_set1_epi32(static_cast<int>(bits))}; }
};

FLASHOPTIM_HD Avx512Float operator+(Avx512Float a, Avx512Float b) { return {_mm512_add_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Float operator-(Avx512Float a, Avx512Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Float operator*(Avx512Float a, Avx512Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Float operator/(Avx512Float a, Avx512Float b) { return {_mm512_div_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int operator+(Avx512Int a, Avx512Int b) { return {_mm512_add_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int operator-(Avx512Int a, Avx512Int b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int operator*(Avx512Int a, Avx512Int b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int operator&(Avx512Int a, Avx512Int b) { return {_mm512_and_si512(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int operator|(Avx512Int a, Avx512Int b) { return {_mm512_or_si512(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int operator^(Avx512Int a, Avx512Int b) { return {_mm512_xor_si512(a.v, b.v)}; }

FLASHOPTIM_HD Avx512Int to_bits(Avx512Float a) { return {_mm512_castps_si512(a.v)}; }
FLASHOPTIM_HD Avx512Float from_bits(Avx512Int a) { return {_mm512_castsi512_ps(a.v)}; }

FLASHOPTIM_HD Avx512Float select(Avx512Mask m, Avx512Float a, Avx512Float b) {
  return {_mm512_mask_blend_ps(m.v, b.v, a.v)};
}
FLASHOPTIM_HD Avx512Int select(Avx512Mask m, Avx512Int a, Avx512Int b) {
  return {_mm512_mask_blend_epi32(m.v, b.v, a.v)};
}

// vmaxps returns its second operand when either is NaN or both are zero: a > b ? a : b.
FLASHOPTIM_HD Avx512Float max(Avx512Float a, Avx512Float b) { return {_mm512_max_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Float min(Avx512Float a, Avx512Float b) { return {_mm512_min_ps(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Float abs(Avx512Float a) { return {_mm512_abs_ps(a.v)}; }
FLASHOPTIM_HD Avx512Float sqrt(Avx512Float a) { return {_mm512_sqrt_ps(a.v)}; }

FLASHOPTIM_HD Avx512Mask int_greater(Avx512Int a, Avx512Int b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Mask int_equal(Avx512Int a, Avx512Int b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int int_max(Avx512Int a, Avx512Int b) { return {_mm512_max_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int int_min(Avx512Int a, Avx512Int b) { return {_mm512_min_epi32(a.v, b.v)}; }
FLASHOPTIM_HD Avx512Int unsigned_min(Avx512Int a, Avx512Int b) { return {_mm512_min_epu32(a.v, b.v)}; }

FLASHOPTIM_HD Avx512Mask unsigned_less(Avx512Int a, Avx512Int b) { return {_mm512_cmplt_epu32_mask(a.v, b.v)}; }

FLASHOPTIM_HD Avx512Int shift_left(Avx512Int a, uint32_t count) {
  return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(static_cast<int>(count)))};
}
FLASHOPTIM_HD Avx512Int shift_right(Avx512Int a, uint32_t count) {
  return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(static_cast<int>(count)))};
}
FLASHOPTIM_HD Avx512Int shift_right_signed(Avx512Int a, uint32_t count) {
  return {_mm512_sra_epi32(a.v, _mm_cvtsi32_si128(static_cast<int>(count)))};
}
FLASHOPTIM_HD Avx512Int shift_left_each(Avx512Int a, Avx512Int count) { return {_mm512_sllv_epi32(a.v, count.v)}; }
FLASHOPTIM_HD Avx512Int shift_right_each(Avx512Int a, Avx512Int count) { return {_mm512_srlv_epi32(a.v, count.v)}; }

FLASHOPTIM_HD Avx512Int bit_length(Avx512Int a) {
  // Without carries into the next power of two (a & ~(a >> 1) has no two neighbouring ones at the top), the exponent
  // of the float is the place of the highest bit. AVX-512F alone has no lzcnt.
  const __m512i thinned = _mm512_andnot_si512(_mm512_srli_epi32(a.v, 1), a.v);
  const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(thinned)), 23);
  return {_mm512_max_epi32(_mm512_sub_epi32(exponent, _mm512_set1_epi32(126)), _mm512_setzero_si512())};
}

FLASHOPTIM_HD Avx512Float int_to_float(Avx512Int a) { return {_mm512_cvtepi32_ps(a.v)}; }
FLASHOPTIM_HD Avx512Int truncate_to_int(Avx512Float a) { return {_mm512_cvttps_epi32(a.v)}; }

FLASHOPTIM_HD Avx512Mask is_nan(Avx512Float a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
FLASHOPTIM_HD Avx512Mask equals(Avx512Float a, Avx512Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FLASHOPTIM_HD Avx512Mask greater(Avx512Float a, Avx512Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }

FLASHOPTIM_HD Avx512Float half_to_float(Avx512Int bits) {
  const __m512 wide = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits.v));
  return canonical_nan(Avx512Float{wide});
}
FLASHOPTIM_HD Avx512Int float_to_half(Avx512Float a) {
  const __m512i half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return select(is_nan(a), splat_bits<Avx512Float>(0x7e00u), Avx512Int{half});
}

// Memory, and what only the loops need.

FLASHOPTIM_HD void store_f32(float* p, Avx512Float a) { _mm512_storeu_ps(p, a.v); }

FLASHOPTIM_HD void store_u32(uint32_t* p, Avx512Int a) { _mm512_storeu_si512(p, a.v); }

/// Low 8 or 16 bits of each lane.
FLASHOPTIM_HD void store_8(uint8_t* p, Avx512Int a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

FLASHOPTIM_HD void store_16(uint16_t* p, Avx512Int a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

/// Maxima (minima) over rows of 16 lanes, by a tree that reduces four rows at a time within 128-bit lanes and then
/// across them: 45 operations for 16 rows, where separate reductions take 144. Lane 4 i + r of the result is a quarter
/// of row r's.
template <class Pick>
FLASHOPTIM_HD __m512i reduce_4_rows(__m512i r0, __m512i r1, __m512i r2, __m512i r3, Pick pick) {
  const __m512i m01 = pick(_mm512_unpacklo_epi32(r0, r1), _mm512_unpackhi_epi32(r0, r1));
  const __m512i m23 = pick(_mm512_unpacklo_epi32(r2, r3), _mm512_unpackhi_epi32(r2, r3));
  return pick(_mm512_unpacklo_epi64(m01, m23), _mm512_unpackhi_epi64(m01, m23));
}
/// Of 16 rows, from four results of reduce_4_rows: lane r is row r's.
template <class Pick>
FLASHOPTIM_HD Avx512Int reduce_quarters(const uint32_t* quarters, Pick pick) {
  const __m512i q0 = _mm512_load_si512(quarters), q1 = _mm512_load_si512(quarters + 16);
  const __m512i q2 = _mm512_load_si512(quarters + 32), q3 = _mm512_load_si512(quarters + 48);
  const __m512i low = pick(_mm512_shuffle_i32x4(q0, q1, 0x88), _mm512_shuffle_i32x4(q0, q1, 0xdd));
  const __m512i high = pick(_mm512_shuffle_i32x4(q2, q3, 0x88), _mm512_shuffle_i32x4(q2, q3, 0xdd));
  return {pick(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd))};
}
template <class Pick>
FLASHOPTIM_HD Avx512Int reduce_16_rows(const uint32_t* rows, Pick pick) {
  alignas(64) uint32_t quarters[64];
  for (int q = 0; q < 4; ++q) {
    const uint32_t* const r = rows + 64 * q;
    _mm512_store_si512(quarters + 16 * q, reduce_4_rows(_mm512_load_si512(r), _mm512_load_si512(r + 16),
                                                        _mm512_load_si512(r + 32), _mm512_load_si512(r + 48), pick));
  }
  return reduce_quarters(quarters, pick);
}

template <>
struct LaneMemory<Avx512Float> {
  static FLASHOPTIM_HD Avx512Float load_f32(const float* p) { return {_mm512_loadu_ps(p)}; }

  static FLASHOPTIM_HD Avx512Int load_u32(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }

  static FLASHOPTIM_HD Avx512Int load_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  static FLASHOPTIM_HD Avx512Int load_i8(const uint8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  static FLASHOPTIM_HD Avx512Int load_u16(const uint16_t* p) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }

  static FLASHOPTIM_HD Avx512Int load_i16(const uint16_t* p) {
    return {_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }

  /// j * step for lane j, modulo 2^32.
  static FLASHOPTIM_HD Avx512Int lane_multiples(uint32_t step) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(step)))};
  }

  /// out[r] = max (as signed numbers) over lanes of rows[r * kWidth ...], r = 0 ... 15. Both 64-byte aligned.
  static FLASHOPTIM_HD void max_of_rows(const uint32_t* rows, uint32_t* out) {
    store_u32(out, reduce_16_rows(rows, [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }));
  }

  /// The same for minima as unsigned numbers.
  static FLASHOPTIM_HD void unsigned_min_of_rows(const uint32_t* rows, uint32_t* out) {
    store_u32(out, reduce_16_rows(rows, [](__m512i a, __m512i b) { return _mm512_min_epu32(a, b); }));
  }
};

}  // namespace flashoptim::core
