// Archives of optimizers. Layout (docs/state_format.md):
//
//   flashoptim_archive_version, state_format_version   ints
//   optimizer                                          "adamw", ...
//   param_groups/{size, 0/{params, options/...}, ...}  params: how many parameters the group has
//   state/{0/{...}, ...}                               by number of the parameter, counted over the groups in order;
//                                                      only parameters that have a state
//   checksum                                           of all that is not in a state, and of the states' own checksums
//
// A state's own key `lies_otherwise` says that it lies in memory otherwise than its parameter did when it was saved.
// Version 1 of the archive has no checksums.
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "flashoptim/torch/optimizer.h"
#include "flashoptim/version.h"
#include "libtorch/optim/archive.h"
#include "libtorch/optim/handles.h"
#include "libtorch/optim/param_state.h"
#include "libtorch/optim/param_store.h"

namespace flashoptim::libtorch {
namespace {

using ::torch::serialize::InputArchive;
using ::torch::serialize::OutputArchive;

constexpr int64_t kArchiveVersion = 2;
constexpr store::Op kOp{"load"};
constexpr const char* kChecksum = "checksum";
constexpr const char* kLiesOtherwise = "lies_otherwise";

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
  TORCH_CHECK(false, name, "param_dtype = \"", dtype, "\" in the archive; must be Float, BFloat16 or Half");
}

int64_t checksum_of(const FlashParamState& state) {
  Checksum checksum;
  checksum.add(state);
  return checksum.value();
}

/// The checksum over an archive, taken in the order in which it is written and read.
class ArchiveChecksum {
 public:
  ArchiveChecksum(int64_t format, OptimizerKind kind, size_t groups) {
    checksum_.add(kArchiveVersion);
    checksum_.add(format);
    checksum_.add(std::string(optimizer_name(kind)));
    checksum_.add(static_cast<int64_t>(groups));
  }
  void add_group(size_t params, const FlashOptions& options) {
    checksum_.add(static_cast<int64_t>(params));
    checksum_.add(options);
  }
  void add_state(size_t number, int64_t checksum, bool lies_otherwise) {
    checksum_.add(static_cast<int64_t>(number));
    checksum_.add(checksum);
    checksum_.add(static_cast<int64_t>(lies_otherwise));
  }
  int64_t value() const { return checksum_.value(); }

