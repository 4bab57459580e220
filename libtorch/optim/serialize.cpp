// Archives of optimizers. Layout (docs/state_format.md):
//
//   flashoptim_archive_version, state_format_version   ints
//   optimizer                                          "adamw", ...
//   param_groups/{size, 0/{params, options/...}, ...}  params: how many parameters the group has
//   state/{0/{...}, ...}                               by number of the parameter, counted over the groups in order;
//                                                      only parameters that have a state
#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <utility>

#include "flashoptim/torch/optimizer.h"
#include "flashoptim/version.h"
#include "libtorch/optim/operators.h"
#include "libtorch/optim/param_state.h"

namespace flashoptim::libtorch {
namespace {

using ::torch::serialize::InputArchive;
using ::torch::serialize::OutputArchive;

constexpr int64_t kArchiveVersion = 1;

int64_t read_int(InputArchive& archive, const std::string& key) {
  c10::IValue value;
  archive.read(key, value);
  return value.toInt();
}

/// An archive holds whole storages: a tensor that shares its own is copied, to the host.
at::Tensor with_own_storage(const at::Tensor& tensor) {
  if (tensor.storage().nbytes() <= tensor.nbytes()) return tensor;
  return tensor.to(at::kCPU, /*non_blocking=*/false, /*copy=*/true);
}

/// The saved tensor must be what a new state would have in its place.
void check_saved(const std::string& name, const at::Tensor& saved, const at::Tensor& expected) {
  TORCH_CHECK(saved.scalar_type() == expected.scalar_type(), name, " was saved with dtype ", saved.scalar_type(),
              "; must be ", expected.scalar_type());
  TORCH_CHECK(saved.sizes() == expected.sizes(), name, " was saved with shape ", saved.sizes(), "; must be ",
              expected.sizes());
  TORCH_CHECK(same_element_order(saved, expected), name, " was saved with strides ", saved.strides(), "; must be ",
              expected.strides(), ", the parameter's");
}

/// Copies a saved state into a new one of the parameter's device and strides, or throws.
std::unique_ptr<FlashParamState> restore_state(const std::string& name, const at::Tensor& param, OptimizerKind kind,
                                               const FlashParamState& saved) {
  check_param(name, param);
  const int64_t master = static_cast<int64_t>(saved.master_weights), codec = static_cast<int64_t>(saved.state_codec);
  TORCH_CHECK(master >= 0 && master <= static_cast<int64_t>(MasterWeights::kCorrection16Nearest), name,
              ": master_weights = ", master, " in the archive; must be 0 to 5");
  TORCH_CHECK(codec >= 0 && codec <= static_cast<int64_t>(StateCodec::kDefault), name, ": state_codec = ", codec,
              " in the archive; must be 0 to 2");
  TORCH_CHECK(saved.step >= 0, name, ": step = ", saved.step, " in the archive; must be at least 0");
  Zeros zeros;
  auto state = make_state(param, kind, !saved.states.empty(), saved.master_weights, saved.state_codec, &zeros);
  zeros.make();
  state->step = saved.step;
  TORCH_CHECK(saved.rows == state->rows, name, ": rows = ", saved.rows, " in the archive; must be ", state->rows);
  TORCH_CHECK(saved.states.size() == state->states.size() && saved.scales.size() == state->scales.size(), name, ": ",
              saved.states.size(), " states and ", saved.scales.size(), " scales in the archive; must be ",
              state->states.size());
  check_saved(name + ": correction", saved.correction, state->correction);
  state->correction.copy_(saved.correction);
  for (size_t k = 0; k < state->states.size(); ++k) {
    const std::string index = std::to_string(k);
    check_saved(name + ": states[" + index + "]", saved.states[k], state->states[k]);
    check_saved(name + ": scales[" + index + "]", saved.scales[k], state->scales[k]);
    state->states[k].copy_(saved.states[k]);
    state->scales[k].copy_(saved.scales[k]);
  }
  return state;
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
}

void FlashOptimizer::save(OutputArchive& archive) const {
  archive.write("flashoptim_archive_version", c10::IValue(kArchiveVersion));
  archive.write("state_format_version", c10::IValue(static_cast<int64_t>(kStateFormatVersion)));
  archive.write("optimizer", c10::IValue(std::string(operators::name_of(kind_))));
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
        // So that a 16-bit correction is not taken for one of the other 16-bit type.
        state_archive.write("param_dtype", c10::IValue(std::string(toString(param.scalar_type()))));
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
  TORCH_CHECK(format == kStateFormatVersion, where, "state_format_version = ", format, "; must be ",
              kStateFormatVersion);
  archive.read("optimizer", value);
  TORCH_CHECK(value.toStringRef() == operators::name_of(kind_), where, "optimizer = \"", value.toStringRef(),
              "\"; must be \"", operators::name_of(kind_), "\"");

  // Read and check all of it first, so that a bad archive changes nothing.
  InputArchive groups, states;
  archive.read("param_groups", groups);
  archive.read("state", states);
  const int64_t size = read_int(groups, "size");
  TORCH_CHECK(size == static_cast<int64_t>(param_groups_.size()), where, "the archive has ", size,
              " param_groups; must be ", param_groups_.size());
  std::vector<std::unique_ptr<FlashOptions>> new_options;
  std::vector<std::pair<void*, std::unique_ptr<FlashParamState>>> new_states;
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
      const std::string name = where + Place{g, i}.str();
      FlashParamState saved;
      saved.serialize(state_archive);
      state_archive.read("param_dtype", value);
      TORCH_CHECK(value.toStringRef() == toString(param.scalar_type()), name, " has dtype ", param.scalar_type(),
                  "; must be ", value.toStringRef(), ", as when it was saved");
      new_states.emplace_back(param.unsafeGetTensorImpl(), restore_state(name, param, kind_, saved));
    }
  }
  for (size_t g = 0; g < param_groups_.size(); ++g) param_groups_[g].set_options(std::move(new_options[g]));
  state_.clear();
  for (auto& [key, state] : new_states) state_[key] = std::move(state);
}

}  // namespace flashoptim::libtorch
