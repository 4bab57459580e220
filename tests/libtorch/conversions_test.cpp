// Parameters and options that change between steps or between save and load: what is stored is converted, and no weight
// is lost that could be kept.
#include "tests/libtorch/archives.h"

namespace flashoptim_test {
namespace {

using flashoptim::MasterWeights;
using flashoptim::StateCodec;

void cast(const Tensor& param, torch::Dtype dtype) {
  Tensor(param).mutable_grad() = Tensor();
  Tensor(param).set_data(param.detach().to(dtype));
}

/// A step whose gradient is 0.
void rest(flash::FlashOptimizer& optimizer, const Tensor& param) {
  Tensor(param).mutable_grad() = torch::zeros_like(param.detach());
  optimizer.step();
}

template <class Options>
Options& options_of(flash::FlashOptimizer& optimizer) {
  return static_cast<Options&>(optimizer.param_groups()[0].options());
}

/// Half the distance between neighbours of the 16-bit type at each value: what a correction of +-1 stands for.
Tensor half_spacing(const Tensor& narrow) {
  const double mantissa = narrow.scalar_type() == torch::kBFloat16 ? 7 : 10;
  const Tensor exponent = torch::floor(torch::log2(narrow.to(torch::kDouble).abs().clamp_min(6.2e-5)));
  return torch::pow(2.0, exponent - mantissa - 1);
}

TEST(Conversions, WeightsSurviveACastOfTheirParameter) {
  struct Case {
    torch::Dtype from, to;
  };
  for (const Case& c : {Case{torch::kBFloat16, torch::kFloat}, Case{torch::kHalf, torch::kFloat},
                        Case{torch::kBFloat16, torch::kHalf}}) {
    for (const int64_t bits : {24, 32}) {
      SCOPED_TRACE(std::string(toString(c.from)) + " -> " + toString(c.to) + ", " + std::to_string(bits));
      Warnings warnings;
      const Tensor param = parameter({70, 80}, 1, c.from);
      flash::FlashAdamW optimizer(std::vector<Tensor>{param},
                                  flash::FlashAdamWOptions(1e-3).weight_decay(0).master_weight_bits(bits));
      for (int64_t i = 0; i < 5; ++i) step(optimizer, {param}, i);
      const Tensor before = optimizer.fp32_weight(param);
      EXPECT_FALSE(same_bytes(before, param.detach().to(torch::kFloat))) << "the corrections hold something";
      cast(param, c.to);
      const Tensor expected = optimizer.fp32_weight(param);
      optimizer.param_groups()[0].options().set_lr(0);
      step(optimizer, {param}, 5);
      const Tensor after = optimizer.fp32_weight(param);
      EXPECT_TRUE(same_bytes(after, expected)) << "what fp32_weight() said before the step";
      if (c.to == torch::kFloat) {
        EXPECT_TRUE(same_bytes(after, before));
        EXPECT_TRUE(same_bytes(param, before)) << "the parameter holds all of it";
        EXPECT_EQ(optimizer.param_state(param)->correction.numel(), 0);
      } else {
        const double steps = bits == 24 ? 127 : 32767;
        const Tensor error = (after.to(torch::kDouble) - before.to(torch::kDouble)).abs();
        EXPECT_TRUE((error <= half_spacing(param) * (0.51 / steps) + before.abs() * 6e-8).all().item<bool>());
        EXPECT_EQ(optimizer.param_state(param)->param_dtype, c.to);
      }
      EXPECT_TRUE(warnings.texts.empty());
    }
  }
}

/// 60 steps of 1e-4 each on weights of 1, none of which a bfloat16 could take; `change` runs before the eleventh.
double moved(const std::function<void(torch::nn::Module&, flash::FlashSGD&)>& change) {
  torch::nn::Linear model(torch::nn::LinearOptions(96, 96).bias(false));
  {
    const torch::NoGradGuard no_grad;
    model->weight.fill_(1.0);
  }
  flash::FlashSGD optimizer(model->parameters(), flash::FlashSGDOptions(1e-4).momentum(0.5));
  for (int i = 0; i < 60; ++i) {
    if (i == 10) change(*model, optimizer);
    model->weight.mutable_grad() = torch::ones_like(model->weight.detach());
    optimizer.step();
  }
  EXPECT_EQ(optimizer.param_state(model->weight)->step, 60);
  return optimizer.fp32_weight(model->weight).to(torch::kDouble).mean().item<double>() - 1.0;
}

TEST(Conversions, AnFp32ParameterThatBecomes16BitLosesItsDigitsOnlyWhereThatIsMeant) {
  const double exact = moved([](auto&, auto&) {});
  EXPECT_NEAR(exact, -1e-4 * 118, 1e-5);
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    SCOPED_TRACE(toString(dtype));
    // By a cast that takes the optimizer along.
    EXPECT_NEAR(moved([&](auto& model, auto& optimizer) { flash::cast_model(model, optimizer, dtype); }), exact, 5e-5);
    // By one that finds it.
    EXPECT_NEAR(moved([&](auto& model, auto&) { flash::cast_model(model, dtype); }), exact, 5e-5);
    // By an export before and an import after it.
    EXPECT_NEAR(moved([&](auto& model, auto& optimizer) {
                  const auto weights = flash::get_fp32_model_state(model, optimizer);
                  model.to(dtype);
                  flash::set_fp32_model_state(model, optimizer, weights);
                }),
                exact, 5e-5);
    // From what the parameter holds after the cast, because that is asked for: the rest of the steps still count.
    EXPECT_LT(moved([&](auto& model, auto& optimizer) {
                model.to(dtype);
                optimizer.reset_corrections();
              }),
              -1e-4 * 99);
  }
  // Without a word: an error that names the ways, and changes nothing.
  const auto unsaid = [](auto& model, auto& optimizer) {
    model.to(torch::kBFloat16);
    model.parameters()[0].mutable_grad() = torch::ones({96, 96}, torch::kBFloat16);
    const Snapshot before(optimizer);
    for (int i = 0; i < 2; ++i) {
      expect_error([&] { optimizer.step(); }, {"FlashSGD: param_groups[0].params[0]", "dtype BFloat16", "Float",
                                               "cast_model(module, optimizer)", "reset_corrections()"});
      expect_error([&] { optimizer.step_param(model.parameters()[0]); }, {"dtype BFloat16"});
    }
    EXPECT_TRUE(before == Snapshot(optimizer));
    optimizer.reset_corrections();
  };
  moved(unsaid);
  // Where no corrections are kept, the parameter's own precision is what was asked for.
  const Tensor param = parameter({64}, 1, torch::kFloat);
  flash::FlashSGD plain(std::vector<Tensor>{param}, flash::FlashSGDOptions(1e-2).master_weight_bits(0));
  step(plain, {param}, 1);
  cast(param, torch::kBFloat16);
  step(plain, {param}, 2);
  EXPECT_EQ(plain.param_state(param)->step, 2);
}

TEST(Conversions, AnArchiveOfFp32WeightsIsLoadedFor16BitOnes) {
  // The model's weights are loaded by themselves, rounded: corrections begin with zeros, or with what is given.
  for (const NamedOptimizer& named : all_optimizers()) {
    for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
      SCOPED_TRACE(named.name + " as " + toString(dtype));
      const Warnings warnings;
      const Tensor wide = parameter({33, 47}, 1, torch::kFloat);
      const auto optimizer = named.make({wide});
      for (int64_t i = 0; i < 3; ++i) step(*optimizer, {wide}, i);
      const Tensor narrow = wide.detach().to(dtype).set_requires_grad(true);
      const auto loaded = named.make({narrow});
      std::stringstream stream = saved(*optimizer);
      load(*loaded, stream);
      EXPECT_TRUE(same_bytes(loaded->fp32_weight(narrow), narrow.detach().to(torch::kFloat)));
      const flash::FlashParamState *before = optimizer->param_state(wide), *after = loaded->param_state(narrow);
      EXPECT_EQ(after->step, 3);
      EXPECT_EQ(after->param_dtype, dtype);
      const bool keeps_digits = named.name.find("0bit") == std::string::npos;
      EXPECT_EQ(after->correction.numel(), keeps_digits ? narrow.numel() : 0);
      ASSERT_EQ(after->states.size(), before->states.size());
      for (size_t k = 0; k < after->states.size(); ++k) {
        EXPECT_TRUE(same_bytes(after->states[k], before->states[k]));
        EXPECT_TRUE(same_bytes(after->scales[k], before->scales[k]));
      }
      loaded->set_fp32_weight(narrow, wide);
      const Tensor error = (loaded->fp32_weight(narrow).to(torch::kDouble) - wide.detach().to(torch::kDouble)).abs();
      const double share = keeps_digits ? 0.51 / 127 : 1.0;
      EXPECT_TRUE((error <= half_spacing(narrow) * share + wide.detach().abs() * 6e-8).all().item<bool>());
      step(*loaded, {narrow}, 3);
      EXPECT_EQ(loaded->param_state(narrow)->step, 4);
      EXPECT_TRUE(warnings.texts.empty());
    }
  }
}

