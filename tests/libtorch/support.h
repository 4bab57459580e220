// What the tests of the LibTorch front end share.
#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "flashoptim/optimizer_info.h"
#include "flashoptim/torch/flashoptim.h"

namespace flashoptim_test {

namespace flash = flashoptim::torch;
using torch::Tensor;

inline bool same_bytes(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const Tensor x = a.detach().contiguous(), y = b.detach().contiguous();
  return x.numel() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

/// Collects TORCH_WARN of its life.
class Warnings : public c10::WarningHandler {
 public:
  Warnings() : guard_(this) {}
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  std::vector<std::string> texts;

 private:
  c10::WarningUtils::WarningHandlerGuard guard_;
};

/// Copies of everything an optimizer can change.
struct Snapshot {
  std::vector<Tensor> tensors;
  std::vector<int64_t> steps;

  explicit Snapshot(const flash::FlashOptimizer& optimizer) {
    for (const auto& group : optimizer.param_groups()) {
      for (const Tensor& param : group.params()) {
        tensors.push_back(param.detach().clone());
        const flash::FlashParamState* state = optimizer.param_state(param);
        steps.push_back(state == nullptr ? -1 : state->step);
      }
    }
    for (const Tensor& tensor : optimizer.state_tensors()) tensors.push_back(tensor.clone());
  }

  bool operator==(const Snapshot& other) const {
    if (steps != other.steps || tensors.size() != other.tensors.size()) return false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!same_bytes(tensors[i], other.tensors[i])) return false;
    }
    return true;
  }
};

inline Tensor parameter(at::IntArrayRef sizes, int64_t seed, torch::Dtype dtype = torch::kBFloat16) {
  at::manual_seed(static_cast<uint64_t>(seed));
  return torch::randn(sizes).to(dtype).set_requires_grad(true);
}

/// The same gradient for the same (seed, sizes).
inline Tensor gradient(const Tensor& param, int64_t seed) {
  at::manual_seed(static_cast<uint64_t>(seed) + 1000);
  return torch::randn(param.sizes()).to(param.scalar_type());
}

inline void set_gradients(const std::vector<Tensor>& params, int64_t step) {
  int64_t i = 0;
  for (Tensor param : params) param.mutable_grad() = gradient(param, step * 100 + i++);
}

/// The message of the c10::Error that `call` throws, or "" where it throws none.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

/// Message contains every one of `parts`.
inline void expect_error(const std::function<void()>& call, const std::vector<std::string>& parts) {
  const std::string message = error_of(call);
  EXPECT_NE(message, "") << "nothing was thrown; expected " << parts.front();
  for (const std::string& part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << part << " is not in: " << message;
}

using MakeOptimizer = std::function<std::unique_ptr<flash::FlashOptimizer>(std::vector<Tensor>)>;

struct NamedOptimizer {
  std::string name;
  MakeOptimizer make;
};

template <class Optimizer>
MakeOptimizer maker(typename Optimizer::Options options) {
  return [options](std::vector<Tensor> params) { return std::make_unique<Optimizer>(std::move(params), options); };
}

/// Options under which no term vanishes: of what is not named here, counts are 5 and numbers above 1.
template <class Options>
Options busy_options() {
  Options options(1e-2);
  const std::string optimizer = flashoptim::optimizer_name(Options::kKind);
  if (optimizer == "lion") options.lr(1e-3);
  for (int64_t i = flashoptim::kCommonHyperparameters; i < flashoptim::hyperparameter_count(Options::kKind); ++i) {
    const flashoptim::HyperparameterInfo info = flashoptim::hyperparameter(Options::kKind, i);
    const std::string name = info.name;
    if (name == "eps") continue;
    const double value = name == "beta1"                                       ? 0.8
                         : name == "beta2"                                     ? 0.95
                         : name == "momentum"                                  ? 0.9
                         : name == "dampening"                                 ? (optimizer == "sgdw" ? 0.1 : 0.0)
                         : name == "nesterov"                                  ? (optimizer == "sgd" ? 1.0 : 0.0)
                         : info.kind == flashoptim::HyperparameterKind::kWhole ? 5.0
                         : info.highest == 1.0                                 ? 0.975
                                                                               : 0.5 * info.default_value + 1.0;
    options.set_number(name, value);
  }
  return options;
}

/// Every optimizer with options under which no term vanishes, and both codecs.
inline std::vector<NamedOptimizer> all_optimizers() {
  std::vector<NamedOptimizer> all;
  for (const std::string codec : {"default", "paper"}) {
#define ADD_OPTIMIZER(title)                                                                      \
  all.push_back({flashoptim::optimizer_name(flash::Flash##title::Options::kKind) + ("_" + codec), \
                 maker<flash::Flash##title>(busy_options<flash::Flash##title::Options>()          \
                                                .weight_decay(0.02)                               \
                                                .state_codec(codec)                               \
                                                .min_quantized_numel(64)                          \
                                                .seed(5))});
    FLASHOPTIM_FOR_EACH_OPTIMIZER(ADD_OPTIMIZER)
#undef ADD_OPTIMIZER
  }
  all.push_back({"sgd_plain", maker<flash::FlashSGD>(flash::FlashSGDOptions(1e-2).weight_decay(0.02))});
  all.push_back({"adamw_fp32_states", maker<flash::FlashAdamW>(flash::FlashAdamWOptions(1e-2).quantize(false))});
  all.push_back({"adamw_32bit", maker<flash::FlashAdamW>(
                                    flash::FlashAdamWOptions(1e-2).master_weight_bits(32).min_quantized_numel(0))});
  all.push_back(
      {"adamw_0bit_stochastic",
       maker<flash::FlashAdamW>(
           flash::FlashAdamWOptions(1e-2).master_weight_bits(0).stochastic_rounding(true).min_quantized_numel(0))});
  return all;
}

/// Parameters of all dtypes, of odd sizes, some below min_quantized_numel.
inline std::vector<Tensor> mixed_parameters() {
  return {parameter({33, 47}, 1),
          parameter({7}, 2),
          parameter({5, 3, 40}, 3, torch::kHalf),
          parameter({17, 32}, 4, torch::kFloat),
          parameter({0, 4}, 5),
          parameter({}, 6)};
}

}  // namespace flashoptim_test
