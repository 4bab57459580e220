// torch::save and torch::load: nothing is lost, a resumed run equals the uninterrupted one bit for bit.
#include <sstream>

#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

std::vector<Tensor> copies(const std::vector<Tensor>& params) {
  std::vector<Tensor> result;
  for (const Tensor& param : params) result.push_back(param.detach().clone().set_requires_grad(true));
  return result;
}

std::stringstream saved(const flash::FlashOptimizer& optimizer) {
  std::stringstream stream;
  torch::serialize::OutputArchive archive;
  optimizer.save(archive);
  archive.save_to(stream);
  return stream;
}

void load(flash::FlashOptimizer& optimizer, std::stringstream& stream) {
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  optimizer.load(archive);
}

void step(flash::FlashOptimizer& optimizer, const std::vector<Tensor>& params, int64_t number) {
  set_gradients(params, number);
  optimizer.step();
}

TEST(Serialize, ResumedEqualsUninterrupted) {
  for (const NamedOptimizer& named : all_optimizers()) {
    for (const int64_t saved_after : {0, 1, 5}) {
      SCOPED_TRACE(named.name + " saved after " + std::to_string(saved_after));
      const std::vector<Tensor> params = mixed_parameters();
      const auto optimizer = named.make(params);
      for (int64_t i = 0; i < saved_after; ++i) step(*optimizer, params, i);
      std::stringstream stream = saved(*optimizer);
      const std::vector<Tensor> resumed_params = copies(params);
      for (int64_t i = saved_after; i < 10; ++i) step(*optimizer, params, i);

      const auto resumed = named.make(resumed_params);
      load(*resumed, stream);
      for (int64_t i = saved_after; i < 10; ++i) step(*resumed, resumed_params, i);
      EXPECT_TRUE(Snapshot(*optimizer) == Snapshot(*resumed));
    }
  }
}

TEST(Serialize, TorchSaveAndLoadRestoreOptionsAndGroups) {
  const std::vector<Tensor> params{parameter({100}, 1), parameter({90}, 2)};
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{params[0]});
  groups.emplace_back(std::vector<Tensor>{params[1]},
                      std::make_unique<flash::FlashAdamWOptions>(flash::FlashAdamWOptions(0.1 + 0.2)
                                                                     .betas({0.1, 0.7})
                                                                     .eps(1e-5)
                                                                     .weight_decay(1. / 3)
                                                                     .decouple_lr(true)
                                                                     .initial_lr(0.7)
                                                                     .maximize(true)
                                                                     .master_weight_bits(32)
                                                                     .state_codec("paper")
                                                                     .quantize(false)
                                                                     .min_quantized_numel(5)
                                                                     .stochastic_rounding(true)
                                                                     .seed((int64_t{1} << 53) - 1)));
  flash::FlashAdamW optimizer(groups, flash::FlashAdamWOptions(1e-3));
  optimizer.param_groups()[0].options().set_lr(1e-3 / 7);
  step(optimizer, params, 1);
  std::stringstream stream;
  torch::save(optimizer, stream);

  const std::vector<Tensor> other{parameter({100}, 8), parameter({90}, 9)};
  std::vector<torch::optim::OptimizerParamGroup> plain{std::vector<Tensor>{other[0]}, std::vector<Tensor>{other[1]}};
  flash::FlashAdamW loaded(plain);
  torch::load(loaded, stream);
  for (size_t g = 0; g < 2; ++g) {
    const auto& a = static_cast<const flash::FlashOptions&>(optimizer.param_groups()[g].options()).values();
    const auto& b = static_cast<const flash::FlashOptions&>(loaded.param_groups()[g].options()).values();
    flashoptim::libtorch::for_each_option(
        [&](int, const char* name, auto member) { EXPECT_TRUE(a.*member == b.*member) << name << " of group " << g; });
  }
  EXPECT_EQ(loaded.param_state(other[1])->correction.scalar_type(), torch::kShort);
}

TEST(Serialize, KeepsElementOrderOfChannelsLast) {
  const auto make = [] {
    return std::vector<Tensor>{
        parameter({16, 20, 5, 5}, 1).detach().contiguous(at::MemoryFormat::ChannelsLast).set_requires_grad(true)};
  };
  const auto params = make(), other = make();
  flash::FlashAdamW optimizer(params), loaded(other);
  step(optimizer, params, 1);
  step(loaded, other, 1);
  std::stringstream stream = saved(optimizer);
  load(loaded, stream);
  step(optimizer, params, 2);
  step(loaded, other, 2);
  EXPECT_TRUE(Snapshot(optimizer) == Snapshot(loaded));
  const std::vector<Tensor> contiguous{parameter({16, 20, 5, 5}, 1)};
  flash::FlashAdamW wrong(contiguous);
  stream = saved(optimizer);
  expect_error([&] { load(wrong, stream); }, {"params[0]", "correction", "strides"});
}

TEST(Serialize, BadArchivesChangeNothing) {
  const std::vector<Tensor> params = {parameter({100, 50}, 1), parameter({9}, 2)};
  flash::FlashAdamW optimizer(params, flash::FlashAdamWOptions(1e-2));
  step(optimizer, params, 1);
  const Snapshot before(optimizer);
  const auto refuse = [&](const flash::FlashOptimizer& other, const std::vector<std::string>& parts) {
    std::stringstream stream = saved(other);
    expect_error([&] { load(optimizer, stream); }, parts);
    EXPECT_TRUE(before == Snapshot(optimizer));
    EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 1e-2);
  };
  const auto stepped = [](auto& other, const std::vector<Tensor>& tensors) -> auto& {
    step(other, tensors, 1);
    return other;
  };
  flash::FlashLion lion(params);
  refuse(lion, {"FlashAdamW::load", "optimizer = \"lion\"", "adamw"});
  flash::FlashAdamW fewer(std::vector<Tensor>{params[0]}, flash::FlashAdamWOptions(0.5));
  refuse(fewer, {"param_groups[0] has 1 params", "2"});
  flash::FlashAdamW groups(
      {torch::optim::OptimizerParamGroup({params[0]}), torch::optim::OptimizerParamGroup({params[1]})});
  refuse(groups, {"2 param_groups", "1"});
  const std::vector<Tensor> shapes{parameter({100, 51}, 1), parameter({9}, 2)};
  flash::FlashAdamW other_shape(shapes, flash::FlashAdamWOptions(0.5));
  refuse(stepped(other_shape, shapes), {"param_groups[0].params[0]", "[100, 51]", "[100, 50]"});
  const std::vector<Tensor> halves{parameter({100, 50}, 1, torch::kHalf), parameter({9}, 2)};
  flash::FlashAdamW other_dtype(halves, flash::FlashAdamWOptions(0.5));
  refuse(stepped(other_dtype, halves), {"param_groups[0].params[0]", "BFloat16", "Half"});
  std::stringstream stream;
  torch::optim::AdamW torch_optimizer(params);
  torch::save(torch_optimizer, stream);
  expect_error([&] { load(optimizer, stream); }, {"flashoptim_archive_version is missing"});
  EXPECT_TRUE(before == Snapshot(optimizer));
}

}  // namespace
}  // namespace flashoptim_test
