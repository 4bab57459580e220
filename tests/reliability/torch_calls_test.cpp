// Wrong calls of everything in flashoptim::torch: each is a c10::Error that names the argument and its value, and has
// changed nothing: parameters, states, options, groups, the model, files. (Archives: hostile_archives_test.cpp.)
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>

#include "tests/libtorch/archives.h"
#include "tests/reliability/tally.h"

namespace flashoptim_test {
namespace {

using flashoptim::test::Tally;
using torch::optim::OptimizerParamGroup;
namespace fs = std::filesystem;

const double kNaN = std::nan(""), kInf = HUGE_VAL;

struct Folder {
  std::string path = (fs::temp_directory_path() / "flashoptim_calls_XXXXXX").string();
  Folder() { EXPECT_NE(::mkdtemp(path.data()), nullptr); }
  ~Folder() { fs::remove_all(path); }
  std::string file(const std::string& name) const { return path + "/" + name; }
  std::string names() const {
    std::string all;
    for (const auto& entry : fs::recursive_directory_iterator(path)) all += entry.path().string() + "\n";
    return all;
  }
};

struct Net : torch::nn::Module {
  Net() {
    register_module("first", first);
    register_module("second", second);
    register_buffer("table", torch::rand({4}));
  }
  torch::nn::Linear first{40, 8};
  torch::nn::Linear second{8, 2};
};

std::string bytes_of(const Tensor& tensor) {
  const Tensor plain = tensor.detach().contiguous();
  return std::string(toString(plain.scalar_type())) +
         std::string(static_cast<const char*>(plain.const_data_ptr()), plain.nbytes());
}

/// A model and its optimizer behind a step, and what they are.
template <class Optimizer>
struct Rig {
  using Options = typename Optimizer::Options;

  Rig() {
    at::manual_seed(3);
    model.to(torch::kBFloat16);
    optimizer = std::make_unique<Optimizer>(model.parameters(), Options(1e-2).min_quantized_numel(0));
    params = model.parameters();
    step(*optimizer, params, 1);
    set_gradients(params, 2);
  }
  std::string everything() {
    std::string all = saved(*optimizer).str() + std::to_string(optimizer->param_groups().size());
    for (const auto& item : model.named_parameters()) all += item.key() + bytes_of(item.value());
    for (const auto& item : model.named_buffers()) all += item.key() + bytes_of(item.value());
    for (const Tensor& param : params) {
      const Tensor grad = param.grad();
      all += grad.defined() && grad.layout() == torch::kStrided && !grad.is_meta() ? bytes_of(grad) : "-";
    }
    for (const auto& entry : fs::directory_iterator(folder.path)) all += entry.path().string();
    return all;
  }

