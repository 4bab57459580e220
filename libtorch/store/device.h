// Where a call runs: the only place that knows which devices there are.
#pragma once

#include <cstdint>
#include <string>

#include "flashoptim/step.h"

namespace flashoptim::store {

struct Device {
  int32_t type = 0;  // torch's code, as aoti_torch_get_device_type gives it
  int32_t index = 0;
  bool operator==(const Device&) const = default;
};

/// "cpu", "cuda:0", ...
std::string device_name(Device device);

#if FLASHOPTIM_HAS_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

enum class Backend {
  kMeta,  ///< tensors without data (torch.compile's tracing): shapes are all there is to do
  kCpu,
  kCuda,
};

/// The back end for tensors on `device`; throws where this build has none, saying how to get one.
Backend select_backend(const char* op, const std::string& argument, Device device);

/// The CUDA stream that torch's work on `device` goes to at the moment.
void* current_stream(Device device);

/// Whether a CUDA graph is being captured from that stream; of no other device.
bool is_capturing(Device device);

/// `options` with the threads of the host: torch's own pool.
StepOptions with_torch_threads(StepOptions options);

/// Runs body(begin, end) over [0, count) in torch's pool, at least `grain` a thread.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body body);

void parallel_for_erased(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end),
                         void* context);

template <class Body>
void parallel_for(int64_t count, int64_t grain, Body body) {
  parallel_for_erased(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      &body);
}

}  // namespace flashoptim::store
