// Weights and gradients of one thread's 8 elements. Element types and the kind of master weights are read from the
// tensor's entry and branched on; all threads of a block agree.
#pragma once

#include "flashoptim/core/weight_split.h"
#include "src/cuda/arguments.h"
#include "src/cuda/states-inl.cuh"

namespace flashoptim::cuda {

/// Any element types.
struct AnyTypes {
  DType parameter_, gradient_;
  MasterWeights master_;
  __device__ explicit AnyTypes(const TensorEntry& t)
      : parameter_(static_cast<DType>(t.parameter_dtype)),
        gradient_(static_cast<DType>(t.gradient_dtype)),
        master_(static_cast<MasterWeights>(t.master_weights)) {}
  __device__ __forceinline__ DType parameter() const { return parameter_; }
  __device__ __forceinline__ DType gradient() const { return gradient_; }
  __device__ __forceinline__ MasterWeights master() const { return master_; }
};

/// Element types that are known when a kernel is compiled.
template <DType kParameter, DType kGradient, MasterWeights kMaster>
struct KnownTypes {
  __device__ explicit KnownTypes(const TensorEntry&) {}
  static __device__ __forceinline__ constexpr DType parameter() { return kParameter; }
  static __device__ __forceinline__ constexpr DType gradient() { return kGradient; }
  static __device__ __forceinline__ constexpr MasterWeights master() { return kMaster; }
};

using core::correction_bits;
using core::has_correction;
using core::is_nearest;

/// Stored weights: 16- or 32-bit parameters (the first 4 or all words), 8- or 16-bit corrections.
struct StoredWeights {
  Words<4> parameter;
  Words<2> correction;
};

template <int kBytes, int kMore>
__device__ __forceinline__ Words<kBytes> first_words(const Words<kMore>& words) {
  Words<kBytes> out;
#pragma unroll
  for (int j = 0; j < Words<kBytes>::kCount; ++j) out.w[j] = words.w[j];
  return out;
}
template <int kBytes, int kMore>
__device__ __forceinline__ void set_first_words(Words<kMore>& words, const Words<kBytes>& from) {
#pragma unroll
  for (int j = 0; j < Words<kBytes>::kCount; ++j) words.w[j] = from.w[j];
}

/// Loads 8 elements of 2 or 4 bytes.
__device__ __forceinline__ void load_2_or_4(const void* base, int64_t first, bool four, int valid, bool vector,
                                            Words<4>& out) {
  const unsigned char* p = static_cast<const unsigned char*>(base);
  if (four) {
    out = load_unit<4>(p + first * 4, valid, vector);
  } else {
    set_first_words(out, load_unit<2>(p + first * 2, valid, vector));
  }
}

template <class Types>
__device__ __forceinline__ void load_weights(const TensorEntry& t, const Types& types, int64_t first, int valid,
                                             bool vector, StoredWeights& out) {
  load_2_or_4(t.parameter, first, types.parameter() == DType::kFloat32, valid, vector, out.parameter);
  if (has_correction(types.master())) {
    const unsigned char* p = static_cast<const unsigned char*>(t.correction);
    if (correction_bits(types.master()) == 8) {
      set_first_words(out.correction, load_unit<1>(p + first, valid, vector));
    } else {
      out.correction = load_unit<2>(p + first * 2, valid, vector);
    }
  }
}

template <class Types>
__device__ __forceinline__ void store_weights(const TensorEntry& t, const Types& types, int64_t first, int valid,
                                              bool vector, const StoredWeights& in) {
  unsigned char* p = static_cast<unsigned char*>(t.parameter);
  if (types.parameter() == DType::kFloat32) {
    store_unit<4>(p + first * 4, in.parameter, valid, vector);
  } else {
    store_unit<2>(p + first * 2, first_words<2>(in.parameter), valid, vector);
  }
  if (has_correction(types.master())) {
    unsigned char* c = static_cast<unsigned char*>(t.correction);
    if (correction_bits(types.master()) == 8) {
      store_unit<1>(c + first, first_words<1>(in.correction), valid, vector);
    } else {
      store_unit<2>(c + first * 2, in.correction, valid, vector);
    }
  }
}

__device__ __forceinline__ void widen(DType dtype, const Words<4>& words, F (&out)[kUnit]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out[i] = core::from_bits(words.w[i]);
    return;
  }
  const Words<2> narrow = first_words<2>(words);
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out[i] = core::BFloat16::widen<F>(element(narrow, i));
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out[i] = core::Float16::widen<F>(element(narrow, i));
  }
}

template <MasterWeights kMaster>
__device__ __forceinline__ uint32_t correction_of(const StoredWeights& in, int i) {
  if constexpr (correction_bits(kMaster) == 8) return signed_element(first_words<1>(in.correction), i);
  return signed_element(in.correction, i);
}

