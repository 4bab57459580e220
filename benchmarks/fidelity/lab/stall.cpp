#include "lab/stall.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "flashoptim/core/narrow_float.h"
#include "flashoptim/step.h"
#include "lab/random.h"

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

int correction_bits(MasterWeights kind) {
  switch (kind) {
    case MasterWeights::kCorrection8:
    case MasterWeights::kCorrection8Nearest:
      return 8;
    case MasterWeights::kCorrection16:
    case MasterWeights::kCorrection16Nearest:
      return 16;
    default:
      return 0;
  }
}

const char* kind_name(MasterWeights kind) {
  switch (kind) {
    case MasterWeights::kNone:
      return "16 bit nearest";
    case MasterWeights::kNoneStochastic:
      return "16 bit dithered";
    case MasterWeights::kCorrection8:
      return "24 bit dithered";
    case MasterWeights::kCorrection16:
      return "32 bit dithered";
    case MasterWeights::kCorrection8Nearest:
      return "24 bit nearest";
    case MasterWeights::kCorrection16Nearest:
      return "32 bit nearest";
  }
  return "?";
}

}  // namespace

std::string StallCase::row_name() const {
  char text[96];
  std::snprintf(text, sizeof text, "%s, %s, w %g", kind_name(master_weights),
                dtype == DType::kFloat16 ? "fp16" : "bf16", start);
  return text;
}

std::string StallCase::name() const {
  char text[48];
  std::snprintf(text, sizeof text, ", lr %g%s", lr, random_updates ? ", random" : "");
  return row_name() + text;
}

std::vector<StallCase> make_stall_cases(const std::vector<MasterWeights>& kinds) {
  std::vector<StallCase> out;
  for (const MasterWeights kind : kinds) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      for (const double start : {30.0, 1.0, 0.1, 1e-3}) {
        for (const double lr : {1e-3, 1e-4, 1.5e-5, 1e-5, 1e-6, 1e-7}) {
          StallCase c;
          c.start = start;
          c.lr = lr;
          c.dtype = dtype;
          c.master_weights = kind;
          // 1,000 lr is a fifth of a step there: the mean needs more weights.
          if (start == 30.0 && lr < 1e-6) c.elements *= 8;
          out.push_back(c);
        }
        StallCase c;
        c.start = start;
        c.lr = 1e-6 * start;
        c.dtype = dtype;
        c.master_weights = kind;
        c.random_updates = true;
        out.push_back(c);
      }
    }
  }
  return out;
}

StallResult run_stall(const StallCase& c, uint64_t seed) {
  const auto n = static_cast<size_t>(c.elements);
  std::vector<uint16_t> parameter(n);
  std::vector<int16_t> correction(n);  // int8 uses its first half
  std::vector<float> start(n, static_cast<float>(c.start)), end(n), gradient(n, 1.0f);
  const int64_t sizes[1] = {c.elements};
  ParameterTensors tensor;
  tensor.layout = group_layout(sizes, 1);
  tensor.parameter = parameter.data();
  tensor.correction = correction_bits(c.master_weights) != 0 ? correction.data() : nullptr;
  tensor.parameter_dtype = c.dtype;
  tensor.gradient = gradient.data();
  tensor.gradient_dtype = DType::kFloat32;
  tensor.master_weights = c.master_weights;
  check(split_weights(c.dtype, c.master_weights, start.data(), parameter.data(), tensor.correction, c.elements));
  check(merge_weights(c.dtype, c.master_weights, parameter.data(), tensor.correction, start.data(), c.elements));
  Plan plan;
  check(Plan::make(OptimizerKind::kSgd, false, &tensor, 1, &plan));
  StepOptions options;
  options.parallel_for = run_inline;
  Random random;
  random.seed = static_cast<uint32_t>(seed) + 1u;
  std::vector<double> exact(n, 0.0);
  Hyperparameters hyper;
  hyper.lr = c.lr;
  hyper.seed = seed;
  for (int64_t t = 1; t <= c.steps; ++t) {
    if (c.random_updates) {
      for (size_t i = 0; i < n; ++i) {
        gradient[i] = 0.5f + random.normal(9, static_cast<uint32_t>(static_cast<size_t>(t) * n + i));
      }
    }
    for (size_t i = 0; i < n; ++i)
      exact[i] += static_cast<double>(static_cast<float>(c.lr)) * static_cast<double>(gradient[i]);
    hyper.step = t;
    check(plan.step(&hyper, 1, options));
  }
  check(merge_weights(c.dtype, c.master_weights, parameter.data(), tensor.correction, end.data(), c.elements));
  const int mantissa = c.dtype == DType::kFloat16 ? 10 : 7;
  const int bits = correction_bits(c.master_weights);
  double resolution = std::ldexp(1.0, std::ilogb(c.start) - mantissa - 1);
  resolution = bits == 0 ? 2.0 * resolution : resolution / (bits == 8 ? 127.0 : 32767.0);
  StallResult out;
  double moved = 0.0, expected = 0.0;
  for (size_t i = 0; i < n; ++i) {
    const double way = static_cast<double>(start[i]) - static_cast<double>(end[i]);
    moved += way;
    expected += exact[i];
    out.worst_steps = std::max(out.worst_steps, std::fabs(way - exact[i]) / resolution);
  }
  out.moved = moved / expected;
  return out;
}

}  // namespace flashoptim::fidelity
