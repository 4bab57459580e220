// Archives of optimizers. Layout (docs/state_format.md):
//
//   flashoptim_archive_version, state_format_version   ints
//   optimizer                                          "adamw", ...
//   param_groups/{size, 0/{params, options/...}, ...}  params: how many parameters the group has
//   state/{0/{...}, ...}                               by number of the parameter, counted over the groups in order;
//                                                      only parameters that have a state
//
// A state's own key `lies_otherwise` says that it lies in memory otherwise than its parameter did when it was saved.
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <utility>

#include "flashoptim/torch/optimizer.h"
#include "flashoptim/version.h"
#include "libtorch/optim/handles.h"
#include "libtorch/optim/param_state.h"
#include "libtorch/optim/param_store.h"

namespace flashoptim::libtorch {
namespace {

using ::torch::serialize::InputArchive;
using ::torch::serialize::OutputArchive;

constexpr int64_t kArchiveVersion = 1;
constexpr store::Op kOp{"load"};

int64_t read_int(InputArchive& archive, const std::string& key) {
  c10::IValue value;
  archive.read(key, value);
  return value.toInt();
}

/// An archive holds whole storages, and is read on machines without this one's devices: a tensor that shares its own or
/// is not on the host is copied there.
at::Tensor with_own_storage(const at::Tensor& tensor) {
  if (tensor.is_cpu() && tensor.storage().nbytes() <= tensor.nbytes()) return tensor;
  return tensor.to(at::kCPU, /*non_blocking=*/false, /*copy=*/true);
}

at::ScalarType parse_dtype(const std::string& name, const std::string& dtype) {
  for (const at::ScalarType known : {at::kFloat, at::kBFloat16, at::kHalf}) {
    if (dtype == toString(known)) return known;
  }
  TORCH_CHECK(false, name, ": param_dtype = \"", dtype, "\" in the archive; must be Float, BFloat16 or Half");
}

/// The saved tensor must be what its format says, and lie in memory as `strides` do. A copy with them on `device`.
at::Tensor checked(const std::string& name, const at::Tensor& saved, const store::ArraySpec& spec, at::Device device) {
  TORCH_CHECK(dtype_code(saved.scalar_type()) == spec.dtype, name, " was saved with dtype ", saved.scalar_type(),
              "; must be ", static_cast<at::ScalarType>(spec.dtype));
  TORCH_CHECK(saved.sizes() == spec.sizes, name, " was saved with shape ", saved.sizes(), "; must be ",
              at::IntArrayRef(spec.sizes));
  TORCH_CHECK(lies(saved, spec.strides), name, " was saved with strides ", saved.strides(), "; must be ",
              at::IntArrayRef(spec.strides), ", the parameter's");
  return at::empty_strided(spec.sizes, spec.strides, saved.options().device(device)).copy_(saved);
}

/// A state from an archive, checked against what the archive says of its own format.
FlashParamState checked_state(const std::string& name, const at::Tensor& param, OptimizerKind kind,
                              const FlashParamState& saved, bool lies_otherwise) {
  const int64_t master = static_cast<int64_t>(saved.master_weights), codec = static_cast<int64_t>(saved.state_codec);
  TORCH_CHECK(master >= 0 && master <= static_cast<int64_t>(MasterWeights::kCorrection16Nearest), name,
              ": master_weights = ", master, " in the archive; must be 0 to 5");
  TORCH_CHECK(codec >= 0 && codec <= static_cast<int64_t>(StateCodec::kDefault), name, ": state_codec = ", codec,
              " in the archive; must be 0 to 2");
  TORCH_CHECK(saved.step >= 0, name, ": step = ", saved.step, " in the archive; must be at least 0");
  const bool has_momentum = !saved.states.empty();
  const auto slots = static_cast<size_t>(store::slot_count(kind, has_momentum));
  TORCH_CHECK(saved.states.size() == slots && saved.scales.size() == slots, name, ": ", saved.states.size(),
              " states and ", saved.scales.size(), " scales in the archive; must be ",
              store::slot_count(kind, /*has_momentum=*/true));
  const Form form{{saved.master_weights, saved.state_codec}, has_momentum};
  const std::vector<int64_t> strides = lies_otherwise ? strides_of(kind, saved, form, param) : param.strides().vec();
  const store::StorageOrder order =
      store::storage_order(param.sizes().data(), strides.data(), static_cast<int64_t>(strides.size()));

  FlashParamState state = saved;
  const at::Device device = param.device();
  const std::vector<store::ArraySpec> specs =
      store::arrays_of(kind, has_momentum, form.format, param.sizes().vec(), order);
  if (has_correction(saved)) {
    state.correction = checked(name + ": correction", saved.correction, specs.back(), device);
  } else {
    state.correction = saved.correction.to(device);
  }
  for (const store::ArraySpec& spec : specs) {
    if (spec.role == store::Role::kCorrection) continue;
    const auto slot = static_cast<size_t>(spec.slot);
    const std::string number = std::to_string(slot) + "]";
    if (spec.role == store::Role::kState) {
      state.states[slot] = checked(name + ": states[" + number, saved.states[slot], spec, device);
      state.scales[slot] = saved.scales[slot].to(device);
      continue;
    }
    // Of this state format's shape, or of format 1's.
    const std::string scale_name = name + ": scales[" + number;
    const at::Tensor& scale = saved.scales[slot];
    const GroupLayout layout = in_store([&] {
      const store::TensorInfo info = store::read_tensor(kOp, {scale_name.c_str()}, handle_of(scale));
      return store::stored_layout(kOp, scale_name, param.sizes().vec(), order, {}, info);
    });
    TORCH_CHECK(saved.rows == layout.rows, name, ": rows = ", saved.rows, " in the archive; must be ", layout.rows);
    store::ArraySpec as_saved = spec;
    as_saved.sizes = scale.sizes().vec();
    as_saved.strides = store::dense_strides(as_saved.sizes, {});
    state.scales[slot] = checked(scale_name, scale, as_saved, device);
  }
  return state;
}

/// What an archive's state becomes: as it is, or converted to the options of now.
Conversion restored(const std::string& name, const at::Tensor& param, OptimizerKind kind, const FlashOptions& options,
                    FlashParamState saved) {
  const Form form = form_of(options, param);
  if (fit_of(kind, name, saved, param, form) != store::Fit::kNo) {
    return {std::make_unique<FlashParamState>(std::move(saved)), {}, store::CorrectionFate::kKept};
  }
  Conversion converted = convert_state(kind, name, saved, param, form);
  TORCH_CHECK(converted.fate != store::CorrectionFate::kLost, name, " has dtype ", param.scalar_type(),
              " and other values than ", saved.param_dtype, " can hold, or fewer; its correction was saved for ",
              saved.param_dtype, " weights. Must be ", saved.param_dtype,
              ", as when it was saved, or of a dtype that holds the weights of then, which are loaded first");
  warn_of(converted.fate, name, saved, param);
  return converted;
}

}  // namespace

void FlashParamState::serialize(OutputArchive& archive) const {
  archive.write("step", c10::IValue(step));
  archive.write("master_weights", c10::IValue(static_cast<int64_t>(master_weights)));
  archive.write("state_codec", c10::IValue(static_cast<int64_t>(state_codec)));
  archive.write("rows", c10::IValue(rows));
  archive.write("slots", c10::IValue(static_cast<int64_t>(states.size())));
  archive.write("correction", with_own_storage(correction), /*is_buffer=*/true);
  for (size_t k = 0; k < states.size(); ++k) {
    archive.write("states" + std::to_string(k), with_own_storage(states[k]), /*is_buffer=*/true);
    archive.write("scales" + std::to_string(k), with_own_storage(scales[k]), /*is_buffer=*/true);
  }
  // So that a 16-bit correction is not taken for one of the other 16-bit type.
  archive.write("param_dtype", c10::IValue(std::string(toString(param_dtype))));
}

void FlashParamState::serialize(InputArchive& archive) {
  step = read_int(archive, "step");
  master_weights = static_cast<MasterWeights>(read_int(archive, "master_weights"));
  state_codec = static_cast<StateCodec>(read_int(archive, "state_codec"));
  rows = read_int(archive, "rows");
  const int64_t slots = read_int(archive, "slots");
  archive.read("correction", correction, /*is_buffer=*/true);
  states.clear();
  scales.clear();
  for (int64_t k = 0; k < slots; ++k) {
    archive.read("states" + std::to_string(k), states.emplace_back(), /*is_buffer=*/true);
    archive.read("scales" + std::to_string(k), scales.emplace_back(), /*is_buffer=*/true);
  }
  c10::IValue dtype;
  archive.read("param_dtype", dtype);
  param_dtype = parse_dtype("FlashParamState", dtype.toStringRef());
}

void FlashOptimizer::save(OutputArchive& archive) const {
  archive.write("flashoptim_archive_version", c10::IValue(kArchiveVersion));
  archive.write("state_format_version", c10::IValue(static_cast<int64_t>(kStateFormatVersion)));
  archive.write("optimizer", c10::IValue(std::string(optimizer_name(kind_))));
  OutputArchive groups(archive.compilation_unit()), states(archive.compilation_unit());
  groups.write("size", c10::IValue(static_cast<int64_t>(param_groups_.size())));
  size_t number = 0;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    OutputArchive group(archive.compilation_unit()), options(archive.compilation_unit());
    group.write("params", c10::IValue(static_cast<int64_t>(param_groups_[g].params().size())));
    if (is_settled(g)) {
      param_groups_[g].options().serialize(options);
    } else {
      settled_options(group_prefix(g), param_groups_[g])->serialize(options);
    }
    group.write("options", options);
    groups.write(std::to_string(g), group);
    for (const at::Tensor& param : param_groups_[g].params()) {
      if (const FlashParamState* state = find_state(param)) {
        OutputArchive state_archive(archive.compilation_unit());
        state->serialize(state_archive);
        const bool has_momentum = !state->states.empty();
        const Form form{{state->master_weights, state->state_codec}, has_momentum};
        if (!lies(param, strides_of(kind_, *state, form, param))) {
          state_archive.write("lies_otherwise", c10::IValue(true));  // than its parameter
        }
        states.write(std::to_string(number), state_archive);
      }
      ++number;
    }
  }
  archive.write("param_groups", groups);
  archive.write("state", states);
}

