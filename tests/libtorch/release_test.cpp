// Gradient release and clipping: the bits of a step with all gradients, and what cannot be is said.
#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

using Release = flash::GradientReleaseOptions;

/// Whose gradients are gradient()'s, exactly.
Tensor loss_of(const std::vector<Tensor>& params, int64_t step) {
  Tensor loss = torch::zeros({});
  int64_t i = 0;
  for (const Tensor& param : params) {
    loss = loss + (param * gradient(param, step * 100 + i++)).sum().to(torch::kFloat);
  }
  return loss;
}

size_t gradients_of(const std::vector<Tensor>& params) {
  size_t count = 0;
  for (const Tensor& param : params) count += param.grad().defined() ? 1 : 0;
  return count;
}

TEST(Release, HasTheBitsOfAStepAndKeepsNoGradient) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const std::vector<Tensor> params = mixed_parameters(), whole_params = mixed_parameters();
    const auto optimizer = named.make(params), whole = named.make(whole_params);
    auto handle = flash::enable_gradient_release(params, *optimizer);
    for (int64_t t = 0; t < 4; ++t) {
      loss_of(params, t).backward();
      EXPECT_EQ(gradients_of(params), 0u);
      optimizer->step();
      optimizer->zero_grad();
      loss_of(whole_params, t).backward();
      whole->step();
      whole->zero_grad();
    }
    EXPECT_TRUE(Snapshot(*optimizer) == Snapshot(*whole));
    handle.remove();
    handle.remove();
    EXPECT_FALSE(handle.active());
    loss_of(params, 9).backward();
    EXPECT_EQ(gradients_of(params), params.size());
  }
}

struct Small {
  std::vector<Tensor> params{parameter({40, 30}, 1), parameter({90}, 2), parameter({64}, 3, torch::kFloat)};
  std::unique_ptr<flash::FlashAdamW> optimizer =
      std::make_unique<flash::FlashAdamW>(params, flash::FlashAdamWOptions(1e-2));
};

TEST(Release, OneGradientIsAliveAtATime) {
  Small small;
  std::vector<size_t> alive;
  flash::enable_gradient_release(small.params, *small.optimizer, Release().pre_step([&](const Tensor&, auto&) {
    alive.push_back(gradients_of(small.params));
    return true;
  }));
  loss_of(small.params, 1).backward();
  EXPECT_EQ(alive, (std::vector<size_t>{1, 1, 1}));
}

TEST(Release, TwoPassIsExactlyTheClippedStep) {
  Small small, whole;
  auto handle =
      flash::enable_gradient_release(small.params, *small.optimizer, Release().clip("two_pass").max_norm(0.5));
  EXPECT_FALSE(handle.grad_norm().defined());
  for (int64_t t = 0; t < 3; ++t) {
    Tensor loss = loss_of(small.params, t);
    const Snapshot before(*small.optimizer);
    handle.measure_norm([&] { loss.backward({}, /*keep_graph=*/true); });
    EXPECT_TRUE(before == Snapshot(*small.optimizer)) << "measuring changes nothing";
    EXPECT_EQ(gradients_of(small.params), 0u);
    const double norm = handle.grad_norm().item<double>();
    loss.backward();
    small.optimizer->step();
    EXPECT_EQ(small.optimizer->clip_grad_norm_(0.5).item<double>(), norm);
    // The same by hand: gradients in float32, multiplied with the coefficient.
    double square = 0;
    set_gradients(whole.params, t);
    for (const Tensor& param : whole.params) square += param.grad().to(torch::kDouble).square().sum().item<double>();
    EXPECT_NEAR(norm, std::sqrt(square), 1e-5 * norm);
    const double coefficient = std::min(1.0, 0.5 / (std::sqrt(square) + 1e-6));
    EXPECT_LT(coefficient, 1.0);
    for (const Tensor& param : whole.params) {
      param.mutable_grad() = param.grad().to(torch::kFloat).mul(static_cast<float>(coefficient));
    }
    whole.optimizer->step();
  }
  for (size_t i = 0; i < small.params.size(); ++i) {
    EXPECT_TRUE(torch::allclose(small.optimizer->fp32_weight(small.params[i]),
                                whole.optimizer->fp32_weight(whole.params[i]), 1e-4, 1e-4));
  }
  expect_error([&] { loss_of(small.params, 5).backward(); }, {"two_pass", "measure_norm"});
}