 private:
  Checksum checksum_;
};

/// Writes a state, as it is on the host; returns its checksum.
int64_t write_state(OutputArchive& archive, const FlashParamState& state) {
  FlashParamState host = state;
  count_on_host(&host);
  host.correction = with_own_storage(state.correction);
  for (size_t k = 0; k < state.states.size(); ++k) {
    host.states[k] = with_own_storage(state.states[k]);
    host.scales[k] = with_own_storage(state.scales[k]);
  }
  archive.write("step", c10::IValue(host.step));
  archive.write("master_weights", c10::IValue(static_cast<int64_t>(host.master_weights)));
  archive.write("state_codec", c10::IValue(static_cast<int64_t>(host.state_codec)));
  archive.write("rows", c10::IValue(host.rows));
  archive.write("slots", c10::IValue(static_cast<int64_t>(host.states.size())));
  archive.write("correction", host.correction, /*is_buffer=*/true);
  for (size_t k = 0; k < host.states.size(); ++k) {
    archive.write("states" + std::to_string(k), host.states[k], /*is_buffer=*/true);
    archive.write("scales" + std::to_string(k), host.scales[k], /*is_buffer=*/true);
  }
  // So that a 16-bit correction is not taken for one of the other 16-bit type.
  archive.write("param_dtype", c10::IValue(std::string(toString(host.param_dtype))));
  const int64_t checksum = checksum_of(host);
  archive.write(kChecksum, c10::IValue(checksum));
  return checksum;
}

/// A state as it stands in an archive, its values not yet looked at; where there is a checksum, they have it.
struct SavedState {
  FlashParamState state;
  bool has_checksum = false;
  int64_t checksum = 0;
};

/// `verify`: whether a checksum must be that of the state.
SavedState read_state(ArchiveReader& reader, bool verify = true) {
  SavedState saved;
  FlashParamState& state = saved.state;
  state.step = reader.read_int("step");
  state.master_weights = reader.read_enumerator("master_weights", MasterWeights::kCorrection16Nearest);
  state.state_codec = reader.read_enumerator("state_codec", StateCodec::kDefault);
  state.rows = reader.read_int("rows");
  const int64_t slots = reader.read_int("slots");
  TORCH_CHECK(slots >= 0 && slots <= kMaxSlots, reader.where(), "slots = ", slots, " in the archive; must be 0 to ",
              kMaxSlots);
  state.correction = reader.read_tensor("correction");
  for (int64_t k = 0; k < slots; ++k) {
    state.states.push_back(reader.read_tensor("states" + std::to_string(k)));
    state.scales.push_back(reader.read_tensor("scales" + std::to_string(k)));
  }
  state.param_dtype = parse_dtype(reader.where(), reader.read_string("param_dtype"));
  saved.has_checksum = reader.has(kChecksum);
  if (!saved.has_checksum) return saved;
  const int64_t written = reader.read_int(kChecksum);
  if (!verify) return saved;
  saved.checksum = checksum_of(state);
  TORCH_CHECK(written == saved.checksum, reader.where(),
              "the state is not what its checksum says: the archive is damaged, or was edited (load_unverified())");
  return saved;
}

/// The saved tensor must be what its format says, and lie in memory as `strides` do. A copy with them on `device`.
at::Tensor checked(const std::string& name, const at::Tensor& saved, const store::ArraySpec& spec, at::Device device) {
  TORCH_CHECK(dtype_code(saved.scalar_type()) == spec.dtype, name, " was saved with dtype ", saved.scalar_type(),
              "; must be ", static_cast<at::ScalarType>(spec.dtype));
  TORCH_CHECK(saved.sizes() == spec.sizes, name, " was saved with shape ", saved.sizes(), "; must be ",
              at::IntArrayRef(spec.sizes));
  TORCH_CHECK(lies(saved, spec.strides), name, " was saved with strides ", saved.strides(), "; must be ",
              at::IntArrayRef(spec.strides), ", those of the state's first array");
  return at::empty_strided(spec.sizes, spec.strides, saved.options().device(device)).copy_(saved);
}

/// Whether the least and the largest value are; either is NaN where any value is. Without temporaries of their size.
bool are_finite(const std::tuple<at::Tensor, at::Tensor>& ends) {
  return std::isfinite(std::get<0>(ends).item<double>()) && std::isfinite(std::get<1>(ends).item<double>());
}

/// Throws unless the decoded values are numbers that a step can go on from. Where a checksum says that they are as
/// saved (`is_as_saved`), float32 may be infinite or NaN: gradients were.
void check_decoded(const std::string& name, OptimizerKind kind, const FlashParamState& state, bool is_as_saved) {
  const auto slots = static_cast<int>(state.states.size());
  store::TensorList values;
  if (state.state_codec == StateCodec::kFloat32) {
    for (int k = 0; k < slots; ++k) {
      const at::Tensor& saved = state.states[static_cast<size_t>(k)];
      const bool is_signed = store::state_dtype(kind, k, StateCodec::kPaper) == dtype_code(at::kChar);
      TORCH_CHECK(is_signed || saved.numel() == 0 || !(saved.min().item<double>() < 0), name, ": states[", k,
                  "] holds a negative number in the archive; must be at least 0, as squares are");
      TORCH_CHECK(is_as_saved || saved.numel() == 0 || are_finite(at::aminmax(saved)), name, ": states[", k,
                  "] holds a number that is infinite or NaN in the archive, and no checksum says that it was saved so; "
                  "must be finite");
    }
    return;
  }
  values = in_store([&] { return store::decode_states(kOp, kind, stored_of(state, slots).arrays, state.state_codec); });
  for (int k = 0; k < slots; ++k) {
    const at::Tensor decoded = take(std::move(values[static_cast<size_t>(k)]));
    TORCH_CHECK(decoded.numel() == 0 || are_finite(at::aminmax(decoded)), name, ": scales[", k,
                "] and its codes stand for a number that is infinite or NaN; no step writes such");
  }
}

}  // namespace

