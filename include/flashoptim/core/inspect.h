// What one step would do to a group of 32, without doing it: the telemetry of Plan::inspect, counted by the step's own
// formulas. A caller has N elements of the group (all 32 on the CPU, a few per thread on a device) and joins the
// group's extremes by its `Group`.
#pragma once

#include <type_traits>

#include "flashoptim/core/default_codec.h"
#include "flashoptim/core/dither.h"
#include "flashoptim/core/optimizers/rule.h"
#include "flashoptim/core/paper_codec.h"
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

/// What is stored of N elements, as patterns; those from `valid` on do not exist and are all 0.
template <int N>
struct StoredElements {
  int valid;
  uint32_t parameter[N];          ///< 16 or 32 bits
  uint32_t correction[N];         ///< with its sign
  uint32_t gradient[N];           ///< 16 or 32 bits
  uint32_t states[kMaxSlots][N];  ///< 8 bits without sign, or fp32
  uint32_t scales[kMaxSlots];     ///< the group's headers
};

/// One step's numbers.
template <class Rule>
struct InspectedStep {
  const typename Rule::Hyper& hyper;
  float gradient_scale;
  float largest_update;  ///< Rule::largest_update
};

/// Where N elements get their dither from.
struct GroupDither {
  DitherKey key;
  uint32_t group_hash;
  int lane;  ///< the first element's place in its group

  template <DitherStream kStream>
  FLASHOPTIM_HD uint32_t word(int i) const {
    return dither_group_start<kStream, float>(key, group_hash) +
           static_cast<uint32_t>(lane + i) * kDitherLaneStep<kStream>;
  }
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

/// A group all of whose elements one caller has.
struct WholeGroup {
  static FLASHOPTIM_HD uint32_t largest(uint32_t a) { return a; }
  static FLASHOPTIM_HD uint32_t smallest(uint32_t a) { return a; }
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

// ---- states: decode() of what is stored, inspect() of what would be
// ---------------------------------------------------

template <class Rule, StateCodec kCodec>
struct InspectedStates;

template <class Rule>
struct InspectedStates<Rule, StateCodec::kFloat32> {
  template <int N>
  static FLASHOPTIM_HD void decode(const StoredElements<N>& e, float (&s)[N][kSlotArray<Rule>]) {
    for (int i = 0; i < N; ++i) {
      for (int k = 0; k < Rule::kSlotCount; ++k) s[i][k] = from_bits(e.states[k][i]);
    }
  }
  template <int N, class Group>
  static FLASHOPTIM_HD void inspect(const float (&)[N][kSlotArray<Rule>], int, const GroupDither&, Group, Inspection&) {
  }
};

template <class Rule>
struct InspectedStates<Rule, StateCodec::kPaper> {
  template <int k>
  static constexpr bool kIsSigned = Rule::kSlots[k].kind == StateKind::kSigned;
  template <int k>
  using Codec = std::conditional_t<kIsSigned<k>, PaperMomentum, PaperVariance>;

  template <int k>
  static FLASHOPTIM_HD float decode_code(uint32_t code, float scale) {
    if constexpr (kIsSigned<k>) code = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(code)));
    return Codec<k>::template decode<float>(code, scale);
  }
  template <int k, int N>
  static FLASHOPTIM_HD void decode_slot(const StoredElements<N>& e, float (&s)[N][kSlotArray<Rule>]) {
    const float scale = half_to_float(e.scales[k]);
    for (int i = 0; i < N; ++i) s[i][k] = decode_code<k>(e.states[k][i], scale);
  }
  template <int k>
  static FLASHOPTIM_HD float kept(float state) {
    if constexpr (!kIsSigned<k>) return sqrt(state);
    return state;
  }
  template <int k, int N, class Group>
  static FLASHOPTIM_HD void inspect_slot(const float (&s)[N][kSlotArray<Rule>], int valid, Group group,
                                         Inspection& out) {
    uint32_t largest = 0u;
    for (int i = 0; i < N; ++i) largest = int_max(largest, to_bits(abs(finite_or_zero(kept<k>(s[i][k])))));
    const float absmax = max(kPaperSmallestAbsmax, from_bits(group.largest(largest)));
    const float scale = half_to_float(paper_header(absmax));
    const float factor = Codec<k>::encoding_factor(absmax);
    for (int i = 0; i < valid; ++i) {
      const float value = kept<k>(s[i][k]);
      const uint32_t code = Codec<k>::encode(finite_or_zero(value), factor) & 0xffu;
      out.add_code(s[i][k], decode_code<k>(code, scale), paper_saturates(value));
    }
  }

