// The hot path's states: 16 elements of every slot. hot_unit-inl.cuh says what the hot path is. Here those of the
// default codec; hot_paper-inl.cuh has the paper's.
//
//   struct SomeStates {
//     HotWords<4> codes[kSlotCount];  uint32_t header[kSlotCount];   // as stored
//     float value[kSlotCount][16];    // what is stored, once it is decoded; the new states; what is coded of them
//     bool decode(tables);            // false where this way does not hold
//     void note<Lane>(int i, HotFindings&);   // after element i: what headers are made of, what is not for the hot
//     path bool in_range<Lane>();          // after all: whether encode() gives core's bits void encode(starts); //
//     starts(SlotIndex): the slots' dither
//   };
#pragma once

#include "src/cuda/hot_tables-inl.cuh"

namespace flashoptim::cuda {

/// Whether a word of codes has a byte 0.
__device__ __forceinline__ bool has_zero_byte(uint32_t w) { return ((w - 0x01010101u) & ~w & 0x80808080u) != 0u; }

/// What was found in a thread's elements.
struct HotFindings {
  bool ok = true;
  bool has_zeros = false;
  float poison = 0.0f;  ///< NaN once something is not finite
};

/// Whether a rule says that update() divides every slot that is relative to a variance, which has then looked at it.
template <core::Rule Rule>
inline constexpr bool kDividesRelative = requires { requires Rule::kDividesRelative; };

/// What headers are made of, over a thread's 16 values of a slot, and what shows that they are none for the hot path.
struct HotExtremes {
  uint32_t largest = 0u, smallest = 0x7fffffffu, smallest_minus_one = 0xffffffffu;  ///< of unsigned slots, patterns
  float largest_value = 0.0f, smallest_value = core::from_bits(0x7f800000u);        ///< of slots whose groups choose K

  /// Unsigned values i - 1 and i, i odd (the pairs are one instruction on sm_90).
  template <bool kZeros>
  __device__ __forceinline__ void add_pair(float a, float b) {
    largest = static_cast<uint32_t>(__vimax3_s32(static_cast<int>(largest), static_cast<int>(core::to_bits(a)),
                                                 static_cast<int>(core::to_bits(b))));
    if constexpr (!kZeros) {
      smallest = static_cast<uint32_t>(__vimin3_s32(static_cast<int>(smallest), static_cast<int>(core::to_bits(a)),
                                                    static_cast<int>(core::to_bits(b))));
    }
  }
};

template <core::Rule Rule, StateCodec kCodec, bool kZeros>
struct HotStates;

template <core::Rule Rule, bool kZeros>
struct HotStates<Rule, StateCodec::kDefault, kZeros> {
  using Slots = core::SlotCodecs<Rule, StateCodec::kDefault>;
  template <int k>
  using Slot = typename Slots::template Of<k>;
  static constexpr uint32_t kExponentMask = 0x7f800000u;

  HotWords<4> codes[Rule::kSlotCount];
  uint32_t header[Rule::kSlotCount];
  float value[Rule::kSlotCount][kHotUnit];
  HotExtremes extremes[Rule::kSlotCount];

  /// Codec::decode; without kZeros false where a variance is 0.
  template <class Tables>
  __device__ __forceinline__ bool decode(const Tables& tables) {
    Decoding of[Rule::kSlotCount];
    bool ok = true;
    Slots::for_each([&](auto index) { open<decltype(index)::value>(tables, of[decltype(index)::value], ok); });
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      Slots::for_each([&](auto index) {
        constexpr int k = decltype(index)::value;
        if constexpr (Slots::is_signed(k)) look_up_signed<k>(of[k], i);
      });
      Slots::for_each([&](auto index) {
        constexpr int k = decltype(index)::value;
        if constexpr (!Slots::is_signed(k)) decode_unsigned<k>(of[k], i, ok);
        if constexpr (Slots::is_relative(k)) scale_by_root<k>(of[k], i);
      });
    }
    return ok;
  }

