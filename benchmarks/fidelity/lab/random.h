// Counter-based random numbers for gradients: a function of (seed, stream, counter), written so that loops vectorise
// and every machine draws the same bits (+ - * / sqrt and exact conversions only).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace flashoptim::fidelity {

struct Random {
  uint32_t seed = 0;

  uint32_t bits(uint32_t stream, uint32_t counter) const {
    uint32_t x = counter * 0x9e3779b1u + (seed ^ (stream * 0x632be5abu));
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x = x * 0xc2b2ae35u + stream;
    x ^= x >> 16;
    x *= 0x7feb352du;
    return x ^ (x >> 15);
  }
  /// In (0, 1), 2^23 values, all exact: with one bit more the last would round to 1.
  float uniform(uint32_t stream, uint32_t counter) const {
    return (static_cast<float>(static_cast<int32_t>(bits(stream, counter) >> 9)) + 0.5f) * 0x1p-23f;
  }
  /// N(0, 1) within 5.3, by the inverse of the distribution function.
  float normal(uint32_t stream, uint32_t counter) const { return inverse_normal(uniform(stream, counter)); }

  /// Natural logarithm of a normal number, within 2e-7.
  static float log(float x) {
    uint32_t pattern;
    std::memcpy(&pattern, &x, sizeof pattern);
    const int32_t exponent = static_cast<int32_t>(pattern - 0x3f3504f3u) >> 23;
    pattern -= static_cast<uint32_t>(exponent) << 23;
    float mantissa;
    std::memcpy(&mantissa, &pattern, sizeof mantissa);
    const float y = mantissa - 1.0f;
    const float square = y * y;
    float p = 7.0376836292e-2f;
    p = p * y - 1.1514610310e-1f;
    p = p * y + 1.1676998740e-1f;
    p = p * y - 1.2420140846e-1f;
    p = p * y + 1.4249322787e-1f;
    p = p * y - 1.6668057665e-1f;
    p = p * y + 2.0000714765e-1f;
    p = p * y - 2.4999993993e-1f;
    p = p * y + 3.3333331174e-1f;
    const float e = static_cast<float>(exponent);
    return y * square * p - 0.5f * square + y + e * 0.693147182f;
  }

  /// M. Giles, "Approximating the erfinv function".
  static float inverse_normal(float u) {
    const float x = 2.0f * u - 1.0f;
    const float w = -log(4.0f * u * (1.0f - u));
    const float a = w - 2.5f;
    float p = 2.81022636e-08f;
    p = p * a + 3.43273939e-07f;
    p = p * a - 3.5233877e-06f;
    p = p * a - 4.39150654e-06f;
    p = p * a + 0.00021858087f;
    p = p * a - 0.00125372503f;
    p = p * a - 0.00417768164f;
    p = p * a + 0.246640727f;
    p = p * a + 1.50140941f;
    const float b = std::sqrt(w < 0.0f ? 0.0f : w) - 3.0f;
    float q = -0.000200214257f;
    q = q * b + 0.000100950558f;
    q = q * b + 0.00134934322f;
    q = q * b - 0.00367342844f;
    q = q * b + 0.00573950773f;
    q = q * b - 0.0076224613f;
    q = q * b + 0.00943887047f;
    q = q * b + 1.00167406f;
    q = q * b + 2.83297682f;
    return 1.41421356f * x * (w < 5.0f ? p : q);
  }
};

}  // namespace flashoptim::fidelity
