// Every wrong argument: a message with its name and value, and an optimizer as it was.
#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

template <class Optimizer, class Options>
void refuse(const Options& options, const std::vector<std::string>& parts) {
  const Tensor param = parameter({8}, 1);
  expect_error([&] { Optimizer(std::vector<Tensor>{param}, options); }, parts);
  // The same in a group's own options, and set later.
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{param}, std::make_unique<Options>(options));
  expect_error([&] { Optimizer(groups, Options()); }, parts);
  Optimizer optimizer(std::vector<Tensor>{param}, Options());
  set_gradients({param}, 1);
  optimizer.step();
  const Snapshot before(optimizer);
  std::vector<std::string> with_group = parts;
  with_group.push_back("param_groups[0]");
  static_cast<Options&>(optimizer.param_groups()[0].options()) = options;
  expect_error([&] { optimizer.step(); }, with_group);
  EXPECT_TRUE(before == Snapshot(optimizer));
}

TEST(Errors, Options) {
  using AdamW = flash::FlashAdamW;
  using O = flash::FlashAdamWOptions;
  refuse<AdamW>(O(NAN), {"FlashAdamW", "lr = nan", "at least 0"});
  refuse<AdamW>(O(-1e-3), {"lr = -0.001"});
  refuse<AdamW>(O(INFINITY), {"lr = inf"});
  refuse<AdamW>(O().betas({1.0, 0.9}), {"betas[0] = 1;", "below 1"});
  refuse<AdamW>(O().betas({0.9, 1.5}), {"betas[1] = 1.5"});
  refuse<AdamW>(O().betas({-0.1, 0.9}), {"betas[0] = -0.1"});
  refuse<AdamW>(O().betas({NAN, 0.9}), {"betas[0] = nan"});
  refuse<AdamW>(O().eps(-1e-8), {"eps = -1e-08", "at least 0"});
  refuse<AdamW>(O().eps(NAN), {"eps = nan"});
  refuse<AdamW>(O().weight_decay(-1), {"weight_decay = -1"});
  refuse<AdamW>(O().initial_lr(-1), {"initial_lr = -1"});
  refuse<AdamW>(O().master_weight_bits(16), {"master_weight_bits = 16", "0, 24 or 32"});
  refuse<AdamW>(O().state_codec("int4"), {"state_codec = \"int4\"", "\"paper\""});
  refuse<AdamW>(O().min_quantized_numel(-1), {"min_quantized_numel = -1"});
  refuse<AdamW>(O().seed(-1), {"seed = -1"});
  refuse<AdamW>(O().seed(int64_t{1} << 53), {"seed = 9007199254740992", "2^53"});
  refuse<flash::FlashAdam>(flash::FlashAdamOptions().betas({0.9, 1.0}), {"FlashAdam", "betas[1] = 1;"});
  refuse<flash::FlashLion>(flash::FlashLionOptions().betas({0.9, 1.0}), {"FlashLion", "betas[1] = 1;"});
  refuse<flash::FlashSGD>(flash::FlashSGDOptions().momentum(-0.9), {"FlashSGD", "momentum = -0.9"});
  refuse<flash::FlashSGD>(flash::FlashSGDOptions().dampening(NAN), {"dampening = nan"});
  refuse<flash::FlashSGD>(flash::FlashSGDOptions().nesterov(true), {"momentum = 0", "nesterov"});
  refuse<flash::FlashSGDW>(flash::FlashSGDWOptions().nesterov(true).momentum(0.9).dampening(0.1),
                           {"dampening = 0.1", "nesterov"});
  expect_error([] { AdamW(std::vector<Tensor>{parameter({8}, 1)}, O(0.0).decouple_lr(true)); },
               {"initial_lr = 0", "decouple_lr"});
}

