// The step kernel: one launch updates any number of tensors. A block works on a chunk, a run of groups of one tensor;
// four threads hold a group, 8 elements each.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "src/cuda/arguments.h"
#include "src/cuda/hot_unit-inl.cuh"
#include "src/cuda/states-inl.cuh"
#include "src/cuda/weights-inl.cuh"

namespace flashoptim::cuda {

/// Where a thread's unit lies in its tensor, and for the dither in the whole.
struct Unit {
  int64_t whole_first;  ///< first element of the group, in the whole
  int64_t first;        ///< first element of the unit
  int valid;            ///< elements of it that exist, 0 ... 8
  int lane;             ///< of its first element in the group
};

/// Elements of a unit of which `left` are left in its group.
__device__ __forceinline__ int valid_of(int64_t left) {
  return left <= 0 ? 0 : left >= kUnit ? kUnit : static_cast<int>(left);
}

/// *quotient = a / b, returns the rest: mostly both have 32 bits.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, int64_t* quotient) {
  if (((a | b) >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    *quotient = q;
    return static_cast<uint32_t>(a) - q * static_cast<uint32_t>(b);
  }
  *quotient = a / b;
  return a - *quotient * b;
}

/// `lane` counts from the piece's first element: no two elements of a piece that is no whole group depend on each
/// other.
__device__ __forceinline__ Unit locate_in_piece(const core::PlacedGroups& pieces, int64_t group, int lane) {
  int64_t run;
  const int64_t in_run = divide(group, pieces.groups_per_run, &run);
  const core::GroupPiece piece = pieces.piece(run, in_run);
  return {piece.whole_first, piece.first + lane, valid_of(piece.count - lane), piece.lane + lane};
}

__device__ __forceinline__ Unit locate_unit(const TensorEntry& t, int64_t group, int lane) {
  int64_t group_first, left;
  if (t.flags & (kShortRows | kInPieces)) {
    if (t.flags & kInPieces) return locate_in_piece(*t.pieces, group, lane);
    int64_t row;
    const int64_t column = divide(group, t.groups_per_row, &row);
    group_first = row * t.row_size + column * kGroupSize;
    left = t.row_size - column * kGroupSize;
  } else {
    group_first = group * kGroupSize;
    left = t.numel - group_first;
  }
  return {t.first_element + group_first, group_first + lane, valid_of(left - lane), lane};
}

/// Elements with NaN or infinite gradients.
__device__ __forceinline__ int count_nonfinite(const F (&g)[kUnit], int valid) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) count += (i < valid) && !(core::equals(g[i] - g[i], core::splat<F>(0.0f)));
  return count;
}

/// What the units of a tensor share.
struct TensorContext {
  const TensorEntry& tensor;
  const PreparedHyper& prepared;
  unsigned long long* nonfinite;
};

/// Everything a thread holds of its unit in stored form.
template <core::Rule Rule, StateCodec kCodec>
struct StoredUnit {
  StoredWeights weights;
  Words<4> gradient;
  StoredStates<Rule, kCodec> states;
};

template <core::Rule Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void load_stored(const TensorEntry& t, const Types& types, const Unit& unit, bool vector,
                                            StoredUnit<Rule, kCodec>& out) {
  constexpr int kBytes = kStateBytes<kCodec>;
  load_weights(t, types, unit.first, unit.valid, vector, out.weights);
  load_2_or_4(t.gradient, unit.first, types.gradient() == DType::kFloat32, unit.valid, vector, out.gradient);
#pragma unroll
  for (int k = 0; k < Rule::kSlotCount; ++k) {
    out.states.words[k] =
        load_unit<kBytes>(static_cast<const unsigned char*>(t.states[k]) + unit.first * kBytes, unit.valid, vector);
  }
}

template <core::Rule Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void store_stored(const TensorEntry& t, const Types& types, const Unit& unit, bool vector,
                                             const StoredUnit<Rule, kCodec>& in) {
  constexpr int kBytes = kStateBytes<kCodec>;
  store_weights(t, types, unit.first, unit.valid, vector, in.weights);
#pragma unroll
  for (int k = 0; k < Rule::kSlotCount; ++k) {
    store_unit<kBytes>(static_cast<unsigned char*>(t.states[k]) + unit.first * kBytes, in.states.words[k], unit.valid,
                       vector);
  }
}

