// The laboratory's own rows: an update rule of the library over a laboratory codec, with fp32 weights.
#include "flashoptim/core/optimizers/adam.h"
#include "flashoptim/core/optimizers/lion.h"
#include "flashoptim/core/optimizers/sgd.h"
#include "lab/lab_codec.h"

namespace flashoptim::fidelity {

namespace {

template <class Rule>
class LabCandidate : public Candidate {
 public:
  LabCandidate(const Case& c, const CaseData& data, std::unique_ptr<LabCodec> codec, uint64_t seed)
      : case_(c), codec_(std::move(codec)), seed_(seed), weights_(data.weights) {
    gradient_.resize(weights_.size());
  }

  void step(const Hyperparameters& hyper, const uint16_t* gradient) override {
    widen_row(case_.gradient_dtype, gradient, gradient_.data(), case_.elements);
    const typename Rule::Hyper h = Rule::make_hyper(hyper);
    const core::DitherKey key = core::make_dither_key(seed_, static_cast<uint64_t>(hyper.step));
    const int64_t size = codec_->block_size();
    float m[256], v[256];
    for (int64_t block = 0; block < case_.elements / size; ++block) {
      codec_->decode(block, m, kHasVariance ? v : nullptr);
      update(h, gradient_.data() + block * size, weights_.data() + block * size, m, v, size);
      codec_->encode(block, key, m, kHasVariance ? v : nullptr);
    }
  }
  const float* weights() override { return weights_.data(); }
  double weight_resolution() const override { return 0x1p-23; }

 private:
  static constexpr bool kHasVariance = Rule::kSlotCount == 2;

  static void update(const typename Rule::Hyper& h, const float* __restrict g, float* __restrict w, float* __restrict m,
                     float* __restrict v, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      float s[Rule::kSlotCount] = {m[i]};
      if constexpr (kHasVariance) s[1] = v[i];
      w[i] -= Rule::template update<float>(w[i], g[i], s, h);
      m[i] = s[0];
      if constexpr (kHasVariance) v[i] = s[1];
    }
  }

  Case case_;
  std::unique_ptr<LabCodec> codec_;
  uint64_t seed_;
  std::vector<float> weights_, gradient_;
};

using MakeCodec = std::function<std::unique_ptr<LabCodec>(int64_t elements)>;

std::unique_ptr<Candidate> make_lab_candidate(const Case& c, const CaseData& data, const MakeCodec& make,
                                              uint64_t seed) {
  auto codec = make(c.elements);
  switch (c.optimizer) {
    case OptimizerKind::kLion:
      return std::make_unique<LabCandidate<core::Lion>>(c, data, std::move(codec), seed);
    case OptimizerKind::kSgd:
      return std::make_unique<LabCandidate<core::Sgd>>(c, data, std::move(codec), seed);
    default:
      return std::make_unique<LabCandidate<core::AdamW>>(c, data, std::move(codec), seed);
  }
}

class Rows {
 public:
  Rows(std::vector<CandidateInfo>& out, double bytes) : out_(out), bytes_(bytes) {}

  CandidateInfo& add(const char* name, const char* what, MakeCodec make) {
    CandidateInfo info;
    info.name = name;
    info.what = what;
    info.state_bytes = bytes_;
    info.make = [make = std::move(make)](const Case& c, const CaseData& data, uint64_t seed) {
      return make_lab_candidate(c, data, make, seed);
    };
    out_.push_back(std::move(info));
    return out_.back();
  }
  template <class Change>
  CandidateInfo& adam(const char* name, const char* what, Change change) {
    AdamCodecOptions options;
    change(options);
    return add(name, what, [options](int64_t elements) { return make_adam_codec(elements, options); });
  }
  template <class Change>
  CandidateInfo& momentum(const char* name, const char* what, Change change) {
    MomentumCodecOptions options;
    change(options);
    return add(name, what, [options](int64_t elements) { return make_momentum_codec(elements, options); });
  }