TEST(Errors, Parameters) {
  const auto refuse_param = [](const Tensor& bad, const std::vector<std::string>& parts) {
    const Tensor good = parameter({8}, 1);
    std::vector<std::string> with_name = parts;
    with_name.push_back("FlashAdamW: param_groups[0].params[1]");
    expect_error([&] { flash::FlashAdamW({good, bad}); }, with_name);
    flash::FlashAdamW optimizer(std::vector<Tensor>{good});
    expect_error([&] { optimizer.add_param_group({std::vector<Tensor>{bad}}); }, parts);
    EXPECT_EQ(optimizer.param_groups().size(), 1u);
  };
  refuse_param(Tensor(), {"undefined"});
  refuse_param(torch::zeros({4}, torch::kLong), {"dtype Long", "BFloat16"});
  refuse_param(torch::zeros({4}, torch::kDouble), {"dtype Double"});
  refuse_param(torch::zeros({4}, torch::kComplexFloat), {"dtype ComplexFloat"});
  refuse_param(torch::zeros({4}).to_sparse(), {"layout Sparse", "Strided"});
  refuse_param(torch::zeros({5}).as_strided({3, 2}, {1, 2}), {"strides [1, 2]"});
  refuse_param(torch::zeros({1}).expand({4}), {"strides [0]"});
  refuse_param(parameter({4}, 1) * 2, {"leaf"});
  const Tensor twice = parameter({8}, 1);
  expect_error([&] { flash::FlashAdamW({twice, twice}); }, {"param_groups[0].params[1]", "already"});
  flash::FlashAdamW optimizer(std::vector<Tensor>{twice});
  expect_error([&] { optimizer.add_param_group({std::vector<Tensor>{twice}}); },
               {"param_groups[1].params[0]", "already"});
  expect_error(
      [&] {
        optimizer.add_param_group(
            {std::vector<Tensor>{parameter({8}, 2)}, std::make_unique<flash::FlashLionOptions>(1e-3)});
      },
      {"param_groups[1]", "options", "FlashAdamWOptions"});
  expect_error(
      [&] {
        optimizer.add_param_group(
            {std::vector<Tensor>{parameter({8}, 2)}, std::make_unique<torch::optim::AdamWOptions>(1e-3)});
      },
      {"param_groups[1]", "options"});
  EXPECT_EQ(optimizer.param_groups().size(), 1u);
}

TEST(Errors, Gradients) {
  using Make = std::function<Tensor(const Tensor&)>;
  const std::vector<std::pair<Make, std::vector<std::string>>> cases = {
      {[](const Tensor& p) { return torch::zeros({9}, p.options()); }, {"shape [9]", "[8, 600]"}},
      {[](const Tensor& p) { return torch::zeros({600, 8}, p.options()); }, {"shape [600, 8]"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kHalf); }, {"dtype Half", "BFloat16"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kDouble); }, {"dtype Double"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kComplexFloat); }, {"dtype ComplexFloat"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kFloat).to_sparse(); }, {"layout Sparse", "to_dense"}},
      {[](const Tensor& p) { return torch::zeros_like(p).to(torch::kMeta); }, {"on meta", "cpu"}},
  };
  for (const bool stepped_before : {false, true}) {
    for (const auto& [make, parts] : cases) {
      // A good parameter first: it must stay as it is, too.
      const std::vector<Tensor> params{parameter({40}, 1), parameter({8, 600}, 2)};
      flash::FlashAdamW optimizer(params, flash::FlashAdamWOptions(1e-2));
      set_gradients(params, 1);
      if (stepped_before) optimizer.step();
      const Snapshot before(optimizer);
      Tensor(params[1]).mutable_grad() = make(params[1].detach());
      expect_error([&] { optimizer.step(); }, parts);
      expect_error([&] { optimizer.step(); }, {"FlashAdamW: param_groups[0].params[1].grad"});
      EXPECT_TRUE(before == Snapshot(optimizer));
      set_gradients(params, 2);
      optimizer.step();
      EXPECT_EQ(optimizer.param_state(params[1])->step, stepped_before ? 2 : 1);
    }
  }
}

TEST(Errors, OverlappingParameters) {
  const Tensor base = torch::randn({64}).to(torch::kBFloat16);
  const Tensor a = base.slice(0, 0, 40).detach().set_requires_grad(true),
               b = base.slice(0, 20, 60).detach().set_requires_grad(true);
  flash::FlashAdamW optimizer({a, b});
  set_gradients({a, b}, 1);
  const Tensor before = base.clone();
  expect_error([&] { optimizer.step(); }, {"share memory"});
  EXPECT_TRUE(same_bytes(before, base));
  EXPECT_EQ(optimizer.param_state(a), nullptr);
}

TEST(Errors, Inspection) {
  flash::FlashAdamW optimizer(std::vector<Tensor>{parameter({8}, 1)});
  const Tensor stranger = parameter({8}, 2);
  expect_error([&] { optimizer.param_state(stranger); }, {"FlashAdamW::param_state", "no parameter of this optimizer"});
  expect_error([&] { optimizer.decoded_state(stranger); }, {"decoded_state"});
  expect_error([&] { optimizer.fp32_weight(Tensor()); }, {"fp32_weight", "undefined"});
  const Tensor own = optimizer.param_groups()[0].params()[0];
  expect_error([&] { optimizer.set_fp32_weight(own, torch::zeros({9})); }, {"set_fp32_weight", "[9]", "[8]"});
  expect_error([&] { optimizer.set_fp32_weight(own, torch::zeros({8}, torch::kLong)); }, {"set_fp32_weight", "Long"});
}

}  // namespace
}  // namespace flashoptim_test
