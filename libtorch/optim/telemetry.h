// Counts behind numerics_report(): tables that steps add to on their device, and what they come to by name.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "flashoptim/telemetry.h"
#include "flashoptim/torch/numerics.h"
#include "libtorch/store/format.h"

namespace flashoptim::libtorch {

class Telemetry {
 public:
  /// Whether steps are looked at.
  bool is_on = false;

  /// What a step adds to for records of these names, on `device`; `key` stands for them until settle().
  StepTelemetry* table(int64_t key, const std::function<std::vector<std::string>()>& names, at::Device device);
  /// Records are about to be planned otherwise: adds up what there is. Waits for the device.
  void settle();
  /// Every stride-th group is looked at: all of a small model.
  static int64_t stride(int64_t elements);
  std::map<std::string, ParameterNumerics> parameters() const;
  void reset();
  /// The tables as they are, for whoever must keep them alive.
  std::vector<at::Tensor> tensors() const;

  /// Throws where a step of `lr` may round away on the parameter's largest weight, which is measured once. `name`
  /// stands for it in the message.
  void check_learning_rate(OptimizerKind kind, const std::string& name, const at::Tensor& param, store::Format format,
                           double lr);
  void forget_largest() { largest_.clear(); }

 private:
  struct Table {
    std::vector<std::string> names;
    at::Tensor counts;  // int64 [names, sizeof(StepTelemetry) / 8]
  };
  void add_to(std::map<std::string, ParameterNumerics>* found) const;

  std::map<int64_t, Table> tables_;
  std::map<std::string, ParameterNumerics> settled_;
  std::unordered_map<const void*, double> largest_;
};

}  // namespace flashoptim::libtorch
