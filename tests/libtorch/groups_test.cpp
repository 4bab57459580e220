// Groups that did not come through add_param_group: nothing is lost in silence.
#include <sstream>

#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

using Group = torch::optim::OptimizerParamGroup;
using Options = flash::FlashAdamWOptions;

struct Added {
  std::vector<Tensor> params{parameter({40}, 1), parameter({50}, 2)};
  flash::FlashAdamW optimizer{std::vector<Tensor>{params[0]}, Options(0.5).betas({0.5, 0.6})};
  torch::optim::Optimizer& base = optimizer;

  const flashoptim::libtorch::OptionValues& values(size_t group) {
    return static_cast<const flash::FlashOptions&>(optimizer.param_groups()[group].options()).values();
  }
  void step() {
    set_gradients(params, 1);
    optimizer.step();
  }
  std::string saved() const {
    torch::serialize::OutputArchive archive;
    optimizer.save(archive);
    std::ostringstream stream;
    archive.save_to(stream);
    return stream.str();
  }
};

const std::vector<std::string> kLost{"FlashAdamW: param_groups[1].options may be lost", "FlashAdamW::add_param_group",
                                     "not virtual", "set_options(std::make_unique<FlashAdamWOptions>"};

/// What torch::optim::Optimizer::add_param_group makes of a group whose options are not torch's own, since torch 2.12.
/// (Before, it kept them, and so nothing is lost.) With a group that has none, every torch does so.
void add_as_torch_does(Added& added) {
  added.optimizer.param_groups().emplace_back(std::vector<Tensor>{added.params[1]}, added.optimizer.defaults().clone());
}

TEST(Groups, AddedThroughTheBaseClassAreAnErrorUntilMended) {
  for (const bool by_torch : {true, false}) {
    for (const bool stepped_before : {true, false}) {
      Added added;
      if (stepped_before) added.step();
      if (by_torch) {
        added.base.add_param_group(Group({added.params[1]}));
      } else {
        add_as_torch_does(added);
      }
      set_gradients(added.params, 2);
      const Snapshot before(added.optimizer);
      expect_error([&] { added.optimizer.step(); }, kLost);
      expect_error([&] { added.saved(); }, kLost);
      expect_error([&] { added.optimizer.set_fp32_weight(added.params[1], torch::zeros({50})); }, kLost);
      EXPECT_TRUE(before == Snapshot(added.optimizer));

      added.optimizer.param_groups()[1].set_options(std::make_unique<Options>(1e-3));
      added.optimizer.step();
      EXPECT_EQ(added.optimizer.param_state(added.params[1])->step, 1);
      EXPECT_EQ(added.values(1).lr, 1e-3);
      EXPECT_EQ(added.values(1).initial_lr, 1e-3);
      EXPECT_EQ(std::get<0>(added.values(1).betas), 0.5) << "from the defaults";
    }
  }
}

