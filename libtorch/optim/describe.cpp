// What an optimizer tells of itself, and its construction from named parameters.
#include <c10/util/Exception.h>
#include <fnmatch.h>
#include <torch/types.h>

#include <algorithm>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <type_traits>
#include <unordered_set>
#include <utility>

#include "flashoptim/optimizer_info.h"
#include "flashoptim/torch/optimizer.h"
#include "libtorch/optim/handles.h"
#include "libtorch/optim/param_state.h"
#include "libtorch/optim/param_store.h"

namespace flashoptim::libtorch {
namespace {

const char* codec_name(StateCodec codec) {
  switch (codec) {
    case StateCodec::kFloat32:
      return "fp32";
    case StateCodec::kPaper:
      return "8-bit paper";
    case StateCodec::kDefault:
      return "8-bit";
  }
  return "";
}

const char* weight_name(MasterWeights master) {
  switch (master) {
    case MasterWeights::kNone:
      return "";
    case MasterWeights::kNoneStochastic:
      return ", rounded at random";
    case MasterWeights::kCorrection8:
      return " + 8";
    case MasterWeights::kCorrection16:
      return " + 16";
    case MasterWeights::kCorrection8Nearest:
      return " + 8, nearest";
    case MasterWeights::kCorrection16Nearest:
      return " + 16, nearest";
  }
  return "";
}

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : dtype == at::kHalf ? "float16" : "bfloat16";
}

/// Of a parameter, its correction and its states.
int64_t bytes_of(OptimizerKind kind, const at::Tensor& param, Form form) {
  auto bytes = static_cast<int64_t>(param.nbytes());
  const std::vector<int64_t> strides = param.strides().vec();
  const store::StorageOrder order = store::storage_order(param.sizes().data(), strides.data(), param.dim());
  for (const store::ArraySpec& spec :
       store::arrays_of(kind, form.has_momentum, form.format, param.sizes().vec(), order)) {
    int64_t numel = 1;
    for (const int64_t size : spec.sizes) numel *= size;
    bytes += numel * static_cast<int64_t>(c10::elementSize(static_cast<at::ScalarType>(spec.dtype)));
  }
  return bytes;
}

template <class T>
std::string text_of(const T& value) {
  std::ostringstream out;
  if constexpr (std::is_same_v<T, Betas>) {
    out << "(" << std::get<0>(value) << ", " << std::get<1>(value) << ")";
  } else if constexpr (std::is_same_v<T, bool>) {
    out << (value ? "true" : "false");
  } else if constexpr (std::is_same_v<T, std::string>) {
    out << '"' << value << '"';
  } else {
    out << value;
  }
  return out.str();
}

std::string differences(const OptionValues& values, const OptionValues& first) {
  std::string result;
  for_each_option([&](int, const char* name, auto member) {
    if (values.*member == first.*member || std::string(name) == "initial_lr") return;
    result += (result.empty() ? "" : ", ") + std::string(name) + "=" + text_of(values.*member);
  });
  return result;
}

std::string with_commas(int64_t number) {
  std::string text = std::to_string(number);
  for (auto at = static_cast<int64_t>(text.size()) - 3; at > 0; at -= 3) text.insert(static_cast<size_t>(at), ",");
  return text;
}

std::string each(int64_t bytes, int64_t elements) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(3)
      << static_cast<double>(bytes) / static_cast<double>(std::max<int64_t>(1, elements));
  return out.str();
}

}  // namespace

// ---- named parameters -----------------------------------------------------------------------------------------------

