// The torch-free CUDA entry: the sibling of step.h for tensors in device memory, with the same bits.
//
//   flashoptim::cuda::Plan plan;
//   flashoptim::Status status =
//       flashoptim::cuda::Plan::make(flashoptim::OptimizerKind::kAdamW, false, tensors, count, device, &plan);
//   ...
//   flashoptim::cuda::StepOptions options;  options.stream = stream;
//   status = plan.step(&hyper, 1, options);
//
// Plan::make validates, allocates a little device memory and uploads the table of tensors. step(), step_some(),
// inspect() and gradient_norm() launch on the given stream and return: they allocate nothing, never wait for the device
// and can be captured in a CUDA graph. A plan may be used by one thread, and in one stream order, at a time; replays of
// its graphs belong to that order. The header needs no CUDA header.
//
// What a captured graph reads. A capture records addresses, gradients' addresses, hyperparameter indexes and
// hyperparameters as they are then, and a replay steps with these: set_gradient(), set_hyper_index(), set_tensor(), new
// hyperparameters and a new plan over the same tensors change the launches that follow, never a replay. Only what
// StepOptions and NormOptions point at (lr, step, found_inf, ...) and the tensors' own memory are read anew; the caller
// keeps those alive. The plan's own device memory is kept alive by the graph (a CUDA user object), so that destroying
// or remaking the plan leaves graphs that can be replayed: it is freed when the plan, the graph and all of its
// instances are gone, by the next call of make() or the next destruction of any plan, on that call's thread. Where CUDA
// refuses the graph its user object (retains_memory_forever() says so), the memory stays until the process ends.
#pragma once

#include <cstdint>
#include <memory>

#include "flashoptim/step.h"
#include "flashoptim/telemetry.h"
#include "flashoptim/types.h"

namespace flashoptim::cuda {

/// Result of Plan::gradient_norm, in device memory.
struct GradientNorm {
  double sum_of_squares;  ///< of the scaled gradients
  float norm;
  float coefficient;  ///< min(1, max_norm / (norm + epsilon)): StepOptions::clip_coefficient may point here
};

/// Pointers are to device memory, are read when the work runs, and may be null.
struct StepOptions {
  void* stream = nullptr;  ///< cudaStream_t; null is the default stream
  /// Gradients are multiplied by gradient_scale / *gradient_divisor * *clip_coefficient, in this order.
  float gradient_scale = 1.0f;
  const float* gradient_divisor = nullptr;  ///< torch.amp.GradScaler's grad_scale
  const float* clip_coefficient = nullptr;
  /// Set and non-zero: the step changes nothing.
  const float* found_inf = nullptr;
  /// Where set, the number of elements with NaN or infinite scaled gradients is added to it.
  int64_t* nonfinite_gradients = nullptr;
  /// Host arrays of one entry per hyperparameter set, or null; an entry replaces that set's lr or step ("capturable").
  const float* const* lr = nullptr;
  const int64_t* const* step = nullptr;
};

/// Where a plan's device memory comes from, for programs that have an allocator of their own. `allocate` is called
/// once, by Plan::make, on its thread, with the plan's device current and MakeOptions::stream as `stream`; the memory,
/// at a multiple of 16, may be such as only work on that stream may use for now: make() uses it there and waits. Null
/// is an error of make(), kOutOfMemory. `free` gets it back on the thread that destroys or remakes the plan or fails to
/// make it, or, where captured graphs outlive the plan, on that of a later make() or destruction; the plan's device is
/// current, and what any other stream has to do with the memory is done: work on MakeOptions::stream may still be in
/// flight, as is usual for allocators that go by stream. Neither may throw nor call a plan. Both, and `user`, must be
/// valid until the last memory is back.
struct DeviceAllocator {
  void* (*allocate)(void* user, int64_t bytes, void* stream) = nullptr;  ///< null: cudaMalloc and cudaFree
  void (*free)(void* user, void* memory) = nullptr;
  void* user = nullptr;
};

struct MakeOptions {
  void* stream = nullptr;  ///< for the uploads, which make() waits for; not one that is being captured
  DeviceAllocator allocator;
};

struct NormOptions {
  void* stream = nullptr;
  float gradient_scale = 1.0f;
  const float* gradient_divisor = nullptr;
  float max_norm = 0.0f;  ///< 0: coefficient is 1
  float epsilon = 1e-6f;
};

class Plan {
 public:
  Plan();
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  /// As flashoptim::Plan::make; every pointer of `tensors` is to memory that `device` can access, and scales are at
  /// even addresses. kDeviceError with CUDA's message where the device fails. Loads the kernels that its steps need, so
  /// that no step finds one missing.
  static Status make(OptimizerKind optimizer, bool has_momentum, const ParameterTensors* tensors, int64_t count,
                     int32_t device, Plan* plan, const MakeOptions& options = {});