TEST(Groups, OptionsAddedThroughTheBaseClassAreTakenOrAnError) {
  // Which of both depends on torch: never are they lost without a word.
  Added added;
  added.base.add_param_group(Group({added.params[1]}, std::make_unique<Options>(1e-3)));
  const std::string message = error_of([&] { added.step(); });
  if (message.empty()) {
    EXPECT_EQ(added.values(1).lr, 1e-3);
    EXPECT_EQ(std::get<0>(added.values(1).betas), 0.5) << "from the defaults";
  } else {
    for (const std::string& part : kLost) EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

TEST(Groups, AddedThroughTheBaseClassCanBeTakenOut) {
  Added added;
  add_as_torch_does(added);
  expect_error([&] { added.step(); }, kLost);
  added.optimizer.param_groups().pop_back();
  dynamic_cast<flash::FlashOptimizer&>(added.base)
      .add_param_group(Group({added.params[1]}, std::make_unique<Options>(1e-3)));
  added.step();
  EXPECT_EQ(added.values(1).lr, 1e-3);
}

TEST(Groups, DefaultsMayBeGivenToAddParamGroup) {
  Added added;
  added.optimizer.add_param_group(Group({added.params[1]}, added.optimizer.defaults().clone()));
  added.step();
  EXPECT_EQ(added.values(1).lr, 0.5);
}

TEST(Groups, AssignedOptionsTakeDefaultsAgain) {
  Added added;
  static_cast<Options&>(added.optimizer.param_groups()[0].options()) = Options(0.25).decouple_lr(true);
  added.step();
  EXPECT_EQ(added.values(0).lr, 0.25);
  EXPECT_EQ(added.values(0).initial_lr, 0.25) << "decay relative to 0 would be no decoupling";
  EXPECT_EQ(std::get<0>(added.values(0).betas), 0.5);
  static_cast<Options&>(added.optimizer.param_groups()[0].options()).initial_lr(0);
  expect_error([&] { added.step(); }, {"param_groups[0].initial_lr = 0", "decouple_lr"});
}

TEST(Groups, PutIntoParamGroupsByHandTakeDefaults) {
  for (const bool save_first : {true, false}) {
    Added added;
    const Tensor third = parameter({60}, 3);
    added.params.push_back(third);
    added.optimizer.param_groups().emplace_back(std::vector<Tensor>{added.params[1]},
                                                std::make_unique<Options>(Options().lr(1e-3)));
    added.optimizer.param_groups().emplace_back(std::vector<Tensor>{third});
    if (save_first) {
      std::istringstream stream(added.saved());
      const std::vector<Tensor> copies{parameter({40}, 1), parameter({50}, 2), parameter({60}, 3)};
      flash::FlashAdamW loaded(std::vector<Group>{Group({copies[0]}), Group({copies[1]}), Group({copies[2]})});
      torch::load(loaded, stream);
      EXPECT_EQ(loaded.param_groups()[1].options().get_lr(), 1e-3);
      EXPECT_EQ(loaded.param_groups()[2].options().get_lr(), 0.5);
    }
    added.step();
    EXPECT_EQ(added.values(1).lr, 1e-3);
    EXPECT_EQ(std::get<0>(added.values(1).betas), 0.5);
    EXPECT_EQ(added.values(2).lr, 0.5);
  }
}

TEST(Groups, PutInByHandAreCheckedLikeOthers) {
  const auto refuse = [](std::unique_ptr<torch::optim::OptimizerOptions> options,
                         const std::vector<std::string>& parts) {
    Added added;
    added.optimizer.param_groups().emplace_back(std::vector<Tensor>{added.params[1]}, std::move(options));
    const Snapshot before(added.optimizer);
    expect_error([&] { added.step(); }, parts);
    expect_error([&] { added.saved(); }, parts);
    EXPECT_TRUE(before == Snapshot(added.optimizer));
  };
  refuse(std::make_unique<torch::optim::AdamWOptions>(1e-3), {"param_groups[1].options", "FlashAdamWOptions"});
  refuse(std::make_unique<flash::FlashLionOptions>(1e-3), {"param_groups[1].options", "FlashAdamWOptions"});
  refuse(std::make_unique<Options>(-1), {"param_groups[1].lr = -1"});
  refuse(std::make_unique<Options>(Options(0).decouple_lr(true)), {"param_groups[1].initial_lr = 0"});
  Added added;
  added.base.add_parameters({torch::zeros({4}, torch::kDouble).set_requires_grad(true)});
  added.params.push_back(added.optimizer.parameters()[1]);
  expect_error([&] { added.step(); }, {"param_groups[0].params[1]", "dtype Double"});
}

TEST(Groups, AnArchiveBringsWhatWasLost) {
  Added added, whole;
  whole.optimizer.add_param_group(Group({whole.params[1]}, std::make_unique<Options>(1e-3)));
  whole.step();
  added.base.add_param_group(Group({added.params[1]}, std::make_unique<Options>(1e-3)));
  std::istringstream stream(whole.saved());
  torch::load(added.optimizer, stream);
  EXPECT_EQ(added.values(1).lr, 1e-3);
  added.step();
  EXPECT_EQ(added.optimizer.param_state(added.params[1])->step, 2);
}

}  // namespace
}  // namespace flashoptim_test