template <core::Rule Rule, StateCodec kCodec>
__device__ __forceinline__ void load_headers(const TensorEntry& t, int64_t group, bool active,
                                             StoredStates<Rule, kCodec>& states) {
  if constexpr (kCodec != StateCodec::kFloat32) {
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) states.header[k] = active ? t.scales[k][group] : 0u;
  }
}
template <core::Rule Rule, StateCodec kCodec>
__device__ __forceinline__ void store_headers(const TensorEntry& t, int64_t group, bool writes,
                                              const StoredStates<Rule, kCodec>& states) {
  if constexpr (kCodec != StateCodec::kFloat32) {
    if (writes) {
#pragma unroll
      for (int k = 0; k < Rule::kSlotCount; ++k) t.scales[k][group] = static_cast<uint16_t>(states.header[k]);
    }
  }
}

/// fp32 gradients, scaled; the ones that are not finite are counted if someone wants to know.
template <class Types>
__device__ __forceinline__ void scaled_gradients(const TensorContext& context, const Types& types,
                                                 const Words<4>& words, int valid, F (&g)[kUnit]) {
  widen(types.gradient(), words, g);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) g[i] = g[i] * core::splat<F>(context.prepared.gradient_scale);
  if (context.nonfinite != nullptr) {
    const int count = count_nonfinite(g, valid);
    if (count != 0) atomicAdd(context.nonfinite, static_cast<unsigned long long>(count));
  }
}

__device__ __forceinline__ core::GroupDither group_dither(const TensorContext& context, const Unit& unit) {
  const core::DitherKey key = context.prepared.dither;
  const uint64_t index = static_cast<uint64_t>(unit.whole_first);
  return {key, core::dither_group_hash<F>(key, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)),
          unit.lane};
}

/// One unit by core's formulas: any values, any alignment, short groups.
template <core::Rule Rule, StateCodec kCodec, class Types>
__device__ __forceinline__ void exact_unit(const TensorContext& context, const Types& types, bool aligned,
                                           int64_t group, int lane, bool active) {
  const TensorEntry& t = context.tensor;
  Unit unit = locate_unit(t, group, lane);
  if (!active) unit.valid = 0;
  const bool vector = aligned && unit.valid == kUnit && unit.first % kUnit == 0;
  const core::GroupDither dither = group_dither(context, unit);  // here, for the group's index takes two registers

  // One branch around all loads and one around all stores: they are then in flight together.
  StoredUnit<Rule, kCodec> stored;
  if (vector) {
    load_stored<Rule, kCodec>(t, types, unit, true, stored);
  } else {
    load_stored<Rule, kCodec>(t, types, unit, false, stored);
  }
  load_headers<Rule, kCodec>(t, group, active, stored.states);

  F w[kUnit], g[kUnit], delta[kUnit];
  States<Rule> s;
  scaled_gradients(context, types, stored.gradient, unit.valid, g);
  merge_weights(types, stored.weights, w);
  Codec<Rule, kCodec>::decode(stored.states, s);
  const typename Rule::Hyper& hyper = reinterpret_cast<const typename Rule::Hyper&>(context.prepared.rule);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    ExactLane state[core::kSlotArray<Rule>];
    for (int k = 0; k < Rule::kSlotCount; ++k) state[k] = s[i][k];
    delta[i] = Rule::update(ExactLane(w[i]), ExactLane(g[i]), state, hyper).v;
    for (int k = 0; k < Rule::kSlotCount; ++k) s[i][k] = state[k].v;
  }
  update_weights(types, w, delta, dither, stored.weights);
  Codec<Rule, kCodec>::encode(s, QuadGroup(), dither, stored.states);

  // Read the pointers again rather than keep them.
  asm volatile("" ::: "memory");
  if (vector) {
    store_stored<Rule, kCodec>(t, types, unit, true, stored);
  } else {
    store_stored<Rule, kCodec>(t, types, unit, false, stored);
  }
  store_headers<Rule, kCodec>(t, group, active && lane == 0, stored.states);
}

