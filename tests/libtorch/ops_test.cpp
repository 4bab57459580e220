// The operators, called through torch's dispatcher like any other.
#include <ATen/core/dispatch/Dispatcher.h>

#include <thread>

#include "flashoptim/step.h"
#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

using flashoptim::GroupLayout;
using flashoptim::MasterWeights;
using flashoptim::ParameterTensors;
using flashoptim::StateCodec;

struct Call {
  std::string optimizer = "adamw";
  std::vector<Tensor> params, grads, corrections, states, scales;
  std::vector<int64_t> master_weights, state_codecs, first_elements, hyper_index;
  std::vector<double> hypers{1e-2, 0.1, 0, 0, 1, 7, 0.9, 0.95, 1e-8};
  double grad_scale = 1.0;
  std::optional<Tensor> found_inf, nonfinite;

  void add(at::IntArrayRef sizes, int64_t seed) {
    const Tensor param = parameter(sizes, seed).detach();
    const GroupLayout layout = flashoptim::group_layout(sizes.data(), static_cast<int64_t>(sizes.size()));
    params.push_back(param);
    grads.push_back(gradient(param, seed));
    corrections.push_back(torch::zeros_like(param, torch::kChar));
    for (int k = 0; k < 2; ++k) {
      states.push_back(torch::zeros_like(param, torch::kByte));
      scales.push_back(torch::zeros({layout.rows, layout.groups_per_row()}, torch::kShort));
    }
    master_weights.push_back(static_cast<int64_t>(MasterWeights::kCorrection8));
    state_codecs.push_back(static_cast<int64_t>(StateCodec::kDefault));
    first_elements.push_back(0);
    hyper_index.push_back(0);
  }

  void run() const {
    using Signature = void(std::string_view, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                           at::TensorList, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                           at::ArrayRef<double>, double, const std::optional<Tensor>&, const std::optional<Tensor>&);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("flashoptim::step_", "").typed<Signature>();
    const torch::NoGradGuard no_grad;
    op.call(optimizer, params, grads, corrections, states, scales, master_weights, state_codecs, first_elements,
            hyper_index, hypers, grad_scale, found_inf, nonfinite);
  }

  std::vector<Tensor> written() const {
    std::vector<Tensor> tensors;
    for (const auto* list : {&params, &corrections, &states, &scales}) {
      for (const Tensor& tensor : *list) tensors.push_back(tensor.clone());
    }
    return tensors;
  }
};

Call make_call() {
  Call call;
  call.add({40, 50}, 1);
  call.add({100}, 2);
  call.add({3, 7, 11}, 3);
  return call;
}

bool all_same_bytes(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!same_bytes(a[i], b[i])) return false;
  }
  return true;
}

TEST(StepOp, EqualsPlanBitwise) {
  Call call = make_call(), twin = make_call();
  std::vector<ParameterTensors> tensors;
  for (size_t i = 0; i < twin.params.size(); ++i) {
    ParameterTensors t;
    t.parameter = twin.params[i].mutable_data_ptr();
    t.gradient = twin.grads[i].const_data_ptr();
    t.correction = twin.corrections[i].mutable_data_ptr();
    for (size_t k = 0; k < 2; ++k) {
      t.states[k] = twin.states[2 * i + k].mutable_data_ptr();
      t.scales[k] = twin.scales[2 * i + k].mutable_data_ptr();
    }
    t.layout = flashoptim::group_layout(twin.params[i].sizes().data(), twin.params[i].dim());
    t.parameter_dtype = t.gradient_dtype = flashoptim::DType::kBFloat16;
    t.master_weights = MasterWeights::kCorrection8;
    t.state_codec = StateCodec::kDefault;
    tensors.push_back(t);
  }
  flashoptim::Plan plan;
  ASSERT_TRUE(flashoptim::Plan::make(flashoptim::OptimizerKind::kAdamW, true, tensors.data(), 3, &plan).is_ok());
  flashoptim::Hyperparameters hyper;
  hyper.lr = 1e-2, hyper.beta2 = 0.95, hyper.weight_decay = 0.1, hyper.seed = 7;
  for (int step = 1; step <= 20; ++step) {
    call.hypers[4] = step;
    hyper.step = step;
    call.run();
    ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
  }
  EXPECT_TRUE(all_same_bytes(call.written(), twin.written()));
}

