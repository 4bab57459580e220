// The hot path: 16 elements a thread with 16-bit weights, dithered corrections and the default codec, in about half of
// the instructions that core's formulas compile to. The same bits: every step is an identity of core's, said beside it,
// under conditions that are collected and tested before anything is written. Where one fails (zeros, subnormals,
// infinities, NaN, absurd magnitudes), the warp takes core's formulas instead. tests/cuda compares both with the CPU.
//
// Zeros are common, though: rows of an embedding that no batch has touched. kZeros is the same with some 10
// instructions an element more, for tiles that hold some.
//
// What counts on the H100 is instructions (docs/cuda.md): at full clock about 110 an element fit into the time that
// memory takes, and half of them may be on the ALU pipe (integers, comparisons, selections). So shifts and additions
// become IMAD, bytes are picked by PRMT, and codes are formed in the top byte of a word, from where the packing takes
// them.
#pragma once

#include <cuda_fp16.h>

#include "src/cuda/arguments.h"
#include "src/cuda/states-inl.cuh"
#include "src/cuda/weights-inl.cuh"

namespace flashoptim::cuda {

/// Where variances of at most kLargest vouch for what a rule bounds, and for its divisors (UpdateLane's kBounded).
template <class Rule, bool = core::kHasBoundingVariance<Rule>>
struct VarianceBounds {
  static constexpr bool kKnown = false;
  static constexpr uint32_t kLargest = (127u + 124u) << 23;  ///< a pattern, far below where storable() saturates
  static __device__ __forceinline__ bool hold(const typename Rule::Hyper&) { return true; }
};
/// The bound of radicands (UpdateGuard) is a bound of divisors as well.
template <class Rule>
struct VarianceBounds<Rule, true> {
  static constexpr bool kKnown = true;
  static constexpr uint32_t kLargest = Rule::kLargestBoundingVariance;
  static __device__ __forceinline__ bool hold(const typename Rule::Hyper& h) { return Rule::variance_bounds(h); }
};

/// Bits of a correction; 0: none.
template <MasterWeights kMaster>
inline constexpr int kHotBits = core::has_correction(kMaster) ? core::correction_bits(kMaster) : 0;

__device__ __forceinline__ const PreparedHyper* hyper_of(const StepArguments& args, const TensorEntry& t) {
  return (args.hypers != nullptr ? args.hypers : args.inline_hypers) + t.hyper_index;
}

/// What the tiles of one tensor share, in shared memory: registers are for elements. Addresses are those of a segment
/// of 2^kSegmentBits groups, so that offsets have 32 bits.
struct alignas(16) HotContext {
  unsigned char* parameter;
  const unsigned char* gradient;
  unsigned char* correction;
  unsigned char* states[kMaxSlots];
  uint16_t* scales[kMaxSlots];
  uint64_t first_index;  ///< of the segment in the whole tensor, for the dither
  PreparedHyper prepared;
  /// Starts of the dither's streams, but for the group's hash.
  uint32_t phase_variance, phase_momentum, phase_weight;
  uint32_t full;  ///< groups before this one are full and lie at 32 times their number, on addresses for vectors
  bool active;

  /// Every thread of the warp calls it.
  template <class Rule, MasterWeights kMaster>
  __device__ __forceinline__ void open(const StepArguments& args, int32_t tensor, uint32_t segment, int thread) {
    const TensorEntry& t = args.tensors[tensor];
    const PreparedHyper* hyper = hyper_of(args, t);
    __syncwarp();
    if (thread < static_cast<int>(sizeof(PreparedHyper) / 4)) {
      reinterpret_cast<uint32_t*>(&prepared)[thread] = reinterpret_cast<const uint32_t*>(hyper)[thread];
    }
    if (thread == 0) {
      const int64_t first_group = static_cast<int64_t>(segment) << kSegmentBits;
      const int64_t first = first_group * kGroupSize;
      parameter = static_cast<unsigned char*>(t.parameter) + first * 2;
      gradient = static_cast<const unsigned char*>(t.gradient) + first * 2;
      correction = static_cast<unsigned char*>(t.correction) + first * (kHotBits<kMaster> / 8);
      for (int k = 0; k < kMaxSlots; ++k) {
        states[k] = static_cast<unsigned char*>(t.states[k]) + first;
        scales[k] = t.scales[k] + first_group;
      }
      first_index = static_cast<uint64_t>(t.first_element + first);
      const core::DitherKey key = hyper->dither;
      phase_variance = core::dither_group_start<core::DitherStream::kVariance, float>(key, 0u);
      phase_momentum = core::dither_group_start<core::DitherStream::kMomentum, float>(key, 0u);
      phase_weight = core::dither_group_start<core::DitherStream::kWeight, float>(key, 0u);
      active = t.gradient != nullptr && !hyper->skip;
      const int64_t left = t.numel / kGroupSize - first_group;
      const bool holds = VarianceBounds<Rule>::hold(reinterpret_cast<const typename Rule::Hyper&>(hyper->rule));
      const bool vectors = active && holds && (t.flags & kVectorAligned) && !(t.flags & kShortRows) &&
                           (reinterpret_cast<uintptr_t>(t.gradient) & 15u) == 0;
      full = !vectors ? 0u : left >= int64_t{1} << kSegmentBits ? 1u << kSegmentBits : static_cast<uint32_t>(left);
    }
    __syncwarp();
  }

