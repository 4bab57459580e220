#include "src/cuda/memory.h"

#include <mutex>
#include <new>
#include <string>

#include "src/cuda/device.h"

namespace flashoptim::cuda {
namespace {

// Not destroyed: graphs may be, at the process's end, behind everything else.
struct Abandoned {
  std::mutex mutex;
  PlanMemory* first = nullptr;
};
Abandoned& abandoned() {
  static Abandoned& list = *new Abandoned;
  return list;
}

/// The stream's capture: its number and the graph that it goes into.
cudaError_t capture_info(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                         cudaGraph_t* graph) {
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, status, id, graph, nullptr, nullptr, nullptr);
#else
  return cudaStreamGetCaptureInfo_v2(stream, status, id, graph, nullptr, nullptr);
#endif
}

/// What a failing attempt leaves must not look like a launch's failure.
void forget_error() { static_cast<void>(cudaGetLastError()); }

}  // namespace

Status PlanMemory::allocate(int32_t device, int64_t bytes, const MakeOptions& options, PlanMemory** memory) {
  free_abandoned();
  abandoned();  // made here, where memory may run out, rather than in a graph's destruction
  const auto stream = static_cast<cudaStream_t>(options.stream);
  const bool is_callers = options.allocator.allocate != nullptr;
  if (is_callers && options.allocator.free == nullptr)
    return Status::invalid_argument("options.allocator.free is null, but allocate is set");
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  Status status = device_status(cudaStreamIsCapturing(stream, &capture), "options.stream");
  if (!status.is_ok()) return status;
  if (capture != cudaStreamCaptureStatusNone)
    return Status::invalid_argument(
        "options.stream is being captured; make plans before a capture, or on another stream");

  auto* made = new PlanMemory;
  made->device_ = device;
  made->stream_ = stream;
  made->allocator_ = options.allocator;
  void* data = nullptr;
  if (is_callers) {
    data = options.allocator.allocate(options.allocator.user, bytes, options.stream);
    if (data == nullptr) {
      status = Status::out_of_memory("options.allocator.allocate gave no " + std::to_string(bytes) + " bytes");
    } else if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
      options.allocator.free(options.allocator.user, data);
      data = nullptr;
      status = Status::invalid_argument(
          "options.allocator.allocate gave memory that does not start at a multiple of 16 bytes");
    } else {
      status = device_status(cudaEventCreateWithFlags(&made->other_stream_, cudaEventDisableTiming),
                             "cudaEventCreateWithFlags for the plan");
    }
  } else {
    const cudaError_t error = cudaMalloc(&data, static_cast<size_t>(bytes));
    if (error == cudaErrorMemoryAllocation) {
      forget_error();
      status = Status::out_of_memory("cudaMalloc gave no " + std::to_string(bytes) + " bytes for the plan");
    } else {
      status = device_status(error, "cudaMalloc for the plan");
    }
  }
  made->data_ = static_cast<unsigned char*>(data);
  if (status.is_ok()) {
    *memory = made;
  } else {
    made->release();
  }
  return status;
}

Status PlanMemory::before_launches(cudaStream_t stream, LaunchTarget* target) {
  // Of anyone's earlier call: the checks behind launches would take it for theirs, when some have run. (An event that
  // has not come yet is no failure.)
  const cudaError_t earlier = cudaGetLastError();
  if (earlier != cudaSuccess && earlier != cudaErrorNotReady)
    return device_status(earlier, "a CUDA call before this one failed; nothing was launched");
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
  const Status status = device_status(capture_info(stream, &capture, &id, &graph), "options.stream");
  if (!status.is_ok()) {
    forget_error();
    return status;
  }
  if (capture == cudaStreamCaptureStatusInvalidated)
    return Status::device_error("options.stream's capture has been invalidated; nothing was launched");
  *target = capture == cudaStreamCaptureStatusActive ? LaunchTarget::kGraph : LaunchTarget::kStream;
  if (*target == LaunchTarget::kGraph && id != last_capture_) {
    last_capture_ = id;
    give_to(graph);
  }
  return status;
}

void PlanMemory::give_to(cudaGraph_t graph) {
  owners_.fetch_add(1);
  cudaUserObject_t object = nullptr;
  if (cudaUserObjectCreate(&object, this, abandon, 1, cudaUserObjectNoDestructorSync) != cudaSuccess) {
    // The share that nobody gives back.
    is_retained_forever_ = true;
    forget_error();
    return;
  }
  if (cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) == cudaSuccess) return;
  // The object is not released either, and so its share.
  is_retained_forever_ = true;
  forget_error();
}

void PlanMemory::after_launches(cudaStream_t stream, LaunchTarget target) {
  // CUDA's own cudaFree waits for the device; an allocator's owner was promised that other streams have finished. A
  // graph's replays have, when its user object goes.
  if (other_stream_ == nullptr || target == LaunchTarget::kGraph || stream == stream_) return;
  other_stream_used_ = true;
  if (cudaEventRecord(other_stream_, stream) == cudaSuccess) return;
  other_stream_lost_ = true;  // the step has been launched: no reason to call it failed
  forget_error();
}

void PlanMemory::release() {
  if (owners_.fetch_sub(1) == 1) destroy();
}

void PlanMemory::abandon(void* memory) {
  auto* const self = static_cast<PlanMemory*>(memory);
  if (self->owners_.fetch_sub(1) != 1) return;
  Abandoned& list = abandoned();
  const std::lock_guard<std::mutex> lock(list.mutex);
  self->next_abandoned_ = list.first;
  list.first = self;
}

void PlanMemory::free_abandoned() {
  PlanMemory* first = nullptr;
  {
    Abandoned& list = abandoned();
    const std::lock_guard<std::mutex> lock(list.mutex);
    std::swap(first, list.first);
  }
  while (first != nullptr) {
    PlanMemory* const next = first->next_abandoned_;
    first->destroy();
    first = next;
  }
}

void PlanMemory::destroy() {
  const DeviceGuard guard(device_);
  const RelaxedCapture relaxed;
  // Errors have nobody to go to here; they are those of a device or driver that is gone, and its memory with it.
  if (other_stream_ != nullptr) {
    if (other_stream_lost_) {
      static_cast<void>(cudaDeviceSynchronize());
    } else if (other_stream_used_) {
      static_cast<void>(cudaEventSynchronize(other_stream_));
    }
    static_cast<void>(cudaEventDestroy(other_stream_));
  }
  if (data_ != nullptr) {
    if (allocator_.allocate != nullptr) {
      allocator_.free(allocator_.user, data_);
    } else {
      static_cast<void>(cudaFree(data_));
    }
  }
  forget_error();
  delete this;
}

}  // namespace flashoptim::cuda