TEST(StepOp, NothingIsKeptFromCallToCall) {
  // Same parameters: first other gradients and hyperparameters, then other states.
  Call call = make_call(), fresh = make_call();
  call.run();
  fresh.run();
  for (Call* c : {&call, &fresh}) {
    for (size_t i = 0; i < c->grads.size(); ++i)
      c->grads[i] = gradient(c->params[i], 77 + static_cast<int64_t>(i)).to(torch::kFloat);
    c->hypers[0] = 3e-2;
    c->hypers[4] = 2;
  }
  for (Tensor& param : fresh.params) param = param.clone();
  call.run();
  fresh.run();
  EXPECT_TRUE(all_same_bytes(call.written(), fresh.written()));
  for (Tensor& state : call.states) state = state.clone();
  for (Tensor& param : fresh.params) param = param.clone();
  call.run();
  fresh.run();
  EXPECT_TRUE(all_same_bytes(call.written(), fresh.written()));
}

TEST(StepOp, TwoThreadsAtOnce) {
  const auto work = [](int64_t seed) {
    for (int64_t i = 0; i < 200; ++i) {
      Call call;
      call.add({32}, seed + i);
      call.run();
      call.hypers[4] = 2;
      call.run();
    }
  };
  std::thread other(work, 10000);
  work(0);
  other.join();
}

TEST(StepOp, FoundInfChangesNothingAndNonfiniteIsCounted) {
  Call call = make_call();
  const std::vector<Tensor> before = call.written();
  call.found_inf = torch::ones({1});
  call.nonfinite = torch::zeros({1}, torch::kLong);
  call.grads[1][3] = NAN;
  call.grads[1][40] = INFINITY;
  call.run();
  EXPECT_TRUE(all_same_bytes(before, call.written()));
  call.found_inf = torch::zeros({});
  call.run();
  EXPECT_FALSE(all_same_bytes(before, call.written()));
  EXPECT_EQ(call.nonfinite->item<int64_t>(), 2);
  call.run();
  EXPECT_EQ(call.nonfinite->item<int64_t>(), 4) << "the count is added to";
}

TEST(StepOp, GradientScaleAndNoTensors) {
  Call call = make_call(), scaled = make_call();
  for (Tensor& grad : scaled.grads) grad = grad * 4;
  scaled.grad_scale = 0.25;
  call.run();
  scaled.run();
  EXPECT_TRUE(all_same_bytes(call.written(), scaled.written()));
  Call().run();
}

