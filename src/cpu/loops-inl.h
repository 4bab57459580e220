// The loops, compiled once per instruction set: F is that set's lane type. Every formula is core/'s.
#pragma once

#include "flashoptim/core/optimizer_list.h"
#include "src/cpu/kernels.h"
#include "src/cpu/state_loops-inl.h"
#include "src/cpu/weight_loops-inl.h"

namespace flashoptim::cpu {

template <class F>
struct Loops : WeightLoops<F>, StateLoops<F> {
  static constexpr KernelTable table(const char* isa) {
    KernelTable t{};
    t.isa = isa;
    WeightLoops<F>::add_weights(t);
#define FLASHOPTIM_ADD_RULE(name) StateLoops<F>::template add_rule<core::name>(t, RuleKind::k##name);
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_ADD_RULE)
#undef FLASHOPTIM_ADD_RULE
    return t;
  }
};

}  // namespace flashoptim::cpu
