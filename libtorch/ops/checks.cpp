#include "libtorch/ops/checks.h"

#include <cmath>
#include <utility>

namespace flashoptim::ops {

int slots_per_tensor(Op op, OptimizerKind optimizer, const char* argument, size_t size, size_t tensors,
                     bool* has_momentum) {
  const size_t with = static_cast<size_t>(state_count(optimizer, true)),
               without = static_cast<size_t>(state_count(optimizer, false));
  if (size != with * tensors && size != without * tensors) {
    std::string allowed = std::to_string(with * tensors);
    if (without != with) allowed += " (with momentum) or " + std::to_string(without * tensors) + " (without)";
    op.fail(std::string(argument) + " has " + std::to_string(size) + " tensors; needed for " + std::to_string(tensors) +
            " params are " + allowed);
  }
  *has_momentum = size == with * tensors;
  return static_cast<int>(*has_momentum ? with : without);
}

void check_count(Op op, const char* argument, size_t size, size_t wanted) {
  if (size != wanted) {
    op.fail(std::string(argument) + " has " + std::to_string(size) + " entries; needed are " + std::to_string(wanted) +
            ", one per tensor of params");
  }
}

void unpack_hypers(Op op, const std::vector<double>& values, OptimizerKind optimizer, StepNumber step,
                   std::vector<Hyperparameters>* hypers) {
  const auto count = static_cast<size_t>(hyperparameter_count(optimizer));
  if (values.size() % count != 0) {
    op.fail("hypers has " + std::to_string(values.size()) + " numbers; needed for " + optimizer_name(optimizer) +
            " are " + std::to_string(count) + " per set");
  }
  for (size_t set = 0; set * count < values.size(); ++set) {
    Hyperparameters& p = hypers->emplace_back();
    for (size_t i = 0; i < count; ++i) {
      const size_t place = set * count + i;
      const auto index = static_cast<int64_t>(i);
      if (step == StepNumber::kOpen && index == kStepIndex && values[place] == 0) {
        p.step = 0;
        continue;
      }
      const Status status = set_hyperparameter(optimizer, index, values[place], &p);
      if (!status.is_ok()) {
        op.fail("hypers[" + std::to_string(place) + "] (set " + std::to_string(set) + "): " + status.message());
      }
    }
  }
}

float checked_grad_scale(Op op, double value) {
  const auto scale = static_cast<float>(value);
  if (!std::isfinite(scale)) op.fail("grad_scale = " + number(value) + "; must be a finite float32");
  return scale;
}

void* unpack_array(Op op, Name name, AtenTensorHandle tensor, int32_t dtype, int64_t count, Device device) {
  if (tensor == nullptr) return nullptr;
  const TensorInfo info = read_tensor(op, name, tensor);
  check_dtype(op, name, info.dtype, dtype, "this argument");
  if (info.numel != count) {
    op.fail(name.str() + " has shape " + ints(info.sizes, info.dim) + "; needed is " + std::to_string(count) +
            (count == 1 ? " element" : " elements"));
  }
  check_contiguous(op, name, info);
  check_device(op, name, info.device, {"params", 0}, device);
  return mutable_data(tensor);
}

OptimizerKind parse_optimizer(Op op, const std::string& name) {
  OptimizerKind kind{};
  const Status status = find_optimizer(name.c_str(), &kind);
  if (!status.is_ok()) op.fail(status.message());
  return kind;
}

MasterWeights parse_master_weights(Op op, const std::string& argument, int64_t value) {
  if (value < 0 || value > static_cast<int64_t>(MasterWeights::kCorrection16Nearest)) {
    op.fail(
        argument + " = " + std::to_string(value) +
        "; allowed are 0 (none), 1 (none, stochastic), 2 (8 bit), 3 (16 bit), 4 (8 bit, nearest), 5 (16 bit, nearest)");
  }
  return static_cast<MasterWeights>(value);
}

StateCodec parse_state_codec(Op op, const std::string& argument, int64_t value) {
  if (value < 0 || value > static_cast<int64_t>(StateCodec::kDefault)) {
    op.fail(argument + " = " + std::to_string(value) + "; allowed are 0 (float32), 1 (paper), 2 (default)");
  }
  return static_cast<StateCodec>(value);
}

store::Shard parse_shard(Op op, const std::vector<int64_t>& numbers) {
  if (numbers.empty()) return {};
  if (static_cast<int64_t>(numbers.size()) != kPlaceNumbers) {
    op.fail("place has " + std::to_string(numbers.size()) + " numbers; needed are none or " +
            std::to_string(kPlaceNumbers));
  }
  return {{numbers[0], numbers[1], numbers[2], {numbers[3], numbers[4]}}, numbers[5]};
}

DType parse_dtype(Op op, const std::string& argument, int64_t value) {
  if (value < 0 || value > static_cast<int64_t>(DType::kFloat16)) {
    op.fail(argument + " = " + std::to_string(value) + "; allowed are 0 (float32), 1 (bfloat16), 2 (float16)");
  }
  return static_cast<DType>(value);
}

}  // namespace flashoptim::ops
