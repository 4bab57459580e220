// What optimizer_info.h tells of every optimizer: complete, in the stated order, and what plans check.
#include "flashoptim/optimizer_info.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<OptimizerKind> optimizers() {
  std::vector<OptimizerKind> all;
  for (int64_t i = 0; i < optimizer_count(); ++i) all.push_back(optimizer_at(i));
  return all;
}

int64_t index_of(OptimizerKind optimizer, const std::string& name) {
  for (int64_t i = 0; i < hyperparameter_count(optimizer); ++i) {
    if (name == hyperparameter(optimizer, i).name) return i;
  }
  return -1;
}

TEST(OptimizerInfo, EveryRuleBelongsToAnOptimizerAndEveryOptimizerHasOne) {
  std::set<OptimizerKind> of_rules;
  for (const OptimizerChoice& o : kOptimizers) {
    of_rules.insert(o.kind);
    EXPECT_EQ(state_count(o.kind, o.has_momentum), o.states) << o.name;
  }
  const std::vector<OptimizerKind> all = optimizers();
  EXPECT_EQ(of_rules, std::set<OptimizerKind>(all.begin(), all.end()));
}

TEST(OptimizerInfo, NamesFindTheirOptimizer) {
  std::set<std::string> names;
  for (const OptimizerKind kind : optimizers()) {
    OptimizerKind found{};
    ASSERT_TRUE(find_optimizer(optimizer_name(kind), &found).is_ok());
    EXPECT_EQ(found, kind);
    EXPECT_TRUE(check_optimizer(kind).is_ok());
    EXPECT_TRUE(names.insert(optimizer_name(kind)).second) << optimizer_name(kind);
  }
  EXPECT_STREQ(optimizer_name(OptimizerKind::kAdamW), "adamw");
  EXPECT_STREQ(optimizer_title(OptimizerKind::kAdamW), "AdamW");
}

/// The title is the name, as people write it.
TEST(OptimizerInfo, TitlesAreNamesInTheirOwnSpelling) {
  for (const OptimizerKind kind : optimizers()) {
    std::string lower = optimizer_title(kind);
    for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    EXPECT_EQ(lower, optimizer_name(kind));
  }
  EXPECT_STREQ(optimizer_title(static_cast<OptimizerKind>(-1)), "");
}

TEST(OptimizerInfo, WhatIsNoOptimizerIsAnErrorThatNamesThoseThereAre) {
  OptimizerKind kept = OptimizerKind::kLion;
  const Status unknown = find_optimizer("adamx", &kept);
  EXPECT_EQ(unknown.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(unknown.message().find("'adamx'; allowed are adamw, adam, sgd, sgdw, lion"), std::string::npos)
      << unknown.message();
  EXPECT_EQ(kept, OptimizerKind::kLion);
  EXPECT_FALSE(find_optimizer(nullptr, &kept).is_ok());
  EXPECT_FALSE(find_optimizer("adamw", nullptr).is_ok());
  for (const int64_t number : {int64_t{-1}, optimizer_count(), int64_t{1} << 30}) {
    const auto none = static_cast<OptimizerKind>(number);
    const Status status = check_optimizer(none);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(std::to_string(number)), std::string::npos) << status.message();
    EXPECT_NE(status.message().find("0 (adamw)"), std::string::npos) << status.message();
    EXPECT_STREQ(optimizer_name(none), "");
    EXPECT_EQ(hyperparameter_count(none), 0);
    EXPECT_EQ(state_count(none, true), 0);
    EXPECT_STREQ(state_slot(none, 0).name, "");
    Hyperparameters p;
    EXPECT_FALSE(check_hyperparameters(none, p).is_ok());
    EXPECT_FALSE(set_hyperparameter(none, 0, 1.0, &p).is_ok());
    Plan plan;
    EXPECT_FALSE(Plan::make(none, true, nullptr, 0, &plan).is_ok());
  }
}

TEST(OptimizerInfo, TheCommonHyperparametersComeFirstAndNamesAreDistinct) {
  const char* const common[] = {"lr", "weight_decay", "decay_lr", "maximize", "step", "seed"};
  for (const OptimizerKind kind : optimizers()) {
    ASSERT_GE(hyperparameter_count(kind), kCommonHyperparameters);
    for (int64_t i = 0; i < kCommonHyperparameters; ++i) EXPECT_STREQ(hyperparameter(kind, i).name, common[i]);
    std::set<std::string> names;
    for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
      EXPECT_TRUE(names.insert(hyperparameter(kind, i).name).second) << hyperparameter(kind, i).name;
    }
    EXPECT_STREQ(hyperparameter(kind, -1).name, "");
    EXPECT_STREQ(hyperparameter(kind, hyperparameter_count(kind)).name, "");
  }
  EXPECT_EQ(index_of(OptimizerKind::kAdamW, "seed"), kSeedIndex);
  EXPECT_EQ(index_of(OptimizerKind::kAdamW, "step"), kStepIndex);
  EXPECT_EQ(index_of(OptimizerKind::kAdamW, "momentum"), -1);
  EXPECT_EQ(index_of(OptimizerKind::kSgd, "beta1"), -1);
}

