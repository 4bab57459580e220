// The element-wise conversions on the device: weights to and from fp32, states to and from fp32, with the formulas and
// so the bits of the CPU's (src/plan.cpp). One launch each; what is 16 bytes aligned is moved in words of that size.
#include <cuda_runtime.h>

#include <algorithm>

#include "src/cuda/arguments.h"
#include "src/cuda/step-inl.cuh"

namespace flashoptim::cuda {
namespace {

template <class Narrow, MasterWeights kMaster>
__device__ __forceinline__ void split_narrow(const F (&w)[kUnit], StoredWeights& out) {
  uint32_t narrow[kUnit], correction[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if constexpr (has_correction(kMaster)) {
      const auto parts = core::split<Narrow, correction_bits(kMaster), F>(w[i]);
      narrow[i] = parts.narrow;
      correction[i] = parts.correction;
    } else {
      narrow[i] = Narrow::template round<F>(w[i]);
    }
  }
  set_first_words(out.parameter, pack<2>(narrow));
  if constexpr (has_correction(kMaster))
    set_first_words(out.correction, pack<correction_bits(kMaster) / 8>(correction));
}

template <class Narrow>
__device__ __forceinline__ void split_narrow(MasterWeights master, const F (&w)[kUnit], StoredWeights& out) {
  if (!has_correction(master)) {
    split_narrow<Narrow, MasterWeights::kNone>(w, out);
  } else if (correction_bits(master) == 8) {
    split_narrow<Narrow, MasterWeights::kCorrection8>(w, out);
  } else {
    split_narrow<Narrow, MasterWeights::kCorrection16>(w, out);
  }
}

/// A thread's units of 8 elements.
template <class Body>
__device__ __forceinline__ void for_each_unit(const ConvertArguments& args, Body body) {
  const bool aligned = (args.tensor.flags & kVectorAligned) != 0;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kUnit; first < args.tensor.numel;
       first += threads * kUnit) {
    const int64_t left = args.tensor.numel - first;
    body(first, left < kUnit ? static_cast<int>(left) : kUnit, aligned && left >= kUnit);
  }
}

__device__ __forceinline__ unsigned char* bytes_of(float* values) { return reinterpret_cast<unsigned char*>(values); }

__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ ConvertArguments args) {
  const AnyTypes types(args.tensor);
  for_each_unit(args, [&](int64_t first, int valid, bool vector) {
    StoredWeights stored{};
    load_weights(args.tensor, types, first, valid, vector, stored);
    F w[kUnit];
    merge_weights(types, stored, w);
    Words<4> out;
    for (int i = 0; i < kUnit; ++i) out.w[i] = core::to_bits(w[i]);
    store_unit<4>(bytes_of(args.values[0]) + first * 4, out, valid, vector);
  });
}

__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ ConvertArguments args) {
  const AnyTypes types(args.tensor);
  for_each_unit(args, [&](int64_t first, int valid, bool vector) {
    const Words<4> in = load_unit<4>(bytes_of(args.values[0]) + first * 4, valid, vector);
    F w[kUnit];
    for (int i = 0; i < kUnit; ++i) w[i] = core::from_bits(in.w[i]);
    StoredWeights stored{};
    if (types.parameter() == DType::kFloat32) {
      for (int i = 0; i < kUnit; ++i) stored.parameter.w[i] = core::to_bits(core::canonical_nan(w[i]));
    } else if (types.parameter() == DType::kBFloat16) {
      split_narrow<core::BFloat16>(types.master(), w, stored);
    } else {
      split_narrow<core::Float16>(types.master(), w, stored);
    }
    store_weights(args.tensor, types, first, valid, vector, stored);
  });
}

