// Weights written from outside keep their correction; reset_corrections makes them what the parameters hold.
#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

/// Parameters after some steps, with corrections that are not 0.
struct Trained {
  std::vector<Tensor> params{parameter({40, 30}, 1), parameter({90}, 2), parameter({64}, 3, torch::kHalf),
                             parameter({32}, 4, torch::kFloat)};
  std::unique_ptr<flash::FlashOptimizer> optimizer;

  explicit Trained(const MakeOptimizer& make) : optimizer(make(params)) {
    for (int64_t i = 0; i < 3; ++i) {
      set_gradients(params, i);
      optimizer->step();
    }
  }
  Tensor as_stored(size_t i) const { return params[i].detach().to(torch::kFloat); }
  bool is_exact(size_t i) const { return same_bytes(optimizer->fp32_weight(params[i]), as_stored(i)); }
};

TEST(Corrections, AfterAResetWeightsAreWhatParametersHold) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    Trained trained(named.make);
    const bool has_correction = trained.optimizer->param_state(trained.params[0])->correction.numel() > 0;
    const torch::NoGradGuard no_grad;
    at::manual_seed(8);
    for (Tensor& param : trained.params) param.copy_(torch::randn(param.sizes()));
    for (size_t i = 0; i < 3; ++i) EXPECT_EQ(trained.is_exact(i), !has_correction) << "the old correction is added";
    const Snapshot before(*trained.optimizer);
    trained.optimizer->reset_corrections();
    for (size_t i = 0; i < trained.params.size(); ++i) {
      EXPECT_TRUE(trained.is_exact(i));
      EXPECT_TRUE(same_bytes(before.tensors[i], trained.params[i])) << "the parameter itself stays";
      EXPECT_EQ(trained.optimizer->param_state(trained.params[i])->step, 3);
    }
    EXPECT_EQ(before == Snapshot(*trained.optimizer), !has_correction) << "states stay";
    set_gradients(trained.params, 9);
    trained.optimizer->step();
    EXPECT_EQ(trained.is_exact(0), !has_correction);
  }
}

TEST(Corrections, OnlyThoseThatAreNamed) {
  Trained trained(maker<flash::FlashAdamW>(flash::FlashAdamWOptions(1e-2)));
  const Snapshot before(*trained.optimizer);
  trained.optimizer->reset_corrections(std::vector<Tensor>{});
  EXPECT_TRUE(before == Snapshot(*trained.optimizer)) << "an empty list names none";
  trained.optimizer->reset_corrections({trained.params[1], trained.params[3]});
  EXPECT_FALSE(trained.is_exact(0));
  EXPECT_TRUE(trained.is_exact(1));
  EXPECT_FALSE(trained.is_exact(2));
}

TEST(Corrections, BeforeTheFirstStepThereIsNothingToReset) {
  const Tensor param = parameter({8}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param});
  optimizer.reset_corrections();
  optimizer.reset_corrections({param});
  EXPECT_EQ(optimizer.param_state(param), nullptr);
}

TEST(Corrections, StrangersAreAnErrorThatChangesNothing) {
  Trained trained(maker<flash::FlashAdamW>(flash::FlashAdamWOptions(1e-2)));
  const Snapshot before(*trained.optimizer);
  expect_error([&] { trained.optimizer->reset_corrections({trained.params[0], parameter({8}, 1)}); },
               {"FlashAdamW::reset_corrections", "params[1]", "no parameter of this optimizer"});
  expect_error([&] { trained.optimizer->reset_corrections({trained.params[0], Tensor()}); },
               {"reset_corrections", "params[1]", "undefined"});
  EXPECT_TRUE(before == Snapshot(*trained.optimizer));
}

TEST(Corrections, SwappedOutAndInAgainIsTheSameWeight) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    Trained trained(named.make);
    const torch::NoGradGuard no_grad;
    const Snapshot before(*trained.optimizer);
    std::vector<Tensor> kept;
    for (Tensor& param : trained.params) {
      kept.push_back(param.detach().clone());
      param.add_(1);
    }
    for (size_t i = 0; i < kept.size(); ++i) trained.params[i].copy_(kept[i]);
    EXPECT_TRUE(before == Snapshot(*trained.optimizer));
  }
}

}  // namespace
}  // namespace flashoptim_test
