// Run-time choice of instruction set: the best this processor has, or the one FLASHOPTIM_ISA names.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

#include "flashoptim/step.h"
#include "src/checks.h"
#include "src/cpu/kernels.h"

namespace flashoptim::cpu {
namespace {

struct Choice {
  const KernelTable* table = nullptr;
  Status status;
};

#if defined(__x86_64__)
/// Clang before 15 knows no __builtin_cpu_supports("f16c"). (Whether the system keeps the registers, "avx2" says.)
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

bool machine_has(const char* isa) {
  if (std::strcmp(isa, "scalar") == 0) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "avx512_bf16") == 0) {
    return avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  }
#elif defined(__aarch64__)
  if (std::strcmp(isa, "neon") == 0) return true;
#endif
  return false;
}

// Best first.
const KernelTable* const kTables[] = {
#if defined(__x86_64__)
    &kAvx512Bf16Kernels,
    &kAvx512Kernels,
    &kAvx2Kernels,
#elif defined(__aarch64__)
    &kNeonKernels,
#endif
    &kScalarKernels,
};

Choice choose() {
  const char* forced = std::getenv("FLASHOPTIM_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (const KernelTable* table : kTables) {
      if (machine_has(table->isa)) return {table, Status::ok()};
    }
  }
  for (const KernelTable* table : kTables) {
    if (std::strcmp(forced, table->isa) != 0) continue;
    if (machine_has(forced)) return {table, Status::ok()};
    return {nullptr, Status::unsupported(std::string("FLASHOPTIM_ISA=") + forced +
                                         ": this machine's processor lacks that instruction set; unset the variable "
                                         "or set it to one it has (scalar always works)")};
  }
  std::string allowed;
  for (const KernelTable* table : kTables) allowed = table->isa + (allowed.empty() ? "" : ", " + allowed);
  return {nullptr, Status::unsupported(std::string("FLASHOPTIM_ISA=") + forced +
                                       ": not an instruction set; allowed are " + allowed)};
}

}  // namespace

const KernelTable* find_kernels(const char* isa) {
  for (const KernelTable* table : kTables) {
    if (std::strcmp(isa, table->isa) == 0 && machine_has(isa)) return table;
  }
  return nullptr;
}

const KernelTable* select_kernels(Status* status) {
  static const Choice choice = choose();
  *status = choice.status;
  return choice.table;
}

}  // namespace flashoptim::cpu

namespace flashoptim {

Status cpu_isa(const char** name) {
  return guarded([&] {
    if (name == nullptr) return Status::invalid_argument("name is null");
    Status status = check_aligned(name, "name");
    if (!status.is_ok()) return status;
    const cpu::KernelTable* table = cpu::select_kernels(&status);
    if (table != nullptr) *name = table->isa;
    return status;
  });
}

}  // namespace flashoptim
