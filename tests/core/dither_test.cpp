// The dither words: evenly spread over time, lanes and groups, uncorrelated between streams, never depending on
// anything but (seed, step, element, stream).
#include "flashoptim/core/dither.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

using core::DitherStream;

/// The word of one element; `first` is its group's first element, `lane` its place in the group.
template <DitherStream kStream>
uint32_t word(uint64_t seed, uint64_t step, uint64_t first, uint32_t lane) {
  const core::DitherKey key = core::make_dither_key(seed, step);
  const uint32_t hash =
      core::dither_group_hash<float>(key, static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32));
  return core::dither_group_start<kStream, float>(key, hash) + lane * core::kDitherLaneStep<kStream>;
}

constexpr size_t kBins = 64;
using Histogram = std::array<double, kBins>;

double chi_square(const Histogram& h) {
  double total = 0.0, sum = 0.0;
  for (double count : h) total += count;
  for (double count : h) sum += (count - total / kBins) * (count - total / kBins) / (total / kBins);
  return sum;
}

// Quantile of chi-square with 63 degrees of freedom at 1 - 10^-6 (Wilson-Hilferty, z = 4.753). Seeds are fixed, so the
// false-alarm rate of 10^-6 a statistic was spent when the constants were chosen: these tests do not flicker.
const double kQuantile = 63.0 * std::pow(1.0 - 2.0 / (9.0 * 63.0) + 4.753 * std::sqrt(2.0 / (9.0 * 63.0)), 3.0);

template <DitherStream kStream>
void expect_evenly_spread() {
  for (uint64_t seed : {0u, 1u, 12345u}) {
    Histogram over_time{}, over_lanes{}, over_groups{}, over_neighbours{};
    for (uint64_t step = 1; step <= 6400; ++step) over_time[word<kStream>(seed, step, 4096, 7) >> 26] += 1.0;
    for (uint64_t g = 0; g < 200; ++g) {
      for (uint32_t lane = 0; lane < 32; ++lane) over_lanes[word<kStream>(seed, 5, 32 * g, lane) >> 26] += 1.0;
    }
    for (uint64_t g = 0; g < 6400; ++g) over_groups[word<kStream>(seed, 5, 32 * g, 0) >> 26] += 1.0;
    // Rows of 33 start groups at odd places too.
    for (uint64_t g = 0; g < 6400; ++g)
      over_neighbours[word<kStream>(seed, 5, 33 * (g / 2) + 32 * (g % 2), 0) >> 26] += 1.0;
    EXPECT_LT(chi_square(over_time), kQuantile);
    EXPECT_LT(chi_square(over_lanes), kQuantile);
    EXPECT_LT(chi_square(over_groups), kQuantile);
    EXPECT_LT(chi_square(over_neighbours), kQuantile);
  }
}

TEST(Dither, IsEvenlySpreadOverTimeLanesAndGroups) {
  expect_evenly_spread<DitherStream::kVariance>();
  expect_evenly_spread<DitherStream::kMomentum>();
  expect_evenly_spread<DitherStream::kWeight>();
}

// What makes it better than independent numbers: in any T steps an event of probability p happens p T times within a
// few, where independent numbers would scatter by sqrt(p (1 - p) T) = 16 for T = 1000. A quadratic irrational's
// discrepancy is at most C log T with C near 1: within 4 of p T at T = 1000 with room.
template <DitherStream kStream>
void expect_low_discrepancy() {
  for (double p : {0.001, 0.01, 0.1, 0.25, 0.5, 0.9}) {
    for (uint64_t start : {1u, 777u, 1000000u}) {
      int count = 0;
      for (uint64_t step = start; step < start + 1000; ++step) count += word<kStream>(3, step, 64, 9) < p * 0x1p32;
      EXPECT_NEAR(count, 1000 * p, 4.0) << "p " << p << " from step " << start;
    }
  }
}

TEST(Dither, AnEventHappensAsOftenAsItsProbabilitySaysInEveryThousandSteps) {
  expect_low_discrepancy<DitherStream::kVariance>();
  expect_low_discrepancy<DitherStream::kMomentum>();
  expect_low_discrepancy<DitherStream::kWeight>();
}