TEST(StepOp, BadArgumentsNameThemselvesAndChangeNothing) {
  struct Case {
    std::string name;
    std::function<void(Call&)> spoil;
    std::vector<std::string> parts;
  };
  const std::vector<Case> cases = {
      {"optimizer", [](Call& c) { c.optimizer = "adamx"; }, {"optimizer = 'adamx'", "adamw, adam, sgd"}},
      {"grads count", [](Call& c) { c.grads.pop_back(); }, {"grads has 2", "3"}},
      {"corrections count", [](Call& c) { c.corrections.pop_back(); }, {"corrections has 2"}},
      {"states count", [](Call& c) { c.states.pop_back(); }, {"scales has 6", "5"}},
      {"scales count", [](Call& c) { c.scales.pop_back(); }, {"scales has 5", "6"}},
      {"hypers size", [](Call& c) { c.hypers.pop_back(); }, {"hypers has 8", "9"}},
      {"lr", [](Call& c) { c.hypers[0] = NAN; }, {"hypers[0]", "lr", "nan", "finite"}},
      {"beta1", [](Call& c) { c.hypers[6] = 1.0; }, {"hypers[6]", "beta1", "= 1;", "beta1 < 1"}},
      {"beta2", [](Call& c) { c.hypers[7] = -0.5; }, {"hypers[7]", "beta2", "-0.5"}},
      {"eps", [](Call& c) { c.hypers[8] = -1e-8; }, {"hypers[8]", "eps", "at least 0"}},
      {"maximize", [](Call& c) { c.hypers[3] = 2; }, {"hypers[3]", "maximize", "0 or 1"}},
      {"step", [](Call& c) { c.hypers[4] = 0; }, {"hypers[4]", "step", "at least 1"}},
      {"seed", [](Call& c) { c.hypers[5] = 1e16; }, {"hypers[5]", "seed", "2^53"}},
      {"grad_scale", [](Call& c) { c.grad_scale = INFINITY; }, {"grad_scale = inf"}},
      {"param dtype",
       [](Call& c) { c.params[1] = c.params[1].to(torch::kDouble); },
       {"params[1]", "float64", "bfloat16"}},
      {"param complex",
       [](Call& c) { c.params[1] = torch::zeros({100}, torch::kComplexFloat); },
       {"params[1]", "complex64"}},
      {"param gaps",
       [](Call& c) { c.params[1] = torch::zeros({200}, torch::kBFloat16).slice(0, 0, 200, 2); },
       {"params[1]", "strides [2]", "dense"}},
      {"param undefined", [](Call& c) { c.params[1] = Tensor(); }, {"params[1] is undefined"}},
      {"grad sparse", [](Call& c) { c.grads[0] = c.grads[0].to_sparse(); }, {"grads[0]", "sparse"}},
      {"grad dtype",
       [](Call& c) { c.grads[2] = c.grads[2].to(torch::kHalf); },
       {"the gradient of params[2]", "float16", "bfloat16, and float32"}},
      {"grad shape", [](Call& c) { c.grads[2] = c.grads[2].view({21, 11}); }, {"grads[2]", "[21, 11]", "[3, 7, 11]"}},
      {"grad strides", [](Call& c) { c.grads[0] = c.grads[0].t().contiguous().t(); }, {"grads[0]", "strides [1, 40]"}},
      {"master weights", [](Call& c) { c.master_weights[2] = 6; }, {"master_weights[2] = 6"}},
      {"master of fp32",
       [](Call& c) { c.params[0] = c.params[0].to(torch::kFloat), c.grads[0] = c.grads[0].to(torch::kFloat); },
       {"master_weights = 2", "float32 params[0]"}},
      {"correction dtype",
       [](Call& c) { c.corrections[1] = c.corrections[1].to(torch::kShort); },
       {"'correction' of params[1]", "int16", "int8"}},
      {"correction shape",
       [](Call& c) { c.corrections[1] = torch::zeros({99}, torch::kChar); },
       {"'correction' of params[1]", "[99]"}},
      {"codec", [](Call& c) { c.state_codecs[0] = -1; }, {"state_codecs[0] = -1"}},
      {"state dtype",
       [](Call& c) { c.states[3] = c.states[3].to(torch::kChar); },
       {"'exp_avg_sq_codes' of params[1]", "int8", "uint8"}},
      {"state shape",
       [](Call& c) { c.states[3] = torch::zeros({101}, torch::kByte); },
       {"'exp_avg_sq_codes' of params[1]", "[101]"}},
      {"scale dtype",
       [](Call& c) { c.scales[1] = c.scales[1].to(torch::kFloat); },
       {"'exp_avg_sq_scale' of params[0]", "float32", "int16"}},
      {"scale size",
       [](Call& c) { c.scales[1] = torch::zeros({40, 3}, torch::kShort); },
       {"'exp_avg_sq_scale' of params[0]", "[40, 3]", "40 x 2"}},
      {"scale strides",
       [](Call& c) { c.scales[1] = torch::zeros({2, 40}, torch::kShort).t(); },
       {"'exp_avg_sq_scale' of params[0]", "contiguous"}},
      {"first element", [](Call& c) { c.first_elements[1] = -1; }, {"tensors[1].place.first_element = -1"}},
      {"hyper index", [](Call& c) { c.hyper_index[1] = 1; }, {"hyper_index[1] = 1", "1 sets"}},
      {"found_inf", [](Call& c) { c.found_inf = torch::zeros({1}, torch::kLong); }, {"found_inf", "int64", "float32"}},
      {"nonfinite", [](Call& c) { c.nonfinite = torch::zeros({2}, torch::kLong); }, {"nonfinite", "[2]"}},
      {"twice",
       [](Call& c) {
         c.params[2] = c.params[0], c.grads[2] = c.grads[0], c.corrections[2] = torch::zeros_like(c.corrections[0]);
         for (size_t k = 4; k < 6; ++k)
           c.states[k] = torch::zeros_like(c.states[0]), c.scales[k] = torch::zeros_like(c.scales[0]);
       },
       {"the parameter of tensor", "share memory"}},
      {"meta among cpu",
       [](Call& c) { c.params[1] = c.params[1].to(torch::kMeta); },
       {"of params[1] is on cpu", "params[1] on meta"}},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.name);
    Call call = make_call();
    const std::vector<Tensor> before = call.written();
    Call spoiled = call;
    test.spoil(spoiled);
    std::string message;
    try {
      spoiled.run();
    } catch (const std::exception& error) {
      message = error.what();
    }
    EXPECT_EQ(message.rfind("flashoptim::step_: ", 0), 0u) << message;
    for (const std::string& part : test.parts)
      EXPECT_NE(message.find(part), std::string::npos) << part << " not in: " << message;
    EXPECT_TRUE(all_same_bytes(before, call.written()));
    call.run();  // and the tensors can still be stepped
  }
}

