#include <cuda_runtime_api.h>
#include <sys/resource.h>

#include <fstream>
#include <string>
#include <vector>

#include "flashoptim/cuda_offload.h"
#include "src/checks.h"
#include "src/cuda/device.h"

namespace flashoptim::cuda {
namespace {

class TwoCopyStreams final : public CopyStreams {
 public:
  explicit TwoCopyStreams(int32_t device) : device_(device) {}
  ~TwoCopyStreams() override {
    const DeviceGuard guard(device_);
    // Errors have nobody to go to here; they are those of a device or driver that is gone.
    for (const cudaStream_t stream : {up_, down_}) {
      if (stream == nullptr) continue;
      static_cast<void>(cudaStreamSynchronize(stream));
      static_cast<void>(cudaStreamDestroy(stream));
    }
    for (const cudaEvent_t event : events_) static_cast<void>(cudaEventDestroy(event));
    static_cast<void>(cudaGetLastError());
  }

  Status start() {
    return on_device("cudaStreamCreateWithFlags", [&] {
      const cudaError_t error = cudaStreamCreateWithFlags(&up_, cudaStreamNonBlocking);
      return error == cudaSuccess ? cudaStreamCreateWithFlags(&down_, cudaStreamNonBlocking) : error;
    });
  }

  void use_stream(void* stream) override { step_ = static_cast<cudaStream_t>(stream); }
  void* step_stream() const override { return step_; }

  Status copy_up(void* device, const void* host, int64_t bytes) override {
    return on_device("copying states to the device", [&] {
      return cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, up_);
    });
  }
  Status copy_down(void* host, const void* device, int64_t bytes) override {
    return on_device("copying states to the host", [&] {
      return cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, down_);
    });
  }
  Status make_event(int64_t* event) override {
    return on_device("cudaEventCreateWithFlags", [&] {
      cudaEvent_t made = nullptr;
      const cudaError_t error = cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
      if (error != cudaSuccess) return error;
      *event = static_cast<int64_t>(events_.size());
      events_.push_back(made);
      return error;
    });
  }
  Status record(int64_t event, OffloadQueue queue) override {
    return on_device("cudaEventRecord", [&] { return cudaEventRecord(at(event), stream(queue)); });
  }
  Status wait(OffloadQueue queue, int64_t event) override {
    return on_device("cudaStreamWaitEvent", [&] { return cudaStreamWaitEvent(stream(queue), at(event), 0); });
  }
  Status synchronize(int64_t event) override {
    return on_device("cudaEventSynchronize", [&] { return cudaEventSynchronize(at(event)); });
  }

 private:
  template <class Call>
  Status on_device(const char* what, Call call) {
    const DeviceGuard guard(device_);
    if (guard.error() != cudaSuccess) return device_status(guard.error(), "cannot use the device of the states");
    const cudaError_t error = call();
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // told here, not by the next launch
    return device_status(error, what);
  }
  cudaEvent_t at(int64_t event) const { return events_[static_cast<size_t>(event)]; }
  cudaStream_t stream(OffloadQueue queue) const {
    if (queue == OffloadQueue::kUp) return up_;
    return queue == OffloadQueue::kDown ? down_ : step_;
  }

  int32_t device_;
  cudaStream_t up_ = nullptr, down_ = nullptr, step_ = nullptr;
  std::vector<cudaEvent_t> events_;
};

std::string gigabytes(double bytes) {
  std::string text = std::to_string(bytes / 1e9);
  return text.substr(0, text.find('.') + 3) + " GB";
}

/// The first word of a file, or of a line of it that begins with `key`; empty where there is none.
std::string read_word(const char* path, const std::string& key = {}) {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    if (key.empty()) return word;
    if (word == key) return file >> word ? word : std::string();
  }
  return {};
}

/// What a process may pin, as far as the system says.
std::string limits() {
  std::string text = "the limit of locked memory (ulimit -l) is ";
  rlimit limit{};
  const bool is_known = getrlimit(RLIMIT_MEMLOCK, &limit) == 0;
  text += !is_known                         ? "unknown"
          : limit.rlim_cur == RLIM_INFINITY ? "unlimited"
                                            : gigabytes(static_cast<double>(limit.rlim_cur));
  const std::string available = read_word("/proc/meminfo", "MemAvailable:");
  if (!available.empty()) text += ", memory available " + gigabytes(std::stod(available) * 1024.0);
  const std::string container = read_word("/sys/fs/cgroup/memory.max");
  if (!container.empty()) {
    text += ", the container's memory limit " + (container == "max" ? "none" : gigabytes(std::stod(container)));
  }
  return text;
}

}  // namespace

Status CopyStreams::make(int32_t device, std::unique_ptr<CopyStreams>* made) {
  return guarded([&] {
    if (made == nullptr) return Status::invalid_argument("made is null");
    auto streams = std::make_unique<TwoCopyStreams>(device);
    const Status status = streams->start();
    if (status.is_ok()) *made = std::move(streams);
    return status;
  });
}

Status pin_host_memory(void* memory, int64_t bytes, int32_t device) {
  return guarded([&] {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return device_status(guard.error(), "cannot use the device of the states");
    const cudaError_t error = cudaHostRegister(memory, static_cast<size_t>(bytes), cudaHostRegisterPortable);
    if (error == cudaSuccess) return Status::ok();
    static_cast<void>(cudaGetLastError());
    return Status::out_of_memory("the host does not pin " + gigabytes(static_cast<double>(bytes)) +
                                 " of memory for states (" + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error) + "); " + limits());
  });
}

void unpin_host_memory(void* memory) {
  static_cast<void>(cudaHostUnregister(memory));
  static_cast<void>(cudaGetLastError());
}

}  // namespace flashoptim::cuda
