#include "src/cpu/lanes_neon-inl.h"
//
#include "src/cpu/lanes_pair-inl.h"
//
#include "src/cpu/loops-inl.h"

namespace flashoptim::cpu {

// Two vectors as one lane type: 32 registers are enough for both chains.
const KernelTable kNeonKernels = Loops<core::PairFloat<core::NeonFloat>>::table("neon");

}  // namespace flashoptim::cpu
