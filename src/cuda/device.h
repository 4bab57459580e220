// What the host files of the CUDA back end share: errors, the current device, a tensor as kernels read it.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "flashoptim/types.h"
#include "src/checks.h"
#include "src/cuda/arguments.h"

namespace flashoptim::cuda {

inline Status device_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::ok();
  return Status::device_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

/// Of a launch function.
inline Status launched(int error, const char* what) { return device_status(static_cast<cudaError_t>(error), what); }

/// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
    // The failure is reported here: the next launch must not find it again.
    if (error_ != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int previous_ = 0;
  bool changed_ = false;
};

/// Whether scales are where the kernels can read them as 16-bit numbers.
Status check_scales(const ParameterTensors& tensor, const TensorName& name);

/// Without its place in pieces, if it has one (PlanTables::entry).
TensorEntry make_entry(const ParameterTensors& tensor);

}  // namespace flashoptim::cuda