TEST(Conversions, EveryOptimizerInMidTrainingAsByArchive) {
  // The same change between two steps and between save and load: from there on the same bits.
  const std::pair<torch::Dtype, torch::Dtype> casts[] = {
      {torch::kBFloat16, torch::kFloat}, {torch::kBFloat16, torch::kHalf}, {torch::kHalf, torch::kFloat}};
  for (const NamedOptimizer& named : all_optimizers()) {
    for (const auto& [from, to] : casts) {
      SCOPED_TRACE(named.name + " from " + toString(from) + " to " + toString(to));
      const std::vector<Tensor> params{parameter({33, 47}, 1, from), parameter({5, 3, 40}, 3, from),
                                       parameter({0, 4}, 5, from), parameter({}, 6, from),
                                       parameter({64}, 7, torch::kFloat)};
      const auto optimizer = named.make(params);
      for (int64_t i = 0; i < 3; ++i) step(*optimizer, params, i);
      std::stringstream stream = saved(*optimizer);
      for (const Tensor& param : params) {
        if (param.scalar_type() != torch::kFloat) cast(param, to);
      }
      const std::vector<Tensor> loaded_params = copies(params);
      const auto loaded = named.make(loaded_params);
      load(*loaded, stream);
      for (int64_t i = 3; i < 6; ++i) {
        step(*optimizer, params, i);
        step(*loaded, loaded_params, i);
      }
      EXPECT_TRUE(Snapshot(*optimizer) == Snapshot(*loaded));
    }
  }
}

