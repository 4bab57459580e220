#include "src/cpu/lanes_avx2-inl.h"
//
#include "src/cpu/loops-inl.h"

namespace flashoptim::cpu {

const KernelTable kAvx2Kernels = Loops<core::Avx2Float>::table("avx2");

}  // namespace flashoptim::cpu