TEST(OptimizerInfo, DefaultsAreAllowedAndAreTorchs) {
  for (const OptimizerKind kind : optimizers()) {
    const Hyperparameters p = default_hyperparameters(kind);
    EXPECT_TRUE(check_hyperparameters(kind, p).is_ok()) << check_hyperparameters(kind, p).message();
    Hyperparameters set;
    for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
      const HyperparameterInfo info = hyperparameter(kind, i);
      EXPECT_EQ(get_hyperparameter(kind, i, p), info.default_value) << info.name;
      EXPECT_TRUE(set_hyperparameter(kind, i, info.default_value, &set).is_ok()) << info.name;
    }
    EXPECT_EQ(p.lr, 1e-3);
    EXPECT_EQ(p.step, 1);
  }
  EXPECT_EQ(default_hyperparameters(OptimizerKind::kAdamW).weight_decay, 1e-2);
  EXPECT_EQ(default_hyperparameters(OptimizerKind::kAdam).weight_decay, 0.0);
  EXPECT_EQ(default_hyperparameters(OptimizerKind::kAdam).beta2, 0.999);
  EXPECT_EQ(default_hyperparameters(OptimizerKind::kAdam).eps, 1e-8);
  EXPECT_EQ(default_hyperparameters(OptimizerKind::kLion).beta2, 0.99);
}

/// A field that set_hyperparameter sets is the one that its name says: no other changes.
TEST(OptimizerInfo, EachNumberIsAFieldOfItsOwn) {
  for (const OptimizerKind kind : optimizers()) {
    const Hyperparameters before = default_hyperparameters(kind);
    for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
      const HyperparameterInfo info = hyperparameter(kind, i);
      const double value = info.kind == HyperparameterKind::kNumber ? 0.625
                           : info.kind == HyperparameterKind::kFlag ? 1.0 - info.default_value
                                                                    : 123456789012345.0;
      Hyperparameters p = before;
      ASSERT_TRUE(set_hyperparameter(kind, i, value, &p).is_ok()) << info.name;
      for (int64_t j = 0; j < hyperparameter_count(kind); ++j) {
        EXPECT_EQ(get_hyperparameter(kind, j, p), i == j ? value : get_hyperparameter(kind, j, before));
      }
    }
    EXPECT_EQ(get_hyperparameter(kind, -1, before), 0.0);
  }
}

void expect_refused(OptimizerKind kind, int64_t index, double value, const std::string& allowed) {
  const HyperparameterInfo info = hyperparameter(kind, index);
  const Hyperparameters before = default_hyperparameters(kind);
  Hyperparameters p = before;
  const Status status = set_hyperparameter(kind, index, value, &p);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << info.name << " = " << value;
  EXPECT_NE(status.message().find(std::string(info.name) + " = "), std::string::npos) << status.message();
  EXPECT_NE(status.message().find(allowed), std::string::npos) << status.message();
  for (int64_t j = 0; j < hyperparameter_count(kind); ++j) {
    EXPECT_EQ(get_hyperparameter(kind, j, p), get_hyperparameter(kind, j, before)) << info.name;
  }
}