TEST(Conversions, ACorrectionThatIsLostIsSaid) {
  const Tensor param = parameter({64, 80}, 1, torch::kHalf);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3));
  step(optimizer, {param}, 1);
  std::stringstream stream = saved(optimizer);
  cast(param, torch::kBFloat16);
  {
    Warnings warnings;
    step(optimizer, {param}, 2);
    ASSERT_EQ(warnings.texts.size(), 1u);
    EXPECT_NE(warnings.texts[0].find("FlashAdamW: param_groups[0].params[0]"), std::string::npos);
    EXPECT_NE(warnings.texts[0].find("Half"), std::string::npos);
    step(optimizer, {param}, 3);
    EXPECT_EQ(warnings.texts.size(), 1u) << "once";
  }
  EXPECT_EQ(optimizer.param_state(param)->param_dtype, torch::kBFloat16);
  // An archive of another dtype than the parameter's, whose weights are not those of then.
  const Snapshot before(optimizer);
  expect_error([&] { load(optimizer, stream); }, {"param_groups[0].params[0]", "BFloat16", "Half"});
  EXPECT_TRUE(before == Snapshot(optimizer));
}

TEST(Conversions, QuantizeCanBeSwitchedOffAndOn) {
  const Tensor param = parameter({64, 80}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3).betas({0.75, 0.5}));
  for (int64_t i = 0; i < 3; ++i) step(optimizer, {param}, i);
  auto before = optimizer.decoded_state(param);
  options_of<flash::FlashAdamWOptions>(optimizer).quantize(false);
  rest(optimizer, param);
  const flash::FlashParamState* state = optimizer.param_state(param);
  EXPECT_EQ(state->state_codec, StateCodec::kFloat32);
  EXPECT_EQ(state->step, 4);
  EXPECT_EQ(state->scales[0].numel(), 0);
  EXPECT_TRUE(torch::allclose(state->states[0], before["exp_avg"] * 0.75, 1e-6, 0));
  EXPECT_TRUE(torch::allclose(state->states[1], before["exp_avg_sq"] * 0.5, 1e-6, 0));
  before = optimizer.decoded_state(param);
  options_of<flash::FlashAdamWOptions>(optimizer).quantize(true).state_codec("paper");
  rest(optimizer, param);
  state = optimizer.param_state(param);
  EXPECT_EQ(state->state_codec, StateCodec::kPaper);
  EXPECT_EQ(state->master_weights, MasterWeights::kCorrection8Nearest);
  EXPECT_EQ(state->scales[0].scalar_type(), torch::kHalf);
  const auto after = optimizer.decoded_state(param);
  EXPECT_LT((after["exp_avg"] - before["exp_avg"] * 0.75).norm().item<double>(),
            0.02 * after["exp_avg"].norm().item<double>());
}

