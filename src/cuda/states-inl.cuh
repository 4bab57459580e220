// The three codecs over one thread's 8 elements of a group: as src/cpu/loops-inl.h composes core's formulas.
#pragma once

#include <type_traits>

#include "flashoptim/core/default_codec.h"
#include "flashoptim/core/dither.h"
#include "flashoptim/core/optimizer_list.h"
#include "flashoptim/core/paper_codec.h"
#include "src/cuda/lane.cuh"
#include "src/cuda/memory-inl.cuh"

namespace flashoptim::cuda {

using F = float;

/// Bytes of one state element.
template <StateCodec kCodec>
inline constexpr int kStateBytes = kCodec == StateCodec::kFloat32 ? 4 : 1;

/// A group's stored states, as one thread sees them.
template <StateCodec kCodec>
struct StoredStates {
  Words<kStateBytes<kCodec>> words[kMaxSlots];
  uint32_t header[kMaxSlots];
};

/// Where a thread's 8 elements get their dither from.
struct DitherSource {
  core::DitherKey key;
  uint32_t group_hash;
  int lane;  ///< the first element's place in its group

  template <core::DitherStream kStream>
  __device__ __forceinline__ uint32_t start() const {
    return core::dither_group_start<kStream, F>(key, group_hash) +
           static_cast<uint32_t>(lane) * core::kDitherLaneStep<kStream>;
  }
  template <core::DitherStream kStream>
  static __device__ __forceinline__ uint32_t word(uint32_t start, int i) {
    return start + static_cast<uint32_t>(i) * core::kDitherLaneStep<kStream>;
  }
};

/// Half a step everywhere instead: rounding to nearest.
struct NearestSource {
  template <core::DitherStream kStream>
  __device__ __forceinline__ uint32_t start() const {
    return 0x80000000u;
  }
  template <core::DitherStream kStream>
  static __device__ __forceinline__ uint32_t word(uint32_t start, int) {
    return start;
  }
};

template <class Rule>
using States = F[kUnit][core::kSlotArray<Rule>];

template <class Rule, StateCodec kCodec>
struct Codec;

template <class Rule>
struct Codec<Rule, StateCodec::kFloat32> {
  using Stored = StoredStates<StateCodec::kFloat32>;

  static __device__ __forceinline__ void decode(const Stored& stored, States<Rule>& s) {
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) s[i][k] = core::from_bits(stored.words[k].w[i]);
    }
  }
  template <class Dither>
  static __device__ __forceinline__ void encode(States<Rule>& s, const Dither&, Stored& stored) {
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) stored.words[k].w[i] = core::to_bits(core::canonical_nan(s[i][k]));
    }
  }
};

template <class Rule>
struct Codec<Rule, StateCodec::kPaper> {
  using Stored = StoredStates<StateCodec::kPaper>;
  template <int k>
  static constexpr bool kIsSigned = Rule::kSlots[k].kind == core::StateKind::kSigned;

  template <int k>
  static __device__ __forceinline__ void decode_slot(const Stored& stored, States<Rule>& s) {
    const F scale = core::half_to_float(stored.header[k]);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if constexpr (kIsSigned<k>) {
        s[i][k] = core::PaperMomentum::decode<ExactLane>(signed_element(stored.words[k], i), scale).v;
      } else {
        s[i][k] = core::PaperVariance::decode<F>(element(stored.words[k], i), scale);
      }
    }
  }
  template <int k>
  static __device__ __forceinline__ void encode_slot(States<Rule>& s, Stored& stored) {
    uint32_t largest = 0u;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      F kept = s[i][k];
      if constexpr (!kIsSigned<k>) kept = root(kept);
      s[i][k] = core::finite_or_zero(kept);
      largest = core::int_max(largest, core::to_bits(core::abs(s[i][k])));
    }
    const F absmax = core::max(core::splat<F>(core::kPaperSmallestAbsmax), core::from_bits(group_int_max(largest)));
    stored.header[k] = core::paper_header(absmax);
    using SlotCodec = std::conditional_t<kIsSigned<k>, core::PaperMomentum, core::PaperVariance>;
    const F factor = SlotCodec::template encoding_factor<F>(absmax);
    uint32_t codes[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) codes[i] = SlotCodec::template encode<ExactLane>(s[i][k], factor);
    stored.words[k] = pack<1>(codes);
  }

  static __device__ __forceinline__ void decode(const Stored& stored, States<Rule>& s) {
    if constexpr (Rule::kSlotCount > 0) decode_slot<0>(stored, s);
    if constexpr (Rule::kSlotCount > 1) decode_slot<1>(stored, s);
  }
  template <class Dither>
  static __device__ __forceinline__ void encode(States<Rule>& s, const Dither&, Stored& stored) {
    if constexpr (Rule::kSlotCount > 0) encode_slot<0>(s, stored);
    if constexpr (Rule::kSlotCount > 1) encode_slot<1>(s, stored);
  }
};