TEST(OptimizerInfo, WhatIsOutsideARangeIsRefusedAndTheEndsAreWhatTheySay) {
  for (const OptimizerKind kind : optimizers()) {
    for (int64_t i = 0; i < hyperparameter_count(kind); ++i) {
      const HyperparameterInfo info = hyperparameter(kind, i);
      for (const double value : {static_cast<double>(NAN), kInfinity, -kInfinity}) {
        expect_refused(kind, i, value, allowed_values(info));
      }
      if (std::isfinite(info.lowest)) {
        expect_refused(kind, i, std::nextafter(info.lowest, -kInfinity), allowed_values(info));
        Hyperparameters p;
        EXPECT_EQ(set_hyperparameter(kind, i, info.lowest, &p).is_ok(), info.lowest_allowed) << info.name;
      }
      if (std::isfinite(info.highest)) {
        expect_refused(kind, i, std::nextafter(info.highest, kInfinity), allowed_values(info));
        Hyperparameters p;
        EXPECT_EQ(set_hyperparameter(kind, i, info.highest, &p).is_ok(), info.highest_allowed) << info.name;
      }
      if (info.kind != HyperparameterKind::kNumber) expect_refused(kind, i, 1.5, allowed_values(info));
    }
    Hyperparameters p;
    EXPECT_FALSE(set_hyperparameter(kind, hyperparameter_count(kind), 1.0, &p).is_ok());
    EXPECT_FALSE(set_hyperparameter(kind, 0, 1.0, nullptr).is_ok());
  }
  const auto text = [](OptimizerKind kind, const char* name) {
    return allowed_values(hyperparameter(kind, index_of(kind, name)));
  };
  EXPECT_EQ(text(OptimizerKind::kAdamW, "beta1"), "0 <= beta1 < 1");
  EXPECT_EQ(text(OptimizerKind::kAdamW, "eps"), "a finite number of at least 0");
  EXPECT_EQ(text(OptimizerKind::kSgd, "dampening"), "a finite number");
  EXPECT_EQ(text(OptimizerKind::kSgd, "nesterov"), "0 or 1");
  EXPECT_EQ(text(OptimizerKind::kSgd, "step"), "a whole number of at least 1 and below 2^53");
}

TEST(OptimizerInfo, APlanRefusesWhatTheDescriptionDoesAndWholeNumbersMayBeLargerThanDoublesSay) {
  for (const OptimizerKind kind : optimizers()) {
    Hyperparameters p = default_hyperparameters(kind);
    p.step = std::numeric_limits<int64_t>::max();
    p.seed = std::numeric_limits<uint64_t>::max();
    EXPECT_TRUE(check_hyperparameters(kind, p).is_ok());
    p.step = 0;
    EXPECT_NE(check_hyperparameters(kind, p).message().find("step = 0"), std::string::npos);
    p = default_hyperparameters(kind);
    p.lr = NAN;
    EXPECT_NE(check_hyperparameters(kind, p).message().find("lr = nan"), std::string::npos);
  }
  // What an optimizer does not read is not looked at.
  Hyperparameters p = default_hyperparameters(OptimizerKind::kSgd);
  p.beta1 = 7.0;
  EXPECT_TRUE(check_hyperparameters(OptimizerKind::kSgd, p).is_ok());
  EXPECT_FALSE(check_hyperparameters(OptimizerKind::kAdam, p).is_ok());
}

TEST(OptimizerInfo, SlotsAreNamedAndRelativeToUnsignedOnes) {
  for (const OptimizerKind kind : optimizers()) {
    ASSERT_LE(state_count(kind, true), kMaxSlots);
    for (int k = 0; k < state_count(kind, true); ++k) {
      const StateSlotInfo slot = state_slot(kind, k);
      EXPECT_STRNE(slot.name, "") << optimizer_name(kind);
      if (slot.relative_to < 0) continue;
      ASSERT_LT(slot.relative_to, state_count(kind, true));
      EXPECT_TRUE(slot.is_signed);
      EXPECT_FALSE(state_slot(kind, slot.relative_to).is_signed);
    }
    EXPECT_STREQ(state_slot(kind, state_count(kind, true)).name, "");
    EXPECT_STREQ(state_slot(kind, -1).name, "");
  }
  EXPECT_STREQ(state_slot(OptimizerKind::kAdamW, 0).name, "exp_avg");
  EXPECT_STREQ(state_slot(OptimizerKind::kAdamW, 1).name, "exp_avg_sq");
  EXPECT_EQ(state_slot(OptimizerKind::kAdamW, 0).relative_to, 1);
  EXPECT_STREQ(state_slot(OptimizerKind::kSgd, 0).name, "momentum_buffer");
  EXPECT_STREQ(state_slot(OptimizerKind::kLion, 0).name, "exp_avg");
  EXPECT_EQ(state_slot(OptimizerKind::kLion, 0).relative_to, -1);
}

TEST(OptimizerInfo, OnlySgdWithoutMomentumHoldsNone) {
  for (const OptimizerKind kind : optimizers()) {
    Hyperparameters p = default_hyperparameters(kind);
    p.momentum = 0.5;
    EXPECT_TRUE(holds_momentum(kind, p));
    p.momentum = 0.0;
    const bool is_sgd = kind == OptimizerKind::kSgd || kind == OptimizerKind::kSgdw;
    EXPECT_EQ(holds_momentum(kind, p), !is_sgd);
    EXPECT_EQ(state_count(kind, false), is_sgd ? 0 : state_count(kind, true));
  }
}

}  // namespace
}  // namespace flashoptim::test
