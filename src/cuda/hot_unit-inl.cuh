// The hot path: 16 elements a thread with 16-bit weights, dithered corrections and the default codec, in about half of
// the instructions that core's formulas compile to. The same bits: every step is an identity of core's, said beside it,
// under conditions that are collected and tested before anything is written. Where one fails (zeros, subnormals,
// infinities, NaN, absurd magnitudes), the warp takes core's formulas instead. tests/cuda compares both with the CPU.
//
// Zeros are common, though: rows of an embedding that no batch has touched. kZeros is the same with some 10
// instructions an element more, for tiles that hold some; untouched_unit() is for tiles that hold nothing else.
//
// What counts on the H100 is instructions (docs/cuda.md): at full clock about 110 an element fit into the time that
// memory takes, and half of them may be on the ALU pipe (integers, comparisons, selections). So shifts and additions
// become IMAD, bytes are picked by PRMT, and codes are formed in the top byte of a word, from where the packing takes
// them.
#pragma once

#include "src/cuda/hot_paper-inl.cuh"
#include "src/cuda/hot_states-inl.cuh"
#include "src/cuda/hot_weights-inl.cuh"

namespace flashoptim::cuda {

/// Start of a thread's dither.
template <core::DitherStream kStream>
__device__ __forceinline__ uint32_t stream_start(uint32_t phase, uint32_t hash, uint32_t lane) {
  return core::dither_group_start<kStream, float>(core::DitherKey{0u, 0u}, hash) + phase +
         lane * core::kDitherLaneStep<kStream>;
}

/// How a tile was computed: 0, and nothing was written, where this way does not hold for its values.
enum HotResult : int { kHotFailed = 0, kHotWithoutZeros, kHotWithZeros };

/// Hash of a group for the dither.
template <core::Rule Rule, class Format>
__device__ __forceinline__ uint32_t group_hash(const HotContext<Rule, Format>& context, uint32_t group) {
  const uint64_t index = context.index_of(group);
  const core::DitherKey key{0u, context.prepared.dither.seed};
  return core::dither_group_hash<float>(key, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32));
}

template <core::Rule Rule, class Format, class Weights>
__device__ __forceinline__ void store_weights(const HotContext<Rule, Format>& context, const Weights& weights,
                                              HotStage<Rule, Format>& stage, uint32_t first_group, int thread) {
  // Read the addresses again rather than keep them.
  asm volatile("" ::: "memory");
  const uint64_t first = first_group * static_cast<uint32_t>(kGroupSize);
  store_quads(context.parameter + first * Format::kParameterBytes, weights.parameter, stage.parameter, thread);
  if constexpr (Format::kIsCorrected)
    store_quads(context.correction + first * Format::kCorrectionBytes, weights.correction, stage.correction, thread);
}

/// One tile, 16 elements a thread. Without kScaled gradients are not multiplied by their scale, which is 1.
template <core::Rule Rule, class Format, bool kZeros, bool kScaled = true>
__device__ __forceinline__ HotResult hot_unit(const HotTables<Rule, Format>& tables,
                                              const HotContext<Rule, Format>& context, HotStage<Rule, Format>& stage,
                                              const HotHeaders<Rule>& headers, uint32_t first_group, int thread) {
  using Weights = HotWeightsOf<Format, kZeros>;
  using States = HotStates<Rule, Format::kCodec, kZeros>;
  using Slots = typename States::Slots;
  using Lane = UpdateLane<kZeros, !kZeros && VarianceBounds<Rule>::kKnown>;
  using Stage = HotStage<Rule, Format>;
  using Hyper = typename Rule::Hyper;
  States states;
  Weights weights;
#pragma unroll
  for (int k = 0; k < Rule::kSlotCount; ++k) {
    states.codes[k] = take_quads<1>(stage.states[k], thread);
    states.header[k] = headers.of[k];
  }
  weights.parameter = take_quads<Stage::kParameterQuads>(stage.parameter, thread);
  const auto gradient = take_quads<Stage::kGradientQuads>(stage.gradient, thread);
  if constexpr (Format::kIsCorrected)
    weights.correction = take_quads<Stage::kCorrectionQuads>(stage.correction, thread);

  HotFindings found;
  found.ok = states.decode(tables);
  const Hyper& hyper = reinterpret_cast<const Hyper&>(context.prepared.rule);
  const float gradient_scale = context.prepared.gradient_scale;
  UpdateGuard guard;
#pragma unroll
  for (int i = 0; i < kHotUnit; ++i) {
    float g = hot_element<Format::kGradient>(gradient, i);
    if constexpr (kScaled) g = g * gradient_scale;
    typename Weights::Part part;
    const float w = weights.master(tables, i, part);
    Lane s[Rule::kSlotCount];
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) s[k] = {states.value[k][i], &guard};
    const Lane d = Rule::update(Lane(w, &guard), Lane(g, &guard), s, hyper);
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) states.value[k][i] = s[k].v;
    const float delta = d.v;
    weights.move(i, part, delta);
    // Rules let a weight or gradient that is not finite through to delta or to the states; a delta of 0 changes
    // nothing. (With a correction, a delta that is not finite makes a weight so, which hold() looks for.)
    if constexpr (!Format::kIsCorrected) found.poison = __fmaf_rn(delta, 0.0f, found.poison);
    if constexpr (Weights::kMustMove) {
      found.ok &= delta != 0.0f;
    } else if constexpr (Format::kIsCorrected) {
      found.has_zeros |= delta == 0.0f;
    }
    states.template note<Lane>(i, found);
  }
  const bool ok =
      found.ok && guard.holds() && weights.hold() && found.poison == 0.0f && states.template in_range<Lane>();
  if (!__all_sync(0xffffffffu, ok)) return kHotFailed;

  const uint32_t group = first_group + static_cast<uint32_t>(thread / kHotThreadsPerGroup);
  const uint32_t lane = static_cast<uint32_t>(thread % kHotThreadsPerGroup * kHotUnit);
  const uint32_t hash = group_hash(context, group);
  const uint32_t weight_start = stream_start<core::DitherStream::kWeight>(context.phase_weight, hash, lane);
  weights.finish(weight_start, context.minus_largest);
  states.encode(
      [&](auto index) {
        constexpr int k = decltype(index)::value;
        return stream_start<Slots::stream(k)>(context.phase[k], hash, lane);
      },
      context.root_shift);
  store_weights(context, weights, stage, first_group, thread);
  const uint64_t first = first_group * static_cast<uint32_t>(kGroupSize);
