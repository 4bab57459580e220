// From the public OptimizerKind to compiled rules: names, slots, and the fp32 hyperparameters of one step.
#pragma once

#include "flashoptim/step.h"
#include "src/cpu/kernels.h"

namespace flashoptim {

/// The rule that an optimizer runs; SGD and SGDW without momentum have no buffer and so a rule of their own.
cpu::RuleKind rule_kind(OptimizerKind optimizer, bool has_momentum);

/// The rule's Hyper for one step, in fp32.
void make_hyper(cpu::RuleKind rule, const Hyperparameters& hyperparameters, cpu::HyperStorage* hyper);

/// What the rule's updates are held against (0: nothing), in fp32.
float largest_update(cpu::RuleKind rule, const Hyperparameters& hyperparameters);

}  // namespace flashoptim
