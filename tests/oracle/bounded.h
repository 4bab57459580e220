// A real number with a bound on how far an fp32 evaluation of the same expression can be from it: running error
// analysis (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3).
//
// Every operation is charged TWO fp32 roundings (2 u of its result, u = 2^-24, and 2^-149 where that is subnormal), and
// every constant one. The library may order an expression otherwise, m / (sqrt(v) k + eps) s for lr (m / b1) / (sqrt(v
// / b2) + eps), but no order of these expressions takes more than twice the roundings of the oracle's on any path from
// an input to the result; so the bound holds for each, and nothing about it is tuned.
#pragma once

#include <algorithm>
#include <cmath>

namespace flashoptim::oracle {

inline constexpr double kFloatUnit = 0x1p-24;

struct Bounded {
  double value = 0.0;
  double error = 0.0;

  Bounded() = default;
  /// A constant, which the library rounds to fp32 once.
  explicit Bounded(double constant) : value(constant), error(kFloatUnit * std::fabs(constant)) {}
  Bounded(double exact_value, double error_bound) : value(exact_value), error(error_bound) {}

  explicit operator double() const { return value; }

  static Bounded rounded(double value, double error) {
    return {value, error + 2.0 * kFloatUnit * (std::fabs(value) + error) + 0x1p-149};
  }
};

inline Bounded operator+(Bounded a, Bounded b) { return Bounded::rounded(a.value + b.value, a.error + b.error); }
inline Bounded operator-(Bounded a, Bounded b) { return Bounded::rounded(a.value - b.value, a.error + b.error); }
inline Bounded operator*(Bounded a, Bounded b) {
  return Bounded::rounded(a.value * b.value,
                          std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
}
/// The divisors here are bounded away from 0 (bias corrections; a root plus eps); one that is not has no bound.
inline Bounded operator/(Bounded a, Bounded b) {
  const double quotient = a.value / b.value, smallest = std::fabs(b.value) - b.error;
  if (!(smallest > 0.0)) return {quotient, INFINITY};
  return Bounded::rounded(quotient, (a.error + std::fabs(quotient) * b.error) / smallest);
}
inline Bounded root(Bounded v) {
  const double r = std::sqrt(v.value), low = std::sqrt(std::max(v.value - v.error, 0.0));
  return Bounded::rounded(r, std::max(r - low, std::sqrt(v.value + v.error) - r));
}
/// Neither moves two numbers apart, and the bound to the other side is rounded once.
inline Bounded clamped(Bounded v, Bounded limit) {
  return {std::clamp(v.value, -limit.value, limit.value), v.error + limit.error};
}
inline Bounded at_least(Bounded v, Bounded least) { return {std::max(v.value, least.value), v.error + least.error}; }
/// Closer to 0 than its error, a number may have any sign.
inline Bounded sign(Bounded v) {
  const double s = v.value > 0.0 ? 1.0 : v.value < 0.0 ? -1.0 : 0.0;
  return {s, std::fabs(v.value) > v.error || (v.value == 0.0 && v.error <= 0x1p-140) ? 0.0 : 2.0};
}

}  // namespace flashoptim::oracle
