#include "libtorch/ops/plan_cache.h"

#include <algorithm>
#include <utility>

namespace flashoptim::ops {
namespace {

/// Equal in everything that a plan was made for. Gradient and hyperparameter index are set anew in every step.
bool same_tensor(const ParameterTensors& a, const ParameterTensors& b) {
  return a.parameter == b.parameter && a.correction == b.correction &&
         std::equal(a.states, a.states + kMaxSlots, b.states) && std::equal(a.scales, a.scales + kMaxSlots, b.scales) &&
         a.layout.rows == b.layout.rows && a.layout.row_size == b.layout.row_size &&
         a.first_element == b.first_element && a.parameter_dtype == b.parameter_dtype &&
         a.gradient_dtype == b.gradient_dtype && a.master_weights == b.master_weights && a.state_codec == b.state_codec;
}

}  // namespace

PlanCache& PlanCache::instance() {
  // Never destroyed: a step may still run in another thread while the process ends.
  static PlanCache& cache = *new PlanCache;
  return cache;
}

uint64_t PlanCache::hash(OptimizerKind optimizer, bool has_momentum, const std::vector<ParameterTensors>& tensors) {
  uint64_t h = static_cast<uint64_t>(optimizer) * 2 + (has_momentum ? 1 : 0);
  const auto mix = [&h](uint64_t value) { h = (h ^ value) * 0x9e3779b97f4a7c15u, h ^= h >> 29; };
  mix(tensors.size());
  for (const ParameterTensors& t : tensors) mix(reinterpret_cast<uintptr_t>(t.parameter));
  return h;
}

std::unique_ptr<PlanCache::Entry> PlanCache::take(OptimizerKind optimizer, bool has_momentum,
                                                  const std::vector<ParameterTensors>& tensors) {
  const uint64_t key = hash(optimizer, has_momentum, tensors);
  const auto matches = [&](const Entry& entry) {
    if (entry.optimizer != optimizer || entry.has_momentum != has_momentum ||
        entry.plan.size() != static_cast<int64_t>(tensors.size())) {
      return false;
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!same_tensor(entry.plan.tensor(static_cast<int64_t>(i)), tensors[i])) return false;
    }
    return true;
  };
  const std::lock_guard lock(mutex_);
  const auto [begin, end] = slots_.equal_range(key);
  for (auto slot = begin; slot != end; ++slot) {
    if (!matches(*slot->second.entry)) continue;
    std::unique_ptr<Entry> entry = std::move(slot->second.entry);
    slots_.erase(slot);
    return entry;
  }
  return nullptr;
}

void PlanCache::put(std::unique_ptr<Entry> entry) {
  const std::lock_guard lock(mutex_);
  // The same parameters with other states or another layout: the older plan is out of date (states were loaded anew).
  // One or two stay, for alternating uses such as two threads.
  if (slots_.count(entry->hash) >= 2 || slots_.size() >= kMaxPlans) {
    const auto older = [](const auto& a, const auto& b) { return a.second.last_use < b.second.last_use; };
    auto [begin, end] = slots_.equal_range(entry->hash);
    if (slots_.size() >= kMaxPlans) begin = slots_.begin(), end = slots_.end();
    slots_.erase(std::min_element(begin, end, older));
  }
  const uint64_t key = entry->hash;
  slots_.emplace(key, Slot{std::move(entry), ++uses_});
}

}  // namespace flashoptim::ops
