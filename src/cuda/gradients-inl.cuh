// The kernel that brings new gradient addresses to the plan's table.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/arguments.h"

namespace flashoptim::cuda {

inline constexpr int kGradientThreads = 256;

template <int capacity>
__global__ void gradients_kernel(const __grid_constant__ GradientArguments<capacity> args) {
  const int i = static_cast<int>(blockIdx.x) * kGradientThreads + static_cast<int>(threadIdx.x);
  if (i < args.count) args.tensors[i].gradient = args.gradients[i];
}

template <int capacity>
int launch_gradients(const GradientArguments<capacity>& args, void* stream) {
  const int blocks = (args.count + kGradientThreads - 1) / kGradientThreads;
  gradients_kernel<<<blocks, kGradientThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace flashoptim::cuda
