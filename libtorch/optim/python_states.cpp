// The Python package's state_dict() in a safetensors file (docs/state_format.md, "Safetensors").
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/types.h>
#include <zlib.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <vector>

#include "flashoptim/optimizer_info.h"
#include "flashoptim/torch/interchange.h"
#include "flashoptim/torch/optimizers.h"
#include "flashoptim/version.h"
#include "libtorch/optim/handles.h"
#include "libtorch/optim/state_import.h"
#include "libtorch/optim/whole_file.h"

namespace flashoptim::libtorch {
namespace {

using Json = nlohmann::ordered_json;
using Tensors = ::torch::OrderedDict<std::string, at::Tensor>;

constexpr store::Op kOp{"load_safetensors"};
const std::string kPrefix = "flashoptim_native.";
const std::string kOptimizer = kPrefix + "optimizer", kFormat = kPrefix + "format", kLibrary = kPrefix + "library",
                  kParamGroups = kPrefix + "param_groups", kChecksum = kPrefix + "checksum";

std::string description_key(OptimizerKind kind) {
  return kPrefix + optimizer_name(kind) + "." + std::to_string(kStateFormatVersion);
}

bool has_decouple_lr(OptimizerKind kind) {
#define FLASHOPTIM_HAS(name)                                              \
  if (kind == Flash##name##Options::kKind) {                              \
    return []<class Options>(const Options*) {                            \
      return requires(const Options& options) { options.decouple_lr(); }; \
    }(static_cast<const Flash##name##Options*>(nullptr));                 \
  }
  FLASHOPTIM_FOR_EACH_OPTIMIZER(FLASHOPTIM_HAS)
#undef FLASHOPTIM_HAS
  return false;
}

/// Calls f(name, info) for the numbers of a rule that a group holds, betas apart.
template <class F>
void for_each_number(OptimizerKind kind, F&& f) {
  for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
    const HyperparameterInfo info = hyperparameter(kind, i);
    if (i != kDecayLrIndex && i != kStepIndex) f(std::string(info.name), info);
  }
}

bool is_beta(const std::string& name) { return name.size() == 5 && name.compare(0, 4, "beta") == 0; }

/// Numbers for which Python's "none" is 0 here.
bool may_be_none(const std::string& name) { return name.compare(0, 2, "t_") == 0; }

// ---- out ------------------------------------------------------------------------------------------------------------

/// [[how many in a row, value], ...]; what has no value goes with its neighbours.
Json runs_of(const std::vector<std::string>& values) {
  std::vector<std::pair<int64_t, std::string>> runs;
  for (const std::string& value : values) {
    if (!runs.empty() && (value.empty() || runs.back().second.empty() || runs.back().second == value)) {
      ++runs.back().first;
      if (runs.back().second.empty()) runs.back().second = value;
    } else {
      runs.emplace_back(1, value);
    }
  }
  Json result = Json::array();
  for (const auto& [count, value] : runs) result.push_back({count, value.empty() ? Json() : Json(value)});
  return result;
}

std::string library_version() {
  return std::to_string(FLASHOPTIM_VERSION_MAJOR) + "." + std::to_string(FLASHOPTIM_VERSION_MINOR) + "." +
         std::to_string(FLASHOPTIM_VERSION_PATCH);
}

const char* codec_name(StateCodec codec) { return codec == StateCodec::kPaper ? "paper" : "default"; }
const char* dtype_name(at::ScalarType dtype) { return dtype == at::kHalf ? "float16" : "bfloat16"; }

Json group_of(OptimizerKind kind, const FlashOptions& options, const Json& numbers, const Json& codecs,
              const Json& dtypes) {
  Json group = {{"params", numbers}};
  Json betas = Json::array();
  for_each_number(kind, [&](const std::string& name, const HyperparameterInfo& info) {
    const double value = options.number(name);
    if (is_beta(name)) {
      betas.push_back(value);
    } else if (info.kind == HyperparameterKind::kFlag) {
      group[name] = value != 0;
    } else if (info.kind == HyperparameterKind::kWhole) {
      group[name] = may_be_none(name) && value == 0 ? Json() : Json(static_cast<int64_t>(value));
    } else {
      group[name] = value;
    }
  });
  if (!betas.empty()) group["betas"] = betas;
  const OptionValues& values = options.values();
  if (has_decouple_lr(kind)) group["decouple_lr"] = values.decouple_lr;
  if (values.decouple_lr) group["decay_lr"] = values.initial_lr;
  group[description_key(kind)] = {
      {"library", library_version()},
      {"format", kStateFormatVersion},
      {"optimizer", optimizer_name(kind)},
      {"quantize", values.quantize},
      {"state_codec", values.state_codec},
      {"master_weight_bits", values.master_weight_bits == 0 ? Json() : Json(values.master_weight_bits)},
      {"min_quantized_numel", values.min_quantized_numel},
      {"stochastic_rounding", values.stochastic_rounding},
      {"capturable", values.capturable},
      {"parameters", numbers.size()},
      {"codecs", codecs},
      {"dtypes", dtypes}};
  return group;
}

/// 16-bit integers as pairs of bytes, as state_dict() has them.
at::Tensor as_bytes(const at::Tensor& tensor) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.push_back(2);
  return tensor.contiguous().reshape({-1}).view(at::kByte).reshape(sizes);
}

/// The tensors of a state, by key.
Tensors tensors_of(const std::string& name, OptimizerKind kind, const at::Tensor& param, const FlashParamState& state) {
  const bool has_momentum = !state.states.empty();
  const Form form{{state.master_weights, state.state_codec}, has_momentum};
  const std::vector<int64_t> strides = strides_of(kind, state, form, param);
  TORCH_CHECK(lies(param, strides), name,
              ": its state lies in memory otherwise than the parameter does, which a safetensors file cannot say; take "
              "a step from a parameter that lies as it did before, or load() an archive of it");
  const store::StorageOrder order =
      store::storage_order(param.sizes().data(), strides.data(), static_cast<int64_t>(strides.size()));
  const auto dense = [&](const at::Tensor& array) {
    return (order.empty() ? array : array.permute(order)).cpu().contiguous();
  };
  // (A scale of format 1's shape stays so; either front end takes it.)
  Tensors result;
  result.insert("step", at::scalar_tensor(state.steps(), at::kLong));
  for (size_t k = 0; k < state.states.size(); ++k) {
    const auto slot = static_cast<int>(k);
    result.insert(store::array_name(kind, store::Role::kState, slot, state.state_codec), dense(state.states[k]));
    if (state.state_codec == StateCodec::kFloat32) continue;
    const at::Tensor scale = state.scales[k].cpu().contiguous();
    result.insert(store::array_name(kind, store::Role::kScale, slot, state.state_codec), as_bytes(scale));
  }
  if (has_correction(state)) {
    const at::Tensor correction = dense(state.correction);
    result.insert("correction", correction.scalar_type() == at::kShort ? as_bytes(correction) : correction);
  }
  if (!order.empty()) result.insert("storage_order", at::tensor(order, at::kLong));
  return result;
}

/// Tensors in the order of the file.
std::string checksum_of(const std::string& groups, const Safetensors& content) {
  uLong checksum = crc32_z(0, reinterpret_cast<const Bytef*>(groups.data()), groups.size());
  for (const at::Tensor& tensor : content.tensors.values()) {
    if (tensor.nbytes() == 0) continue;  // of no address perhaps, for which zlib would begin anew
    checksum = crc32_z(checksum, static_cast<const Bytef*>(tensor.const_data_ptr()), tensor.nbytes());
  }
  return std::to_string(checksum);
}

// ---- in -------------------------------------------------------------------------------------------------------------

/// A group's entry that must be of a type; throws otherwise.
template <class Value, class Is>
Value value_of(const std::string& where, const Json& group, const std::string& key, Is is, const char* kind) {
  TORCH_CHECK(group.contains(key) && (group.at(key).*is)(), where, key, " is ",
              group.contains(key) ? group.at(key).dump() : "missing", " in the file; must be ", kind);
  return group.at(key).get<Value>();
}

void read_hyperparameters(const std::string& where, const Json& group, OptimizerKind kind, FlashOptions* options,
                          OptionValues* values) {
  std::set<std::string> known{"params",      "param_names", "initial_lr",         "betas",
                              "decouple_lr", "decay_lr",    description_key(kind)};
  size_t betas = 0;
  for_each_number(kind, [&](const std::string& name, const HyperparameterInfo& info) {
    if (is_beta(name)) {
      const Json all = group.contains("betas") ? group.at("betas") : Json();
      TORCH_CHECK(all.is_array() && betas < all.size() && all[betas].is_number(), where, "betas is ", all.dump(),
                  " in the file; must be a list of numbers");
      options->set_number(name, all[betas++].get<double>());
      return;
    }
    known.insert(name);
    if (may_be_none(name) && group.contains(name) && group.at(name).is_null()) {
      options->set_number(name, 0);
    } else if (info.kind == HyperparameterKind::kFlag) {
      options->set_number(name, value_of<bool>(where, group, name, &Json::is_boolean, "true or false") ? 1 : 0);
    } else {
      const auto number = value_of<double>(where, group, name, &Json::is_number, "a number");
      TORCH_CHECK(
          info.kind != HyperparameterKind::kWhole || (std::floor(number) == number && std::abs(number) < 0x1p53), where,
          name, " is ", number, " in the file; must be a whole number");
      options->set_number(name, number);
    }
  });
  TORCH_CHECK(betas == 0 || group.at("betas").size() == betas, where, "betas is ", group.at("betas").dump(),
              " in the file; must be ", betas, " numbers");
  if (has_decouple_lr(kind) && group.contains("decouple_lr")) {
    values->decouple_lr = value_of<bool>(where, group, "decouple_lr", &Json::is_boolean, "true or false");
  }
  if (group.contains("decay_lr")) {
    values->initial_lr = value_of<double>(where, group, "decay_lr", &Json::is_number, "a number");
  }
  for (const auto& [key, value] : group.items()) {
    if (known.count(key) == 0)
      TORCH_WARN(where, key, " = ", value.dump(), " of the file is unknown here, and left out");
  }
}

/// What a run-length list says of a position; "" where it says nothing.
std::string at_position(const std::string& where, const Json& description, const char* key, size_t position) {
  const Json runs = description.contains(key) ? description.at(key) : Json();
  TORCH_CHECK(runs.is_array(), where, key, " is ", runs.dump(), " in the file; must be a list");
  for (const Json& run : runs) {
    TORCH_CHECK(
        run.is_array() && run.size() == 2 && run[0].is_number_unsigned() && (run[1].is_null() || run[1].is_string()),
        where, key, " holds ", run.dump(), " in the file; must be pairs of a number and a name or null");
    const auto count = run[0].get<uint64_t>();
    if (position < count || runs.size() == 1) return run[1].is_null() ? "" : run[1].get<std::string>();
    position -= count;
  }
  return "";
}

/// 16-bit numbers from pairs of bytes, or as they are.
at::Tensor as_16_bits(const std::string& name, const at::Tensor& tensor, at::ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  TORCH_CHECK(tensor.scalar_type() == at::kByte && tensor.dim() > 0 && tensor.sizes().back() == 2, name, " has dtype ",
              tensor.scalar_type(), " and shape ", tensor.sizes(), " in the file; must be Byte [..., 2], or ", dtype);
  return tensor.reshape({-1}).view(dtype).reshape(tensor.sizes().slice(0, static_cast<size_t>(tensor.dim()) - 1));
}

std::vector<int64_t> read_order(const std::string& name, const at::Tensor& order, int64_t dim) {
  std::vector<int64_t> result(static_cast<size_t>(dim));
  TORCH_CHECK(order.scalar_type() == at::kLong && order.dim() == 1 && order.numel() == dim, name, " has dtype ",
              order.scalar_type(), " and shape ", order.sizes(), " in the file; must be Long [", dim, "]");
  std::copy_n(order.const_data_ptr<int64_t>(), dim, result.begin());
  std::vector<int64_t> sorted = result;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t d = 0; d < dim; ++d) {
    TORCH_CHECK(sorted[static_cast<size_t>(d)] == d, name, " is ", at::IntArrayRef(result),
                " in the file; must be 0 to ", dim - 1, " in some order");
  }
  return result;
}