  /// Whether the hot path may take a tile.
  __device__ __forceinline__ bool takes(uint32_t first, int count) const {
    return count >= kWarpGroups && first + kWarpGroups <= full;
  }
};

/// 16 codes, corrections or halves of them.
template <int kWords>
struct HotWords {
  uint32_t w[kWords];
};

/// Without the hint that the other kernels' stores have: with it, 268 M take 0.8 % longer.
template <int kWords>
__device__ __forceinline__ void hot_store(unsigned char* p, const HotWords<kWords>& words) {
#pragma unroll
  for (int j = 0; j < kWords / 4; ++j) {
    reinterpret_cast<uint4*>(p)[j] =
        make_uint4(words.w[4 * j], words.w[4 * j + 1], words.w[4 * j + 2], words.w[4 * j + 3]);
  }
}

/// 2^exponent as a factor: a product and a sum are one instruction, but the compiler would make a shift and a sum of
/// them.
__device__ __forceinline__ uint32_t power_of_two(uint32_t exponent) {
  uint32_t factor = 1u << exponent;
  asm("" : "+r"(factor));
  return factor;
}

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

/// min(max(a, 0), largest) of signed numbers.
__device__ __forceinline__ uint32_t clamp_from_zero(uint32_t a, uint32_t largest) {
  return static_cast<uint32_t>(__vimin_s32_relu(static_cast<int>(a), static_cast<int>(largest)));
}

/// The top bytes of 16 words.
__device__ __forceinline__ HotWords<4> pack_top_bytes(const uint32_t (&t)[kHotUnit]) {
  HotWords<4> out;
#pragma unroll
  for (int j = 0; j < kHotUnit / 4; ++j) {
    out.w[j] = permute(permute(t[4 * j], t[4 * j + 1], 0x0073u), permute(t[4 * j + 2], t[4 * j + 3], 0x0073u), 0x5410u);
  }
  return out;
}

/// The top halves of 16 words.
__device__ __forceinline__ HotWords<8> pack_top_halves(const uint32_t (&t)[kHotUnit]) {
  HotWords<8> out;
#pragma unroll
  for (int j = 0; j < kHotUnit / 2; ++j) out.w[j] = permute(t[2 * j], t[2 * j + 1], 0x7632u);
  return out;
}

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

/// Byte i of 16.
__device__ __forceinline__ uint32_t byte_of(const HotWords<4>& words, int i) {
  return permute(words.w[i / 4], 0u, 0x4440u + i % 4);
}

/// table[byte i of 16]; `table` is an address in shared memory. The dot product picks the byte, scales it and adds.
/// (The asm does not say that it reads memory: it stays behind the table's filling because the words are loaded behind
/// it.)
__device__ __forceinline__ float look_up(uint32_t table, const HotWords<4>& words, int i) {
  const uint32_t address = __dp4a(words.w[i / 4], 4u << (8 * (i % 4)), table);
  float value;
  asm("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

/// What codes stand for, by core's formulas, in shared memory: a look-up is 2 instructions for 4 to 7.
template <class Rule, class Narrow, MasterWeights kMaster>
struct HotTables {
  static constexpr int kBits = kHotBits<kMaster>;
  using MuLaw = typename core::SignedCodec<Rule::kSlots[0].mantissa_bits>::type;
  static constexpr bool kGroupChooses = Rule::kSlots[0].mantissa_bits == 0;  ///< K of momentum
  static constexpr int kChoices = kGroupChooses ? 4 : 1;

  float fraction[kBits == 8 ? 256 : 1];  ///< (c / N) * (half an ULP of 1), by the correction's byte
  float momentum[kChoices][256];         ///< x / G, by the choice in a group's header and the code

  /// Every thread of the block calls it, and waits for the others.
  __device__ __forceinline__ void fill() {
    for (uint32_t i = threadIdx.x; i < 256u; i += kHotThreads) {
      const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(i)));
      if constexpr (kBits == 8) {
        fraction[i] = core::correction_fraction<8>(core::int_to_float(code)) * core::half_ulp_of_unit_scale<Narrow>();
      }
#pragma unroll
      for (int k = 0; k < kChoices; ++k) {
        if constexpr (kGroupChooses) {
          momentum[k][i] = MuLaw::template decode<float>(code, MuLaw::template group<float>(static_cast<uint32_t>(k)));
        } else {
          momentum[k][i] = MuLaw::template decode<float>(code);
        }
      }
    }
    __syncthreads();
  }
  __device__ __forceinline__ uint32_t fractions() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(fraction));
  }
  __device__ __forceinline__ uint32_t momenta(uint32_t choice) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(momentum[0])) +
           choice * static_cast<uint32_t>(sizeof momentum[0]);
  }
};

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
        const uint32_t word = DitherSource::word<kStream>(dither_start, j + k);
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

