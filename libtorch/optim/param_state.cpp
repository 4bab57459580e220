#include "libtorch/optim/param_state.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>
#include <torch/types.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "libtorch/optim/operators.h"

namespace flashoptim::libtorch {
namespace {

bool is_supported(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf; }

/// Sizes in the order in which elements lie in memory: a channels_last tensor's groups run along its channels.
std::vector<int64_t> memory_order_sizes(const at::Tensor& tensor) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  if (tensor.is_contiguous()) return sizes;
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return tensor.stride(a) > tensor.stride(b); });
  for (size_t d = 0; d < order.size(); ++d) sizes[d] = tensor.size(static_cast<int64_t>(order[d]));
  return sizes;
}

MasterWeights master_weights_for(const at::Tensor& param, const OptionValues& options) {
  if (param.scalar_type() == at::kFloat) return MasterWeights::kNone;
  const bool is_paper = options.state_codec == "paper";
  switch (options.master_weight_bits) {
    case 24:
      return is_paper ? MasterWeights::kCorrection8Nearest : MasterWeights::kCorrection8;
    case 32:
      return is_paper ? MasterWeights::kCorrection16Nearest : MasterWeights::kCorrection16;
    default:
      return options.stochastic_rounding ? MasterWeights::kNoneStochastic : MasterWeights::kNone;
  }
}

/// As in python/flashoptim/_states.py, which says why.
constexpr int64_t kChunkBytes = int64_t{1} << 30;
constexpr int64_t kAlignment = 256;

StateCodec codec_for(const at::Tensor& param, const OptionValues& options) {
  if (!options.quantize || param.numel() < options.min_quantized_numel) return StateCodec::kFloat32;
  return options.state_codec == "paper" ? StateCodec::kPaper : StateCodec::kDefault;
}

}  // namespace

const char* class_name(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kAdamW:
      return "FlashAdamW";
    case OptimizerKind::kAdam:
      return "FlashAdam";
    case OptimizerKind::kSgd:
      return "FlashSGD";
    case OptimizerKind::kSgdw:
      return "FlashSGDW";
    case OptimizerKind::kLion:
      return "FlashLion";
  }
  return "?";
}

void check_param(const std::string& name, const at::Tensor& param) {
  TORCH_CHECK(param.defined(), name, " is undefined; a tensor is needed");
  TORCH_CHECK(param.layout() == at::kStrided, name, " has layout ", param.layout(), "; must be Strided (dense)");
  TORCH_CHECK(is_supported(param.scalar_type()), name, " has dtype ", param.scalar_type(),
              "; must be Float, BFloat16 or Half");
  TORCH_CHECK(param.is_leaf(), name,
              " is not a leaf of the autograd graph (requires_grad, made by an operation); "
              "must be a leaf");
  TORCH_CHECK(param.is_non_overlapping_and_dense(), name, " has shape ", param.sizes(), " and strides ",
              param.strides(), "; its elements must fill their memory without gaps or overlap");
}

bool same_element_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.strides() == b.strides() || a.numel() == 0) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

void Zeros::add(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options, at::Tensor* place) {
  wanted_.push_back({sizes.vec(), strides.vec(), options.requires_grad(false), c10::multiply_integers(sizes), place});
}

void Zeros::make() {
  std::vector<at::Device> together;
  for (const Wanted& wanted : wanted_) {
    const at::Device device = wanted.options.device();
    if (!device.is_cuda()) {
      *wanted.place = at::empty_strided(wanted.sizes, wanted.strides, wanted.options).zero_();
    } else if (std::find(together.begin(), together.end(), device) == together.end()) {
      together.push_back(device);
    }
  }
  for (const at::Device device : together) make_together(device);
  wanted_.clear();
}