/// |correlation| of n pairs of independent uniform numbers exceeds 5 / sqrt(n) with probability 6e-7; seeds are fixed.
template <class First, class Second>
void expect_uncorrelated(First first, Second second, const char* what) {
  constexpr int kCount = 20000;
  double sum = 0.0;
  for (int i = 0; i < kCount; ++i) {
    const double a = first(i) * 0x1p-32 - 0.5, b = second(i) * 0x1p-32 - 0.5;
    sum += 12.0 * a * b;
  }
  EXPECT_LT(std::fabs(sum / kCount), 5.0 / std::sqrt(kCount)) << what;
}

TEST(Dither, StreamsSeedsAndGroupsAreUncorrelated) {
  const auto at = [](int i) { return static_cast<uint64_t>(i) * 32; };
  const auto v = [&](int i) { return word<DitherStream::kVariance>(0, 9, at(i), 3); };
  const auto m = [&](int i) { return word<DitherStream::kMomentum>(0, 9, at(i), 3); };
  const auto w = [&](int i) { return word<DitherStream::kWeight>(0, 9, at(i), 3); };
  expect_uncorrelated(v, m, "variance and momentum");
  expect_uncorrelated(v, w, "variance and weight");
  expect_uncorrelated(m, w, "momentum and weight");
  expect_uncorrelated(v, [&](int i) { return word<DitherStream::kVariance>(1, 9, at(i), 3); }, "seeds 0 and 1");
  expect_uncorrelated(
      v, [&](int i) { return word<DitherStream::kVariance>(uint64_t{1} << 40, 9, at(i), 3); }, "high bits of the seed");
  expect_uncorrelated(
      v, [&](int i) { return word<DitherStream::kVariance>(0, 9, at(i + 1), 3); }, "neighbouring groups");
  expect_uncorrelated(
      v, [&](int i) { return word<DitherStream::kVariance>(0, 9, at(i) + (uint64_t{1} << 32), 3); },
      "2^32 elements apart");
  // Over time, for one element.
  expect_uncorrelated([](int i) { return word<DitherStream::kVariance>(0, static_cast<uint64_t>(i) + 1, 96, 3); },
                      [](int i) { return word<DitherStream::kMomentum>(0, static_cast<uint64_t>(i) + 1, 96, 3); },
                      "variance and momentum over time");
  // Streams that share a time step keep a constant phase between them, which differs from group to group: over groups
  // and time together they are uncorrelated.
  expect_uncorrelated(
      [](int i) {
        return word<DitherStream::kVariance>(0, static_cast<uint64_t>(i % 100) + 1, 32 * static_cast<uint64_t>(i / 100),
                                             3);
      },
      [](int i) {
        return word<DitherStream::kWeight>(0, static_cast<uint64_t>(i % 100) + 1, 32 * static_cast<uint64_t>(i / 100),
                                           3);
      },
      "variance and weight over time and groups");
}

TEST(Dither, TimeStepsAreOddOrLongEnoughThatAStreamDoesNotRepeatInAMillionSteps) {
  const auto period = [](uint32_t step) { return uint64_t{1} << (32 - __builtin_ctz(step)); };
  EXPECT_GE(period(core::kDitherTimeStep<DitherStream::kVariance>), uint64_t{1} << 30);
  EXPECT_GE(period(core::kDitherTimeStep<DitherStream::kMomentum>), uint64_t{1} << 30);
  EXPECT_GE(period(core::kDitherTimeStep<DitherStream::kWeight>), uint64_t{1} << 30);
}

/// Inverse of an odd number modulo 2^32 (Newton: each step doubles the correct bits, 3 to begin with).
uint32_t inverse_of(uint32_t odd) {
  uint32_t x = odd;
  for (int i = 0; i < 4; ++i) x *= 2u - odd * x;
  return x;
}

/// mix32 undone, step by step from its end.
uint32_t unmix32(uint32_t x) {
  x ^= x >> 16;
  x *= inverse_of(0x846ca68bu);
  x ^= (x >> 15) ^ (x >> 30);
  x *= inverse_of(0x7feb352du);
  return x ^ (x >> 16);
}

// Distinct groups of a tensor below 2^32 elements therefore never share a phase for one seed.
TEST(Dither, MixingIsABijection) {
  const PatternSweep sweep;
  for (uint64_t i = 0; i < sweep.count(); ++i) {
    const uint32_t x = sweep.pattern(i);
    ASSERT_EQ(unmix32(core::mix32<float>(x)), x);
  }
}

}  // namespace
}  // namespace flashoptim::test
