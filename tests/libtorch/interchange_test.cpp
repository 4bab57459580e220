// States from and to torch::optim and safetensors files.
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "tests/libtorch/archives.h"

namespace flashoptim_test {
namespace {

/// A file that goes with the test.
struct TemporaryFile {
  std::string path = testing::TempDir() + "flashoptim-" + std::to_string(::getpid()) + ".safetensors";
  ~TemporaryFile() { std::remove(path.c_str()); }
  std::string content() const {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void write(const std::string& bytes) const { std::ofstream(path, std::ios::binary) << bytes; }
};

std::vector<Tensor> fp32_parameters() {
  return {parameter({64, 80}, 1, torch::kFloat), parameter({90}, 2, torch::kFloat)};
}

double distance(const Tensor& a, const Tensor& b) {
  return (a.to(torch::kDouble) - b.to(torch::kDouble)).norm().item<double>() /
         b.to(torch::kDouble).norm().item<double>();
}

/// torch's optimizer, then ours from its states, and both go on; and back again.
template <class Flash, class Torch, class TorchOptions>
void train_on(const typename Flash::Options& options, const TorchOptions& torch_options, double tolerance) {
  const std::vector<Tensor> params = fp32_parameters(), twins = fp32_parameters();
  Torch theirs(twins, torch_options);
  for (int64_t t = 0; t < 3; ++t) {
    set_gradients(twins, t);
    theirs.step();
  }
  for (const bool by_archive : {false, true}) {
    for (size_t i = 0; i < params.size(); ++i) params[i].detach().copy_(twins[i].detach());
    Flash ours(params, options);
    if (by_archive) {
      std::stringstream stream;
      torch::save(theirs, stream);
      torch::serialize::InputArchive archive;
      archive.load_from(stream);
      flash::load_torch_archive(ours, archive);
    } else {
      flash::load_from_torch(ours, theirs);
    }
    const auto& taken = static_cast<const typename Flash::Options&>(ours.param_groups()[0].options());
    EXPECT_EQ(taken.lr(), torch_options.lr());
    EXPECT_EQ(taken.weight_decay(), torch_options.weight_decay());
    const std::vector<Tensor> goes_on = copies(twins);
    Torch continued(goes_on, TorchOptions(1.0));
    std::stringstream stream;
    if (by_archive) {
      torch::serialize::OutputArchive archive;
      flash::save_torch_archive(ours, archive);
      archive.save_to(stream);
      torch::load(continued, stream);
    } else {
      flash::save_to_torch(ours, continued);
    }
    for (int64_t t = 3; t < 6; ++t) {
      step(ours, params, t);
      set_gradients(goes_on, t);
      continued.step();
    }
    for (size_t i = 0; i < params.size(); ++i) {
      EXPECT_LT(distance(params[i].detach() - twins[i].detach(), goes_on[i].detach() - twins[i].detach()), tolerance);
    }
  }
}

TEST(TorchStates, AdamWGoesOn) {
  const auto theirs = torch::optim::AdamWOptions(1e-2).betas({0.8, 0.95}).weight_decay(0.1);
  train_on<flash::FlashAdamW, torch::optim::AdamW>(flash::FlashAdamWOptions(1.0).quantize(false), theirs, 1e-4);
  train_on<flash::FlashAdamW, torch::optim::AdamW>(flash::FlashAdamWOptions(1.0), theirs, 0.05);
}

TEST(TorchStates, AdamGoesOn) {
  const auto theirs = torch::optim::AdamOptions(1e-2).betas({0.8, 0.95}).weight_decay(0.1);
  train_on<flash::FlashAdam, torch::optim::Adam>(flash::FlashAdamOptions(1.0).quantize(false), theirs, 1e-4);
}

TEST(TorchStates, SGDGoesOn) {
  const auto theirs = torch::optim::SGDOptions(1e-2).momentum(0.9).weight_decay(0.1);
  train_on<flash::FlashSGD, torch::optim::SGD>(flash::FlashSGDOptions(1.0).quantize(false), theirs, 1e-4);
  train_on<flash::FlashSGD, torch::optim::SGD>(flash::FlashSGDOptions(1.0),
                                               torch::optim::SGDOptions(1e-2).weight_decay(0.1), 1e-4);
}

TEST(TorchStates, DecayOfDecoupledLrMeansTheSame) {
  const std::vector<Tensor> params = fp32_parameters(), twins = copies(params);
  flash::FlashAdamW ours(params, flash::FlashAdamWOptions(0.5).quantize(false).weight_decay(0.02).decouple_lr(true));
  step(ours, params, 0);
  for (size_t i = 0; i < params.size(); ++i) twins[i].detach().copy_(params[i].detach());
  torch::optim::AdamW theirs(twins, torch::optim::AdamWOptions(1.0));
  flash::save_to_torch(ours, theirs);
  ours.param_groups()[0].options().set_lr(0.05);
  theirs.param_groups()[0].options().set_lr(0.05);
  step(ours, params, 1);
  set_gradients(twins, 1);
  theirs.step();
  for (size_t i = 0; i < params.size(); ++i) EXPECT_LT(distance(params[i].detach(), twins[i].detach()), 1e-6);
  flash::load_from_torch(ours, theirs);
  const auto& taken = static_cast<const flash::FlashAdamWOptions&>(ours.param_groups()[0].options());
  EXPECT_TRUE(taken.decouple_lr());
  EXPECT_NEAR(taken.weight_decay(), 0.02, 1e-15);
}

TEST(TorchStates, WhatTorchCannotKeepIsSaid) {
  const std::vector<Tensor> params{parameter({64, 80}, 1)};
  flash::FlashAdamW ours(params, flash::FlashAdamWOptions(1e-2));
  step(ours, params, 0);
  torch::optim::AdamW theirs(params, torch::optim::AdamWOptions(1.0));
  {
    const Warnings warnings;
    flash::save_to_torch(ours, theirs);
    ASSERT_EQ(warnings.texts.size(), 1u);
    EXPECT_NE(warnings.texts[0].find("1 parameters have corrections"), std::string::npos) << warnings.texts[0];
  }
  static_cast<flash::FlashAdamWOptions&>(ours.param_groups()[0].options()).maximize(true);
  ours.param_groups()[0].options().set_lr(0.5);
  expect_error([&] { flash::save_to_torch(ours, theirs); }, {"param_groups[0].maximize = true", "must be false"});
  EXPECT_EQ(theirs.param_groups()[0].options().get_lr(), 1e-2);
}

TEST(TorchStates, WhatDoesNotGoTogetherIsRefusedAndChangesNothing) {
  const std::vector<Tensor> params = fp32_parameters();
  flash::FlashAdamW ours(params, flash::FlashAdamWOptions(1e-2));
  step(ours, params, 1);
  const Snapshot before(ours);
  torch::optim::SGD sgd(fp32_parameters(), 0.1);
  expect_error([&] { flash::load_from_torch(ours, sgd); }, {"load_from_torch", "torch::optim::AdamW"});
  expect_error([&] { flash::save_to_torch(ours, sgd); }, {"save_to_torch", "torch::optim::AdamW"});
  torch::optim::AdamW fewer({params[0]}, torch::optim::AdamWOptions(1.0));
  expect_error([&] { flash::load_from_torch(ours, fewer); }, {"param_groups[0] has 1 params", "must be 2"});
  std::vector<Tensor> others{params[0], parameter({91}, 2, torch::kFloat)};
  torch::optim::AdamW other(others, torch::optim::AdamWOptions(1.0));
  expect_error([&] { flash::load_from_torch(ours, other); }, {"param_groups[0].params[1]", "[91]", "[90]"});
  torch::optim::AdamW bad(copies(params), torch::optim::AdamWOptions(1.0));
  set_gradients(bad.parameters(), 1);
  bad.step();
  static_cast<torch::optim::AdamWParamState&>(*bad.state().at(bad.parameters()[1].unsafeGetTensorImpl()))
      .exp_avg_sq()
      .fill_(-1);
  expect_error([&] { flash::load_from_torch(ours, bad); }, {"param_groups[0].params[1]", "negative"});
  std::stringstream stream;
  torch::save(sgd, stream);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  expect_error([&] { flash::load_torch_archive(ours, archive); }, {"load_torch_archive"});
  EXPECT_TRUE(before == Snapshot(ours));
  EXPECT_EQ(ours.param_groups()[0].options().get_lr(), 1e-2);
  const Tensor param = parameter({8}, 1);
  flash::FlashLion lion(std::vector<Tensor>{param});
  expect_error([&] { flash::load_from_torch(lion, sgd); }, {"FlashLion has no counterpart"});
}

TEST(SafetensorsFile, EveryOptimizerGoesOnWithTheSameBits) {
  for (const NamedOptimizer& named : all_optimizers()) {
    SCOPED_TRACE(named.name);
    const std::vector<Tensor> params = mixed_parameters();
    const auto optimizer = named.make(params);
    for (int64_t t = 0; t < 3; ++t) step(*optimizer, params, t);
    const TemporaryFile file;
    flash::save_safetensors(file.path, *optimizer);
    const std::vector<Tensor> loaded_params = copies(params);
    const auto loaded = named.make(loaded_params);
    loaded->param_groups()[0].options().set_lr(1);
    flash::load_safetensors(file.path, *loaded);
    EXPECT_TRUE(Snapshot(*loaded) == Snapshot(*optimizer));
    for (int64_t t = 3; t < 5; ++t) {
      step(*optimizer, params, t);
      step(*loaded, loaded_params, t);
    }
    EXPECT_TRUE(Snapshot(*loaded) == Snapshot(*optimizer));
  }
}

struct Trained {
  std::vector<Tensor> params{
      parameter({64, 80}, 1), parameter({90}, 2),
      parameter({6, 40, 2, 3}, 3).detach().to(torch::MemoryFormat::ChannelsLast).set_requires_grad(true)};
  flash::FlashAdamW optimizer{params, flash::FlashAdamWOptions(1e-2).min_quantized_numel(0)};
  Trained() {
    for (int64_t t = 0; t < 3; ++t) step(optimizer, params, t);
  }
};

TEST(SafetensorsFile, HoldsWhatStateFormatSays) {
  const Trained trained;
  const TemporaryFile file;
  flash::save_safetensors(file.path, trained.optimizer);
  const flash::Safetensors content = flash::read_safetensors(file.path);
  EXPECT_EQ(content.metadata.at("flashoptim_native.optimizer"), "adamw");
  EXPECT_EQ(content.metadata.at("format"), "pt");
  EXPECT_EQ(content.tensors["state.0.step"].item<int64_t>(), 3);
  EXPECT_EQ(content.tensors["state.0.exp_avg_codes"].sizes(), (std::vector<int64_t>{64, 80}));
  EXPECT_EQ(content.tensors["state.0.exp_avg_scale"].sizes(), (std::vector<int64_t>{64, 3, 2}));
  EXPECT_EQ(content.tensors["state.2.storage_order"].numel(), 4);
  EXPECT_EQ(content.tensors["state.2.correction"].sizes(), (std::vector<int64_t>{6, 2, 3, 40}));
  EXPECT_EQ(content.tensors.find("state.0.storage_order"), nullptr);
}

TEST(SafetensorsFile, FormatsStayTheOptimizersOwnAndWeightsComeFirst) {
  const Trained trained;
  const TemporaryFile file;
  flash::save_safetensors(file.path, trained.optimizer);
  const std::vector<Tensor> params = copies(trained.params);
  flash::FlashAdamW other(params, flash::FlashAdamWOptions(1.0).quantize(false).min_quantized_numel(0));
  flash::load_safetensors(file.path, other);
  EXPECT_EQ(other.param_groups()[0].options().get_lr(), 1e-2);
  EXPECT_EQ(other.param_state(params[0])->state_codec, flashoptim::StateCodec::kFloat32);
  EXPECT_TRUE(torch::equal(other.decoded_state(params[2])["exp_avg"],
                           trained.optimizer.decoded_state(trained.params[2])["exp_avg"]));
  const std::vector<Tensor> strange{parameter({64, 80}, 1, torch::kFloat), params[1], params[2]};
  flash::FlashAdamW wide(strange);
  const Snapshot before(wide);
  expect_error([&] { flash::load_safetensors(file.path, wide); },
               {"load_safetensors", "params[0]", "Float", "BFloat16"});
  EXPECT_TRUE(before == Snapshot(wide));
}

TEST(SafetensorsFile, EveryDamageIsFoundAndChangesNothing) {
  Trained trained;
  const TemporaryFile file;
  flash::save_safetensors(file.path, trained.optimizer);
  const std::string good = file.content();
  step(trained.optimizer, trained.params, 3);
  const Snapshot before(trained.optimizer);
  const auto refuse = [&](const std::string& bytes) {
    file.write(bytes);
    const std::string message = error_of([&] { flash::load_safetensors(file.path, trained.optimizer); });
    EXPECT_NE(message.find(file.path), std::string::npos) << message;
    EXPECT_TRUE(before == Snapshot(trained.optimizer));
  };
  // Of the length and of the tensors, every byte that is looked at; of the header, its names and numbers are compared
  // with what must be there, and its groups are in the checksum.
  const uint64_t header = 8 + *reinterpret_cast<const uint64_t*>(good.data());
  for (size_t i = 0; i < good.size(); i += i < 8 ? 1 : 997) {
    if (i >= 8 && i < header) continue;
    std::string bytes = good;
    bytes[i] = static_cast<char>(bytes[i] ^ 1);
    refuse(bytes);
  }
  const size_t lr = good.find("\\\"lr\\\":0.01");
  ASSERT_NE(lr, std::string::npos);
  std::string other_lr = good;
  other_lr[lr + 10] = '2';
  refuse(other_lr);
  for (const size_t length : {size_t{0}, size_t{7}, size_t{8}, size_t{100}, good.size() - 1}) {
    refuse(good.substr(0, length));
  }
  refuse(good + "x");
  flash::Safetensors content;
  content.tensors.insert("state.0.step", torch::zeros({}, torch::kLong));
  flash::write_safetensors(file.path, content);
  expect_error([&] { flash::load_safetensors(file.path, trained.optimizer); }, {"flashoptim_native.format is missing"});
  expect_error([&] { flash::read_safetensors(file.path + ".none"); }, {"cannot be opened"});
  file.write(good);
  flash::load_safetensors(file.path, trained.optimizer);
  EXPECT_EQ(trained.optimizer.param_state(trained.params[0])->step, 3);
}

TEST(SafetensorsFile, AnotherOptimizersIsRefused) {
  const Trained trained;
  const TemporaryFile file;
  flash::save_safetensors(file.path, trained.optimizer);
  flash::FlashAdam adam(copies(trained.params));
  expect_error([&] { flash::load_safetensors(file.path, adam); }, {"flashoptim_native.optimizer", "adamw", "\"adam\""});
  flash::FlashAdamW fewer(std::vector<Tensor>{trained.params[0]});
  expect_error([&] { flash::load_safetensors(file.path, fewer); }, {"param_groups[0].params", "1 numbers"});
}

TEST(SafetensorsFile, TakesTensorsOfEveryDtype) {
  const TemporaryFile file;
  flash::Safetensors content;
  content.metadata["a"] = "b \"quoted\"";
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kHalf, torch::kBFloat16, torch::kLong, torch::kInt,
                           torch::kShort, torch::kChar, torch::kByte, torch::kBool}) {
    content.tensors.insert(toString(dtype), torch::arange(6).to(dtype).view({2, 3}).t());
  }
  content.tensors.insert("empty", torch::zeros({0, 4}));
  content.tensors.insert("scalar", torch::ones({}));
  flash::write_safetensors(file.path, content);
  const flash::Safetensors read = flash::read_safetensors(file.path);
  EXPECT_EQ(read.metadata, content.metadata);
  ASSERT_EQ(read.tensors.size(), content.tensors.size());
  for (const auto& item : content.tensors)
    EXPECT_TRUE(same_bytes(item.value(), read.tensors[item.key()])) << item.key();
  content.tensors.insert("complex", torch::zeros({1}, torch::kComplexFloat));
  expect_error([&] { flash::write_safetensors(file.path, content); }, {"ComplexFloat", "safetensors"});
  EXPECT_EQ(flash::read_safetensors(file.path).tensors.size(), read.tensors.size()) << "the old file is there";
}

}  // namespace
}  // namespace flashoptim_test
