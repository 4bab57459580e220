// What goes along with training: clipping, policies by name, tables, telemetry, steps counted on the device.
#include <limits>

#include "tests/libtorch/archives.h"

namespace flashoptim_test {
namespace {

using Options = flash::FlashAdamWOptions;

TEST(ClipGradNorm, ScalesAllGradientsToTheNorm) {
  const std::vector<Tensor> params{parameter({40, 30}, 1, torch::kFloat), parameter({90}, 2, torch::kFloat)};
  const std::vector<Tensor> twins{parameter({40, 30}, 1, torch::kFloat), parameter({90}, 2, torch::kFloat)};
  flash::FlashAdamW optimizer(params, Options(1e-2)), twin(twins, Options(1e-2));
  EXPECT_EQ(optimizer.clip_grad_norm_(0.5).item<double>(), 0.0) << "there are no gradients";
  for (int64_t t = 0; t < 3; ++t) {
    set_gradients(params, t);
    set_gradients(twins, t);
    const double norm = optimizer.clip_grad_norm_(0.5).item<double>();
    EXPECT_NEAR(norm, torch::nn::utils::clip_grad_norm_(twins, 0.5), 1e-5 * norm);
    EXPECT_TRUE(torch::allclose(params[0].grad(), twins[0].grad(), 1e-6));
    for (size_t i = 0; i < params.size(); ++i) twins[i].mutable_grad().copy_(params[i].grad());
    optimizer.step();
    twin.step();
  }
  EXPECT_TRUE(Snapshot(optimizer) == Snapshot(twin));
  for (const double bad : {0.0, -1.0, std::numeric_limits<double>::infinity()}) {
    expect_error([&] { optimizer.clip_grad_norm_(bad); }, {"FlashAdamW: clip_grad_norm_: max_norm", "above 0"});
  }
}

TEST(StepParam, HyperparametersThatChangeBetweenStepsAreTaken) {
  const std::vector<Tensor> params = mixed_parameters(), twins = mixed_parameters();
  flash::FlashAdamW one(params, Options(1e-2)), all(twins, Options(1e-2));
  for (int64_t t = 0; t < 4; ++t) {
    for (flash::FlashAdamW* optimizer : {&one, &all}) {
      auto& options = static_cast<Options&>(optimizer->param_groups()[0].options());
      options.lr(1e-2 / static_cast<double>(t + 1)).betas({0.5 + 0.1 * static_cast<double>(t), 0.9}).weight_decay(0.1);
    }
    set_gradients(params, t);
    set_gradients(twins, t);
    for (const Tensor& param : params) one.step_param(param);
    all.step();
  }
  EXPECT_TRUE(Snapshot(one) == Snapshot(all));
}

// ---- names and policies ---------------------------------------------------------------------------------------------

struct Net : torch::nn::Module {
  Net() {
    register_module("embed", embed);
    register_module("body", body);
    register_module("norm", norm);
    to(torch::kBFloat16);
  }
  torch::nn::Embedding embed{100, 64};
  torch::nn::Linear body{64, 128};
  torch::nn::LayerNorm norm{torch::nn::LayerNormOptions({128})};
};

TEST(Policy, GivesOptionsToParametersByName) {
  Net net;
  const flash::FlashAdamW::Policy policy{{"*embed*", Options().quantize(false).lr(0.5)},
                                         {"norm.*", Options().weight_decay(0).quantize(false)},
                                         {"norm.bias", Options().weight_decay(0.25)}};
  flash::FlashAdamW optimizer(net.named_parameters(), Options(1e-3).min_quantized_numel(0), policy);
  ASSERT_EQ(optimizer.param_groups().size(), 4u);
  const auto values = [&](size_t g) {
    return static_cast<const flash::FlashOptions&>(optimizer.param_groups()[g].options()).values();
  };
  EXPECT_TRUE(optimizer.param_groups()[0].params()[0].is_same(net.embed->weight));
  EXPECT_EQ(values(0).lr, 0.5);
  EXPECT_FALSE(values(0).quantize);
  EXPECT_EQ(values(0).min_quantized_numel, 0) << "from the defaults";
  EXPECT_EQ(optimizer.param_groups()[1].params().size(), 2u);
  EXPECT_EQ(values(1).lr, 1e-3);
  EXPECT_EQ(values(2).weight_decay, 0.0);
  EXPECT_EQ(values(3).weight_decay, 0.25) << "later ones over earlier ones";
  EXPECT_FALSE(values(3).quantize);
  EXPECT_EQ(optimizer.name(net.body->bias), "body.bias");
  const std::vector<Tensor> params = net.parameters();
  set_gradients(params, 1);
  optimizer.step();
  EXPECT_EQ(optimizer.param_state(net.embed->weight)->state_codec, flashoptim::StateCodec::kFloat32);
  EXPECT_EQ(optimizer.param_state(net.body->weight)->state_codec, flashoptim::StateCodec::kDefault);
  // An archive keeps it.
  std::stringstream stream = saved(optimizer);
  flash::FlashAdamW loaded(net.named_parameters(), Options(1e-3),
                           {{"*embed*", Options().lr(1)}, {"norm.weight", Options().lr(1)}, {"norm.bias", {}}});
  ASSERT_EQ(loaded.param_groups().size(), 2u) << "embed and norm.weight are alike, and so are the others";
  flash::FlashAdamW same(net.named_parameters(), Options(1e-3), policy);
  load(same, stream);
  EXPECT_EQ(static_cast<const flash::FlashOptions&>(same.param_groups()[0].options()).values(), values(0));
}

TEST(Policy, IsChecked) {
  Net net;
  Warnings warnings;
  flash::FlashAdamW optimizer(net.named_parameters(), Options(1e-3), {{"*embd*", Options().quantize(false)}});
  ASSERT_EQ(warnings.texts.size(), 1u);
  EXPECT_NE(warnings.texts[0].find("policy[\"*embd*\"] matches no parameter"), std::string::npos);
  expect_error([&] { flash::FlashAdamW(net.named_parameters(), {}, {{"*", Options().master_weight_bits(16)}}); },
               {"FlashAdamW: policy[\"*\"].master_weight_bits = 16", "0, 24 or 32"});
}

TEST(Policy, TiedParametersAreTakenOnce) {
  struct Tied : torch::nn::Module {
    Tensor a = register_parameter("a", parameter({8}, 1));
    Tensor b = register_parameter("b", a);
  } net;
  flash::FlashAdamW optimizer(net.named_parameters());
  EXPECT_EQ(optimizer.param_groups()[0].params().size(), 1u);
  EXPECT_EQ(optimizer.name(net.b), "a");
}

TEST(Describe, SaysWhatIsKept) {
  Net net;
  flash::FlashAdamW optimizer(net.named_parameters(), Options(1e-3),
                              {{"norm.*", Options().quantize(false).master_weight_bits(32).weight_decay(0)}});
  const flash::OptimizerDescription rows = optimizer.describe();
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_EQ(rows[0].parameters, (std::vector<std::string>{"embed.weight", "body.weight"}));
  EXPECT_EQ(rows[0].weights, "bfloat16 + 8");
  EXPECT_EQ(rows[0].states, "8-bit");
  EXPECT_EQ(rows[0].elements, 100 * 64 + 128 * 64);
  EXPECT_EQ(rows[0].options, "");
  EXPECT_EQ(rows[1].states, "fp32") << "smaller than min_quantized_numel";
  EXPECT_EQ(rows[2].weights, "bfloat16 + 16");
  EXPECT_EQ(rows[2].options, "weight_decay=0, master_weight_bits=32, quantize=false");
  const std::vector<Tensor> params = net.parameters();
  set_gradients(params, 1);
  optimizer.step();
  size_t bytes = 0;
  for (const Tensor& tensor : optimizer.state_tensors()) bytes += tensor.nbytes();
  for (const Tensor& param : params) bytes += param.nbytes();
  EXPECT_EQ(rows.bytes(), static_cast<int64_t>(bytes)) << "what it is in fact";
  std::ostringstream text;
  text << rows;
  EXPECT_NE(text.str().find("group  tensors  elements  weights"), std::string::npos) << text.str();
  EXPECT_NE(text.str().find("14,592"), std::string::npos) << text.str();
  const Tensor other = parameter({5000}, 1);
  const flash::FlashSGD sgd(std::vector<Tensor>{other}, flash::FlashSGDOptions(0.1).master_weight_bits(0));
  EXPECT_EQ(sgd.describe()[0].states, "none");
  EXPECT_EQ(sgd.describe()[0].weights, "bfloat16");
  EXPECT_EQ(sgd.describe()[0].parameters[0], "param_groups[0].params[0]");
}

// ---- telemetry ------------------------------------------------------------------------------------------------------

TEST(Numerics, CountsWhatStepsLose) {
  const Tensor spoilt = parameter({64, 80}, 1);
  flash::FlashAdamW counting(std::vector<Tensor>{spoilt}, Options(1e-2));
  set_gradients({spoilt}, 1);
  spoilt.mutable_grad()[0][3] = std::numeric_limits<float>::quiet_NaN();
  counting.step();
  EXPECT_EQ(counting.numerics_report().nonfinite_gradients, 1);
  EXPECT_TRUE(counting.numerics_report().parameters.empty()) << "not looked at";
  counting.reset_numerics();
  EXPECT_EQ(counting.numerics_report().nonfinite_gradients, 0);

  const Tensor param = parameter({64, 80}, 1);
  torch::OrderedDict<std::string, Tensor> named;
  named.insert("weight", param);
  flash::FlashAdamW optimizer(named, Options(1e-2).master_weight_bits(0).weight_decay(0));
  optimizer.check_numerics();
  // Adam's steps of some 1e-2 are lost on weights of a few units, whose spacing is 2^-7 or more.
  set_gradients({param}, 2);
  expect_error([&] { optimizer.step(); }, {"lr = 0.01 is too small for FlashAdamW: weight", "check_numerics(false)"});
  optimizer.param_groups()[0].options().set_lr(1.0);
  optimizer.step();
  optimizer.step_param(param);
  const flash::NumericsReport report = optimizer.numerics_report();
  EXPECT_EQ(report.nonfinite_gradients, 0);
  ASSERT_EQ(report.parameters.count("weight"), 1u);
  EXPECT_EQ(report.parameters.at("weight").examined, 2 * 64 * 80);
  EXPECT_EQ(report.sampled_updates, 2 * 64 * 80);
  EXPECT_GT(report.largest_update_ratio, 0.0f);
  EXPECT_LE(report.unchanged_weights, report.sampled_updates);
  optimizer.reset_numerics();
  EXPECT_TRUE(optimizer.numerics_report().parameters.empty());
}

TEST(Numerics, LostUpdatesAreSeenAndChangeNoBit) {
  const std::vector<Tensor> params{parameter({64, 80}, 1)}, twins{parameter({64, 80}, 1)};
  const auto options = flash::FlashSGDOptions(1e-7).master_weight_bits(0);
  flash::FlashSGD looked_at(params, options), plain(twins, options);
  set_gradients(params, 1);
  set_gradients(twins, 1);
  looked_at.check_numerics();
  expect_error([&] { looked_at.step(); }, {"lr = 1e-07 is too small for FlashSGD: param_groups[0].params[0]"});
  looked_at.param_groups()[0].options().set_lr(1e3);  // what is certain, and then not any more
  plain.param_groups()[0].options().set_lr(1e3);
  looked_at.step();
  plain.step();
  EXPECT_TRUE(Snapshot(looked_at) == Snapshot(plain)) << "looking changes nothing";
  const Tensor small = parameter({64, 80}, 1);
  flash::FlashAdamW unbiased(std::vector<Tensor>{small}, Options(1e-9));
  unbiased.check_numerics();
  set_gradients({small}, 1);
  unbiased.step();
  EXPECT_GT(unbiased.numerics_report().unchanged_weights, 64 * 80 / 2) << "so small a step leaves most as they are";
}

TEST(Numerics, GoesOnWhereParametersComeAndGo) {
  const std::vector<Tensor> params{parameter({40}, 1), parameter({50}, 2)};
  flash::FlashAdamW optimizer(std::vector<Tensor>{params[0]}, Options(1.0));
  optimizer.check_numerics();
  set_gradients(params, 1);
  optimizer.step();
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({params[1]}));
  optimizer.step();
  const auto report = optimizer.numerics_report();
  EXPECT_EQ(report.parameters.at("param_groups[0].params[0]").examined, 80);
  EXPECT_EQ(report.parameters.at("param_groups[1].params[0]").examined, 50);
}

// ---- steps counted on the device ------------------------------------------------------------------------------------

TEST(Capturable, CountsOnTheDeviceWithTheSameBits) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const std::vector<Tensor> params = mixed_parameters(), twins = mixed_parameters();
    const auto optimizer = named.make(params), twin = named.make(twins);
    const auto set_capturable = [&](bool on) {
      auto& options = const_cast<flash::FlashOptions&>(
          static_cast<const flash::FlashOptions&>(optimizer->param_groups()[0].options()));
      const_cast<flashoptim::libtorch::OptionValues&>(options.values()).capturable = on;
    };
    for (int64_t t = 0; t < 8; ++t) {
      set_capturable(t >= 2 && t < 6);
      set_gradients(params, t);
      set_gradients(twins, t);
      if (t == 3) {  // one sits a step out
        params[1].mutable_grad() = Tensor();
        twins[1].mutable_grad() = Tensor();
      }
      if (t == 4) {
        for (size_t i = 0; i < params.size(); ++i) {
          optimizer->step_param(params[i]);
          twin->step_param(twins[i]);
        }
      } else {
        optimizer->step();
        twin->step();
      }
      EXPECT_EQ(optimizer->param_state(params[0])->step_on_device.defined(), t >= 2 && t < 6);
      for (size_t i = 0; i < params.size(); ++i) {
        EXPECT_EQ(optimizer->param_state(params[i])->steps(), twin->param_state(twins[i])->steps());
      }
    }
    EXPECT_TRUE(Snapshot(*optimizer) == Snapshot(*twin));
  }
}

