// The front end over its store: parameters that lie otherwise, one at a time, and memory that moves between steps.
#include <sstream>

#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

void step(flash::FlashOptimizer& optimizer, const std::vector<Tensor>& params, int64_t number) {
  set_gradients(params, number);
  optimizer.step();
}

/// Every second element of each row of a larger tensor: with gaps.
Tensor with_gaps(const Tensor& values) {
  std::vector<int64_t> sizes = values.sizes().vec();
  sizes.back() *= 2;
  const Tensor view = torch::zeros(sizes, values.options().requires_grad(false)).slice(-1, 0, sizes.back(), 2);
  return view.copy_(values.detach()).set_requires_grad(true);
}

// ---- layouts --------------------------------------------------------------------------------------------------------

TEST(Layouts, AParameterWithGapsStepsLikeADenseOne) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const std::vector<Tensor> dense{parameter({33, 47}, 1), parameter({7}, 2), parameter({17, 32}, 4, torch::kFloat)};
    const std::vector<Tensor> gaps{with_gaps(dense[0]), with_gaps(dense[1]), with_gaps(dense[2])};
    ASSERT_FALSE(gaps[0].is_non_overlapping_and_dense());
    const auto a = named.make(dense), b = named.make(gaps);
    for (int64_t i = 0; i < 4; ++i) {
      step(*a, dense, i);
      step(*b, gaps, i);
    }
    EXPECT_TRUE(Snapshot(*a) == Snapshot(*b));
    for (size_t i = 0; i < dense.size(); ++i) {
      EXPECT_TRUE(same_bytes(a->fp32_weight(dense[i]), b->fp32_weight(gaps[i])));
      EXPECT_EQ(b->state_tensors().size(), a->state_tensors().size());
    }
    b->set_fp32_weight(gaps[0], torch::ones({33, 47}) / 3);
    a->set_fp32_weight(dense[0], torch::ones({33, 47}) / 3);
    EXPECT_TRUE(Snapshot(*a) == Snapshot(*b));
    if (named.name == "adamw_default") {
      static_cast<flash::FlashAdamWOptions&>(a->param_groups()[0].options()).quantize(false);
      static_cast<flash::FlashAdamWOptions&>(b->param_groups()[0].options()).quantize(false);
      step(*a, dense, 5);
      step(*b, gaps, 5);
      EXPECT_TRUE(Snapshot(*a) == Snapshot(*b)) << "converted";
    }
  }
}

TEST(Layouts, AParameterThatIsTransposedBehindAStepKeepsItsBits) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const Tensor param = parameter({64, 64}, 1), twin = parameter({64, 64}, 1);
    const auto moved = named.make({param}), stays = named.make({twin});
    for (int64_t i = 0; i < 6; ++i) {
      // The same sizes, other strides.
      if (i == 2) Tensor(param).set_data(param.detach().t().contiguous().t());
      step(*moved, {param}, i);
      step(*stays, {twin}, i);
    }
    EXPECT_EQ(param.stride(0), 1);
    EXPECT_TRUE(Snapshot(*moved) == Snapshot(*stays));
    EXPECT_TRUE(same_bytes(moved->fp32_weight(param), stays->fp32_weight(twin)));
    // And so does what is saved and loaded from there.
    std::stringstream stream;
    torch::save(*moved, stream);
    const Tensor resumed_param = param.detach().clone().set_requires_grad(true);
    ASSERT_EQ(resumed_param.stride(0), 1);
    const auto resumed = named.make({resumed_param});
    torch::load(*resumed, stream);
    step(*moved, {param}, 9);
    step(*resumed, {resumed_param}, 9);
    EXPECT_TRUE(Snapshot(*moved) == Snapshot(*resumed));
  }
}

TEST(Layouts, AnOddGradientOfOneParameterAmongMany) {
  const std::vector<Tensor> params{parameter({64, 80}, 1), parameter({30, 40}, 2), parameter({5000}, 3)};
  const std::vector<Tensor> twins{parameter({64, 80}, 1), parameter({30, 40}, 2), parameter({5000}, 3)};
  flash::FlashAdamW a(params, flash::FlashAdamWOptions(1e-2)), b(twins, flash::FlashAdamWOptions(1e-2));
  for (int64_t i = 0; i < 6; ++i) {
    set_gradients(params, i);
    set_gradients(twins, i);
    Tensor& odd = Tensor(params[1]).mutable_grad();
    if (i % 3 == 1) odd = odd.t().contiguous().t();
    if (i % 3 == 2) odd = with_gaps(odd).detach();
    if (i == 5) Tensor(params[1]).mutable_grad() = odd.detach().clone().neg()._neg_view();
    a.step();
    b.step();
    EXPECT_TRUE(Snapshot(a) == Snapshot(b)) << i;
  }
}

