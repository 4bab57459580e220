#include "flashoptim/torch/options.h"

#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <vector>

#include "libtorch/optim/param_state.h"

namespace flashoptim::libtorch {
namespace {

OptionValues default_values(OptimizerKind kind) {
  OptionValues values;
  if (kind == OptimizerKind::kAdamW) values.weight_decay = 1e-2;
  if (kind == OptimizerKind::kLion) values.betas = {0.9, 0.99};
  return values;
}

/// A number and its range: finite, at least `lowest`, below `below`.
struct NumberOption {
  const char* name;
  double (*get)(const OptionValues&);
  double lowest, below;

  bool allows(double value) const { return std::isfinite(value) && value >= lowest && value < below; }
  std::string allowed() const {
    std::ostringstream text;
    if (std::isinf(below)) text << "finite";
    if (!std::isinf(lowest)) text << (std::isinf(below) ? " and " : "") << "at least " << lowest;
    if (!std::isinf(below)) text << " and below " << below;
    return text.str();
  }
};

constexpr double kInf = std::numeric_limits<double>::infinity();

constexpr NumberOption kNumberOptions[] = {
    {"lr", [](const OptionValues& v) { return v.lr; }, 0, kInf},
    {"betas[0]", [](const OptionValues& v) { return std::get<0>(v.betas); }, 0, 1},
    {"betas[1]", [](const OptionValues& v) { return std::get<1>(v.betas); }, 0, 1},
    {"eps", [](const OptionValues& v) { return v.eps; }, 0, kInf},
    {"weight_decay", [](const OptionValues& v) { return v.weight_decay; }, 0, kInf},
    {"momentum", [](const OptionValues& v) { return v.momentum; }, 0, kInf},
    {"dampening", [](const OptionValues& v) { return v.dampening; }, -kInf, kInf},
    {"initial_lr", [](const OptionValues& v) { return v.initial_lr; }, 0, kInf},
};

constexpr uint32_t all_options() {
  int count = 0;
  for_each_option([&](int index, const char*, auto) { count = index + 1; });
  return static_cast<uint32_t>((uint64_t{1} << count) - 1);
}

constexpr const char* kSetKey = "explicitly_set";

}  // namespace

FlashOptions::FlashOptions(OptimizerKind kind) : values_(default_values(kind)), kind_(kind) {}

bool FlashOptions::is_set(std::string_view name) const {
  int found = -1;
  for_each_option([&](int index, const char* option, auto) { found = name == option ? index : found; });
  TORCH_CHECK(found >= 0, "FlashOptions::is_set: name = \"", std::string(name), "\"; must be an option's");
  return (set_ >> found & 1) != 0;
}

void FlashOptions::inherit(const FlashOptions& defaults) {
  TORCH_CHECK(defaults.kind_ == kind_, "FlashOptions::inherit: defaults are of another optimizer; must be ",
              class_name(kind_), "Options");
  for_each_option([&](int index, const char*, auto member) {
    if ((set_ >> index & 1) == 0) values_.*member = defaults.values_.*member;
  });
}

void FlashOptions::settle() {
  set_ = all_options();
  role_.kind = Role::kGroup;
}

void FlashOptions::check_settled(const std::string& where) const {
  check(where);
  TORCH_CHECK(!values_.decouple_lr || values_.initial_lr > 0, where,
              "initial_lr = 0; must be above 0 with decouple_lr = true (0 takes the lr of a group when it is added)");
}

bool FlashOptions::has_momentum() const {
  const bool is_sgd = kind_ == OptimizerKind::kSgd || kind_ == OptimizerKind::kSgdw;
  return !is_sgd || values_.momentum != 0;
}

void FlashOptions::check(const std::string& where) const {
  const OptionValues& v = values_;
  const auto need = [&where](bool ok, const char* name, const auto& value, const auto& allowed) {
    TORCH_CHECK(ok, where, name, " = ", value, "; must be ", allowed);
  };
  for (const NumberOption& option : kNumberOptions) {
    const double value = option.get(v);
    need(option.allows(value), option.name, value, option.allowed());
  }
  need(!v.nesterov || v.momentum > 0, "momentum", v.momentum, "above 0 with nesterov = true");
  need(!v.nesterov || v.dampening == 0, "dampening", v.dampening, "0 with nesterov = true");
  need(v.master_weight_bits == 0 || v.master_weight_bits == 24 || v.master_weight_bits == 32, "master_weight_bits",
       v.master_weight_bits, "0, 24 or 32");
  need(v.state_codec == "default" || v.state_codec == "paper", "state_codec", "\"" + v.state_codec + "\"",
       "\"default\" or \"paper\"");
  need(v.min_quantized_numel >= 0, "min_quantized_numel", v.min_quantized_numel, "at least 0");
  need(v.seed >= 0 && v.seed < int64_t{1} << 53, "seed", v.seed, "at least 0 and below 2^53");
}

void FlashOptions::serialize(::torch::serialize::OutputArchive& archive) const {
  for_each_option([&](int, const char* name, auto member) { archive.write(name, c10::IValue(values_.*member)); });
  if (set_ == all_options()) return;  // always so in an optimizer's groups
  c10::List<std::string> names;
  for_each_option([&](int index, const char* name, auto) {
    if ((set_ >> index & 1) != 0) names.push_back(name);
  });
  archive.write(kSetKey, c10::IValue(names));
}

void FlashOptions::serialize(::torch::serialize::InputArchive& archive) {
  for_each_option([&](int, const char* name, auto member) {
    c10::IValue value;
    archive.read(name, value);
    values_.*member = value.to<std::decay_t<decltype(values_.*member)>>();
  });
  set_ = all_options();
  c10::IValue names;
  if (!archive.try_read(kSetKey, names)) return;
  const std::vector<std::string> set = names.to<std::vector<std::string>>();
  for_each_option([&](int index, const char* name, auto) {
    if (std::find(set.begin(), set.end(), name) == set.end()) set_ &= ~(uint32_t{1} << index);
  });
}

}  // namespace flashoptim::libtorch
