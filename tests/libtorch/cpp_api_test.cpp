// The code of docs/cpp_api.md, run.
#include <unistd.h>

#include <cstdio>
#include <iostream>

#include "tests/libtorch/archives.h"

namespace flashoptim_test {
namespace {

struct NetImpl : torch::nn::Module {
  NetImpl() {
    register_module("embed", embed);
    register_module("body", body);
    register_module("norm", norm);
    register_module("head", head);
  }
  Tensor forward(const Tensor& tokens) {
    const Tensor x = norm(torch::gelu(body(embed(tokens))).to(norm->weight.scalar_type()));
    return head(x.to(head->weight.scalar_type()));
  }
  torch::nn::Embedding embed{20, 64};
  torch::nn::Linear body{64, 96};
  torch::nn::LayerNorm norm{torch::nn::LayerNormOptions({96})};
  torch::nn::Linear head{96, 20};
};
TORCH_MODULE(Net);

Tensor batch(int64_t seed) {
  at::manual_seed(static_cast<uint64_t>(seed));
  return torch::randint(20, {16});
}

Tensor loss_of(Net& model, const Tensor& tokens) {
  return torch::cross_entropy_loss(model(tokens).to(torch::kFloat), tokens);
}

struct Folder {
  std::string path = testing::TempDir() + "cpp-api-" + std::to_string(::getpid());
  std::string file(const std::string& name) const { return path + name; }
  ~Folder() {
    for (const char* name : {"run.flash", "model.pt", "run.safetensors", "adamw.pt"}) std::remove(file(name).c_str());
  }
};

TEST(CppApi, Training) {
  Net model;
  double first = 0, last = 0;
  {
    namespace flash = flashoptim::torch;

    flash::cast_model(*model);  // bfloat16; BatchNorm's statistics and rotary frequencies stay float32
    flash::FlashAdamW optimizer(model->parameters(), flash::FlashAdamWOptions(3e-3).weight_decay(0.1));
    for (int64_t i = 0; i < 30; ++i) {
      torch::Tensor loss = loss_of(model, batch(i));
      optimizer.zero_grad();
      loss.backward();
      optimizer.clip_grad_norm_(1.0);
      optimizer.step();
      (i == 0 ? first : last) = loss.item<double>();
    }
  }
  EXPECT_LT(last, 0.8 * first);
}

TEST(CppApi, GroupsAndPolicies) {
  namespace flash = flashoptim::torch;
  Net model;
  flash::cast_model(*model);
  {
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(model->body->parameters());
    groups.emplace_back(model->head->parameters(),
                        std::make_unique<flash::FlashAdamWOptions>(flash::FlashAdamWOptions().lr(1e-4)));
    flash::FlashAdamW optimizer(groups, flash::FlashAdamWOptions(1e-3).betas({0.9, 0.95}));
    EXPECT_EQ(optimizer.param_groups()[1].options().get_lr(), 1e-4);
  }
  {
    flash::FlashAdamW optimizer(model->named_parameters(), flash::FlashAdamWOptions(1e-3).weight_decay(0.1),
                                {{"embed.*", flash::FlashAdamWOptions().quantize(false)},
                                 {"*norm*", flash::FlashAdamWOptions().weight_decay(0)},
                                 {"*.bias", flash::FlashAdamWOptions().weight_decay(0)}});
    std::cout << optimizer.describe() << "\n";
    EXPECT_EQ(optimizer.param_groups().size(), 3u);
  }
}

TEST(CppApi, GradientRelease) {
  namespace flash = flashoptim::torch;
  Net model;
  flash::cast_model(*model);
  flash::FlashAdamW optimizer(model->parameters(), flash::FlashAdamWOptions(3e-3));
  auto handle =
      flash::enable_gradient_release(*model, optimizer, flash::GradientReleaseOptions().clip("two_pass").max_norm(1.0));
  for (int64_t i = 0; i < 3; ++i) {
    torch::Tensor loss = loss_of(model, batch(i));
    handle.measure_norm([&] { loss.backward({}, /*keep_graph=*/true); });
    loss.backward();  // steps, by clipped gradients
    optimizer.step();
  }
  EXPECT_GT(handle.grad_norm().item<double>(), 0.0);
  handle.remove();
}

TEST(CppApi, Accumulation) {
  namespace flash = flashoptim::torch;
  Net model;
  flash::cast_model(*model);
  flash::FlashAdamW optimizer(model->parameters(), flash::FlashAdamWOptions(3e-3));
  auto handle = flash::enable_gradient_release(*model, optimizer);
  handle.accumulate([&] { loss_of(model, batch(0)).backward(); });  // every micro-batch but the last
  loss_of(model, batch(1)).backward();                              // steps by the sum
  optimizer.step();
  EXPECT_EQ(optimizer.param_state(model->head->weight)->step, 1);
}

TEST(CppApi, StepParam) {
  namespace flash = flashoptim::torch;
  Net model;
  flash::cast_model(*model);
  flash::FlashAdamW optimizer(model->parameters(), flash::FlashAdamWOptions(3e-3));
  loss_of(model, batch(0)).backward();
  for (torch::Tensor& param : model->parameters()) {
    optimizer.step_param(param);
    param.mutable_grad().reset();
  }
  EXPECT_EQ(optimizer.param_state(model->head->weight)->step, 1);
}

TEST(CppApi, Numerics) {
  namespace flash = flashoptim::torch;
  Net model;
  flash::cast_model(*model);
  flash::FlashAdamW optimizer(model->named_parameters(), flash::FlashAdamWOptions(3e-3));
  optimizer.check_numerics();
  loss_of(model, batch(0)).backward();
  optimizer.step();
  const flash::NumericsReport report = optimizer.numerics_report();
  std::cout << report.nonfinite_gradients << " gradients were NaN or infinite\n";
  for (const auto& [name, one] : report.parameters) {
    std::cout << name << ": " << one.lost_updates << " of " << one.examined << " updates changed no bit\n";
  }
  EXPECT_EQ(report.parameters.size(), model->parameters().size());
}

TEST(CppApi, CastsInMidTraining) {
  namespace flash = flashoptim::torch;
  Net model;
  flash::FlashAdamW optimizer(model->parameters(), flash::FlashAdamWOptions(3e-3));
  loss_of(model, batch(0)).backward();
  optimizer.step();
  flash::cast_model(*model, torch::kBFloat16, {"*norm*"});  // what float32 had beyond goes into corrections
  loss_of(model, batch(1)).backward();
  optimizer.step();

  const auto weights = flash::get_fp32_model_state(*model, optimizer);  // float32, by name
  flash::set_fp32_model_state(*model, optimizer, weights);
  {
    const torch::NoGradGuard no_grad;
    model->head->weight.normal_();  // new weights, whose correction is another's
    optimizer.reset_corrections({model->head->weight});
  }
  EXPECT_EQ(model->norm->weight.scalar_type(), torch::kFloat);
}

TEST(CppApi, Files) {
  namespace flash = flashoptim::torch;
  const Folder folder;
  Net model;
  flash::cast_model(*model);
  flash::FlashAdamW optimizer(model->parameters(), flash::FlashAdamWOptions(3e-3));
  loss_of(model, batch(0)).backward();
  optimizer.step();
  {
    torch::serialize::OutputArchive archive;
    optimizer.save(archive);
    flash::save_archive(folder.file("run.flash"), archive);  // whole or not at all, with a checksum
    torch::save(model, folder.file("model.pt"));
  }
  {
    torch::load(model, folder.file("model.pt"));  // weights first: corrections belong to them
    torch::serialize::InputArchive archive;
    flash::load_archive(folder.file("run.flash"), archive);
    optimizer.load(archive);
  }
  {
    flash::save_safetensors(folder.file("run.safetensors"), optimizer);  // for Python, or from it
    flash::load_safetensors(folder.file("run.safetensors"), optimizer);
  }
  {
    torch::optim::AdamW theirs(model->parameters(), torch::optim::AdamWOptions(1e-3));
    flash::save_to_torch(optimizer, theirs);  // torch's own, with states in float32
    torch::save(theirs, folder.file("adamw.pt"));

    torch::serialize::InputArchive archive;  // what torch::save(theirs) wrote
    archive.load_from(folder.file("adamw.pt"));
    flash::load_torch_archive(optimizer, archive);
  }
  EXPECT_EQ(optimizer.param_state(model->head->weight)->step, 1);
}

TEST(CppApi, CapturableOptions) {
  namespace flash = flashoptim::torch;
  Net model;
  flash::cast_model(*model);
  flash::FlashAdamW optimizer(model->parameters(), flash::FlashAdamWOptions(3e-3).capturable(true));
  torch::Tensor lr = torch::full({}, 3e-3f, model->head->weight.device());
  optimizer.set_lr_tensor(0, lr);
  loss_of(model, batch(0)).backward();
  optimizer.step();  // makes states and counters; the next one may be captured
  lr.fill_(1e-3);    // what replays read
  EXPECT_EQ(optimizer.param_state(model->head->weight)->steps(), 1);
}

}  // namespace
}  // namespace flashoptim_test
