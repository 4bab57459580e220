// The hot path's memory: what the tiles of a tensor share, a tile in stored form on its way, words of 16 elements.
// hot_unit-inl.cuh says what the hot path is.
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

template <DType kDType>
using NarrowOf = std::conditional_t<kDType == DType::kBFloat16, core::BFloat16, core::Float16>;

__device__ __forceinline__ const TensorEntry& entry_of(const StepArguments& args, int32_t tensor) {
  return args.tensors != nullptr ? args.tensors[tensor] : args.inline_tensor;
}

__device__ __forceinline__ const PreparedHyper* hyper_of(const StepArguments& args, const TensorEntry& t) {
  return (args.hypers != nullptr ? args.hypers : args.inline_hypers) + t.hyper_index;
}

/// inverse_root_scale(x) = (kTop - (x >> 1)) & mask = ~((x - 2 kTop - 2) >> 1) & mask: what x is shifted by.
inline constexpr uint32_t kRootShift = 0u - 2u * ((255u << 23) - (127u << 22));

/// What the tiles of one tensor share, in shared memory: registers are for elements. Addresses are those of a segment
/// of 2^kSegmentBits groups, so that offsets have 32 bits.
template <core::Rule Rule, class Format>
struct alignas(16) HotContext {
  using Slots = core::SlotCodecs<Rule, Format::kCodec>;
  unsigned char* parameter;
  const unsigned char* gradient;
  unsigned char* correction;
  unsigned char* states[Rule::kSlotCount];
  uint16_t* scales[Rule::kSlotCount];
  uint64_t first_index;  ///< of the segment in the whole tensor, for the dither
  PreparedHyper prepared;
  /// Starts of the dither's streams, but for the group's hash.
  uint32_t phase[Rule::kSlotCount], phase_weight;
  /// Constants from memory: what the compiler knows it adds apart from the rest, or moves to registers again and again.
  uint32_t root_shift, minus_largest;  ///< kRootShift, FixedCorrection's
  uint32_t full;  ///< groups before this one are full and lie at 32 times their number, on addresses for vectors
  bool active;
  /// kInRuns alone, which has no first_index: the segment's first group, and what runs are.
  int64_t first_group, groups_per_run, stride, first_element;

  /// First element of a group of the segment in the whole: core::PlacedGroups::piece, where all groups are full.
  __device__ __forceinline__ uint64_t index_of(uint32_t group) const {
    if constexpr (Format::kGroups == HotGroups::kInOneStretch) {
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
      parameter = static_cast<unsigned char*>(t.parameter) + first * Format::kParameterBytes;
      gradient = static_cast<const unsigned char*>(t.gradient) + first * Format::kGradientBytes;
      correction = static_cast<unsigned char*>(t.correction) + first * Format::kCorrectionBytes;
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        states[k] = static_cast<unsigned char*>(t.states[k]) + first;
        scales[k] = t.scales[k] + segment_group;
      }
      if constexpr (Format::kGroups == HotGroups::kInOneStretch) {
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
      root_shift = kRootShift;
      minus_largest = Format::kCorrectionBytes == 1 ? 0x81u : 0x8001u;
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
    return (count >= kWarpGroups) & (first + kWarpGroups <= full);  // && would make branches
  }
};

/// 16 codes, corrections, parameters or gradients.
template <int kWords>
struct HotWords {
  uint32_t w[kWords];
};

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

/// Bytes of 16 words, the lowest being 0.
template <uint32_t kByte>
__device__ __forceinline__ HotWords<4> pack_bytes(const uint32_t (&t)[kHotUnit]) {
  constexpr uint32_t kOfBoth = kByte | (kByte + 4u) << 4;
  HotWords<4> out;
#pragma unroll
  for (int j = 0; j < kHotUnit / 4; ++j) {
    const uint32_t low = permute(t[4 * j], t[4 * j + 1], kOfBoth);
    out.w[j] = permute(low, permute(t[4 * j + 2], t[4 * j + 3], kOfBoth), 0x5410u);
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

/// Where the q-th 16 bytes of a tile stand, if a thread takes kQuads in a row: so that neither way of access has
/// conflicts.
template <int kQuads>
__device__ __forceinline__ int place(int q) {
  static_assert(kQuads == 1 || kQuads == 2 || kQuads == 4);
  return q ^ (q >> 3 & (kQuads - 1));
}

/// 32 kQuads quads to shared memory, from the warp's first one.
template <int kQuads>
__device__ __forceinline__ void fetch_quads(uint4* to, const unsigned char* from, int thread) {
#pragma unroll
  for (int j = 0; j < kQuads; ++j) copy_16(&to[place<kQuads>(32 * j + thread)], from + 512 * j);
}

/// A thread's quads of them.
template <int kQuads>
__device__ __forceinline__ HotWords<4 * kQuads> take_quads(const uint4* from, int thread) {
  HotWords<4 * kQuads> out;
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const uint4 v = from[place<kQuads>(kQuads * thread + j)];
    out.w[4 * j] = v.x;
    out.w[4 * j + 1] = v.y;
    out.w[4 * j + 2] = v.z;
    out.w[4 * j + 3] = v.w;
  }
  return out;
}

/// Stores a thread's quads, `p` being the warp's first: several so that the warp writes whole sectors, through the
/// stage that they came from. (Without the hint that the other kernels' stores have: with it, 268 M take 0.8 % longer.)
template <int kWords>
__device__ __forceinline__ void store_quads(unsigned char* p, const HotWords<kWords>& words, uint4* through,
                                            int thread) {
  constexpr int kQuads = kWords / 4;
  uint4* const quads = reinterpret_cast<uint4*>(p);
  const auto quad = [&words](int j) {
    return make_uint4(words.w[4 * j], words.w[4 * j + 1], words.w[4 * j + 2], words.w[4 * j + 3]);
  };
  if constexpr (kQuads == 1) {
    quads[thread] = quad(0);
  } else {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) through[place<kQuads>(kQuads * thread + j)] = quad(j);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kQuads; ++j) quads[32 * j + thread] = through[place<kQuads>(32 * j + thread)];
  }
}

