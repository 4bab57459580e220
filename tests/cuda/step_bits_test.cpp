// CUDA's bytes against the CPU's, for every configuration.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <tuple>

#include "src/cuda/arguments.h"
#include "tests/cuda/device_tensors.h"

namespace flashoptim::cuda_test {
namespace {

const std::vector<GroupLayout>& layouts() {
  static const std::vector<GroupLayout> kLayouts = {
      {1, 1}, {1, 31}, {1, 32}, {1, 33},  {1, 63},  {1, 511},  {1, 513},  {1, 4097}, {1, 100007},
      {0, 0}, {3, 32}, {7, 96}, {64, 33}, {5, 100}, {40, 147}, {129, 40}, {3, 2056}, {257, 64},
  };
  return kLayouts;
}

void add_all_layouts(PlanPair& pair, size_t offset) {
  int64_t first = 0;
  for (const GroupLayout& layout : layouts()) {
    pair.add(layout, offset, first);
    first = first == 0 ? 32 : first * 64 + 7;
    if (first > (int64_t{1} << 40)) first = 0;
  }
}

ParameterTensors tensors_of(const Config& config) {
  ParameterTensors t;
  t.parameter_dtype = config.parameter_dtype;
  t.gradient_dtype = config.gradient_dtype;
  t.master_weights = config.master;
  t.state_codec = config.codec;
  return t;
}

/// For compute-sanitizer: every kernel at sizes 1, 33 and 1e5 + 7, and rows that end in short groups.
TEST(CudaSmall, EveryKernel) {
  std::set<std::tuple<OptimizerKind, bool, int>> seen;
  for (const Config& config : all_configs()) {
    const int states = state_count(config.optimizer, config.has_momentum);
    const int kernel = cuda::step_kernel_of(tensors_of(config), states, TensorGroups{});
    // The kernels of any types once more, where they have the most to do.
    const bool usual = config.parameter_dtype == DType::kFloat16 && config.gradient_dtype == DType::kFloat32 &&
                       config.master == MasterWeights::kCorrection8;
    if (!seen.emplace(config.optimizer, config.has_momentum, kernel).second && !usual) continue;
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    for (const GroupLayout layout :
         {GroupLayout{1, 1}, GroupLayout{1, 33}, GroupLayout{1, 100007}, GroupLayout{5, 100}})
      pair.add(layout);
    pair.add({1, 100}, 2);
    ASSERT_OK(pair.make());
    pair.new_gradients({true, 1e-3f});
    const Hyperparameters hyper = test_hyper(config, 1);
    ASSERT_OK(pair.cpu().step(&hyper, 1));
    ASSERT_OK(pair.cuda().step(&hyper, 1));
    EXPECT_EQ(pair.difference(), "");
    DeviceValue<cuda::GradientNorm> norm({});
    ASSERT_OK(pair.cuda().gradient_norm({}, norm.pointer()));
    EXPECT_TRUE(norm.get().norm != 0.0f);
  }
}

TEST(CudaStepBits, EveryConfiguration) {
  for (const Config& config : all_configs()) {
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    add_all_layouts(pair, 0);
    ASSERT_OK(pair.make());
    for (int64_t step = 1; step <= 3; ++step) {
      pair.new_gradients({step == 3, 1e-3f});
      const Hyperparameters hyper = test_hyper(config, step);
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      ASSERT_CUDA(cudaDeviceSynchronize());
      const std::string difference = pair.difference();
      ASSERT_EQ(difference, "") << "step " << step;
    }
  }
}

TEST(CudaStepBits, EveryConfigurationMisaligned) {
  size_t turn = 0;
  for (const Config& config : all_configs()) {
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    static constexpr size_t kOffsets[] = {2, 4, 8, 1, 6};
    const size_t offset = kOffsets[turn++ % 5];
    SCOPED_TRACE(offset);
    for (const GroupLayout layout : {GroupLayout{1, 4097}, GroupLayout{33, 100}, GroupLayout{9, 64}, GroupLayout{1, 7}})
      pair.add(layout, offset);
    ASSERT_OK(pair.make());
    for (int64_t step = 1; step <= 2; ++step) {
      pair.new_gradients({step == 2, 1e-3f});
      const Hyperparameters hyper = test_hyper(config, step);
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      const std::string difference = pair.difference();
      ASSERT_EQ(difference, "") << "step " << step;
    }
  }
}

TEST(CudaStepBits, HundredSteps) {
  for (const Config& config : all_configs()) {
    const bool usual = config.gradient_dtype == config.parameter_dtype &&
                       (config.master == MasterWeights::kCorrection8 || config.master == MasterWeights::kNone);
    if (!usual) continue;
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    pair.add({1, 4097});
    pair.add({31, 147});
    ASSERT_OK(pair.make());
    for (int64_t step = 1; step <= 100; ++step) {
      pair.new_gradients({false, step % 10 == 0 ? 1e2f : 1e-4f});
      Hyperparameters hyper = test_hyper(config, step);
      hyper.nesterov = step % 2 == 0;
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
    }
    ASSERT_CUDA(cudaDeviceSynchronize());
    EXPECT_EQ(pair.difference(), "");
  }
}

/// Gradients of every magnitude there is, and states that grow from them.
TEST(CudaStepBits, ExtremeMagnitudes) {
  for (const Config& config : all_configs()) {
    if (config.gradient_dtype != DType::kFloat32 || config.master == MasterWeights::kCorrection16Nearest) continue;
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    pair.add({1, 6000});
    ASSERT_OK(pair.make());
    int64_t step = 0;
    for (const float magnitude :
         {1e-38f, 1e-44f, 1e-30f, 1e-20f, 1e-12f, 1.0f, 1e10f, 1e19f, 1e30f, 1e38f, 0.0f, 0.0f, 1e-12f}) {
      pair.new_gradients({magnitude == 1e-20f, magnitude});
      Hyperparameters hyper = test_hyper(config, ++step);
      if (magnitude == 1e-12f) hyper.eps = 0.0;
      if (magnitude == 1e-44f) hyper.weight_decay = 0.0;
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      ASSERT_EQ(pair.difference(), "") << "step " << step << " gradients of " << magnitude;
    }
  }
}

/// Formats that have a hot kernel.
bool may_be_hot(const Config& c) {
  return cuda::hot_format_of(tensors_of(c), state_count(c.optimizer, c.has_momentum), TensorGroups{}) >= 0;
}

/// Whole tiles (16 groups) without a zero, a small or a large number: what the hot kernels take the shortest way for.
TEST(CudaStepBits, DenseGradients) {
  for (const Config& config : all_configs()) {
    if (!may_be_hot(config)) continue;
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    for (const GroupLayout layout : {GroupLayout{1, 65536}, GroupLayout{24, 4096}, GroupLayout{1, 100007}})
      pair.add(layout);
    ASSERT_OK(pair.make());
    std::normal_distribution<float> normal(0.0f, 1e-3f);
    for (int64_t step = 1; step <= 30; ++step) {
      for (size_t i = 0; i < pair.size(); ++i) {
        std::vector<float> g(static_cast<size_t>(pair.tensor(i).host().layout.numel()));
        for (float& x : g) x = normal(pair.random());
        pair.tensor(i).set_gradient(g);
      }
      const Hyperparameters hyper = test_hyper(config, step);
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
    }
    EXPECT_EQ(pair.difference(), "");
  }
}

/// Tiles with every mixture of zeros, as embeddings have them: never touched, touched now and then, left alone until
/// momentum and variance have decayed below every bound of the hot path; weights of 0; no decay.
TEST(CudaStepBits, ZerosInEveryMixture) {
  constexpr int64_t kTile = 512, kPatterns = 8, kNumel = kTile * kPatterns * 3;
  for (const Config& config : all_configs()) {
    if (!may_be_hot(config)) continue;
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    pair.add({1, kNumel});
    ASSERT_OK(pair.make());
    std::normal_distribution<float> normal(0.0f, 1e-3f);
    std::vector<float> w(kNumel);
    for (size_t i = 0; i < w.size(); ++i) w[i] = i % 97 == 3 ? 0.0f : 20.0f * normal(pair.random());
    pair.tensor(0).set_weights(w);
    for (int64_t step = 1; step <= 150; ++step) {
      std::vector<float> g(kNumel);
      for (int64_t i = 0; i < kNumel; ++i) {
        const int64_t at = i % kTile;
        bool zero = false;
        switch (i / kTile % kPatterns) {
          case 0:
            break;
          case 1:
            zero = true;
            break;
          case 2:
            zero = at % 32 == 5;
            break;  // one of a group
          case 3:
            zero = at % 32 != 5;
            break;  // all but one
          case 4:
            zero = step < 4;
            break;  // late
          case 5:
            zero = step > 3;
            break;  // early
          case 6:
            zero = (at + step) % 40 != 0;
            break;  // now and then
          case 7:
            zero = at / 32 % 2 == 0 && step % 20 != 0;
            break;  // half of the groups
        }
        const float x = normal(pair.random());
        g[static_cast<size_t>(i)] = zero ? (x > 0.0f ? 0.0f : -0.0f) : x;
      }
      pair.tensor(0).set_gradient(g);
      Hyperparameters hyper = test_hyper(config, step);
      hyper.beta1 = 0.6;
      hyper.beta2 = 0.5;
      hyper.momentum = config.has_momentum ? 0.5 : 0.0;
      if (step % 3 == 0) hyper.weight_decay = 0.0;
      if (step % 50 == 49) hyper.eps = 0.0;
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      if (step < 6 || step % 25 == 0) {
        ASSERT_EQ(pair.difference(), "") << "step " << step;
      }
    }
  }
}

void poke(void* on_host, void* on_device, int64_t index, uint16_t value) {
  std::memcpy(static_cast<uint16_t*>(on_host) + index, &value, sizeof value);
  cudaMemcpy(static_cast<uint16_t*>(on_device) + index, &value, sizeof value, cudaMemcpyHostToDevice);
}

constexpr int64_t kTile = 512;  // elements of a tile of the hot kernels

/// The element of a tile that has a flaw: another one in each tile and step.
int64_t flawed_element(int64_t tile, int64_t step) { return tile * kTile + (tile * 37 + step * 101) % kTile; }

/// body(config, pair) for every format that may be hot, `pair` with one tensor of `tiles` tiles.
template <class Body>
void for_each_hot_pair(int64_t tiles, Body body) {
  for (const Config& config : all_configs()) {
    if (!may_be_hot(config)) continue;
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    pair.add({1, kTile * tiles});
    ASSERT_OK(pair.make());
    body(config, pair);
    if (testing::Test::HasFatalFailure()) return;
  }
}

/// Tiles of nothing but zeros, whose states the hot kernels do not write, and others that differ in one thing: a
/// negative zero, a header or code that nothing explains, a weight of any kind.
TEST(CudaStepBits, UntouchedTiles) {
  constexpr int64_t kTiles = 40, kNumel = kTile * kTiles;
  for_each_hot_pair(kTiles, [](const Config& config, PlanPair& pair) {
    const ParameterTensors& host = pair.tensor(0).host();
    const ParameterTensors& device = pair.tensor(0).device();
    const int states = state_count(config.optimizer, config.has_momentum);
    const int half = config.parameter_dtype == DType::kFloat32 ? 2 : 1;
    for (int64_t step = 1; step <= 12; ++step) {
      std::vector<float> g(kNumel, 0.0f);
      // What warps carry from tile to tile begins with one that has zeros among others.
      for (int64_t i = 0; i < kNumel; i += 7) g[static_cast<size_t>(i)] = i / kTile % 5 == 0 ? 1e-3f : 0.0f;
      for (int64_t tile = 0; tile < kTiles; ++tile) {
        const int64_t at = flawed_element(tile, step), group = at / kGroupSize;
        if (step % 3 != 1) continue;
        static constexpr uint16_t kWeights[] = {0x0000, 0x8000, 0x0001, 0x7f80, 0xff80, 0x7fc1, 0x7f7f, 0x0080, 0x7c00};
        switch (tile % 5) {
          case 1:
            poke(host.parameter, device.parameter, at * half + half - 1, kWeights[(tile + step) % 9]);
            break;
          case 2:
            g[static_cast<size_t>(at)] = -0.0f;
            break;
          case 3:
            poke(host.scales[tile % states], device.scales[tile % states], group, 0x2345);
            break;
          case 4:
            poke(host.states[tile % states], device.states[tile % states], at / 2, 0x0100);
            break;
        }
      }
      pair.tensor(0).set_gradient(g);
      Hyperparameters hyper = test_hyper(config, step);
      if (step % 4 == 0) hyper.weight_decay = 0.0;
      if (step == 11) hyper.eps = 0.0;
      flashoptim::StepOptions host_options;
      cuda::StepOptions options;
      host_options.gradient_scale = options.gradient_scale = step % 2 == 0 ? -0.5f : 1.0f;
      const Status cpu = pair.cpu().step(&hyper, 1, host_options), cuda = pair.cuda().step(&hyper, 1, options);
      ASSERT_EQ(cpu.is_ok(), cuda.is_ok());
      ASSERT_EQ(pair.difference(), "") << "step " << step;
    }
  });
}

/// Tiles that the hot kernels would take, but for one element or header.
TEST(CudaStepBits, OneFlawInATile) {
  constexpr int64_t kTiles = 48, kNumel = kTile * kTiles;
  for_each_hot_pair(kTiles, [](const Config& config, PlanPair& pair) {
    const ParameterTensors& host = pair.tensor(0).host();
    const ParameterTensors& device = pair.tensor(0).device();
    const int infinity = config.parameter_dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
    const bool is_paper = config.codec == StateCodec::kPaper;
    const int states = state_count(config.optimizer, config.has_momentum);
    std::normal_distribution<float> normal(0.0f, 1e-3f);
    for (int64_t step = 1; step <= 8; ++step) {
      std::vector<float> g(kNumel);
      for (float& x : g) x = normal(pair.random());
      for (int64_t tile = 0; tile < kTiles; ++tile) {
        const int64_t at = flawed_element(tile, step), group = at / kGroupSize;
        const uint16_t sign = tile % 24 < 12 ? 0x0000 : 0x8000;
        const auto poke_weight = [&](int bits) {
          // Of fp32 the upper half.
          const int64_t half = config.parameter_dtype == DType::kFloat32 ? 2 * at + 1 : at;
          if (step > 3) poke(host.parameter, device.parameter, half, static_cast<uint16_t>(bits | sign));
        };
        const auto poke_header = [&](int slot, int header) {
          if (step > 3 && slot < states)
            poke(host.scales[slot], device.scales[slot], group, static_cast<uint16_t>(header));
        };
        switch (tile % 12) {
          case 0:
            poke_weight(infinity);
            break;
          case 1:
            poke_weight(infinity + 1);
            break;  // NaN
          case 2:
            poke_weight(infinity - 1);
            break;  // the largest
          case 3:
            poke_weight(0);
            break;
          case 4:
            poke_weight(1);
            break;  // subnormal
          case 5:
            g[static_cast<size_t>(at)] = sign != 0 ? -INFINITY : INFINITY;
            break;
          case 6:
            g[static_cast<size_t>(at)] = step > 3 ? NAN : 1e-3f;
            break;
          case 7:
            g[static_cast<size_t>(at)] = step > 3 ? 60000.0f : 1e-3f;
            break;
          case 8:  // variances of a group below what the root is taken of without a look
            for (int64_t i = group * kGroupSize; i < (group + 1) * kGroupSize; ++i)
              g[static_cast<size_t>(i)] *= 0x1p-45f;
            break;
          case 9:
            poke_header(0, is_paper ? 0x7c00 : (127 - 51) << 8 | 0xff);
            break;  // momentum's scale just below 2^-50; infinite
          case 10:
            poke_header(0, is_paper ? 0x8400 : (127 - 50) << 8);
            break;  // and 2^-50; negative
          case 11:
            poke_header(1, is_paper ? (tile % 24 < 12 ? 0x7e00 : 0x0001) : 20 << 8 | 11);
            break;  // variances of 2^-107; NaN, the smallest
        }
      }
      pair.tensor(0).set_gradient(g);
      const Hyperparameters hyper = test_hyper(config, step);
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      ASSERT_EQ(pair.difference(), "") << "step " << step;
    }
  });
}

/// States from elsewhere: any bytes at all, and then a step of usual gradients. `beta2` < 0: as usual.
void step_any_stored_bytes(double beta2) {
  for (const Config& config : all_configs()) {
    const int64_t last = hyperparameter_count(config.optimizer);
    bool has_beta2 = false;
    for (int64_t i = 0; i < last; ++i) has_beta2 |= std::string(hyperparameter(config.optimizer, i).name) == "beta2";
    if (beta2 >= 0.0 && !has_beta2) continue;
    SCOPED_TRACE(name(config));
    PlanPair pair(config);
    pair.add({1, 8195});
    ASSERT_OK(pair.make());
    pair.new_gradients({true, 1e-3f});
    const ParameterTensors& host = pair.tensor(0).host();
    const ParameterTensors& device = pair.tensor(0).device();
    const auto scramble = [&pair](void* on_host, void* on_device, size_t bytes) {
      if (on_host == nullptr) return;
      for (size_t i = 0; i < bytes; ++i)
        static_cast<unsigned char*>(on_host)[i] = static_cast<unsigned char>(pair.random()());
      cudaMemcpy(on_device, on_host, bytes, cudaMemcpyHostToDevice);
    };
    const size_t count = 8195, groups = static_cast<size_t>(host.layout.groups());
    for (int k = 0; k < state_count(config.optimizer, config.has_momentum); ++k) {
      scramble(host.states[k], device.states[k], count * (config.codec == StateCodec::kFloat32 ? 4 : 1));
      if (config.codec != StateCodec::kFloat32) scramble(host.scales[k], device.scales[k], groups * 2);
      // Variances are not negative.
      if (config.codec == StateCodec::kFloat32 && !state_slot(config.optimizer, k).is_signed) {
        for (size_t i = 0; i < count; ++i) static_cast<unsigned char*>(host.states[k])[4 * i + 3] &= 0x7f;
        cudaMemcpy(device.states[k], host.states[k], count * 4, cudaMemcpyHostToDevice);
      }
    }
    scramble(host.parameter, device.parameter, count * (config.parameter_dtype == DType::kFloat32 ? 4 : 2));
    scramble(
        host.correction, device.correction,
        count * (config.master == MasterWeights::kCorrection8 || config.master == MasterWeights::kCorrection8Nearest
                     ? 1
                     : 2));
    for (int64_t step = 7; step < 9; ++step) {
      Hyperparameters hyper = test_hyper(config, step);
      if (beta2 >= 0.0) hyper.beta2 = beta2;
      ASSERT_OK(pair.cpu().step(&hyper, 1));
      ASSERT_OK(pair.cuda().step(&hyper, 1));
      ASSERT_EQ(pair.difference(), "") << "step " << step;
      pair.new_gradients({});
    }
  }
}

TEST(CudaStepBits, AnyStoredBytes) { step_any_stored_bytes(-1.0); }

/// Nothing of the old variance is left, so nothing of it bounds the new one.
TEST(CudaStepBits, AnyStoredBytesWithoutBeta2) { step_any_stored_bytes(0.0); }

}  // namespace
}  // namespace flashoptim::cuda_test
