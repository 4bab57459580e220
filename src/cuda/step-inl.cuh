// The step kernel: one launch updates any number of tensors. A block works on a chunk, a run of groups of one tensor;
// four threads hold a group, 8 elements each.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/arguments.h"
#include "src/cuda/fast_unit-inl.cuh"
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

/// What all units of a chunk share, in shared memory: registers are for the elements.
struct ChunkContext {
  TensorEntry tensor;
  PreparedHyper prepared;
  unsigned long long* nonfinite;
};

/// Everything a thread holds of its unit in stored form.
template <StateCodec kCodec>
struct StoredUnit {
  StoredWeights weights;
  Words<4> gradient;
  StoredStates<kCodec> states;
};

template <class Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void load_stored(const TensorEntry& t, const Types& types, const Unit& unit, bool vector,
                                            StoredUnit<kCodec>& out) {
  constexpr int kBytes = kStateBytes<kCodec>;
  load_weights(t, types, unit.first, unit.valid, vector, out.weights);
  load_2_or_4(t.gradient, unit.first, types.gradient() == DType::kFloat32, unit.valid, vector, out.gradient);
#pragma unroll
  for (int k = 0; k < Rule::kStateCount; ++k) {
    out.states.words[k] =
        load_unit<kBytes>(static_cast<const unsigned char*>(t.states[k]) + unit.first * kBytes, unit.valid, vector);
  }
}

template <class Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void store_stored(const TensorEntry& t, const Types& types, const Unit& unit, bool vector,
                                             const StoredUnit<kCodec>& in) {
  constexpr int kBytes = kStateBytes<kCodec>;
  store_weights(t, types, unit.first, unit.valid, vector, in.weights);
#pragma unroll
  for (int k = 0; k < Rule::kStateCount; ++k) {
    store_unit<kBytes>(static_cast<unsigned char*>(t.states[k]) + unit.first * kBytes, in.states.words[k], unit.valid, vector);
  }
}

template <class Rule, StateCodec kCodec>
__device__ __forceinline__ void load_headers(const TensorEntry& t, int64_t group, bool active, StoredStates<kCodec>& states) {
  if constexpr (kCodec != StateCodec::kFloat32) {
#pragma unroll
    for (int k = 0; k < Rule::kStateCount; ++k) states.header[k] = active ? t.scales[k][group] : 0u;
  }
}
template <class Rule, StateCodec kCodec>
__device__ __forceinline__ void store_headers(const TensorEntry& t, int64_t group, bool writes, const StoredStates<kCodec>& states) {
  if constexpr (kCodec != StateCodec::kFloat32) {
    if (writes) {
#pragma unroll
      for (int k = 0; k < Rule::kStateCount; ++k) t.scales[k][group] = static_cast<uint16_t>(states.header[k]);
    }
  }
}

/// fp32 gradients, scaled; the ones that are not finite are counted if someone wants to know.
template <class Types>
__device__ __forceinline__ void scaled_gradients(const ChunkContext& context, const Types& types, const Words<4>& words, int valid,
                                                 F (&g)[kUnit]) {
  widen(types.gradient(), words, g);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) g[i] = g[i] * core::splat<F>(context.prepared.gradient_scale);
  if (context.nonfinite != nullptr) {
    const int count = count_nonfinite(g, valid);
    if (count != 0) atomicAdd(context.nonfinite, static_cast<unsigned long long>(count));
  }
}

__device__ __forceinline__ DitherSource dither_source(const ChunkContext& context, int64_t group_first, int lane) {
  const core::DitherKey key = context.prepared.dither;
  const uint64_t index = static_cast<uint64_t>(context.tensor.first_element + group_first);
  return {key, core::dither_group_hash<F>(key, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)), lane};
}

/// One unit by core's formulas: any values, any alignment, short groups.
template <class Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void exact_unit(const ChunkContext& context, const Types& types, bool aligned, int64_t group, int lane,
                                           bool active) {
  const TensorEntry& t = context.tensor;
  Unit unit = locate_unit(t, group, lane);
  if (!active) unit.valid = 0;
  const bool vector = aligned && unit.valid == kUnit && unit.first % kUnit == 0;

  // One branch around all loads and one around all stores: they are then in flight together.
  StoredUnit<kCodec> stored;
  if (vector) {
    load_stored<Rule, kCodec>(t, types, unit, true, stored);
  } else {
    load_stored<Rule, kCodec>(t, types, unit, false, stored);
  }
  load_headers<Rule, kCodec>(t, group, active, stored.states);

  F w[kUnit], g[kUnit], delta[kUnit];
  States s;
  scaled_gradients(context, types, stored.gradient, unit.valid, g);
  merge_weights(types, stored.weights, w);
  Codec<Rule, kCodec>::decode(stored.states, s);
  const typename Rule::Hyper& hyper = reinterpret_cast<const typename Rule::Hyper&>(context.prepared.rule);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) delta[i] = Rule::update(w[i], g[i], s[i], hyper);
  const DitherSource dither = dither_source(context, unit.group_first, lane);
  update_weights(types, w, delta, dither, stored.weights);
  Codec<Rule, kCodec>::encode(s, dither, stored.states);

  // Read the pointers again rather than keep them.
  asm volatile("" ::: "memory");
  if (vector) {
    store_stored<Rule, kCodec>(t, types, unit, true, stored);
  } else {
    store_stored<Rule, kCodec>(t, types, unit, false, stored);
  }
  store_headers<Rule, kCodec>(t, group, active && lane == 0, stored.states);
}

/// Whether there is a hot path for a configuration.
template <class Rule, StateCodec kCodec, class Types>
inline constexpr bool kIsHot = Types::kFixed && kCodec == StateCodec::kDefault && Rule::kStateCount > 0;