  template <class Lane>
  __device__ __forceinline__ void note(int i, HotFindings& found) {
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      const float(&x)[kHotUnit] = value[k];
      HotExtremes& of = extremes[k];
      if constexpr (!Slots::is_signed(k)) {
        if (i % 2 == 1) of.template add_pair<kZeros>(x[i - 1], x[i]);
        if constexpr (kZeros) {
          of.smallest_minus_one = core::unsigned_min(of.smallest_minus_one, core::to_bits(x[i]) - 1u);
          found.has_zeros |= x[i] == 0.0f;
        }
      } else if constexpr (!Slots::is_relative(k)) {
        found.poison = __fmaf_rn(x[i], 0.0f, found.poison);
        if constexpr (Slot<k>::kUsesSmallest) {
          of.largest_value = fmaxf(of.largest_value, fabsf(x[i]));
          const bool is_zero = kZeros && x[i] == 0.0f;
          found.has_zeros |= is_zero;
          of.smallest_value = is_zero ? of.smallest_value : fminf(of.smallest_value, fabsf(x[i]));
        }
      } else if constexpr (!kZeros && !kDividesRelative<Rule>) {
        found.ok &= fabsf(x[i]) >= 0x1p-80f;
      }
    });
  }

  /// Variances positive and normal, |m| of relative slots of at least 2^-80 and 2^-96 <= |m| <= 2^40 where groups
  /// choose K; or, with kZeros, zeros, and finite m.
  template <class Lane>
  __device__ __forceinline__ bool in_range() {
    bool ok = true;
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      HotExtremes& of = extremes[k];
      if constexpr (!Slots::is_signed(k)) {
        if constexpr (!kZeros) of.smallest_minus_one = of.smallest - 1u;
        constexpr uint32_t kSmallest = Lane::kKnowsRadicands ? kSmallestRadicand : 0x00800000u;
        ok = ok && of.smallest_minus_one >= kSmallest - 1u && of.largest <= VarianceBounds<Rule>::kLargest;
      } else if constexpr (Slot<k>::kUsesSmallest) {
        ok = ok && of.smallest_value >= 0x1p-96f && of.largest_value <= 0x1p40f;
      }
    });
    return ok;
  }

  /// Codec::encode of all slots.
  template <class Starts>
  __device__ __forceinline__ void encode(const Starts& starts, uint32_t root_shift) {
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      const uint32_t start = starts(index);
      const HotExtremes& of = extremes[k];
      if constexpr (!Slots::is_signed(k)) {
        encode_unsigned<k>(group_int_max<kHotThreadsPerGroup>(of.largest),
                           group_unsigned_min<kHotThreadsPerGroup>(of.smallest_minus_one), start, root_shift);
      } else if constexpr (Slot<k>::kUsesSmallest) {
        encode_chosen<k>(of.largest_value, of.smallest_value, start);
      } else {
        encode_signed<k>(start);
      }
    });
  }

 private:
  /// What decodes a slot's codes in a group.
  struct Decoding {
    uint32_t factor, base;  ///< unsigned: bits = code * factor + base
    float scale;            ///< signed: G
    uint32_t exponent, mantissa, table;
  };

  template <int k, class Tables>
  __device__ __forceinline__ void open(const Tables& tables, Decoding& of, bool& ok) const {
    if constexpr (!Slots::is_signed(k)) {
      const auto window = Slot<k>::template decoding<float>(header[k]);
      of.factor = power_of_two(window.shift);
      of.base = window.base_minus_one << window.shift;
      // No code may reach 2^31, where Codec::decode reads 0.
      ok &= of.base + 255u * of.factor < 0x80000000u;
    } else {
      of.scale = Slot<k>::template decoding<float>(header[k]).factor;
      of.table = tables.template of<k>(Slot<k>::kUsesSmallest ? header[k] & 3u : 0u);
      // (x / G * G) 2^n as x / G * (G 2^n), whose exponent is a sum: exact for G >= 2^-50, where all products are
      // normal and the sum stays in its field.
      constexpr bool kAddsExponents = Slots::is_relative(k) && !kZeros;
      constexpr uint32_t kSmallestScale = (127u - 50u) << 23;
      const uint32_t scale_exponent = core::to_bits(of.scale) & kExponentMask;
      of.exponent = kAddsExponents ? scale_exponent - (127u << 22) : 127u << 22;
      // (By a mask the compiler would make it again for every element.)
      of.mantissa = kAddsExponents ? core::to_bits(of.scale) - scale_exponent : 0u;
      if constexpr (kAddsExponents) ok &= core::to_bits(of.scale) >= kSmallestScale;
    }
  }

  template <int k>
  __device__ __forceinline__ void decode_unsigned(const Decoding& of, int i, bool& ok) {
    const uint32_t code = byte_of(codes[k], i);
    uint32_t bits = code * of.factor + of.base;
    if constexpr (kZeros) {
      bits = code == 0u ? 0u : bits;
    } else if (i % 4 == 0) {
      ok &= !has_zero_byte(codes[k].w[i / 4]);
    }
    value[k][i] = core::from_bits(bits);
  }

  template <int k>
  __device__ __forceinline__ void look_up_signed(const Decoding& of, int i) {
    value[k][i] = look_up(of.table, codes[k], i);
    if constexpr (kZeros || !Slots::is_relative(k)) value[k][i] = value[k][i] * of.scale;
  }
  /// root_scale; the high half of a product is a shift that adds.
  template <int k>
  __device__ __forceinline__ void scale_by_root(const Decoding& of, int i) {
    const uint32_t bits = core::to_bits(value[Slots::base_of(k)][i]);
    value[k][i] =
        value[k][i] * core::from_bits(((__umulhi(bits, 0x80000000u) + of.exponent) & kExponentMask) | of.mantissa);
  }

  /// The patterns are over the whole group. Leaves what is relative to the stored variance in its slot.
  template <int k>
  __device__ __forceinline__ void encode_unsigned(uint32_t largest, uint32_t smallest_minus_one, uint32_t dither_start,
                                                  uint32_t root_shift) {
    constexpr auto kStream = Slots::stream(k);
    // inverse_root_scale() depends on the exponent alone, which the stored value shares with the sum before it is cut.
    // Where m is no zero, its exponent is added to: the complement's top byte is then that of the factor less 127.
    const uint32_t shifted = root_shift + (kZeros ? 0u : 127u << 24);
    header[k] = Slot<k>::template header<float>(largest, smallest_minus_one);
    const auto window = Slot<k>::template encoding<float>(header[k], largest);
    const uint32_t factor = power_of_two(24u - window.shift);
    const uint32_t offset = 0u - (window.base_minus_one << 24) - (shifted << (24u - window.shift));
    const uint32_t right = 32u - window.shift;
    uint32_t top[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      uint32_t sum =
          core::to_bits(value[k][i]) + (core::GroupDither::word<kStream>(dither_start, i) >> right) + shifted;
      asm("" : "+r"(sum));  // the compiler would take it apart: ~(a + b) as c - a and a mask, 2 instructions more
      top[i] = sum * factor + offset;
      const bool is_zero = kZeros && value[k][i] == 0.0f;
      if constexpr (kZeros) top[i] = is_zero ? 0u : top[i];
      Slots::for_each([&](auto index) {
        constexpr int other = decltype(index)::value;
        if constexpr (Slots::base_of(other) == k) make_relative(value[other][i], sum, is_zero);
      });
    }
    codes[k] = pack_bytes<3>(top);
  }

  static __device__ __forceinline__ void make_relative(float& m, uint32_t sum, bool is_zero) {
    if constexpr (!kZeros) {
      m = core::from_bits(core::to_bits(m) + static_cast<uint32_t>(static_cast<int32_t>(~sum & 0xff000000u) >> 1));
    } else {
      m = m * core::from_bits(~(sum >> 1) & kExponentMask);
      m = is_zero ? 0.0f : m;
    }
  }

  /// `largest` and `smallest` (of those that are not 0; infinity: none) over this thread's. No |m| / G is 0.
  template <int k>
  __device__ __forceinline__ void encode_chosen(float largest, float smallest, uint32_t dither_start) {
    constexpr auto kStream = Slots::stream(k);
    uint32_t smallest_minus_one = core::to_bits(smallest) - 1u;
    if constexpr (kZeros) smallest_minus_one = largest == 0.0f ? 0xffffffffu : smallest_minus_one;
    const uint32_t most = group_int_max<kHotThreadsPerGroup>(core::to_bits(largest));
    header[k] = Slot<k>::template header<float>(most, group_unsigned_min<kHotThreadsPerGroup>(smallest_minus_one));
    const auto constants = Slot<k>::template encoding<float>(header[k], most);
    const auto& group = constants.group;
    const float lowest = core::from_bits(group.lowest);
    const uint32_t factor = power_of_two(24u - group.shift);  // at least 2^4, as below
    uint32_t top[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      const float m = value[k][i];
      const float y = fmaxf(fabsf(m) * constants.factor + group.offset, lowest);
      uint32_t code = core::to_bits(y) * factor + (core::GroupDither::word<kStream>(dither_start, i) >> 8);
      if constexpr (kZeros) code = m == 0.0f ? 0u : code;
      top[i] = (core::to_bits(m) & 0x80000000u) | code;
    }
    codes[k] = pack_bytes<3>(top);
  }

  template <int k>
  __device__ __forceinline__ void encode_signed(uint32_t dither_start) {
    using MuLaw = typename Slot<k>::MuLaw;
    constexpr auto kStream = Slots::stream(k);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) largest = fmaxf(largest, fabsf(value[k][i]));
    const uint32_t most = group_int_max<kHotThreadsPerGroup>(core::to_bits(largest));
    header[k] = Slot<k>::template header<float>(most, most);
    const float inverse = Slot<k>::template encoding<float>(header[k], most).factor;
    if constexpr (MuLaw::kShift == 17) {
      // The 7 bits of a code are then the upper ones of a byte of the sum, and signs of another: 3 instructions for
      // both and 4 words each instead of 7.
      uint32_t sum[kHotUnit], m[kHotUnit];
#pragma unroll
      for (int i = 0; i < kHotUnit; ++i) {
        m[i] = core::to_bits(value[k][i]);
        sum[i] = core::to_bits(fabsf(value[k][i]) * inverse + 2.0f) +
                 (core::GroupDither::word<kStream>(dither_start, i) >> (32 - MuLaw::kShift));
      }
      const HotWords<4> magnitudes = pack_bytes<2>(sum), signs = pack_bytes<3>(m);
#pragma unroll
      for (int j = 0; j < 4; ++j) codes[k].w[j] = ((magnitudes.w[j] >> 1) & 0x7f7f7f7fu) | (signs.w[j] & 0x80808080u);
      return;
    }
    // (bits(y) + (word >> 32 - shift)) >> shift in the top byte, where the bits of 2.0 are shifted out; the dither's
    // other digits cannot carry.
    constexpr uint32_t kFactor = 1u << (24 - MuLaw::kShift);
    static_assert(MuLaw::kTwoBits * kFactor == 0u);
    uint32_t top[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      const float m = value[k][i];
      const float y = fabsf(m) * inverse + 2.0f;
      const uint32_t code = core::to_bits(y) * kFactor + (core::GroupDither::word<kStream>(dither_start, i) >> 8);
      top[i] = (core::to_bits(m) & 0x80000000u) | code;  // a code is at most 127
    }
    codes[k] = pack_bytes<3>(top);
  }
};

}  // namespace flashoptim::cuda
