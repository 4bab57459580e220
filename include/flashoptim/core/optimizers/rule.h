// What an update rule is made of. A rule is one struct over decoded floats; it knows no dtype, no instruction set and
// no device. See docs/adding_an_optimizer.md.
//
//   struct MyRule {
//     static constexpr OptimizerKind kKind;        // which public optimizer it is the rule of
//     static constexpr const char* kName;          // that optimizer's name, in lower case
//     static constexpr const char* kTitle;         // as people write it; the front ends' classes are Flash<title>
//     static constexpr auto kHyperparameters;      // hyperparameter_list(...): what it reads
//     static constexpr int kSlotCount;             // states of an element, at most kMaxSlots
//     static constexpr StateSlot kSlots[2];        // name, sign, and the slot it is stored relative to
//     struct Hyper {...};                          // fp32 numbers of one step
//     static Hyper make_hyper(const Hyperparameters&);  // in double, the only place where they are rounded
//     template <class F> static F update(F w, F g, F (&s)[kSlotCount], const Hyper&);
//     static constexpr bool kDecoupledDecay;       // delta depends on w by decoupled weight decay alone
//     static double largest_update(const Hyperparameters&);  // bound of |delta| without that decay; 0: none
//   };
//
// `concept Rule` below holds a rule to it, and every back end asks for the concept. A rule without slots has arrays of
// one (kSlotArray). Optional: kWithoutMomentum = true, for the rule that its optimizer runs where momentum is 0.
//
// A rule with a variance may have its update() in three parts, and say where its own bounds change nothing. Hot paths
// use that:
//
//     template <class F> static void advance(F w, F g, F (&s)[kSlotCount], const Hyper&);  // the states
//     template <class F> static F step(const F (&s)[kSlotCount], const Hyper&);  // delta without decoupled decay
//     template <class F> static F decayed(F w, F step, const Hyper&);            // delta
//     static constexpr uint32_t kSmallestBoundingVariance, kLargestBoundingVariance;  // patterns
//     static bool variance_bounds(const Hyper&);
//     static constexpr bool kDividesRelative = true;  // update() divides every new relative slot, as it is
//
// variance_bounds() also says that update() takes no root but that of the new variance, and that a slot relative to it
// stays over that root below kLargestRelative (codecs/default_codec.h) whatever was stored.
//
// update() changes the states in place and returns delta; the weight becomes w - delta (the caller subtracts, because
// a split weight can take off less than one fp32 ULP). largest_update() is what an exact update is held against
// (core/inspect.h, benchmarks/fidelity); no step reads it.
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>

#include "flashoptim/core/lanes.h"
#include "flashoptim/optimizer_info.h"
#include "flashoptim/types.h"

