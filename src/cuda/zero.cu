// New states: zero bytes, which every codec decodes to 0.
#include <cuda_runtime.h>

#include "src/cuda/arguments.h"

namespace flashoptim::cuda {
namespace {

/// Every block takes its part of every array.
__global__ void __launch_bounds__(kZeroThreads) zero_kernel(const __grid_constant__ ZeroArguments args) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kZeroThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kZeroThreads;
  for (int a = 0; a < args.count; ++a) {
    unsigned char* const array = args.arrays[a];
    const int64_t bytes = args.bytes[a];
    const int64_t before = min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(array) % sizeof(uint4)));
    const int64_t units = (bytes - before) / static_cast<int64_t>(sizeof(uint4));
    auto* const aligned = reinterpret_cast<uint4*>(array + before);
    for (int64_t i = first; i < units; i += stride) aligned[i] = uint4{};
    // Fewer bytes than a unit on either side.
    const int64_t after = before + units * static_cast<int64_t>(sizeof(uint4));
    if (first < before) array[first] = 0;
    if (first < bytes - after) array[after + first] = 0;
  }
}

}  // namespace

int launch_zero(const ZeroArguments& args, int blocks, void* stream) {
  zero_kernel<<<blocks, kZeroThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace flashoptim::cuda