/// Whether a word of codes has a byte 0.
__device__ __forceinline__ bool has_zero_byte(uint32_t w) { return ((w - 0x01010101u) & ~w & 0x80808080u) != 0u; }

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
          const uint32_t word = DitherSource::word<core::DitherStream::kWeight>(dither_start, j + k);
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

/// States of the default codec.
template <class Rule, bool kZeros>
struct HotStates {
  static constexpr bool kHasVariance = Rule::kSlotCount > 1;
  static constexpr uint32_t kExponentMask = 0x7f800000u;
  static constexpr bool kGroupChooses = Rule::kSlots[0].mantissa_bits == 0;
  using MuLaw = typename core::SignedCodec<Rule::kSlots[0].mantissa_bits>::type;

  HotWords<4> codes[Rule::kSlotCount];
  uint32_t header[Rule::kSlotCount];

  /// Codec::decode; without kZeros false where a variance is 0.
  template <class Tables>
  __device__ __forceinline__ bool decode(const Tables& tables, float (&m)[kHotUnit], float (&v)[kHotUnit]) const {
    const float scale = MuLaw::template decoding_scale<kHasVariance, float>(header[0]);
    core::WindowCodec::Window<uint32_t> window{};
    if constexpr (kHasVariance) window = core::WindowCodec::window<float>(header[1]);
    const uint32_t factor = power_of_two(window.shift);
    const uint32_t base = window.base_minus_one << window.shift;
    // No code may reach 2^31, where Codec::decode reads 0.
    bool ok = base + 255u * factor < 0x80000000u;
    // (x / G * G) 2^k as x / G * (G 2^k), whose exponent is a sum: exact for G >= 2^-50, where all products are normal
    // and the sum stays in its field.
    constexpr bool kAddsExponents = kHasVariance && !kZeros;
    constexpr uint32_t kSmallestScale = (127u - 50u) << 23;
    const uint32_t scale_exponent = core::to_bits(scale) & kExponentMask;
    const uint32_t exponent = kAddsExponents ? scale_exponent - (127u << 22) : 127u << 22;
    // (By a mask the compiler would make it again for every element.)
    const uint32_t mantissa = kAddsExponents ? core::to_bits(scale) - scale_exponent : 0u;
    if constexpr (kAddsExponents) ok &= core::to_bits(scale) >= kSmallestScale;
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      m[i] = look_up(tables.momenta(0u), codes[0], i);
      if constexpr (!kAddsExponents) m[i] = m[i] * scale;
      if constexpr (kHasVariance) {
        const uint32_t code = byte_of(codes[1], i);
        uint32_t bits = code * factor + base;
        if constexpr (kZeros) {
          bits = code == 0u ? 0u : bits;
        } else if (i % 4 == 0) {
          ok &= !has_zero_byte(codes[1].w[i / 4]);
        }
        v[i] = core::from_bits(bits);
        // root_scale; the high half of a product is a shift that adds.
        m[i] = m[i] * core::from_bits(((__umulhi(bits, 0x80000000u) + exponent) & kExponentMask) | mantissa);
      }
    }
    return ok;
  }

  /// Codec::encode for positive normal v, and for m of at least 2^-80; or, with kZeros, zeros and finite m. The
  /// patterns are over the whole group. Leaves momentum relative to the stored variance in m.
  __device__ __forceinline__ void encode_variance(float (&m)[kHotUnit], const float (&v)[kHotUnit], uint32_t largest,
                                                  uint32_t smallest_minus_one, uint32_t dither_start) {
    constexpr auto kStream = core::DitherStream::kVariance;
    // inverse_root_scale(x) = (kTop - (x >> 1)) & mask = ~((x - 2 kTop - 2) >> 1) & mask, and depends on the exponent
    // alone, which the stored value shares with the sum before it is cut.
    constexpr uint32_t kTop = (255u << 23) - 1u - (127u << 22);
    // Where m is no zero, its exponent is added to: the complement's top byte is then that of the factor less 127.
    constexpr uint32_t kShifted = 0u - 2u * (kTop + 1u) + (kZeros ? 0u : 127u << 24);
    header[1] = core::WindowCodec::header<float>(largest, smallest_minus_one);
    const auto window = core::WindowCodec::window<float>(header[1]);
    const uint32_t factor = power_of_two(24u - window.shift);
    const uint32_t offset = 0u - (window.base_minus_one << 24) - kShifted * factor;
    const uint32_t right = 32u - window.shift;
    uint32_t top[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      uint32_t sum = core::to_bits(v[i]) + (DitherSource::word<kStream>(dither_start, i) >> right) + kShifted;
      asm("" : "+r"(sum));  // the compiler would take it apart: ~(a + b) as c - a and a mask, 2 instructions more
      top[i] = sum * factor + offset;
      if constexpr (!kZeros) {
        m[i] =
            core::from_bits(core::to_bits(m[i]) + static_cast<uint32_t>(static_cast<int32_t>(~sum & 0xff000000u) >> 1));
      } else {
        m[i] = m[i] * core::from_bits(~(sum >> 1) & kExponentMask);
        const bool is_zero = v[i] == 0.0f;
        top[i] = is_zero ? 0u : top[i];
        m[i] = is_zero ? 0.0f : m[i];
      }
    }
    codes[1] = pack_top_bytes(top);
  }

  /// Codec::decode of momentum whose K its group chooses.
  template <class Tables>
  __device__ __forceinline__ void decode_chosen(const Tables& tables, float (&m)[kHotUnit]) const {
    const float scale = MuLaw::template scale<float>(header[0]);
    const uint32_t table = tables.momenta(header[0] & 3u);
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) m[i] = look_up(table, codes[0], i) * scale;
  }

  /// Codec::encode for 2^-96 <= |m| <= 2^40, so that no |m| / G is 0, and m = 0; `largest` and `smallest` (of those
  /// that are not 0; infinity: none) over this thread's.
  __device__ __forceinline__ void encode_chosen(const float (&m)[kHotUnit], float largest, float smallest,
                                                uint32_t dither_start) {
    constexpr auto kStream = core::DitherStream::kMomentum;
    uint32_t smallest_minus_one = core::to_bits(smallest) - 1u;
    if constexpr (kZeros) smallest_minus_one = largest == 0.0f ? 0xffffffffu : smallest_minus_one;
    header[0] = MuLaw::template header<float>(group_int_max<kHotThreadsPerGroup>(core::to_bits(largest)),
                                              group_unsigned_min<kHotThreadsPerGroup>(smallest_minus_one));
    const float inverse = MuLaw::template inverse_scale<float>(header[0]);
    const auto group = MuLaw::template group<float>(header[0]);
    const float lowest = core::from_bits(group.lowest);
    const uint32_t factor = power_of_two(24u - group.shift);  // at least 2^4, as below
    uint32_t top[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      const float y = fmaxf(fabsf(m[i]) * inverse + group.offset, lowest);
      uint32_t code = core::to_bits(y) * factor + (DitherSource::word<kStream>(dither_start, i) >> 8);
      if constexpr (kZeros) code = m[i] == 0.0f ? 0u : code;
      top[i] = (core::to_bits(m[i]) & 0x80000000u) | code;
    }
    codes[0] = pack_top_bytes(top);
  }

  __device__ __forceinline__ void encode_momentum(const float (&m)[kHotUnit], uint32_t dither_start) {
    constexpr auto kStream = core::DitherStream::kMomentum;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) largest = fmaxf(largest, fabsf(m[i]));
    header[0] =
        MuLaw::template header<float>(core::from_bits(group_int_max<kHotThreadsPerGroup>(core::to_bits(largest))));
    const float inverse = MuLaw::template inverse_scale<float>(header[0]);
    // (bits(y) + (word >> 32 - shift)) >> shift in the top byte, where the bits of 2.0 are shifted out; the dither's
    // other digits cannot carry.
    constexpr uint32_t kFactor = 1u << (24 - MuLaw::kShift);
    static_assert(MuLaw::kTwoBits * kFactor == 0u);
    uint32_t top[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      const float y = fabsf(m[i]) * inverse + 2.0f;
      const uint32_t code = core::to_bits(y) * kFactor + (DitherSource::word<kStream>(dither_start, i) >> 8);
      top[i] = (core::to_bits(m[i]) & 0x80000000u) | code;  // a code is at most 127
    }
    codes[0] = pack_top_bytes(top);
  }
};