TEST(Release, PreviousFollowsTheNormAndParameterEachItsOwn) {
  for (const std::string way : {"previous", "parameter"}) {
    SCOPED_TRACE(way);
    Small small, own;
    auto handle = flash::enable_gradient_release(small.params, *small.optimizer, Release().clip(way).max_norm(0.5));
    for (int64_t t = 0; t < 2; ++t) {
      loss_of(small.params, t).backward();
      small.optimizer->step();
      double square = 0;
      for (size_t i = 0; i < small.params.size(); ++i) {
        const Tensor grad = gradient(small.params[i], t * 100 + static_cast<int64_t>(i));
        square += grad.to(torch::kDouble).square().sum().item<double>();
      }
      EXPECT_NEAR(handle.grad_norm().item<double>(), std::sqrt(square), 1e-4);
    }
    // The first step clips each by its own norm, either way.
    loss_of(own.params, 0).backward();
    for (const Tensor& param : own.params) own.optimizer->step_param(param);
    Small first;
    flash::enable_gradient_release(first.params, *first.optimizer, Release().clip(way).max_norm(0.5));
    loss_of(first.params, 0).backward();
    EXPECT_FALSE(Snapshot(*first.optimizer) == Snapshot(*own.optimizer)) << "clipped";
    EXPECT_FALSE(Snapshot(*first.optimizer) == Snapshot(*small.optimizer));
  }
}

TEST(Release, AccumulatesAndThenStepsByTheSum) {
  Small small, whole;
  auto handle = flash::enable_gradient_release(small.params, *small.optimizer);
  handle.accumulate([&] { loss_of(small.params, 1).backward(); });
  EXPECT_EQ(gradients_of(small.params), small.params.size());
  loss_of(small.params, 2).backward();
  EXPECT_EQ(gradients_of(small.params), 0u);
  for (int64_t t = 1; t <= 2; ++t) loss_of(whole.params, t).backward();
  whole.optimizer->step();
  EXPECT_TRUE(Snapshot(*small.optimizer) == Snapshot(*whole.optimizer));
}

TEST(Release, PreStepSeesTheGroupMayChangeTheGradientAndMaySkip) {
  Small small, whole;
  double lr = 0;
  flash::enable_gradient_release(small.params, *small.optimizer,
                                 Release().pre_step([&](const Tensor& param, auto& group) {
                                   lr = group.options().get_lr();
                                   param.mutable_grad().mul_(0.5);
                                   return param.dim() != 2;
                                 }));
  loss_of(small.params, 1).backward();
  EXPECT_EQ(lr, 1e-2);
  EXPECT_EQ(gradients_of(small.params), 0u);
  EXPECT_EQ(small.optimizer->param_state(small.params[0]), nullptr);
  loss_of(whole.params, 1).backward();
  for (size_t i = 1; i < 3; ++i) {
    whole.params[i].mutable_grad().mul_(0.5);
    whole.optimizer->step_param(whole.params[i]);
    EXPECT_TRUE(same_bytes(small.params[i], whole.params[i]));
  }
}

