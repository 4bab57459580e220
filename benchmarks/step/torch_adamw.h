// torch's own AdamW on the same memory, for comparison: what torch.optim.AdamW runs on the CPU.
#pragma once

#include <functional>
#include <string>

#include "benchmarks/step/shapes.h"

namespace flashoptim::benchmarks {

enum class TorchKind {
  kFusedFloat32,   ///< fused=True, everything fp32
  kFusedBFloat16,  ///< fused=True, everything bf16
  kForeach,        ///< foreach=True, everything fp32
};

/// Bytes held per parameter; 7/4 of it move in a step of the fused form.
int64_t torch_bytes_held(TorchKind kind);

/// The tensors in Arena memory, which the caller has reserved, and a function that takes one step.
std::function<void()> make_torch_adamw(TorchKind kind, const Workload& workload);

void set_torch_threads(int threads);
std::string torch_version();

}  // namespace flashoptim::benchmarks
