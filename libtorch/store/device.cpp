#include "libtorch/store/device.h"

#include <dlfcn.h>

#include <stdexcept>

#if FLASHOPTIM_HAS_CUDA
#include "flashoptim/cuda.h"
#endif
#include "libtorch/store/tensor.h"

namespace flashoptim::store {
namespace {

/// Fewer blocks (of 1,024 elements) are not worth another thread: 64 of them take some 30 us.
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
#if FLASHOPTIM_HAS_CUDA
  static const int32_t cuda = aoti_torch_device_type_cuda();
  if (device.type == cuda) return Backend::kCuda;
#endif
  std::string message = std::string("flashoptim::") + op + ": " + argument + " is on " + device_name(device) +
                        ", but this build of flashoptim runs on ";
#if FLASHOPTIM_HAS_CUDA
  message += "cpu and cuda only";
#else
  message += "cpu only";
  if (device.type == aoti_torch_device_type_cuda()) {
    message += "; for CUDA, build with nvcc on PATH and -DFLASHOPTIM_CUDA=ON, or install a wheel built that way";
  }
#endif
  throw std::runtime_error(message);
}

void* current_stream(Device device) {
  // By name: torch's CUDA library is there where CUDA tensors are, and this library must load without it. torch loads
  // its libraries locally, so a weak symbol would stay null.
  using GetStream = AOTITorchError (*)(int32_t device_index, void** stream);
  static const GetStream get_stream = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(found);
  }();
  if (get_stream == nullptr) {
    throw std::runtime_error(
        "flashoptim: " + device_name(device) +
        " is in use, but libtorch_cuda.so with aoti_torch_get_current_cuda_stream is not loaded: is this "
        "torch built with CUDA?");
  }
  void* stream = nullptr;
  check_torch(get_stream(device.index, &stream), "get_current_cuda_stream");
  return stream;
}

bool is_capturing(Device device) {
#if FLASHOPTIM_HAS_CUDA
  if (device.type == aoti_torch_device_type_cuda()) {
    bool capturing = false;
    const Status status = cuda::is_capturing(current_stream(device), &capturing);
    if (!status.is_ok()) throw std::runtime_error("flashoptim: " + std::string(status.message()));
    return capturing;
  }
#endif
  static_cast<void>(device);
  return false;
}

void parallel_for_erased(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  // torch's pool is OpenMP's, whose threads a child of fork() does not have: it would wait for them for ever.
  if (is_forked_child()) return body(context, 0, count);
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

}  // namespace flashoptim::store