  int64_t size() const;
  /// An empty one (every field as declared) where there is no tensor `index`.
  const ParameterTensors& tensor(int64_t index) const;
  int32_t device() const;
  /// Kernel launches that a step takes, apart from small ones that prepare it.
  int32_t launches() const;
  /// Whether a captured graph could not be given the plan's memory to keep, so that it is never freed.
  bool retains_memory_forever() const;

  // As flashoptim::Plan's. What they set travels to the device with the next launch that reads it, in that launch's
  // stream order: work in flight is not disturbed. Each costs the same however large the plan is.

  Status set_gradient(int64_t index, const void* gradient);
  Status set_gradients(const void* const* gradients);
  Status set_hyper_index(int64_t index, int32_t hyper_index);
  Status set_tensor(int64_t index, const ParameterTensors& tensor);

  /// One step over all tensors. `hypers` has `count` entries, indexed by ParameterTensors::hyper_index. All entries up
  /// to the largest index of a tensor with a gradient must be valid, but for what options replace on the device.
  Status step(const Hyperparameters* hypers, int64_t count, const StepOptions& options = {});

  /// As flashoptim::Plan::step_some. One tensor: one launch, in whose arguments everything about the tensor travels
  /// (with what only the device knows, a small one in front). More: as few launches as neighbours in the plan allow,
  /// and a small one that brings what has changed of these tensors.
  Status step_some(const int64_t* indices, int64_t count, const Hyperparameters* hypers, int64_t hyper_count,
                   const StepOptions& options = {});

  /// Everything that step() checks of its arguments, and nothing else. What is left to fail then is the device: an
  /// error that an earlier call has left, which step() says before it launches anything, or one that ends the CUDA
  /// context and every tensor in it.
  Status check_step(const Hyperparameters* hypers, int64_t count, const StepOptions& options = {}) const;

  /// As flashoptim::Plan::inspect, in one launch and the small ones that prepare it: what step() with the same
  /// arguments would do now. `telemetry` has size() entries in device memory; its numbers equal the CPU's. Errors are
  /// those of step(), a null `telemetry` and a stride below 1.
  Status inspect(const Hyperparameters* hypers, int64_t count, const StepOptions& options,
                 const InspectOptions& inspect_options, StepTelemetry* telemetry);

  /// Norm of all gradients of the plan as one vector and the clipping coefficient, to device memory. The order of
  /// summation depends on the plan alone: the same bits whatever the device, stream or load.
  Status gradient_norm(const NormOptions& options, GradientNorm* result);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The conversions of step.h for arrays that `device` can access: launched on `stream` (cudaStream_t, null: the default
// stream), not waited for. The same checks and the same bits, but for what NaNs carry.

Status merge_weights(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                     float* weights, int64_t count, int32_t device, void* stream);
Status split_weights(DType dtype, MasterWeights master_weights, const float* weights, void* parameter, void* correction,
                     int64_t count, int32_t device, void* stream);
Status decode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor, float* const* values,
                     int32_t device, void* stream);
Status encode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor,
                     const float* const* values, int32_t device, void* stream);

/// Zeroes `count` arrays of bytes[i] bytes, in one launch for up to 250 of them: new states, whatever their codec.
Status zero(void* const* arrays, const int64_t* bytes, int64_t count, int32_t device, void* stream);

/// *counter += 1 on the device, unless found_inf is set and non-zero: a step counter for StepOptions::step.
Status advance_step(int64_t* counter, const float* found_inf, int32_t device, void* stream);

/// Whether a CUDA graph is being captured from `stream`.
Status is_capturing(void* stream, bool* capturing);

}  // namespace flashoptim::cuda
