// The hot path's weights: 16 of them, with a correction or without. hot_unit-inl.cuh says what the hot path is.
//
//   struct SomeWeights {
//     static constexpr bool kMustMove;                   // delta must not be 0
//     HotWords<...> parameter, correction;               // as stored; correction where the format has one
//     struct Part;                                       // what move() needs of a weight
//     float master(tables, int i, Part&);                // weight i
//     void move(int i, const Part&, float delta);        // the new weight, but for the dither
//     bool hold();                                       // after all: whether this way gives core's bits
//     void finish(dither_start, minus_largest);          // the new ones as they are stored
//   };
#pragma once

#include "src/cuda/hot_identities.h"
#include "src/cuda/hot_tables-inl.cuh"

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

/// Element i of 16, which two or four bytes each make.
template <DType kDType, int kWords>
__device__ __forceinline__ float hot_element(const HotWords<kWords>& words, int i) {
  if constexpr (kDType == DType::kFloat32) {
    static_assert(kWords == kHotUnit);
    return core::from_bits(words.w[i]);
  } else {
    return narrow_element<NarrowOf<kDType>>(words, i);
  }
}

/// 16-bit weights with a correction: what both ways of rounding share.
template <class Narrow, int kBitsOf, bool kZeros>
struct HotSplitWeights {
  static constexpr int kBits = kBitsOf;
  static constexpr int kCorrectionBytes = kBits / 8;
  static constexpr bool kMustMove = !kZeros;
  /// Narrow values are taken for normal numbers, which bf16's are but for 0.
  static constexpr bool kNormal = !kZeros && Narrow::kBias == 127;
  HotWords<8> parameter;
  HotWords<4 * kCorrectionBytes> correction;
  float moved[kHotUnit];   ///< what the new weights are made of
  float delta_[kHotUnit];  ///< kZeros alone
  uint32_t smallest_scale = 0x7f800000u, even_scale = 0u;

  /// Normal narrow values are also large enough for a correction's value to be a normal number.
  static constexpr uint32_t kSmallestNormalScale = (127u - 90u) << 23;
  __device__ __forceinline__ bool are_normal() const { return !kNormal || smallest_scale >= kSmallestNormalScale; }

  /// core::correction_value as a product that is exact where kNormal: an fma that adds to it rounds as the sum does.
  struct Part {
    float fraction, scale;

    __device__ __forceinline__ float plus(float a) const {
      return kNormal ? fused(fraction, scale, a) : a + fraction * scale;
    }
  };

  /// Of a finite narrow value n. Half an ULP of 1 is a power of two and scales exactly. 16 bits without conversions: a
  /// half under the exponent of 2^23 becomes a float by one subtraction; c * high is exact, so an fma rounds as the sum
  /// does.
  template <class Tables>
  __device__ __forceinline__ Part correction_value(const Tables& tables, float n, int i) {
    using C = core::Correction<kBits>;
    constexpr float kHalfUlp = core::half_ulp_of_unit_scale<Narrow>();
    Part out;
    if constexpr (kBits == 8) {
      out.fraction = look_up(tables.fractions(), correction, i);
    } else {
      const float c =
          core::from_bits(permute(correction.w[i / 2] ^ 0x80008000u, 0x4b000000u, i % 2 == 0 ? 0x7410u : 0x7432u)) -
          (0x1p23f + 32768.0f);
      out.fraction = __fmaf_rn(c, C::kInverseHigh * kHalfUlp, c * (C::kInverseLow * kHalfUlp));
    }
    if constexpr (!kNormal) {
      out.scale = core::from_bits(core::scale_bits<Narrow, float>(n));
      return out;
    }
    const uint32_t scale = core::to_bits(n) & 0x7f800000u;
    if (i % 2 == 0) {
      even_scale = scale;
    } else {  // the pairs are one instruction on sm_90
      smallest_scale = static_cast<uint32_t>(
          __vimin3_s32(static_cast<int>(smallest_scale), static_cast<int>(even_scale), static_cast<int>(scale)));
    }
    out.scale = core::from_bits(scale);
    return out;
  }
  template <class Tables>
  __device__ __forceinline__ float master(const Tables& tables, int i, Part& part) {
    const float n = narrow(i);
    part = correction_value(tables, n, i);
    return part.plus(n);
  }

  __device__ __forceinline__ uint32_t correction_in_top(int i) const {
    if constexpr (kBits == 8) return correction.w[i / 4] << (24 - 8 * (i % 4));
    return correction.w[i / 2] << (16 - 16 * (i % 2));
  }

  __device__ __forceinline__ float narrow(int i) const { return narrow_element<Narrow>(parameter, i); }

