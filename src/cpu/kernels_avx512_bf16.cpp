#define FLASHOPTIM_AVX512 avx512_bf16
#include "src/cpu/avx512/table-inl.h"

namespace flashoptim::cpu {

const KernelTable kAvx512Bf16Kernels = HotAvx512::table("avx512_bf16");

}  // namespace flashoptim::cpu