  template <int N>
  static FLASHOPTIM_HD void decode(const StoredElements<N>& e, float (&s)[N][kSlotArray<Rule>]) {
    if constexpr (Rule::kSlotCount > 0) decode_slot<0>(e, s);
    if constexpr (Rule::kSlotCount > 1) decode_slot<1>(e, s);
  }
  template <int N, class Group>
  static FLASHOPTIM_HD void inspect(const float (&s)[N][kSlotArray<Rule>], int valid, const GroupDither&, Group group,
                                    Inspection& out) {
    if constexpr (Rule::kSlotCount > 0) inspect_slot<0>(s, valid, group, out);
    if constexpr (Rule::kSlotCount > 1) inspect_slot<1>(s, valid, group, out);
  }
};

/// Slot 0 is signed; slot 1, if there is one, a variance that slot 0 is relative to.
template <class Rule>
struct InspectedStates<Rule, StateCodec::kDefault> {
  static constexpr bool kHasVariance = Rule::kSlotCount > 1;
  static constexpr bool kGroupChooses = Rule::kSlots[0].mantissa_bits == 0;  ///< K of momentum
  using MuLaw = typename SignedCodec<Rule::kSlots[0].mantissa_bits>::type;
  using Window = WindowCodec::Window<uint32_t>;

  static FLASHOPTIM_HD float scale(uint32_t header) {
    if constexpr (kGroupChooses)
      return MuLaw::template scale<float>(header);
    else
      return MuLaw::template decoding_scale<kHasVariance, float>(header);
  }
  static FLASHOPTIM_HD float decode_momentum(uint32_t code, uint32_t header, float variance) {
    if constexpr (kGroupChooses) {
      const uint32_t extended = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(code)));
      return MuLaw::template decode<float>(extended, MuLaw::template group<float>(header)) * scale(header);
    } else {
      const float x = MuLaw::template decode<float>(code) * scale(header);
      if constexpr (kHasVariance) return x * root_scale<float>(to_bits(variance));
      return x;
    }
  }

  template <int N>
  static FLASHOPTIM_HD void decode(const StoredElements<N>& e, float (&s)[N][kSlotArray<Rule>]) {
    if constexpr (Rule::kSlotCount > 0) {
      Window window{};
      if constexpr (kHasVariance) window = WindowCodec::window<float>(e.scales[1]);
      for (int i = 0; i < N; ++i) {
        float v = 0.0f;
        if constexpr (kHasVariance) s[i][1] = v = WindowCodec::decode<float>(e.states[1][i], window);
        s[i][0] = decode_momentum(e.states[0][i], e.scales[0], v);
      }
    }
  }

  template <int N, class Group>
  static FLASHOPTIM_HD void inspect(const float (&s)[N][kSlotArray<Rule>], int valid, const GroupDither& dither,
                                    Group group, Inspection& out) {
    if constexpr (Rule::kSlotCount > 0) {
      float x[N], variance[N];  // what is encoded of momentum, and the variance as it would be read back
      if constexpr (kHasVariance) {
        inspect_variance(s, valid, dither, group, x, variance, out);
      } else {
        for (int i = 0; i < N; ++i) x[i] = finite_or_zero(s[i][0]);
      }
      uint32_t largest = 0u, smallest = 0xffffffffu;
      for (int i = 0; i < N; ++i) {
        const uint32_t bits = to_bits(abs(x[i]));
        largest = int_max(largest, bits);
        smallest = unsigned_min(smallest, bits - 1u);
      }
      uint32_t header;
      if constexpr (kGroupChooses) {
        header = MuLaw::template header<float>(group.largest(largest), group.smallest(smallest));
      } else {
        header = MuLaw::template header<float>(from_bits(group.largest(largest)));
      }
      const float inverse = MuLaw::template inverse_scale<float>(header);
      for (int i = 0; i < valid; ++i) {
        const uint32_t word = dither.template word<DitherStream::kMomentum>(i);
        uint32_t code;
        if constexpr (kGroupChooses) {
          code = MuLaw::template encode<float>(x[i], inverse, MuLaw::template group<float>(header), word);
        } else {
          code = MuLaw::template encode<float>(x[i], inverse, word);
        }
        out.add_code(s[i][0], decode_momentum(code, header, kHasVariance ? variance[i] : 0.0f), false);
      }
    }
  }

  template <int N, class Group>
  static FLASHOPTIM_HD void inspect_variance(const float (&s)[N][kSlotArray<Rule>], int valid,
                                             const GroupDither& dither, Group group, float (&x)[N],
                                             float (&variance)[N], Inspection& out) {
    uint32_t largest = 0u, smallest = 0xffffffffu;
    for (int i = 0; i < N; ++i) {
      const uint32_t bits = WindowCodec::storable(s[i][1]);
      largest = int_max(largest, bits);
      smallest = unsigned_min(smallest, bits - 1u);
    }
    const Window window =
        WindowCodec::window<float>(WindowCodec::header<float>(group.largest(largest), group.smallest(smallest)));
    for (int i = 0; i < N; ++i) {
      const auto v =
          WindowCodec::encode<float>(WindowCodec::storable(s[i][1]), window, dither.word<DitherStream::kVariance>(i));
      x[i] = relative_to_root(s[i][0], v.stored);
      variance[i] = WindowCodec::decode<float>(v.code & 0xffu, window);
      if (i < valid) out.add_code(s[i][1], variance[i], WindowCodec::saturates(s[i][1]));
    }
  }
};

