// front_end_bytes DIR: also what gradient release and clipping leave, DIR/clip-<way>-<dtype>.bin, and
// front_end_bytes train STEPS FROM TO [archive]: a run of FlashAdamW that is at step FROM and goes on to TO; weights
// and states are read from STEPS/<FROM>.{weights,state}.safetensors (states from <FROM>.state.archive) where FROM is
// not 0, and written as those of TO, states as both, and as torch::optim::AdamW's in <TO>.torch.archive.
//
// front_end_bytes DIR: runs every optimizer of the C++ front end in several formats on inputs made by a formula and
// writes the bytes of parameters, corrections, states and scales to DIR/<case>.bin. The Python package does the same on
// the same inputs (tests/python/test_front_ends.py); the files must be equal.
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashoptim/optimizer_info.h"
#include "flashoptim/torch/flashoptim.h"

namespace {

using flashoptim::torch::FlashOptimizer;

const std::vector<std::vector<int64_t>> kShapes = {{64, 100}, {5000}, {33}, {3, 7}, {8, 32, 3, 3}};
constexpr int kSteps = 7;

torch::Tensor ramp(const std::vector<int64_t>& shape, double slope, double offset) {
  int64_t numel = 1;
  for (int64_t size : shape) numel *= size;
  return torch::sin(torch::arange(numel, torch::kFloat64) * slope + offset).reshape(shape);
}

/// The same as of_hyperparameters in tests/python/test_front_ends.py: of what is not named here, counts are 5 and
/// numbers above 1.
double value_of(const std::string& optimizer, const flashoptim::HyperparameterInfo& info) {
  const std::string name = info.name;
  if (name == "beta1") return 0.8;
  if (name == "beta2") return 0.95;
  if (info.highest == 1.0 && info.kind == flashoptim::HyperparameterKind::kNumber) return 0.975;
  if (name == "eps") return 1e-6;
  if (name == "momentum") return 0.8;
  if (name == "dampening") return optimizer == "sgdw" ? 0.0 : 0.2;
  if (name == "nesterov") return optimizer == "sgdw" ? 1.0 : 0.0;
  if (info.kind == flashoptim::HyperparameterKind::kWhole) return 5.0;
  return 0.5 * info.default_value + 1.0;
}

template <class Optimizer>
std::unique_ptr<FlashOptimizer> make(const std::vector<torch::Tensor>& params, const std::string& codec, int64_t bits) {
  using Options = typename Optimizer::Options;
  auto options = Options(3e-3).weight_decay(0.1).state_codec(codec).master_weight_bits(bits).seed(7);
  for (int64_t i = flashoptim::kCommonHyperparameters; i < flashoptim::hyperparameter_count(Options::kKind); ++i) {
    const flashoptim::HyperparameterInfo info = flashoptim::hyperparameter(Options::kKind, i);
    options.set_number(info.name, value_of(flashoptim::optimizer_name(Options::kKind), info));
  }
  return std::make_unique<Optimizer>(params, options);
}

std::unique_ptr<FlashOptimizer> make_optimizer(const std::string& name, const std::vector<torch::Tensor>& params,
                                               const std::string& codec, int64_t bits) {
#define MAKE_OPTIMIZER(title)                                                              \
  if (name == flashoptim::optimizer_name(flashoptim::torch::Flash##title::Options::kKind)) \
    return make<flashoptim::torch::Flash##title>(params, codec, bits);
  FLASHOPTIM_FOR_EACH_OPTIMIZER(MAKE_OPTIMIZER)
#undef MAKE_OPTIMIZER
  return nullptr;
}

void write(std::ofstream& out, const torch::Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return;
  const torch::Tensor flat = tensor.detach().contiguous();
  out.write(static_cast<const char*>(flat.data_ptr()), static_cast<std::streamsize>(flat.nbytes()));
}

void write_all(const std::filesystem::path& path, const FlashOptimizer& optimizer,
               const std::vector<torch::Tensor>& params) {
  std::ofstream out(path, std::ios::binary);
  for (const torch::Tensor& param : params) {
    write(out, param);
    const auto* state = optimizer.param_state(param);
    write(out, state->correction);
    for (size_t k = 0; k < state->states.size(); ++k) {
      write(out, state->states[k]);
      write(out, state->scales[k]);
    }
  }
  if (!out) throw std::runtime_error("cannot write " + path.string());
}

std::vector<torch::Tensor> make_params(torch::Dtype dtype) {
  std::vector<torch::Tensor> params;
  for (size_t i = 0; i < kShapes.size(); ++i) {
    params.push_back((ramp(kShapes[i], 0.37, static_cast<double>(i)) * 0.5).to(dtype).requires_grad_());
  }
  return params;
}

torch::Tensor make_gradient(size_t i, int step, torch::Dtype dtype) {
  return (ramp(kShapes[i], 0.11 * (step + 1), static_cast<double>(i)) * 1e-2).to(dtype);
}

/// Whose gradients are make_gradient()'s.
torch::Tensor make_loss(const std::vector<torch::Tensor>& params, int step) {
  torch::Tensor loss = torch::zeros({});
  for (size_t i = 0; i < params.size(); ++i) {
    loss = loss + (params[i] * make_gradient(i, step, params[i].scalar_type())).sum().to(torch::kFloat);
  }
  return loss;
}

constexpr double kMaxNorm = 0.25;

/// One run by backward(): `way` is a clip of GradientReleaseOptions, "none", or "step" (clip_grad_norm_, no release).
void run_clipped(const std::filesystem::path& folder, const std::string& way, torch::Dtype dtype,
                 const std::string& dtype_name) {
  namespace flash = flashoptim::torch;
  const std::vector<torch::Tensor> params = make_params(dtype);
  flash::FlashAdamW optimizer(params, flash::FlashAdamWOptions(3e-3).weight_decay(0.1).seed(7));
  std::optional<flash::GradientReleaseHandle> handle;
  if (way != "step") {
    flash::GradientReleaseOptions options;
    if (way != "none") options.clip(way).max_norm(kMaxNorm);
    if (way == "previous") options.norm_decay(0.25);
    handle = flash::enable_gradient_release(params, optimizer, options);
  }
  for (int t = 0; t < kSteps; ++t) {
    const torch::Tensor loss = make_loss(params, t);
    if (way == "two_pass") handle->measure_norm([&] { loss.backward({}, /*keep_graph=*/true); });
    loss.backward();
    if (way == "step") optimizer.clip_grad_norm_(kMaxNorm);
    optimizer.step();
    optimizer.zero_grad();
  }
  write_all(folder / ("clip-" + way + "-" + dtype_name + ".bin"), optimizer, params);
}

int train(const std::filesystem::path& folder, int from, int to, bool from_archive) {
  namespace flash = flashoptim::torch;
  std::vector<torch::Tensor> params = make_params(torch::kBFloat16);
  params.push_back(
      (ramp({6, 40, 2, 3}, 0.37, 9) * 0.5).to(torch::kBFloat16).to(torch::MemoryFormat::ChannelsLast).requires_grad_());
  const std::vector<torch::optim::OptimizerParamGroup> groups{
      torch::optim::OptimizerParamGroup({params[0], params[1]}),
      torch::optim::OptimizerParamGroup(
          {params.begin() + 2, params.end()},
          std::make_unique<flash::FlashAdamWOptions>(
              flash::FlashAdamWOptions(1e-3).state_codec("paper").master_weight_bits(32)))};
  flash::FlashAdamW optimizer(groups, flash::FlashAdamWOptions(3e-3).weight_decay(0.1).seed(7).min_quantized_numel(0));
  const auto file = [&](int step, const std::string& what) {
    return (folder / (std::to_string(step) + what)).string();
  };
  if (from > 0) {
    const torch::NoGradGuard no_grad;
    const flash::Safetensors weights = flash::read_safetensors(file(from, ".weights.safetensors"));
    for (size_t i = 0; i < params.size(); ++i) params[i].copy_(weights.tensors[std::to_string(i)]);
    if (from_archive) {
      torch::serialize::InputArchive archive;
      flash::load_archive(file(from, ".state.archive"), archive);
      optimizer.load(archive);
    } else {
      flash::load_safetensors(file(from, ".state.safetensors"), optimizer);
    }
  }
  for (int t = from; t < to; ++t) {
    for (size_t i = 0; i < params.size(); ++i) {
      params[i].mutable_grad() =
          (ramp(params[i].sizes().vec(), 0.11 * (t + 1), static_cast<double>(i)) * 1e-2).to(torch::kBFloat16);
    }
    optimizer.step();
  }
  flash::Safetensors weights;
  for (size_t i = 0; i < params.size(); ++i) weights.tensors.insert(std::to_string(i), params[i].detach());
  flash::write_safetensors(file(to, ".weights.safetensors"), weights);
  flash::save_safetensors(file(to, ".state.safetensors"), optimizer);
  torch::serialize::OutputArchive archive, torchs;
  optimizer.save(archive);
  flash::save_archive(file(to, ".state.archive"), archive);
  flash::save_torch_archive(optimizer, torchs);
  flash::save_archive(file(to, ".torch.archive"), torchs);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if ((argc == 5 || (argc == 6 && std::string(argv[5]) == "archive")) && std::string(argv[1]) == "train") {
    return train(argv[2], std::stoi(argv[3]), std::stoi(argv[4]), argc == 6);
  }
  if (argc != 2) {
    std::cerr << "usage: front_end_bytes DIR | front_end_bytes train STEPS FROM TO [archive]\n";
    return 2;
  }
  for (const std::string way : {"none", "two_pass", "previous", "parameter", "step"}) {
    run_clipped(argv[1], way, torch::kBFloat16, "bfloat16");
    run_clipped(argv[1], way, torch::kFloat32, "float32");
  }
  for (int64_t number = 0; number < flashoptim::optimizer_count(); ++number) {
    const std::string optimizer = flashoptim::optimizer_name(flashoptim::optimizer_at(number));
    for (const std::string codec : {"default", "paper"}) {
      for (const int64_t bits : {0, 24, 32}) {
        for (const auto dtype : {torch::kBFloat16, torch::kFloat16, torch::kFloat32}) {
          const std::vector<torch::Tensor> params = make_params(dtype);
          const auto opt = make_optimizer(optimizer, params, codec, bits);
          for (int t = 0; t < kSteps; ++t) {
            for (size_t i = 0; i < params.size(); ++i) {
              params[i].mutable_grad() = make_gradient(i, t, dtype);
            }
            opt->step();
          }
          const std::string name = optimizer + "-" + codec + "-" + std::to_string(bits) + "-" +
                                   (dtype == torch::kBFloat16  ? "bfloat16"
                                    : dtype == torch::kFloat16 ? "float16"
                                                               : "float32");
          write_all(std::filesystem::path(argv[1]) / (name + ".bin"), *opt, params);
        }
      }
    }
  }
  return 0;
}
