// Training with the LibTorch optimizers: convergence, groups, schedulers, closures, layouts.
#include "flashoptim/step.h"
#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

torch::nn::Sequential small_net() {
  at::manual_seed(3);
  return torch::nn::Sequential(torch::nn::Linear(16, 48), torch::nn::Tanh(), torch::nn::Linear(48, 48),
                               torch::nn::Tanh(), torch::nn::Linear(48, 1));
}

/// Trains on a fixed regression and returns the mean of the last 20 losses over the first loss.
template <class Step>
double train(torch::nn::Sequential& net, torch::Dtype dtype, int steps, Step step) {
  at::set_num_threads(1);  // too small for threads, which only wait for each other on a busy machine
  at::manual_seed(9);
  const Tensor x = torch::randn({64, 16}), y = torch::sin(x.sum(1, true));
  double first = 0, last = 0;
  for (int i = 0; i < steps; ++i) {
    net->zero_grad();
    const Tensor loss = torch::mse_loss(net->forward(x.to(dtype)).to(torch::kFloat), y);
    loss.backward();
    step();
    if (i == 0) first = loss.item<double>();
    if (i >= steps - 20) last += loss.item<double>() / 20;
  }
  return last / first;
}

TEST(Optimizer, SmallNetLearnsAsWithTorchInFp32) {
  constexpr int kSteps = 200;
  const auto torch_loss = [](const std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<Tensor>)>& make) {
    torch::nn::Sequential net = small_net();
    const auto optimizer = make(net->parameters());
    return train(net, torch::kFloat, kSteps, [&] { optimizer->step(); });
  };
  const auto flash_loss = [](const MakeOptimizer& make) {
    torch::nn::Sequential net = small_net();
    flash::cast_model(*net);
    const auto optimizer = make(net->parameters());
    const double loss = train(net, torch::kBFloat16, kSteps, [&] { optimizer->step(); });
    EXPECT_EQ(optimizer->nonfinite_gradients(), 0);
    return loss;
  };
  const auto adamw =
      torch_loss([](auto p) { return std::make_unique<torch::optim::AdamW>(p, torch::optim::AdamWOptions(3e-3)); });
  const auto adam =
      torch_loss([](auto p) { return std::make_unique<torch::optim::Adam>(p, torch::optim::AdamOptions(3e-3)); });
  const auto sgd = torch_loss([](auto p) {
    return std::make_unique<torch::optim::SGD>(p, torch::optim::SGDOptions(0.05).momentum(0.9).nesterov(true));
  });
  const auto sgd_plain =
      torch_loss([](auto p) { return std::make_unique<torch::optim::SGD>(p, torch::optim::SGDOptions(0.1)); });
  const std::pair<double, std::vector<NamedOptimizer>> expected[] = {
      {adamw,
       {{"adamw", maker<flash::FlashAdamW>(flash::FlashAdamWOptions(3e-3).min_quantized_numel(0))},
        {"adamw 32 bit",
         maker<flash::FlashAdamW>(flash::FlashAdamWOptions(3e-3).master_weight_bits(32).min_quantized_numel(0))},
        {"adamw paper",
         maker<flash::FlashAdamW>(flash::FlashAdamWOptions(3e-3).state_codec("paper").min_quantized_numel(0))},
        {"adamw stochastic",
         maker<flash::FlashAdamW>(
             flash::FlashAdamWOptions(3e-3).master_weight_bits(0).stochastic_rounding(true).quantize(false))}}},
      {adam, {{"adam", maker<flash::FlashAdam>(flash::FlashAdamOptions(3e-3).min_quantized_numel(0))}}},
      {sgd,
       {{"sgd",
         maker<flash::FlashSGD>(flash::FlashSGDOptions(0.05).momentum(0.9).nesterov(true).min_quantized_numel(0))},
        {"sgdw",
         maker<flash::FlashSGDW>(flash::FlashSGDWOptions(0.05).momentum(0.9).nesterov(true).min_quantized_numel(0))}}},
      {sgd_plain, {{"sgd plain", maker<flash::FlashSGD>(flash::FlashSGDOptions(0.1))}}},
      // torch has no Lion: it is held against AdamW.
      {adamw, {{"lion", maker<flash::FlashLion>(flash::FlashLionOptions(1e-3).min_quantized_numel(0))}}},
  };
  for (const auto& [reference, optimizers] : expected) {
    EXPECT_LT(reference, 0.5);
    for (const NamedOptimizer& named : optimizers) {
      const double loss = flash_loss(named.make);
      // bf16 activations alone cost some; a broken step costs all.
      EXPECT_LT(loss, 1.25 * reference + 0.05) << named.name;
    }
  }
}