/// The stored form of a warp's tile, on its way while the warp computes the tile before. (Loads into registers would be
/// moved down to their uses by the compiler, which waits three times for memory.)
template <core::Rule Rule, class Format>
struct HotStage {
  /// Quads of a thread: 16 elements.
  static constexpr int kParameterQuads = Format::kParameterBytes, kGradientQuads = Format::kGradientBytes;
  static constexpr int kCorrectionQuads = Format::kCorrectionBytes;
  uint4 parameter[32 * kParameterQuads];
  uint4 gradient[32 * kGradientQuads];
  uint4 correction[kCorrectionQuads > 0 ? 32 * kCorrectionQuads : 1];
  uint4 states[Rule::kSlotCount][32];

  __device__ __forceinline__ HotHeaders<Rule> fetch(const HotContext<Rule, Format>& context, uint32_t first_group,
                                                    int thread) {
    __syncwarp();  // all have read what stood here
    const uint32_t first = first_group * static_cast<uint32_t>(kGroupSize);
    const auto at = [first, thread](const unsigned char* base, uint32_t bytes) {
      return base + static_cast<uint64_t>(first) * bytes + thread * 16;
    };
    // All addresses before the first copy: the compiler sets three empty instructions between a look into shared memory
    // and a copy behind it.
    const unsigned char* const p = at(context.parameter, Format::kParameterBytes);
    const unsigned char* const g = at(context.gradient, Format::kGradientBytes);
    const unsigned char* const c = kCorrectionQuads > 0 ? at(context.correction, Format::kCorrectionBytes) : nullptr;
    const unsigned char* s[Rule::kSlotCount];
    HotHeaders<Rule> headers;
    const uint32_t group = first_group + static_cast<uint32_t>(thread / kHotThreadsPerGroup);
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) {
      s[k] = at(context.states[k], 1);
      headers.of[k] = __ldcs(context.scales[k] + group);
    }
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) fetch_quads<1>(states[k], s[k], thread);
    fetch_quads<kParameterQuads>(parameter, p, thread);
    fetch_quads<kGradientQuads>(gradient, g, thread);
    if constexpr (kCorrectionQuads > 0) fetch_quads<kCorrectionQuads>(correction, c, thread);
    return headers;
  }
};

}  // namespace flashoptim::cuda
