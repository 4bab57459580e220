// Host side of zeroing: checks, the device, a launch.
#include <algorithm>
#include <string>

#include "flashoptim/cuda.h"
#include "src/cuda/device.h"

namespace flashoptim::cuda {

namespace {

Status zero_checked(void* const* arrays, const int64_t* bytes, int64_t count, int32_t device, void* stream) {
  if (count < 0) return Status::invalid_argument("count = " + std::to_string(count) + "; must be at least 0");
  if (count > 0 && (arrays == nullptr || bytes == nullptr)) {
    return Status::invalid_argument(std::string(arrays == nullptr ? "arrays" : "bytes") + " is null; it must have " +
                                    std::to_string(count) + " entries");
  }
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
    constexpr int64_t kBlockBytes = kZeroThreads * 16;
    const auto most = static_cast<int64_t>(kZeroBlocksPerMultiprocessor) * multiprocessors;
    const auto blocks = static_cast<int>(std::min(most, (largest + kBlockBytes - 1) / kBlockBytes));
    status =
        device_status(static_cast<cudaError_t>(launch_zero(args, blocks, stream)), "launching the zeroing of states");
  }
  return status;
}

}  // namespace

Status zero(void* const* arrays, const int64_t* bytes, int64_t count, int32_t device, void* stream) {
  return guarded([&] { return zero_checked(arrays, bytes, count, device, stream); });
}

}  // namespace flashoptim::cuda