/// A state from the tensors of a parameter, by key.
FlashParamState state_of(const std::string& name, OptimizerKind kind, const at::Tensor& param, Tensors tensors,
                         const std::string& codec, const std::string& dtype) {
  std::set<std::string> read;
  const auto find = [&](const std::string& key) -> const at::Tensor* {
    read.insert(key);
    return tensors.find(key);
  };
  FlashParamState state;
  const at::Tensor* const step = find("step");
  TORCH_CHECK(step != nullptr && step->numel() == 1 && !at::isFloatingType(step->scalar_type()), name,
              ": step is missing from the file, or no whole number");
  state.step = step->item<int64_t>();
  const at::Tensor* const order = find("storage_order");
  std::vector<int64_t> permuted, back;
  if (order != nullptr) {
    permuted = read_order(name + ": storage_order", *order, param.dim());
    back.resize(permuted.size());
    for (size_t i = 0; i < permuted.size(); ++i) back[static_cast<size_t>(permuted[i])] = static_cast<int64_t>(i);
  }
  const auto as_param = [&](const std::string& key, const at::Tensor& array) {
    TORCH_CHECK(array.dim() == param.dim(), name, ": ", key, " has shape ", array.sizes(),
                " in the file; must go with ", param.sizes());
    const at::Tensor result = permuted.empty() ? array : array.permute(back);
    TORCH_CHECK(result.sizes() == param.sizes(), name, ": ", key, " has shape ", array.sizes(),
                " in the file; must go with ", param.sizes());
    return result;
  };
  const at::Tensor none = at::empty({0}, at::kShort);
  for (int k = 0; k < store::slot_count(kind, /*has_momentum=*/true); ++k) {
    const std::string plain = store::array_name(kind, store::Role::kState, k, StateCodec::kFloat32);
    const std::string codes = store::array_name(kind, store::Role::kState, k, StateCodec::kDefault);
    const std::string scale = store::array_name(kind, store::Role::kScale, k, StateCodec::kDefault);
    const at::Tensor *const values = find(plain), *const coded = find(codes), *const scales = find(scale);
    if (values == nullptr && coded == nullptr && k == 0) break;  // SGD without momentum
    TORCH_CHECK((values == nullptr) != (coded == nullptr) && (coded == nullptr) == (scales == nullptr), name, ": ",
                plain, " must be there once in the file, as ", plain, ", or as ", codes, " with ", scale);
    if (values != nullptr) {
      state.states.push_back(as_param(plain, *values));
      state.scales.push_back(none);
      continue;
    }
    state.state_codec = codec == "paper" ? StateCodec::kPaper : StateCodec::kDefault;
    state.states.push_back(as_param(codes, *coded));
    const auto wanted = static_cast<at::ScalarType>(store::scale_dtype(state.state_codec));
    state.scales.push_back(as_16_bits(name + ": " + scale, *scales, wanted).contiguous());
    const std::string scale_name = name + ": " + scale;
    state.rows = in_store([&] {
      const store::TensorInfo info = store::read_tensor(kOp, {scale_name.c_str()}, handle_of(state.scales.back()));
      return store::stored_layout(kOp, scale_name, param.sizes().vec(), permuted, {}, info).rows;
    });
  }
  state.param_dtype = dtype == "float16" ? at::kHalf : dtype == "bfloat16" ? at::kBFloat16 : param.scalar_type();
  state.correction = at::empty({0}, at::kChar);
  if (const at::Tensor* const correction = find("correction")) {
    TORCH_CHECK(state.param_dtype != at::kFloat, name,
                ": correction is in the file of a Float parameter, which has "
                "none, and nothing says which 16-bit dtype it belongs to");
    const bool is_short = correction->scalar_type() != at::kChar;
    state.correction =
        as_param("correction", is_short ? as_16_bits(name + ": correction", *correction, at::kShort) : *correction);
    const bool is_nearest = state.state_codec == StateCodec::kPaper;
    state.master_weights = is_short ? (is_nearest ? MasterWeights::kCorrection16Nearest : MasterWeights::kCorrection16)
                                    : (is_nearest ? MasterWeights::kCorrection8Nearest : MasterWeights::kCorrection8);
  }
  for (const auto& item : tensors) {
    TORCH_CHECK(read.count(item.key()) != 0, name, ": ", item.key(), " of the file is unknown here");
  }
  return state;
}

}  // namespace

