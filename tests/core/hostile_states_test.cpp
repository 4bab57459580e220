// Finite gradients make no state infinite: every rule, every codec, gradients of all sizes and silence between them,
// averages that forget at once or next to never.
#include <gtest/gtest.h>

#include <cmath>

#include "flashoptim/core/codecs/group_states.h"
#include "flashoptim/core/inspect.h"
#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

constexpr int kElements = 32;

/// Hyperparameters at their ends: averages that forget at once or next to never.
std::vector<Hyperparameters> hostile_hyperparameters(OptimizerKind kind) {
  std::vector<Hyperparameters> all{default_hyperparameters(kind)};
  for (const double beta : {0.0, 0.5, 0.9999999}) {
    for (int64_t i = kCommonHyperparameters; i < hyperparameter_count(kind); ++i) {
      if (hyperparameter(kind, i).highest != 1.0 || hyperparameter(kind, i).kind == HyperparameterKind::kFlag) continue;
      Hyperparameters p = default_hyperparameters(kind);
      EXPECT_TRUE(set_hyperparameter(kind, i, beta, &p).is_ok());
      all.push_back(p);
    }
  }
  return all;
}

template <core::Rule R, StateCodec kCodec>
class Run {
 public:
  using States = core::GroupStates<R, kCodec, kElements>;
  explicit Run(uint64_t seed) : random_(seed) {}

  /// A step of every element; whether what is then stored reads as finite.
  bool step(const Hyperparameters& p, const float (&gradients)[kElements]) {
    const typename R::Hyper hyper = R::make_hyper(p);
    const core::DitherKey key = core::make_dither_key(1, static_cast<uint64_t>(p.step));
    float s[kElements][core::kSlotArray<R>];
    States::decode(stored_, s);
    for (int i = 0; i < kElements; ++i) (void)R::update(0.5f, gradients[i], s[i], hyper);
    States::encode(s, core::WholeGroup{}, core::GroupDither{key, core::dither_group_hash<float>(key, 0u, 0u), 0},
                   stored_);
    return reads_finite();
  }

  bool reads_finite() const {
    float s[kElements][core::kSlotArray<R>];
    States::decode(stored_, s);
    for (const auto& element : s) {
      for (int k = 0; k < R::kSlotCount; ++k) {
        if (!std::isfinite(element[k]) || (R::kSlots[k].kind == core::StateKind::kUnsigned && element[k] < 0.0f))
          return false;
      }
    }
    return true;
  }

  /// Zero, or up to 2^`largest` of either sign.
  void fill(float (&gradients)[kElements], int largest) {
    const bool silent = random_.below(3) == 0;
    for (float& g : gradients) {
      const int exponent = static_cast<int>(random_.below(static_cast<uint64_t>(largest + 150))) - 149;
      g = silent ? 0.0f : std::ldexp(random_.below(2) == 0 ? 1.0f : -1.0f, exponent);
    }
  }

 private:
  core::InspectedCodes<kElements> stored_{};
  Random random_;
};

template <core::Rule R>
constexpr bool has_variance() {
  for (int k = 0; k < R::kSlotCount; ++k) {
    if (R::kSlots[k].kind == core::StateKind::kUnsigned) return true;
  }
  return false;
}

template <core::Rule R, StateCodec kCodec>
void expect_finite_states() {
  for (const Hyperparameters& start : hostile_hyperparameters(R::kKind)) {
    Run<R, kCodec> run(7);
    Hyperparameters p = start;
    float gradients[kElements];
    for (int n = 0; n < 2000; ++n, p.step += n % 7 == 0 ? 100000 : 1) {
      // Sums of gradients may be larger than fp32, averages not.
      run.fill(gradients, has_variance<R>() ? 127 : 100);
      ASSERT_TRUE(run.step(p, gradients)) << "step " << p.step;
    }
  }
}

TEST(HostileStates, FiniteGradientsMakeNoneInfinite) {
#define FLASHOPTIM_CASE(rule)                                 \
  {                                                           \
    SCOPED_TRACE(#rule);                                      \
    expect_finite_states<core::rule, StateCodec::kDefault>(); \
    expect_finite_states<core::rule, StateCodec::kPaper>();   \
    expect_finite_states<core::rule, StateCodec::kFloat32>(); \
  }
  FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
}

}  // namespace
}  // namespace flashoptim::test