TEST(Optimizer, Fp32ParametersAndStatesFollowTorchAdamW) {
  torch::nn::Sequential net = small_net(), reference = small_net();
  flash::FlashAdamW optimizer(net->parameters(), flash::FlashAdamWOptions(1e-3).quantize(false));
  torch::optim::AdamW torch_optimizer(reference->parameters(), torch::optim::AdamWOptions(1e-3));
  train(net, torch::kFloat, 50, [&] { optimizer.step(); });
  train(reference, torch::kFloat, 50, [&] { torch_optimizer.step(); });
  for (size_t i = 0; i < net->parameters().size(); ++i) {
    EXPECT_TRUE(torch::allclose(net->parameters()[i], reference->parameters()[i], 1e-4, 1e-5)) << i;
  }
}

TEST(Optimizer, EqualsPlanBitwise) {
  const Tensor param = parameter({96, 130}, 4), twin = param.detach().clone();
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(3e-3).betas({0.9, 0.95}).seed(11));
  const flashoptim::GroupLayout layout{96, 130};
  const Tensor correction = torch::zeros({96, 130}, torch::kChar), codes = torch::zeros({2, 96, 130}, torch::kByte);
  const Tensor scales = torch::zeros({2, 96, layout.groups_per_row()}, torch::kShort);
  flashoptim::Hyperparameters hyper;
  hyper.lr = 3e-3, hyper.beta2 = 0.95, hyper.weight_decay = 1e-2, hyper.seed = 11;
  for (int step = 1; step <= 10; ++step) {
    Tensor(param).mutable_grad() = gradient(param, step);
    flashoptim::ParameterTensors t;
    t.parameter = twin.mutable_data_ptr();
    t.gradient = param.grad().const_data_ptr();
    t.correction = correction.mutable_data_ptr();
    for (int k = 0; k < 2; ++k) t.states[k] = codes[k].mutable_data_ptr(), t.scales[k] = scales[k].mutable_data_ptr();
    t.layout = layout;
    t.parameter_dtype = t.gradient_dtype = flashoptim::DType::kBFloat16;
    t.master_weights = flashoptim::MasterWeights::kCorrection8;
    t.state_codec = flashoptim::StateCodec::kDefault;
    flashoptim::Plan plan;
    ASSERT_TRUE(flashoptim::Plan::make(flashoptim::OptimizerKind::kAdamW, true, &t, 1, &plan).is_ok());
    hyper.step = step;
    ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
    optimizer.step();
  }
  const flash::FlashParamState& state = *optimizer.param_state(param);
  EXPECT_EQ(state.step, 10);
  EXPECT_TRUE(same_bytes(param, twin));
  EXPECT_TRUE(same_bytes(state.correction, correction));
  for (size_t k = 0; k < 2; ++k) {
    EXPECT_TRUE(same_bytes(state.states[k], codes[static_cast<int64_t>(k)]));
    EXPECT_TRUE(same_bytes(state.scales[k], scales[static_cast<int64_t>(k)]));
  }
}

