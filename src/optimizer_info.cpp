#include "flashoptim/optimizer_info.h"

#include <cmath>
#include <string>

#include "src/checks.h"
#include "src/rules.h"
#include "src/text.h"

namespace flashoptim {
namespace {

using core::HyperparameterField;
using core::value_of;

const HyperparameterField* find_field(OptimizerKind optimizer, int64_t index) {
  const RuleInfo* rule = find_rule(optimizer, true);
  if (rule == nullptr || index < 0 || index >= rule->hyperparameter_count) return nullptr;
  return rule->hyperparameters + index;
}

bool is_in_range(const HyperparameterInfo& info, double value) {
  const bool above = info.lowest_allowed ? value >= info.lowest : value > info.lowest;
  const bool below = info.highest_allowed ? value <= info.highest : value < info.highest;
  return above && below;
}

std::string text_of(const HyperparameterField& field, const Hyperparameters& p) {
  if (field.whole != nullptr) return std::to_string(p.*field.whole);
  if (field.seed != nullptr) return std::to_string(p.*field.seed);
  return number_text(value_of(field, p));
}

Status not_allowed(const HyperparameterInfo& info, const std::string& value) {
  return Status::invalid_argument(std::string(info.name) + " = " + value + "; allowed is " + allowed_values(info));
}

}  // namespace

int64_t optimizer_count() {
  int64_t count = 0;
  while (find_rule(static_cast<OptimizerKind>(count), true) != nullptr) ++count;
  return count;
}

OptimizerKind optimizer_at(int64_t index) {
  return static_cast<OptimizerKind>(index >= 0 && index < optimizer_count() ? index : -1);
}

const char* optimizer_name(OptimizerKind optimizer) {
  const RuleInfo* rule = find_rule(optimizer, true);
  return rule == nullptr ? "" : rule->name;
}

const char* optimizer_title(OptimizerKind optimizer) {
  const RuleInfo* rule = find_rule(optimizer, true);
  return rule == nullptr ? "" : rule->title;
}

Status find_optimizer(const char* name, OptimizerKind* optimizer) {
  return guarded([&] {
    if (name == nullptr || optimizer == nullptr) {
      return Status::invalid_argument(std::string(name == nullptr ? "name" : "optimizer") + " is null");
    }
    const Status status = check_aligned(optimizer, "optimizer");
    if (!status.is_ok()) return status;
    std::string names;
    for (int64_t i = 0; i < optimizer_count(); ++i) {
      const char* const known = optimizer_name(optimizer_at(i));
      if (std::string(name) == known) {
        *optimizer = optimizer_at(i);
        return Status::ok();
      }
      names += (i == 0 ? "" : ", ") + std::string(known);
    }
    return Status::invalid_argument("optimizer = '" + std::string(name) + "'; allowed are " + names);
  });
}

Status check_optimizer(OptimizerKind optimizer) {
  if (find_rule(optimizer, true) != nullptr) return Status::ok();
  return guarded([&] {
    std::string names;
    for (int64_t i = 0; i < optimizer_count(); ++i) {
      names += (i == 0 ? "" : ", ") + std::to_string(i) + " (" + optimizer_name(optimizer_at(i)) + ")";
    }
    return Status::invalid_argument("optimizer = " + std::to_string(static_cast<int64_t>(optimizer)) +
                                    " is no OptimizerKind; allowed are " + names);
  });
}

int64_t hyperparameter_count(OptimizerKind optimizer) {
  const RuleInfo* rule = find_rule(optimizer, true);
  return rule == nullptr ? 0 : rule->hyperparameter_count;
}

HyperparameterInfo hyperparameter(OptimizerKind optimizer, int64_t index) {
  const HyperparameterField* field = find_field(optimizer, index);
  return field == nullptr ? HyperparameterInfo{} : static_cast<const HyperparameterInfo&>(*field);
}

Hyperparameters default_hyperparameters(OptimizerKind optimizer) {
  Hyperparameters p;
  for (int64_t i = 0; i < hyperparameter_count(optimizer); ++i) {
    const HyperparameterField& field = *find_field(optimizer, i);
    core::assign(field, field.default_value, &p);
  }
  return p;
}

double get_hyperparameter(OptimizerKind optimizer, int64_t index, const Hyperparameters& p) {
  const HyperparameterField* field = find_field(optimizer, index);
  return field == nullptr ? 0.0 : value_of(*field, p);
}

Status set_hyperparameter(OptimizerKind optimizer, int64_t index, double value, Hyperparameters* p) {
  return guarded([&] {
    const HyperparameterField* field = find_field(optimizer, index);
    if (p == nullptr) return Status::invalid_argument("hyperparameters is null");
    Status status = check_aligned(p, "hyperparameters");
    if (status.is_ok()) status = check_optimizer(optimizer);
    if (!status.is_ok()) return status;
    if (field == nullptr) {
      return Status::invalid_argument("index = " + std::to_string(index) + "; " + optimizer_name(optimizer) + " has " +
                                      std::to_string(hyperparameter_count(optimizer)) + " hyperparameters");
    }
    const bool is_whole = field->kind == HyperparameterKind::kNumber || value == std::floor(value);
    if (!is_whole || !is_in_range(*field, value)) return not_allowed(*field, number_text(value));
    core::assign(*field, value, p);
    return status;
  });
}

Status check_hyperparameters(OptimizerKind optimizer, const Hyperparameters& p) {
  const RuleInfo* rule = find_rule(optimizer, true);
  if (rule == nullptr) return check_optimizer(optimizer);
  return guarded([&] {
    for (int i = 0; i < rule->hyperparameter_count; ++i) {
      const HyperparameterField& field = rule->hyperparameters[i];
      // What bounds whole numbers from above is what doubles can say, and here they are none.
      const bool ok = field.kind == HyperparameterKind::kWhole ? value_of(field, p) >= field.lowest
                                                               : is_in_range(field, value_of(field, p));
      if (!ok) return not_allowed(field, text_of(field, p));
    }
    return Status::ok();
  });
}

std::string allowed_values(const HyperparameterInfo& info) {
  if (info.kind == HyperparameterKind::kFlag) return "0 or 1";
  const std::string what = info.kind == HyperparameterKind::kWhole ? "a whole number" : "a finite number";
  const bool has_lowest = std::isfinite(info.lowest), has_highest = std::isfinite(info.highest);
  const std::string lowest = number_text(info.lowest), highest = number_text(info.highest);
  if (info.kind == HyperparameterKind::kWhole) return what + " of at least " + lowest + " and below 2^53";
  if (has_lowest && has_highest) {
    return lowest + (info.lowest_allowed ? " <= " : " < ") + info.name + (info.highest_allowed ? " <= " : " < ") +
           highest;
  }
  if (has_lowest) return what + (info.lowest_allowed ? " of at least " : " above ") + lowest;
  if (has_highest) return what + (info.highest_allowed ? " of at most " : " below ") + highest;
  return what;
}

bool holds_momentum(OptimizerKind optimizer, const Hyperparameters& p) {
  return state_count(optimizer, false) == state_count(optimizer, true) || p.momentum != 0.0;
}

int state_count(OptimizerKind optimizer, bool has_momentum) {
  const RuleInfo* rule = find_rule(optimizer, has_momentum);
  return rule == nullptr ? 0 : rule->slot_count;
}

StateSlotInfo state_slot(OptimizerKind optimizer, int slot) {
  const RuleInfo* rule = find_rule(optimizer, true);
  if (rule == nullptr || slot < 0 || slot >= rule->slot_count) return {};
  const core::StateSlot& info = rule->slots[slot];
  return {info.name, info.kind == core::StateKind::kSigned, info.relative_to, info.mantissa_bits, info.is_slow};
}

}  // namespace flashoptim