  /// Where delta is 0, the old pair of narrow values instead of the rounded one.
  static __device__ __forceinline__ uint32_t keep_unmoved(uint32_t rounded, uint32_t old, float delta, float next) {
    if constexpr (kZeros) {
      if (delta == 0.0f) rounded = permute(rounded, old, 0x3254u);
      if (next == 0.0f) rounded = permute(rounded, old, 0x7610u);
    }
    return rounded;
  }

  /// Patterns of twice_inverse_scale(E), 255 - E being E's complement, of new narrow values; kMantissa: times so much.
  template <uint32_t kMantissa>
  struct Inverses {
    int smallest = 0x7f800000, largest = 0;
    uint32_t of[2];

    __device__ __forceinline__ void set(float a, float b) {
      of[0] = (~core::to_bits(a) & 0x7f800000u) | kMantissa;
      of[1] = (~core::to_bits(b) & 0x7f800000u) | kMantissa;
      // One LOP3 each; the compiler would take the minimum without the mantissa.
      if constexpr (kMantissa != 0u) asm("" : "+r"(of[0]), "+r"(of[1]));
      smallest = __vimin3_s32(smallest, static_cast<int>(of[0]), static_cast<int>(of[1]));
      if constexpr (kNormal) largest = __vimax3_s32(largest, static_cast<int>(of[0]), static_cast<int>(of[1]));
    }
    __device__ __forceinline__ float get(int k) const {
      constexpr uint32_t kSmallestScale = static_cast<uint32_t>(1 - Narrow::kBias + 127) << 23;
      return core::from_bits(kNormal ? of[k] : core::int_min(of[k], (0x7f800000u - kSmallestScale) | kMantissa));
    }
    /// False where a new value is infinite, or no normal number where it must be one.
    __device__ __forceinline__ bool hold() const {
      return smallest != static_cast<int>(kMantissa) && largest != static_cast<int>(0x7f800000u | kMantissa);
    }
  };
};

/// With a dithered correction.
template <class Narrow, int kBits, bool kZeros>
struct HotDitheredWeights : HotSplitWeights<Narrow, kBits, kZeros> {
  using Base = HotSplitWeights<Narrow, kBits, kZeros>;

  using typename Base::Part;

  using Fixed = FixedCorrection<Narrow, kBits>;
  typename Base::template Inverses<0u> inverses;
  uint32_t fixed[kHotUnit];

  /// core::split_update_dithered of element i, whose delta is finite, but for the dither; of two at odd i.
  __device__ __forceinline__ void move(int i, const Part& part, float delta) {
    this->moved[i] = part.plus(-delta);
    this->delta_[i] = delta;
    if (i % 2 == 0) return;
    using Pair = NarrowPair<Narrow>;
    constexpr float kUnits = static_cast<float>(1 << Narrow::kMantissaBits) * static_cast<float>(Fixed::kLargest);
    const float(&rest)[kHotUnit] = this->moved;
    const int j = i - 1;
    const uint32_t old = this->parameter.w[j / 2];
    const float n[2] = {Pair::low(old), Pair::high(old)};
    const uint32_t rounded =
        Base::keep_unmoved(Pair::round_pair(n[0] + rest[j], n[1] + rest[i]), old, this->delta_[j], this->delta_[i]);
    this->parameter.w[j / 2] = rounded;
    const float n_new[2] = {Pair::low(rounded), Pair::high(rounded)};
    inverses.set(n_new[0], n_new[1]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float new_rest = (n[k] - n_new[k]) + rest[j + k];
      fixed[j + k] = Fixed::make((new_rest * inverses.get(k)) * kUnits);
    }
  }

  /// Not where a weight becomes infinite, or no normal number where it must be one.
  __device__ __forceinline__ bool hold() const { return this->are_normal() && inverses.hold(); }

  __device__ __forceinline__ void finish(uint32_t dither_start, uint32_t minus_largest) {
    constexpr auto kStream = core::DitherStream::kWeight;
    uint32_t top[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      top[i] = Fixed::dithered(fixed[i], core::GroupDither::word<kStream>(dither_start, i), minus_largest);
      if constexpr (kZeros) {
        if (this->delta_[i] == 0.0f) top[i] = this->correction_in_top(i);
      }
    }
    if constexpr (kBits == 8) {
      this->correction = pack_bytes<3>(top);
    } else {
      this->correction = pack_top_halves(top);
    }
  }
};

/// With a correction of 8 bits rounded to nearest.
template <class Narrow, bool kZeros>
struct HotNearestWeights : HotSplitWeights<Narrow, 8, kZeros> {
  static_assert(std::is_same_v<Narrow, core::BFloat16>, "nearest_correction()");
  using Base = HotSplitWeights<Narrow, 8, kZeros>;