/// Four threads hold a group. kEncode: values to codes, else codes to values.
template <core::Rule Rule, StateCodec kCodec, bool kEncode>
__global__ void __launch_bounds__(kThreads) states_kernel(const __grid_constant__ ConvertArguments args) {
  constexpr int kBytes = kStateBytes<kCodec>;
  const TensorEntry& t = args.tensor;
  const int lane = static_cast<int>(threadIdx.x % kThreadsPerGroup) * kUnit;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kThreadsPerGroup);
  // Whole warps stay in the loop: reductions over a group take them all.
  const int64_t groups = (args.groups + 7) / 8 * 8;
  for (int64_t group =
           static_cast<int64_t>(blockIdx.x) * (kThreads / kThreadsPerGroup) + threadIdx.x / kThreadsPerGroup;
       group < groups; group += stride) {
    const bool active = group < args.groups;
    Unit unit = locate_unit(t, active ? group : 0, lane);
    if (!active) unit.valid = 0;
    const bool vector = (t.flags & kVectorAligned) && unit.valid == kUnit && unit.first % kUnit == 0;
    StoredStates<Rule, kCodec> stored{};
    States<Rule> s = {};
    if constexpr (kEncode) {
#pragma unroll
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        const Words<4> in = load_unit<4>(bytes_of(args.values[k]) + unit.first * 4, unit.valid, vector);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) s[i][k] = core::from_bits(in.w[i]);
      }
      Codec<Rule, kCodec>::encode(s, QuadGroup(), core::NearestDither(), stored);
#pragma unroll
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        store_unit<kBytes>(static_cast<unsigned char*>(t.states[k]) + unit.first * kBytes, stored.words[k], unit.valid,
                           vector);
      }
      store_headers<Rule, kCodec>(t, group, active && lane == 0, stored);
    } else {
#pragma unroll
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        stored.words[k] =
            load_unit<kBytes>(static_cast<const unsigned char*>(t.states[k]) + unit.first * kBytes, unit.valid, vector);
      }
      load_headers<Rule, kCodec>(t, group, active, stored);
      Codec<Rule, kCodec>::decode(stored, s);
#pragma unroll
      for (int k = 0; k < Rule::kSlotCount; ++k) {
        Words<4> out;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) out.w[i] = core::to_bits(s[i][k]);
        store_unit<4>(bytes_of(args.values[k]) + unit.first * 4, out, unit.valid, vector);
      }
    }
  }
}

/// Blocks for `units` threads' work, bounded: a thread takes several units of large tensors.
unsigned int blocks_for(int64_t units) {
  constexpr int64_t kMostBlocks = 1 << 16;
  return static_cast<unsigned int>(std::clamp<int64_t>((units + kThreads - 1) / kThreads, 1, kMostBlocks));
}

template <core::Rule Rule, StateCodec kCodec>
void launch_codec(const ConvertArguments& args, bool encode, unsigned int blocks, cudaStream_t stream) {
  if (encode) {
    states_kernel<Rule, kCodec, true><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    states_kernel<Rule, kCodec, false><<<blocks, kThreads, 0, stream>>>(args);
  }
}

template <core::Rule Rule>
void launch_rule(const ConvertArguments& args, bool encode, unsigned int blocks, cudaStream_t stream) {
  if constexpr (Rule::kSlotCount > 0) {
    switch (args.codec) {
      case StateCodec::kFloat32:
        return launch_codec<Rule, StateCodec::kFloat32>(args, encode, blocks, stream);
      case StateCodec::kPaper:
        return launch_codec<Rule, StateCodec::kPaper>(args, encode, blocks, stream);
      case StateCodec::kDefault:
        return launch_codec<Rule, StateCodec::kDefault>(args, encode, blocks, stream);
    }
  }
}

}  // namespace

int launch_convert(const ConvertArguments& args, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const unsigned int unit_blocks = blocks_for((args.tensor.numel + kUnit - 1) / kUnit);
  const unsigned int group_blocks = blocks_for(args.groups * kThreadsPerGroup);
  switch (args.conversion) {
    case Conversion::kMergeWeights:
      merge_kernel<<<unit_blocks, kThreads, 0, stream>>>(args);
      break;
    case Conversion::kSplitWeights:
      split_kernel<<<unit_blocks, kThreads, 0, stream>>>(args);
      break;
    case Conversion::kDecodeStates:
    case Conversion::kEncodeStates:
      switch (args.rule) {
#define FLASHOPTIM_CASE(name)                                                                          \
  case RuleKind::k##name:                                                                              \
    launch_rule<core::name>(args, args.conversion == Conversion::kEncodeStates, group_blocks, stream); \
    break;
        FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
        case RuleKind::kCount:
          break;
      }
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace flashoptim::cuda
