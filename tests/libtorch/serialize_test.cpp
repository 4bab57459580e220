// torch::save and torch::load: nothing is lost, a resumed run equals the uninterrupted one bit for bit.
#include "flashoptim/version.h"
#include "tests/libtorch/archives.h"

namespace flashoptim_test {
namespace {

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
}

/// An archive of parameters that lie in `from`'s order, loaded for the same weights in `to`'s.
struct Reordered {
  Tensor before, after;
  std::unique_ptr<flash::FlashOptimizer> saved_from, loaded;

  Reordered(const NamedOptimizer& named, const Tensor& weights, const Tensor& from, const Tensor& to)
      : before(torch::empty_like(from).copy_(weights).set_requires_grad(true)),
        after(torch::empty_like(to).copy_(weights).set_requires_grad(true)),
        saved_from(named.make({before})),
        loaded(named.make({after})) {
    for (int64_t i = 0; i < 3; ++i) step(*saved_from, {before}, i);
    {
      const torch::NoGradGuard no_grad;
      after.copy_(before);
    }
    std::stringstream stream = saved(*saved_from);
    load(*loaded, stream);
  }
};

TEST(Serialize, AnArchiveLoadsIntoAnotherOrderInMemory) {
  const torch::NoGradGuard no_grad;
  const Tensor leading = torch::randn({6, 8, 64}), image = torch::randn({16, 20, 5, 5}).to(torch::kBFloat16);
  const Tensor narrow = leading.to(torch::kBFloat16);
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    for (const bool back : {false, true}) {
      // Rows stay what they were, in another order: the same groups, and the same numbers to the last bit.
      const Tensor swapped = narrow.transpose(0, 1).contiguous().transpose(0, 1);
      const Reordered rows(named, narrow, back ? swapped : narrow, back ? narrow : swapped);
      EXPECT_TRUE(same_bytes(rows.saved_from->fp32_weight(rows.before), rows.loaded->fp32_weight(rows.after)));
      const auto values = rows.saved_from->decoded_state(rows.before), found = rows.loaded->decoded_state(rows.after);
      for (const auto& item : values) EXPECT_TRUE(same_bytes(item.value(), found[item.key()])) << item.key();
      if (const auto* state = rows.loaded->param_state(rows.after); state != nullptr && !state->states.empty()) {
        EXPECT_EQ(state->states[0].strides(), rows.after.strides()) << "no step has to copy the parameter";
      }
      // Groups of other elements: through fp32, and to the nearest codes.
      const Tensor last = image.contiguous(at::MemoryFormat::ChannelsLast);
      const Reordered other(named, image, back ? last : image, back ? image : last);
      EXPECT_TRUE(same_bytes(other.saved_from->fp32_weight(other.before), other.loaded->fp32_weight(other.after)));
      EXPECT_EQ(other.loaded->param_state(other.after)->step, 3);
      const auto coarse = other.loaded->decoded_state(other.after);
      for (const auto& item : other.saved_from->decoded_state(other.before)) {
        const double error = (coarse[item.key()] - item.value()).norm().item<double>();
        EXPECT_LE(error, 0.05 * item.value().norm().item<double>()) << item.key();
      }
      step(*other.loaded, {other.after}, 4);
    }
  }
}

TEST(Serialize, ArchivesSayTheirFormat) {
  const Tensor param = parameter({70, 80}, 1);
  flash::FlashAdamW optimizer(std::vector<Tensor>{param});
  std::stringstream stream = saved(optimizer);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  c10::IValue version;
  archive.read("state_format_version", version);
  EXPECT_EQ(version.toInt(), 2);
  EXPECT_EQ(flashoptim::kStateFormatVersion, 2);
}

/// tests/data/archives: what commit b9225ff wrote, of state format 1, with weights and decoded states as it saw them.
template <class Optimizer>
void expect_loads(const std::string& file) {
  SCOPED_TRACE(file);
  torch::serialize::InputArchive archive, optimizer_archive;
  archive.load_from(std::string(FLASHOPTIM_TEST_DATA "/archives/") + file);
  std::vector<Tensor> params;
  const auto read = [&](const std::string& key) {
    Tensor tensor;
    archive.read(key, tensor, /*is_buffer=*/true);
    return tensor;
  };
  for (size_t i = 0; i < 6; ++i) params.push_back(read("param" + std::to_string(i)).set_requires_grad(true));
  Optimizer optimizer(params);
  archive.read("optimizer", optimizer_archive);
  optimizer.load(optimizer_archive);
  for (size_t i = 0; i < params.size(); ++i) {
    SCOPED_TRACE(i);
    const std::string number = std::to_string(i);
    EXPECT_EQ(optimizer.param_state(params[i])->step, 3);
    EXPECT_TRUE(same_bytes(optimizer.fp32_weight(params[i]), read("weight" + number)));
    const auto decoded = optimizer.decoded_state(params[i]);
    EXPECT_FALSE(decoded.is_empty());
    for (const auto& item : decoded) {
      const Tensor then = read(item.key() + number);
      // Where a row was no whole number of groups, groups are others now: through fp32.
      const bool same_groups = i != 2 && i != 5;
      const double error = (item.value() - then).norm().template item<double>();
      EXPECT_TRUE(!same_groups || same_bytes(item.value(), then)) << item.key();
      EXPECT_LE(error, 0.02 * then.norm().template item<double>()) << item.key();
    }
  }
  step(optimizer, params, 7);
  for (const Tensor& param : params) EXPECT_TRUE(param.isfinite().all().template item<bool>());
}

TEST(Serialize, ArchivesOfBeforeChecksumsAndFormat2Load) {
  expect_loads<flash::FlashAdamW>("adamw_format1.pt");
  expect_loads<flash::FlashLion>("lion_paper_format1.pt");
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
