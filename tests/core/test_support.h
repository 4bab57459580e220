// What the test programs share: random numbers, two threads, and the choice between the default and the long run.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace flashoptim::test {

/// FLASHOPTIM_TEST_ALL=1: the exhaustive sweeps.
inline bool test_all() {
  const char* value = std::getenv("FLASHOPTIM_TEST_ALL");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// Under sanitizers, some 10 to 20 times slower, sweeps are this much thinner.
inline constexpr uint64_t kThinning = kSanitized ? 64 : 1;

/// SplitMix64 (Steele, Lea & Flood 2014): any seed is a good one.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint32_t bits() { return static_cast<uint32_t>(next() >> 32); }
  /// In [0, bound).
  uint64_t below(uint64_t bound) { return next() % bound; }
  /// In [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  /// Sum of 12 uniforms: near enough to normal, within 6.
  double normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// Runs body(begin, end) over chunks of [0, count) on two threads.
template <class Body>
void on_two_threads(uint64_t count, uint64_t chunk, Body body) {
  std::atomic<uint64_t> next{0};
  const auto work = [&] {
    for (;;) {
      const uint64_t begin = next.fetch_add(chunk);
      if (begin >= count) return;
      body(begin, std::min(begin + chunk, count));
    }
  };
  std::thread other(work);
  work();
  other.join();
}

/// fp32 patterns to visit: all 2^32, or one of every `stride` at a place that differs from stride to stride.
struct PatternSweep {
  uint64_t stride = test_all() ? 1 : 10 * kThinning;
  uint64_t count() const { return (uint64_t{1} << 32) / stride; }
  uint32_t pattern(uint64_t i) const {
    if (stride == 1) return static_cast<uint32_t>(i);
    return static_cast<uint32_t>(i * stride + ((i * 0x9e3779b97f4a7c15u) >> 32) % stride);
  }
};

}  // namespace flashoptim::test