TEST(Conversions, WidthsOfCorrections) {
  const Tensor param = parameter({64, 80}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3).weight_decay(0));
  for (int64_t i = 0; i < 3; ++i) step(optimizer, {param}, i);
  optimizer.param_groups()[0].options().set_lr(0);
  Tensor before = optimizer.fp32_weight(param);
  options_of<flash::FlashAdamWOptions>(optimizer).master_weight_bits(32);
  step(optimizer, {param}, 3);
  EXPECT_EQ(optimizer.param_state(param)->correction.scalar_type(), torch::kShort);
  EXPECT_EQ(optimizer.param_state(param)->master_weights, MasterWeights::kCorrection16);
  Tensor error = (optimizer.fp32_weight(param).to(torch::kDouble) - before.to(torch::kDouble)).abs();
  EXPECT_TRUE((error <= half_spacing(param) * (0.51 / 32767) + before.abs() * 6e-8).all().item<bool>());
  options_of<flash::FlashAdamWOptions>(optimizer).master_weight_bits(24);
  step(optimizer, {param}, 4);
  EXPECT_TRUE(same_bytes(optimizer.fp32_weight(param), before)) << "8 bits in 16 and back";
  Warnings warnings;
  options_of<flash::FlashAdamWOptions>(optimizer).master_weight_bits(0);
  EXPECT_TRUE(same_bytes(optimizer.fp32_weight(param), before)) << "until the next step";
  step(optimizer, {param}, 5);
  EXPECT_EQ(optimizer.param_state(param)->correction.numel(), 0);
  EXPECT_TRUE(same_bytes(optimizer.fp32_weight(param), param.detach().to(torch::kFloat)));
  ASSERT_EQ(warnings.texts.size(), 1u);
  EXPECT_NE(warnings.texts[0].find("correction"), std::string::npos);
}

