// The instruction sets that this processor has, and their kernel tables, found out without asking the code under test.
#pragma once

#include <string>
#include <vector>

#include "src/cpu/kernels.h"

namespace flashoptim::test {

/// The instruction sets that there are kernels for, each with those before it.
#if defined(__aarch64__)
inline constexpr const char* kIsas[] = {"scalar", "neon"};
#else
inline constexpr const char* kIsas[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
#endif

/// Those that this machine has, found out without the library.
inline std::vector<std::string> machine_isas() {
  std::vector<std::string> isas{"scalar"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) isas.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    isas.push_back("avx512");
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) isas.push_back("avx512_bf16");
  }
#elif defined(__aarch64__)
  isas.push_back("neon");
#endif
  return isas;
}

/// Their tables, in the same order.
inline std::vector<const cpu::KernelTable*> machine_tables() {
  std::vector<const cpu::KernelTable*> tables{&cpu::kScalarKernels};
#if defined(__x86_64__)
  tables.insert(tables.end(), {&cpu::kAvx2Kernels, &cpu::kAvx512Kernels, &cpu::kAvx512Bf16Kernels});
#elif defined(__aarch64__)
  tables.push_back(&cpu::kNeonKernels);
#endif
  tables.resize(machine_isas().size());
  return tables;
}

}  // namespace flashoptim::test
