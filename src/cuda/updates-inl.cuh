// The kernels that bring what has changed to the plan's table of tensors.
#pragma once

#include <cuda_runtime.h>

#include "src/cuda/arguments.h"

namespace flashoptim::cuda {

inline constexpr int kUpdateThreads = 256;

template <int capacity>
__global__ void gradients_kernel(const __grid_constant__ GradientArguments<capacity> args) {
  const int i = static_cast<int>(blockIdx.x) * kUpdateThreads + static_cast<int>(threadIdx.x);
  if (i < args.count) args.tensors[i].gradient = args.gradients[i];
}

template <int capacity>
int launch_gradients(const GradientArguments<capacity>& args, void* stream) {
  const int blocks = (args.count + kUpdateThreads - 1) / kUpdateThreads;
  gradients_kernel<<<blocks, kUpdateThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

/// A thread for each word.
template <int capacity>
__global__ void entries_kernel(const __grid_constant__ EntryArguments<capacity> args) {
  constexpr int kWords = sizeof(TensorEntry) / 4;
  const int i = static_cast<int>(blockIdx.x) * kUpdateThreads + static_cast<int>(threadIdx.x);
  if (i >= args.count * kWords) return;
  const int entry = i / kWords, word = i % kWords;
  reinterpret_cast<uint32_t*>(args.tensors + args.indices[entry])[word] =
      reinterpret_cast<const uint32_t*>(&args.entries[entry])[word];
}

template <int capacity>
int launch_entries(const EntryArguments<capacity>& args, void* stream) {
  const int words = args.count * static_cast<int>(sizeof(TensorEntry) / 4);
  const int blocks = (words + kUpdateThreads - 1) / kUpdateThreads;
  entries_kernel<<<blocks, kUpdateThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace flashoptim::cuda