FlashParamState checked_state(const std::string& name, const at::Tensor& param, OptimizerKind kind,
                              const FlashParamState& saved, bool is_as_saved) {
  check_values(name, kind, saved);
  const bool has_momentum = !saved.states.empty();
  const auto slots = static_cast<size_t>(store::slot_count(kind, has_momentum));
  TORCH_CHECK(saved.states.size() == slots && saved.scales.size() == slots, name, ": ", saved.states.size(),
              " states and ", saved.scales.size(), " scales in the archive; must be ",
              store::slot_count(kind, /*has_momentum=*/true));
  const Form form{{saved.master_weights, saved.state_codec}, has_momentum};
  for (const at::Tensor& array : saved.states) {
    TORCH_CHECK(array.sizes() == param.sizes(), name, ": states was saved with shape ", array.sizes(), "; must be ",
                param.sizes());
  }
  TORCH_CHECK(!has_correction(saved) || saved.correction.sizes() == param.sizes(), name,
              ": correction was saved with shape ", saved.correction.sizes(), "; must be ", param.sizes());
  // In the order in which it was saved; restored() sees to the parameter's.
  const std::vector<int64_t> strides = strides_of(kind, saved, form, param);
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
  if (form.format.codec == StateCodec::kFloat32) {
    // By the rule of either state format; 0: of a state that is no archive's.
    const std::vector<int64_t> sizes = param.sizes().vec();
    state.rows = store::layout_of(sizes, order).rows;
    TORCH_CHECK(
        saved.rows == state.rows || saved.rows == 0 || saved.rows == store::format1_layout_of(sizes, order).rows, name,
        ": rows = ", saved.rows, " in the archive; must be ", state.rows);
  }
  check_decoded(name, kind, state, is_as_saved);
  return state;
}

namespace {

/// What an archive's state becomes: as it is, or converted to the options, dtype and order in memory of now. One that
/// lay otherwise than its parameter when it was saved goes on doing so.
ConvertedState restored(const std::string& name, const at::Tensor& param, OptimizerKind kind,
                        const FlashOptions& options, FlashParamState saved, bool lies_otherwise) {
  const Form form = form_of(options, param);
  const store::Fit fit = fit_of(kind, name, saved, param, form);
  if (fit == store::Fit::kYes || (fit == store::Fit::kOwnOrder && lies_otherwise)) {
    return {std::make_unique<FlashParamState>(std::move(saved)), {}, store::CorrectionFate::kKept};
  }
  ConvertedState converted = convert_state(kind, name, saved, param, form);
  TORCH_CHECK(converted.fate != store::CorrectionFate::kLost, name, " has dtype ", param.scalar_type(),
              " and other values than ", saved.param_dtype, " can hold, or fewer; its correction was saved for ",
              saved.param_dtype, " weights. Must be ", saved.param_dtype,
              ", as when it was saved, or of a dtype that holds the weights of then, which are loaded first");
  warn_of(converted.fate, name, saved, param);
  return converted;
}

}  // namespace

void FlashParamState::serialize(OutputArchive& archive) const { write_state(archive, *this); }

void FlashParamState::serialize(InputArchive& archive) {
  ArchiveReader reader(archive, "FlashParamState: ");
  *this = read_state(reader).state;
}

