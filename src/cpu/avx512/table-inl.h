// The hot path of AVX-512: passes over a block in about half of the operations that core's formulas compile to. The
// same bits: every step is an identity of core's, said beside it, under conditions that are tested before anything is
// written. Where one fails (zeros, subnormals, infinities, NaN, absurd magnitudes), the group or the block takes core's
// formulas in state_loops-inl.h and weight_loops-inl.h. tests/kernels compares both with the scalar loops.
//
// Compiled once per instruction set: with VBMI and BF16 (Sapphire Rapids, Zen 4 and later) a few sequences are shorter.
#pragma once

#include "src/cpu/avx512/default_states-inl.h"
#include "src/cpu/avx512/paper_states-inl.h"
#include "src/cpu/avx512/usual-inl.h"

namespace flashoptim::cpu {
inline namespace FLASHOPTIM_AVX512 {

struct HotAvx512 {
  template <MasterWeights kMaster>
  static constexpr void add_weights(KernelTable& t) {
    constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);
    t.load_weights[kBFloat16][static_cast<int>(kMaster)] = HotWeights::load_weights<kMaster>;
    if constexpr (!core::is_nearest(kMaster))
      t.store_weights[kBFloat16][static_cast<int>(kMaster)] = HotWeights::store_weights<kMaster>;
  }
  template <core::Rule Rule, MasterWeights kMaster>
  static constexpr void add_usual(KernelTable& t, RuleKind kind) {
    using Relative = HotDefaultStates<Rule>;
    using Paper = HotPaperStates<Rule>;
    using RelativeEntries = HotUsual::Entries<Rule, Relative>;
    using PaperEntries = HotUsual::Entries<Rule, Paper>;
    auto& usual = t.usual[static_cast<int>(kind)];
    constexpr int kM = static_cast<int>(kMaster);
    usual[static_cast<int>(StateCodec::kDefault)][kM] = {RelativeEntries::template begin<kMaster>,
                                                         HotUsual::finish<Rule, kMaster>,
                                                         {Relative::encode_variance, Relative::encode_momentum}};
    usual[static_cast<int>(StateCodec::kPaper)][kM] = {
        PaperEntries::template begin<kMaster>, HotUsual::finish<Rule, kMaster>, {Paper::encode, nullptr}};
  }
  template <core::Rule Rule>
  static constexpr void add_rule(KernelTable& t, RuleKind kind) {
    if constexpr (core::kHasBoundingVariance<Rule> && core::MomentumOverVariance<Rule>::kFits) {
      add_rule_with_variance<Rule>(t, kind);
    }
  }
  template <core::Rule Rule>
  static constexpr void add_rule_with_variance(KernelTable& t, RuleKind kind) {
    add_usual<Rule, MasterWeights::kCorrection8>(t, kind);
    add_usual<Rule, MasterWeights::kCorrection16>(t, kind);
    add_usual<Rule, MasterWeights::kCorrection8Nearest>(t, kind);
    add_usual<Rule, MasterWeights::kCorrection16Nearest>(t, kind);
    auto& stages = t.rule[static_cast<int>(kind)];
    constexpr int kDefault = static_cast<int>(StateCodec::kDefault), kPaper = static_cast<int>(StateCodec::kPaper);
    stages[kDefault][0] = HotUsual::Entries<Rule, HotDefaultStates<Rule>>::update;
    stages[kDefault][1] = HotDefaultStates<Rule>::encode_variance;
    stages[kDefault][2] = HotDefaultStates<Rule>::encode_momentum;
    stages[kPaper][0] = HotUsual::Entries<Rule, HotPaperStates<Rule>>::update;
    stages[kPaper][1] = HotPaperStates<Rule>::encode;
  }

  static constexpr KernelTable table(const char* isa) {
    KernelTable t = HotPieces::Generic::table(isa);
    add_weights<MasterWeights::kCorrection8>(t);
    add_weights<MasterWeights::kCorrection16>(t);
    add_weights<MasterWeights::kCorrection8Nearest>(t);
    add_weights<MasterWeights::kCorrection16Nearest>(t);
    t.load_gradient[static_cast<int>(DType::kBFloat16)] = HotWeights::load_gradient;
#define FLASHOPTIM_ADD_RULE(name) add_rule<core::name>(t, RuleKind::k##name);
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_ADD_RULE)
#undef FLASHOPTIM_ADD_RULE
    return t;
  }
};

}  // namespace FLASHOPTIM_AVX512
}  // namespace flashoptim::cpu
