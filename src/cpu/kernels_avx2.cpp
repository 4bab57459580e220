#include "src/cpu/avx2/table-inl.h"

namespace flashoptim::cpu {

const KernelTable kAvx2Kernels = avx2::Hot::table("avx2");

}  // namespace flashoptim::cpu