/// Start of a thread's dither.
template <core::DitherStream kStream>
__device__ __forceinline__ uint32_t stream_start(uint32_t phase, uint32_t hash, uint32_t lane) {
  return core::dither_group_start<kStream, float>(core::DitherKey{0u, 0u}, hash) + phase +
         lane * core::kDitherLaneStep<kStream>;
}

/// 16 bytes from device to shared memory, in the background where the hardware can. (A hint to fetch 128 or 256 bytes
/// to L2 changes nothing, or costs 0.3 %.)
__device__ __forceinline__ void copy_16(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
#else
  *static_cast<uint4*>(to) = __ldcs(static_cast<const uint4*>(from));
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits for all but the last commit_copies().
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

/// A group's headers, one tile ahead like the rest.
struct HotHeaders {
  uint32_t of[kMaxSlots] = {};
};

/// Where the q-th 16 bytes of a tile stand, if a thread takes two in a row: so that neither way of access has
/// conflicts.
__device__ __forceinline__ int place(int q) { return q ^ (q >> 3 & 1); }

/// The stored form of a warp's tile, on its way while the warp computes the tile before. (Loads into registers would be
/// moved down to their uses by the compiler, which waits three times for memory.)
template <class Rule, MasterWeights kMaster>
struct HotStage {
  static constexpr int kCorrectionQuads = kHotBits<kMaster> / 8;
  uint4 parameter[64];
  uint4 gradient[64];
  uint4 correction[kCorrectionQuads > 0 ? 32 * kCorrectionQuads : 1];
  uint4 states[Rule::kSlotCount][32];

  __device__ __forceinline__ HotHeaders fetch(const HotContext& context, uint32_t first_group, int thread) {
    __syncwarp();  // all have read what stood here
    const uint32_t first = first_group * static_cast<uint32_t>(kGroupSize) + static_cast<uint32_t>(thread) * 8u;
    const uint32_t first_code = first_group * static_cast<uint32_t>(kGroupSize) + static_cast<uint32_t>(thread) * 16u;
    const unsigned char* p = context.parameter + static_cast<uint64_t>(first) * 2u;
    const unsigned char* g = context.gradient + static_cast<uint64_t>(first) * 2u;
    HotHeaders headers;
    const uint32_t group = first_group + static_cast<uint32_t>(thread / kHotThreadsPerGroup);
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) {
      headers.of[k] = __ldcs(context.scales[k] + group);
      copy_16(&states[k][thread], context.states[k] + first_code);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      copy_16(&parameter[place(32 * j + thread)], p + 512 * j);
      copy_16(&gradient[place(32 * j + thread)], g + 512 * j);
    }
    if constexpr (kCorrectionQuads == 1) {
      copy_16(&correction[thread], context.correction + first_code);
    } else if constexpr (kCorrectionQuads == 2) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        copy_16(&correction[place(32 * j + thread)], context.correction + static_cast<uint64_t>(first) * 2u + 512 * j);
      }
    }
    return headers;
  }

  /// A thread's one or two of them.
  template <int kQuads>
  static __device__ __forceinline__ HotWords<4 * kQuads> take(const uint4* from, int thread) {
    HotWords<4 * kQuads> out;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const uint4 v = from[kQuads == 1 ? thread : place(2 * thread + j)];
      out.w[4 * j] = v.x;
      out.w[4 * j + 1] = v.y;
      out.w[4 * j + 2] = v.z;
      out.w[4 * j + 3] = v.w;
    }
    return out;
  }
};