TEST(StepOp, MetaTensorsAreAccepted) {
  Call call = make_call();
  for (auto* list : {&call.params, &call.grads, &call.corrections, &call.states, &call.scales}) {
    for (Tensor& tensor : *list) tensor = tensor.to(torch::kMeta);
  }
  call.run();
}

TEST(StepOp, AnyDenseElementOrder) {
  // Storage order is element order: a transposed parameter steps like its transpose.
  Call call, transposed;
  call.add({40, 64}, 3);
  transposed.add({40, 64}, 3);
  for (auto* list : {&transposed.params, &transposed.grads, &transposed.corrections, &transposed.states}) {
    for (Tensor& tensor : *list) tensor = tensor.t();
  }
  call.run();
  transposed.run();
  EXPECT_TRUE(same_bytes(call.params[0], transposed.params[0].t()));
  EXPECT_TRUE(same_bytes(call.states[1], transposed.states[1].t()));
}

// ---- formats --------------------------------------------------------------------------------------------------------

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

constexpr int64_t kBFloat16 = static_cast<int64_t>(flashoptim::DType::kBFloat16);
constexpr auto kCorrection8 = static_cast<int64_t>(MasterWeights::kCorrection8);
constexpr auto kCorrection16 = static_cast<int64_t>(MasterWeights::kCorrection16);
constexpr auto kDefault = static_cast<int64_t>(StateCodec::kDefault);
constexpr auto kFloat32 = static_cast<int64_t>(StateCodec::kFloat32);

TEST(FormatOps, FollowOptionsAndNameTheArrays) {
  const auto format_of = op<std::vector<int64_t>(int64_t, at::IntArrayRef, bool, int64_t, int64_t, bool, int64_t)>(
      "flashoptim::format_of");
  const auto format = [&](bool quantize, int64_t bits, const std::vector<int64_t>& sizes) {
    return format_of.call(kBFloat16, sizes, quantize, kDefault, bits, /*stochastic_rounding=*/false, 4096);
  };
  EXPECT_EQ(format(true, 24, {64, 64}), (std::vector<int64_t>{kCorrection8, kDefault}));
  EXPECT_EQ(format(true, 32, {63, 64}), (std::vector<int64_t>{kCorrection16, kFloat32}));
  EXPECT_EQ(format(false, 0, {64, 64}), (std::vector<int64_t>{0, kFloat32}));
  const auto array_names = op<std::string(std::string_view, bool, int64_t, int64_t)>("flashoptim::array_names");
  EXPECT_EQ(array_names.call("adamw", true, kCorrection8, kDefault),
            "exp_avg_codes,exp_avg_scale,exp_avg_sq_codes,exp_avg_sq_scale,correction");
  EXPECT_EQ(array_names.call("sgd", false, 0, kFloat32), "");
}

