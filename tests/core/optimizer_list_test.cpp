// Every rule in core/optimizer_list.h has what a rule must have: an oracle, a frozen state format, and a mention in the
// documentation. See docs/adding_an_optimizer.md.
#include "flashoptim/core/optimizer_list.h"

#include <gtest/gtest.h>

#include <algorithm>
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
  std::vector<std::string> listed = rules(), oracles = oracle::names();
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

TEST(OptimizerList, EveryRuleIsDocumentedByItsCompiledName) {
  const std::string text = source_file("docs/adding_an_optimizer.md") + source_file("docs/numerics.md");
  if (text.empty()) GTEST_SKIP() << "docs/adding_an_optimizer.md and docs/numerics.md are not written yet";
  for (const std::string& name : rules()) {
    EXPECT_NE(text.find("`" + name + "`"), std::string::npos)
        << "neither docs/adding_an_optimizer.md nor docs/numerics.md mentions `" << name << "`";
  }
}

}  // namespace
}  // namespace flashoptim::test