template <class Rule>
struct Codec<Rule, StateCodec::kDefault> {
  using Stored = StoredStates<StateCodec::kDefault>;
  static constexpr bool kHasVariance = Rule::kSlotCount > 1;
  static constexpr bool kGroupChooses = Rule::kSlots[0].mantissa_bits == 0;  ///< K of momentum
  using MuLaw = typename core::SignedCodec<Rule::kSlots[0].mantissa_bits>::type;

  static __device__ __forceinline__ void decode(const Stored& stored, States<Rule>& s) {
    if constexpr (Rule::kSlotCount > 0 && kGroupChooses) {
      const F scale = MuLaw::template scale<F>(stored.header[0]);
      const auto group = MuLaw::template group<F>(stored.header[0]);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        s[i][0] = MuLaw::template decode<F>(signed_element(stored.words[0], i), group) * scale;
      }
    } else if constexpr (Rule::kSlotCount > 0) {
      const F scale = MuLaw::template decoding_scale<kHasVariance, F>(stored.header[0]);
      core::WindowCodec::Window<uint32_t> window{};
      if constexpr (kHasVariance) window = core::WindowCodec::window<F>(stored.header[1]);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        s[i][0] = MuLaw::template decode<F>(element(stored.words[0], i)) * scale;
        if constexpr (kHasVariance) {
          s[i][1] = core::WindowCodec::decode<F>(element(stored.words[1], i), window);
          s[i][0] = s[i][0] * core::root_scale<F>(core::to_bits(s[i][1]));
        }
      }
    }
  }

  template <class Dither>
  static __device__ __forceinline__ void encode(States<Rule>& s, const Dither& dither, Stored& stored) {
    if constexpr (Rule::kSlotCount > 0) {
      uint32_t momentum_largest = 0u, momentum_smallest = 0xffffffffu;
      if constexpr (kHasVariance) {
        momentum_largest = encode_variance(s, dither, stored);
      } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          s[i][0] = core::finite_or_zero(s[i][0]);
          const uint32_t bits = core::to_bits(core::abs(s[i][0]));
          momentum_largest = core::int_max(momentum_largest, bits);
          if constexpr (kGroupChooses) momentum_smallest = core::unsigned_min(momentum_smallest, bits - 1u);
        }
      }
      if constexpr (kGroupChooses) {
        encode_chosen(s, group_int_max(momentum_largest), group_unsigned_min(momentum_smallest), dither, stored);
      } else {
        encode_momentum(s, group_int_max(momentum_largest), dither, stored);
      }
    }
  }

  /// Leaves momentum relative to the stored variance in slot 0 and returns the largest of this thread's.
  template <class Dither>
  static __device__ __forceinline__ uint32_t encode_variance(States<Rule>& s, const Dither& dither, Stored& stored) {
    constexpr auto kStream = core::DitherStream::kVariance;
    uint32_t bits[kUnit];
    uint32_t largest = 0u, smallest = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      bits[i] = core::WindowCodec::storable(s[i][1]);
      largest = core::int_max(largest, bits[i]);
      smallest = core::unsigned_min(smallest, bits[i] - 1u);
    }
    stored.header[1] = core::WindowCodec::header<F>(group_int_max(largest), group_unsigned_min(smallest));
    const auto window = core::WindowCodec::window<F>(stored.header[1]);
    const uint32_t start = dither.template start<kStream>();
    uint32_t codes[kUnit];
    uint32_t momentum_largest = 0u;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const auto v = core::WindowCodec::encode<F>(bits[i], window, Dither::template word<kStream>(start, i));
      codes[i] = v.code;
      s[i][0] = core::relative_to_root(s[i][0], v.stored);
      momentum_largest = core::int_max(momentum_largest, core::to_bits(core::abs(s[i][0])));
    }
    stored.words[1] = pack<1>(codes);
    return momentum_largest;
  }

  template <class Dither>
  static __device__ __forceinline__ void encode_momentum(States<Rule>& s, uint32_t largest, const Dither& dither,
                                                         Stored& stored) {
    constexpr auto kStream = core::DitherStream::kMomentum;
    stored.header[0] = MuLaw::template header<F>(core::from_bits(largest));
    const F inverse = MuLaw::template inverse_scale<F>(stored.header[0]);
    const uint32_t start = dither.template start<kStream>();
    uint32_t codes[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      codes[i] = MuLaw::template encode<F>(s[i][0], inverse, Dither::template word<kStream>(start, i));
    }
    stored.words[0] = pack<1>(codes);
  }

  template <class Dither>
  static __device__ __forceinline__ void encode_chosen(States<Rule>& s, uint32_t largest, uint32_t smallest_minus_one,
                                                       const Dither& dither, Stored& stored) {
    constexpr auto kStream = core::DitherStream::kMomentum;
    stored.header[0] = MuLaw::template header<F>(largest, smallest_minus_one);
    const F inverse = MuLaw::template inverse_scale<F>(stored.header[0]);
    const auto group = MuLaw::template group<F>(stored.header[0]);
    const uint32_t start = dither.template start<kStream>();
    uint32_t codes[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      codes[i] = MuLaw::template encode<F>(s[i][0], inverse, group, Dither::template word<kStream>(start, i));
    }
    stored.words[0] = pack<1>(codes);
  }
};

}  // namespace flashoptim::cuda
