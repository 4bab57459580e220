#define FLASHOPTIM_AVX512 avx512
#include "src/cpu/hot_avx512-inl.h"

namespace flashoptim::cpu {

const KernelTable kAvx512Kernels = HotAvx512::table("avx512");

}  // namespace flashoptim::cpu
