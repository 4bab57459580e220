#include "libtorch/optim/telemetry.h"

#include <c10/util/Exception.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>

#include "flashoptim/optimizer_info.h"

namespace flashoptim::libtorch {
namespace {

constexpr int64_t kNumbers = sizeof(StepTelemetry) / sizeof(int64_t);
static_assert(sizeof(StepTelemetry) == 48, "a table's row is six int64 numbers, the last of them a float and padding");
/// Elements up to which every group is looked at, and the share beyond: 1 / stride.
constexpr int64_t kSmallModel = int64_t{1} << 20, kStride = 64;
constexpr size_t kMostKept = 16;
/// A step is said to move a weight for certain if it is this many spacings of its stored values or more.
constexpr double kSpacingsNeeded = 1 / 0.49;
/// The share of lr that a step of a rule with a variance (Adam) is taken to have at least. Lion's is lr exactly, and
/// SGD's is taken as lr.
constexpr double kStepShare = 0.1;

/// Whether weights are rounded to nearest; where they are not, no update is lost on average.
bool rounds_to_nearest(MasterWeights master) {
  return master == MasterWeights::kNone || master == MasterWeights::kCorrection8Nearest ||
         master == MasterWeights::kCorrection16Nearest;
}

int mantissa_bits(at::ScalarType dtype) { return dtype == at::kFloat ? 23 : dtype == at::kHalf ? 10 : 7; }

/// The step that surely changes a stored weight as large as `largest`, with rounding to nearest.
double smallest_certain_step(double largest, at::ScalarType dtype, MasterWeights master) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(kSpacingsNeeded, exponent - 1 - mantissa_bits(dtype) - store::correction_bits(master));
}

}  // namespace

StepTelemetry* Telemetry::table(int64_t key, const std::function<std::vector<std::string>()>& names,
                                at::Device device) {
  auto found = tables_.find(key);
  if (found == tables_.end()) {
    if (tables_.size() >= kMostKept) settle();
    std::vector<std::string> made = names();
    const auto rows = static_cast<int64_t>(made.size());
    at::Tensor counts = at::zeros({rows, kNumbers}, at::TensorOptions().dtype(at::kLong).device(device));
    found = tables_.emplace(key, Table{std::move(made), std::move(counts)}).first;
  }
  return static_cast<StepTelemetry*>(found->second.counts.mutable_data_ptr());
}

void Telemetry::settle() {
  add_to(&settled_);
  tables_.clear();
}

int64_t Telemetry::stride(int64_t elements) { return elements <= kSmallModel ? 1 : kStride; }

void Telemetry::add_to(std::map<std::string, ParameterNumerics>* found) const {
  for (const auto& [key, table] : tables_) {
    const at::Tensor counts = table.counts.cpu();
    const auto* rows = static_cast<const StepTelemetry*>(counts.const_data_ptr());
    for (size_t i = 0; i < table.names.size(); ++i) {
      ParameterNumerics& total = (*found)[table.names[i]];
      total.examined += rows[i].examined;
      total.nonfinite_gradients += rows[i].nonfinite_gradients;
      total.lost_updates += rows[i].lost_updates;
      total.floored_codes += rows[i].floored_codes;
      total.saturated_codes += rows[i].saturated_codes;
      total.largest_update_ratio = std::max(total.largest_update_ratio, rows[i].largest_update_ratio);
    }
  }
}

std::map<std::string, ParameterNumerics> Telemetry::parameters() const {
  std::map<std::string, ParameterNumerics> found = settled_;
  add_to(&found);
  std::erase_if(found, [](const auto& item) {
    const ParameterNumerics& one = item.second;
    return one.examined == 0 && one.nonfinite_gradients == 0 && one.lost_updates == 0 && one.floored_codes == 0 &&
           one.saturated_codes == 0 && one.largest_update_ratio == 0;
  });
  return found;
}

void Telemetry::reset() {
  // In place: a captured CUDA graph goes on counting into the same tensors.
  for (auto& [key, table] : tables_) table.counts.zero_();
  settled_.clear();
}

std::vector<at::Tensor> Telemetry::tensors() const {
  std::vector<at::Tensor> result;
  for (const auto& [key, table] : tables_) result.push_back(table.counts);
  return result;
}

void Telemetry::check_learning_rate(OptimizerKind kind, const std::string& name, const at::Tensor& param,
                                    store::Format format, double lr) {
  if (lr == 0 || param.numel() == 0 || param.is_meta() || !rounds_to_nearest(format.master_weights)) return;
  const auto [found, is_new] = largest_.try_emplace(param.unsafeGetTensorImpl(), 0.0);
  if (is_new) found->second = param.detach().abs().max().item<double>();
  const double largest = found->second;
  if (largest == 0 || !std::isfinite(largest)) return;
  bool has_variance = false;
  for (int k = 0; k < state_count(kind, true); ++k) has_variance = has_variance || !state_slot(kind, k).is_signed;
  const double needed = smallest_certain_step(largest, param.scalar_type(), format.master_weights);
  const double taken = lr * (has_variance ? kStepShare : 1.0);
  TORCH_CHECK(needed <= taken, "lr = ", lr, " is too small for ", name, ": its largest weight is ", largest,
              ", and of a ", param.scalar_type(), " weight with ", store::correction_bits(format.master_weights),
              " bits of correction rounded to nearest only steps from ", needed,
              " up are sure to change it; this step counts on ", taken,
              ". Raise lr, or keep more bits (master_weight_bits), or round without bias (state_codec \"default\"; "
              "stochastic_rounding where master_weight_bits is 0), or call check_numerics(false). Weights are measured "
              "at the first step, after load() and by recompute_param_stats()");
}

}  // namespace flashoptim::libtorch
