// The dry run of Plan::inspect: one launch over all tensors, a block per chunk, four threads a group as in the step
// kernels. Everything that is counted is core/inspect.h's.
#include "flashoptim/core/inspect.h"

#include "src/cuda/step-inl.cuh"

namespace flashoptim::cuda {
namespace {

/// A thread's unit as the patterns that core reads.
template <core::Rule Rule, StateCodec kCodec>
__device__ __forceinline__ void unpack(const AnyTypes& types, const StoredUnit<Rule, kCodec>& stored, int valid,
                                       core::StoredElements<kUnit>& e) {
  constexpr int kBytes = kStateBytes<kCodec>;
  const bool wide_parameter = types.parameter() == DType::kFloat32, wide_gradient = types.gradient() == DType::kFloat32;
  const bool short_correction = core::correction_bits(types.master()) == 8;
  e.valid = valid;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const auto pattern = [i](const Words<4>& words, bool wide) {
      return wide ? words.w[i] : element(first_words<2>(words), i);
    };
    e.parameter[i] = pattern(stored.weights.parameter, wide_parameter);
    e.gradient[i] = pattern(stored.gradient, wide_gradient);
    e.correction[i] = 0u;
    if (core::has_correction(types.master())) {
      e.correction[i] = short_correction ? signed_element(first_words<1>(stored.weights.correction), i)
                                         : signed_element(stored.weights.correction, i);
    }
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) e.states.codes[k][i] = element(stored.states.words[k], i);
  }
  if constexpr (kBytes == 1) {
#pragma unroll
    for (int k = 0; k < Rule::kSlotCount; ++k) e.states.header[k] = stored.states.header[k];
  }
}

template <core::Rule Rule, StateCodec kCodec>
__device__ __forceinline__ void inspect_unit(const TensorEntry& t, const PreparedHyper& prepared, float largest_update,
                                             int64_t group, int lane, bool active, core::Inspection& out) {
  const AnyTypes types(t);
  Unit unit = locate_unit(t, active ? group : 0, lane);
  if (!active) unit.valid = 0;
  const bool vector = all_aligned(t) && unit.valid == kUnit && unit.first % kUnit == 0;
  StoredUnit<Rule, kCodec> stored;
  load_stored<Rule, kCodec>(t, types, unit, vector, stored);
  load_headers<Rule, kCodec>(t, group, active, stored.states);
  core::StoredElements<kUnit> elements;
  unpack<Rule, kCodec>(types, stored, unit.valid, elements);
  const uint64_t index = static_cast<uint64_t>(unit.whole_first);
  const uint32_t hash =
      core::dither_group_hash<float>(prepared.dither, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32));
  const typename Rule::Hyper& hyper = reinterpret_cast<const typename Rule::Hyper&>(prepared.rule);
  core::inspect_elements<Rule, kCodec>({types.parameter(), types.gradient(), types.master()}, elements,
                                       core::InspectedStep<Rule>{hyper, prepared.gradient_scale, largest_update},
                                       core::GroupDither{prepared.dither, hash, unit.lane}, QuadGroup(), out);
}

/// Adds the threads' findings to the tensor's: integers and a maximum, so that their order does not matter.
__device__ void add_block(const core::Inspection& found, StepTelemetry* out) {
  __shared__ unsigned int counts[5];
  __shared__ int ratio;
  if (threadIdx.x < 5) counts[threadIdx.x] = 0u;
  if (threadIdx.x == 5) ratio = 0;
  __syncthreads();
  const unsigned int own[5] = {found.examined, found.nonfinite_gradients, found.lost_updates, found.floored_codes,
                               found.saturated_codes};
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    if (own[k] != 0u) atomicAdd(&counts[k], own[k]);
  }
  // Floats of one sign order as their patterns.
  if (found.largest_update_ratio > 0.0f) atomicMax(&ratio, static_cast<int>(core::to_bits(found.largest_update_ratio)));
  __syncthreads();
  int64_t* const totals[5] = {&out->examined, &out->nonfinite_gradients, &out->lost_updates, &out->floored_codes,
                              &out->saturated_codes};
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    if (threadIdx.x == static_cast<unsigned int>(k) && counts[k] != 0u) {
      atomicAdd(reinterpret_cast<unsigned long long*>(totals[k]), static_cast<unsigned long long>(counts[k]));
    }
  }
  if (threadIdx.x == 5 && ratio != 0) atomicMax(reinterpret_cast<int*>(&out->largest_update_ratio), ratio);
}

template <core::Rule Rule>
__global__ void __launch_bounds__(kThreads) inspect_kernel(const __grid_constant__ InspectArguments args) {
  __shared__ TensorEntry tensor;
  __shared__ PreparedHyper prepared;
  const Chunk chunk = args.chunks[blockIdx.x];
  const TensorEntry* entry = args.tensors + chunk.tensor;
  copy_to_shared<0>(&tensor, entry);
  copy_to_shared<64>(&prepared, args.hypers + entry->hyper_index);
  __syncthreads();
  if (tensor.gradient == nullptr || prepared.skip) return;
  // Which groups are looked at is counted in the whole: what shards find adds up to what the whole finds.
  const int64_t chosen = core::first_inspected_group(prepared.dither, chunk.tensor, args.stride);
  const bool in_pieces = (tensor.flags & kInPieces) != 0;
  const int64_t skipped =
      in_pieces ? 0 : core::groups_to_inspected(chosen, chunk.first_group + tensor.first_group, args.stride);
  if (skipped >= chunk.groups) return;
  const int64_t step = in_pieces ? 1 : args.stride;
  const int count = static_cast<int>((chunk.groups - skipped - 1) / step + 1);
  const float largest_update = args.largest_updates[tensor.hyper_index];
  const int lane = static_cast<int>(threadIdx.x % kThreadsPerGroup) * kUnit;
  core::Inspection found;
#pragma unroll 1
  for (int tile = 0; tile < count; tile += kThreads / kThreadsPerGroup) {
    const int local = tile + static_cast<int>(threadIdx.x / kThreadsPerGroup);
    bool active = local < count;
    const int64_t group = chunk.first_group + skipped + local * step;
    if (in_pieces) {
      const core::PlacedGroups& pieces = *tensor.pieces;
      const int64_t whole_first = locate_unit(tensor, active ? group : 0, 0).whole_first;
      active = active && core::groups_to_inspected(chosen, pieces.group_of(whole_first), args.stride) == 0;
      if (!__any_sync(0xffffffffu, active)) continue;
    }
    if constexpr (Rule::kSlotCount > 0) {
      if (tensor.flags & kPaperStates) {
        inspect_unit<Rule, StateCodec::kPaper>(tensor, prepared, largest_update, group, lane, active, found);
        continue;
      }
      if (tensor.flags & kDefaultStates) {
        inspect_unit<Rule, StateCodec::kDefault>(tensor, prepared, largest_update, group, lane, active, found);
        continue;
      }
    }
    inspect_unit<Rule, StateCodec::kFloat32>(tensor, prepared, largest_update, group, lane, active, found);
  }
  add_block(found, args.telemetry + chunk.tensor);
}

}  // namespace

int launch_inspect(RuleKind rule, const InspectArguments& args, void* stream) {
  switch (rule) {
#define FLASHOPTIM_CASE(name)                                                                               \
  case RuleKind::k##name:                                                                                   \
    inspect_kernel<core::name><<<args.chunk_count, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args); \
    break;
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
    case RuleKind::kCount:
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace flashoptim::cuda
