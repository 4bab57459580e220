// The order of a block's stages (kernels.h says why), for Plan::step and for the tests that compare tables.
#pragma once

#include "src/cpu/kernels.h"

namespace flashoptim::cpu {

inline void store_groups(Stage store, Block& b, int begin, int end) {
  b.store_begin = begin;
  b.store_end = end;
  store(b);
}

/// The general stages.
inline void run_stages(const KernelTable& kernels, const BlockKind& kind, Block& b) {
  const int dtype = static_cast<int>(kind.parameter), master = static_cast<int>(kind.master);
  const auto& stages = kernels.rule[static_cast<int>(kind.rule)][static_cast<int>(kind.codec)];
  const Stage store = kernels.store_weights[dtype][master];
  kernels.load_weights[dtype][master](b);
  kernels.load_gradient[static_cast<int>(kind.gradient)](b);
  stages[0](b);
  const int half = stages[2] != nullptr ? b.groups / 2 : b.groups;
  store_groups(store, b, 0, half);
  if (stages[1] != nullptr) stages[1](b);
  if (half < b.groups) store_groups(store, b, half, b.groups);
  if (stages[2] != nullptr) stages[2](b);
}

/// The rest of the usual stages, behind a begin() that took the block.
inline void run_usual(const UsualStages& usual, Block& b) {
  store_groups(usual.finish, b, 0, b.groups / 2);
  usual.encode[0](b);
  store_groups(usual.finish, b, b.groups / 2, b.groups);
  if (usual.encode[1] != nullptr) usual.encode[1](b);
}

/// A step of a block whose memory and hyperparameters are set.
inline void run_block(const KernelTable& kernels, const BlockKind& kind, Block& b) {
  const UsualStages& usual = usual_stages(kernels, kind);
  if (usual.begin != nullptr && usual.begin(b)) {
    run_usual(usual, b);
  } else {
    run_stages(kernels, kind, b);
  }
}

}  // namespace flashoptim::cpu
