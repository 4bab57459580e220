#include "libtorch/ops/device.h"

#include <stdexcept>

#include "libtorch/ops/boxed.h"

namespace flashoptim::ops {
namespace {

/// Fewer blocks (of 512 elements) are not worth another thread: 64 of them take some 30 us.
constexpr int64_t kBlocksPerThread = 64;

}  // namespace

std::string device_name(Device device) {
  std::string index;
  if (device.index >= 0) index.append(":").append(std::to_string(device.index));
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.type == aoti_torch_device_type_meta()) return "meta";
  if (device.type == aoti_torch_device_type_cuda()) return "cuda" + index;
  if (device.type == aoti_torch_device_type_xpu()) return "xpu" + index;
  if (device.type == aoti_torch_device_type_mps()) return "mps" + index;
  return "device type " + std::to_string(device.type) + index;
}

Backend select_backend(const char* op, const std::string& argument, Device device) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), meta = aoti_torch_device_type_meta();
  if (device.type == cpu) return Backend::kCpu;
  if (device.type == meta) return Backend::kMeta;
  std::string message = std::string("flashoptim::") + op + ": " + argument + " is on " + device_name(device) +
                        ", but this build of flashoptim runs on cpu only";
  if (device.type == aoti_torch_device_type_cuda()) {
    message += "; for CUDA, build with nvcc on PATH and -DFLASHOPTIM_CUDA=ON, or install a wheel built that way";
  }
  throw std::runtime_error(message);
}

void parallel_for_erased(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  struct Call {
    void (*body)(void*, int64_t, int64_t);
    void* context;
  } call{body, context};
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    const auto* inner = static_cast<const Call*>(opaque);
    inner->body(inner->context, begin, end);
  };
  check_torch(torch_parallel_for(0, count, grain, run, &call), "torch_parallel_for");
}

StepOptions with_torch_threads(StepOptions options) {
  options.parallel_for = [](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    parallel_for_erased(count, kBlocksPerThread, body, context);
  };
  return options;
}

}  // namespace flashoptim::ops