TEST(Conversions, MomentumThatComesLaterBeginsAsAFirstStep) {
  const auto options = flash::FlashSGDOptions(1e-2).min_quantized_numel(0).dampening(0.5);
  const Tensor param = parameter({64, 80}, 1);
  flash::FlashSGD optimizer(std::vector<Tensor>{param}, options);
  for (int64_t i = 0; i < 3; ++i) step(optimizer, {param}, i);
  // A new optimizer of the same weights: its first step with momentum is ours.
  const Tensor twin = param.detach().clone().set_requires_grad(true);
  flash::FlashSGD fresh(std::vector<Tensor>{twin}, flash::FlashSGDOptions(options).momentum(0.9));
  fresh.set_fp32_weight(twin, optimizer.fp32_weight(param));
  fresh.param_state(twin)->correction.copy_(optimizer.param_state(param)->correction);
  twin.detach().copy_(param.detach());
  options_of<flash::FlashSGDOptions>(optimizer).momentum(0.9);
  for (int64_t i = 3; i < 6; ++i) {
    step(optimizer, {param}, i);
    step(fresh, {twin}, i);
  }
  EXPECT_EQ(optimizer.param_state(param)->step, 3);
  EXPECT_TRUE(same_bytes(optimizer.fp32_weight(param), fresh.fp32_weight(twin)));
  EXPECT_TRUE(same_bytes(optimizer.param_state(param)->states[0], fresh.param_state(twin)->states[0]));
  EXPECT_TRUE(same_bytes(optimizer.param_state(param)->scales[0], fresh.param_state(twin)->scales[0]));
}

TEST(Conversions, AStepThatFailsHasConvertedNothing) {
  const std::vector<Tensor> params{parameter({64, 80}, 1), parameter({90}, 2)};
  flash::FlashAdamW optimizer(params, flash::FlashAdamWOptions(1e-3));
  for (int64_t i = 0; i < 3; ++i) step(optimizer, params, i);
  cast(params[0], torch::kFloat);
  options_of<flash::FlashAdamWOptions>(optimizer).quantize(false);
  const Snapshot before(optimizer);
  const Tensor weights = optimizer.fp32_weight(params[0]);
  set_gradients(params, 4);
  Tensor(params[1]).mutable_grad() = torch::ones({7}, torch::kBFloat16);
  expect_error([&] { optimizer.step(); }, {"param_groups[0].params[1].grad", "[7]"});
  EXPECT_TRUE(before == Snapshot(optimizer));
  EXPECT_TRUE(same_bytes(weights, optimizer.fp32_weight(params[0])));
  // One that fails late, when all has been converted: the store finds that two parameters share memory.
  Tensor(params[1]).mutable_grad() = Tensor();
  Tensor(params[1]).set_data(params[0].detach().view({-1}).slice(0, 0, 90));
  Tensor(params[1]).mutable_grad() = torch::ones({90});
  const Snapshot shared(optimizer);
  expect_error([&] { optimizer.step(); }, {"share memory"});
  EXPECT_TRUE(shared == Snapshot(optimizer));
  EXPECT_TRUE(same_bytes(weights, optimizer.fp32_weight(params[0])));
}

TEST(Conversions, AnArchiveFollowsTheParameterItIsLoadedFor) {
  const Tensor param = parameter({64, 80}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3));
  for (int64_t i = 0; i < 3; ++i) step(optimizer, {param}, i);
  // bf16 -> fp32, the model's weights loaded first: parameter and correction become one.
  std::stringstream stream = saved(optimizer);
  const Tensor wide = param.detach().to(torch::kFloat).set_requires_grad(true);
  flash::FlashAdamW of_wide(std::vector<Tensor>{wide});
  load(of_wide, stream);
  EXPECT_TRUE(same_bytes(wide, optimizer.fp32_weight(param)));
  EXPECT_EQ(of_wide.param_state(wide)->correction.numel(), 0);
  // Other weights than those of then: refused, and nothing is changed.
  const Tensor strange = parameter({64, 80}, 9, torch::kFloat);
  flash::FlashAdamW of_strange(std::vector<Tensor>{strange});
  const Snapshot before(of_strange);
  std::stringstream again = saved(optimizer);
  expect_error([&] { load(of_strange, again); }, {"FlashAdamW::load: param_groups[0].params[0]", "Float", "BFloat16"});
  EXPECT_TRUE(before == Snapshot(of_strange));
  // Saved between a cast and the next step: the archive knows what the correction belongs to.
  cast(param, torch::kFloat);
  std::stringstream between = saved(optimizer);
  const Tensor resumed_param = param.detach().clone().set_requires_grad(true);
  flash::FlashAdamW resumed(std::vector<Tensor>{resumed_param});
  load(resumed, between);
  EXPECT_TRUE(same_bytes(resumed_param, wide));
}