  using Part = float;
  typename Base::template Inverses<kMantissaOf127> inverses;
  uint32_t corrections[kHotUnit];  ///< in the low bytes

  template <class Tables>
  __device__ __forceinline__ float master(const Tables& tables, int i, Part& w) {
    typename Base::Part part;
    return w = Base::master(tables, i, part);
  }

  /// core::split_update_nearest of element i, whose delta is finite; of two at odd i.
  __device__ __forceinline__ void move(int i, Part weight, float delta) {
    this->moved[i] = weight - delta;
    this->delta_[i] = delta;
    if (i % 2 == 0) return;
    using Pair = NarrowPair<Narrow>;
    const float(&w)[kHotUnit] = this->moved;
    const int j = i - 1;
    const uint32_t rounded =
        Base::keep_unmoved(Pair::round_pair(w[j], w[i]), this->parameter.w[j / 2], this->delta_[j], this->delta_[i]);
    this->parameter.w[j / 2] = rounded;
    const float n[2] = {Pair::low(rounded), Pair::high(rounded)};
    inverses.set(n[0], n[1]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      corrections[j + k] = nearest_correction(w[j + k] - n[k], inverses.get(k));
      if constexpr (kZeros) {
        if (this->delta_[j + k] == 0.0f) corrections[j + k] = byte_of(this->correction, j + k);
      }
    }
  }
  __device__ __forceinline__ bool hold() const { return this->are_normal() && inverses.hold(); }
  __device__ __forceinline__ void finish(uint32_t, uint32_t) { this->correction = pack_bytes<0>(corrections); }
};

/// Weights that are all there is, rounded to nearest or without bias.
template <class Narrow, bool kStochastic>
struct HotPlainWeights {
  static_assert(!kStochastic || Narrow::kBias == 127, "fp16's subnormals are rounded in another unit");
  static constexpr bool kMustMove = false;
  HotWords<8> parameter;

  using Part = float;
  float moved[kHotUnit];

  template <class Tables>
  __device__ __forceinline__ float master(const Tables&, int i, Part& w) {
    return w = narrow_element<Narrow>(parameter, i);
  }
  __device__ __forceinline__ void move(int i, Part w, float delta) {
    moved[i] = w - delta;
    if constexpr (kStochastic) holds_ &= fabsf(moved[i]) < 0x1p127f;
  }
  /// Not where a weight may become infinite without bias.
  __device__ __forceinline__ bool hold() const { return holds_; }
  /// core's round, or round_dithered.
  __device__ __forceinline__ void finish(uint32_t dither_start, uint32_t) {
    if constexpr (kStochastic) {
      uint32_t top[kHotUnit];
#pragma unroll
      for (int i = 0; i < kHotUnit; ++i) {
        const uint32_t word = core::GroupDither::word<core::DitherStream::kWeight>(dither_start, i);
        top[i] = core::to_bits(moved[i]) + (word >> 16);
      }
      parameter = pack_top_halves(top);
    } else {
#pragma unroll
      for (int j = 0; j < kHotUnit; j += 2) parameter.w[j / 2] = NarrowPair<Narrow>::round_pair(moved[j], moved[j + 1]);
    }
  }

 private:
  bool holds_ = true;
};

/// fp32 weights. NaN shows in delta.
struct HotFullWeights {
  static constexpr bool kMustMove = false;
  HotWords<16> parameter;

  using Part = float;

  template <class Tables>
  __device__ __forceinline__ float master(const Tables&, int i, Part& w) {
    return w = core::from_bits(parameter.w[i]);
  }
  __device__ __forceinline__ void move(int i, Part w, float delta) { parameter.w[i] = core::to_bits(w - delta); }
  __device__ __forceinline__ bool hold() const { return true; }
  __device__ __forceinline__ void finish(uint32_t, uint32_t) {}
};

template <class Format, bool kZeros, class Narrow = NarrowOf<Format::kParameter>>
using HotWeightsOf = std::conditional_t<
    Format::kParameter == DType::kFloat32, HotFullWeights,
    std::conditional_t<!Format::kIsCorrected,
                       HotPlainWeights<Narrow, Format::kMaster == MasterWeights::kNoneStochastic>,
                       std::conditional_t<core::is_nearest(Format::kMaster), HotNearestWeights<Narrow, kZeros>,
                                          HotDitheredWeights<Narrow, 8 * Format::kCorrectionBytes, kZeros>>>>;

}  // namespace flashoptim::cuda