TEST(FormatOps, NewStatesFitAndConvert) {
  const auto new_states = op<std::vector<Tensor>(std::string_view, at::TensorList, at::IntArrayRef, at::IntArrayRef,
                                                 at::IntArrayRef, at::IntArrayRef)>("flashoptim::new_states");
  const Tensor param = parameter({40, 50}, 1).detach(), other = parameter({100}, 2).detach();
  const std::vector<Tensor> made =
      new_states.call("adamw", {param, other}, {1, 1}, {kCorrection8, kCorrection16}, {kDefault, kFloat32}, {});
  ASSERT_EQ(made.size(), 8u);
  EXPECT_EQ(made[1].sizes(), (std::vector<int64_t>{40, 2}));
  EXPECT_EQ(made[4].scalar_type(), torch::kChar);
  EXPECT_EQ(made[7].scalar_type(), torch::kShort);
  for (const Tensor& array : made) EXPECT_EQ(torch::count_nonzero(array).item<int64_t>(), 0);

  const auto fit =
      op<int64_t(std::string_view, bool, const Tensor&, at::TensorList, at::TensorList, const std::optional<Tensor>&,
                 int64_t, int64_t, int64_t, at::IntArrayRef, std::string_view, bool)>("flashoptim::fit_state");
  const std::vector<Tensor> states{made[0], made[2]}, scales{made[1], made[3]};
  EXPECT_EQ(
      fit.call("adamw", true, param, states, scales, made[4], kBFloat16, kCorrection8, kDefault, {}, "weight", false),
      1);
  EXPECT_EQ(
      fit.call("adamw", true, param, states, scales, made[4], kBFloat16, kCorrection16, kDefault, {}, "weight", false),
      0);
  EXPECT_EQ(fit.call("adamw", true, param.t().contiguous().t(), states, scales, made[4], kBFloat16, kCorrection8,
                     kDefault, {}, "weight", false),
            2);
  // On the host, in memory of their own: there alone.
  EXPECT_EQ(
      fit.call("adamw", true, param, states, scales, made[4], kBFloat16, kCorrection8, kDefault, {}, "weight", true),
      0);
  const auto host_states = op<std::vector<Tensor>(std::string_view, at::TensorList, at::IntArrayRef, at::IntArrayRef,
                                                  at::IntArrayRef, at::IntArrayRef, bool)>("flashoptim::host_states");
  const std::vector<Tensor> home =
      host_states.call("adamw", {param}, {1}, {kCorrection8}, {kDefault}, {}, /*pin=*/false);
  for (size_t i = 0; i < home.size(); ++i) EXPECT_EQ(home[i].sizes(), made[i].sizes());
  for (const bool on_host : {true, false}) {
    EXPECT_EQ(fit.call("adamw", true, param, {home[0], home[2]}, {home[1], home[3]}, home[4], kBFloat16, kCorrection8,
                       kDefault, {}, "weight", on_host),
              on_host ? 1 : 0);
  }

  made[4].fill_(127);
  const auto convert = op<std::tuple<std::vector<Tensor>, std::vector<Tensor>, int64_t>(
      std::string_view, bool, const Tensor&, at::TensorList, at::TensorList, const std::optional<Tensor>&, int64_t,
      int64_t, int64_t, at::IntArrayRef, std::string_view)>("flashoptim::convert_state");
  const auto [arrays, rewritten, fate] =
      convert.call("adamw", true, param, states, scales, made[4], kBFloat16, kCorrection16, kFloat32, {}, "weight");
  ASSERT_EQ(arrays.size(), 3u);
  EXPECT_TRUE(rewritten.empty());
  EXPECT_EQ(fate, 1) << "kept";
  EXPECT_EQ(arrays[2].min().item<int64_t>(), 32767);
}

}  // namespace
}  // namespace flashoptim_test
