// The figures of issue 4, on the laboratory's own cases with a quarter of the weights.
//
// A figure is asserted on a deterministic run (seed 42: gradients, dither and kernels give the same bits everywhere), so
// nothing here fails by chance. The thresholds are the issue's; where the codec is far below, a second, tighter one at
// about 1.5 times what was measured guards against getting worse unnoticed. The measured error of 1,024 weights differs
// by less than a tenth from that of 4,096 (between seeds: tests/fidelity was run with 42, 43, 44).
#include <gtest/gtest.h>

#include <cmath>

#include "lab/evaluate.h"

namespace flashoptim::fidelity {
namespace {

struct Measured {
  Case c;
  Reference reference;
  std::vector<Result> results;
};

const CandidateInfo& find_candidate(const std::vector<CandidateInfo>& all, const std::string& name) {
  for (const CandidateInfo& candidate : all) {
    if (candidate.name == name) return candidate;
  }
  throw std::runtime_error("no codec " + name);
}

Measured measure(OptimizerKind optimizer, const std::string& name, const std::vector<std::string>& codecs) {
  Measured out;
  bool found = false;
  for (Case& c : make_cases(optimizer)) {
    if (c.name != name) continue;
    out.c = std::move(c);
    found = true;
  }
  if (!found) throw std::runtime_error("no case " + name);
  out.c.elements = 1024;
  const CaseData data = make_data(out.c, 42);
  out.reference = run_reference(out.c, data);
  const std::vector<CandidateInfo> all = make_candidates(optimizer);
  for (const std::string& codec : codecs) {
    out.results.push_back(evaluate(out.c, data, out.reference, *find_candidate(all, codec).make(out.c, data, 42)));
  }
  return out;
}

struct Figure {
  const char* name;
  double guard;  ///< 1.5 times the error measured when this was written
};

class AdamWFigure : public testing::TestWithParam<Figure> {};

TEST_P(AdamWFigure, IsReached) {
  const Figure& figure = GetParam();
  const Measured m = measure(OptimizerKind::kAdamW, figure.name, {"default"});
  const Result& r = m.results[0];
  EXPECT_LE(r.error, m.c.target) << "issue 4's figure";
  EXPECT_LE(r.error, figure.guard) << "worse than it was";
  // Exact Adam with bias correction may itself exceed the bound.
  EXPECT_LE(r.largest_update, 1.1 * std::max(1.0, m.reference.largest_update));
}

INSTANTIATE_TEST_SUITE_P(Cases, AdamWFigure, testing::Values(@ADAM@),
                         [](const testing::TestParamInfo<Figure>& info) {
                           std::string name = info.param.name;
                           for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
                           return name;
                         });

struct MomentumFigure {
  OptimizerKind optimizer;
  const char* name;
  double guard;
};

class MomentumCase : public testing::TestWithParam<MomentumFigure> {};

TEST_P(MomentumCase, IsNoWorseThanItWas) {
  const MomentumFigure& figure = GetParam();
  const Measured m = measure(figure.optimizer, figure.name, {"default"});
  EXPECT_LE(m.results[0].error, figure.guard);
}

INSTANTIATE_TEST_SUITE_P(Cases, MomentumCase, testing::Values(@MOMENTUM@),
                         [](const testing::TestParamInfo<MomentumFigure>& info) {
                           std::string name = std::string(optimizer_name(info.param.optimizer)) + "_" + info.param.name;
                           for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
                           return name;
                         });

TEST(Laboratory, Fp32StatesFollowFloat64) {
  // The harness itself: what is left is fp32 arithmetic and a correction's resolution.
  for (const char* name : {"homogeneous", "spread3"}) {
    const Measured m = measure(OptimizerKind::kAdamW, name, {"fp32"});
    EXPECT_LE(m.results[0].error, 2e-5) << name;
  }
}

TEST(Laboratory, PaperCodecLosesWhatTheTableSays) {
  // Known failures of the paper's codec (numerics.md): where they vanish, the laboratory measures something else.
  const Measured m = measure(OptimizerKind::kAdamW, "spread3", {"paper"});
  EXPECT_GE(m.results[0].error, 1.0);
  EXPECT_GE(m.results[0].largest_update, 10.0);
  EXPECT_GE(measure(OptimizerKind::kAdamW, "heavy", {"paper"}).results[0].error, 0.05);
}

TEST(Laboratory, SixDecadesMakeNoNaNAndNoJump) {
  // Range 1e-38 to 1e38: no state, weight or update leaves fp32 for gradients at its ends.
  for (const double sigma : {1e-38, 1e-30, 1e17, 1e30, 1e38}) {
    Measured m = measure(OptimizerKind::kAdamW, "homogeneous", {});
    m.c.sigma = sigma;
    m.c.steps = 300;
    const CaseData data = make_data(m.c, 42);
    const std::vector<CandidateInfo> all = make_candidates(OptimizerKind::kAdamW);
    const auto run = find_candidate(all, "default").make(m.c, data, 42);
    for (int64_t t = 1; t <= m.c.steps; ++t) run->step(m.c.hyper_at(t), data.row(m.c, t));
    for (int64_t i = 0; i < m.c.elements; ++i) {
      ASSERT_TRUE(std::isfinite(run->weights()[i])) << sigma;
      ASSERT_LE(std::fabs(run->weights()[i]), 1.1e-3 * 3.2 * 300.0) << sigma;
    }
  }
}

}  // namespace
}  // namespace flashoptim::fidelity
