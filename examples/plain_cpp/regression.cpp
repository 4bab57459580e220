// Trains a small network without torch: raw buffers, one plan, one call per step.
//
// The data is Friedman's first regression problem (1991): ten uniform inputs, five of which matter,
//   y = 10 sin(pi x0 x1) + 20 (x2 - 1/2)^2 + 10 x3 + 5 x4 + noise,   noise ~ N(0, 1).
// Weights and gradients are bf16, corrections and AdamW's states 8 bit. usage: plain_cpp [STEPS]
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "flashoptim/step.h"

namespace {

constexpr int kInputs = 10, kHidden = 512, kBatch = 64, kTestRows = 2000;
constexpr double kPi = 3.14159265358979323846;

[[noreturn]] void fail(const flashoptim::Status& status) {
  std::fprintf(stderr, "flashoptim: %s\n", status.message().c_str());
  std::exit(1);
}
void check(const flashoptim::Status& status) {
  if (!status.is_ok()) fail(status);
}

float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// A parameter tensor and all that a step needs of it.
struct Tensor {
  std::vector<uint16_t> parameter, gradient;  // bf16
  std::vector<int8_t> correction;
  std::vector<uint8_t> states[2];
  std::vector<uint16_t> scales[2];
  std::vector<float> gradient_sum;  // where the backward pass accumulates; not kept between steps by a real program
  flashoptim::GroupLayout layout;
  flashoptim::StateCodec codec;

  Tensor(const std::vector<int64_t>& sizes, double scale, std::mt19937& random)
      : layout(flashoptim::group_layout(sizes.data(), static_cast<int64_t>(sizes.size()))) {
    // Small tensors keep fp32 states: they are the sensitive ones and cost next to nothing.
    codec = layout.numel() >= 4096 ? flashoptim::StateCodec::kDefault : flashoptim::StateCodec::kFloat32;
    const size_t numel = static_cast<size_t>(layout.numel());
    std::vector<float> values(numel);
    std::normal_distribution<float> normal;
    for (float& value : values) value = static_cast<float>(scale) * normal(random);
    parameter.resize(numel);
    gradient.resize(numel);
    correction.resize(numel);
    gradient_sum.resize(numel);
    check(flashoptim::split_weights(flashoptim::DType::kBFloat16, flashoptim::MasterWeights::kCorrection8,
                                    values.data(), parameter.data(), correction.data(), layout.numel()));
    for (int k = 0; k < 2; ++k) {
      // Zero bytes are zero states in every codec.
      states[k].resize(codec == flashoptim::StateCodec::kFloat32 ? 4 * numel : numel);
      if (codec != flashoptim::StateCodec::kFloat32) scales[k].resize(static_cast<size_t>(layout.groups()));
    }
  }

  flashoptim::ParameterTensors tensors() {
    flashoptim::ParameterTensors t;
    t.parameter = parameter.data();
    t.gradient = gradient.data();
    t.correction = correction.data();
    for (int k = 0; k < 2; ++k) {
      t.states[k] = states[k].data();
      t.scales[k] = scales[k].data();
    }
    t.layout = layout;
    t.parameter_dtype = t.gradient_dtype = flashoptim::DType::kBFloat16;
    t.master_weights = flashoptim::MasterWeights::kCorrection8;
    t.state_codec = codec;
    return t;
  }

  /// Rounds the accumulated gradient to bf16 and clears the sum.
  void finish_gradient() {
    check(flashoptim::split_weights(flashoptim::DType::kBFloat16, flashoptim::MasterWeights::kNone, gradient_sum.data(),
                                    gradient.data(), nullptr, layout.numel()));
    gradient_sum.assign(gradient_sum.size(), 0.0f);
  }

  size_t bytes() const {
    size_t total = 2 * parameter.size() + 2 * gradient.size() + correction.size();
    for (int k = 0; k < 2; ++k) total += states[k].size() + 2 * scales[k].size();
    return total;
  }
};

struct Row {
  float x[kInputs];
  float y;
};

Row draw(std::mt19937& random, bool noisy) {
  std::uniform_real_distribution<float> uniform;
  std::normal_distribution<double> normal;
  Row row;
  for (float& x : row.x) x = uniform(random);
  const double centred = row.x[2] - 0.5;
  const double y = 10 * std::sin(kPi * row.x[0] * row.x[1]) + 20 * centred * centred + 10 * row.x[3] + 5 * row.x[4];
  // Centred and scaled to about one, as a program would do with any target.
  row.y = static_cast<float>((y + (noisy ? normal(random) : 0.0) - 14.4) / 5.0);
  return row;
}

/// y = w2 . tanh(W1 x + b1) + b2
struct Network {
  Tensor w1, b1, w2, b2;
  float hidden[kHidden];

