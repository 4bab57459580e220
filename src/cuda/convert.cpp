// Host side of the conversions: checks, the device, one launch.
#include <algorithm>
#include <iterator>

#include "flashoptim/cuda.h"
#include "src/checks.h"
#include "src/conversions.h"
#include "src/cuda/device.h"
#include "src/rules.h"

namespace flashoptim::cuda {
namespace {

Status run(const ConvertArguments& args, int32_t device, void* stream) {
  if (args.tensor.numel == 0) return Status::ok();
  DeviceGuard guard(device);
  const Status status = device_status(guard.error(), "cannot use the device of the tensor");
  if (!status.is_ok()) return status;
  return device_status(static_cast<cudaError_t>(launch_convert(args, stream)), "launching the conversion");
}

/// Kernels move whole words where every array allows it.
void add_values(float* values, int slot, ConvertArguments* args) {
  args->values[slot] = values;
  if (reinterpret_cast<uintptr_t>(values) % 16 != 0) args->tensor.flags &= static_cast<uint8_t>(~kVectorAligned);
}

Status convert_weights(Conversion conversion, DType dtype, MasterWeights master_weights, const void* parameter,
                       const void* correction, const float* weights, int64_t count, int32_t device, void* stream) {
  ParameterTensors t;
  const Status status = weights_tensor(dtype, master_weights, parameter, correction, weights, count, &t);
  if (!status.is_ok()) return status;
  ConvertArguments args{};
  args.tensor = make_entry(t);
  args.conversion = conversion;
  add_values(const_cast<float*>(weights), 0, &args);
  return run(args, device, stream);
}

Status convert_states(Conversion conversion, OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor,
                      const float* const* values, int32_t device, void* stream) {
  ParameterTensors t = tensor;
  Status status = check_states_tensor(optimizer, has_momentum, values, &t);
  if (status.is_ok()) status = check_scales(t, {"tensor"});
  if (!status.is_ok()) return status;
  ConvertArguments args{};
  args.tensor = make_entry(t);
  args.groups = t.layout.groups();
  args.conversion = conversion;
  args.rule = rule_kind(optimizer, has_momentum);
  args.codec = t.state_codec;
  if (t.layout.numel() == 0) return Status::ok();
  for (int k = 0; k < state_count(optimizer, has_momentum); ++k) add_values(const_cast<float*>(values[k]), k, &args);
  return run(args, device, stream);
}

}  // namespace

Status merge_weights(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                     float* weights, int64_t count, int32_t device, void* stream) {
  return guarded([&] {
    return convert_weights(Conversion::kMergeWeights, dtype, master_weights, parameter, correction, weights, count,
                           device, stream);
  });
}

Status split_weights(DType dtype, MasterWeights master_weights, const float* weights, void* parameter, void* correction,
                     int64_t count, int32_t device, void* stream) {
  return guarded([&] {
    return convert_weights(Conversion::kSplitWeights, dtype, master_weights, parameter, correction, weights, count,
                           device, stream);
  });
}

Status decode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor, float* const* values,
                     int32_t device, void* stream) {
  return guarded([&] {
    return convert_states(Conversion::kDecodeStates, optimizer, has_momentum, tensor, values, device, stream);
  });
}

Status encode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor,
                     const float* const* values, int32_t device, void* stream) {
  return guarded([&] {
    return convert_states(Conversion::kEncodeStates, optimizer, has_momentum, tensor, values, device, stream);
  });
}

}  // namespace flashoptim::cuda
