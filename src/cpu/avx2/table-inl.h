// The hot path of AVX2 (with FMA): passes over a block in about half of the operations that core's formulas compile to.
// The same bits: every step is an identity of core's, said beside it, under conditions that are tested before anything
// is written. Where one fails (zeros, subnormals, infinities, NaN, absurd magnitudes), the group or the block takes
// core's formulas in state_loops-inl.h and weight_loops-inl.h. tests/kernels compares both with the scalar loops.
#pragma once

#include "src/cpu/avx2/default_states-inl.h"
#include "src/cpu/avx2/paper_states-inl.h"

namespace flashoptim::cpu::avx2 {

/// begin() of UsualStages.
template <core::Rule Rule, class States, DType kGradient, DType kParameter, MasterWeights kMaster>
bool begin(Block& b) {
  const auto h = *static_cast<const typename Rule::Hyper*>(b.hyper);
  typename States::Headers headers;
  if (!Pieces::takes(b) || !States::bounds_hold(h) || !headers.open(b)) return false;
  if (b.gradient_scale == 1.0f)
    return States::advance(b, headers, h, Inputs<Rule, kGradient, kParameter, kMaster, false>(b));
  return States::advance(b, headers, h, Inputs<Rule, kGradient, kParameter, kMaster, true>(b));
}

struct Hot : Pieces {
  template <core::Rule Rule, DType kGradient, DType kParameter, MasterWeights kMaster>
  static constexpr void add_stages(KernelTable& t, RuleKind kind) {
    // A rule whose decay is its own reads no weights until its end.
    constexpr DType kRead = Rule::kDecoupledDecay ? DType::kFloat32 : kParameter;
    constexpr MasterWeights kReadMaster = Rule::kDecoupledDecay ? MasterWeights::kNone : kMaster;
    using Default = DefaultStates<Rule>;
    using Paper = PaperStates<Rule>;
    usual_stages(t, {kind, StateCodec::kDefault, kParameter, kGradient, kMaster}) = {
        begin<Rule, Default, kGradient, kRead, kReadMaster>,
        Weights<Rule, kParameter, kMaster>::finish,
        {Default::encode_variance, Default::encode_momentum}};
    usual_stages(t, {kind, StateCodec::kPaper, kParameter, kGradient, kMaster}) = {
        begin<Rule, Paper, kGradient, kRead, kReadMaster>,
        Weights<Rule, kParameter, kMaster>::finish,
        {Paper::encode, nullptr}};
  }
  template <core::Rule Rule, DType kParameter, MasterWeights kMaster>
  static constexpr void add_gradients(KernelTable& t, RuleKind kind) {
    add_stages<Rule, DType::kFloat32, kParameter, kMaster>(t, kind);
    add_stages<Rule, DType::kBFloat16, kParameter, kMaster>(t, kind);
    add_stages<Rule, DType::kFloat16, kParameter, kMaster>(t, kind);
  }
  template <core::Rule Rule, DType kParameter>
  static constexpr void add_corrected(KernelTable& t, RuleKind kind) {
    if constexpr (Rule::kDecoupledDecay) {
      add_gradients<Rule, kParameter, MasterWeights::kCorrection8>(t, kind);
      add_gradients<Rule, kParameter, MasterWeights::kCorrection16>(t, kind);
      add_gradients<Rule, kParameter, MasterWeights::kCorrection8Nearest>(t, kind);
      add_gradients<Rule, kParameter, MasterWeights::kCorrection16Nearest>(t, kind);
    } else {
      add_stages<Rule, kParameter, kParameter, MasterWeights::kCorrection8>(t, kind);
      add_stages<Rule, kParameter, kParameter, MasterWeights::kCorrection16>(t, kind);
      add_stages<Rule, kParameter, kParameter, MasterWeights::kCorrection8Nearest>(t, kind);
      add_stages<Rule, kParameter, kParameter, MasterWeights::kCorrection16Nearest>(t, kind);
    }
  }
  template <core::Rule Rule>
  static constexpr void add_rule(KernelTable& t, RuleKind kind) {
    if constexpr (core::kHasBoundingVariance<Rule> && core::MomentumOverVariance<Rule>::kFits) {
      add_corrected<Rule, DType::kBFloat16>(t, kind);
      if constexpr (Rule::kDecoupledDecay) {
        add_corrected<Rule, DType::kFloat16>(t, kind);
        add_gradients<Rule, DType::kBFloat16, MasterWeights::kNone>(t, kind);
        add_gradients<Rule, DType::kFloat16, MasterWeights::kNone>(t, kind);
        add_gradients<Rule, DType::kFloat32, MasterWeights::kNone>(t, kind);
      }
    }
  }

  static constexpr KernelTable table(const char* isa) {
    KernelTable t = Generic::table(isa);
    t.usual_element = element;
#define FLASHOPTIM_ADD_RULE(name) add_rule<core::name>(t, RuleKind::k##name);
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_ADD_RULE)
#undef FLASHOPTIM_ADD_RULE
    return t;
  }
};

}  // namespace flashoptim::cpu::avx2
