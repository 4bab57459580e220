// The example of docs/adding_an_optimizer.md is a rule, and a step of it does what its text says. CMake takes the code
// from the document.
#include <gtest/gtest.h>

#include "flashoptim/core/codecs/group_states.h"
#include "flashoptim/core/inspect.h"

namespace flashoptim::core {

constexpr auto kExampleKind = static_cast<OptimizerKind>(1 << 20);  // the document's would be in types.h

#include "example_rule.inc"

static_assert(Rule<Signum>);

namespace {

constexpr int kElements = 32;

/// One step of a group from states of 0: the weights.
template <StateCodec kCodec>
void step(const float (&gradients)[kElements], float (&weights)[kElements], float (&states)[kElements][1]) {
  using States = GroupStates<Signum, kCodec, kElements>;
  Hyperparameters p;
  p.lr = 0.25;
  p.momentum = 0.5;
  p.weight_decay = 0.5;
  const Signum::Hyper hyper = Signum::make_hyper(p);
  InspectedCodes<kElements> stored{};
  States::decode(stored, states);
  for (int i = 0; i < kElements; ++i) {
    ASSERT_EQ(states[i][0], 0.0f);
    weights[i] -= Signum::update(weights[i], gradients[i], states[i], hyper);
  }
  States::encode(states, WholeGroup{}, NearestDither{}, stored);
  States::decode(stored, states);
}

template <StateCodec kCodec>
void expect_a_step() {
  float gradients[kElements], weights[kElements], states[kElements][1];
  for (int i = 0; i < kElements; ++i) {
    gradients[i] = static_cast<float>(i - 16) * 0.125f;
    weights[i] = 2.0f;
  }
  step<kCodec>(gradients, weights, states);
  for (int i = 0; i < kElements; ++i) {
    const float sign = i > 16 ? 1.0f : i < 16 ? -1.0f : 0.0f;
    EXPECT_EQ(weights[i], 2.0f - 0.25f * 0.5f * 2.0f - 0.25f * sign);
    EXPECT_NEAR(states[i][0], 0.5f * gradients[i], 0.02f) << i;
  }
}

TEST(ExampleRule, AStepOfTheDocumentsRuleIsWhatItsTextSays) {
  expect_a_step<StateCodec::kPaper>();
  expect_a_step<StateCodec::kDefault>();
}

TEST(ExampleRule, ItsDescriptionIsComplete) {
  EXPECT_STREQ(Signum::kTitle, "Signum");
  EXPECT_EQ(Signum::kHyperparameters.kCount, kCommonHyperparameters + 1);
  Hyperparameters p;
  p.lr = 0.5;
  EXPECT_EQ(Signum::largest_update(p), 0.5);
}

}  // namespace
}  // namespace flashoptim::core