  explicit Network(std::mt19937& random)
      : w1({kHidden, kInputs}, 1 / std::sqrt(double{kInputs}), random),
        b1({kHidden}, 0.1, random),
        w2({1, kHidden}, 1 / std::sqrt(double{kHidden}), random),
        b2({1}, 0.0, random) {}

  float forward(const Row& row) {
    float y = widen(b2.parameter[0]);
    for (size_t h = 0; h < kHidden; ++h) {
      float sum = widen(b1.parameter[h]);
      for (size_t i = 0; i < kInputs; ++i) sum += widen(w1.parameter[h * kInputs + i]) * row.x[i];
      hidden[h] = std::tanh(sum);
      y += widen(w2.parameter[h]) * hidden[h];
    }
    return y;
  }

  /// Adds d(loss)/d(parameters) for d(loss)/dy = slope, after forward(row).
  void backward(const Row& row, float slope) {
    b2.gradient_sum[0] += slope;
    for (size_t h = 0; h < kHidden; ++h) {
      w2.gradient_sum[h] += slope * hidden[h];
      const float below = slope * widen(w2.parameter[h]) * (1 - hidden[h] * hidden[h]);
      b1.gradient_sum[h] += below;
      for (size_t i = 0; i < kInputs; ++i) w1.gradient_sum[h * kInputs + i] += below * row.x[i];
    }
  }
};

double mean_square_error(Network& network, const std::vector<Row>& rows) {
  double sum = 0;
  for (const Row& row : rows) {
    const double error = network.forward(row) - row.y;
    sum += error * error;
  }
  return sum / static_cast<double>(rows.size());
}

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 2000;
  if (steps < 1) {
    std::fprintf(stderr, "usage: plain_cpp [STEPS], STEPS at least 1\n");
    return 2;
  }
  const char* isa = "";
  check(flashoptim::cpu_isa(&isa));

  std::mt19937 random(1);
  Network network(random);
  std::vector<Row> test;
  for (int i = 0; i < kTestRows; ++i) test.push_back(draw(random, false));

  Tensor* const parameters[] = {&network.w1, &network.b1, &network.w2, &network.b2};
  std::vector<flashoptim::ParameterTensors> tensors;
  size_t bytes = 0, numel = 0;
  for (Tensor* tensor : parameters) {
    tensors.push_back(tensor->tensors());
    bytes += tensor->bytes();
    numel += tensor->parameter.size();
  }
  flashoptim::Plan plan;
  check(flashoptim::Plan::make(flashoptim::OptimizerKind::kAdamW, false, tensors.data(),
                               static_cast<int64_t>(tensors.size()), &plan));

  const double first = mean_square_error(network, test);
  std::printf("%zu parameters in %zu tensors, instruction set %s\n", numel, tensors.size(), isa);
  std::printf("step %5d  test loss %.5f\n", 0, first);
  for (int step = 1; step <= steps; ++step) {
    for (int row = 0; row < kBatch; ++row) {
      const Row sample = draw(random, true);
      const float error = network.forward(sample) - sample.y;
      network.backward(sample, 2 * error / kBatch);
    }
    for (Tensor* tensor : parameters) tensor->finish_gradient();

    flashoptim::Hyperparameters hyper;
    hyper.lr = 1e-2 * 0.5 * (1 + std::cos(kPi * step / steps));
    hyper.weight_decay = 1e-3;
    hyper.step = step;
    check(plan.step(&hyper, 1));
    if (step % (steps >= 10 ? steps / 10 : 1) == 0) {
      std::printf("step %5d  test loss %.5f\n", step, mean_square_error(network, test));
    }
  }

  const double last = mean_square_error(network, test);
  const auto per_parameter = [](size_t total, size_t count) {
    return static_cast<double>(total) / static_cast<double>(count);
  };
  std::printf(
      "bytes per parameter, gradient and states included: %.3f in %zu parameters with 8-bit states, %.3f over all "
      "(fp32 AdamW: 16)\n",
      per_parameter(network.w1.bytes(), network.w1.parameter.size()), network.w1.parameter.size(),
      per_parameter(bytes, numel));
  std::printf("test loss %.5f -> %.5f\n", first, last);
  // With the default number of steps the network must have learned what a constant cannot say.
  return last < (argc > 1 ? first : 0.1 * first) ? 0 : 1;
}
