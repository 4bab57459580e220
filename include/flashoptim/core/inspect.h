// What one step would do to a group of 32, without doing it: the telemetry of Plan::inspect, counted by the step's own
// formulas. A caller has N elements of the group (all 32 on the CPU, a few per thread on a device) and joins the
// group's extremes by its `Group`.
#pragma once

#include "flashoptim/core/codecs/group_states.h"
#include "flashoptim/core/dither.h"
#include "flashoptim/core/optimizers/rule.h"
#include "flashoptim/core/weight_split.h"
#include "flashoptim/types.h"

// Not forced inline: they are large, and few calls need them fast.
#if defined(__CUDACC__)
#define FLASHOPTIM_HD_FUNCTION __host__ __device__ inline
#else
#define FLASHOPTIM_HD_FUNCTION inline
#endif

namespace flashoptim::core {

// ---- which groups ---------------------------------------------------------------------------------------------------

/// First of the groups of a tensor that a step's inspection looks at, 0 ... stride - 1: one further each step.
FLASHOPTIM_HD int64_t first_inspected_group(const DitherKey& key, int64_t tensor, int64_t stride) {
  const uint64_t hash = mix32<float>(key.seed ^ mix32<float>(static_cast<uint32_t>(tensor)));
  return static_cast<int64_t>((hash + key.step) % static_cast<uint64_t>(stride));
}

/// Groups from `begin` to the next one that is looked at, itself among them; `first` as above.
FLASHOPTIM_HD int64_t groups_to_inspected(int64_t first, int64_t begin, int64_t stride) {
  const int64_t past = (begin - first) % stride;
  return past > 0 ? stride - past : -past;
}

// ---- what is given and what comes out -------------------------------------------------------------------------------

struct ElementTypes {
  DType parameter;
  DType gradient;
  MasterWeights master_weights;
};

/// Codes of N elements, as GroupStates reads and writes them.
template <int N>
struct InspectedCodes {
  uint32_t header[kMaxSlots];
  uint32_t codes[kMaxSlots][N];

  template <int k, bool kSigned>
  FLASHOPTIM_HD uint32_t code(int i) const {
    if constexpr (kSigned) return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(codes[k][i])));
    return codes[k][i];
  }
  template <int k>
  FLASHOPTIM_HD void set_codes(const uint32_t (&from)[N]) {
    for (int i = 0; i < N; ++i) codes[k][i] = from[i] & 0xffu;
  }
};

/// What is stored of N elements, as patterns; those from `valid` on do not exist and are all 0.
template <int N>
struct StoredElements {
  int valid;
  uint32_t parameter[N];     ///< 16 or 32 bits
  uint32_t correction[N];    ///< with its sign
  uint32_t gradient[N];      ///< 16 or 32 bits
  InspectedCodes<N> states;  ///< 8 bits without sign, or fp32
};

/// One step's numbers.
template <Rule R>
struct InspectedStep {
  const typename R::Hyper& hyper;
  float gradient_scale;
  float largest_update;  ///< R::largest_update
};

/// Counts of StepTelemetry, over as many elements as fit 32 bits.
struct Inspection {
  uint32_t examined = 0;
  uint32_t nonfinite_gradients = 0;
  uint32_t lost_updates = 0;
  uint32_t floored_codes = 0;
  uint32_t saturated_codes = 0;
  float largest_update_ratio = 0.0f;

  /// A state before and after storage.
  FLASHOPTIM_HD void add_code(float state, float read_back, bool saturated) {
    floored_codes += !equals(state, 0.0f) && equals(read_back, 0.0f) ? 1u : 0u;
    saturated_codes += saturated ? 1u : 0u;
  }
};

// ---- weights --------------------------------------------------------------------------------------------------------

FLASHOPTIM_HD float widen(DType dtype, uint32_t bits) {
  if (dtype == DType::kFloat32) return from_bits(bits);
  return dtype == DType::kBFloat16 ? BFloat16::widen<float>(bits) : Float16::widen<float>(bits);
}

template <class Narrow>
FLASHOPTIM_HD float merge_stored(MasterWeights master, float narrow, uint32_t correction) {
  if (!has_correction(master)) return narrow;
  return correction_bits(master) == 8 ? merge<Narrow, 8, float>(narrow, correction)
                                      : merge<Narrow, 16, float>(narrow, correction);
}

FLASHOPTIM_HD float stored_weight(const ElementTypes& types, uint32_t parameter, uint32_t correction) {
  const float narrow = widen(types.parameter, parameter);
  if (types.parameter == DType::kBFloat16) return merge_stored<BFloat16>(types.master_weights, narrow, correction);
  if (types.parameter == DType::kFloat16) return merge_stored<Float16>(types.master_weights, narrow, correction);
  return narrow;
}

/// Whether the weight w - delta is stored in the bits of w.
template <class Narrow, MasterWeights kMaster>
FLASHOPTIM_HD bool keeps_narrow(uint32_t narrow, uint32_t correction, float w, float delta, uint32_t dither) {
  if constexpr (has_correction(kMaster)) {
    constexpr int kBits = correction_bits(kMaster);
    SplitWeight<float> out;
    if constexpr (is_nearest(kMaster)) {
      out = split_update_nearest<Narrow, kBits, float>(narrow, correction, w, delta);
    } else {
      const float value = correction_value<Narrow, kBits, float>(Narrow::template widen<float>(narrow), correction);
      out = split_update_dithered<Narrow, kBits, float>(narrow, correction, value, delta, dither);
    }
    return out.narrow == narrow && ((out.correction ^ correction) & ((1u << kBits) - 1u)) == 0u;
  } else if constexpr (kMaster == MasterWeights::kNoneStochastic) {
    return round_dithered<Narrow, float>(w - delta, dither) == narrow;
  } else {
    return Narrow::template round<float>(w - delta) == narrow;
  }
}