  Net model;
  std::vector<Tensor> params;
  std::unique_ptr<Optimizer> optimizer;
  Folder folder;
  Tensor stranger = parameter({40}, 9);
};

template <class Optimizer>
struct Call {
  std::string what;
  std::function<void(Rig<Optimizer>&)> call;
  std::vector<std::string> parts;  // of the message
};

/// Each call on a rig of its own; `changes` is what comes before it (a wrong gradient, say), and is no part of it.
template <class Optimizer>
void refuse(Tally& tally, const std::vector<Call<Optimizer>>& calls,
            const std::function<void(Rig<Optimizer>&)>& before_call = nullptr) {
  for (const Call<Optimizer>& wrong : calls) {
    Rig<Optimizer> rig;
    if (before_call) before_call(rig);
    const std::string before = rig.everything();
    std::string problem, message;
    try {
      wrong.call(rig);
      problem = "was accepted";
    } catch (const c10::Error& error) {
      message = error.what_without_backtrace();
    } catch (const std::exception& error) {
      problem = std::string("not c10::Error: ") + error.what();
    }
    for (const std::string& part : wrong.parts) {
      if (problem.empty() && message.find(part) == std::string::npos) problem = "\"" + part + "\" is not in " + message;
    }
    if (problem.empty() && rig.everything() != before) problem = "something has changed; it said " + message;
    tally.count(problem.empty() ? "" : wrong.what + ": " + problem);
  }
}

template <class Optimizer>
class TorchCalls : public testing::Test {};

using Every = testing::Types<flash::FlashAdamW, flash::FlashAdam, flash::FlashSGD, flash::FlashSGDW, flash::FlashLion,
                             flash::FlashAdEMAMix, flash::FlashADOPT>;
TYPED_TEST_SUITE(TorchCalls, Every);

/// Options of which one is not allowed, and what the message must have.
template <class Options>
std::vector<std::pair<Options, std::vector<std::string>>> bad_options() {
  std::vector<std::pair<Options, std::vector<std::string>>> all;
  const auto kind = Options::kKind;
  for (int64_t i = 0; i < flashoptim::hyperparameter_count(kind); ++i) {
    const flashoptim::HyperparameterInfo info = flashoptim::hyperparameter(kind, i);
    const std::string name = info.name;
    if (name == "step" || name == "decay_lr" || info.kind == flashoptim::HyperparameterKind::kFlag) continue;
    std::vector<double> values{kNaN, kInf, -kInf};
    if (info.lowest >= 0) values.push_back(-1.0);
    if (info.highest == 1.0) values.insert(values.end(), {1.0, 1.5});
    if (info.kind == flashoptim::HyperparameterKind::kWhole) values = {-1.0};
    for (const double value : values) {
      Options options(1e-3);
      options.set_number(name, value);
      all.push_back({options, {name.find("beta") == 0 && name != "beta3" ? "betas" : name}});
    }
  }
  for (const int64_t bits : {-1, 1, 8, 16, 23, 64})
    all.push_back({Options(1e-3).master_weight_bits(bits), {"master_weight_bits = "}});
  for (const char* codec : {"", "int8", "Default", "fp32"})
    all.push_back({Options(1e-3).state_codec(codec), {"state_codec = \""}});
  all.push_back({Options(1e-3).min_quantized_numel(-1), {"min_quantized_numel = -1"}});
  all.push_back({Options(1e-3).min_quantized_numel(std::numeric_limits<int64_t>::min()), {"min_quantized_numel = -"}});
  all.push_back({Options(1e-3).seed(-1), {"seed = -1"}});
  all.push_back({Options(1e-3).seed(int64_t{1} << 53), {"seed = 9007199254740992"}});
  all.push_back({Options(1e-3).stochastic_rounding(true), {"master_weight_bits"}});
  return all;
}

TYPED_TEST(TorchCalls, OptionsInEveryPlace) {
  using Options = typename TypeParam::Options;
  Tally tally("wrong LibTorch calls");
  for (const auto& [options, parts] : bad_options<Options>()) {
    const std::string what = parts.front();
    const auto of_group = [&options = options](const std::vector<Tensor>& params) {
      return OptimizerParamGroup(params, std::make_unique<Options>(options));
    };
    refuse<TypeParam>(
        tally, {{what + " of the constructor", [&](auto& rig) { TypeParam({rig.stranger}, options); }, parts},
                {what + " of a group", [&](auto& rig) { TypeParam({of_group({rig.stranger})}, Options()); }, parts},
                {what + " of a named list",
                 [&](auto& rig) { TypeParam(rig.model.named_parameters(), Options(), {{"first.*", options}}); }, parts},
                {what + " of a new group", [&](auto& rig) { rig.optimizer->add_param_group(of_group({rig.stranger})); },
                 parts}});
    // Set on a group behind a step: the option is the user's, all else stays.
    Rig<TypeParam> rig;
    auto& own = static_cast<Options&>(rig.optimizer->param_groups()[0].options());
    const Options good = own;
    const std::string before = rig.everything();
    own = options;
    for (const auto& call : std::vector<std::function<void()>>{[&] { rig.optimizer->step(); },
                                                               [&] { rig.optimizer->step_param(rig.params[0]); }}) {
      const std::string message = error_of(call);
      tally.count(message.find(what) == std::string::npos || message.find("param_groups[0]") == std::string::npos
                      ? what + " of a step says " + message
                      : "");
    }
    own = good;
    rig.optimizer->step_param(rig.stranger.defined() ? rig.params[0] : rig.stranger);
    EXPECT_NE(rig.everything(), before) << "with good options a step goes on";
  }
}

TYPED_TEST(TorchCalls, Parameters) {
  using Options = typename TypeParam::Options;
  Tally tally("wrong LibTorch calls");
  const Tensor twice = parameter({8}, 1);
  const std::vector<std::pair<Tensor, std::vector<std::string>>> bad = {
      {Tensor(), {"undefined"}},
      {torch::zeros({4}, torch::kLong), {"dtype Long"}},
      {torch::zeros({4}, torch::kDouble), {"dtype Double"}},
      {torch::zeros({4}, torch::kBool), {"dtype Bool"}},
      {torch::zeros({4}, torch::kComplexFloat), {"dtype ComplexFloat"}},
      {torch::zeros({4}).to_sparse(), {"layout Sparse"}},
      {torch::zeros({5}).as_strided({3, 2}, {1, 2}), {"strides [1, 2]"}},
      {torch::zeros({1}).expand({4}), {"strides [0]"}},
      {parameter({4}, 1) * 2, {"leaf"}},
      {twice, {"already"}},
  };
  for (const auto& [tensor, parts] : bad) {
    const std::vector<Tensor> params{twice, tensor};
    refuse<TypeParam>(
        tally,
        {{parts.front() + " of the constructor", [&](auto&) { TypeParam(params, Options()); }, parts},
         {parts.front() + " of groups",
          [&](auto&) { TypeParam({OptimizerParamGroup({twice}), OptimizerParamGroup({tensor})}, Options()); }, parts},
         {parts.front() + " of a new group",
          [&](auto& rig) { rig.optimizer->add_param_group(OptimizerParamGroup(params)); }, parts}});
  }
  refuse<TypeParam>(
      tally, {{"own parameter in a new group",
               [](auto& rig) { rig.optimizer->add_param_group(OptimizerParamGroup({rig.params[0]})); },
               {"param_groups[1].params[0]", "already"}},
              {"options of torch's",
               [](auto& rig) {
                 rig.optimizer->add_param_group({{rig.stranger}, std::make_unique<torch::optim::AdamWOptions>(1e-3)});
               },
               {"param_groups[1]", "options"}},
              {"options of another optimizer",
               [](auto& rig) {
                 std::unique_ptr<torch::optim::OptimizerOptions> other =
                     std::make_unique<flash::FlashLionOptions>(1e-3);
                 if (std::is_same_v<Options, flash::FlashLionOptions>)
                   other = std::make_unique<flash::FlashSGDOptions>(1e-3);
                 rig.optimizer->add_param_group({{rig.stranger}, std::move(other)});
               },
               {"param_groups[1]", "options"}}});
}

TYPED_TEST(TorchCalls, GradientsAndClosures) {
  Tally tally("wrong LibTorch calls");
  using Make = std::function<Tensor(const Tensor&)>;
  const std::vector<std::pair<Make, std::vector<std::string>>> gradients = {
      {[](const Tensor& p) { return torch::zeros({9}, p.options()); }, {"shape [9]"}},
      {[](const Tensor& p) { return torch::zeros({40, 8}, p.options()); }, {"shape [40, 8]"}},
      {[](const Tensor& p) { return torch::zeros({}, p.options()); }, {"shape []"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kHalf); }, {"dtype Half"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kDouble); }, {"dtype Double"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kLong); }, {"dtype Long"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kComplexFloat); }, {"dtype ComplexFloat"}},
      {[](const Tensor& p) { return torch::zeros_like(p, torch::kFloat).to_sparse(); }, {"layout Sparse"}},
      {[](const Tensor& p) { return torch::zeros_like(p).to(torch::kMeta); }, {"on meta"}},
  };
  for (const auto& [make, parts] : gradients) {
    std::vector<std::string> with_name = parts;
    with_name.push_back("params[0].grad");
    refuse<TypeParam>(
        tally,
        {{parts[0] + " in step()", [](auto& rig) { rig.optimizer->step(); }, with_name},
         {parts[0] + " in step_param()", [](auto& rig) { rig.optimizer->step_param(rig.params[0]); }, with_name},
         {parts[0] + " in clip_grad_norm_()", [](auto& rig) { rig.optimizer->clip_grad_norm_(1.0); }, with_name}},
        [&make = make](auto& rig) { Tensor(rig.params[0]).mutable_grad() = make(rig.params[0].detach()); });
  }
  // A group whose options are not allowed: nothing is written, saved or cast with them.
  const std::vector<Call<TypeParam>> calls{
      {"set_fp32_weight",
       [](auto& rig) { rig.optimizer->set_fp32_weight(rig.params[0], torch::zeros({8, 40})); },
       {"state_codec"}},
      {"save",
       [](auto& rig) {
         torch::serialize::OutputArchive archive;
         rig.optimizer->save(archive);
       },
       {"state_codec"}},
      {"cast_model", [](auto& rig) { flash::cast_model(rig.model, torch::kHalf); }, {"state_codec"}}};
  for (const Call<TypeParam>& wrong : calls) {
    Rig<TypeParam> rig;
    const std::string before = rig.everything();
    auto& options = static_cast<typename TypeParam::Options&>(rig.optimizer->param_groups()[0].options());
    options.state_codec("int4");
    const std::string message = error_of([&] { wrong.call(rig); });
    options.state_codec("default");
    tally.count(message.find("state_codec = \"int4\"") == std::string::npos ? wrong.what + " says " + message
                : rig.everything() != before                                ? wrong.what + " has changed something"
                                                                            : "");
  }
  // What a closure throws comes through as it is.
  Rig<TypeParam> rig;
  const std::string before = rig.everything();
  EXPECT_THROW(rig.optimizer->step([]() -> Tensor { throw std::out_of_range("mine"); }), std::out_of_range);
  tally.count(rig.everything() == before ? "" : "a closure that throws changed something");
}

