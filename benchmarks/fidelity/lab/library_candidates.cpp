// The library's codecs through the Plan API: the real kernels of this machine's instruction set.
#include <cstdio>
#include <cstdlib>

#include "flashoptim/core/narrow_float.h"
#include "flashoptim/core/weight_split.h"
#include "flashoptim/step.h"
#include "lab/candidate.h"

namespace flashoptim::fidelity {

namespace {

void check(const Status& status) {
  if (status.is_ok()) return;
  std::fprintf(stderr, "fidelity: %s\n", status.message().c_str());
  std::abort();
}

void run_inline(void*, int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  body(context, 0, count);
}

template <class Narrow, int kBits>
void merge_all(const uint16_t* narrow, const int8_t* corrections8, const int16_t* corrections16, float* out,
               int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int c = kBits == 8 ? corrections8[i] : corrections16[i];
    out[i] = core::merge<Narrow, kBits, float>(Narrow::template widen<float>(narrow[i]), static_cast<uint32_t>(c));
  }
}

class PlanCandidate : public Candidate {
 public:
  PlanCandidate(const Case& c, const CaseData& data, StateCodec codec, uint64_t seed)
      : case_(c), seed_(seed), bits_(c.correction_bits_8 ? 8 : 16) {
    const auto n = static_cast<size_t>(c.elements);
    parameter_.resize(n);
    correction8_.resize(n);
    correction16_.resize(n);
    weights_.resize(n);
    const int64_t sizes[2] = {c.elements / 32, 32};
    ParameterTensors& tensor = tensor_;
    tensor.layout = group_layout(sizes, 2);
    tensor.parameter = parameter_.data();
    tensor.correction = bits_ == 8 ? static_cast<void*>(correction8_.data()) : correction16_.data();
    tensor.parameter_dtype = c.parameter_dtype;
    tensor.gradient_dtype = c.gradient_dtype;
    tensor.state_codec = codec;
    const bool nearest = codec == StateCodec::kPaper;
    tensor.master_weights = bits_ == 8 ? (nearest ? MasterWeights::kCorrection8Nearest : MasterWeights::kCorrection8)
                                       : (nearest ? MasterWeights::kCorrection16Nearest : MasterWeights::kCorrection16);
    const bool has_momentum = c.hyper.momentum != 0.0;
    const int slots = state_count(c.optimizer, has_momentum);
    const size_t element = codec == StateCodec::kFloat32 ? 4 : 1;
    for (int k = 0; k < slots; ++k) {
      states_[k].assign(n * element, 0);
      headers_[k].assign(static_cast<size_t>(tensor.layout.groups()), 0);
      tensor.states[k] = states_[k].data();
      if (codec != StateCodec::kFloat32) tensor.scales[k] = headers_[k].data();
    }
    check(split_weights(c.parameter_dtype, tensor.master_weights, data.weights.data(), tensor.parameter,
                        tensor.correction, c.elements));
    check(Plan::make(c.optimizer, has_momentum, &tensor, 1, &plan_));
    options_.parallel_for = run_inline;
  }

  void step(const Hyperparameters& hyper, const uint16_t* gradient) override {
    Hyperparameters h = hyper;
    h.seed = seed_;
    check(plan_.set_gradient(0, gradient));
    check(plan_.step(&h, 1, options_));
  }

  const float* weights() override {
    const uint16_t* p = parameter_.data();
    const int8_t* c8 = correction8_.data();
    const int16_t* c16 = correction16_.data();
    float* out = weights_.data();
    const int64_t n = case_.elements;
    if (case_.parameter_dtype == DType::kFloat16) {
      bits_ == 8 ? merge_all<core::Float16, 8>(p, c8, c16, out, n) : merge_all<core::Float16, 16>(p, c8, c16, out, n);
    } else {
      bits_ == 8 ? merge_all<core::BFloat16, 8>(p, c8, c16, out, n) : merge_all<core::BFloat16, 16>(p, c8, c16, out, n);
    }
    return out;
  }

  double weight_resolution() const override {
    const double half_ulp = case_.parameter_dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
    return half_ulp / (bits_ == 8 ? 127.0 : 32767.0) + 0x1p-23;
  }

 private:
  Case case_;
  uint64_t seed_;
  int bits_;
  std::vector<uint16_t> parameter_;
  std::vector<int8_t> correction8_;
  std::vector<int16_t> correction16_;
  std::vector<uint8_t> states_[kMaxSlots];
  std::vector<uint16_t> headers_[kMaxSlots];
  std::vector<float> weights_;
  ParameterTensors tensor_;
  Plan plan_;
  StepOptions options_;
};

}  // namespace

void add_library_candidates(OptimizerKind optimizer, std::vector<CandidateInfo>& out) {
  const double states = state_count(optimizer, true);
  const auto add = [&](const char* name, const char* what, StateCodec codec, double bytes) {
    CandidateInfo info;
    info.name = name;
    info.what = what;
    info.in_library = true;
    info.state_bytes = states * bytes;
    info.make = [codec](const Case& c, const CaseData& data, uint64_t seed) -> std::unique_ptr<Candidate> {
      return std::make_unique<PlanCandidate>(c, data, codec, seed);
    };
    out.push_back(std::move(info));
  };
  add("fp32", "fp32 states, dithered corrections", StateCodec::kFloat32, 4.0);
  add("default", "the library's default codec, dithered corrections", StateCodec::kDefault, 1.0 + 2.0 / 32.0);
  add("paper", "the paper's codec, corrections rounded to nearest", StateCodec::kPaper, 1.0 + 2.0 / 32.0);
}

std::vector<CandidateInfo> make_candidates(OptimizerKind optimizer) {
  std::vector<CandidateInfo> out;
  add_library_candidates(optimizer, out);
  add_lab_candidates(optimizer, out);
  return out;
}

}  // namespace flashoptim::fidelity
