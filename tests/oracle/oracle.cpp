// The oracle for other languages: steps of many elements, with a bound on what fp32 may be off (bounded.h).
#include "tests/oracle/oracle.h"

#include <cmath>
#include <string>

#include "tests/oracle/bounded.h"

namespace flashoptim::oracle {
namespace {

bool is_same_but_for_case(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::tolower(static_cast<unsigned char>(a[i])) != std::tolower(static_cast<unsigned char>(b[i]))) return false;
  }
  return true;
}

/// The rule of an optimizer's public name: "sgd" is Sgd, and SgdPlain where momentum is 0 and there is such.
Step<Bounded> find_rule(const std::string& optimizer, const Settings& s) {
  Step<Bounded> found = nullptr;
  for (const Named<Bounded>& one : all<Bounded>()) {
    if (is_same_but_for_case(one.name, optimizer) && found == nullptr) found = one.step;
    if (is_same_but_for_case(one.name, optimizer + "Plain") && s.momentum == 0.0) found = one.step;
  }
  return found;
}

}  // namespace
}  // namespace flashoptim::oracle

/// `count` elements, each slot of `states` an array of them. Changes states and weights, and says in `bounds` how far
/// an fp32 evaluation of the update may be off. 0 where the optimizer or a setting is not known.
extern "C" __attribute__((visibility("default"))) int flashoptim_oracle_step(
    const char* optimizer, int64_t settings, const char* const* names, const double* values, int64_t count,
    double* weights, const double* gradients, int64_t slots, double* const* states, double* bounds) {
  using namespace flashoptim::oracle;
  Settings s;
  for (int64_t i = 0; i < settings; ++i) {
    double* const setting = s.find(names[i]);
    if (setting == nullptr) return 0;
    *setting = values[i];
  }
  const Step<Bounded> step = find_rule(optimizer, s);
  if (step == nullptr || slots > kMaxStates) return 0;
  for (int64_t i = 0; i < count; ++i) {
    Element<Bounded> e{{weights[i], 0.0}, {}};
    for (int64_t k = 0; k < slots; ++k) e.states[k] = {states[k][i], 0.0};
    const Bounded delta = step(e, {s.maximize != 0.0 ? -gradients[i] : gradients[i], 0.0}, s);
    weights[i] -= delta.value;
    bounds[i] = delta.error;
    for (int64_t k = 0; k < slots; ++k) states[k][i] = e.states[k].value;
  }
  return 1;
}