TYPED_TEST(TorchCalls, Methods) {
  Tally tally("wrong LibTorch calls");
  std::vector<Call<TypeParam>> calls;
  const auto add = [&](const std::string& what, const std::function<void(Rig<TypeParam>&)>& call,
                       const std::vector<std::string>& parts) { calls.push_back({what, call, parts}); };
  for (const double bad : {0.0, -1.0, kNaN, kInf, -kInf}) {
    add("clip_grad_norm_", [=](auto& rig) { rig.optimizer->clip_grad_norm_(bad); }, {"max_norm"});
  }
  for (const bool is_defined : {false, true}) {
    const auto of = [=](Rig<TypeParam>& rig) { return is_defined ? rig.stranger : Tensor(); };
    const std::string what = is_defined ? "no parameter of this optimizer" : "undefined";
    add("step_param", [=](auto& rig) { rig.optimizer->step_param(of(rig)); }, {"step_param", what});
    add("param_state", [=](auto& rig) { rig.optimizer->param_state(of(rig)); }, {"param_state", what});
    add("decoded_state", [=](auto& rig) { rig.optimizer->decoded_state(of(rig)); }, {"decoded_state", what});
    add("fp32_weight", [=](auto& rig) { rig.optimizer->fp32_weight(of(rig)); }, {"fp32_weight", what});
    add("name", [=](auto& rig) { rig.optimizer->name(of(rig)); }, {"name", what});
    add("reset_corrections", [=](auto& rig) { rig.optimizer->reset_corrections({rig.params[0], of(rig)}); },
        {"reset_corrections", what});
    add("set_fp32_weight", [=](auto& rig) { rig.optimizer->set_fp32_weight(of(rig), torch::zeros({40})); },
        {"set_fp32_weight", what});
  }
  const std::vector<std::pair<Tensor, std::string>> weights = {
      {Tensor(), "undefined"},
      {torch::zeros({9}), "[9]"},
      {torch::zeros({40, 8}), "[40, 8]"},
      {torch::zeros({8, 40}, torch::kLong), "Long"},
      {torch::zeros({8, 40}, torch::kComplexFloat), "Complex"},
      {torch::zeros({8, 40}).to_sparse(), "Sparse"},
      {torch::zeros({8, 40}, torch::kMeta), "meta"},
  };
  for (const auto& [weight, part] : weights) {
    add("set_fp32_weight " + part,
        [weight = weight](auto& rig) { rig.optimizer->set_fp32_weight(rig.params[0], weight); },
        {"set_fp32_weight", part});
    add("set_fp32_weights " + part,
        [weight = weight](auto& rig) {
          rig.optimizer->set_fp32_weights({{rig.params[1], torch::ones({8})}, {rig.params[0], weight}});
        },
        {"set_fp32_weights", part});
    add("set_fp32_model_state " + part,
        [weight = weight](auto& rig) {
          auto state = flash::get_fp32_model_state(rig.model, *rig.optimizer);
          for (auto& item : state) item.value().add_(1);
          state["first.weight"] = weight;
          flash::set_fp32_model_state(rig.model, *rig.optimizer, state);
        },
        {"set_fp32_model_state", "first.weight", part});
  }
  add("set_fp32_model_state lacks one",
      [](auto& rig) {
        auto state = flash::get_fp32_model_state(rig.model, *rig.optimizer);
        for (auto& item : state) item.value().add_(1);
        state.erase("second.bias");
        flash::set_fp32_model_state(rig.model, *rig.optimizer, state);
      },
      {"second.bias"});
  add("set_fp32_model_state knows one more",
      [](auto& rig) {
        auto state = flash::get_fp32_model_state(rig.model, *rig.optimizer);
        for (auto& item : state) item.value().add_(1);
        state.insert("third.bias", torch::zeros({2}));
        flash::set_fp32_model_state(rig.model, *rig.optimizer, state);
      },
      {"third.bias"});
  add("set_lr_tensor of no group", [](auto& rig) { rig.optimizer->set_lr_tensor(1, torch::zeros({})); },
      {"set_lr_tensor", "1"});
  add("set_lr_tensor without capturable", [](auto& rig) { rig.optimizer->set_lr_tensor(0, torch::zeros({})); },
      {"set_lr_tensor", "capturable"});
  for (const char* name : {"", "nope", "Lr", "beta9"}) {
    const auto group = [](Rig<TypeParam>& rig) -> flash::FlashOptions& {
      return static_cast<flash::FlashOptions&>(rig.optimizer->param_groups()[0].options());
    };
    add("number", [=](auto& rig) { group(rig).number(name); }, {name});
    add("set_number", [=](auto& rig) { group(rig).set_number(name, 1.0); }, {name});
    add("is_set", [=](auto& rig) { group(rig).is_set(name); }, {name});
  }
  const auto set = [&](const std::string& name, double value) {
    add("set_number " + name,
        [=](auto& rig) {
          static_cast<flash::FlashOptions&>(rig.optimizer->param_groups()[0].options()).set_number(name, value);
        },
        {"set_number", name});
  };
  for (const double bad : {0.5, kNaN, kInf, 1e300, -1e300}) set("seed", bad);
  for (const double bad : {0.5, 2.0, -1.0, kNaN}) set("maximize", bad);
  refuse<TypeParam>(tally, calls);
}