void save_safetensors(const std::string& path, const FlashOptimizer& optimizer) {
  const at::NoGradGuard no_grad;
  const OptimizerKind kind = optimizer.kind();
  Safetensors content;
  Json groups = Json::array();
  size_t number = 0;
  for (size_t g = 0; g < optimizer.param_groups().size(); ++g) {
    Json numbers = Json::array();
    std::vector<std::string> codecs, dtypes;
    for (const at::Tensor& param : optimizer.param_groups()[g].params()) {
      const FlashParamState* const state = StateImport::state_of(optimizer, param);
      const bool is_quantized =
          state != nullptr && !state->states.empty() && state->state_codec != StateCodec::kFloat32;
      codecs.push_back(is_quantized ? codec_name(state->state_codec) : "");
      dtypes.push_back(state != nullptr && has_correction(*state) ? dtype_name(state->param_dtype) : "");
      if (state != nullptr) {
        const std::string name = "save_safetensors: " + optimizer.name(param);
        for (const auto& item : tensors_of(name, kind, param, *state)) {
          content.tensors.insert("state." + std::to_string(number) + "." + item.key(), item.value());
        }
      }
      numbers.push_back(number++);
    }
    groups.push_back(group_of(kind, *StateImport::options_of(optimizer, g), numbers, runs_of(codecs), runs_of(dtypes)));
  }
  sort_for_file(&content.tensors);
  const std::string text = groups.dump();
  content.metadata = {{"format", "pt"},
                      {kFormat, std::to_string(kStateFormatVersion)},
                      {kOptimizer, optimizer_name(kind)},
                      {kLibrary, library_version()},
                      {kParamGroups, text},
                      {kChecksum, checksum_of(text, content)}};
  write_safetensors("save_safetensors", path, content);
}