TEST(Conversions, AnArchiveOfStateFormat1) {
  // There a row was all dimensions but the first: the same groups here, under another shape of scales.
  const Tensor param = parameter({8, 16, 64}, 1), twin = parameter({8, 16, 64}, 1);
  flash::FlashAdamW old(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3)),
      now(std::vector<Tensor>{twin}, flash::FlashAdamWOptions(1e-3));
  for (int64_t i = 0; i < 3; ++i) {
    step(old, {param}, i);
    step(now, {twin}, i);
  }
  auto& state = const_cast<flash::FlashParamState&>(*old.param_state(param));
  ASSERT_EQ(state.scales[0].sizes(), (std::vector<int64_t>{8, 16, 2}));
  for (Tensor& scale : state.scales) scale = scale.view({8, 32}).clone();
  state.rows = 8;
  std::stringstream stream = saved(old);
  const Tensor loaded_param = param.detach().clone().set_requires_grad(true);
  flash::FlashAdamW loaded(std::vector<Tensor>{loaded_param});
  load(loaded, stream);
  EXPECT_TRUE(Snapshot(loaded) == Snapshot(now));
  step(old, {param}, 3);  // and a state of that shape that is still in use
  step(now, {twin}, 3);
  step(loaded, {loaded_param}, 3);
  EXPECT_TRUE(Snapshot(old) == Snapshot(now));
  EXPECT_TRUE(Snapshot(loaded) == Snapshot(now));
  const_cast<flash::FlashParamState&>(*old.param_state(param)).rows = 3;
  std::stringstream bad = saved(old);
  expect_error([&] { load(loaded, bad); }, {"rows = 3", "128"});
}

TEST(Conversions, StatesThatAreTakenAwayAreMadeAnew) {
  const Tensor param = parameter({64, 80}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3));
  for (int64_t i = 0; i < 3; ++i) step(optimizer, {param}, i);
  optimizer.state().clear();
  EXPECT_EQ(optimizer.param_state(param), nullptr);
  step(optimizer, {param}, 3);
  EXPECT_EQ(optimizer.param_state(param)->step, 1);
}

TEST(Conversions, ResetCorrectionsAfterACastAreOfTheNewDtype) {
  for (const auto to : {torch::kFloat, torch::kHalf}) {
    Warnings warnings;
    const Tensor param = parameter({64, 80}, 1);
    flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3));
    for (int64_t i = 0; i < 3; ++i) step(optimizer, {param}, i);
    cast(param, to);
    optimizer.reset_corrections();
    EXPECT_TRUE(same_bytes(optimizer.fp32_weight(param), param.detach().to(torch::kFloat)));
    optimizer.param_groups()[0].options().set_lr(0);
    const Tensor before = param.detach().clone();
    step(optimizer, {param}, 3);
    EXPECT_TRUE(same_bytes(before, param));
    EXPECT_TRUE(warnings.texts.empty());
  }
}

TEST(Conversions, WeightsSetAfterACastAreTheNewDtypes) {
  for (const auto to : {torch::kFloat, torch::kHalf}) {
    Warnings warnings;
    const Tensor param = parameter({64, 80}, 1);
    flash::FlashAdamW optimizer(std::vector<Tensor>{param}, flash::FlashAdamWOptions(1e-3).master_weight_bits(32));
    for (int64_t i = 0; i < 3; ++i) step(optimizer, {param}, i);
    const Tensor weights = optimizer.fp32_weight(param);
    cast(param, to);
    optimizer.set_fp32_weight(param, weights);
    EXPECT_TRUE(torch::allclose(optimizer.fp32_weight(param), weights, 2e-7, 1e-9));
    EXPECT_EQ(optimizer.param_state(param)->step, 3);
    EXPECT_TRUE(warnings.texts.empty()) << "nothing is lost";
  }
}

}  // namespace
}  // namespace flashoptim_test