TYPED_TEST(TorchCalls, ModelsAndRelease) {
  using Release = flash::GradientReleaseOptions;
  Tally tally("wrong LibTorch calls");
  std::vector<Call<TypeParam>> calls;
  const auto add = [&](const std::string& what, const std::function<void(Rig<TypeParam>&)>& call,
                       const std::vector<std::string>& parts) { calls.push_back({what, call, parts}); };
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kInt, torch::kByte, torch::kComplexFloat}) {
    add("cast_model", [=](auto& rig) { flash::cast_model(rig.model, dtype); }, {"cast_model", toString(dtype)});
    add("cast_model with optimizer", [=](auto& rig) { flash::cast_model(rig.model, *rig.optimizer, dtype); },
        {"cast_model", toString(dtype)});
  }
  add("cast_model pattern", [](auto& rig) { flash::cast_model(rig.model, torch::kHalf, {"third.*"}); }, {"third.*"});
  add("cast_model buffers", [](auto& rig) { flash::cast_model(rig.model, torch::kHalf, {}, {"nope"}); }, {"nope"});
  const auto torchs = [](Rig<TypeParam>& rig) { return torch::optim::SGD(rig.params, torch::optim::SGDOptions(0.1)); };
  add("cast_model with torch's",
      [=](auto& rig) {
        auto other = torchs(rig);
        flash::cast_model(rig.model, other);
      },
      {"optimizer"});
  add("get_fp32_model_state with torch's",
      [=](auto& rig) {
        auto other = torchs(rig);
        flash::get_fp32_model_state(rig.model, other);
      },
      {"optimizer"});
  add("set_fp32_model_state with torch's",
      [=](auto& rig) {
        auto other = torchs(rig);
        flash::set_fp32_model_state(rig.model, other, flash::get_fp32_model_state(rig.model, *rig.optimizer));
      },
      {"optimizer"});
  add("release of torch's",
      [=](auto& rig) {
        auto other = torchs(rig);
        flash::enable_gradient_release(rig.model, other);
      },
      {"optimizer"});
  add("release of a stranger",
      [](auto& rig) { flash::enable_gradient_release(std::vector<Tensor>{rig.stranger}, *rig.optimizer); }, {"param"});
  add("release of nothing", [](auto& rig) { flash::enable_gradient_release(std::vector<Tensor>{}, *rig.optimizer); },
      {"param"});
  add("release of an undefined tensor",
      [](auto& rig) { flash::enable_gradient_release(std::vector<Tensor>{Tensor()}, *rig.optimizer); }, {"undefined"});
  add("release twice",
      [](auto& rig) {
        flash::enable_gradient_release(rig.model, *rig.optimizer);
        flash::enable_gradient_release(rig.model, *rig.optimizer);
      },
      {"already"});
  for (const char* clip : {"none", "exactly", "Two_pass"}) {
    add("clip",
        [=](auto& rig) {
          flash::enable_gradient_release(rig.model, *rig.optimizer, Release().clip(clip).max_norm(1.0));
        },
        {"clip", clip});
  }
  for (const double bad : {0.0, -1.0, kNaN, kInf}) {
    add("max_norm",
        [=](auto& rig) {
          flash::enable_gradient_release(rig.model, *rig.optimizer, Release().clip("parameter").max_norm(bad));
        },
        {"max_norm"});
  }
  for (const double bad : {-0.1, 1.0, kNaN, kInf}) {
    add("norm_decay",
        [=](auto& rig) {
          flash::enable_gradient_release(rig.model, *rig.optimizer,
                                         Release().clip("previous").max_norm(1.0).norm_decay(bad));
        },
        {"norm_decay"});
  }
  add("max_norm alone",
      [](auto& rig) { flash::enable_gradient_release(rig.model, *rig.optimizer, Release().max_norm(1.0)); },
      {"max_norm", "clip"});
  add("clip alone",
      [](auto& rig) { flash::enable_gradient_release(rig.model, *rig.optimizer, Release().clip("two_pass")); },
      {"max_norm", "clip"});
  add("norm_decay alone",
      [](auto& rig) { flash::enable_gradient_release(rig.model, *rig.optimizer, Release().norm_decay(0.5)); },
      {"norm_decay"});
  add("measure_norm without two_pass",
      [](auto& rig) { flash::enable_gradient_release(rig.model, *rig.optimizer).measure_norm([] {}); },
      {"measure_norm", "two_pass"});
  add("a handle of nothing", [](auto&) { flash::GradientReleaseHandle(nullptr).remove(); }, {"release", "null"});
  add("measure_norm of nothing",
      [](auto& rig) {
        const auto options = Release().clip("two_pass").max_norm(1.0);
        flash::enable_gradient_release(rig.model, *rig.optimizer, options).measure_norm(nullptr);
      },
      {"measure_norm", "backward"});
  add("accumulate of nothing",
      [](auto& rig) { flash::enable_gradient_release(rig.model, *rig.optimizer).accumulate(nullptr); },
      {"accumulate", "backward"});
  add("measure_norm behind gradients",
      [](auto& rig) {
        flash::enable_gradient_release(rig.model, *rig.optimizer, Release().clip("two_pass").max_norm(1.0))
            .measure_norm([] {});
      },
      {"measure_norm", "gradients"});
  refuse<TypeParam>(tally, calls);
}