void load_safetensors(const std::string& path, FlashOptimizer& optimizer) {
  const at::NoGradGuard no_grad;
  const std::string where = "load_safetensors: " + path + ": ";
  StateImport into(optimizer, where);
  const OptimizerKind kind = optimizer.kind();
  const Safetensors content = read_safetensors("load_safetensors", path);
  const auto said = [&](const std::string& key) {
    const auto found = content.metadata.find(key);
    TORCH_CHECK(found != content.metadata.end(), where, key,
                " is missing; must be a file that save_safetensors() or Python wrote of an optimizer");
    return found->second;
  };
  TORCH_CHECK(said(kFormat) == std::to_string(kStateFormatVersion), where, kFormat, " = \"", said(kFormat),
              "\"; must be \"", kStateFormatVersion, "\"");
  TORCH_CHECK(said(kOptimizer) == optimizer_name(kind), where, kOptimizer, " = \"", said(kOptimizer), "\"; must be \"",
              optimizer_name(kind), "\"");
  const std::string text = said(kParamGroups);
  TORCH_CHECK(checksum_of(text, content) == said(kChecksum), where,
              "it is not what its checksum says: the file is "
              "damaged, or was changed");
  const Json groups = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  TORCH_CHECK(groups.is_array() && groups.size() == into.groups(), where, kParamGroups, " holds ",
              groups.is_array() ? groups.size() : 0, " groups; must be ", into.groups());

  std::map<std::string, Tensors> states;  // by number
  for (const auto& item : content.tensors) {
    if (item.key() == kPrefix + "weights" || item.key() == kPrefix + "checksums") continue;
    const size_t dot = item.key().find('.', 6);
    TORCH_CHECK(item.key().compare(0, 6, "state.") == 0 && dot != std::string::npos, where, "tensor \"", item.key(),
                "\" is unknown here");
    states[item.key().substr(6, dot - 6)].insert(item.key().substr(dot + 1), item.value());
  }
  size_t count = 0;
  for (size_t g = 0; g < into.groups(); ++g) {
    const std::string group_where = where + "param_groups[" + std::to_string(g) + "].";
    const Json& group = groups[g];
    const Json numbers = group.is_object() && group.contains("params") ? group.at("params") : Json();
    TORCH_CHECK(numbers.is_array() && numbers.size() == into.params(g).size(), group_where, "params is ",
                numbers.dump(), " in the file; must be ", into.params(g).size(), " numbers");
    const Json description = group.contains(description_key(kind)) ? group.at(description_key(kind)) : Json();
    TORCH_CHECK(description.is_object(), group_where, description_key(kind), " is missing from the file");
    read_hyperparameters(group_where, group, kind, &into.options(g), &into.values(g));
    for (size_t i = 0; i < into.params(g).size(); ++i) {
      const auto found = states.find(numbers[i].dump());
      if (found == states.end()) continue;
      const at::Tensor& param = into.params(g)[i];
      const std::string name = group_where + "params[" + std::to_string(i) + "]";
      into.add(g, i,
               state_of(name, kind, param, found->second, at_position(group_where, description, "codecs", i),
                        at_position(group_where, description, "dtypes", i)));
      ++count;
    }
  }
  TORCH_CHECK(count == states.size(), where, "holds ", states.size(), " states, and ", count,
              " of them are parameters' of its groups; must be all");
  into.finish();
}

}  // namespace flashoptim::libtorch
