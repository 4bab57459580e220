// What an optimizer is called, which numbers it reads and what it keeps, as its rule says it (core/optimizers): for
// front ends, checks, tables and tests. Needs no instance of anything.
//
// Hyperparameters are numbered. The first six are every optimizer's, in this order:
//
//   0 lr   1 weight_decay   2 decay_lr   3 maximize   4 step   5 seed
//
// and the rule's own follow in the order in which its header lists them (AdamW: beta1, beta2, eps). A set of numbers
// that travels as doubles (the operators' `hypers`) has hyperparameter_count() of them in that order.
#pragma once

#include <cstdint>
#include <string>

#include "flashoptim/types.h"

namespace flashoptim {

enum class HyperparameterKind : int32_t {
  kNumber = 0,
  kFlag = 1,   ///< 0 or 1
  kWhole = 2,  ///< a whole number; as a double below 2^53, from where on a double skips some
};

/// One field of Hyperparameters, as an optimizer uses it.
struct HyperparameterInfo {
  const char* name = "";  ///< the field's
  HyperparameterKind kind = HyperparameterKind::kNumber;
  double default_value = 0.0;  ///< torch.optim's where it has the optimizer
  /// Allowed are numbers between these, and the ends where the flags say so; an infinite end means finite numbers.
  double lowest = 0.0, highest = 0.0;
  bool lowest_allowed = true, highest_allowed = false;
};

inline constexpr int64_t kLrIndex = 0, kWeightDecayIndex = 1, kDecayLrIndex = 2, kMaximizeIndex = 3, kStepIndex = 4,
                         kSeedIndex = 5, kCommonHyperparameters = 6;

// An OptimizerKind that is none of them has no name, no hyperparameters and no slots; an index out of range gives an
// info without a name.

int64_t optimizer_count();
/// The optimizers by number, 0 ... optimizer_count() - 1; another number gives an OptimizerKind that is none.
OptimizerKind optimizer_at(int64_t index);
/// "adamw": what operators, archives and options of programs call it.
const char* optimizer_name(OptimizerKind optimizer);
/// "AdamW": what people call it; the front ends' classes are FlashAdamW and so on.
const char* optimizer_title(OptimizerKind optimizer);
/// kInvalidArgument with the name and those there are; *optimizer is unchanged then.
Status find_optimizer(const char* name, OptimizerKind* optimizer);
/// kInvalidArgument where a number is no OptimizerKind.
Status check_optimizer(OptimizerKind optimizer);

int64_t hyperparameter_count(OptimizerKind optimizer);
HyperparameterInfo hyperparameter(OptimizerKind optimizer, int64_t index);
/// All at their defaults; the first step, seed 0.
Hyperparameters default_hyperparameters(OptimizerKind optimizer);
/// Field `index` as a double; 0 where there is none.
double get_hyperparameter(OptimizerKind optimizer, int64_t index, const Hyperparameters& hyperparameters);
/// Sets field `index`. kInvalidArgument, and nothing changed, where the value is not allowed: the message says name,
/// value and what is.
Status set_hyperparameter(OptimizerKind optimizer, int64_t index, double value, Hyperparameters* hyperparameters);
/// Whether every field that the optimizer reads is allowed, as every plan's step() asks on every device. A whole
/// number may be larger here than a double can say.
Status check_hyperparameters(OptimizerKind optimizer, const Hyperparameters& hyperparameters);
/// What is allowed, in words: "0 <= beta1 < 1", "a finite number of at least 0".
std::string allowed_values(const HyperparameterInfo& info);

/// Whether steps with these hold all slots: SGD and SGDW have a momentum buffer only where momentum is not 0.
bool holds_momentum(OptimizerKind optimizer, const Hyperparameters& hyperparameters);

/// One state that an optimizer keeps for each element.
struct StateSlotInfo {
  const char* name = "";  ///< PyTorch's
  bool is_signed = false;
  /// The unsigned slot that the default codec stores this one relative to the root of; -1: none.
  int relative_to = -1;
  /// Bits of mantissa of a signed slot's codes in the default codec; 0: each group chooses 3 to 6.
  int mantissa_bits = 0;
  /// Whether scales of the slot's groups are powers of two in the default codec.
  bool is_slow = false;
  /// Whether the codec stores codes of this slot as int8 (true) or uint8.
  bool int8_codes(StateCodec codec) const { return codec == StateCodec::kPaper && is_signed; }
};

/// Number of state slots; `has_momentum` is holds_momentum().
int state_count(OptimizerKind optimizer, bool has_momentum);
/// Slot of the optimizer with momentum, 0 ... state_count(optimizer, true) - 1: the order of ParameterTensors::states.
StateSlotInfo state_slot(OptimizerKind optimizer, int slot);

}  // namespace flashoptim
