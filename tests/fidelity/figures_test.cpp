// The figures of issue 4, on the laboratory's own cases with a quarter of the weights.
//
// A figure is asserted on a deterministic run (seed 42: gradients, dither and kernels give the same bits everywhere),
// so nothing here fails by chance. The thresholds are the issue's; where the codec is far below, a second, tighter one
// at 1.5 times what was measured guards against getting worse unnoticed. 1.5: 1,024 weights instead of 4,096 change an
// error by less than a tenth, another seed by at most 12 % for AdamW and 45 % for SGD and Lion (docs/numerics.md).
#include <gtest/gtest.h>

#include <cctype>
#include <cmath>
#include <stdexcept>

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

Case find_case(OptimizerKind optimizer, const std::string& name) {
  for (Case& c : make_cases(optimizer)) {
    if (c.name == name) return std::move(c);
  }
  throw std::runtime_error("no case " + name);
}

Measured measure(OptimizerKind optimizer, const std::string& name, const std::vector<std::string>& codecs) {
  Measured out;
  out.c = find_case(optimizer, name);
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

INSTANTIATE_TEST_SUITE_P(Cases, AdamWFigure,
                         testing::Values(Figure{"homogeneous", 0.0046}, Figure{"homogeneous.b2=.95", 0.0040},
                                         Figure{"heavy", 0.0128}, Figure{"sparse", 0.0179}, Figure{"outlier", 0.0495},
                                         Figure{"spread1", 0.0326}, Figure{"spread2", 0.0513},
                                         Figure{"spread3", 0.0744}, Figure{"spread4", 0.0174}, Figure{"g1e-5", 0.0048},
                                         Figure{"g1e-6", 0.0048}, Figure{"g1e-12", 0.0036}, Figure{"g1e6", 0.0048},
                                         Figure{"falling", 0.0081}, Figure{"rising", 0.0040}),
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

INSTANTIATE_TEST_SUITE_P(Cases, MomentumCase,
                         testing::Values(MomentumFigure{OptimizerKind::kSgd, "homogeneous", 0.0046},
                                         MomentumFigure{OptimizerKind::kSgd, "sparse", 0.0144},
                                         MomentumFigure{OptimizerKind::kSgd, "outlier", 0.0034},
                                         MomentumFigure{OptimizerKind::kSgd, "spread3", 0.0037},
                                         MomentumFigure{OptimizerKind::kSgd, "g1e-12", 0.0045},
                                         MomentumFigure{OptimizerKind::kSgd, "g1e6", 0.0045},
                                         MomentumFigure{OptimizerKind::kLion, "homogeneous", 0.0225},
                                         MomentumFigure{OptimizerKind::kLion, "sparse", 0.2057},
                                         MomentumFigure{OptimizerKind::kLion, "outlier", 0.0498},
                                         MomentumFigure{OptimizerKind::kLion, "outlier1e4", 0.0791},
                                         MomentumFigure{OptimizerKind::kLion, "spread4", 0.0770},
                                         MomentumFigure{OptimizerKind::kLion, "spread6", 0.1982},
                                         MomentumFigure{OptimizerKind::kLion, "sparse.0.1%.spread2", 0.1304},
                                         MomentumFigure{OptimizerKind::kLion, "spread3", 0.0747},
                                         MomentumFigure{OptimizerKind::kLion, "g1e-12", 0.0230},
                                         MomentumFigure{OptimizerKind::kLion, "g1e6", 0.0231}),
                         [](const testing::TestParamInfo<MomentumFigure>& info) {
                           std::string name = std::string(optimizer_name(info.param.optimizer)) + "_" + info.param.name;
                           for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
                           return name;
                         });

/// AdEMAMix and ADOPT on AdamW's cases. Issue 4's figures are AdamW's; where one of these is above (numerics.md,
/// section 5, says why), its guard alone holds.
struct SlowFigure {
  OptimizerKind optimizer;
  const char* name;
  double guard;  ///< 1.5 times the error measured when this was written
};

class SlowAverageFigure : public testing::TestWithParam<SlowFigure> {};

TEST_P(SlowAverageFigure, IsNoWorseThanItWas) {
  const SlowFigure& figure = GetParam();
  const Measured m = measure(figure.optimizer, figure.name, {"default"});
  const Result& r = m.results[0];
  EXPECT_LE(r.error, figure.guard);
  EXPECT_LE(r.largest_update, 1.2 * m.reference.largest_update);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, SlowAverageFigure,
    testing::Values(
        SlowFigure{OptimizerKind::kAdEMAMix, "homogeneous", 0.0837},
        SlowFigure{OptimizerKind::kAdEMAMix, "homogeneous.b2=.95", 0.1169},
        SlowFigure{OptimizerKind::kAdEMAMix, "heavy", 0.0851}, SlowFigure{OptimizerKind::kAdEMAMix, "sparse", 0.1315},
        SlowFigure{OptimizerKind::kAdEMAMix, "outlier", 0.1007},
        SlowFigure{OptimizerKind::kAdEMAMix, "spread1", 0.0989},
        SlowFigure{OptimizerKind::kAdEMAMix, "spread2", 0.1072},
        SlowFigure{OptimizerKind::kAdEMAMix, "spread3", 0.1219},
        SlowFigure{OptimizerKind::kAdEMAMix, "spread4", 0.1065}, SlowFigure{OptimizerKind::kAdEMAMix, "g1e-5", 0.0857},
        SlowFigure{OptimizerKind::kAdEMAMix, "g1e-6", 0.0859}, SlowFigure{OptimizerKind::kAdEMAMix, "g1e-12", 0.0857},
        SlowFigure{OptimizerKind::kAdEMAMix, "g1e6", 0.0851}, SlowFigure{OptimizerKind::kAdEMAMix, "falling", 0.1105},
        SlowFigure{OptimizerKind::kAdEMAMix, "rising", 0.0152},
        SlowFigure{OptimizerKind::kAdopt, "homogeneous", 0.0353},
        SlowFigure{OptimizerKind::kAdopt, "homogeneous.b2=.95", 0.0045},
        SlowFigure{OptimizerKind::kAdopt, "heavy", 0.0392}, SlowFigure{OptimizerKind::kAdopt, "sparse", 0.0177},
        SlowFigure{OptimizerKind::kAdopt, "outlier", 0.0646}, SlowFigure{OptimizerKind::kAdopt, "spread1", 0.0479},
        SlowFigure{OptimizerKind::kAdopt, "spread2", 0.0575}, SlowFigure{OptimizerKind::kAdopt, "spread3", 0.0695},
        SlowFigure{OptimizerKind::kAdopt, "spread4", 0.0208}, SlowFigure{OptimizerKind::kAdopt, "g1e-5", 0.0344},
        SlowFigure{OptimizerKind::kAdopt, "g1e-6", 0.0144}, SlowFigure{OptimizerKind::kAdopt, "g1e-12", 0.0046},
        SlowFigure{OptimizerKind::kAdopt, "g1e6", 0.0336}, SlowFigure{OptimizerKind::kAdopt, "falling", 0.0393},
        SlowFigure{OptimizerKind::kAdopt, "rising", 0.0063}),
    [](const testing::TestParamInfo<SlowFigure>& info) {
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

TEST(Laboratory, GradientsAtTheEndsOfFp32MakeNoNaN) {
  // Range 1e-38 to 1e38: no state, weight or update leaves fp32 for gradients at its ends.
  for (const double sigma : {1e-38, 1e-30, 1e17, 1e30, 1e38}) {
    Case c = find_case(OptimizerKind::kAdamW, "homogeneous");
    c.sigma = sigma;
    c.steps = 300;
    c.elements = 1024;
    const CaseData data = make_data(c, 42);
    const std::vector<CandidateInfo> all = make_candidates(OptimizerKind::kAdamW);
    const auto run = find_candidate(all, "default").make(c, data, 42);
    for (int64_t t = 1; t <= c.steps; ++t) run->step(c.hyper_at(t), data.row(c, t));
    const float* w = run->weights();
    for (int64_t i = 0; i < c.elements; ++i) {
      ASSERT_TRUE(std::isfinite(w[i])) << sigma;
      ASSERT_LE(std::fabs(w[i]), 1.1 * 300.0 * c.update_bound(c.hyper)) << sigma;
    }
  }
}

}  // namespace
}  // namespace flashoptim::fidelity