 private:
  std::vector<CandidateInfo>& out_;
  double bytes_;
};

void add_adam_rows(Rows& rows) {
  using Options = AdamCodecOptions;
  rows.adam("sqrt.unbiased", "paper's sqrt code of v, dithered, never 0, exact scale; m as default",
            [](Options& o) { o.variance = Options::Variance::kSqrt; });
  rows.adam("root4.unbiased", "4th root of v instead", [](Options& o) { o.variance = Options::Variance::kRoot4; });
  rows.adam("m-absmax", "v as default, m against its group's maximum (K = 4)", [](Options& o) {
    o.momentum = Options::Momentum::kAbsmax;
    o.mantissa_bits = 4;
  });
  rows.adam("nearest", "default, rounded to nearest",
            [](Options& o) { o.variance_dither = o.momentum_dither = DitherKind::kNearest; });
  rows.adam("white", "default, independent random dither",
            [](Options& o) { o.variance_dither = o.momentum_dither = DitherKind::kWhite; });
  rows.adam("B17", "windows of shift 17 and above borrow a bit of m", [](Options& o) { o.borrow_from = 17; });
  rows.adam("B18", "of shift 18 and above", [](Options& o) { o.borrow_from = 18; });
  rows.adam("gap", "one run of empty octaves cut out", [](Options& o) { o.gap = true; });
  rows.adam("gap+B17", "both", [](Options& o) {
    o.borrow_from = 17;
    o.gap = true;
  });
  // Where the error comes from.
  rows.adam("v-exact", "fp32 v, m as default", [](Options& o) { o.variance = Options::Variance::kExact; }).by_default =
      false;
  rows.adam("m-exact", "fp32 m, v as default", [](Options& o) { o.momentum = Options::Momentum::kExact; }).by_default =
      false;
  rows.adam("K5", "m with 5 bits of mantissa", [](Options& o) { o.mantissa_bits = 5; }).by_default = false;
  rows.adam("half-octaves", "S = sqrt(2)^k", [](Options& o) { o.half_octaves = true; }).by_default = false;
  rows.adam("gm10", "10 bits of mantissa in G", [](Options& o) { o.scale_mantissa_bits = 10; }).by_default = false;
  rows.adam("m-nearest", "m rounded to nearest", [](Options& o) { o.momentum_dither = DitherKind::kNearest; })
      .by_default = false;
}

void add_momentum_rows(Rows& rows, bool lion) {
  using Options = MomentumCodecOptions;
  using Rule = Options::Rule;
  static const char* const kNames[] = {"K3", "K4", "K5", "K6"};
  for (int k = 3; k <= 6; ++k) {
    rows.momentum(kNames[k - 3], "mu-law with this K", [k](Options& o) { o.mantissa_bits = k; }).by_default =
        lion || k != 5;
  }
  const auto like_default = [lion](Options& o) {
    if (!lion) return;
    o.rule = Rule::kSmallest;
    o.thresholds = {6.5, 8.5, 12.5};
    o.scale_mantissa_bits = 6;
    o.sign_floor = 0.125;
  };
  rows.momentum("nearest", "default, rounded to nearest", [like_default](Options& o) {
    like_default(o);
    o.dither = DitherKind::kNearest;
  });
  rows.momentum("white", "default, independent random dither", [like_default](Options& o) {
    like_default(o);
    o.dither = DitherKind::kWhite;
  });
  const auto rule = [&](const char* name, const char* what, Rule r, std::array<double, 3> thresholds,
                        double floor) -> CandidateInfo& {
    return rows.momentum(name, what, [=](Options& o) {
      o.rule = r;
      o.thresholds = thresholds;
      o.scale_mantissa_bits = 6;
      o.sign_floor = floor;
    });
  };
  rule("auto.mean", "K by the mean of log2(max / |m|)", Rule::kMean, {2.6, 4.0, 6.2}, 0.0);
  rule("auto.no-floor", "K by log2(max / smallest non-zero |m|)", Rule::kSmallest, {6.5, 8.5, 12.5}, 0.0);
  // The formulas of Lion's default again.
  rule("auto.smallest", "the same, sign floor 1/8", Rule::kSmallest, {6.5, 8.5, 12.5}, 0.125).by_default = !lion;
  rule("auto.pairs", "K by log2(max / smallest maximum of a pair), sign floor 1/8", Rule::kPairs, {4.0, 5.5, 9.0},
       0.125);
  rows.momentum("sign-floor", lion ? "K = 4 with a sign floor of 1/8" : "default with a sign floor of 1/8",
                [lion](Options& o) {
                  o.mantissa_bits = lion ? 4 : 5;
                  o.sign_floor = 0.125;
                })
      .by_default = lion;
}

}  // namespace

void add_lab_candidates(OptimizerKind optimizer, std::vector<CandidateInfo>& out) {
  const bool adam = optimizer == OptimizerKind::kAdamW;
  if (!adam && optimizer != OptimizerKind::kSgd && optimizer != OptimizerKind::kLion) return;
  const double states = adam ? 2.0 : 1.0;
  Rows dynamic(out, states * (1.0 + 4.0 / 256.0));
  dynamic.add("dynamic8", "bitsandbytes: dynamic tree, blocks of 256, nearest",
              [](int64_t elements) { return make_dynamic8_codec(elements); });
  Rows rows(out, states * (1.0 + 2.0 / 32.0));
  if (adam) {
    add_adam_rows(rows);
  } else {
    add_momentum_rows(rows, optimizer == OptimizerKind::kLion);
  }
}

}  // namespace flashoptim::fidelity