void FlashOptimizer::load(InputArchive& archive) {
  const std::string where = std::string(class_name(kind_)) + "::load: ";
  c10::IValue value;
  TORCH_CHECK(archive.try_read("flashoptim_archive_version", value), where,
              "flashoptim_archive_version is missing; must be an archive that a flashoptim optimizer saved");
  TORCH_CHECK(value.toInt() == kArchiveVersion, where, "flashoptim_archive_version = ", value.toInt(), "; must be ",
              kArchiveVersion);
  const int64_t format = read_int(archive, "state_format_version");
  TORCH_CHECK(format >= 1 && format <= kStateFormatVersion, where, "state_format_version = ", format, "; must be 1 to ",
              kStateFormatVersion);
  archive.read("optimizer", value);
  TORCH_CHECK(value.toStringRef() == optimizer_name(kind_), where, "optimizer = \"", value.toStringRef(),
              "\"; must be \"", optimizer_name(kind_), "\"");

  // Read, check and convert all of it first, so that a bad archive changes nothing.
  const at::NoGradGuard no_grad;
  InputArchive groups, states;
  archive.read("param_groups", groups);
  archive.read("state", states);
  const int64_t size = read_int(groups, "size");
  TORCH_CHECK(size == static_cast<int64_t>(param_groups_.size()), where, "the archive has ", size,
              " param_groups; must be ", param_groups_.size());
  std::vector<std::unique_ptr<FlashOptions>> new_options;
  std::vector<std::pair<at::Tensor, Conversion>> new_states;
  size_t number = 0;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    InputArchive group, options_archive;
    groups.read(std::to_string(g), group);
    const int64_t params = read_int(group, "params");
    TORCH_CHECK(params == static_cast<int64_t>(param_groups_[g].params().size()), where, "param_groups[", g, "] has ",
                params, " params in the archive; must be ", param_groups_[g].params().size());
    group.read("options", options_archive);
    auto& options = new_options.emplace_back(static_cast<FlashOptions*>(defaults_->clone().release()));
    options->serialize(options_archive);
    options->check_settled(where + "param_groups[" + std::to_string(g) + "].");
    options->settle();
    for (size_t i = 0; i < param_groups_[g].params().size(); ++i, ++number) {
      InputArchive state_archive;
      if (!states.try_read(std::to_string(number), state_archive)) continue;
      const at::Tensor& param = param_groups_[g].params()[i];
      const std::string name = where + Position{g, i}.str();
      FlashParamState saved;
      saved.serialize(state_archive);
      check_param(name, param);
      const bool lies_otherwise = state_archive.try_read("lies_otherwise", value) && value.toBool();
      new_states.emplace_back(
          param, restored(name, param, kind_, *options, checked_state(name, param, kind_, saved, lies_otherwise)));
    }
  }
  for (size_t g = 0; g < param_groups_.size(); ++g) param_groups_[g].set_options(std::move(new_options[g]));
  state_.clear();
  for (auto& [param, restored] : new_states) {
    if (restored.values.defined()) param.detach().copy_(restored.values);
    restored.state->param_dtype = param.scalar_type();
    state_[param.unsafeGetTensorImpl()] = std::move(restored.state);
  }
  store_->reset();
}

}  // namespace flashoptim::libtorch