// ---- step_param -----------------------------------------------------------------------------------------------------

TEST(StepParam, OneByOneIsAsAllTogether) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const std::vector<Tensor> params = mixed_parameters(), twins = mixed_parameters();
    const auto single = named.make(params), together = named.make(twins);
    for (int64_t i = 0; i < 5; ++i) {
      set_gradients(params, i);
      set_gradients(twins, i);
      if (i == 3) {
        single->step();  // both ways in one run
      } else {
        for (size_t k = params.size(); k-- > 0;) {
          single->step_param(params[k]);
          Tensor(params[k]).mutable_grad() = Tensor();
        }
        single->step();  // nothing is left
      }
      together->step();
    }
    EXPECT_TRUE(Snapshot(*single) == Snapshot(*together));
    EXPECT_EQ(single->nonfinite_gradients(), 0);
  }
}

TEST(StepParam, InHooksOfTheBackwardPass) {
  const auto make_model = [] {
    at::manual_seed(4);
    torch::nn::Sequential model(torch::nn::Linear(40, 60), torch::nn::ReLU(), torch::nn::Linear(60, 1));
    flash::cast_model(*model);
    return model;
  };
  torch::nn::Sequential model = make_model(), twin = make_model();
  const auto options = flash::FlashAdamWOptions(1e-2).min_quantized_numel(0);
  flash::FlashAdamW release(model->parameters(), options), usual(twin->parameters(), options);
  for (Tensor& param : model->parameters()) {
    param.register_hook([&release, param](const Tensor& grad) {
      Tensor(param).mutable_grad() = grad;
      release.step_param(param);
      Tensor(param).mutable_grad() = Tensor();
      return grad;
    });
  }
  for (int i = 0; i < 4; ++i) {
    at::manual_seed(static_cast<uint64_t>(i));
    const Tensor x = torch::randn({16, 40}, torch::kBFloat16);
    model->forward(x).to(torch::kFloat).square().mean().backward();
    model->zero_grad();
    twin->zero_grad();
    twin->forward(x).to(torch::kFloat).square().mean().backward();
    usual.step();
  }
  EXPECT_TRUE(Snapshot(release) == Snapshot(usual));
}

TEST(StepParam, FollowsWhatChangesAndNamesWhatIsWrong) {
  const std::vector<Tensor> params{parameter({64, 80}, 1), parameter({30}, 2)};
  flash::FlashAdamW optimizer(params, flash::FlashAdamWOptions(1e-2));
  optimizer.step_param(params[0]);  // no gradient: nothing
  EXPECT_EQ(optimizer.param_state(params[0]), nullptr);
  const Tensor stranger = parameter({8}, 3);
  expect_error([&] { optimizer.step_param(stranger); }, {"FlashAdamW::step_param", "no parameter of this optimizer"});
  expect_error([&] { optimizer.step_param(Tensor()); }, {"FlashAdamW::step_param", "undefined"});
  set_gradients(params, 1);
  Tensor(params[0]).mutable_grad() = torch::ones({3});
  const Snapshot before(optimizer);
  expect_error([&] { optimizer.step_param(params[0]); }, {"FlashAdamW: param_groups[0].params[0].grad", "[3]"});
  EXPECT_TRUE(before == Snapshot(optimizer));
  set_gradients(params, 2);
  for (const Tensor& param : params) optimizer.step_param(param);
  // Options, groups and dtypes that change in between.
  static_cast<flash::FlashAdamWOptions&>(optimizer.param_groups()[0].options()).quantize(false);
  optimizer.step_param(params[0]);
  EXPECT_EQ(optimizer.param_state(params[0])->states[0].scalar_type(), torch::kFloat);
  optimizer.add_param_group({std::vector<Tensor>{stranger}});
  set_gradients({stranger}, 3);
  optimizer.step_param(stranger);
  EXPECT_EQ(optimizer.param_state(stranger)->step, 1);
  optimizer.param_groups()[0].options().set_lr(NAN);
  expect_error([&] { optimizer.step_param(params[0]); }, {"param_groups[0].lr = nan"});
  optimizer.step_param(stranger);
  EXPECT_EQ(optimizer.param_state(stranger)->step, 2) << "its own group's options are good";
}

