// One AdamW step on raw buffers: bf16 weights with 8-bit corrections, 8-bit states.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "flashoptim/step.h"
#include "flashoptim/version.h"

int main() {
  constexpr int64_t kSizes[] = {10, 1000};
  const flashoptim::GroupLayout layout = flashoptim::group_layout(kSizes, 2);
  const size_t numel = static_cast<size_t>(layout.numel()), groups = static_cast<size_t>(layout.groups());
  std::vector<uint16_t> parameter(numel, 0x3f80), gradient(numel, 0x3f80);  // 1.0
  std::vector<int8_t> correction(numel);
  std::vector<uint8_t> exp_avg(numel), exp_avg_sq(numel);
  std::vector<uint16_t> exp_avg_scale(groups), exp_avg_sq_scale(groups);

  flashoptim::ParameterTensors tensor;
  tensor.parameter = parameter.data();
  tensor.gradient = gradient.data();
  tensor.correction = correction.data();
  tensor.states[0] = exp_avg.data();
  tensor.states[1] = exp_avg_sq.data();
  tensor.scales[0] = exp_avg_scale.data();
  tensor.scales[1] = exp_avg_sq_scale.data();
  tensor.layout = layout;
  tensor.parameter_dtype = tensor.gradient_dtype = flashoptim::DType::kBFloat16;
  tensor.master_weights = flashoptim::MasterWeights::kCorrection8;
  tensor.state_codec = flashoptim::StateCodec::kDefault;

  flashoptim::Plan plan;
  flashoptim::Status status = flashoptim::Plan::make(flashoptim::OptimizerKind::kAdamW, false, &tensor, 1, &plan);
  flashoptim::Hyperparameters hyper;  // lr 1e-3: the first step of AdamW takes lr off
  if (status.is_ok()) status = plan.step(&hyper, 1);
  std::vector<float> weights(numel);
  if (status.is_ok()) {
    status = flashoptim::merge_weights(tensor.parameter_dtype, tensor.master_weights, parameter.data(),
                                       correction.data(), weights.data(), layout.numel());
  }
  if (!status.is_ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    return 1;
  }
  std::printf("flashoptim %d.%d.%d: 1.0 -> %.6f, expected about 0.999\n", FLASHOPTIM_VERSION_MAJOR,
              FLASHOPTIM_VERSION_MINOR, FLASHOPTIM_VERSION_PATCH, weights[0]);
  return std::fabs(weights[0] - 0.999f) < 5e-5f ? 0 : 1;
}