TEST(Optimizer, StateFormatsFollowOptions) {
  const Tensor large = parameter({128, 40}, 1), small = parameter({100}, 2),
               wide = parameter({80, 64}, 3, torch::kFloat);
  const std::vector<Tensor> params{large, small, wide};
  const auto states = [&](const flash::FlashAdamWOptions& options) {
    flash::FlashAdamW optimizer(params, options);
    set_gradients(params, 1);
    optimizer.step();
    std::vector<flash::FlashParamState> result;
    for (const Tensor& param : params) result.push_back(*optimizer.param_state(param));
    return result;
  };
  auto s = states(flash::FlashAdamWOptions());
  EXPECT_EQ(s[0].correction.scalar_type(), torch::kChar);
  EXPECT_EQ(s[0].states[0].scalar_type(), torch::kByte);
  EXPECT_EQ(s[0].scales[0].scalar_type(), torch::kShort);
  EXPECT_EQ(s[0].scales[0].sizes(), (std::vector<int64_t>{128, 2}));
  EXPECT_EQ(s[1].states[0].scalar_type(), torch::kFloat) << "below min_quantized_numel";
  EXPECT_EQ(s[2].correction.numel(), 0) << "fp32 parameters need no correction";
  EXPECT_EQ(s[2].states[0].scalar_type(), torch::kByte);
  s = states(flash::FlashAdamWOptions().state_codec("paper").master_weight_bits(32).min_quantized_numel(0));
  EXPECT_EQ(s[0].master_weights, flashoptim::MasterWeights::kCorrection16Nearest);
  EXPECT_EQ(s[0].correction.scalar_type(), torch::kShort);
  EXPECT_EQ(s[0].states[0].scalar_type(), torch::kChar);
  EXPECT_EQ(s[0].states[1].scalar_type(), torch::kByte);
  EXPECT_EQ(s[1].scales[1].scalar_type(), torch::kHalf);
  s = states(flash::FlashAdamWOptions().quantize(false).master_weight_bits(0));
  EXPECT_EQ(s[0].correction.numel(), 0);
  EXPECT_EQ(s[0].states[0].scalar_type(), torch::kFloat);
}

TEST(Optimizer, StatesCanBeInspected) {
  const Tensor param = parameter({64, 64}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3).betas({0.9, 0.99}));
  EXPECT_EQ(optimizer.param_state(param), nullptr);
  EXPECT_TRUE(optimizer.decoded_state(param).is_empty());
  EXPECT_TRUE(optimizer.state_tensors().empty());
  EXPECT_TRUE(same_bytes(optimizer.fp32_weight(param), param.to(torch::kFloat)));
  Tensor(param).mutable_grad() = gradient(param, 1);
  optimizer.step();
  const auto state = optimizer.decoded_state(param);
  EXPECT_EQ(state.keys(), (std::vector<std::string>{"exp_avg", "exp_avg_sq"}));
  const Tensor g = param.grad().to(torch::kFloat);
  EXPECT_LT((state["exp_avg"] - 0.1 * g).norm().item<float>(), 0.05 * (0.1 * g).norm().item<float>());
  EXPECT_LT((state["exp_avg_sq"] - 0.01 * g * g).norm().item<float>(), 0.05 * (0.01 * g * g).norm().item<float>());
  EXPECT_EQ(optimizer.state_tensors().size(), 5u);
  EXPECT_EQ(flash::state_tensors(optimizer).size(), 5u);
  torch::optim::SGD other(std::vector<Tensor>{param}, 0.1);
  EXPECT_TRUE(flash::state_tensors(other).empty());
}

TEST(Optimizer, GroupsHaveTheirOwnOptions) {
  const std::vector<Tensor> params{parameter({8, 8}, 1), parameter({8, 8}, 1), parameter({8, 8}, 1)};
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{params[0]});
  groups.emplace_back(std::vector<Tensor>{params[1]}, std::make_unique<flash::FlashAdamWOptions>(0.0));
  groups.emplace_back(std::vector<Tensor>{params[2]},
                      std::make_unique<flash::FlashAdamWOptions>(flash::FlashAdamWOptions().weight_decay(0)));
  flash::FlashAdamW optimizer(groups, flash::FlashAdamWOptions(0.5).eps(1e-6).weight_decay(0.3));
  const auto values = [&](size_t g) {
    return static_cast<const flash::FlashAdamWOptions&>(optimizer.param_groups()[g].options());
  };
  EXPECT_EQ(values(0).lr(), 0.5);
  EXPECT_EQ(values(1).lr(), 0.0);
  EXPECT_EQ(values(1).eps(), 1e-6) << "inherited";
  EXPECT_EQ(values(2).lr(), 0.5) << "inherited";
  EXPECT_EQ(values(2).weight_decay(), 0.0) << "set, not inherited";
  for (const Tensor& param : params) Tensor(param).mutable_grad() = gradient(param, 1);
  const Tensor before = params[1].detach().clone();
  optimizer.step();
  EXPECT_TRUE(same_bytes(before, params[1])) << "lr 0 moves nothing";
  EXPECT_FALSE(same_bytes(before, params[0]));
  EXPECT_FALSE(same_bytes(params[0], params[2]));
}

