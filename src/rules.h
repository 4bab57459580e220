// From the public OptimizerKind to compiled rules, one entry of a table for each: what optimizer_info.h tells comes
// from it, and the fp32 hyperparameters of one step.
#pragma once

#include "flashoptim/core/optimizers/rule.h"
#include "flashoptim/step.h"
#include "src/cpu/kernels.h"

namespace flashoptim {

/// A rule's description, without its type.
struct RuleInfo {
  cpu::RuleKind rule;
  OptimizerKind optimizer;
  bool without_momentum;
  const char* name;   ///< the optimizer's
  const char* title;  ///< the same, as people write it
  const core::HyperparameterField* hyperparameters;
  int hyperparameter_count;
  const core::StateSlot* slots;
  int slot_count;
  void (*make_hyper)(const Hyperparameters&, cpu::HyperStorage*);
  double (*largest_update)(const Hyperparameters&);
};

const RuleInfo& rule_info(cpu::RuleKind rule);
/// The rule that an optimizer runs; SGD and SGDW without momentum have no buffer and so a rule of their own. Null where
/// a number is no OptimizerKind.
const RuleInfo* find_rule(OptimizerKind optimizer, bool has_momentum);

/// Of an OptimizerKind that is one.
cpu::RuleKind rule_kind(OptimizerKind optimizer, bool has_momentum);

/// check_hyperparameters() of set `index` of a step, which the message names. What every Plan::step calls, on every
/// device.
Status check_hyperparameter_set(OptimizerKind optimizer, const Hyperparameters& hyperparameters, int64_t index);

/// The rule's Hyper for one step, in fp32.
void make_hyper(cpu::RuleKind rule, const Hyperparameters& hyperparameters, cpu::HyperStorage* hyper);

/// What the rule's updates are held against (0: nothing), in fp32.
float largest_update(cpu::RuleKind rule, const Hyperparameters& hyperparameters);

}  // namespace flashoptim