TYPED_TEST(TorchCalls, FilesAndOthersStates) {
  Tally tally("wrong LibTorch calls");
  std::vector<Call<TypeParam>> calls;
  const auto add = [&](const std::string& what, const std::function<void(Rig<TypeParam>&)>& call,
                       const std::vector<std::string>& parts) { calls.push_back({what, call, parts}); };
  for (const std::string name : {"", "no/such/file", "."}) {
    const auto path = [=](Rig<TypeParam>& rig) { return name.empty() ? name : rig.folder.file(name); };
    add("save_archive " + name,
        [=](auto& rig) {
          torch::serialize::OutputArchive archive;
          rig.optimizer->save(archive);
          flash::save_archive(path(rig), archive);
        },
        {"save_archive"});
    add("load_archive " + name,
        [=](auto& rig) {
          torch::serialize::InputArchive archive;
          flash::load_archive(path(rig), archive);
        },
        {"load_archive"});
    add("save_safetensors " + name, [=](auto& rig) { flash::save_safetensors(path(rig), *rig.optimizer); },
        {"save_safetensors"});
    add("load_safetensors " + name, [=](auto& rig) { flash::load_safetensors(path(rig), *rig.optimizer); },
        {"load_safetensors"});
    add("read_safetensors " + name, [=](auto& rig) { flash::read_safetensors(path(rig)); }, {"read_safetensors"});
    add("write_safetensors " + name, [=](auto& rig) { flash::write_safetensors(path(rig), flash::Safetensors()); },
        {"write_safetensors"});
  }
  const auto files = [](Rig<TypeParam>& rig) {
    std::ofstream(rig.folder.file("garbage")) << "not a file of ours";
    std::ofstream(rig.folder.file("empty"));
    torch::save(torch::ones({3}), rig.folder.file("tensor.pt"));
    flash::write_safetensors(rig.folder.file("others.safetensors"), flash::Safetensors());
  };
  for (const std::string name : {"garbage", "empty", "tensor.pt", "others.safetensors"}) {
    add("load_archive of " + name,
        [=](auto& rig) {
          torch::serialize::InputArchive archive;
          flash::load_archive(rig.folder.file(name), archive);
        },
        {"load_archive", name});
    add("load_safetensors of " + name,
        [=](auto& rig) { flash::load_safetensors(rig.folder.file(name), *rig.optimizer); }, {name});
    if (name == "others.safetensors") continue;
    add("read_safetensors of " + name, [=](auto& rig) { flash::read_safetensors(rig.folder.file(name)); }, {name});
  }
  for (const auto& [tensor, part] :
       std::vector<std::pair<Tensor, std::string>>{{Tensor(), "undefined"},
                                                   {torch::zeros({3}).to_sparse(), "Sparse"},
                                                   {torch::zeros({3}, torch::kMeta), "meta"}}) {
    add("write_safetensors " + part,
        [tensor = tensor](auto& rig) {
          flash::Safetensors content;
          content.tensors.insert("one", torch::ones({3}));
          content.tensors.insert("bad", tensor);
          flash::write_safetensors(rig.folder.file("new"), content);
        },
        {"bad", part});
  }
  const bool is_adamw = std::is_same_v<TypeParam, flash::FlashAdamW>;
  const auto others = [=](Rig<TypeParam>&, std::vector<Tensor> params) -> std::unique_ptr<torch::optim::Optimizer> {
    if (is_adamw) return std::make_unique<torch::optim::SGD>(params, torch::optim::SGDOptions(0.1));
    return std::make_unique<torch::optim::AdamW>(params, torch::optim::AdamWOptions(0.1));
  };
  add("load_from_torch of another",
      [=](auto& rig) { flash::load_from_torch(*rig.optimizer, *others(rig, rig.params)); }, {"load_from_torch"});
  add("save_to_torch of another",
      [=](auto& rig) {
        auto to = others(rig, rig.params);
        flash::save_to_torch(*rig.optimizer, *to);
      },
      {"save_to_torch"});
  add("load_from_torch of RMSprop",
      [](auto& rig) {
        torch::optim::RMSprop from(rig.params, 0.1);
        flash::load_from_torch(*rig.optimizer, from);
      },
      {"load_from_torch"});
  add("load_from_torch of ours", [](auto& rig) { flash::load_from_torch(*rig.optimizer, *rig.optimizer); },
      {"load_from_torch"});
  add("load_torch_archive of nothing",
      [](auto& rig) {
        std::stringstream stream;
        torch::serialize::OutputArchive out;
        out.write("x", torch::ones({2}), true);
        out.save_to(stream);
        torch::serialize::InputArchive archive;
        archive.load_from(stream);
        flash::load_torch_archive(*rig.optimizer, archive);
      },
      {"load_torch_archive"});
  if constexpr (std::is_same_v<TypeParam, flash::FlashAdamW>) {
    add("load_from_torch of other shapes",
        [](auto& rig) {
          torch::optim::AdamW from({rig.params[1], rig.params[0], rig.params[2], rig.params[3]},
                                   torch::optim::AdamWOptions(0.0));
          from.step();
          flash::load_from_torch(*rig.optimizer, from);
        },
        {"load_from_torch", "shape"});
    add("load_from_torch of fewer",
        [](auto& rig) {
          torch::optim::AdamW from({rig.params[0]}, torch::optim::AdamWOptions(0.1));
          flash::load_from_torch(*rig.optimizer, from);
        },
        {"load_from_torch", "param_groups"});
  }
  refuse<TypeParam>(tally, calls, files);
}

}  // namespace
}  // namespace flashoptim_test