TEST(Capturable, ArchivesHoldTheCountAndNotTheOption) {
  const std::vector<Tensor> params{parameter({40}, 1), parameter({50}, 2)};
  flash::FlashAdamW optimizer(params, Options(1e-2).capturable(true));
  for (int64_t t = 0; t < 3; ++t) step(optimizer, params, t);
  std::stringstream stream = saved(optimizer);
  const std::vector<Tensor> loaded_params = copies(params);
  flash::FlashAdamW loaded(loaded_params, Options(1e-2));
  load(loaded, stream);
  EXPECT_EQ(loaded.param_state(loaded_params[0])->step, 3);
  step(optimizer, params, 3);
  step(loaded, loaded_params, 3);
  EXPECT_FALSE(loaded.param_state(loaded_params[0])->step_on_device.defined());
  for (size_t i = 0; i < params.size(); ++i) EXPECT_TRUE(same_bytes(params[i], loaded_params[i]));
}

TEST(Capturable, ALearningRateOnTheDeviceIsReadAtEveryStep) {
  const std::vector<Tensor> params{parameter({40}, 1)}, twins{parameter({40}, 1)};
  flash::FlashAdamW optimizer(params, Options(1.0).capturable(true)), twin(twins, Options(0.5));
  const Tensor lr = torch::full({}, 0.5f);
  optimizer.set_lr_tensor(0, lr);
  step(optimizer, params, 0);
  step(twin, twins, 0);
  lr.fill_(0.25);
  twin.param_groups()[0].options().set_lr(0.25);
  step(optimizer, params, 1);
  step(twin, twins, 1);
  EXPECT_TRUE(same_bytes(params[0], twins[0]));
  std::stringstream stream = saved(optimizer);
  lr.fill_(1);
  load(optimizer, stream);
  EXPECT_EQ(lr.item<double>(), 0.25) << "archives hold the value";
  optimizer.set_lr_tensor(0, Tensor());
  EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 0.25);
  expect_error([&] { optimizer.set_lr_tensor(1, lr); }, {"group = 1"});
  expect_error([&] { optimizer.set_lr_tensor(0, torch::ones({2})); }, {"shape [2]", "one element"});
  expect_error([&] { optimizer.set_lr_tensor(0, torch::ones({}, torch::kDouble)); }, {"Double", "Float"});
}

}  // namespace
}  // namespace flashoptim_test