/// A chunk holds tensors of one dtype: it then needs no view of another dtype, which archives could not hold.
void Zeros::make_together(at::Device device) {
  const at::AutoDispatchBelowADInplaceOrView no_views;
  std::vector<at::Tensor> chunks;
  std::vector<at::ScalarType> dtypes;
  for (const Wanted& wanted : wanted_) {
    const at::ScalarType dtype = c10::typeMetaToScalarType(wanted.options.dtype());
    if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) dtypes.push_back(dtype);
  }
  for (const at::ScalarType dtype : dtypes) {
    const auto item = static_cast<int64_t>(c10::elementSize(dtype)), step = kAlignment / item;
    std::vector<const Wanted*> places;
    for (const Wanted& wanted : wanted_) {
      if (wanted.options.device() == device && wanted.options.dtype() == dtype) places.push_back(&wanted);
    }
    const auto room = [step](const Wanted& wanted) { return (wanted.numel + step - 1) / step * step; };
    for (size_t first = 0; first < places.size();) {
      size_t end = first + 1;
      int64_t total = room(*places[first]);
      for (; end < places.size() && (total + room(*places[end])) * item <= kChunkBytes; ++end)
        total += room(*places[end]);
      const at::Tensor chunk = chunks.emplace_back(at::empty({total}, places[first]->options));
      for (int64_t offset = 0; first < end; offset += room(*places[first]), ++first) {
        *places[first]->place = chunk.as_strided(places[first]->sizes, places[first]->strides, offset);
      }
    }
  }
  operators::zero_(chunks);
}

std::unique_ptr<FlashParamState> make_state(const at::Tensor& param, const FlashOptions& options, Zeros* zeros) {
  return make_state(param, options.kind(), options.has_momentum(), master_weights_for(param, options.values()),
                    codec_for(param, options.values()), zeros);
}

std::unique_ptr<FlashParamState> make_state(const at::Tensor& param, OptimizerKind kind, bool has_momentum,
                                            MasterWeights master_weights, StateCodec codec, Zeros* zeros) {
  auto state = std::make_unique<FlashParamState>();
  state->master_weights = master_weights;
  state->state_codec = codec;
  state->rows = operators::group_layout(memory_order_sizes(param))[0];
  switch (master_weights) {
    case MasterWeights::kCorrection8:
    case MasterWeights::kCorrection8Nearest:
      zeros->add(param.sizes(), param.strides(), param.options().dtype(at::kChar), &state->correction);
      break;
    case MasterWeights::kCorrection16:
    case MasterWeights::kCorrection16Nearest:
      zeros->add(param.sizes(), param.strides(), param.options().dtype(at::kShort), &state->correction);
      break;
    case MasterWeights::kNone:
    case MasterWeights::kNoneStochastic:
      state->correction = at::empty({0}, param.options().dtype(at::kChar).requires_grad(false));
      break;
  }
  if (has_momentum) add_slots(param, kind, state.get(), zeros);
  return state;
}

void add_slots(const at::Tensor& param, OptimizerKind kind, FlashParamState* state, Zeros* zeros) {
  const bool is_paper = state->state_codec == StateCodec::kPaper;
  const bool is_quantized = state->state_codec != StateCodec::kFloat32;
  const int64_t groups_per_row = operators::group_layout(memory_order_sizes(param))[2];
  const at::TensorOptions on_device = at::TensorOptions().device(param.device());
  const at::ScalarType headers = is_paper ? at::kHalf : at::kShort;
  const std::vector<int64_t> signs = operators::state_signs(kind);
  state->states.resize(signs.size());
  state->scales.resize(signs.size());
  for (size_t k = 0; k < signs.size(); ++k) {
    const at::ScalarType codes = is_paper && signs[k] != 0 ? at::kChar : at::kByte;
    zeros->add(param.sizes(), param.strides(), on_device.dtype(is_quantized ? codes : at::kFloat), &state->states[k]);
    if (is_quantized) {
      zeros->add({state->rows, groups_per_row}, {std::max<int64_t>(1, groups_per_row), 1}, on_device.dtype(headers),
                 &state->scales[k]);
    } else {
      state->scales[k] = at::empty({0}, on_device.dtype(headers));
    }
  }
}

}  // namespace flashoptim::libtorch
