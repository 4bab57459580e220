#include "src/rules.h"

#include <cstring>

#include "flashoptim/core/optimizer_list.h"

namespace flashoptim {

using cpu::RuleKind;

RuleKind rule_kind(OptimizerKind optimizer, bool has_momentum) {
  switch (optimizer) {
    case OptimizerKind::kAdamW:
      return RuleKind::kAdamW;
    case OptimizerKind::kAdam:
      return RuleKind::kAdam;
    case OptimizerKind::kSgd:
      return has_momentum ? RuleKind::kSgd : RuleKind::kSgdPlain;
    case OptimizerKind::kSgdw:
      return has_momentum ? RuleKind::kSgdw : RuleKind::kSgdwPlain;
    case OptimizerKind::kLion:
      return RuleKind::kLion;
  }
  return RuleKind::kAdamW;
}

namespace {

template <class Rule>
void store_hyper(const Hyperparameters& p, cpu::HyperStorage* out) {
  const typename Rule::Hyper hyper = Rule::make_hyper(p);
  static_assert(sizeof hyper <= sizeof *out);
  std::memcpy(out, &hyper, sizeof hyper);
}

}  // namespace

void make_hyper(RuleKind rule, const Hyperparameters& p, cpu::HyperStorage* hyper) {
  switch (rule) {
#define FLASHOPTIM_CASE(name) \
  case RuleKind::k##name:     \
    return store_hyper<core::name>(p, hyper);
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
    case RuleKind::kCount:
      break;
  }
}

float largest_update(RuleKind rule, const Hyperparameters& p) {
  switch (rule) {
#define FLASHOPTIM_CASE(name) \
  case RuleKind::k##name:     \
    return static_cast<float>(core::name::largest_update(p));
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
    case RuleKind::kCount:
      break;
  }
  return 0.0f;
}

int state_count(OptimizerKind optimizer, bool has_momentum) {
  switch (rule_kind(optimizer, has_momentum)) {
#define FLASHOPTIM_CASE(name) \
  case RuleKind::k##name:     \
    return core::name::kStateCount;
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
    case RuleKind::kCount:
      break;
  }
  return 0;
}

StateSlotInfo state_slot(OptimizerKind optimizer, int slot) {
  core::StateSlot info;
  switch (rule_kind(optimizer, true)) {
#define FLASHOPTIM_CASE(name)         \
  case RuleKind::k##name:             \
    info = core::name::kStates[slot]; \
    break;
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
    case RuleKind::kCount:
      break;
  }
  return {info.name, info.kind == core::StateKind::kSigned};
}

}  // namespace flashoptim