TEST(Release, ParametersThatAreNotGivenAreLeftToStep) {
  Small small;
  auto handle =
      flash::enable_gradient_release({small.params[0]}, *small.optimizer, Release().clip("two_pass").max_norm(0.5));
  Tensor loss = loss_of(small.params, 1);
  handle.measure_norm([&] { loss.backward({}, /*keep_graph=*/true); });
  loss.backward();
  EXPECT_EQ(gradients_of(small.params), 2u);
  small.optimizer->step();
  EXPECT_EQ(small.optimizer->param_state(small.params[2])->step, 1);
  Small all;
  auto of_all = flash::enable_gradient_release(all.params, *all.optimizer, Release().clip("two_pass").max_norm(0.5));
  Tensor same = loss_of(all.params, 1);
  of_all.measure_norm([&] { same.backward({}, /*keep_graph=*/true); });
  same.backward();
  EXPECT_TRUE(Snapshot(*small.optimizer) == Snapshot(*all.optimizer)) << "clipped by the norm of all";
}

TEST(Release, FrozenParametersAndLaterGroupsAreReleased) {
  Small small;
  small.params[0].set_requires_grad(false);
  auto handle = flash::enable_gradient_release(small.params, *small.optimizer);
  const Tensor late = parameter({50}, 7);
  small.optimizer->add_param_group(torch::optim::OptimizerParamGroup({late}));
  (loss_of(small.params, 1) + loss_of({late}, 1)).backward();
  EXPECT_FALSE(late.grad().defined());
  EXPECT_EQ(small.optimizer->param_state(late)->step, 1);
  EXPECT_EQ(small.optimizer->param_state(small.params[0]), nullptr);
  small.optimizer->step();
  small.params[0].set_requires_grad(true);
  loss_of(small.params, 2).backward();
  EXPECT_EQ(small.optimizer->param_state(small.params[0])->step, 1);
  EXPECT_FALSE(small.params[0].grad().defined());
}

TEST(Release, ATiedParameterIsSteppedOnceAndASecondBackwardIsRefused) {
  Small small;
  flash::enable_gradient_release(small.params, *small.optimizer);
  (loss_of(small.params, 1) + loss_of(small.params, 2)).backward();
  EXPECT_EQ(small.optimizer->param_state(small.params[0])->step, 1);
  expect_error([&] { loss_of(small.params, 3).backward(); },
               {"a second time", "param_groups[0].params[", "one backward() a step", "handle.accumulate()"});
  small.optimizer->zero_grad();
  loss_of(small.params, 3).backward();
  EXPECT_EQ(small.optimizer->param_state(small.params[0])->step, 2);
}

TEST(Release, GoesOnWithCastsStatesAndHooksOfOthers) {
  Small small;
  int calls = 0;
  small.params[0].register_hook([&](const Tensor& grad) {
    ++calls;
    return grad;
  });
  flash::enable_gradient_release(small.params, *small.optimizer);
  loss_of(small.params, 1).backward();
  small.optimizer->step();
  small.params[0].set_data(small.params[0].detach().to(torch::kFloat));
  loss_of(small.params, 2).backward();
  EXPECT_EQ(calls, 2);
  EXPECT_EQ(gradients_of(small.params), 0u) << "the hook outlives a cast of the parameter";
  EXPECT_EQ(small.optimizer->param_state(small.params[0])->step, 2);
}

TEST(Release, EndsWithTheOptimizerAndGoesAlongWhereThatIsMoved) {
  Small small;
  auto handle = flash::enable_gradient_release(small.params, *small.optimizer);
  flash::FlashAdamW moved(std::move(*small.optimizer));
  small.optimizer.reset();
  EXPECT_TRUE(handle.active());
  loss_of(small.params, 1).backward();
  EXPECT_EQ(moved.param_state(small.params[0])->step, 1);
  {
    const flash::FlashAdamW last(std::move(moved));
    EXPECT_TRUE(handle.active());
  }
  EXPECT_FALSE(handle.active());
  loss_of(small.params, 2).backward();
  EXPECT_EQ(gradients_of(small.params), small.params.size());
  expect_error([&] { handle.measure_norm([] {}); }, {"measure_norm()"});
}

