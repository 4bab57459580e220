#include "lab/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace flashoptim::fidelity {

namespace {

/// Largest |before - after - decay * before| beyond `resolution` of the weight; infinite for NaN.
double largest_move(const float* before, const float* after, float decay, float resolution, int64_t count) {
  float largest = 0.0f;
  int32_t has_nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float move = std::fabs(before[i] - after[i] - decay * before[i]);
    const float slack =
        resolution * (std::fabs(before[i]) > std::fabs(after[i]) ? std::fabs(before[i]) : std::fabs(after[i]));
    const float beyond = move - slack;
    has_nan |= beyond == beyond ? 0 : 1;
    largest = beyond > largest ? beyond : largest;
  }
  return has_nan != 0 ? HUGE_VAL : static_cast<double>(largest);
}

}  // namespace

Result evaluate(const Case& c, const CaseData& data, const Reference& reference, Candidate& candidate) {
  const auto begin = std::chrono::steady_clock::now();
  Result out;
  std::vector<float> before(data.weights);
  size_t next_weights = 0, next_updates = 0;
  double noise = 0.0, signal = 0.0;
  for (int64_t t = 1; t <= c.steps; ++t) {
    const Hyperparameters h = c.hyper_at(t);
    candidate.step(h, data.row(c, t));
    const float* w = candidate.weights();
    const double decay = family_of(c.optimizer) == Family::kSgd ? 0.0 : h.lr * h.weight_decay;
    const double bound = c.update_bound(h);
    if (bound > 0.0) {
      const double move = largest_move(before.data(), w, static_cast<float>(decay),
                                       static_cast<float>(candidate.weight_resolution()), c.elements);
      out.largest_update = std::max(out.largest_update, move / bound);
    }
    if (next_updates < reference.update_steps.size() && reference.update_steps[next_updates] == t) {
      const std::vector<float>& exact = reference.updates[next_updates++];
      for (size_t i = 0; i < exact.size(); ++i) {
        const double u = static_cast<double>(exact[i]);
        const double mine =
            static_cast<double>(before[i]) - static_cast<double>(w[i]) - decay * static_cast<double>(before[i]);
        noise += (mine - u) * (mine - u);
        signal += u * u;
        // Ratios of updates that are next to nothing say nothing.
        const double scale = family_of(c.optimizer) == Family::kSgd ? h.lr * static_cast<double>(data.sigma[i]) : h.lr;
        if (std::fabs(u) < 0.05 * scale || !(std::fabs(mine) < HUGE_VAL)) continue;
        const double bin = std::floor((mine / u - kRatioFirst) / kRatioWidth);
        out.ratios[static_cast<size_t>(std::clamp(bin, 0.0, kRatioBins - 1.0))] += 1;
      }
    }
    if (next_weights < reference.weight_steps.size() && reference.weight_steps[next_weights] == t) {
      const std::vector<double>& exact = reference.weights[next_weights++];
      double error = 0.0, length = 0.0;
      for (size_t i = 0; i < exact.size(); ++i) {
        const double difference = static_cast<double>(w[i]) - exact[i];
        const double moved = exact[i] - static_cast<double>(data.weights[i]);
        error += difference * difference;
        length += moved * moved;
      }
      out.error_over_time.push_back(length > 0.0 ? std::sqrt(error / length) : error > 0.0 ? HUGE_VAL : 0.0);
    }
    std::copy(w, w + c.elements, before.begin());
  }
  out.error = out.error_over_time.back();
  if (std::isnan(out.error)) out.error = HUGE_VAL;
  out.update_noise = signal > 0.0 ? std::sqrt(noise / signal) : 0.0;
  out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return out;
}

}  // namespace flashoptim::fidelity
