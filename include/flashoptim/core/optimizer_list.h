// Every update rule there is, by the name it is compiled under. A new optimizer is one header and one line here.
#pragma once

#include "flashoptim/core/optimizers/adam.h"
#include "flashoptim/core/optimizers/ademamix.h"
#include "flashoptim/core/optimizers/adopt.h"
#include "flashoptim/core/optimizers/lion.h"
#include "flashoptim/core/optimizers/sgd.h"

// X(name): core::name is the rule, RuleKind::k##name its key.
#define FLASHOPTIM_FOR_EACH_RULE(X) \
  X(AdamW)                          \
  X(Adam)                           \
  X(Sgd)                            \
  X(Sgdw)                           \
  X(SgdPlain)                       \
  X(SgdwPlain)                      \
  X(Lion)                           \
  X(AdEMAMix)                       \
  X(Adopt)