template <class Narrow>
__device__ __forceinline__ void merge_corrections(MasterWeights master, const StoredWeights& in, F (&w)[kUnit]) {
  if (!has_correction(master)) return;
  if (correction_bits(master) == 8) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      w[i] = core::merge<Narrow, 8, F>(w[i], correction_of<MasterWeights::kCorrection8>(in, i));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      w[i] = core::merge<Narrow, 16, F>(w[i], correction_of<MasterWeights::kCorrection16>(in, i));
    }
  }
}

/// fp32 weights.
template <class Types>
__device__ __forceinline__ void merge_weights(const Types& types, const StoredWeights& in, F (&w)[kUnit]) {
  widen(types.parameter(), in.parameter, w);
  if (types.parameter() == DType::kBFloat16) merge_corrections<core::BFloat16>(types.master(), in, w);
  if (types.parameter() == DType::kFloat16) merge_corrections<core::Float16>(types.master(), in, w);
}

/// w - delta for one kind of narrow weights, into the stored form.
template <class Narrow, MasterWeights kMaster>
__device__ __forceinline__ void update_narrow(const F (&w)[kUnit], const F (&delta)[kUnit],
                                              const core::GroupDither& dither, StoredWeights& stored) {
  constexpr auto kStream = core::DitherStream::kWeight;
  const uint32_t start = dither.start<kStream>();
  uint32_t narrow[kUnit], correction[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if constexpr (has_correction(kMaster)) {
      constexpr int kBits = correction_bits(kMaster);
      const uint32_t old_narrow = element(first_words<2>(stored.parameter), i);
      const uint32_t old_correction = correction_of<kMaster>(stored, i);
      core::SplitWeight<F> out;
      if constexpr (is_nearest(kMaster)) {
        out = core::split_update_nearest<Narrow, kBits, F>(old_narrow, old_correction, w[i], delta[i]);
      } else {
        const F value = core::correction_value<Narrow, kBits, F>(Narrow::template widen<F>(old_narrow), old_correction);
        out = core::split_update_dithered<Narrow, kBits, F>(old_narrow, old_correction, value, delta[i],
                                                            core::GroupDither::word<kStream>(start, i));
      }
      narrow[i] = out.narrow;
      correction[i] = out.correction;
    } else if constexpr (kMaster == MasterWeights::kNoneStochastic) {
      narrow[i] = core::round_dithered<Narrow, F>(w[i] - delta[i], core::GroupDither::word<kStream>(start, i));
    } else {
      narrow[i] = Narrow::template round<F>(w[i] - delta[i]);
    }
  }
  set_first_words(stored.parameter, pack<2>(narrow));
  if constexpr (has_correction(kMaster))
    set_first_words(stored.correction, pack<correction_bits(kMaster) / 8>(correction));
}

template <class Narrow>
__device__ __forceinline__ void update_narrow(MasterWeights master, const F (&w)[kUnit], const F (&delta)[kUnit],
                                              const core::GroupDither& dither, StoredWeights& stored) {
  switch (master) {
    case MasterWeights::kNone:
      return update_narrow<Narrow, MasterWeights::kNone>(w, delta, dither, stored);
    case MasterWeights::kNoneStochastic:
      return update_narrow<Narrow, MasterWeights::kNoneStochastic>(w, delta, dither, stored);
    case MasterWeights::kCorrection8:
      return update_narrow<Narrow, MasterWeights::kCorrection8>(w, delta, dither, stored);
    case MasterWeights::kCorrection16:
      return update_narrow<Narrow, MasterWeights::kCorrection16>(w, delta, dither, stored);
    case MasterWeights::kCorrection8Nearest:
      return update_narrow<Narrow, MasterWeights::kCorrection8Nearest>(w, delta, dither, stored);
    case MasterWeights::kCorrection16Nearest:
      return update_narrow<Narrow, MasterWeights::kCorrection16Nearest>(w, delta, dither, stored);
  }
}

template <class Types>
__device__ __forceinline__ void update_weights(const Types& types, const F (&w)[kUnit], const F (&delta)[kUnit],
                                               const core::GroupDither& dither, StoredWeights& stored) {
  if (types.parameter() == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) stored.parameter.w[i] = core::to_bits(core::canonical_nan(w[i] - delta[i]));
  } else if (types.parameter() == DType::kBFloat16) {
    update_narrow<core::BFloat16>(types.master(), w, delta, dither, stored);
  } else {
    update_narrow<core::Float16>(types.master(), w, delta, dither, stored);
  }
}

}  // namespace flashoptim::cuda
