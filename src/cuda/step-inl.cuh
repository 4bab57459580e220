// The step kernel: one launch updates any number of tensors. A block works on a chunk, a run of groups of one tensor;
// four threads hold a group, 8 elements each.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/arguments.h"
#include "src/cuda/hot_unit-inl.cuh"
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

/// Copies a struct to shared memory, a word per thread.
template <class T>
__device__ __forceinline__ void copy_to_shared(T* to, const T* from, int first_thread) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) / 4 <= 32);
  const int i = static_cast<int>(threadIdx.x) - first_thread;
  if (i >= 0 && i < static_cast<int>(sizeof(T) / 4)) {
    reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
}

/// Loads what a chunk's units share; false where there is nothing to do. Every thread of the block calls it.
__device__ __forceinline__ bool open_chunk(const StepArguments& args, const Chunk& chunk, ChunkContext& context) {
  const TensorEntry* entry = args.tensors + chunk.tensor;
  const PreparedHyper* prepared = (args.hypers != nullptr ? args.hypers : args.inline_hypers) + entry->hyper_index;
  copy_to_shared(&context.tensor, entry, 0);
  copy_to_shared(&context.prepared, prepared, 32);
  if (threadIdx.x == 64) context.nonfinite = args.nonfinite;
  __syncthreads();
  return context.tensor.gradient != nullptr && !context.prepared.skip;
}

__device__ __forceinline__ bool all_aligned(const TensorEntry& t) {
  return (t.flags & kVectorAligned) && (reinterpret_cast<uintptr_t>(t.gradient) & 15u) == 0;
}

/// Any element types and master weights.
template <class Rule, StateCodec kCodec>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) step_kernel(const __grid_constant__ StepArguments args) {
  __shared__ ChunkContext context;
  const Chunk chunk = args.chunks[blockIdx.x];
  if (!open_chunk(args, chunk, context)) return;
  const AnyTypes types(context.tensor);
  const bool aligned = all_aligned(context.tensor);
  const int lane = static_cast<int>(threadIdx.x % kThreadsPerGroup) * kUnit;
#pragma unroll 1
  for (int tile = 0; tile < chunk.groups; tile += kThreads / kThreadsPerGroup) {
    const int local = tile + static_cast<int>(threadIdx.x / kThreadsPerGroup);
    exact_unit<Rule, kCodec>(context, types, aligned, chunk.first_group + local, lane, local < chunk.groups);
  }
}

/// The way out of the hot path for a warp's 16 groups: a function of its own, so that its registers are not the hot path's.
template <class Rule>
__device__ __noinline__ void exact_units_apart(const ChunkContext& context, int64_t first_group, int count) {
  const AnyTypes types(context.tensor);
  const bool aligned = all_aligned(context.tensor);
  const int thread = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
  for (int done = 0; done < 32 / kHotThreadsPerGroup; done += 32 / kThreadsPerGroup) {
    const int local = done + thread / kThreadsPerGroup;
    exact_unit<Rule, StateCodec::kDefault>(context, types, aligned, first_group + local, thread % kThreadsPerGroup * kUnit, local < count);
  }
}

__device__ __forceinline__ void open_hot(const TensorEntry& t, int64_t first_group, int correction_bytes, HotContext& hot) {
  const int64_t first = first_group * kGroupSize;
  hot.parameter = static_cast<unsigned char*>(t.parameter) + first * 2;
  hot.gradient = static_cast<const unsigned char*>(t.gradient) + first * 2;
  hot.correction = static_cast<unsigned char*>(t.correction) + first * correction_bytes;
  for (int k = 0; k < kMaxStates; ++k) {
    hot.states[k] = static_cast<unsigned char*>(t.states[k]) + first;
    hot.scales[k] = t.scales[k] + first_group;
  }
  hot.first_index = static_cast<uint64_t>(t.first_element + first);
}

