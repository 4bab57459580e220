#include "src/cpu/lanes_avx512-inl.h"
#include "src/cpu/lanes_pair-inl.h"
//
#include "src/cpu/loops-inl.h"

namespace flashoptim::cpu {

const KernelTable kAvx512Kernels = Loops<core::PairFloat<core::Avx512Float>>::table("avx512");

}  // namespace flashoptim::cpu
