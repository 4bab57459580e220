// The hot path's memory: what the tiles of a tensor share, a tile in stored form on its way, words of 16 elements,
// tables. hot_unit-inl.cuh says what the hot path is.
#pragma once

#include <cuda_fp16.h>

#include "src/cuda/arguments.h"
#include "src/cuda/states-inl.cuh"
#include "src/cuda/weights-inl.cuh"

namespace flashoptim::cuda {

/// Where variances of at most kLargest vouch for what a rule bounds, and for its divisors (UpdateLane's kBounded).
template <core::Rule Rule, bool = core::kHasBoundingVariance<Rule>>
struct VarianceBounds {
  static constexpr bool kKnown = false;
  static constexpr uint32_t kLargest = (127u + 124u) << 23;  ///< a pattern, far below where storable() saturates
  static __device__ __forceinline__ bool hold(const typename Rule::Hyper&) { return true; }
};
/// The bound of radicands (UpdateGuard) is a bound of divisors as well.
template <core::Rule Rule>
struct VarianceBounds<Rule, true> {
  static constexpr bool kKnown = true;
  static constexpr uint32_t kLargest = Rule::kLargestBoundingVariance;
  static __device__ __forceinline__ bool hold(const typename Rule::Hyper& h) { return Rule::variance_bounds(h); }
};

/// Whether a tensor's groups follow each other in the whole, or are those of runs (core/place.h), none of them short.
enum class HotGroups { kInOneStretch, kInRuns };

/// Bits of a correction; 0: none.
template <MasterWeights kMaster>
inline constexpr int kHotBits = core::has_correction(kMaster) ? core::correction_bits(kMaster) : 0;

__device__ __forceinline__ const TensorEntry& entry_of(const StepArguments& args, int32_t tensor) {
  return args.tensors != nullptr ? args.tensors[tensor] : args.inline_tensor;
}

__device__ __forceinline__ const PreparedHyper* hyper_of(const StepArguments& args, const TensorEntry& t) {
  return (args.hypers != nullptr ? args.hypers : args.inline_hypers) + t.hyper_index;
}

/// What the tiles of one tensor share, in shared memory: registers are for elements. Addresses are those of a segment
/// of 2^kSegmentBits groups, so that offsets have 32 bits.
template <core::Rule Rule>
struct alignas(16) HotContext {
  using Slots = core::SlotCodecs<Rule, StateCodec::kDefault>;
  unsigned char* parameter;
  const unsigned char* gradient;
  unsigned char* correction;
  unsigned char* states[Rule::kSlotCount];
  uint16_t* scales[Rule::kSlotCount];
  uint64_t first_index;  ///< of the segment in the whole tensor, for the dither
  PreparedHyper prepared;
  /// Starts of the dither's streams, but for the group's hash.
  uint32_t phase[Rule::kSlotCount], phase_weight;
  uint32_t full;  ///< groups before this one are full and lie at 32 times their number, on addresses for vectors
  bool active;
  /// kInRuns alone, which has no first_index: the segment's first group, and what runs are.
  int64_t first_group, groups_per_run, stride, first_element;

  /// First element of a group of the segment in the whole: core::PlacedGroups::piece, where all groups are full.
  template <HotGroups kGroups>
  __device__ __forceinline__ uint64_t index_of(uint32_t group) const {
    if constexpr (kGroups == HotGroups::kInOneStretch) {
      return first_index + static_cast<uint64_t>(group) * static_cast<uint32_t>(kGroupSize);
    } else {
      const int64_t in_tensor = first_group + group;
      const bool is_small = ((in_tensor | groups_per_run) >> 32) == 0;
      const int64_t run = is_small ? static_cast<uint32_t>(in_tensor) / static_cast<uint32_t>(groups_per_run)
                                   : in_tensor / groups_per_run;
      const int64_t in_run = in_tensor - run * groups_per_run;
      return static_cast<uint64_t>(first_element + run * stride + in_run * kGroupSize);
    }
  }

