// New states: zero bytes, which every codec decodes to 0.
#include <algorithm>

#include "flashoptim/cuda.h"
#include "src/cuda/device.h"

namespace flashoptim::cuda {
namespace {

constexpr int kZeroThreads = 256;

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

Status zero(void* const* arrays, const int64_t* bytes, int64_t count, int32_t device, void* stream) {
  for (int64_t i = 0; i < count; ++i) {
    if (bytes[i] < 0 || (bytes[i] > 0 && arrays[i] == nullptr)) {
      return Status::invalid_argument("arrays[" + std::to_string(i) + "] is null or has a negative size, " +
                                      std::to_string(bytes[i]));
    }
  }
  DeviceGuard guard(device);
  Status status = device_status(guard.error(), "cannot use the device of the arrays");
  int multiprocessors = 0;
  if (status.is_ok()) {
    status = device_status(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                           "cudaDeviceGetAttribute");
  }
  for (int64_t begin = 0; status.is_ok() && begin < count; begin += kZeroArrays) {
    ZeroArguments args;
    args.count = static_cast<int32_t>(std::min<int64_t>(kZeroArrays, count - begin));
    int64_t largest = 0;
    for (int32_t i = 0; i < args.count; ++i) {
      args.arrays[i] = static_cast<unsigned char*>(arrays[begin + i]);
      args.bytes[i] = bytes[begin + i];
      largest = std::max(largest, bytes[begin + i]);
    }
    if (largest == 0) continue;
    constexpr int64_t kBlockBytes = kZeroThreads * static_cast<int64_t>(sizeof(uint4));
    const auto most = static_cast<int64_t>(kZeroBlocksPerMultiprocessor) * multiprocessors;
    const auto blocks = static_cast<int>(std::min(most, (largest + kBlockBytes - 1) / kBlockBytes));
    status =
        device_status(static_cast<cudaError_t>(launch_zero(args, blocks, stream)), "launching the zeroing of states");
  }
  return status;
}

}  // namespace flashoptim::cuda