FlashOptimizer::FlashOptimizer(const NamedParameters& params, std::unique_ptr<FlashOptions> defaults,
                               const PolicyEntries& policy)
    : FlashOptimizer(std::vector<::torch::optim::OptimizerParamGroup>{}, std::move(defaults)) {
  const auto& own = static_cast<const FlashOptions&>(*defaults_);
  const auto fresh = [&] {
    std::unique_ptr<FlashOptions> options(static_cast<FlashOptions*>(own.clone().release()));
    options->set_ = 0;
    options->role_.kind = FlashOptions::Role::kGiven;
    return options;
  };
  for (const auto& [pattern, options] : policy) {
    const auto merged = fresh();
    merged->adopt(*options);
    merged->check(std::string(class_name(kind_)) + ": policy[\"" + pattern + "\"].");
  }
  struct Part {
    std::unique_ptr<FlashOptions> options;
    std::vector<at::Tensor> params;
  };
  std::vector<Part> parts;
  std::vector<bool> used(policy.size(), false);
  std::unordered_set<const void*> seen;
  for (const auto& item : params) {
    // Tied parameters come under each of their names; the first one holds.
    if (item.value().defined() && !seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
    auto options = fresh();
    for (size_t i = 0; i < policy.size(); ++i) {
      if (fnmatch(policy[i].first.c_str(), item.key().c_str(), 0) != 0) continue;
      used[i] = true;
      options->adopt(*policy[i].second);
    }
    auto part =
        std::find_if(parts.begin(), parts.end(), [&](const Part& p) { return p.options->sets_the_same(*options); });
    if (part == parts.end()) part = parts.insert(parts.end(), Part{std::move(options), {}});
    part->params.push_back(item.value());
    if (item.value().defined()) store_->set_name(item.value(), item.key());
  }
  for (Part& part : parts) {
    add_param_group(::torch::optim::OptimizerParamGroup(std::move(part.params), std::move(part.options)));
  }
  for (size_t i = 0; i < policy.size(); ++i) {
    if (!used[i]) {
      TORCH_WARN(class_name(kind_), ": policy[\"", policy[i].first,
                 "\"] matches no parameter: its options apply to "
                 "none");
    }
  }
}

std::string FlashOptimizer::name(const at::Tensor& param) const {
  return store_->label(param, position_of("name", param));
}

// ---- numerics -------------------------------------------------------------------------------------------------------

void FlashOptimizer::check_numerics(bool on) { store_->telemetry().is_on = on; }

NumericsReport FlashOptimizer::numerics_report() const {
  NumericsReport report;
  report.nonfinite_gradients = store_->nonfinite_gradients();
  report.parameters = store_->telemetry().parameters();
  for (const auto& [name, one] : report.parameters) {
    report.sampled_updates += one.examined;
    report.unchanged_weights += one.lost_updates;
    report.floored_codes += one.floored_codes;
    report.saturated_codes += one.saturated_codes;
    report.largest_update_ratio = std::max(report.largest_update_ratio, one.largest_update_ratio);
  }
  return report;
}

void FlashOptimizer::reset_numerics() { store_->reset_numerics(); }

void FlashOptimizer::recompute_param_stats() { store_->telemetry().forget_largest(); }

// ---- the table ------------------------------------------------------------------------------------------------------

OptimizerDescription FlashOptimizer::describe() const {
  OptimizerDescription result;
  std::unique_ptr<FlashOptions> first;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    const std::unique_ptr<FlashOptions> options = settled_options(group_prefix(g), param_groups_[g]);
    if (g == 0) first = settled_options(group_prefix(g), param_groups_[g]);
    const size_t begin = result.size();
    const auto& params = param_groups_[g].params();
    for (size_t i = 0; i < params.size(); ++i) {
      check_param(group_prefix(g) + "params[" + std::to_string(i) + "]", params[i]);
      const Form form = form_of(*options, params[i]);
      const std::string weights =
          std::string(dtype_name(params[i].scalar_type())) + weight_name(form.format.master_weights);
      const std::string states =
          store::slot_count(kind_, form.has_momentum) > 0 ? codec_name(form.format.codec) : "none";
      auto row = std::find_if(result.begin() + static_cast<std::ptrdiff_t>(begin), result.end(),
                              [&](const auto& one) { return one.weights == weights && one.states == states; });
      if (row == result.end()) {
        FormatDescription made;
        made.group = g;
        made.weights = weights;
        made.states = states;
        made.options = differences(options->values(), first->values());
        row = result.insert(result.end(), std::move(made));
      }
      row->parameters.push_back(store_->label(params[i], Position{g, i}));
      row->elements += params[i].numel();
      row->bytes += bytes_of(kind_, params[i], form);
    }
  }
  return result;
}

int64_t OptimizerDescription::bytes() const {
  int64_t sum = 0;
  for (const FormatDescription& row : *this) sum += row.bytes;
  return sum;
}

int64_t OptimizerDescription::elements() const {
  int64_t sum = 0;
  for (const FormatDescription& row : *this) sum += row.elements;
  return sum;
}

std::string OptimizerDescription::str() const {
  std::vector<std::vector<std::string>> lines{
      {"group", "tensors", "elements", "weights", "states", "bytes", "each", "options"}};
  size_t tensors = 0;
  for (const FormatDescription& row : *this) {
    tensors += row.parameters.size();
    lines.push_back({std::to_string(row.group), std::to_string(row.parameters.size()), with_commas(row.elements),
                     row.weights, row.states, with_commas(row.bytes), each(row.bytes, row.elements), row.options});
  }
  lines.push_back({"all", std::to_string(tensors), with_commas(elements()), "", "", with_commas(bytes()),
                   each(bytes(), elements()), ""});
  std::vector<size_t> widths(lines[0].size(), 0);
  for (const auto& line : lines) {
    for (size_t c = 0; c < line.size(); ++c) widths[c] = std::max(widths[c], line[c].size());
  }
  std::string text;
  for (const auto& line : lines) {
    std::string row;
    for (size_t c = 0; c < line.size(); ++c) {
      const std::string blanks(widths[c] - line[c].size(), ' ');
      const bool is_left = c == 3 || c == 4 || c == 7;
      row += (c == 0 ? "" : "  ") + (is_left ? line[c] + blanks : blanks + line[c]);
    }
    row.erase(row.find_last_not_of(' ') + 1);
    text += (text.empty() ? "" : "\n") + row;
  }
  return text;
}

std::ostream& operator<<(std::ostream& out, const OptimizerDescription& description) {
  return out << description.str();
}

}  // namespace flashoptim::libtorch