void FlashOptimizer::save(OutputArchive& archive) const {
  archive.write("flashoptim_archive_version", c10::IValue(kArchiveVersion));
  archive.write("state_format_version", c10::IValue(static_cast<int64_t>(kStateFormatVersion)));
  archive.write("optimizer", c10::IValue(std::string(optimizer_name(kind_))));
  ArchiveChecksum checksum(kStateFormatVersion, kind_, param_groups_.size());
  OutputArchive groups(archive.compilation_unit()), states(archive.compilation_unit());
  groups.write("size", c10::IValue(static_cast<int64_t>(param_groups_.size())));
  size_t number = 0;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    const std::vector<at::Tensor>& params = param_groups_[g].params();
    OutputArchive group(archive.compilation_unit()), options(archive.compilation_unit());
    group.write("params", c10::IValue(static_cast<int64_t>(params.size())));
    std::unique_ptr<FlashOptions> made;
    if (!is_settled(g)) made = settled_options(group_prefix(g), param_groups_[g]);
    // What load() would refuse must not be found out when it is needed.
    if (!made) static_cast<const FlashOptions&>(param_groups_[g].options()).check_settled(group_prefix(g));
    if (store_->lr(g).defined()) {
      if (!made) made.reset(static_cast<FlashOptions*>(param_groups_[g].options().clone().release()));
      made->values_.lr = store_->lr(g).item<double>();
    }
    const auto& settled = made ? *made : static_cast<const FlashOptions&>(param_groups_[g].options());
    settled.serialize(options);
    checksum.add_group(params.size(), settled);
    group.write("options", options);
    groups.write(std::to_string(g), group);
    for (const at::Tensor& param : params) {
      if (const FlashParamState* state = find_state(param)) {
        OutputArchive state_archive(archive.compilation_unit());
        const int64_t sum = write_state(state_archive, *state);
        const bool has_momentum = !state->states.empty();
        const Form form{{state->master_weights, state->state_codec}, has_momentum};
        const bool lies_otherwise = !lies(param, strides_of(kind_, *state, form, param));
        if (lies_otherwise) state_archive.write(kLiesOtherwise, c10::IValue(true));  // than its parameter
        checksum.add_state(number, sum, lies_otherwise);
        states.write(std::to_string(number), state_archive);
      }
      ++number;
    }
  }
  archive.write("param_groups", groups);
  archive.write("state", states);
  archive.write(kChecksum, c10::IValue(checksum.value()));
}

void FlashOptimizer::load(InputArchive& archive) { load(archive, /*verify=*/true); }

void FlashOptimizer::load_unverified(InputArchive& archive) { load(archive, /*verify=*/false); }