/// The unit by the hot path. False, and nothing changed, where it does not hold for these values; a warp agrees.
template <class Rule, class Types>
__device__ __forceinline__ bool hot_unit(const ChunkContext& context, const Types& types, int64_t group, int lane) {
  constexpr StateCodec kCodec = StateCodec::kDefault;
  using Narrow = std::conditional_t<Types::parameter() == DType::kBFloat16, core::BFloat16, core::Float16>;
  const TensorEntry& t = context.tensor;
  const Unit unit{group * kGroupSize, group * kGroupSize + lane, kUnit};
  StoredUnit<kCodec> stored;
  load_stored<Rule, kCodec>(t, types, unit, true, stored);
  load_headers<Rule, kCodec>(t, group, true, stored.states);
  F g[kUnit];
  widen(types.gradient(), stored.gradient, g);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) g[i] = g[i] * core::splat<F>(context.prepared.gradient_scale);
  const typename Rule::Hyper& hyper = reinterpret_cast<const typename Rule::Hyper&>(context.prepared.rule);
  const DitherSource dither = dither_source(context, unit.group_first, lane);
  if (!step_fast<Rule, Narrow, correction_bits(Types::master())>(g, hyper, dither, stored.weights, stored.states)) return false;
  asm volatile("" ::: "memory");
  store_stored<Rule, kCodec>(t, types, unit, true, stored);
  store_headers<Rule, kCodec>(t, group, lane == 0, stored.states);
  return true;
}

/// The way out of the hot path: a function of its own, so that its registers are not the hot path's.
template <class Rule, StateCodec kCodec, class Types>
__device__ __noinline__ void exact_unit_apart(const ChunkContext& context, bool aligned, int64_t group, int lane, bool active) {
  exact_unit<Rule, kCodec>(context, Types(context.tensor), aligned, group, lane, active);
}

/// Copies a struct to shared memory, a word per thread.
template <class T>
__device__ __forceinline__ void copy_to_shared(T* to, const T* from, int first_thread) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) / 4 <= 32);
  const int i = static_cast<int>(threadIdx.x) - first_thread;
  if (i >= 0 && i < static_cast<int>(sizeof(T) / 4)) {
    reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
}

template <class Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void step_chunk(const StepArguments& args) {
  __shared__ ChunkContext context;
  const Chunk chunk = args.chunks[blockIdx.x];
  const TensorEntry* entry = args.tensors + chunk.tensor;
  const PreparedHyper* prepared = (args.hypers != nullptr ? args.hypers : args.inline_hypers) + entry->hyper_index;
  copy_to_shared(&context.tensor, entry, 0);
  copy_to_shared(&context.prepared, prepared, 32);
  if (threadIdx.x == 64) context.nonfinite = args.nonfinite;
  __syncthreads();
  if (context.tensor.gradient == nullptr || context.prepared.skip) return;
  const Types types(context.tensor);
  const bool aligned =
      (context.tensor.flags & kVectorAligned) && (reinterpret_cast<uintptr_t>(context.tensor.gradient) & 15u) == 0;
  const int lane = static_cast<int>(threadIdx.x % kThreadsPerGroup) * kUnit;
  // Groups before this one are full and lie at 32 times their number.
  int full = chunk.groups;
  if constexpr (kIsHot<Rule, kCodec, Types>) {
    const int64_t all_full = context.tensor.numel / kGroupSize - chunk.first_group;
    if (all_full < full) full = static_cast<int>(all_full);
    if (!aligned || (context.tensor.flags & kShortRows)) full = 0;
  }
#pragma unroll 1
  for (int tile = 0; tile < chunk.groups; tile += kTileGroups) {
    const int local = tile + static_cast<int>(threadIdx.x / kThreadsPerGroup);
    const int64_t group = chunk.first_group + local;
    if constexpr (kIsHot<Rule, kCodec, Types>) {
      if (__all_sync(0xffffffffu, local < full) && hot_unit<Rule>(context, types, group, lane)) continue;
      exact_unit_apart<Rule, kCodec, Types>(context, aligned, group, lane, local < chunk.groups);
    } else {
      exact_unit<Rule, kCodec>(context, types, aligned, group, lane, local < chunk.groups);
    }
  }
}

template <class Rule, StateCodec kCodec, class Types>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) step_kernel(const __grid_constant__ StepArguments args) {
  step_chunk<Rule, kCodec, Types>(args);
}

template <class Rule, StateCodec kCodec, class Types = AnyTypes>
int launch_step(const StepArguments& args, unsigned int blocks, void* stream) {
  step_kernel<Rule, kCodec, Types><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

/// A rule's launches. A rule without states has no codec: one kernel serves all three.
template <class Rule>
StepLaunches make_step_launches() {
  StepLaunches out{};
  out.codec[static_cast<int>(StateCodec::kFloat32)] = launch_step<Rule, StateCodec::kFloat32>;
  if constexpr (Rule::kStateCount > 0) {
    using BFloat16Correction8 = FixedTypes<DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8>;
    out.codec[static_cast<int>(StateCodec::kPaper)] = launch_step<Rule, StateCodec::kPaper>;
    out.codec[static_cast<int>(StateCodec::kDefault)] = launch_step<Rule, StateCodec::kDefault>;
    out.hot[kHotBFloat16Correction8] = launch_step<Rule, StateCodec::kDefault, BFloat16Correction8>;
  } else {
    out.codec[static_cast<int>(StateCodec::kPaper)] = out.codec[static_cast<int>(StateCodec::kFloat32)];
    out.codec[static_cast<int>(StateCodec::kDefault)] = out.codec[static_cast<int>(StateCodec::kFloat32)];
  }
  return out;
}

}  // namespace flashoptim::cuda