// ---- all of it ------------------------------------------------------------------------------------------------------

/// Adds what a step would do to these elements to `out`.
template <class Rule, StateCodec kCodec, int N, class Group>
FLASHOPTIM_HD_FUNCTION void inspect_elements(const ElementTypes& types, const StoredElements<N>& e,
                                             const InspectedStep<Rule>& step, const GroupDither& dither, Group group,
                                             Inspection& out) {
  float s[N][kSlotArray<Rule>];
  InspectedStates<Rule, kCodec>::decode(e, s);
  float largest = 0.0f;
  for (int i = 0; i < N; ++i) {
    const float g = widen(types.gradient, e.gradient[i]) * step.gradient_scale;
    const float w = stored_weight(types, e.parameter[i], e.correction[i]);
    if constexpr (Rule::kDecoupledDecay) {
      // Without a weight there is nothing to decay.
      float old[kSlotArray<Rule>];
      for (int k = 0; k < Rule::kSlotCount; ++k) old[k] = s[i][k];
      if (step.largest_update > 0.0f) largest = max(abs(Rule::update(0.0f, g, old, step.hyper)), largest);
    }
    const float delta = Rule::update(w, g, s[i], step.hyper);
    if constexpr (!Rule::kDecoupledDecay) largest = max(abs(delta), largest);
    if (i < e.valid) {
      out.nonfinite_gradients += (to_bits(g) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
      out.lost_updates +=
          is_lost(types, e.parameter[i], e.correction[i], w, delta, dither.word<DitherStream::kWeight>(i)) ? 1u : 0u;
    }
  }
  InspectedStates<Rule, kCodec>::inspect(s, e.valid, dither, group, out);
  out.examined += static_cast<uint32_t>(e.valid);
  if (step.largest_update > 0.0f)
    out.largest_update_ratio = max(largest / step.largest_update, out.largest_update_ratio);
}

}  // namespace flashoptim::core