TEST(Optimizer, ASettersValueCountsEvenWhereItIsTheDefault) {
  const Tensor param = parameter({8}, 1);
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{param},
                      std::make_unique<flash::FlashSGDOptions>(flash::FlashSGDOptions().weight_decay(0)));
  flash::FlashSGD optimizer(groups, flash::FlashSGDOptions(0.1).weight_decay(0.5).momentum(0.9));
  const auto& options = static_cast<const flash::FlashSGDOptions&>(optimizer.param_groups()[0].options());
  EXPECT_EQ(options.weight_decay(), 0.0);
  EXPECT_EQ(options.momentum(), 0.9);
}

TEST(Optimizer, AddParamGroup) {
  const Tensor first = parameter({70}, 1), second = parameter({70}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{first}, flash::FlashAdamWOptions(1e-2));
  set_gradients({first}, 1);
  optimizer.step();
  optimizer.add_param_group({std::vector<Tensor>{second}, std::make_unique<flash::FlashAdamWOptions>(1e-1)});
  EXPECT_EQ(optimizer.param_groups()[1].options().get_lr(), 1e-1);
  set_gradients({first, second}, 2);
  optimizer.step();
  EXPECT_EQ(optimizer.param_state(first)->step, 2);
  EXPECT_EQ(optimizer.param_state(second)->step, 1);
}

TEST(Optimizer, TorchSchedulersSetEveryGroupsLr) {
  const Tensor a = parameter({8}, 1), b = parameter({8}, 2);
  const auto groups = [&](auto options) {
    std::vector<torch::optim::OptimizerParamGroup> result;
    result.emplace_back(std::vector<Tensor>{a}, std::make_unique<decltype(options)>(options.lr(1e-2)));
    result.emplace_back(std::vector<Tensor>{b}, std::make_unique<decltype(options)>(options.lr(2e-3)));
    return result;
  };
  flash::FlashAdamW optimizer(groups(flash::FlashAdamWOptions()));
  torch::optim::AdamW reference(groups(torch::optim::AdamWOptions(0.5)), torch::optim::AdamWOptions(0.25));
  torch::optim::StepLR scheduler(optimizer, /*step_size=*/2, /*gamma=*/0.5);
  torch::optim::StepLR reference_scheduler(reference, /*step_size=*/2, /*gamma=*/0.5);
  set_gradients({a, b}, 1);
  for (int i = 0; i < 7; ++i) {
    optimizer.step();
    scheduler.step();
    reference_scheduler.step();
  }
  EXPECT_LT(optimizer.param_groups()[0].options().get_lr(), 1e-2 / 4);
  for (size_t g = 0; g < 2; ++g) {
    EXPECT_EQ(optimizer.param_groups()[g].options().get_lr(), reference.param_groups()[g].options().get_lr());
  }
}

TEST(Optimizer, DecoupledDecayIsRelativeToTheInitialLr) {
  const Tensor param = torch::ones({64}).set_requires_grad(true);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param},
                              flash::FlashAdamWOptions(1e-2).weight_decay(0.1).decouple_lr(true));
  optimizer.param_groups()[0].options().set_lr(5e-3);  // as a scheduler would
  Tensor(param).mutable_grad() = torch::zeros({64});
  optimizer.step();
  EXPECT_NEAR(param[0].item<float>(), 1 - 0.1 * 0.5, 1e-6);
}

TEST(Optimizer, ClosureIsCalledWithGradients) {
  const Tensor param = parameter({16}, 1, torch::kFloat);
  flash::FlashSGD optimizer(std::vector<Tensor>{param}, flash::FlashSGDOptions(0.1));
  const torch::NoGradGuard no_grad;
  int calls = 0;
  const Tensor loss = optimizer.step([&] {
    ++calls;
    optimizer.zero_grad();
    const Tensor value = (param * param).sum();
    value.backward();
    return value;
  });
  EXPECT_EQ(calls, 1);
  EXPECT_GT(loss.item<float>(), 0);
  EXPECT_FALSE(optimizer.step().defined()) << "no closure, no loss";
}

