// What offload.h needs of a CUDA device: two streams for copies, events, and host memory that they can reach.
#pragma once

#include <cstdint>
#include <memory>

#include "flashoptim/offload.h"

namespace flashoptim::cuda {

/// Copies on two streams of its own; kStep is the stream named by use_stream(). Copies from or to memory that is not
/// pinned are right, and the host waits for them.
class CopyStreams : public OffloadDevice {
 public:
  /// kDeviceError with CUDA's message where the device fails.
  static Status make(int32_t device, std::unique_ptr<CopyStreams>* made);
  /// What kStep is from now on: a cudaStream_t.
  virtual void use_stream(void* stream) = 0;
};

/// Pins `bytes` of the host's memory at `memory`, whole pages, for copies of every device. kOutOfMemory, with how much
/// was wanted and what the limits are, where the host does not allow it.
Status pin_host_memory(void* memory, int64_t bytes, int32_t device);
/// Undoes it, before the memory goes. Copies under way must be over.
void unpin_host_memory(void* memory);

}  // namespace flashoptim::cuda
