#define FLASHOPTIM_AVX512 avx512
#include "src/cpu/avx512/table-inl.h"

namespace flashoptim::cpu {

const KernelTable kAvx512Kernels = HotAvx512::table("avx512");

}  // namespace flashoptim::cpu
