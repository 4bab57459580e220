// Every rule in core/optimizer_list.h has what a rule must have: an oracle, a frozen state format, and a mention in the
// documentation. See docs/adding_an_optimizer.md.
#include "flashoptim/core/optimizer_list.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "tests/kernels/test_tensors.h"
#include "tests/oracle/oracle.h"

namespace flashoptim::test {
namespace {

const std::vector<std::string>& rules() {
#define FLASHOPTIM_NAME(name) #name,
  static const std::vector<std::string> names{FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_NAME)};
#undef FLASHOPTIM_NAME
  return names;
}

/// The text of a file of the source tree; empty where there is none.
std::string source_file(const std::string& path) {
  std::ifstream file(std::string(FLASHOPTIM_SOURCE_DIR) + "/" + path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

TEST(OptimizerList, EveryRuleHasAnOracle) {
  std::vector<std::string> listed = rules(), oracles;
  for (const auto& one : oracle::all<double>()) oracles.emplace_back(one.name);
  std::sort(listed.begin(), listed.end());
  std::sort(oracles.begin(), oracles.end());
  EXPECT_EQ(listed, oracles) << "tests/oracle/oracle.h";
}

TEST(OptimizerList, EveryRuleHasAFrozenStateFormat) {
  for (const std::string& name : rules()) {
    EXPECT_NE(source_file("tests/data/state_format/" + name + ".txt"), "")
        << "tests/data/state_format/" << name << ".txt is missing: run tests/data/regenerate.sh";
  }
}

TEST(OptimizerList, EveryOptimizerIsDocumentedByItsClass) {
  const std::string text = source_file("docs/python_api.md");
  for (const OptimizerChoice& o : kOptimizers) {
    EXPECT_NE(text.find(std::string("`Flash") + optimizer_title(o.kind) + "`"), std::string::npos)
        << "docs/python_api.md has no Flash" << optimizer_title(o.kind) << ": tools/optimizer_tables.py --write";
  }
}

TEST(OptimizerList, LogarithmAndExponentialAreTheNumbersThatTheySay) {
  for (double x : {1.0, 0.9999999, 0.9999, 0.999, 0.9, 0.75, 0.70710678, 0.5, 0.3, 1e-3, 1e-40, 5e-324}) {
    EXPECT_NEAR(core::natural_log(x), std::log(x), 4e-16 * std::fabs(std::log(x))) << x;
  }
  for (double x : {-0.0, -1e-300, -1e-9, -1e-4, -0.1, -0.3466, -0.3467, -0.7, -1.0, -10.0, -100.0, -699.0}) {
    EXPECT_NEAR(core::exponential(x), std::exp(x), 4e-16 * std::exp(x)) << x;
  }
  EXPECT_EQ(core::exponential(-1e9), 0.0);
}

}  // namespace
}  // namespace flashoptim::test
