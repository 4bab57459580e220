// What codes stand for, by core's formulas, in shared memory: the hot path looks them up in 2 instructions for 4 to 9.
#pragma once

#include "src/cuda/hot_memory-inl.cuh"

namespace flashoptim::cuda {

/// table[byte i of 16]; `table` is an address in shared memory. The dot product picks the byte, scales it and adds.
/// (The asm does not say that it reads memory: it stays behind the table's filling because the words are loaded behind
/// it.)
__device__ __forceinline__ float look_up(uint32_t table, const HotWords<4>& words, int i) {
  const uint32_t address = __dp4a(words.w[i / 4], 4u << (8 * (i % 4)), table);
  float value;
  asm("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

/// Tables of states, 256 numbers each, and which of them a slot has.
template <core::Rule Rule, StateCodec kCodec>
struct StateTables;

/// Signed slots: x / G with its sign.
template <core::Rule Rule>
struct StateTables<Rule, StateCodec::kDefault> {
  using Slots = core::SlotCodecs<Rule, StateCodec::kDefault>;

  /// Of slot k: one, or one for each K where groups choose it.
  static FLASHOPTIM_HD constexpr int tables_of(int k) { return Rule::kSlots[k].mantissa_bits == 0 ? 4 : 1; }
  /// Slots of one codec share their tables: the first such slot's.
  static FLASHOPTIM_HD constexpr int owner(int k) {
    for (int other = 0; other < k; ++other) {
      if (Slots::is_signed(other) && Rule::kSlots[other].mantissa_bits == Rule::kSlots[k].mantissa_bits) return other;
    }
    return k;
  }
  /// Tables of the slots before slot `end`.
  static FLASHOPTIM_HD constexpr int tables_before(int end) {
    int tables = 0;
    for (int k = 0; k < end; ++k) tables += Slots::is_signed(k) && owner(k) == k ? tables_of(k) : 0;
    return tables;
  }
  template <int k>
  static constexpr int kFirst = tables_before(owner(k));
  static constexpr int kTables = tables_before(Rule::kSlotCount);

  float value[kTables > 0 ? kTables : 1][256];

  /// Entry `i`, which stands for `code`.
  __device__ __forceinline__ void fill(uint32_t i, uint32_t code) {
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (Slots::is_signed(k)) {
        using MuLaw = typename Slots::template Of<k>::MuLaw;
#pragma unroll
        for (uint32_t choice = 0; choice < tables_of(k); ++choice) {
          if constexpr (tables_of(k) > 1) {
            value[kFirst<k> + choice][i] = MuLaw::template decode<float>(code, MuLaw::template group<float>(choice));
          } else {
            value[kFirst<k>][i] = MuLaw::template decode<float>(code);
          }
        }
      }
    });
  }
};

/// All slots: what a code stands for at scale 1.
template <core::Rule Rule>
struct StateTables<Rule, StateCodec::kPaper> {
  using Slots = core::SlotCodecs<Rule, StateCodec::kPaper>;

  static FLASHOPTIM_HD constexpr bool has(bool is_signed) {
    for (int k = 0; k < Slots::kCount; ++k) {
      if (Slots::is_signed(k) == is_signed) return true;
    }
    return false;
  }
  static constexpr int kUnsigned = has(true) ? 1 : 0;
  template <int k>
  static constexpr int kFirst = Slots::is_signed(k) ? 0 : kUnsigned;

  float value[kUnsigned + (has(false) ? 1 : 0)][256];

  __device__ __forceinline__ void fill(uint32_t i, uint32_t code) {
    if constexpr (has(true)) value[0][i] = core::PaperMomentum::fraction<ExactLane>(code).v;
    if constexpr (has(false)) value[kUnsigned][i] = core::PaperVariance::fraction<float>(i);
  }
};

/// A block's tables.
template <core::Rule Rule, class Format>
struct HotTables {
  static constexpr int kBits = 8 * Format::kCorrectionBytes;
  using Narrow = NarrowOf<Format::kParameter>;
  using States = StateTables<Rule, Format::kCodec>;

  float fraction[kBits == 8 ? 256 : 1];  ///< (c / N) * (half an ULP of 1), by the correction's byte
  States states;

  /// Every thread of the block calls it, and waits for the others.
  __device__ __forceinline__ void fill() {
    for (uint32_t i = threadIdx.x; i < 256u; i += kHotThreads) {
      const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(i)));
      if constexpr (kBits == 8)
        fraction[i] = core::correction_fraction<8>(core::int_to_float(code)) * core::half_ulp_of_unit_scale<Narrow>();
      states.fill(i, code);
    }
    __syncthreads();
  }
  __device__ __forceinline__ uint32_t fractions() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(fraction));
  }
  /// Of slot k, by the choice in a group's header.
  template <int k>
  __device__ __forceinline__ uint32_t of(uint32_t choice = 0u) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(states.value[States::template kFirst<k>])) +
           choice * static_cast<uint32_t>(sizeof states.value[0]);
  }
};

}  // namespace flashoptim::cuda
