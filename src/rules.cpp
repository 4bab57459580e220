#include "src/rules.h"

#include <cstring>
#include <string>

#include "flashoptim/core/optimizer_list.h"

namespace flashoptim {

using cpu::RuleKind;

namespace {

template <core::Rule Rule>
constexpr RuleInfo describe(RuleKind rule) {
  static_assert(sizeof(typename Rule::Hyper) <= sizeof(cpu::HyperStorage));
  return {rule,
          Rule::kKind,
          core::kIsWithoutMomentum<Rule>,
          Rule::kName,
          Rule::kTitle,
          Rule::kHyperparameters.fields,
          Rule::kHyperparameters.kCount,
          Rule::kSlots,
          Rule::kSlotCount,
          [](const Hyperparameters& p, cpu::HyperStorage* out) {
            const typename Rule::Hyper hyper = Rule::make_hyper(p);
            std::memcpy(out, &hyper, sizeof hyper);
          },
          [](const Hyperparameters& p) { return Rule::largest_update(p); }};
}

constexpr RuleInfo kRules[] = {
#define FLASHOPTIM_ENTRY(name) describe<core::name>(RuleKind::k##name),
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_ENTRY)
#undef FLASHOPTIM_ENTRY
};

constexpr const RuleInfo* find(OptimizerKind optimizer, bool has_momentum) {
  const RuleInfo* found = nullptr;
  for (const RuleInfo& rule : kRules) {
    // A rule without momentum is only the one for that; another is for both where there is no such.
    if (rule.optimizer == optimizer && (found == nullptr || rule.without_momentum == !has_momentum)) found = &rule;
  }
  return found;
}

/// Every optimizer has one rule, or one with momentum and one without, which say the same of names and numbers.
constexpr bool are_rules_consistent() {
  for (const RuleInfo& a : kRules) {
    const RuleInfo* with = find(a.optimizer, true);
    if (with->without_momentum || with->hyperparameter_count != a.hyperparameter_count) return false;
    for (const RuleInfo& b : kRules) {
      if (&a != &b && a.optimizer == b.optimizer && a.without_momentum == b.without_momentum) return false;
    }
  }
  return true;
}
static_assert(are_rules_consistent());

}  // namespace

const RuleInfo& rule_info(RuleKind rule) { return kRules[static_cast<int>(rule)]; }
const RuleInfo* find_rule(OptimizerKind optimizer, bool has_momentum) { return find(optimizer, has_momentum); }

RuleKind rule_kind(OptimizerKind optimizer, bool has_momentum) { return find(optimizer, has_momentum)->rule; }

Status check_hyperparameter_set(OptimizerKind optimizer, const Hyperparameters& p, int64_t index) {
  Status status = check_hyperparameters(optimizer, p);
  if (status.is_ok()) return status;
  return Status::invalid_argument("hypers[" + std::to_string(index) + "]." + status.message());
}

void make_hyper(RuleKind rule, const Hyperparameters& p, cpu::HyperStorage* hyper) {
  rule_info(rule).make_hyper(p, hyper);
}

float largest_update(RuleKind rule, const Hyperparameters& p) {
  return static_cast<float>(rule_info(rule).largest_update(p));
}

}  // namespace flashoptim
