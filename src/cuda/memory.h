// A plan's device memory: from the caller's allocator or CUDA's, and kept alive by graphs that read it.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "flashoptim/cuda.h"

namespace flashoptim::cuda {

/// Lets this thread allocate and free while some stream is being captured: neither is the capture's work.
class RelaxedCapture {
 public:
  RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Whether launches go to the stream or into a graph.
enum class LaunchTarget { kStream, kGraph };

/// Has as many owners as keep it alive: its plan, and each graph that a launch of the plan was captured in.
class PlanMemory {
 public:
  /// `bytes` of memory on `device`, which must be current. Also frees what graphs have left behind.
  static Status allocate(int32_t device, int64_t bytes, const MakeOptions& options, PlanMemory** memory);
  /// What destroyed graphs have left behind, freed on this thread.
  static void free_abandoned();

  unsigned char* data() const { return data_; }

  /// In front of a plan's launches on `stream`: where it is being captured, its graph becomes an owner.
  Status before_launches(cudaStream_t stream, LaunchTarget* target);
  /// And behind them.
  void after_launches(cudaStream_t stream, LaunchTarget target);
  /// The plan gives its share back.
  void release();
  bool is_retained_forever() const { return is_retained_forever_; }

 private:
  PlanMemory() = default;
  ~PlanMemory() = default;
  void give_to(cudaGraph_t graph);
  void destroy();
  /// Of a graph's user object: on a thread of CUDA's, where CUDA must not be called.
  static void CUDART_CB abandon(void* memory);

  int32_t device_ = 0;
  unsigned char* data_ = nullptr;
  cudaStream_t stream_ = nullptr;
  DeviceAllocator allocator_;
  std::atomic<int> owners_{1};
  unsigned long long last_capture_ = 0;  // ids count from 1
  bool is_retained_forever_ = false;
  cudaEvent_t other_stream_ =
      nullptr;  // behind the last launches on another stream than stream_; only with an allocator
  bool other_stream_used_ = false;
  bool other_stream_lost_ = false;  // could not be marked
  PlanMemory* next_abandoned_ = nullptr;
};

}  // namespace flashoptim::cuda
