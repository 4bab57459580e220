#include "libtorch/ops/checks.h"

#include <cmath>
#include <iterator>
#include <utility>

namespace flashoptim::ops {
namespace {

constexpr const char* kHyperNames[] = {"lr",        "beta1",    "beta2",    "eps",      "weight_decay", "momentum",
                                       "dampening", "decay_lr", "nesterov", "maximize", "step",         "seed"};
constexpr size_t kHyperCount = std::size(kHyperNames);

}  // namespace

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

void unpack_hypers(Op op, const std::vector<double>& values, OptimizerKind optimizer,
                   std::vector<Hyperparameters>* hypers) {
  static_cast<void>(optimizer);
  if (values.size() % kHyperCount != 0) {
    op.fail("hypers has " + std::to_string(values.size()) + " numbers; needed are " + std::to_string(kHyperCount) +
            " per set");
  }
  for (size_t set = 0; set * kHyperCount < values.size(); ++set) {
    const double* v = values.data() + set * kHyperCount;
    const auto need = [&](size_t field, bool ok, const char* allowed) {
      if (ok) return;
      op.fail("hypers[" + std::to_string(set * kHyperCount + field) + "] (" + kHyperNames[field] + " of set " +
              std::to_string(set) + ") = " + number(v[field]) + "; " + allowed);
    };
    const auto finite_positive = [&](size_t field) {
      need(field, std::isfinite(v[field]) && v[field] >= 0, "must be finite and at least 0");
    };
    const auto is_flag = [&](size_t field) { need(field, v[field] == 0 || v[field] == 1, "must be 0 or 1"); };
    constexpr double kTwo53 = 9007199254740992.0;  // from here on a double skips integers
    finite_positive(0);
    for (const size_t beta : {1, 2}) need(beta, v[beta] >= 0 && v[beta] < 1, "must be at least 0 and below 1");
    for (const size_t field : {3, 4, 5, 7}) finite_positive(field);
    need(6, std::isfinite(v[6]), "must be finite");
    is_flag(8);
    is_flag(9);
    need(10, v[10] >= 0 && v[10] < kTwo53 && v[10] == std::floor(v[10]), "must be an integer of at least 0");
    need(11, v[11] >= 0 && v[11] < kTwo53 && v[11] == std::floor(v[11]),
         "must be an integer of at least 0 and below 2^53");
    hypers->push_back({v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8] != 0, v[9] != 0,
                       static_cast<int64_t>(v[10]), static_cast<uint64_t>(v[11])});
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
  constexpr std::pair<const char*, OptimizerKind> kNames[] = {{"adamw", OptimizerKind::kAdamW},
                                                              {"adam", OptimizerKind::kAdam},
                                                              {"sgd", OptimizerKind::kSgd},
                                                              {"sgdw", OptimizerKind::kSgdw},
                                                              {"lion", OptimizerKind::kLion}};
  for (const auto& [known, kind] : kNames) {
    if (name == known) return kind;
  }
  op.fail("optimizer = '" + name + "'; allowed are adamw, adam, sgd, sgdw, lion");
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