TEST(Optimizer, ParametersWithoutGradientAreLeftAlone) {
  const Tensor a = parameter({40}, 1), b = parameter({40}, 1);
  flash::FlashAdamW optimizer({a, b}, flash::FlashAdamWOptions(1e-2));
  const Tensor before = b.detach().clone();
  set_gradients({a}, 1);
  optimizer.step();
  EXPECT_TRUE(same_bytes(before, b));
  EXPECT_EQ(optimizer.param_state(b), nullptr);
  set_gradients({a, b}, 2);
  optimizer.step();
  EXPECT_EQ(optimizer.param_state(a)->step, 2);
  EXPECT_EQ(optimizer.param_state(b)->step, 1) << "each parameter counts its own steps";
  optimizer.zero_grad();
  EXPECT_FALSE(a.grad().defined());
  optimizer.step();
  EXPECT_EQ(optimizer.param_state(a)->step, 2);
}

TEST(Optimizer, MomentumCanBeSwitchedOnAndOff) {
  const Tensor param = parameter({5000}, 1);
  flash::FlashSGD optimizer(std::vector<Tensor>{param}, flash::FlashSGDOptions(1e-2));
  auto& options = static_cast<flash::FlashSGDOptions&>(optimizer.param_groups()[0].options());
  set_gradients({param}, 1);
  optimizer.step();
  EXPECT_TRUE(optimizer.param_state(param)->states.empty());
  options.momentum(0.9);
  optimizer.step();
  EXPECT_EQ(optimizer.param_state(param)->states.size(), 1u);
  options.momentum(0);
  const Tensor buffer = optimizer.param_state(param)->states[0].clone();
  optimizer.step();
  EXPECT_TRUE(same_bytes(buffer, optimizer.param_state(param)->states[0])) << "kept for later";
  EXPECT_EQ(optimizer.param_state(param)->step, 2) << "counted from the buffer's first";
  options.momentum(0.9);
  optimizer.step();
  EXPECT_FALSE(same_bytes(buffer, optimizer.param_state(param)->states[0]));
  EXPECT_EQ(optimizer.param_state(param)->step, 3);
}

TEST(Optimizer, GradientsOfOtherLayoutOrDtype) {
  for (const bool channels_last : {false, true}) {
    const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const auto make = [&] { return parameter({16, 20, 5, 5}, 1).detach().contiguous(format).set_requires_grad(true); };
    const Tensor same = make(), other = make(), expanded = make(), ones = make();
    const auto options = flash::FlashAdamWOptions(1e-2);
    flash::FlashAdamW a(std::vector<Tensor>{same}, options), b(std::vector<Tensor>{other}, options);
    flash::FlashAdamW c(std::vector<Tensor>{expanded}, options), d(std::vector<Tensor>{ones}, options);
    const Tensor g = gradient(same, 1);
    Tensor(same).mutable_grad() = g.contiguous(format);
    Tensor(other).mutable_grad() = g.permute({1, 0, 3, 2}).contiguous().permute({1, 0, 3, 2}).to(torch::kFloat);
    Tensor(expanded).mutable_grad() = torch::ones({1}, torch::kBFloat16).expand({16, 20, 5, 5});
    Tensor(ones).mutable_grad() = torch::ones_like(ones);
    for (flash::FlashAdamW* optimizer : {&a, &b, &c, &d}) optimizer->step();
    EXPECT_TRUE(same_bytes(same, other));
    EXPECT_TRUE(same_bytes(expanded, ones));
    EXPECT_EQ(a.param_state(same)->states[0].strides(), same.strides());
  }
}

TEST(Optimizer, AutogradNoticesWeightsThatChanged) {
  const Tensor param = parameter({8}, 1, torch::kFloat);
  const auto loss = (param * param * param).sum();
  flash::FlashSGD optimizer(std::vector<Tensor>{param}, flash::FlashSGDOptions(0.1));
  Tensor(param).mutable_grad() = torch::ones({8});
  optimizer.step();
  EXPECT_NE(error_of([&] { loss.backward(); }).find("modified by an inplace operation"), std::string::npos);
}

TEST(Optimizer, NonfiniteGradientsAreCountedAndStayInTheirGroup) {
  const Tensor param = parameter({128, 64}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-2));
  Tensor grad = gradient(param, 1);
  grad[3][5] = NAN;
  Tensor(param).mutable_grad() = grad;
  optimizer.step();
  EXPECT_EQ(optimizer.nonfinite_gradients(), 1);
  EXPECT_LE(param.isfinite().logical_not().sum().item<int64_t>(), 32);
}

}  // namespace
}  // namespace flashoptim_test