template <class Narrow>
FLASHOPTIM_HD_FUNCTION bool keeps_narrow(MasterWeights master, uint32_t narrow, uint32_t correction, float w,
                                         float delta, uint32_t dither) {
  switch (master) {
    case MasterWeights::kNone:
      return keeps_narrow<Narrow, MasterWeights::kNone>(narrow, correction, w, delta, dither);
    case MasterWeights::kNoneStochastic:
      return keeps_narrow<Narrow, MasterWeights::kNoneStochastic>(narrow, correction, w, delta, dither);
    case MasterWeights::kCorrection8:
      return keeps_narrow<Narrow, MasterWeights::kCorrection8>(narrow, correction, w, delta, dither);
    case MasterWeights::kCorrection16:
      return keeps_narrow<Narrow, MasterWeights::kCorrection16>(narrow, correction, w, delta, dither);
    case MasterWeights::kCorrection8Nearest:
      return keeps_narrow<Narrow, MasterWeights::kCorrection8Nearest>(narrow, correction, w, delta, dither);
    case MasterWeights::kCorrection16Nearest:
      return keeps_narrow<Narrow, MasterWeights::kCorrection16Nearest>(narrow, correction, w, delta, dither);
  }
  return false;
}

FLASHOPTIM_HD bool is_lost(const ElementTypes& types, uint32_t parameter, uint32_t correction, float w, float delta,
                           uint32_t dither) {
  if (equals(delta, 0.0f) || is_nan(delta)) return false;
  if (types.parameter == DType::kFloat32) return to_bits(canonical_nan(w - delta)) == parameter;
  if (types.parameter == DType::kBFloat16) {
    return keeps_narrow<BFloat16>(types.master_weights, parameter, correction, w, delta, dither);
  }
  return keeps_narrow<Float16>(types.master_weights, parameter, correction, w, delta, dither);
}

// ---- states ---------------------------------------------------------------------------------------------------------

/// Counts what storing new states would lose of them.
template <Rule R, StateCodec kCodec, int N, class Group>
FLASHOPTIM_HD void inspect_states(const float (&s)[N][kSlotArray<R>], int valid, const GroupDither& dither,
                                  const Group& group, Inspection& out) {
  using States = GroupStates<R, kCodec, N>;
  float kept[N][kSlotArray<R>], read_back[N][kSlotArray<R>];
  for (int i = 0; i < N; ++i) {
    for (int k = 0; k < kSlotArray<R>; ++k) kept[i][k] = s[i][k];
  }
  InspectedCodes<N> stored;
  States::encode(kept, group, dither, stored);
  States::decode(stored, read_back);
  States::Slots::for_each([&](auto index) {
    constexpr int k = decltype(index)::value;
    for (int i = 0; i < valid; ++i) {
      out.add_code(s[i][k], read_back[i][k], States::Slots::template Of<k>::saturates(s[i][k]));
    }
  });
}

// ---- all of it ------------------------------------------------------------------------------------------------------

/// Adds what a step would do to these elements to `out`.
template <Rule R, StateCodec kCodec, int N, class Group>
FLASHOPTIM_HD_FUNCTION void inspect_elements(const ElementTypes& types, const StoredElements<N>& e,
                                             const InspectedStep<R>& step, const GroupDither& dither, Group group,
                                             Inspection& out) {
  float s[N][kSlotArray<R>];
  GroupStates<R, kCodec, N>::decode(e.states, s);
  float largest = 0.0f;
  const uint32_t weight_dither = dither.start<DitherStream::kWeight>();
  for (int i = 0; i < N; ++i) {
    const float g = widen(types.gradient, e.gradient[i]) * step.gradient_scale;
    const float w = stored_weight(types, e.parameter[i], e.correction[i]);
    if constexpr (R::kDecoupledDecay) {
      // Without a weight there is nothing to decay.
      float old[kSlotArray<R>];
      for (int k = 0; k < R::kSlotCount; ++k) old[k] = s[i][k];
      if (step.largest_update > 0.0f) largest = max(abs(R::update(0.0f, g, old, step.hyper)), largest);
    }
    const float delta = R::update(w, g, s[i], step.hyper);
    if constexpr (!R::kDecoupledDecay) largest = max(abs(delta), largest);
    if (i < e.valid) {
      out.nonfinite_gradients += (to_bits(g) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
      out.lost_updates += is_lost(types, e.parameter[i], e.correction[i], w, delta,
                                  dither.word<DitherStream::kWeight>(weight_dither, i))
                              ? 1u
                              : 0u;
    }
  }
  if constexpr (kCodec != StateCodec::kFloat32) inspect_states<R, kCodec>(s, e.valid, dither, group, out);
  out.examined += static_cast<uint32_t>(e.valid);
  if (step.largest_update > 0.0f)
    out.largest_update_ratio = max(largest / step.largest_update, out.largest_update_ratio);
}

}  // namespace flashoptim::core