/// Copies a struct to shared memory, a word per thread from the block's thread `kFirst` on.
template <int kFirst, class T>
__device__ __forceinline__ void copy_to_shared(T* to, const T* from) {
  static_assert(sizeof(T) % 4 == 0 && kFirst + sizeof(T) / 4 <= kThreads);
  const int thread = static_cast<int>(threadIdx.x) - kFirst;
  if (thread >= 0 && thread < static_cast<int>(sizeof(T) / 4)) {
    reinterpret_cast<uint32_t*>(to)[thread] = reinterpret_cast<const uint32_t*>(from)[thread];
  }
}

__device__ __forceinline__ bool all_aligned(const TensorEntry& t) {
  return (t.flags & kVectorAligned) && (reinterpret_cast<uintptr_t>(t.gradient) & 15u) == 0;
}

/// Any values: a block per chunk.
template <core::Rule Rule, StateCodec kCodec, class Types>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    step_kernel(const __grid_constant__ StepArguments args) {
  // In shared memory: registers are for the elements.
  __shared__ TensorEntry tensor;
  __shared__ PreparedHyper prepared;
  const Chunk chunk = args.chunks[blockIdx.x];
  const TensorEntry& entry = entry_of(args, chunk.tensor);
  copy_to_shared<0>(&tensor, &entry);
  copy_to_shared<64>(&prepared, hyper_of(args, entry));
  __syncthreads();
  if (tensor.gradient == nullptr || prepared.skip) return;
  const TensorContext context{tensor, prepared, args.nonfinite};
  const Types types(tensor);
  const bool aligned = all_aligned(tensor);
  const int lane = static_cast<int>(threadIdx.x % kThreadsPerGroup) * kUnit;
#pragma unroll 1
  for (int tile = 0; tile < chunk.groups; tile += kThreads / kThreadsPerGroup) {
    const int local = tile + static_cast<int>(threadIdx.x / kThreadsPerGroup);
    exact_unit<Rule, kCodec>(context, types, aligned, chunk.first_group + local, lane, local < chunk.groups);
  }
}

/// The way out of the hot path, for `count` groups of a warp: a function of its own, so that its registers are not the
/// hot path's.
template <core::Rule Rule, class Format>
__device__ __noinline__ void exact_units_apart(const TensorEntry& tensor, const PreparedHyper& prepared,
                                               unsigned long long* nonfinite, int64_t first_group, int count) {
  const TensorContext context{tensor, prepared, nonfinite};
  const KnownTypes<Format::kParameter, Format::kGradient, Format::kMaster> types(tensor);
  const bool aligned = all_aligned(tensor);
  const int thread = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
  for (int done = 0; done < count; done += 32 / kThreadsPerGroup) {
    const int local = done + thread / kThreadsPerGroup;
    exact_unit<Rule, Format::kCodec>(context, types, aligned, first_group + local, thread % kThreadsPerGroup * kUnit,
                                     local < count);
  }
}

/// Whether a device's memory is so fast that core's formulas do not keep up with it: A100, H100 and H200, B200.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || (__CUDA_ARCH__ / 100 == 10))
inline constexpr bool kHasFastMemory = true;
#else
inline constexpr bool kHasFastMemory = false;
#endif

/// A chunk from a tile's first group on.
__device__ __forceinline__ HotChunk chunk_of(const HotChunk* chunks, uint32_t tile) {
  HotChunk chunk = chunks[tile / kWarpTilesPerChunk];
  const uint32_t offset = tile % kWarpTilesPerChunk * kWarpGroups;
  chunk.first += offset;
  chunk.groups -= static_cast<int32_t>(offset);
  return chunk;
}

template <core::Rule Rule, class Format>
__device__ __forceinline__ void exact_tile(const StepArguments& args, const HotChunk& tile,
                                           const PreparedHyper& prepared) {
  const int64_t first_group = (static_cast<int64_t>(tile.segment) << kSegmentBits) + tile.first;
  exact_units_apart<Rule, Format>(entry_of(args, tile.tensor), prepared, args.nonfinite, first_group,
                                  tile.groups < kWarpGroups ? tile.groups : kWarpGroups);
}