TEST(Release, NothingKeepsAnythingAlive) {
  std::weak_ptr<int> witness;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor(Tensor().getIntrusivePtr());
  {
    Small small;
    auto alive = std::make_shared<int>(1);
    witness = alive;
    flash::enable_gradient_release(small.params, *small.optimizer,
                                   Release().pre_step([alive](const Tensor&, auto&) { return *alive == 1; }));
    alive.reset();
    loss_of(small.params, 1).backward();
    EXPECT_FALSE(witness.expired());
    tensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(small.params[0].getIntrusivePtr());
  }
  EXPECT_TRUE(witness.expired()) << "hooks, parameters and the optimizer";
  EXPECT_TRUE(tensor.expired());
}

TEST(Release, ErrorsOfAStepComeOutOfBackward) {
  Small small;
  flash::enable_gradient_release(small.params, *small.optimizer, Release().pre_step([](const Tensor& param, auto&) {
    if (param.dim() == 2) param.mutable_grad() = torch::ones({3}, param.options().requires_grad(false));
    return true;
  }));
  EXPECT_NE(error_of([&] { loss_of(small.params, 1).backward(); }), "");
}

TEST(Release, BadArgumentsChangeNothing) {
  Small small;
  const auto refuse = [&](const Release& options, const std::vector<std::string>& parts) {
    expect_error([&] { flash::enable_gradient_release(small.params, *small.optimizer, options); }, parts);
  };
  refuse(Release().clip("global").max_norm(1.0), {"clip = \"global\"", "two_pass", "previous", "parameter"});
  refuse(Release().clip("two_pass"), {"clip = \"two_pass\" without max_norm"});
  refuse(Release().max_norm(1.0), {"with max_norm"});
  refuse(Release().clip("previous").max_norm(0.0), {"max_norm = 0"});
  refuse(Release().clip("two_pass").max_norm(1.0).norm_decay(0.5), {"norm_decay = 0.5", "previous"});
  refuse(Release().clip("previous").max_norm(1.0).norm_decay(1), {"norm_decay = 1"});
  const Tensor strange = parameter({3}, 1);
  expect_error([&] { flash::enable_gradient_release({small.params[0], strange}, *small.optimizer); },
               {"params[1] of shape [3]", "no group of the optimizer"});
  expect_error([&] { flash::enable_gradient_release(std::vector<Tensor>{}, *small.optimizer); },
               {"nothing to release"});
  torch::optim::SGD other(small.params, 0.1);
  expect_error([&] { flash::enable_gradient_release(small.params, other); }, {"none of flashoptim's"});
  loss_of(small.params, 1).backward();
  EXPECT_EQ(gradients_of(small.params), small.params.size()) << "nothing was released";
  small.optimizer->zero_grad();

  auto handle = flash::enable_gradient_release(small.params, *small.optimizer);
  refuse(Release(), {"released already", "handle.remove()"});
  flash::FlashAdamW second(small.params);
  expect_error([&] { flash::enable_gradient_release(small.params, second); },
               {"param_groups[0].params[0]", "by another optimizer"});
  expect_error([&] { small.optimizer->clip_grad_norm_(1.0); }, {"clip_grad_norm_(1)", "would clip nothing"});
  expect_error([&] { handle.measure_norm([] {}); }, {"measure_norm() with clip = \"\""});
  handle.remove();
  auto clipped =
      flash::enable_gradient_release(small.params, *small.optimizer, Release().clip("two_pass").max_norm(1.0));
  expect_error([&] { small.optimizer->clip_grad_norm_(2.0); }, {"max_norm = 2", "given, 1"});
  expect_error([&] { clipped.measure_norm([] {}); }, {"no gradient was complete"});
  clipped.accumulate([&] { loss_of(small.params, 1).backward(); });
  expect_error([&] { clipped.measure_norm([] {}); }, {"there are gradients"});
}

}  // namespace
}  // namespace flashoptim_test