// ---- memory ---------------------------------------------------------------------------------------------------------

TEST(Memory, EveryStateHasItsOwn) {
  const std::vector<Tensor> params = mixed_parameters();
  flash::FlashAdamW optimizer(params, flash::FlashAdamWOptions(1e-2));
  step(optimizer, params, 1);
  for (const Tensor& tensor : optimizer.state_tensors()) EXPECT_EQ(tensor.storage().nbytes(), tensor.nbytes());
}

TEST(Memory, OfAParameterThatNoLongerStepsMayBecomeAnothers) {
  const Tensor buffer = torch::randn({64, 80}).to(torch::kBFloat16);
  const Tensor a = buffer.detach().set_requires_grad(true), b = parameter({64, 80}, 2), c = parameter({9}, 3);
  flash::FlashAdamW optimizer({a, b, c}, flash::FlashAdamWOptions(1e-2));
  step(optimizer, {a, c}, 1);
  // a is frozen and moved; b gets a's old memory and its first gradient.
  Tensor(a).mutable_grad() = Tensor();
  Tensor(a).set_data(a.detach().clone());
  Tensor(b).set_data(buffer);
  set_gradients({b, c}, 2);
  optimizer.step();
  EXPECT_EQ(optimizer.param_state(b)->step, 1);
  set_gradients({a, b, c}, 3);
  for (const Tensor& param : {a, b, c}) optimizer.step_param(param);
  EXPECT_EQ(optimizer.param_state(a)->step, 2);
}

TEST(Memory, ParametersAndStatesThatMoveBetweenSteps) {
  const std::vector<Tensor> params = mixed_parameters(), twins = mixed_parameters();
  flash::FlashAdamW moved(params, flash::FlashAdamWOptions(1e-2)), stays(twins, flash::FlashAdamWOptions(1e-2));
  for (int64_t i = 0; i < 6; ++i) {
    for (const Tensor& param : params) {
      Tensor(param).set_data(param.detach().clone());
      const flash::FlashParamState* state = moved.param_state(param);
      if (state == nullptr || i % 2 == 0) continue;
      for (const Tensor& tensor : state->states) Tensor(tensor).set_data(tensor.clone());
      Tensor(state->correction).set_data(state->correction.clone());
    }
    step(moved, params, i);
    step(stays, twins, i);
  }
  EXPECT_TRUE(Snapshot(moved) == Snapshot(stays));
}

TEST(Memory, AStorageThatWasMadeSmallerIsNeverStepped) {
  const std::vector<Tensor> params{parameter({64, 80}, 1), parameter({30}, 2)};
  flash::FlashAdamW optimizer(params, flash::FlashAdamWOptions(1e-2));
  step(optimizer, params, 1);
  const Tensor& state = optimizer.param_state(params[0])->states[1];
  const std::pair<Tensor, std::string> shrunk[] = {
      {state, "'exp_avg_sq_codes' of FlashAdamW: param_groups[0].params[0]"},
      {params[0].grad(), "FlashAdamW: param_groups[0].params[0].grad"},
      {params[0].detach(), "FlashAdamW: param_groups[0].params[0]"}};
  for (const auto& [tensor, name] : shrunk) {
    SCOPED_TRACE(name);
    const size_t bytes = tensor.storage().nbytes();
    const Tensor values = tensor.clone(), other = params[1].detach().clone();
    tensor.storage().unsafeGetStorageImpl()->set_nbytes(bytes / 2);
    expect_error([&, name = name] { optimizer.step(); }, {name, "needs more memory than its storage has"});
    EXPECT_TRUE(same_bytes(other, params[1]));
    tensor.storage().unsafeGetStorageImpl()->set_nbytes(bytes);
    optimizer.step();
  }
}

TEST(Memory, AnOptimizerCanBeMoved) {
  const Tensor param = parameter({64, 80}, 1), twin = parameter({64, 80}, 1);
  flash::FlashAdamW first(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-2)),
      stays(std::vector<Tensor>{twin}, flash::FlashAdamWOptions(1e-2));
  step(first, {param}, 1);
  flash::FlashAdamW second(std::move(first));
  step(second, {param}, 2);
  for (int64_t i = 1; i < 3; ++i) step(stays, {twin}, i);
  EXPECT_TRUE(Snapshot(second) == Snapshot(stays));
}

}  // namespace
}  // namespace flashoptim_test