namespace flashoptim::core {

enum class StateKind : int { kSigned, kUnsigned };

inline constexpr int kNoSlot = -1;

struct StateSlot {
  const char* name = "";
  StateKind kind = StateKind::kSigned;
  /// The default codec stores a signed slot relative to the square root of this unsigned slot (kNoSlot: to its group).
  int relative_to = kNoSlot;
  /// Bits of mantissa in the default codec's codes of a signed slot: 127 / 2^K octaves of range. 6 relative to a
  /// variance, where the range is narrow; alone, fewer, to cover the spread of magnitudes in a group; 0, and only
  /// alone: each group chooses 3 to 6 (docs/numerics.md).
  int mantissa_bits = 0;
  /// An average over thousands of steps, whose scale in the default codec is a power of two (codecs/default_codec.h).
  bool is_slow = false;
};

using NumberField = double Hyperparameters::*;
using FlagField = bool Hyperparameters::*;
using WholeField = int64_t Hyperparameters::*;
using SeedField = uint64_t Hyperparameters::*;

// What nvcc gives the host's compiler has parentheses that GCC warns of.
#if defined(__CUDACC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wparentheses"
#endif
/// HyperparameterInfo and which field it is about: the pointer of the field's type, the others null.
struct HyperparameterField : HyperparameterInfo {
  double Hyperparameters::*number = nullptr;
  bool Hyperparameters::*flag = nullptr;
  int64_t Hyperparameters::*whole = nullptr;
  uint64_t Hyperparameters::*seed = nullptr;
};

constexpr double value_of(const HyperparameterField& field, const Hyperparameters& p) {
  if (field.number != nullptr) return p.*field.number;
  if (field.flag != nullptr) return p.*field.flag ? 1.0 : 0.0;
  if (field.whole != nullptr) return static_cast<double>(p.*field.whole);
  return static_cast<double>(p.*field.seed);
}
/// Of a value that the field can hold.
constexpr void assign(const HyperparameterField& field, double value, Hyperparameters* p) {
  if (field.number != nullptr) p->*field.number = value;
  if (field.flag != nullptr) p->*field.flag = value != 0.0;
  if (field.whole != nullptr) p->*field.whole = static_cast<int64_t>(value);
  if (field.seed != nullptr) p->*field.seed = static_cast<uint64_t>(value);
}

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kTwo53 = 0x1p53;

constexpr HyperparameterField number_field(const char* name, double Hyperparameters::*field, double default_value,
                                           double lowest, double highest) {
  const HyperparameterInfo info{name, HyperparameterKind::kNumber, default_value, lowest, highest, true, false};
  return {info, field};
}
/// 0 <= x < 1: how much of an average stays.
constexpr HyperparameterField beta_field(const char* name, double Hyperparameters::*field, double default_value) {
  return number_field(name, field, default_value, 0.0, 1.0);
}
constexpr HyperparameterField nonnegative_field(const char* name, double Hyperparameters::*field,
                                                double default_value) {
  return number_field(name, field, default_value, 0.0, kInfinity);
}
constexpr HyperparameterField finite_field(const char* name, NumberField field, double default_value) {
  const HyperparameterInfo info{name, HyperparameterKind::kNumber, default_value, -kInfinity, kInfinity, false, false};
  return {info, field};
}
constexpr HyperparameterField flag_field(const char* name, bool Hyperparameters::*field, bool default_value) {
  const HyperparameterInfo info{name, HyperparameterKind::kFlag, default_value ? 1.0 : 0.0, 0.0, 1.0, true, true};
  return {info, nullptr, field};
}
constexpr HyperparameterField whole_field(const char* name, int64_t Hyperparameters::*field, int64_t default_value,
                                          int64_t lowest) {
  const HyperparameterInfo info{
      name, HyperparameterKind::kWhole, static_cast<double>(default_value), static_cast<double>(lowest), kTwo53, true,
      false};
  return {info, nullptr, nullptr, field};
}

template <int n>
struct HyperparameterList {
  static constexpr int kCount = n;
  HyperparameterField fields[n];
};

/// Defaults of what every optimizer has.
struct CommonDefaults {
  double lr = 1e-3;
  double weight_decay = 0.0;
};

/// The six that every optimizer has (optimizer_info.h) and the rule's own.
template <class... Own>
constexpr HyperparameterList<static_cast<int>(kCommonHyperparameters + sizeof...(Own))> hyperparameter_list(
    const CommonDefaults& defaults, const Own&... own) {
  constexpr HyperparameterInfo kSeed{"seed", HyperparameterKind::kWhole, 0.0, 0.0, kTwo53, true, false};
  return {{nonnegative_field("lr", &Hyperparameters::lr, defaults.lr),
           nonnegative_field("weight_decay", &Hyperparameters::weight_decay, defaults.weight_decay),
           nonnegative_field("decay_lr", &Hyperparameters::decay_lr, 0.0),
           flag_field("maximize", &Hyperparameters::maximize, false),
           whole_field("step", &Hyperparameters::step, 1, 1),
           {kSeed, nullptr, nullptr, nullptr, &Hyperparameters::seed},
           own...}};
}

/// Entries of an array with one per slot, which must have one.
template <class Rule>
inline constexpr int kSlotArray = Rule::kSlotCount > 0 ? Rule::kSlotCount : 1;

/// Whether a rule is the one for momentum = 0.
template <class Rule>
inline constexpr bool kIsWithoutMomentum = requires { requires Rule::kWithoutMomentum; };

/// Whether a rule says where its variances vouch for its bounds.
template <class Rule>
inline constexpr bool kHasBoundingVariance = requires { Rule::kLargestBoundingVariance; };

/// Whether slots can be stored: a slot is relative to an unsigned one that is relative to none.
template <class Rule>
constexpr bool are_slots_valid() {
  if (Rule::kSlotCount < 0 || Rule::kSlotCount > kMaxSlots) return false;
  for (int k = 0; k < Rule::kSlotCount; ++k) {
    const StateSlot& slot = Rule::kSlots[k];
    const bool is_signed = slot.kind == StateKind::kSigned, is_relative = slot.relative_to != kNoSlot;
    if (slot.mantissa_bits < 0 || slot.mantissa_bits > 6 || slot.name[0] == '\0') return false;
    if (slot.is_slow && (!is_signed || slot.mantissa_bits == 0)) return false;
    if (!is_relative) continue;
    if (slot.relative_to < 0 || slot.relative_to >= Rule::kSlotCount || !is_signed || slot.mantissa_bits == 0)
      return false;
    const StateSlot& base = Rule::kSlots[slot.relative_to];
    if (base.kind != StateKind::kUnsigned || base.relative_to != kNoSlot) return false;
  }
  return true;
}

template <class R>
concept Rule = requires(const Hyperparameters& p, float (&s)[kSlotArray<R>], const typename R::Hyper& h) {
  { R::kKind } -> std::convertible_to<OptimizerKind>;
  { R::kName } -> std::convertible_to<const char*>;
  { R::kTitle } -> std::convertible_to<const char*>;
  { R::kHyperparameters.fields[0] } -> std::convertible_to<HyperparameterInfo>;
  { R::kDecoupledDecay } -> std::convertible_to<bool>;
  { R::make_hyper(p) } -> std::same_as<typename R::Hyper>;
  { R::largest_update(p) } -> std::same_as<double>;
  { R::template update<float>(0.0f, 0.0f, s, h) } -> std::same_as<float>;
} && are_slots_valid<R>();

/// base^exponent by repeated squaring: the same double operations, so the same bits, on host and device.
FLASHOPTIM_HD double integer_power(double base, int64_t exponent) {
  double result = 1.0;
  for (uint64_t n = static_cast<uint64_t>(exponent); n != 0; n >>= 1) {
    if (n & 1u) result *= base;
    base *= base;
  }
  return result;
}

FLASHOPTIM_HD double double_sqrt(double value) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(value);
#elif defined(__CUDACC__)
  return ::sqrt(value);
#else
  return __builtin_sqrt(value);
#endif
}

