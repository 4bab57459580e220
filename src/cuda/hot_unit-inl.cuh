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

#include "src/cuda/hot_states-inl.cuh"
#include "src/cuda/hot_weights-inl.cuh"

namespace flashoptim::cuda {

/// Start of a thread's dither.
template <core::DitherStream kStream>
__device__ __forceinline__ uint32_t stream_start(uint32_t phase, uint32_t hash, uint32_t lane) {
  return core::dither_group_start<kStream, float>(core::DitherKey{0u, 0u}, hash) + phase +
         lane * core::kDitherLaneStep<kStream>;
}

/// Whether a rule says that update() divides every slot that is relative to a variance, which has then looked at it.
template <core::Rule Rule>
inline constexpr bool kDividesRelative = requires { requires Rule::kDividesRelative; };

/// How a tile was computed: 0, and nothing was written, where this way does not hold for its values.
enum HotResult : int { kHotFailed = 0, kHotWithoutZeros, kHotWithZeros };

/// One tile, 16 elements a thread.
template <core::Rule Rule, class Narrow, MasterWeights kMaster, HotGroups kGroups, bool kZeros>
__device__ __forceinline__ HotResult hot_unit(const HotTables<Rule, Narrow, kMaster>& tables,
                                              const HotContext<Rule>& context, HotStage<Rule, kMaster>& stage,
                                              const HotHeaders<Rule>& headers, uint32_t first_group, int thread) {
  using Weights = HotWeightsOf<Narrow, kMaster, kZeros>;
  constexpr bool kCorrected = core::has_correction(kMaster);
  using States = HotStates<Rule, kZeros>;
  using Slots = typename States::Slots;
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

  float value[kHotUnit], delta[kHotUnit];
  bool ok = states.decode(tables);
  const Hyper& hyper = reinterpret_cast<const Hyper&>(context.prepared.rule);
  const float gradient_scale = context.prepared.gradient_scale;
  UpdateGuard guard;
  float poison = 0.0f;  // NaN once something is not finite
  bool has_zeros = false;
  HotExtremes extremes[Rule::kSlotCount];
#pragma unroll
  for (int i = 0; i < kHotUnit; ++i) {
    const float n = narrow_element<Narrow>(weights.parameter, i);
    const float g = narrow_element<Narrow>(gradient, i) * gradient_scale;
    float w = n;
    if constexpr (kCorrected) {
      value[i] = weights.correction_value(tables, n, i);
      w = n + value[i];
    }
    Lane s[Rule::kSlotCount];
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) s[k] = {states.value[k][i], &guard};
    const Lane d = Rule::update(Lane(w, &guard), Lane(g, &guard), s, hyper);
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) states.value[k][i] = s[k].v;
    delta[i] = d.v;
    // Rules let a weight or gradient that is not finite through to delta or to the states; a delta of 0 changes
    // nothing. (With a correction, a delta that is not finite makes a weight so, which update() looks for.)
    if constexpr (!kCorrected) poison = __fmaf_rn(delta[i], 0.0f, poison);
    if constexpr (Weights::kMustMove) {
      ok &= delta[i] != 0.0f;
    } else if constexpr (kCorrected) {
      has_zeros |= delta[i] == 0.0f;
    }
    Slots::for_each([&](auto index) {
      constexpr int k = decltype(index)::value;
      const float(&x)[kHotUnit] = states.value[k];
      HotExtremes& of = extremes[k];
      if constexpr (!Slots::is_signed(k)) {
        if (i % 2 == 1) of.template add_pair<kZeros>(x[i - 1], x[i]);
        if constexpr (kZeros) {
          of.smallest_minus_one = core::unsigned_min(of.smallest_minus_one, core::to_bits(x[i]) - 1u);
          has_zeros |= x[i] == 0.0f;
        }
      } else if constexpr (!Slots::is_relative(k)) {
        poison = __fmaf_rn(x[i], 0.0f, poison);
        if constexpr (Slots::template Of<k>::kUsesSmallest) {
          of.largest_value = fmaxf(of.largest_value, fabsf(x[i]));
          const bool is_zero = kZeros && x[i] == 0.0f;
          has_zeros |= is_zero;
          of.smallest_value = is_zero ? of.smallest_value : fminf(of.smallest_value, fabsf(x[i]));
        }
      } else if constexpr (!kZeros && !kDividesRelative<Rule>) {
        ok &= fabsf(x[i]) >= 0x1p-80f;
      }
    });
  }
  ok = ok && guard.holds() && weights.are_normal() && poison == 0.0f;
  Slots::for_each([&](auto index) {
    constexpr int k = decltype(index)::value;
    HotExtremes& of = extremes[k];
    if constexpr (!Slots::is_signed(k)) {
      if constexpr (!kZeros) of.smallest_minus_one = of.smallest - 1u;
      constexpr uint32_t kSmallest = Lane::kKnowsRadicands ? kSmallestRadicand : 0x00800000u;
      ok = ok && of.smallest_minus_one >= kSmallest - 1u && of.largest <= Bounds::kLargest;
    } else if constexpr (Slots::template Of<k>::kUsesSmallest) {
      ok = ok && of.smallest_value >= 0x1p-96f && of.largest_value <= 0x1p40f;
    }
  });
  if (!__all_sync(0xffffffffu, ok)) return kHotFailed;

  const uint32_t group = first_group + static_cast<uint32_t>(thread / kHotThreadsPerGroup);
  const uint32_t lane = static_cast<uint32_t>(thread % kHotThreadsPerGroup * kHotUnit);
  const uint64_t index = context.index_of<kGroups>(group);
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
  states.encode(extremes, [&](auto index) {
    constexpr int k = decltype(index)::value;
    return stream_start<Slots::stream(k)>(context.phase[k], hash, lane);
  });

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