/// hot_kernel() by core's formulas alone.
template <core::Rule Rule, class Format>
__device__ __forceinline__ void exact_tiles(const StepArguments& args) {
  constexpr uint32_t kWarps = kHotThreads / 32;
#pragma unroll 1
  for (uint32_t i = blockIdx.x * kWarps + threadIdx.x / 32; i < args.tile_count; i += gridDim.x * kWarps) {
    const HotChunk tile = chunk_of(reinterpret_cast<const HotChunk*>(args.chunks), i);
    const TensorEntry& entry = entry_of(args, tile.tensor);
    const PreparedHyper& prepared = *hyper_of(args, entry);
    if (entry.gradient != nullptr && !prepared.skip && tile.groups > 0) exact_tile<Rule, Format>(args, tile, prepared);
  }
}

/// What a block of hot_tiles() shares.
template <core::Rule Rule, class Format>
struct HotShared {
  static constexpr int kWarps = kHotThreads / 32;
  HotContext<Rule, Format> contexts[kWarps][2];
  HotStage<Rule, Format> stages[kWarps][2];
  HotTables<Rule, Format> tables;
};
/// What a block may have without asking for more: a rule of many slots in wide types has no hot way.
inline constexpr size_t kMostShared = 48 * 1024;

/// A format of kHotFormats. Every warp works on its own and takes tiles of 16 groups, first its own, every n-th, then
/// as they come, so that all warps together sweep through memory.
template <core::Rule Rule, class Format>
__device__ __forceinline__ void hot_tiles(const StepArguments& args) {
  constexpr uint32_t kWarps = kHotThreads / 32;
  __shared__ HotShared<Rule, Format> shared;
  auto& contexts = shared.contexts;
  auto& stages = shared.stages;
  auto& tables = shared.tables;
  tables.fill();
  const int thread = static_cast<int>(threadIdx.x % 32);
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t warps = gridDim.x * kWarps;
  const uint32_t tiles = args.tile_count;
  const HotChunk* chunks = reinterpret_cast<const HotChunk*>(args.chunks);
  const uint32_t fixed = warps * args.fixed_rounds;
  uint32_t own = blockIdx.x * kWarps + warp;
  // The number of the next tile: thread 0's.
  const auto take = [&args, &own, fixed, thread, warps] {
    own += warps;
    if (own < fixed) return own;
    return thread == 0 ? fixed + atomicAdd(&args.work->taken, 1u) : 0u;
  };

  // One tile is computed while the next one's memory is on its way and the number of the one after is fetched. (Looking
  // further ahead costs 1 %: the later the numbers are given out, the closer together the warps stay in memory.)
  HotChunk tile{};
  bool exists = own < tiles;
  if (exists) tile = chunk_of(chunks, own);
  uint32_t taken = take();
  int slot = 0, stage = 0;
  bool zeros = false;  // the tile before had some: the next one probably has, too
  HotHeaders<Rule> next_headers;
  if (exists) {
    contexts[warp][0].open(args, tile.tensor, tile.segment, thread);
    if (contexts[warp][0].takes(tile.first, tile.groups))
      next_headers = stages[warp][0].fetch(contexts[warp][0], tile.first, thread);
  }
  commit_copies();
#pragma unroll 1
  while (exists) {
    const HotContext<Rule, Format>& context = contexts[warp][slot];
    const HotHeaders<Rule> headers = next_headers;
    const uint32_t number = __shfl_sync(0xffffffffu, taken, 0);
    const bool next_exists = number < tiles;
    HotChunk next{};
    int next_slot = slot;
    if (next_exists) {
      next = chunk_of(chunks, number);
      taken = take();
      if (next.tensor != tile.tensor || next.segment != tile.segment) {
        next_slot = slot ^ 1;
        contexts[warp][next_slot].open(args, next.tensor, next.segment, thread);
      }
      if (contexts[warp][next_slot].takes(next.first, next.groups)) {
        next_headers = stages[warp][stage ^ 1].fetch(contexts[warp][next_slot], next.first, thread);
      }
    }
    commit_copies();
    wait_for_copies();
    __syncwarp();  // every thread's copies have come
    HotResult result = kHotFailed;
    if (context.takes(tile.first, tile.groups)) {
      if (!zeros) {
        if (Format::kHasWayForScale1 && context.prepared.gradient_scale == 1.0f) {
          result = hot_unit<Rule, Format, false, !Format::kHasWayForScale1>(tables, context, stages[warp][stage],
                                                                            headers, tile.first, thread);
        } else {
          result = hot_unit<Rule, Format, false>(tables, context, stages[warp][stage], headers, tile.first, thread);
        }
      }
      if constexpr (Rule::kDecoupledDecay) {
        if (result == kHotFailed)
          result = untouched_unit(tables, context, stages[warp][stage], headers, tile.first, thread);
      }
      if (result == kHotFailed) {
        result = hot_unit<Rule, Format, true>(tables, context, stages[warp][stage], headers, tile.first, thread);
        zeros = result == kHotWithZeros;
      }
    }
    if (result == kHotFailed) {
      if (context.active && tile.groups > 0) exact_tile<Rule, Format>(args, tile, context.prepared);
    }
    tile = next;
    slot = next_slot;
    stage ^= 1;
    exists = next_exists;
  }
  // The last warp leaves the counters as it found them.
  if (thread == 0 && atomicAdd(&args.work->finished, 1u) + 1u == warps) *args.work = WorkCounter{0u, 0u};
}

