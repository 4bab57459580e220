#include "flashoptim/torch/options.h"

#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <type_traits>
#include <vector>

#include "flashoptim/optimizer_info.h"
#include "libtorch/optim/archive.h"
#include "libtorch/optim/param_state.h"

namespace flashoptim::libtorch {
namespace {

/// Calls f(value, its name in messages, the option's index) with what the rule calls `name`, where there is an option
/// for it.
template <class Values, class F>
void with_number(Values& values, std::string_view name, F&& f) {
  if (name == "beta1") return f(std::get<0>(values.betas), "betas[0]", option_index("betas"));
  if (name == "beta2") return f(std::get<1>(values.betas), "betas[1]", option_index("betas"));
  for_each_option([&](int index, const char* option, auto member) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(values.*member)>>) {
      if (name == option) f(values.*member, option, index);
    }
  });
}

template <class T>
void assign(T& value, double number) {
  value = static_cast<T>(number);
}

/// Whether a T can be `number`, a whole one as a double can say it.
template <class T>
bool holds(double number) {
  if constexpr (std::is_same_v<T, bool>) return number == 0 || number == 1;
  if constexpr (std::is_same_v<T, int64_t>) return std::trunc(number) == number && std::abs(number) < 0x1p63;
  return true;
}

OptionValues default_values(OptimizerKind kind) {
  OptionValues values;
  for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
    const HyperparameterInfo info = hyperparameter(kind, i);
    with_number(values, info.name, [&info](auto& value, auto...) { assign(value, info.default_value); });
  }
  return values;
}

/// What a rule allows, in a LibTorch user's words.
std::string allowed(const HyperparameterInfo& info) {
  const bool has_lowest = std::isfinite(info.lowest);
  const bool has_highest = std::isfinite(info.highest) && info.kind == HyperparameterKind::kNumber;
  std::ostringstream text;
  if (!std::isfinite(info.highest)) text << "finite";
  if (has_lowest && !std::isfinite(info.highest)) text << " and ";
  if (has_lowest) text << (info.lowest_allowed ? "at least " : "above ") << info.lowest;
  if (has_lowest && has_highest) text << " and ";
  if (has_highest) text << (info.highest_allowed ? "at most " : "below ") << info.highest;
  return text.str();
}

/// Archives have the options up to here of every optimizer; of those behind, the ones that the optimizer's rule reads.
constexpr int kOptionsOfAll = option_index("seed") + 1;

bool reads(OptimizerKind kind, std::string_view name) {
  for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
    if (name == hyperparameter(kind, i).name) return true;
  }
  return false;
}

/// Whether the Options of `kind` show an option that archives of all have.
bool shows(OptimizerKind kind, std::string_view name) {
  for (const char* rules : {"momentum", "dampening", "nesterov", "eps"}) {
    if (name == rules) return reads(kind, name);
  }
  if (name == "betas") return reads(kind, "beta1");
  return name != "decouple_lr" || (kind != OptimizerKind::kAdam && kind != OptimizerKind::kSgd);
}

constexpr uint32_t all_options() {
  int count = 0;
  for_each_option([&](int index, const char*, auto) { count = index + 1; });
  return static_cast<uint32_t>((uint64_t{1} << count) - 1);
}

constexpr const char* kSetKey = "explicitly_set";

}  // namespace

bool is_archived(OptimizerKind kind, int index, std::string_view name) {
  return index < kOptionsOfAll || reads(kind, name);
}

Hyperparameters hyperparameters_of(OptimizerKind kind, const OptionValues& values) {
  Hyperparameters hyper = default_hyperparameters(kind);
  for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
    with_number(values, hyperparameter(kind, i).name, [&](auto value, auto...) {
      (void)set_hyperparameter(kind, i, static_cast<double>(value), &hyper);  // check() has said what is wrong
    });
  }
  hyper.decay_lr = values.decouple_lr ? values.initial_lr : 0.0;
  return hyper;
}

FlashOptions::FlashOptions(OptimizerKind kind) : values_(default_values(kind)), kind_(kind) {}

double FlashOptions::number(std::string_view name) const {
  double number = 0.0;
  bool found = false;
  with_number(values_, name, [&](auto value, auto...) {
    number = static_cast<double>(value);
    found = true;
  });
  TORCH_CHECK(found && reads(kind_, name), "FlashOptions::number: name = \"", std::string(name), "\"; must be what ",
              class_name(kind_), " reads");
  return number;
}

