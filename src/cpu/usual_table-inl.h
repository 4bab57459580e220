// Which formats of weights and gradients have usual stages (kernels.h), the same for every instruction set that has
// any.
#pragma once

#include "flashoptim/core/codecs/slot_codecs.h"
#include "flashoptim/core/optimizer_list.h"
#include "flashoptim/core/weight_split.h"
#include "src/cpu/kernels.h"

namespace flashoptim::cpu {

/// Hot::stages<Rule, codec, gradient's dtype, parameter's dtype, master weights>() gives them.
template <class Hot>
struct UsualTable {
  template <core::Rule Rule, DType kGradient, DType kParameter, MasterWeights kMaster>
  static constexpr void add_codecs(KernelTable& t, RuleKind kind) {
    usual_stages(t, {kind, StateCodec::kDefault, kParameter, kGradient, kMaster}) =
        Hot::template stages<Rule, StateCodec::kDefault, kGradient, kParameter, kMaster>();
    usual_stages(t, {kind, StateCodec::kPaper, kParameter, kGradient, kMaster}) =
        Hot::template stages<Rule, StateCodec::kPaper, kGradient, kParameter, kMaster>();
  }
  /// A rule that takes weight decay into the gradient reads weights where it begins: of bf16 weights and gradients
  /// alone.
  template <core::Rule Rule, DType kParameter, MasterWeights kMaster>
  static constexpr void add_gradients(KernelTable& t, RuleKind kind) {
    if constexpr (Rule::kDecoupledDecay) {
      add_codecs<Rule, DType::kFloat32, kParameter, kMaster>(t, kind);
      add_codecs<Rule, DType::kBFloat16, kParameter, kMaster>(t, kind);
      add_codecs<Rule, DType::kFloat16, kParameter, kMaster>(t, kind);
    } else if constexpr (kParameter == DType::kBFloat16 && core::has_correction(kMaster)) {
      add_codecs<Rule, DType::kBFloat16, DType::kBFloat16, kMaster>(t, kind);
    }
  }
  template <core::Rule Rule, DType kParameter>
  static constexpr void add_narrow(KernelTable& t, RuleKind kind) {
    add_gradients<Rule, kParameter, MasterWeights::kNone>(t, kind);
    add_gradients<Rule, kParameter, MasterWeights::kCorrection8>(t, kind);
    add_gradients<Rule, kParameter, MasterWeights::kCorrection16>(t, kind);
    add_gradients<Rule, kParameter, MasterWeights::kCorrection8Nearest>(t, kind);
    add_gradients<Rule, kParameter, MasterWeights::kCorrection16Nearest>(t, kind);
  }
  template <core::Rule Rule>
  static constexpr void add_rule(KernelTable& t, RuleKind kind) {
    if constexpr (core::kHasBoundingVariance<Rule> && core::MomentumOverVariance<Rule>::kFits) {
      add_gradients<Rule, DType::kFloat32, MasterWeights::kNone>(t, kind);
      add_narrow<Rule, DType::kBFloat16>(t, kind);
      add_narrow<Rule, DType::kFloat16>(t, kind);
    }
  }
  static constexpr void add(KernelTable& t) {
#define FLASHOPTIM_ADD_RULE(name) add_rule<core::name>(t, RuleKind::k##name);
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_ADD_RULE)
#undef FLASHOPTIM_ADD_RULE
  }
};

}  // namespace flashoptim::cpu
