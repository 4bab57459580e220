// cast_model, fp32 export and import.
#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

/// A head that shares its weight with the embedding.
struct HeadImpl : torch::nn::Module {
  explicit HeadImpl(const Tensor& shared) : weight(register_parameter("weight", shared)) {}
  Tensor weight;
};
TORCH_MODULE(Head);

struct Net : torch::nn::Module {
  Net() {
    register_module("embedding", embedding);
    register_module("body", body);
    register_module("norm", norm);
    register_module("final_norm", final_norm);
    head = register_module("head", Head(embedding->weight));
    counter = register_buffer("counter", torch::zeros({1}, torch::kLong));
    table = register_buffer("table", torch::arange(4, torch::kFloat));
  }

  torch::nn::Embedding embedding{50, 16};
  torch::nn::Linear body{16, 16};
  torch::nn::BatchNorm1d norm{16};
  torch::nn::LayerNorm final_norm{torch::nn::LayerNormOptions({16})};
  Head head{nullptr};
  Tensor counter, table;
};

TEST(CastModel, CastsFloatsButRunningStatistics) {
  Net net;
  const Tensor weight = net.embedding->weight;
  net.body->weight.mutable_grad() = torch::ones({16, 16});
  flash::cast_model(net);
  EXPECT_EQ(net.body->weight.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(net.body->weight.grad().scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(net.body->weight.requires_grad());
  EXPECT_EQ(net.final_norm->weight.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(net.table.scalar_type(), torch::kBFloat16);
  EXPECT_EQ(net.norm->weight.scalar_type(), torch::kFloat);
  EXPECT_EQ(net.norm->running_mean.scalar_type(), torch::kFloat);
  EXPECT_EQ(net.norm->num_batches_tracked.scalar_type(), torch::kLong);
  EXPECT_EQ(net.counter.scalar_type(), torch::kLong);
  EXPECT_TRUE(net.embedding->weight.is_same(weight)) << "the same tensor, so earlier references follow";
  EXPECT_TRUE(net.head->weight.is_same(net.embedding->weight));
}

TEST(CastModel, PatternsKeepParametersAndModules) {
  Net net;
  flash::cast_model(net, torch::kHalf, {"final_norm", "body.b*", "head.weight"});
  EXPECT_EQ(net.final_norm->bias.scalar_type(), torch::kFloat) << "a module's name keeps what is inside";
  EXPECT_EQ(net.body->bias.scalar_type(), torch::kFloat);
  EXPECT_EQ(net.body->weight.scalar_type(), torch::kHalf);
  EXPECT_EQ(net.embedding->weight.scalar_type(), torch::kFloat) << "tied to head.weight, which is kept";
}

TEST(CastModel, TensorsOverOneStorageStayTied) {
  struct Two : torch::nn::Module {
    Tensor a = register_parameter("a", torch::randn({4, 4}));
    Tensor b = register_parameter("b", a.detach().view({4, 4}));
  } net;
  ASSERT_EQ(net.a.data_ptr(), net.b.data_ptr());
  flash::cast_model(net);
  EXPECT_EQ(net.a.data_ptr(), net.b.data_ptr());
}

TEST(CastModel, BadArgumentsCastNothing) {
  Net net;
  expect_error([&] { flash::cast_model(net, torch::kFloat); }, {"cast_model", "dtype = Float", "BFloat16"});
  expect_error([&] { flash::cast_model(net, torch::kBFloat16, {"body", "nrom*"}); },
               {"keep_fp32_patterns[1]", "nrom*"});
  EXPECT_EQ(net.head->weight.scalar_type(), torch::kFloat);
}

TEST(CastModel, BuffersThatNeedTheirPrecisionStay) {
  struct Buffers : torch::nn::Module {
    Buffers() {
      register_buffer("inv_freq", torch::ones({4}));
      register_buffer("Rope_Table", torch::ones({4, 4}));
      register_buffer("decay", 1.0 / torch::arange(1, 20, torch::kFloat));
      register_buffer("counts", torch::tensor({1.0, 257.0, 4.0}));
      register_buffer("tiny", torch::tensor({1e-40, 1.0}));
      register_buffer("mask", torch::ones({4, 4}));
      register_buffer("mixed", torch::tensor({0.3, 0.1, 0.2, 0.7, 0.5, 0.4, 0.9, 0.8, 0.6}));
      register_parameter("position_weight", torch::ones({4}));
    }
  };
  for (const bool is_named : {false, true}) {
    Buffers net;
    if (is_named) {
      flash::cast_model(net, torch::kHalf, {}, {"*freq", "decay"});
    } else {
      flash::cast_model(net, torch::kHalf);
    }
    const auto dtype = [&](const char* name) { return net.named_buffers()[name].scalar_type(); };
    EXPECT_EQ(dtype("inv_freq"), is_named ? torch::kHalf : torch::kFloat);
    EXPECT_EQ(dtype("decay"), is_named ? torch::kHalf : torch::kFloat) << "a sequence that falls all the way";
    EXPECT_EQ(dtype("Rope_Table"), torch::kFloat);
    EXPECT_EQ(dtype("tiny"), torch::kFloat) << "would become 0";
    EXPECT_EQ(dtype("mask"), torch::kHalf);
    EXPECT_EQ(dtype("mixed"), torch::kHalf);
    EXPECT_EQ(net.named_parameters()["position_weight"].scalar_type(), torch::kHalf) << "no buffer";
  }
  Buffers net;
  expect_error([&] { flash::cast_model(net, torch::kHalf, {}, {"nothing"}); }, {"cast_buffers[0]", "no buffer"});
  flash::cast_model(net);
  EXPECT_EQ(net.named_buffers()["counts"].scalar_type(), torch::kFloat) << "bfloat16 has no 257";
}

TEST(CastModel, WhatIsLostGoesIntoTheCorrectionsOfThoseThatAreAlive) {
  torch::nn::Linear model(96, 96);
  const Tensor weight = model->weight.detach().clone();
  flash::FlashAdamW optimizer(model->parameters());
  flash::FlashAdamW moved(std::move(optimizer));
  const flash::FlashAdamW not_concerned(std::vector<Tensor>{parameter({8}, 1)});
  flash::cast_model(*model);
  EXPECT_TRUE(torch::allclose(moved.fp32_weight(model->weight), weight, 2e-5, 1e-6));
  EXPECT_FALSE(torch::equal(model->weight.to(torch::kFloat), weight));
  EXPECT_EQ(moved.param_state(model->weight)->step, 0);
  EXPECT_EQ(not_concerned.state_tensors().size(), 0u);
}

/// A net after some steps, with its optimizer.
struct Trained {
  Net net;
  std::unique_ptr<flash::FlashAdamW> optimizer;

  explicit Trained(int64_t steps, int64_t bits = 24) {
    at::manual_seed(4);
    for (Tensor& parameter : net.parameters()) torch::nn::init::normal_(parameter);
    flash::cast_model(net);
    std::vector<Tensor> params = net.parameters();
    params.erase(params.begin());  // parameters() lists tied ones twice
    optimizer = std::make_unique<flash::FlashAdamW>(
        params, flash::FlashAdamWOptions(1e-2).master_weight_bits(bits).min_quantized_numel(0));
    for (int64_t i = 0; i < steps; ++i) {
      set_gradients(params, i);
      optimizer->step();
    }
  }
};

TEST(Fp32State, RoundTripIsExact) {
  for (const int64_t bits : {0, 24, 32}) {
    for (const int64_t steps : {0, 3}) {
      SCOPED_TRACE(std::to_string(bits) + " bits, " + std::to_string(steps) + " steps");
      Trained trained(steps, bits), fresh(0, bits);
      const auto exported = flash::get_fp32_model_state(trained.net, *trained.optimizer);
      ASSERT_EQ(exported.size(), trained.net.named_parameters().size() + trained.net.named_buffers().size());
      EXPECT_EQ(exported["body.weight"].scalar_type(), torch::kFloat);
      EXPECT_EQ(exported["counter"].scalar_type(), torch::kLong);
      EXPECT_TRUE(same_bytes(exported["head.weight"], exported["embedding.weight"]));
      if (bits > 0 && steps > 0) {
        EXPECT_FALSE(same_bytes(exported["body.weight"], trained.net.body->weight.to(torch::kFloat)))
            << "has more bits";
      }
      flash::set_fp32_model_state(fresh.net, *fresh.optimizer, exported);
      const auto again = flash::get_fp32_model_state(fresh.net, *fresh.optimizer);
      for (const auto& item : exported) EXPECT_TRUE(same_bytes(item.value(), again[item.key()])) << item.key();
      EXPECT_TRUE(same_bytes(fresh.net.body->weight, trained.net.body->weight));
    }
  }
}

TEST(Fp32State, ImportIsTheNearest) {
  Trained trained(0);
  auto state = flash::get_fp32_model_state(trained.net, *trained.optimizer);
  at::manual_seed(6);
  const Tensor wanted = torch::randn({16, 16});
  state["body.weight"] = wanted;
  flash::set_fp32_model_state(trained.net, *trained.optimizer, state);
  const Tensor set = trained.optimizer->fp32_weight(trained.net.body->weight);
  // Half a ULP of bf16 over 2 * 127, and one rounding to fp32 (docs/numerics.md, section 2).
  const Tensor bound = wanted.abs() * (1.0 / 256 / 254) * 1.0001 + wanted.abs() * 6e-8;
  EXPECT_TRUE(((set - wanted).abs() <= bound).all().item<bool>());
  EXPECT_TRUE(same_bytes(trained.net.body->weight, wanted.to(torch::kBFloat16)));
}

TEST(Fp32State, BadStatesSetNothing) {
  Trained trained(2);
  const Snapshot before(*trained.optimizer);
  const auto refuse = [&](const std::function<torch::OrderedDict<std::string, Tensor>()>& make,
                          const std::vector<std::string>& parts) {
    const auto state = make();
    expect_error([&] { flash::set_fp32_model_state(trained.net, *trained.optimizer, state); }, parts);
    EXPECT_TRUE(before == Snapshot(*trained.optimizer));
  };
  const auto good = [&] { return flash::get_fp32_model_state(trained.net, *trained.optimizer); };
  refuse(
      [&] {
        auto s = good();
        s.erase("final_norm.weight");
        return s;
      },
      {"state[\"final_norm.weight\"] is missing"});
  refuse(
      [&] {
        auto s = good();
        s.insert("extra", torch::zeros({1}));
        return s;
      },
      {"state[\"extra\"] is unexpected"});
  refuse(
      [&] {
        auto s = good();
        s["body.bias"] = torch::zeros({17});
        return s;
      },
      {"state[\"body.bias\"]", "[17]", "[16]"});
  refuse(
      [&] {
        auto s = good();
        s["body.bias"] = torch::zeros({16}, torch::kLong);
        return s;
      },
      {"state[\"body.bias\"]", "Long"});
  refuse(
      [&] {
        auto s = good();
        s["head.weight"] = s["head.weight"] + 1;
        return s;
      },
      {"head.weight", "embedding.weight", "tied"});
  // The last of all names, when the others would have been written already.
  const std::vector<std::pair<Tensor, std::string>> strange{{torch::zeros({16}).to_sparse(), "layout Sparse"},
                                                            {torch::empty({16}, torch::kMeta), "without values"},
                                                            {Tensor(), "undefined"}};
  for (const auto& [value, part] : strange) {
    for (const std::string name : {"body.bias", "final_norm.weight"}) {
      refuse(
          [&, &bad = value] {
            auto s = good();
            s[name] = bad;
            return s;
          },
          {"state[\"" + name + "\"]", part});
    }
  }
  // Several weights at once: all, or none.
  const Tensor bias = trained.net.body->bias, weight = trained.net.body->weight;
  expect_error([&] { trained.optimizer->set_fp32_weights({{bias, torch::ones({16})}, {weight, torch::ones({3})}}); },
               {"set_fp32_weights: weights[1].second has shape [3]", "[16, 16]"});
  expect_error(
      [&] { trained.optimizer->set_fp32_weights({{bias, torch::ones({16})}, {parameter({3}, 1), torch::ones({3})}}); },
      {"set_fp32_weights: weights[1].first", "no parameter of this optimizer"});
  EXPECT_TRUE(before == Snapshot(*trained.optimizer));
  torch::optim::SGD other(trained.net.parameters(), 0.1);
  expect_error([&] { flash::get_fp32_model_state(trained.net, other); }, {"get_fp32_model_state", "flashoptim"});
}

}  // namespace
}  // namespace flashoptim_test
