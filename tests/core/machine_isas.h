// The kernel tables that this processor can run, found out without asking the code under test.
#pragma once

#include <vector>

#include "src/cpu/kernels.h"

namespace flashoptim::test {

inline std::vector<const cpu::KernelTable*> machine_tables() {
  std::vector<const cpu::KernelTable*> tables{&cpu::kScalarKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) tables.push_back(&cpu::kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&cpu::kAvx512Kernels);
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) tables.push_back(&cpu::kAvx512Bf16Kernels);
  }
#endif
  return tables;
}

}  // namespace flashoptim::test