void FlashOptimizer::load(InputArchive& archive, bool verify) {
  const std::string where = std::string(class_name(kind_)) + (verify ? "::load: " : "::load_unverified: ");
  ArchiveReader top(archive, where);
  TORCH_CHECK(top.has("flashoptim_archive_version"), where,
              "flashoptim_archive_version is missing; must be an archive that a flashoptim optimizer saved");
  const int64_t version = top.read_int("flashoptim_archive_version");
  TORCH_CHECK(version >= 1 && version <= kArchiveVersion, where, "flashoptim_archive_version = ", version,
              "; must be 1 to ", kArchiveVersion);
  const int64_t format = top.read_int("state_format_version");
  TORCH_CHECK(format >= 1 && format <= kStateFormatVersion, where, "state_format_version = ", format, "; must be 1 to ",
              kStateFormatVersion);
  const std::string optimizer = top.read_string("optimizer");
  TORCH_CHECK(optimizer == optimizer_name(kind_), where, "optimizer = \"", optimizer, "\"; must be \"",
              optimizer_name(kind_), "\"");
  const bool has_checksums = version >= 2;

  // Read, check and convert all of it first, so that a bad archive changes nothing.
  const at::NoGradGuard no_grad;
  InputArchive groups_archive, states_archive;
  top.read_archive("param_groups", &groups_archive);
  top.read_archive("state", &states_archive);
  ArchiveReader groups(groups_archive, where + "param_groups."), states(states_archive, where + "state.");
  const int64_t size = groups.read_int("size");
  TORCH_CHECK(size == static_cast<int64_t>(param_groups_.size()), where, "the archive has ", size,
              " param_groups; must be ", param_groups_.size());
  ArchiveChecksum checksum(format, kind_, param_groups_.size());
  std::vector<std::unique_ptr<FlashOptions>> new_options;
  std::vector<std::pair<at::Tensor, ConvertedState>> new_states;
  size_t number = 0;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    const std::vector<at::Tensor>& own = param_groups_[g].params();
    const std::string group_name = where + "param_groups[" + std::to_string(g) + "].";
    InputArchive group_archive, options_archive;
    groups.read_archive(std::to_string(g), &group_archive);
    ArchiveReader group(group_archive, group_name);
    const int64_t params = group.read_int("params");
    TORCH_CHECK(params == static_cast<int64_t>(own.size()), where, "param_groups[", g, "] has ", params,
                " params in the archive; must be ", own.size());
    group.read_archive("options", &options_archive);
    ArchiveReader options_reader(options_archive, group_name);
    auto& options = new_options.emplace_back(static_cast<FlashOptions*>(defaults_->clone().release()));
    options_reader.read_options(options.get());
    if (param_groups_[g].has_options()) {  // capturable is no archive's affair; the group may be one that lost its own
      const auto* const own_options = dynamic_cast<const FlashOptions*>(&param_groups_[g].options());
      if (own_options != nullptr) options->values_.capturable = own_options->values_.capturable;
    }
    checksum.add_group(own.size(), *options);
    options->check_settled(group_name);
    options->settle();
    options_reader.check_all_read();
    group.check_all_read();
    for (size_t i = 0; i < own.size(); ++i, ++number) {
      if (!states.has(std::to_string(number))) continue;
      InputArchive state_archive;
      states.read_archive(std::to_string(number), &state_archive);
      const std::string name = where + Position{g, i}.str();
      ArchiveReader reader(state_archive, name + ": ");
      const SavedState saved = read_state(reader, verify);
      const bool lies_otherwise = reader.has(kLiesOtherwise) && reader.read_bool(kLiesOtherwise);
      TORCH_CHECK(!verify || saved.has_checksum == has_checksums, name, ": checksum is ",
                  has_checksums ? "missing" : "unknown", "; must be there in archives of version 2 and in no others");
      if (has_checksums) checksum.add_state(number, saved.checksum, lies_otherwise);
      reader.check_all_read();
      check_param(name, own[i]);
      FlashParamState checked = checked_state(name, own[i], kind_, saved.state, verify && has_checksums);
      ConvertedState restored_state = restored(name, own[i], kind_, *options, std::move(checked), lies_otherwise);
      new_states.emplace_back(own[i], std::move(restored_state));
    }
  }
  groups.check_all_read();
  states.check_all_read();
  if (verify ? has_checksums : top.has(kChecksum)) {
    const int64_t written = top.read_int(kChecksum);
    TORCH_CHECK(!verify || written == checksum.value(), where,
                "options, or which parameters have states, are not what the checksum says: the archive is damaged, or "
                "was edited (load_unverified())");
  }
  top.check_all_read();
  for (size_t g = 0; g < param_groups_.size(); ++g) param_groups_[g].set_options(std::move(new_options[g]));
  state_.clear();
  for (auto& [param, restored] : new_states) {
    if (restored.values.defined()) param.detach().copy_(restored.values);
    restored.state->param_dtype = param.scalar_type();
    state_[param.unsafeGetTensorImpl()] = std::move(restored.state);
  }
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    if (store_->lr(g).defined()) store_->lr(g).fill_(param_groups_[g].options().get_lr());
  }
  clip_ = at::Tensor();
  store_->reset();
}

}  // namespace flashoptim::libtorch