  /// Every thread of the warp calls it.
  template <MasterWeights kMaster, HotGroups kGroups>
  __device__ __forceinline__ void open(const StepArguments& args, int32_t tensor, uint32_t segment, int thread) {
    const TensorEntry& t = entry_of(args, tensor);
    const PreparedHyper* hyper = hyper_of(args, t);
    __syncwarp();
    if (thread < static_cast<int>(sizeof(PreparedHyper) / 4)) {
      reinterpret_cast<uint32_t*>(&prepared)[thread] = reinterpret_cast<const uint32_t*>(hyper)[thread];
    }
    if (thread == 0) {
      const int64_t segment_group = static_cast<int64_t>(segment) << kSegmentBits;
      const int64_t first = segment_group * kGroupSize;
      parameter = static_cast<unsigned char*>(t.parameter) + first * 2;
      gradient = static_cast<const unsigned char*>(t.gradient) + first * 2;
      correction = static_cast<unsigned char*>(t.correction) + first * (kHotBits<kMaster> / 8);
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        states[k] = static_cast<unsigned char*>(t.states[k]) + first;
        scales[k] = t.scales[k] + segment_group;
      }
      if constexpr (kGroups == HotGroups::kInOneStretch) {
        first_index = static_cast<uint64_t>(t.first_element + first);
      } else {
        first_group = segment_group;
        groups_per_run = t.pieces->groups_per_run;
        stride = t.pieces->stride;
        first_element = t.first_element;
      }
      const core::DitherKey key = hyper->dither;
      Slots::for_each([&](auto index) {
        constexpr int k = decltype(index)::value;
        phase[k] = core::dither_group_start<Slots::stream(k), float>(key, 0u);
      });
      phase_weight = core::dither_group_start<core::DitherStream::kWeight, float>(key, 0u);
      active = t.gradient != nullptr && !hyper->skip;
      const int64_t left = t.numel / kGroupSize - segment_group;
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
template <core::Rule Rule, class Narrow, MasterWeights kMaster>
struct HotTables {
  static constexpr int kBits = kHotBits<kMaster>;
  using Slots = core::SlotCodecs<Rule, StateCodec::kDefault>;

  /// Of slot k: one, or one for each K where groups choose it.
  static FLASHOPTIM_HD constexpr int tables_of(int k) { return Rule::kSlots[k].mantissa_bits == 0 ? 4 : 1; }
  /// Signed slots of one codec share their tables: the first such slot's.
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
  static constexpr int kFirstTable = tables_before(owner(k));
  static constexpr int kTables = tables_before(Rule::kSlotCount);

  float fraction[kBits == 8 ? 256 : 1];             ///< (c / N) * (half an ULP of 1), by the correction's byte
  float magnitude[kTables > 0 ? kTables : 1][256];  ///< x / G with its sign, by table and code

  /// Every thread of the block calls it, and waits for the others.
  __device__ __forceinline__ void fill() {
    for (uint32_t i = threadIdx.x; i < 256u; i += kHotThreads) {
      const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(i)));
      if constexpr (kBits == 8) {
        fraction[i] = core::correction_fraction<8>(core::int_to_float(code)) * core::half_ulp_of_unit_scale<Narrow>();
      }
      Slots::for_each([&](auto index) {
        constexpr int k = decltype(index)::value;
        if constexpr (Slots::is_signed(k)) {
          using MuLaw = typename Slots::template Of<k>::MuLaw;
#pragma unroll
          for (uint32_t choice = 0; choice < tables_of(k); ++choice) {
            if constexpr (tables_of(k) > 1) {
              magnitude[kFirstTable<k> + choice][i] =
                  MuLaw::template decode<float>(code, MuLaw::template group<float>(choice));
            } else {
              magnitude[kFirstTable<k>][i] = MuLaw::template decode<float>(code);
            }
          }
        }
      });
    }
    __syncthreads();
  }
  __device__ __forceinline__ uint32_t fractions() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(fraction));
  }
  /// Of slot k, by the choice in a group's header.
  template <int k>
  __device__ __forceinline__ uint32_t magnitudes(uint32_t choice) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(magnitude[kFirstTable<k>])) +
           choice * static_cast<uint32_t>(sizeof magnitude[0]);
  }
};

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
template <core::Rule Rule>
struct HotHeaders {
  uint32_t of[Rule::kSlotCount] = {};
};

/// Where the q-th 16 bytes of a tile stand, if a thread takes two in a row: so that neither way of access has
/// conflicts.
__device__ __forceinline__ int place(int q) { return q ^ (q >> 3 & 1); }

/// The stored form of a warp's tile, on its way while the warp computes the tile before. (Loads into registers would be
/// moved down to their uses by the compiler, which waits three times for memory.)
template <core::Rule Rule, MasterWeights kMaster>
struct HotStage {
  static constexpr int kCorrectionQuads = kHotBits<kMaster> / 8;
  uint4 parameter[64];
  uint4 gradient[64];
  uint4 correction[kCorrectionQuads > 0 ? 32 * kCorrectionQuads : 1];
  uint4 states[Rule::kSlotCount][32];

  __device__ __forceinline__ HotHeaders<Rule> fetch(const HotContext<Rule>& context, uint32_t first_group, int thread) {
    __syncwarp();  // all have read what stood here
    const uint32_t first = first_group * static_cast<uint32_t>(kGroupSize) + static_cast<uint32_t>(thread) * 8u;
    const uint32_t first_code = first_group * static_cast<uint32_t>(kGroupSize) + static_cast<uint32_t>(thread) * 16u;
    const unsigned char* p = context.parameter + static_cast<uint64_t>(first) * 2u;
    const unsigned char* g = context.gradient + static_cast<uint64_t>(first) * 2u;
    HotHeaders<Rule> headers;
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

}  // namespace flashoptim::cuda
