// The hot path's weights: 16 of them, with a dithered correction or without. hot_unit-inl.cuh says what the hot path
// is.
#pragma once

#include "src/cuda/hot_memory-inl.cuh"

namespace flashoptim::cuda {

/// Pairs of narrow values in a word. round_pair is core's round for everything but NaN.
template <class Narrow>
struct NarrowPair;

template <>
struct NarrowPair<core::BFloat16> {
  static __device__ __forceinline__ float low(uint32_t w) { return core::from_bits(w << 16); }
  static __device__ __forceinline__ float high(uint32_t w) { return core::from_bits(w & 0xffff0000u); }
  static __device__ __forceinline__ uint32_t round_pair(float a, float b) {
#if __CUDA_ARCH__ >= 800
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(b), "f"(a));
    return out;
#else
    return core::BFloat16::round<float>(a) | core::BFloat16::round<float>(b) << 16;
#endif
  }
};

template <>
struct NarrowPair<core::Float16> {
  static __device__ __forceinline__ float low(uint32_t w) { return __low2float(reinterpret_cast<const __half2&>(w)); }
  static __device__ __forceinline__ float high(uint32_t w) { return __high2float(reinterpret_cast<const __half2&>(w)); }
  static __device__ __forceinline__ uint32_t round_pair(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

template <class Narrow, int kWords>
__device__ __forceinline__ float narrow_element(const HotWords<kWords>& words, int i) {
  return i % 2 == 0 ? NarrowPair<Narrow>::low(words.w[i / 2]) : NarrowPair<Narrow>::high(words.w[i / 2]);
}

/// Weights with a dithered correction.
template <class Narrow, MasterWeights kMaster, bool kZeros>
struct HotWeights {
  static constexpr int kBits = kHotBits<kMaster>;
  static constexpr int kCorrectionBytes = kBits / 8;
  static constexpr bool kMustMove = !kZeros;  ///< delta is not 0
  /// Narrow values are taken for normal numbers, which bf16's are but for 0.
  static constexpr bool kNormal = !kZeros && Narrow::kBias == 127;
  HotWords<8> parameter;
  HotWords<4 * kCorrectionBytes> correction;
  uint32_t smallest_scale = 0x7f800000u, even_scale = 0u;

  /// Whether narrow values were what they were taken for.
  __device__ __forceinline__ bool are_normal() const { return !kNormal || smallest_scale != 0u; }

  /// core::correction_value for a finite narrow value n. Half an ULP of 1 is a power of two and scales exactly. 16 bits
  /// without conversions: a half under the exponent of 2^23 becomes a float by one subtraction; c * high is exact, so
  /// an fma rounds as the sum does.
  template <class Tables>
  __device__ __forceinline__ float correction_value(const Tables& tables, float n, int i) {
    using C = core::Correction<kBits>;
    constexpr float kHalfUlp = core::half_ulp_of_unit_scale<Narrow>();
    float fraction;
    if constexpr (kBits == 8) {
      fraction = look_up(tables.fractions(), correction, i);
    } else {
      const float c =
          core::from_bits(permute(correction.w[i / 2] ^ 0x80008000u, 0x4b000000u, i % 2 == 0 ? 0x7410u : 0x7432u)) -
          (0x1p23f + 32768.0f);
      fraction = __fmaf_rn(c, C::kInverseHigh * kHalfUlp, c * (C::kInverseLow * kHalfUlp));
    }
    if constexpr (!kNormal) return fraction * core::from_bits(core::scale_bits<Narrow, float>(n));
    const uint32_t scale = core::to_bits(n) & 0x7f800000u;
    if (i % 2 == 0) {
      even_scale = scale;
    } else {  // the pairs are one instruction on sm_90
      smallest_scale = static_cast<uint32_t>(
          __vimin3_s32(static_cast<int>(smallest_scale), static_cast<int>(even_scale), static_cast<int>(scale)));
    }
    return fraction * core::from_bits(scale);
  }

  __device__ __forceinline__ uint32_t correction_in_top(int i) const {
    if constexpr (kBits == 8) return correction.w[i / 4] << (24 - 8 * (i % 4));
    return correction.w[i / 2] << (16 - 16 * (i % 2));
  }

  /// core::split_update_dithered of 16 weights: `value` is their correction_value, delta is finite. False where a
  /// weight becomes infinite, or no normal number where it must be one.
  __device__ __forceinline__ bool update(const float (&value)[kHotUnit], const float (&delta)[kHotUnit],
                                         uint32_t dither_start) {
    using Pair = NarrowPair<Narrow>;
    constexpr auto kStream = core::DitherStream::kWeight;
    constexpr float kMax = core::Correction<kBits>::kMax;
    constexpr int kFraction = kBits == 8 ? 23 : 15;
    constexpr float kOne = static_cast<float>(1 << kFraction);
    constexpr float kUnits = static_cast<float>(1 << Narrow::kMantissaBits) * kMax * kOne;
    constexpr uint32_t kSmallestScale = static_cast<uint32_t>(1 - Narrow::kBias + 127) << 23;
    constexpr uint32_t kLargestFixed = static_cast<uint32_t>(kMax * kOne);
    uint32_t top[kHotUnit];
    int smallest_inverse = 0x7f800000, largest_inverse = 0;
#pragma unroll
    for (int j = 0; j < kHotUnit; j += 2) {
      const uint32_t old = parameter.w[j / 2];
      const float n[2] = {Pair::low(old), Pair::high(old)};
      const float rest[2] = {value[j] - delta[j], value[j + 1] - delta[j + 1]};
      uint32_t rounded = Pair::round_pair(n[0] + rest[0], n[1] + rest[1]);
      if constexpr (kZeros) {
        if (delta[j] == 0.0f) rounded = permute(rounded, old, 0x3254u);
        if (delta[j + 1] == 0.0f) rounded = permute(rounded, old, 0x7610u);
      }
      parameter.w[j / 2] = rounded;
      const float n_new[2] = {Pair::low(rounded), Pair::high(rounded)};
      // twice_inverse_scale(E): 255 - E is E's complement.
      const uint32_t inverses[2] = {~core::to_bits(n_new[0]) & 0x7f800000u, ~core::to_bits(n_new[1]) & 0x7f800000u};
      smallest_inverse = __vimin3_s32(smallest_inverse, static_cast<int>(inverses[0]), static_cast<int>(inverses[1]));
      if constexpr (kNormal) {
        largest_inverse = __vimax3_s32(largest_inverse, static_cast<int>(inverses[0]), static_cast<int>(inverses[1]));
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float new_rest = (n[k] - n_new[k]) + rest[k];
        const uint32_t inverse = kNormal ? inverses[k] : core::int_min(inverses[k], 0x7f800000u - kSmallestScale);
        const float x = (new_rest * core::from_bits(inverse)) * kUnits;
        // |x| exceeds N 2^F by roundings alone: clamping the integer, from 0 on, is one instruction.
        const uint32_t fixed =
            clamp_from_zero(static_cast<uint32_t>(__float2int_rz(x)) + kLargestFixed, 2u * kLargestFixed);
        const uint32_t word = core::GroupDither::word<kStream>(dither_start, j + k);
        // (fixed - N 2^F + (word >> 32 - F)) >> F, one digit to the left: the dither's digit below the last place
        // cannot carry. -N stands above the dither, where the shift leaves room.
        top[j + k] = fixed * 2u + (kBits == 8 ? permute(word, 0x81u, 0x4321u) : permute(word, 0x8001u, 0x5432u));
        if constexpr (kZeros) {
          if (delta[j + k] == 0.0f) top[j + k] = correction_in_top(j + k);
        }
      }
    }
    if constexpr (kBits == 8) {
      correction = pack_top_bytes(top);
    } else {
      correction = pack_top_halves(top);
    }
    return smallest_inverse != 0 && largest_inverse != 0x7f800000;
  }
};

/// Weights that are all there is, rounded to nearest or without bias.
template <class Narrow, bool kStochastic>
struct HotPlainWeights {
  static_assert(!kStochastic || Narrow::kBias == 127, "fp16's subnormals are rounded in another unit");
  static constexpr bool kMustMove = false;
  HotWords<8> parameter;

  __device__ __forceinline__ bool are_normal() const { return true; }
  /// core's round, or round_dithered, of w - delta. False where a weight may become infinite without bias.
  __device__ __forceinline__ bool update(const float (&delta)[kHotUnit], uint32_t dither_start) {
    using Pair = NarrowPair<Narrow>;
    bool ok = true;
    uint32_t top[kHotUnit];
#pragma unroll
    for (int j = 0; j < kHotUnit; j += 2) {
      const uint32_t old = parameter.w[j / 2];
      const float w[2] = {Pair::low(old) - delta[j], Pair::high(old) - delta[j + 1]};
      if constexpr (kStochastic) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t word = core::GroupDither::word<core::DitherStream::kWeight>(dither_start, j + k);
          top[j + k] = core::to_bits(w[k]) + (word >> 16);
          ok &= fabsf(w[k]) < 0x1p127f;
        }
      } else {
        parameter.w[j / 2] = Pair::round_pair(w[0], w[1]);
      }
    }
    if constexpr (kStochastic) parameter = pack_top_halves(top);
    return ok;
  }
};

template <class Narrow, MasterWeights kMaster, bool kZeros>
using HotWeightsOf = std::conditional_t<core::has_correction(kMaster), HotWeights<Narrow, kMaster, kZeros>,
                                        HotPlainWeights<Narrow, kMaster == MasterWeights::kNoneStochastic>>;

}  // namespace flashoptim::cuda