void FlashOptions::set_number(std::string_view name, double value) {
  (void)number(name);
  with_number(values_, name, [&](auto& option, const char*, int index) {
    using Value = std::decay_t<decltype(option)>;
    TORCH_CHECK(holds<Value>(value), "FlashOptions::set_number: ", std::string(name), " = ", value, "; must be ",
                std::is_same_v<Value, bool> ? "0 or 1" : "a whole number below 2^63");
    assign(option, value);
    set_ |= uint32_t{1} << index;
  });
}

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

void FlashOptions::adopt(const FlashOptions& other) {
  TORCH_CHECK(other.kind_ == kind_, "FlashOptions::adopt: other is another optimizer's; must be ", class_name(kind_),
              "Options");
  for_each_option([&](int index, const char*, auto member) {
    if ((other.set_ >> index & 1) != 0) values_.*member = other.values_.*member;
  });
  set_ |= other.set_;
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
  return values_.momentum != 0 || state_count(kind_, false) == state_count(kind_, true);
}

void FlashOptions::check(const std::string& where) const {
  const OptionValues& v = values_;
  const auto need = [&where](bool ok, const char* name, const auto& value, const auto& allowed) {
    TORCH_CHECK(ok, where, name, " = ", value, "; must be ", allowed);
  };
  // Of what the Options do not show an archive alone can hold other values.
  const OptionValues defaults = default_values(kind_);
  for_each_option([&](int index, const char* name, auto member) {
    if (index >= kOptionsOfAll || shows(kind_, name)) return;
    TORCH_CHECK(v.*member == defaults.*member, where, name, " is not its default; ", class_name(kind_),
                " has no such option");
  });
  for (int64_t i = 0; i < hyperparameter_count(kind_); ++i) {
    const HyperparameterInfo info = hyperparameter(kind_, i);
    if (i == kSeedIndex || info.kind == HyperparameterKind::kFlag) continue;
    with_number(v, info.name, [&](auto value, const char* name, int) {
      Hyperparameters unused;
      need(set_hyperparameter(kind_, i, static_cast<double>(value), &unused).is_ok(), name, value, allowed(info));
    });
  }
  need(std::isfinite(v.initial_lr) && v.initial_lr >= 0, "initial_lr", v.initial_lr, "finite and at least 0");
  need(!v.nesterov || v.momentum > 0, "momentum", v.momentum, "above 0 with nesterov = true");
  need(!v.nesterov || v.dampening == 0, "dampening", v.dampening, "0 with nesterov = true");
  need(v.master_weight_bits == 0 || v.master_weight_bits == 24 || v.master_weight_bits == 32, "master_weight_bits",
       v.master_weight_bits, "0, 24 or 32");
  need(!v.stochastic_rounding || v.master_weight_bits == 0, "master_weight_bits", v.master_weight_bits,
       "0 with stochastic_rounding = true (corrections of the default codec are rounded without bias anyway)");
  need(v.state_codec == "default" || v.state_codec == "paper", "state_codec", "\"" + v.state_codec + "\"",
       "\"default\" or \"paper\"");
  need(v.min_quantized_numel >= 0, "min_quantized_numel", v.min_quantized_numel, "at least 0");
  need(v.seed >= 0 && v.seed < int64_t{1} << 53, "seed", v.seed, "at least 0 and below 2^53");
}

void FlashOptions::serialize(::torch::serialize::OutputArchive& archive) const {
  for_each_option([&](int index, const char* name, auto member) {
    if (is_archived(kind_, index, name)) archive.write(name, c10::IValue(values_.*member));
  });
  if (set_ == all_options()) return;  // always so in an optimizer's groups
  c10::List<std::string> names;
  for_each_option([&](int index, const char* name, auto) {
    if ((set_ >> index & 1) != 0) names.push_back(name);
  });
  archive.write(kSetKey, c10::IValue(names));
}

void FlashOptions::serialize(::torch::serialize::InputArchive& archive) {
  ArchiveReader(archive, class_name(kind_) + "Options: ").check_options(kind_);  // before the first is taken
  for_each_option([&](int index, const char* name, auto member) {
    if (!is_archived(kind_, index, name)) return;
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