/// 16-bit weights and gradients of one type, dithered corrections, default codec.
template <class Rule, class Narrow, int kBits>
__global__ void __launch_bounds__(kHotThreads, kHotBlocksPerMultiprocessor) hot_kernel(const __grid_constant__ StepArguments args) {
  __shared__ ChunkContext context;
  __shared__ HotContext hot;
  __shared__ HotStage<Rule, kBits> stages[2];
  const Chunk chunk = args.chunks[blockIdx.x];
  if (!open_chunk(args, chunk, context)) return;
  if (threadIdx.x == 0) open_hot(context.tensor, chunk.first_group, kBits / 8, hot);
  __syncthreads();
  // Groups before this one are full and lie at 32 times their number.
  int full = chunk.groups;
  const int64_t all_full = context.tensor.numel / kGroupSize - chunk.first_group;
  if (all_full < full) full = static_cast<int>(all_full);
  if (!all_aligned(context.tensor) || (context.tensor.flags & kShortRows)) full = 0;
  const int lane = static_cast<int>(threadIdx.x % kHotThreadsPerGroup) * kHotUnit;
  const HotDither phases(context.prepared.dither, lane);
  const int in_warp = static_cast<int>(threadIdx.x % 32) / kHotThreadsPerGroup;
  constexpr int kWarpGroups = 32 / kHotThreadsPerGroup;
  constexpr int kBlockGroups = kHotThreads / kHotThreadsPerGroup;
  int warp_first = static_cast<int>(threadIdx.x / 32) * kWarpGroups;
  int current = 0;
  HotHeaders next_headers;
  if (warp_first + kWarpGroups <= full) {
    stages[0].fetch(hot, warp_first + in_warp, lane);
    next_headers = fetch_headers<Rule>(hot, warp_first + in_warp);
  }
  commit_copies();
#pragma unroll 1
  for (; warp_first < chunk.groups; warp_first += kBlockGroups, current ^= 1) {
    const HotHeaders headers = next_headers;
    const int next = warp_first + kBlockGroups;
    if (next + kWarpGroups <= full) {
      stages[current ^ 1].fetch(hot, next + in_warp, lane);
      next_headers = fetch_headers<Rule>(hot, next + in_warp);
    }
    commit_copies();
    wait_for_copies();
    if (warp_first + kWarpGroups <= full &&
        hot_unit<Rule, Narrow, kBits>(hot, stages[current], headers, context.prepared, phases, warp_first + in_warp, lane)) {
      continue;
    }
    exact_units_apart<Rule>(context, chunk.first_group + warp_first, chunk.groups - warp_first);
  }
}

template <class Rule, StateCodec kCodec>
int launch_step(const StepArguments& args, unsigned int blocks, void* stream) {
  step_kernel<Rule, kCodec><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

template <class Rule, class Narrow, int kBits>
int launch_hot(const StepArguments& args, unsigned int blocks, void* stream) {
  hot_kernel<Rule, Narrow, kBits><<<blocks, kHotThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

/// A rule's launches. A rule without states has no codec: one kernel serves all three.
template <class Rule>
StepLaunches make_step_launches() {
  StepLaunches out{};
  out.codec[static_cast<int>(StateCodec::kFloat32)] = launch_step<Rule, StateCodec::kFloat32>;
  if constexpr (Rule::kStateCount > 0) {
    out.codec[static_cast<int>(StateCodec::kPaper)] = launch_step<Rule, StateCodec::kPaper>;
    out.codec[static_cast<int>(StateCodec::kDefault)] = launch_step<Rule, StateCodec::kDefault>;
    out.hot[kHotBFloat16Correction8] = launch_hot<Rule, core::BFloat16, 8>;
  } else {
    out.codec[static_cast<int>(StateCodec::kPaper)] = out.codec[static_cast<int>(StateCodec::kFloat32)];
    out.codec[static_cast<int>(StateCodec::kDefault)] = out.codec[static_cast<int>(StateCodec::kFloat32)];
  }
  return out;
}

}  // namespace flashoptim::cuda