#pragma unroll
  for (int k = 0; k < Rule::kSlotCount; ++k)
    store_quads(context.states[k] + first, states.codes[k], stage.states[k], thread);
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) context.scales[k][group] = static_cast<uint16_t>(states.header[k]);
  }
  return kZeros && __any_sync(0xffffffffu, found.has_zeros) ? kHotWithZeros : kHotWithoutZeros;
}

/// Whether gradients, codes and headers of a tile are all 0 (+0: the sign of a zero may count).
template <core::Rule Rule, class Format>
__device__ __forceinline__ bool is_untouched(const HotStage<Rule, Format>& stage, const HotHeaders<Rule>& headers,
                                             int thread) {
  uint32_t any = 0u;
  const auto gradient = take_quads<HotStage<Rule, Format>::kGradientQuads>(stage.gradient, thread);
#pragma unroll
  for (const uint32_t word : gradient.w) any |= word;
#pragma unroll
  for (int k = 0; k < Rule::kSlotCount; ++k) {
    any |= headers.of[k];
    const HotWords<4> codes = take_quads<1>(stage.states[k], thread);
#pragma unroll
    for (const uint32_t word : codes.w) any |= word;
  }
  return __all_sync(0xffffffffu, any == 0u);
}

/// One tile that was never touched, of a rule with decoupled decay: its states stay as they are and are not written.
/// What update() makes of no gradient and no state is the same for all elements, but for the decay.
template <core::Rule Rule, class Format>
__device__ __forceinline__ HotResult untouched_unit(const HotTables<Rule, Format>& tables,
                                                    const HotContext<Rule, Format>& context,
                                                    HotStage<Rule, Format>& stage, const HotHeaders<Rule>& headers,
                                                    uint32_t first_group, int thread) {
  using Hyper = typename Rule::Hyper;
  using Stage = HotStage<Rule, Format>;
  if (!is_untouched(stage, headers, thread)) return kHotFailed;
  using Weights = HotWeightsOf<Format, true>;
  Weights weights;
  weights.parameter = take_quads<Stage::kParameterQuads>(stage.parameter, thread);
  if constexpr (Format::kIsCorrected)
    weights.correction = take_quads<Stage::kCorrectionQuads>(stage.correction, thread);
  const Hyper& hyper = reinterpret_cast<const Hyper&>(context.prepared.rule);
  using Lane = UpdateLane<true, false>;
  UpdateGuard guard;
  const Lane g(0.0f * context.prepared.gradient_scale, &guard);
  float poison = 0.0f;
  bool ok = true, moves = false;
#pragma unroll
  for (int i = 0; i < kHotUnit; ++i) {
    Lane s[Rule::kSlotCount];
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) s[k] = {0.0f, &guard};
    typename Weights::Part part;
    const Lane w(weights.master(tables, i, part), &guard);
    const float delta = Rule::update(w, g, s, hyper).v;
    weights.move(i, part, delta);
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) ok &= core::to_bits(s[k].v) == 0u;
    moves |= delta != 0.0f;
    if constexpr (!Format::kIsCorrected) poison = __fmaf_rn(delta, 0.0f, poison);
  }
  if (!__all_sync(0xffffffffu, ok && guard.holds() && weights.hold() && poison == 0.0f)) return kHotFailed;
  if (Format::kIsCorrected && !__any_sync(0xffffffffu, moves)) return kHotWithZeros;

  const uint32_t group = first_group + static_cast<uint32_t>(thread / kHotThreadsPerGroup);
  const uint32_t hash = group_hash(context, group);
  const uint32_t lane = static_cast<uint32_t>(thread % kHotThreadsPerGroup * kHotUnit);
  const uint32_t start = stream_start<core::DitherStream::kWeight>(context.phase_weight, hash, lane);
  weights.finish(start, context.minus_largest);
  store_weights(context, weights, stage, first_group, thread);
  return kHotWithZeros;
}

}  // namespace flashoptim::cuda
