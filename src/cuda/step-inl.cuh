// The step kernel: one launch updates any number of tensors. A block works on a chunk, a run of groups of one tensor;
// four threads hold a group, 8 elements each.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/arguments.h"
#include "src/cuda/states-inl.cuh"
#include "src/cuda/weights-inl.cuh"

namespace flashoptim::cuda {

/// Where a thread's unit lies in its tensor.
struct Unit {
  int64_t group_first;  ///< first element of the group
  int64_t first;        ///< first element of the unit
  int valid;            ///< elements of it that exist, 0 ... 8
};

__device__ __forceinline__ Unit locate_unit(const TensorEntry& t, int64_t group, int lane) {
  Unit unit;
  int64_t left;
  if (t.flags & kShortRows) {
    int64_t row, column;
    if (((group | t.groups_per_row) >> 32) == 0) {
      const uint32_t r = static_cast<uint32_t>(group) / static_cast<uint32_t>(t.groups_per_row);
      row = r;
      column = static_cast<uint32_t>(group) - r * static_cast<uint32_t>(t.groups_per_row);
    } else {
      row = group / t.groups_per_row;
      column = group - row * t.groups_per_row;
    }
    unit.group_first = row * t.row_size + column * kGroupSize;
    left = t.row_size - column * kGroupSize;
  } else {
    unit.group_first = group * kGroupSize;
    left = t.numel - unit.group_first;
  }
  unit.first = unit.group_first + lane;
  left -= lane;
  unit.valid = left <= 0 ? 0 : left >= kUnit ? kUnit : static_cast<int>(left);
  return unit;
}

/// Elements with NaN or infinite gradients.
__device__ __forceinline__ int count_nonfinite(const F (&g)[kUnit], int valid) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) count += (i < valid) && !(core::equals(g[i] - g[i], core::splat<F>(0.0f)));
  return count;
}

template <class Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void step_unit(const StepArguments& args, const TensorEntry& t, const Types& types,
                                          const typename Rule::Hyper& hyper, const core::DitherKey& key, float gradient_scale,
                                          bool aligned, int64_t group, int lane, bool active) {
  constexpr int kBytes = kStateBytes<kCodec>;
  Unit unit = locate_unit(t, group, lane);
  if (!active) unit.valid = 0;
  const bool vector = aligned && unit.valid == kUnit && unit.first % kUnit == 0;

  // All loads first, so that they are in flight together.
  StoredWeights weights;
  Words<4> gradient_words;
  StoredStates<kCodec> states;
  load_weights(t, types, unit.first, unit.valid, vector, weights);
  load_2_or_4(t.gradient, unit.first, types.gradient() == DType::kFloat32, unit.valid, vector, gradient_words);
#pragma unroll
  for (int k = 0; k < Rule::kStateCount; ++k) {
    states.words[k] =
        load_unit<kBytes>(static_cast<const unsigned char*>(t.states[k]) + unit.first * kBytes, unit.valid, vector);
    if constexpr (kCodec != StateCodec::kFloat32) states.header[k] = active ? t.scales[k][group] : 0u;
  }

  F w[kUnit], g[kUnit], delta[kUnit];
  States s;
  merge_weights(types, weights, w);
  widen(types.gradient(), gradient_words, g);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) g[i] = g[i] * core::splat<F>(gradient_scale);
  if (args.nonfinite != nullptr) {
    const int count = count_nonfinite(g, unit.valid);
    if (count != 0) atomicAdd(args.nonfinite, static_cast<unsigned long long>(count));
  }
  Codec<Rule, kCodec>::decode(states, s);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) delta[i] = Rule::update(w[i], g[i], s[i], hyper);

  const uint64_t index = static_cast<uint64_t>(t.first_element + unit.group_first);
  const DitherSource dither{
      key, core::dither_group_hash<F>(key, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)), lane};
  update_weights(types, w, delta, dither, weights);
  store_weights(t, types, unit.first, unit.valid, vector, weights);

  Codec<Rule, kCodec>::encode(s, dither, states);
#pragma unroll
  for (int k = 0; k < Rule::kStateCount; ++k) {
    store_unit<kBytes>(static_cast<unsigned char*>(t.states[k]) + unit.first * kBytes, states.words[k], unit.valid, vector);
    if constexpr (kCodec != StateCodec::kFloat32) {
      if (active && lane == 0) t.scales[k][group] = static_cast<uint16_t>(states.header[k]);
    }
  }
}

template <class Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void step_chunk(const StepArguments& args, const TensorEntry& t, const Chunk& chunk,
                                           const PreparedHyper& prepared) {
  const Types types(t);
  const typename Rule::Hyper hyper = reinterpret_cast<const typename Rule::Hyper&>(prepared.rule);
  const core::DitherKey key = prepared.dither;
  const float gradient_scale = prepared.gradient_scale;
  const bool aligned = (t.flags & kVectorAligned) && (reinterpret_cast<uintptr_t>(t.gradient) & 15u) == 0;
  const int lane = static_cast<int>(threadIdx.x % kThreadsPerGroup) * kUnit;
#pragma unroll 1
  for (int tile = 0; tile < chunk.groups; tile += kTileGroups) {
    const int local = tile + static_cast<int>(threadIdx.x / kThreadsPerGroup);
    step_unit<Rule, kCodec, Types>(args, t, types, hyper, key, gradient_scale, aligned, chunk.first_group + local, lane,
                                   local < chunk.groups);
  }
}

template <class Rule, StateCodec kCodec>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) step_kernel(const __grid_constant__ StepArguments args) {
  const Chunk chunk = args.chunks[blockIdx.x];
  const TensorEntry& t = args.tensors[chunk.tensor];
  if (t.gradient == nullptr) return;
  const PreparedHyper& prepared = (args.hypers != nullptr ? args.hypers : args.inline_hypers)[t.hyper_index];
  if (prepared.skip) return;
  step_chunk<Rule, kCodec, AnyTypes>(args, t, chunk, prepared);
}

template <class Rule, StateCodec kCodec>
int launch_step(const StepArguments& args, unsigned int blocks, void* stream) {
  step_kernel<Rule, kCodec><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

/// A rule's launches. A rule without states has no codec: one kernel serves all three.
template <class Rule>
StepLaunches make_step_launches() {
  constexpr bool kStates = Rule::kStateCount > 0;
  return {{launch_step<Rule, StateCodec::kFloat32>, launch_step<Rule, kStates ? StateCodec::kPaper : StateCodec::kFloat32>,
           launch_step<Rule, kStates ? StateCodec::kDefault : StateCodec::kFloat32>}};
}

}  // namespace flashoptim::cuda
