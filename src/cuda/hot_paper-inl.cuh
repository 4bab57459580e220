// The hot path's states in the paper's codec. hot_unit-inl.cuh says what the hot path is, hot_states-inl.cuh what these
// functions do.
//
// Codes of 0 are as good as any here; what the hot way asks for is what update() does: variances that a root is taken
// of without a look, momentum that is finite.
#pragma once

#include "src/cuda/hot_identities.h"
#include "src/cuda/hot_states-inl.cuh"

namespace flashoptim::cuda {

template <core::Rule Rule, bool kZeros>
struct HotStates<Rule, StateCodec::kPaper, kZeros> {
  using Slots = core::SlotCodecs<Rule, StateCodec::kPaper>;
  template <int k>
  using Slot = typename Slots::template Of<k>;

  HotWords<4> codes[Rule::kSlotCount];
  uint32_t header[Rule::kSlotCount];
  float value[Rule::kSlotCount][kHotUnit];  ///< of variances in the end their roots
  HotExtremes extremes[Rule::kSlotCount];

  template <class Tables>
  __device__ __forceinline__ bool decode(const Tables& tables) {
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      const float scale = Slot<k>::template decoding<float>(header[k]).factor;
      const uint32_t table = tables.template of<k>();
#pragma unroll
      for (int i = 0; i < kHotUnit; ++i) {
        const float x = look_up(table, codes[k], i) * scale;
        value[k][i] = Slots::is_signed(k) ? x : x * x;
      }
    });
    return true;
  }

  template <class Lane>
  __device__ __forceinline__ void note(int i, HotFindings& found) {
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      float(&x)[kHotUnit] = value[k];
      HotExtremes& of = extremes[k];
      if constexpr (!Slots::is_signed(k)) {
        const bool is_zero = kZeros && x[i] == 0.0f;
        if (i % 2 == 1) of.template add_pair<kZeros>(core::from_bits(even_), x[i]);
        even_ = core::to_bits(x[i]);
        if constexpr (kZeros) {
          of.smallest_minus_one = core::unsigned_min(of.smallest_minus_one, core::to_bits(x[i]) - 1u);
          found.has_zeros |= is_zero;
        }
        const float root = sqrt_in_range(x[i]);  // as update() takes it
        x[i] = is_zero ? 0.0f : root;
      } else {
        of.largest_value = fmaxf(of.largest_value, fabsf(x[i]));
        // A quotient of m shows in delta, and so in the weights.
        constexpr bool kShows = kDividesRelative<Rule> && Rule::kSlots[k].relative_to != core::kNoSlot;
        if constexpr (!kShows) found.poison = __fmaf_rn(x[i], 0.0f, found.poison);
      }
    });
  }

  template <class Lane>
  __device__ __forceinline__ bool in_range() {
    bool ok = true;
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      HotExtremes& of = extremes[k];
      if constexpr (!Slots::is_signed(k)) {
        if constexpr (!kZeros) of.smallest_minus_one = of.smallest - 1u;
        ok = ok && of.smallest_minus_one >= kSmallestRadicand - 1u && of.largest <= VarianceBounds<Rule>::kLargest;
      } else {
        ok = ok && of.largest_value <= 0x1p60f;  // the divisor in encode() is then in divide_in_range()'s range
      }
    });
    return ok;
  }

  template <class Starts>
  __device__ __forceinline__ void encode(const Starts&, uint32_t) {
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (Slots::is_signed(k)) {
        encode_signed<k>(group_int_max<kHotThreadsPerGroup>(core::to_bits(extremes[k].largest_value)));
      } else {
        // Roots are as their radicands are.
        const uint32_t most = group_int_max<kHotThreadsPerGroup>(extremes[k].largest);
        const float root = sqrt_in_range(core::from_bits(most));
        encode_unsigned<k>(kZeros && most == 0u ? 0u : core::to_bits(root));
      }
    });
  }

 private:
  uint32_t even_ = 0u;

  template <int k>
  __device__ __forceinline__ void encode_signed(uint32_t largest) {
    header[k] = Slot<k>::template header<float>(largest, 0u);
    const float half = Slot<k>::template encoding<float>(header[k], largest).factor;
    uint32_t code[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) {
      const float m = value[k][i];
      // |m| / 2 is exact, or too small to count. Of a quotient below 2^-8 only that it is one counts.
      const float y = divide_in_range(m, fused(fabsf(m), 0.5f, half));
      // Rounded down, 1.5 * 2^23 above: the low byte is the code in two's complement.
      code[i] = core::to_bits(__fadd_rd(y * 127.0f + 128.5f, 0x1.8p23f - 128.0f));
    }
    codes[k] = pack_bytes<0>(code);
  }

  template <int k>
  __device__ __forceinline__ void encode_unsigned(uint32_t largest) {
    header[k] = Slot<k>::template header<float>(largest, 0u);
    const float factor = core::PaperVariance::encoding_factor<ExactLane>(core::paper_absmax<float>(largest)).v;
    uint32_t code[kHotUnit];
#pragma unroll
    for (int i = 0; i < kHotUnit; ++i) code[i] = core::to_bits(__fadd_rd(value[k][i] * factor + 0.5f, 0x1p23f));
    codes[k] = pack_bytes<0>(code);
  }
};

}  // namespace flashoptim::cuda