/// Stores two quads a thread so that the warp writes whole sectors: through the stage that they came from.
__device__ __forceinline__ void store_pairs(unsigned char* p, const HotWords<8>& words, uint4* through, int thread) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint4 quad = make_uint4(words.w[4 * j], words.w[4 * j + 1], words.w[4 * j + 2], words.w[4 * j + 3]);
    through[place(2 * thread + j)] = quad;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int q = 32 * j + thread;
    reinterpret_cast<uint4*>(p)[q] = through[place(q)];
  }
}

/// How a tile was computed: 0, and nothing was written, where this way does not hold for its values.
enum HotResult : int { kHotFailed = 0, kHotWithoutZeros, kHotWithZeros };

/// One tile, 16 elements a thread.
template <class Rule, class Narrow, MasterWeights kMaster, bool kZeros>
__device__ __forceinline__ HotResult hot_unit(const HotTables<Rule, Narrow, kMaster>& tables, const HotContext& context,
                                              HotStage<Rule, kMaster>& stage, const HotHeaders& headers,
                                              uint32_t first_group, int thread) {
  using Weights = HotWeightsOf<Narrow, kMaster, kZeros>;
  constexpr bool kCorrected = core::has_correction(kMaster);
  using States = HotStates<Rule, kZeros>;
  using Bounds = VarianceBounds<Rule>;
  using Lane = UpdateLane<kZeros, !kZeros && Bounds::kKnown>;
  using Stage = HotStage<Rule, kMaster>;
  using Hyper = typename Rule::Hyper;
  States states;
  Weights weights;
  __syncwarp();  // every thread's copies have come
#pragma unroll
  for (int k = 0; k < Rule::kSlotCount; ++k) {
    states.codes[k] = Stage::template take<1>(stage.states[k], thread);
    states.header[k] = headers.of[k];
  }
  weights.parameter = Stage::template take<2>(stage.parameter, thread);
  const HotWords<8> gradient = Stage::template take<2>(stage.gradient, thread);
  if constexpr (kCorrected)
    weights.correction = Stage::template take<Stage::kCorrectionQuads>(stage.correction, thread);

  float value[kHotUnit], m[kHotUnit], v[kHotUnit], delta[kHotUnit];
  bool ok = true;
  if constexpr (States::kGroupChooses) {
    states.decode_chosen(tables, m);
  } else {
    ok = states.decode(tables, m, v);
  }
  const Hyper& hyper = reinterpret_cast<const Hyper&>(context.prepared.rule);
  const float gradient_scale = context.prepared.gradient_scale;
  UpdateGuard guard;
  float poison = 0.0f;  // NaN once something is not finite
  bool has_zeros = false;
  uint32_t largest = 0u, smallest = 0x7fffffffu, smallest_minus_one = 0xffffffffu;
  float largest_m = 0.0f, smallest_m = core::from_bits(0x7f800000u);
#pragma unroll
  for (int i = 0; i < kHotUnit; ++i) {
    const float n = narrow_element<Narrow>(weights.parameter, i);
    const float g = narrow_element<Narrow>(gradient, i) * gradient_scale;
    float w = n;
    if constexpr (kCorrected) {
      value[i] = weights.correction_value(tables, n, i);
      w = n + value[i];
    }
    Lane s[core::kSlotArray<Rule>];
    s[0] = {m[i], &guard};
    if constexpr (States::kHasVariance) s[1] = {v[i], &guard};
    const Lane d = Rule::update(Lane(w, &guard), Lane(g, &guard), s, hyper);
    m[i] = s[0].v;
    if constexpr (States::kHasVariance) v[i] = s[1].v;
    delta[i] = d.v;
    // Rules let a weight or gradient that is not finite through to delta or to the states; a delta of 0 changes
    // nothing. (With a correction, a delta that is not finite makes a weight so, which update() looks for.)
    if constexpr (!kCorrected) poison = __fmaf_rn(delta[i], 0.0f, poison);
    if constexpr (Weights::kMustMove) {
      ok &= delta[i] != 0.0f;
    } else if constexpr (kCorrected) {
      has_zeros |= delta[i] == 0.0f;
    }
    if constexpr (States::kHasVariance) {
      // (the pairs are one instruction on sm_90)
      if (i % 2 == 1) {
        largest =
            static_cast<uint32_t>(__vimax3_s32(static_cast<int>(largest), static_cast<int>(core::to_bits(v[i - 1])),
                                               static_cast<int>(core::to_bits(v[i]))));
        if constexpr (!kZeros) {
          smallest =
              static_cast<uint32_t>(__vimin3_s32(static_cast<int>(smallest), static_cast<int>(core::to_bits(v[i - 1])),
                                                 static_cast<int>(core::to_bits(v[i]))));
        }
      }
      if constexpr (kZeros) {
        smallest_minus_one = core::unsigned_min(smallest_minus_one, core::to_bits(v[i]) - 1u);
        has_zeros |= v[i] == 0.0f;
      }
    } else {
      poison = __fmaf_rn(m[i], 0.0f, poison);
      if constexpr (States::kGroupChooses) {
        largest_m = fmaxf(largest_m, fabsf(m[i]));
        const bool is_zero = kZeros && m[i] == 0.0f;
        has_zeros |= is_zero;
        smallest_m = is_zero ? smallest_m : fminf(smallest_m, fabsf(m[i]));
      }
    }
  }
  ok = ok && guard.holds() && weights.are_normal() && poison == 0.0f;
  if constexpr (States::kHasVariance) {
    if constexpr (!kZeros) smallest_minus_one = smallest - 1u;
    constexpr uint32_t kSmallest = Lane::kKnowsRadicands ? kSmallestRadicand : 0x00800000u;
    ok = ok && smallest_minus_one >= kSmallest - 1u && largest <= Bounds::kLargest;
  }
  if constexpr (States::kGroupChooses) ok = ok && smallest_m >= 0x1p-96f && largest_m <= 0x1p40f;
  if (!__all_sync(0xffffffffu, ok)) return kHotFailed;

  const uint32_t group = first_group + static_cast<uint32_t>(thread / kHotThreadsPerGroup);
  const uint32_t lane = static_cast<uint32_t>(thread % kHotThreadsPerGroup * kHotUnit);
  const uint64_t index = context.first_index + static_cast<uint64_t>(group) * static_cast<uint32_t>(kGroupSize);
  const core::DitherKey hash_key{0u, context.prepared.dither.seed};
  const uint32_t hash =
      core::dither_group_hash<float>(hash_key, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32));
  const uint32_t weight_start = stream_start<core::DitherStream::kWeight>(context.phase_weight, hash, lane);
  bool finite;
  if constexpr (kCorrected) {
    finite = weights.update(value, delta, weight_start);
  } else {
    finite = weights.update(delta, weight_start);
  }
  if constexpr (States::kHasVariance) {
    states.encode_variance(m, v, group_int_max<kHotThreadsPerGroup>(largest),
                           group_unsigned_min<kHotThreadsPerGroup>(smallest_minus_one),
                           stream_start<core::DitherStream::kVariance>(context.phase_variance, hash, lane));
  }
  const uint32_t momentum_start = stream_start<core::DitherStream::kMomentum>(context.phase_momentum, hash, lane);
  if constexpr (States::kGroupChooses) {
    states.encode_chosen(m, largest_m, smallest_m, momentum_start);
  } else {
    states.encode_momentum(m, momentum_start);
  }

  if (!__all_sync(0xffffffffu, finite)) return kHotFailed;
  // Read the addresses again rather than keep them.
  asm volatile("" ::: "memory");
  const uint32_t first = first_group * static_cast<uint32_t>(kGroupSize);
  const uint32_t first_code = first + static_cast<uint32_t>(thread) * 16u;
  store_pairs(context.parameter + static_cast<uint64_t>(first) * 2u, weights.parameter, stage.parameter, thread);
  if constexpr (Stage::kCorrectionQuads == 1) {
    hot_store(context.correction + first_code, weights.correction);
  } else if constexpr (Stage::kCorrectionQuads == 2) {
    store_pairs(context.correction + static_cast<uint64_t>(first) * 2u, weights.correction, stage.correction, thread);
  }
#pragma unroll
  for (int k = 0; k < Rule::kSlotCount; ++k) hot_store(context.states[k] + first_code, states.codes[k]);
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) context.scales[k][group] = static_cast<uint16_t>(states.header[k]);
  }
  return kZeros && __any_sync(0xffffffffu, has_zeros) ? kHotWithZeros : kHotWithoutZeros;
}

}  // namespace flashoptim::cuda
