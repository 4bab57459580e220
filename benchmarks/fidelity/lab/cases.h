// What a case is: an optimizer, its hyperparameters and a stream of gradients.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "flashoptim/optimizer_info.h"
#include "flashoptim/types.h"
#include "lab/random.h"

namespace flashoptim::fidelity {

/// One step's gradients in the making.
struct GradientRow {
  int64_t t = 0;  ///< from 0
  int64_t steps = 0;
  int64_t count = 0;
  const float* sigma = nullptr;  ///< per element
  const float* mu = nullptr;     ///< per element: mean over sigma
  const float* z = nullptr;      ///< N(0, 1), fresh
  float* memory = nullptr;       ///< per element, 0 at first, kept from step to step
  Random random;

  uint32_t counter(int64_t i) const { return static_cast<uint32_t>(t * count + i); }
  float signal(int64_t i) const { return sigma[i] * (mu[i] + z[i]); }
  float uniform(uint32_t stream, int64_t i) const { return random.uniform(stream, counter(i)); }
  float normal(uint32_t stream, int64_t i) const { return random.normal(stream, counter(i)); }
  /// Uniform number that all elements of a block of `block` share.
  float shared_uniform(uint32_t stream, int64_t i, int64_t block) const {
    return random.uniform(stream, counter(i / block * block));
  }
};

enum class Schedule { kConstant, kWarmupCosine };

/// Which cases an optimizer has: those of rules with a variance, those of sums of gradients, or of their signs.
enum class Family { kAdam = 1, kSgd = 2, kLion = 4 };
Family family_of(OptimizerKind optimizer);

inline constexpr double kNoTarget = std::numeric_limits<double>::infinity();

struct Case {
  std::string name;
  std::string what;
  OptimizerKind optimizer = OptimizerKind::kAdamW;
  Hyperparameters hyper;
  Schedule schedule = Schedule::kConstant;
  int64_t steps = 3000;
  int64_t elements = 4096;
  DType parameter_dtype = DType::kBFloat16;
  DType gradient_dtype = DType::kBFloat16;
  bool correction_bits_8 = false;
  double sigma = 1e-3;
  double decades = 0.0;  ///< sigma is multiplied by 10^(-decades U(0, 1)), per element
  double weight_mean = 0.0, weight_deviation = 0.0;
  double target = kNoTarget;  ///< issue 4's figure for the error of the default codec
  std::function<void(const GradientRow&, float*)> fill;

  /// Hyperparameters of step t, from 1.
  Hyperparameters hyper_at(int64_t t) const;
  /// What an exact update is said not to exceed (Rule::largest_update); 0: no bound.
  double update_bound(const Hyperparameters& at) const;
};

/// All cases of an optimizer, numerics.md's first.
std::vector<Case> make_cases(OptimizerKind optimizer);

/// Gradients and first weights of a case, as rounded to its element types.
struct CaseData {
  std::vector<uint16_t> gradients;  ///< [steps][elements], patterns of gradient_dtype
  std::vector<float> weights;       ///< exact in parameter_dtype
  std::vector<float> sigma;
  const uint16_t* row(const Case& c, int64_t t) const { return gradients.data() + (t - 1) * c.elements; }
};
CaseData make_data(const Case& c, uint64_t seed);

float to_float(DType dtype, uint16_t pattern);
/// A row of gradients as fp32.
void widen_row(DType dtype, const uint16_t* patterns, float* values, int64_t count);

}  // namespace flashoptim::fidelity
