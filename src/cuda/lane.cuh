// The lane type of the CUDA kernels, and what the quad of threads that holds a group does together.
#pragma once

#include "flashoptim/core/lanes.h"
#include "src/cuda/tuning.h"

namespace flashoptim::cuda {

using Lane = float;

/// Reductions over a group; every thread of the warp takes part and gets its group's result.
__device__ __forceinline__ uint32_t group_int_max(uint32_t a) {
#pragma unroll
  for (int step = 1; step < kThreadsPerGroup; step *= 2) a = core::int_max(a, __shfl_xor_sync(0xffffffffu, a, step));
  return a;
}
__device__ __forceinline__ uint32_t group_unsigned_min(uint32_t a) {
#pragma unroll
  for (int step = 1; step < kThreadsPerGroup; step *= 2) a = core::unsigned_min(a, __shfl_xor_sync(0xffffffffu, a, step));
  return a;
}

}  // namespace flashoptim::cuda
