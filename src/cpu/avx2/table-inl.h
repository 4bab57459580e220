// The hot path of AVX2 (with FMA): passes over a block in about half of the operations that core's formulas compile to.
// The same bits: every step is an identity of core's, said beside it, under conditions that are tested before anything
// is written. Where one fails (zeros, subnormals, infinities, NaN, absurd magnitudes), the group or the block takes
// core's formulas in state_loops-inl.h and weight_loops-inl.h. tests/kernels compares both with the scalar loops.
#pragma once

#include "src/cpu/avx2/default_states-inl.h"
#include "src/cpu/avx2/paper_states-inl.h"
#include "src/cpu/usual_table-inl.h"

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
  template <core::Rule Rule, StateCodec kCodec, DType kGradient, DType kParameter, MasterWeights kMaster>
  static constexpr UsualStages stages() {
    // A rule whose decay is its own reads no weights until its end.
    constexpr DType kRead = Rule::kDecoupledDecay ? DType::kFloat32 : kParameter;
    constexpr MasterWeights kReadMaster = Rule::kDecoupledDecay ? MasterWeights::kNone : kMaster;
    constexpr Stage kFinish = Weights<Rule, kParameter, kMaster>::finish;
    if constexpr (kCodec == StateCodec::kDefault) {
      using States = DefaultStates<Rule>;
      return {begin<Rule, States, kGradient, kRead, kReadMaster>,
              kFinish,
              {States::encode_variance, States::encode_momentum}};
    } else {
      using States = PaperStates<Rule>;
      return {begin<Rule, States, kGradient, kRead, kReadMaster>, kFinish, {States::encode, nullptr}};
    }
  }

  static constexpr KernelTable table(const char* isa) {
    KernelTable t = Generic::table(isa);
    t.usual_element = element;
    UsualTable<Hot>::add(t);
    return t;
  }
};

}  // namespace flashoptim::cpu::avx2