template <core::Rule Rule, class Format>
__global__ void __launch_bounds__(kHotThreads, kHotBlocksPerMultiprocessor)
    hot_kernel(const __grid_constant__ StepArguments args) {
  constexpr bool kFits = sizeof(HotShared<Rule, Format>) <= kMostShared;
  if constexpr (kFits && (Format::kIsEverywhere || kHasFastMemory)) {
    hot_tiles<Rule, Format>(args);
  } else {
    exact_tiles<Rule, Format>(args);
  }
}

/// Loads a kernel, as its first launch would where modules are loaded lazily: memory may run out there, too.
template <class Kernel>
int load_kernel(Kernel kernel) {
  cudaFuncAttributes attributes;
  return static_cast<int>(cudaFuncGetAttributes(&attributes, kernel));
}

template <core::Rule Rule, StateCodec kCodec, class Types = AnyTypes>
int launch_step(const StepArguments& args, void* stream) {
  if (args.chunk_count == 0) return load_kernel(step_kernel<Rule, kCodec, Types>);
  step_kernel<Rule, kCodec, Types><<<args.chunk_count, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

template <core::Rule Rule, class Format>
int launch_hot(const StepArguments& args, void* stream) {
  if (args.chunk_count == 0) return load_kernel(hot_kernel<Rule, Format>);
  // As many blocks as fit the device at a time.
  constexpr uint32_t kWarps = kHotThreads / 32;
  const uint32_t tiles = args.tile_count;
  const uint32_t grid = std::min((tiles + kWarps - 1) / kWarps, args.multiprocessors * kHotBlocksPerMultiprocessor);
  const uint32_t rounds = tiles / (grid * kWarps);
  StepArguments launched = args;
  launched.fixed_rounds = std::max(1u, rounds * kFixedPercent / 100u);
  hot_kernel<Rule, Format><<<grid, kHotThreads, 0, static_cast<cudaStream_t>(stream)>>>(launched);
  return static_cast<int>(cudaGetLastError());
}

template <core::Rule Rule, int... i>
void set_hot_launches(StepLaunch* kernels, std::integer_sequence<int, i...>) {
  ((kernels[i] = launch_hot<Rule, HotFormatAt<i>>), ...);
}

/// A rule's launches. A rule without states has no codec: one kernel serves all three.
template <core::Rule Rule>
StepLaunches make_step_launches() {
  StepLaunches out{};
  StepLaunch* const any = out.kernel + kAnyTypes;
  any[static_cast<int>(StateCodec::kFloat32)] = launch_step<Rule, StateCodec::kFloat32>;
  if constexpr (Rule::kSlotCount > 0) {
    any[static_cast<int>(StateCodec::kPaper)] = launch_step<Rule, StateCodec::kPaper>;
    any[static_cast<int>(StateCodec::kDefault)] = launch_step<Rule, StateCodec::kDefault>;
    set_hot_launches<Rule>(out.kernel, std::make_integer_sequence<int, kHotFormatCount>{});
    out.kernel[kShortGroups] = launch_step<Rule, StateCodec::kDefault,
                                           KnownTypes<DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8>>;
  } else {
    any[static_cast<int>(StateCodec::kPaper)] = any[static_cast<int>(StateCodec::kFloat32)];
    any[static_cast<int>(StateCodec::kDefault)] = any[static_cast<int>(StateCodec::kFloat32)];
  }
  return out;
}

}  // namespace flashoptim::cuda