/// ln x for 0 < x <= 1 and e^x for x <= 0, within a few roundings. Their own, because libraries' differ in the last bit
/// from one machine to the next, and a step's numbers are made on hosts and on devices. Of x = m 2^e with m near 1,
/// ln m = 2 artanh((m - 1) / (m + 1)).
FLASHOPTIM_HD double natural_log(double x) {
  double exponent = 0.0;
  for (; x < 0.70710678118654752; x *= 2.0) exponent -= 1.0;
  const double s = (x - 1.0) / (x + 1.0), square = s * s;
  double sum = 0.0;
  for (int k = 25; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return exponent * 0.69314718055994531 + 2.0 * s * sum;
}
FLASHOPTIM_HD double exponential(double x) {
  if (x < -700.0) return 0.0;
  const int64_t halvings = static_cast<int64_t>(x * -1.4426950408889634 + 0.5);
  // ln 2 in two parts, the first short enough for an exact product.
  const double n = static_cast<double>(halvings), r = (x + n * 0x1.62e42fefap-1) + n * 0x1.cf79abc9e3b3ap-40;
  double sum = 1.0;
  for (int k = 18; k >= 1; --k) sum = 1.0 + sum * r / k;
  return sum * integer_power(0.5, halvings);
}

/// Share of w that decoupled weight decay takes off in one step.
FLASHOPTIM_HD double decoupled_decay(const Hyperparameters& p) {
  return p.decay_lr > 0.0 ? p.weight_decay * (p.lr / p.decay_lr) : p.weight_decay * p.lr;
}

/// What all gradients are multiplied by: scale / *divisor * *clip_coefficient, in this order; null is left out. The
/// division is IEEE's (-prec-div=true in CUDA).
FLASHOPTIM_HD float gradient_factor(float scale, const float* divisor, const float* clip_coefficient) {
  if (divisor != nullptr) scale = scale / *divisor;
  if (clip_coefficient != nullptr) scale = scale * *clip_coefficient;
  return scale;
}

/// The same for one set of hyperparameters: negated where it maximizes.
FLASHOPTIM_HD float directed_factor(float factor, const Hyperparameters& p) { return p.maximize ? -factor : factor; }

}  // namespace flashoptim::core
