// Updates of split weights: unbiased to the last bit that fp32 can hold, never stalled, and defined at the ends.
//
// The expectation over the dither is taken over equally spaced words, not over random ones: it is exact up to one
// part in their number, and no test here can fail by chance.
#include <gtest/gtest.h>

#include <cmath>

#include "flashoptim/core/weight_split.h"
#include "flashoptim/step.h"
#include "tests/core/reference_formats.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

constexpr double kUnit = 0x1p-24;  // fp32's relative rounding error

template <class Narrow>
const ReferenceFormat& reference() {
  return Narrow::kBias == 127 ? kReferenceBFloat16 : kReferenceFloat16;
}

template <int kBits>
constexpr int kLargest = kBits == 8 ? 127 : 32767;

/// n + (c / N) h, exactly enough.
template <class Narrow, int kBits>
double value_of(uint32_t n, int c) {
  return reference<Narrow>().decode(n) + reference<Narrow>().half_ulp(n) * c / kLargest<kBits>;
}

template <class Narrow, int kBits>
core::SplitWeight<float> update(uint32_t n, int c, float delta, uint32_t dither) {
  const float value =
      core::correction_value<Narrow, kBits, float>(Narrow::template widen<float>(n), static_cast<uint32_t>(c));
  return core::split_update_dithered<Narrow, kBits, float>(n, static_cast<uint32_t>(c), value, delta, dither);
}

template <class Narrow, int kBits>
void expect_zero_changes_nothing(int stride) {
  Random random(1);
  for (uint32_t n = 0; n < 0x10000u; ++n) {
    if (reference<Narrow>().is_nan(n)) continue;
    for (int c = -kLargest<kBits>; c <= kLargest<kBits>; c += stride) {
      const auto out = update<Narrow, kBits>(n, c, (c & 1) != 0 ? 0.0f : -0.0f, random.bits());
      ASSERT_TRUE(out.narrow == n && static_cast<int>(out.correction) == c) << "n " << n << " c " << c;
    }
  }
}

TEST(WeightUpdate, ZeroChangesNoBitOfAnyPairOf8Bits) {
  expect_zero_changes_nothing<core::BFloat16, 8>(kSanitized ? 61 : 1);
  expect_zero_changes_nothing<core::Float16, 8>(kSanitized ? 61 : 1);
}
TEST(WeightUpdate, ZeroChangesNoBitOfPairsOf16Bits) {
  const int stride = test_all() ? 1 : kSanitized ? 4099 : 257;
  expect_zero_changes_nothing<core::BFloat16, 16>(stride);
  expect_zero_changes_nothing<core::Float16, 16>(stride);
}

// The same through whole steps, of every way to keep a weight: gradient 0, no decay.
TEST(WeightUpdate, AStepThatChangesNothingChangesNoBitOfAnyKindOfWeight) {
  constexpr int kCorrections = kSanitized ? 5 : 255;
  const int64_t count = 0x10000 * int64_t{kCorrections};
  std::vector<float> gradient(static_cast<size_t>(count), 0.0f);
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const ReferenceFormat& format = dtype == DType::kBFloat16 ? kReferenceBFloat16 : kReferenceFloat16;
    for (int master = 0; master < 6; ++master) {
      const bool wide = master == static_cast<int>(MasterWeights::kCorrection16) ||
                        master == static_cast<int>(MasterWeights::kCorrection16Nearest);
      std::vector<uint16_t> parameter(static_cast<size_t>(count)), correction16(static_cast<size_t>(count));
      std::vector<int8_t> correction8(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) {
        const size_t k = static_cast<size_t>(i);
        const uint32_t n = static_cast<uint32_t>(i) & 0xffffu;
        // Finite weights: NaN becomes the canonical one, and a decay of 0 times infinity is NaN.
        parameter[k] = static_cast<uint16_t>(format.is_nan(n) || format.is_infinite(n) ? 0 : n);
        const int c = kCorrections == 255 ? static_cast<int>(i >> 16) - 127 : (static_cast<int>(i >> 16) - 2) * 63 + 1;
        correction8[k] = static_cast<int8_t>(c);
        correction16[k] = static_cast<uint16_t>(c * 258 + (c > 0 ? 1 : c < 0 ? -1 : 0));  // up to +-32767
      }
      const std::vector<uint16_t> parameter_before = parameter, correction16_before = correction16;
      const std::vector<int8_t> correction8_before = correction8;
      ParameterTensors t;
      t.parameter = parameter.data();
      t.gradient = gradient.data();
      t.correction = wide ? static_cast<void*>(correction16.data()) : static_cast<void*>(correction8.data());
      t.layout = {1, count};
      t.parameter_dtype = dtype;
      t.master_weights = static_cast<MasterWeights>(master);
      Plan plan;
      ASSERT_TRUE(Plan::make(OptimizerKind::kSgd, false, &t, 1, &plan).is_ok());
      const Hyperparameters hyper;
      ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
      EXPECT_TRUE(parameter == parameter_before) << format.name << " master " << master;
      EXPECT_TRUE(correction8 == correction8_before) << format.name << " master " << master;
      EXPECT_TRUE(correction16 == correction16_before) << format.name << " master " << master;
    }
  }
}

/// The expected weight after an update is w - delta, within what the fp32 operations of the update can lose:
///   2 u h       c / N times h: its constant and the product rounded (u = 2^-24)
///   u |rest|    rest = that - delta
///   u |n - n'|  where the new narrow value is so far that the difference does not fit
///   2 u h'      the new rest, and its product with N
///   2^-149      the same products where they are subnormal
///   h'/N (2^-f + 1/M)   f bits of fixed point cut towards zero; M dither words
/// The new narrow value itself is nearest to the fp32 sum n + rest, within h' + u |w'| of the exact weight; what lies
/// beyond h' cannot be stored.
template <class Narrow, int kBits>
void expect_unbiased(uint32_t n, int c, float delta) {
  constexpr uint32_t kWords = kSanitized ? 64 : 512;
  constexpr double kFraction = kBits == 8 ? 0x1p-23 : 0x1p-15;
  const ReferenceFormat& format = reference<Narrow>();
  const double exact = value_of<Narrow, kBits>(n, c) - static_cast<double>(delta);
  double sum = 0.0;
  uint32_t n_new = 0;
  for (uint32_t k = 0; k < kWords; ++k) {
    const auto out = update<Narrow, kBits>(n, c, delta, k * (0xffffffffu / kWords + 1u));
    ASSERT_LE(std::abs(static_cast<int>(out.correction)), kLargest<kBits>);
    if (k == 0) n_new = out.narrow;
    ASSERT_EQ(out.narrow, n_new) << "the narrow value does not depend on the dither";
    if (format.is_infinite(n_new)) break;
    sum += value_of<Narrow, kBits>(out.narrow, static_cast<int>(out.correction)) / kWords;
  }
  const double h = format.half_ulp(n), from = format.decode(n);
  if (format.is_infinite(n_new)) {
    const double largest = format.decode(format.infinity() - 1u);
    ASSERT_GE(std::fabs(exact),
              largest + format.half_ulp(format.infinity() - 1u) * (1.0 - 2.0 / kLargest<kBits>)-kUnit * largest);
    return;
  }
  const double h_new = format.half_ulp(n_new), to = format.decode(n_new);
  const double beyond = std::fabs(exact - to) - h_new;
  ASSERT_LE(beyond, 2 * kUnit * (std::fabs(exact) + std::fabs(delta) + h))
      << "n " << n << " c " << c << " delta " << delta;
  const double expected = beyond <= 0.0 ? exact : to + std::copysign(h_new, exact - to);
  const double tolerance =
      kUnit * (2 * h + (h + std::fabs(static_cast<double>(delta))) + std::fabs(from - to) + 2 * h_new) + 0x1p-149 +
      h_new / kLargest<kBits> * (kFraction + 1.0 / kWords);
  ASSERT_LE(std::fabs(sum - expected), tolerance)
      << format.name << ' ' << kBits << " bits, n 0x" << std::hex << n << std::dec << " c " << c << " delta " << delta
      << ": off by " << (sum - expected) / (h_new / kLargest<kBits>) << " correction steps";
}

template <class Narrow, int kBits>
void expect_unbiased_everywhere() {
  Random random(2);
  const ReferenceFormat& format = reference<Narrow>();
  const int count = kSanitized ? 300 : test_all() ? 100000 : 6000;
  for (int i = 0; i < count; ++i) {
    uint32_t n = random.bits() & 0xffffu;
    if (i % 4 == 1) n &= ~((1u << format.mantissa_bits) - 1u);            // powers of two
    if (i % 4 == 2) n |= (1u << format.mantissa_bits) - 1u;               // and the values just below one
    if (i % 16 == 3) n &= 0x8000u | ((1u << format.mantissa_bits) - 1u);  // subnormals
    if (i % 32 == 7) n = 0;
    if (format.is_nan(n) || format.is_infinite(n)) continue;
    const int c = i % 5 == 0 ? (i % 2 == 0 ? kLargest<kBits> : -kLargest<kBits>)
                             : static_cast<int>(random.below(2 * kLargest<kBits> + 1)) - kLargest<kBits>;
    const double step = format.half_ulp(n) / kLargest<kBits>, w = std::fabs(value_of<Narrow, kBits>(n, c));
    const double sign = random.below(2) == 0 ? 1.0 : -1.0;
    const double deltas[] = {
        step * std::pow(10.0, -4.0 + 5.0 * random.uniform()),  // far below one step of the correction, and some steps
        std::max(w, step) * std::pow(10.0, -8.0 + 8.0 * random.uniform()),  // parts of the weight
        std::max(w, step) * std::pow(10.0, 4.0 * random.uniform()),         // more than the weight
    };
    for (double delta : deltas) {
      if (delta > 3e38) continue;
      expect_unbiased<Narrow, kBits>(n, c, static_cast<float>(sign * delta));
      if (::testing::Test::HasFatalFailure()) return;
    }
    // Exactly to zero, and across a binade.
    expect_unbiased<Narrow, kBits>(n, c, static_cast<float>(value_of<Narrow, kBits>(n, c)));
    expect_unbiased<Narrow, kBits>(n, c, static_cast<float>(0.75 * value_of<Narrow, kBits>(n, c)));
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(WeightUpdate, IsUnbiasedForBFloat16With8Bits) { expect_unbiased_everywhere<core::BFloat16, 8>(); }
TEST(WeightUpdate, IsUnbiasedForBFloat16With16Bits) { expect_unbiased_everywhere<core::BFloat16, 16>(); }
TEST(WeightUpdate, IsUnbiasedForFloat16With8Bits) { expect_unbiased_everywhere<core::Float16, 8>(); }
TEST(WeightUpdate, IsUnbiasedForFloat16With16Bits) { expect_unbiased_everywhere<core::Float16, 16>(); }

TEST(WeightUpdate, OverflowGivesInfinityWhichStaysAndNanIsCanonical) {
  const auto check = [](auto narrow) {
    using Narrow = decltype(narrow);
    const ReferenceFormat& format = reference<Narrow>();
    for (uint32_t dither : {0u, 0x80000000u, 0xffffffffu}) {
      const uint32_t largest = format.infinity() - 1u, infinity = format.infinity();
      const float far = static_cast<float>(format.decode(largest));
      EXPECT_EQ((update<Narrow, 8>(largest, 127, -far, dither).narrow), infinity);
      EXPECT_EQ((update<Narrow, 8>(largest | 0x8000u, -127, far, dither).narrow), infinity | 0x8000u);
      EXPECT_EQ((update<Narrow, 8>(infinity, 0, 1.0f, dither).narrow), infinity) << format.name << ": infinity - 1";
      EXPECT_EQ((update<Narrow, 8>(infinity | 0x8000u, 0, 1.0f, dither).narrow), infinity | 0x8000u);
      EXPECT_EQ((update<Narrow, 8>(0x1234u, 5, INFINITY, dither).narrow), infinity | 0x8000u);
      EXPECT_EQ((update<Narrow, 8>(0x1234u, 5, NAN, dither).narrow), format.canonical_nan());
      EXPECT_EQ((update<Narrow, 8>(infinity, 0, INFINITY, dither).narrow), format.canonical_nan())
          << "infinity - infinity";
      EXPECT_EQ((update<Narrow, 8>(format.canonical_nan(), 0, 1.0f, dither).narrow), format.canonical_nan());
      // A gigantic update that stays in range ends near -delta.
      const auto out = update<Narrow, 8>(0x1234u, 5, far * 0.5f, dither);
      EXPECT_EQ(out.narrow, format.encode(bits_of(far * -0.5f)));
    }
  };
  check(core::BFloat16{});
  check(core::Float16{});
}

/// E[round_dithered(w)] == w over all dither words that differ, for every kind of w that neither overflows nor is NaN.
template <class Narrow>
void expect_rounding_unbiased() {
  const ReferenceFormat& format = reference<Narrow>();
  constexpr int kDropped = 23 - Narrow::kMantissaBits;
  Random random(3);
  for (int i = 0; i < (kSanitized ? 20 : 400); ++i) {
    float w = float_of(random.bits());
    if (i % 2 == 1) w = static_cast<float>(format.decode(random.bits() & 0x7fffu) * (0.5 + random.uniform()));
    if (i % 8 == 3) w = static_cast<float>(std::ldexp(2.0 * random.uniform() - 1.0, 2 - format.bias()));  // subnormals
    if (std::isnan(w) || std::fabs(w) >= format.decode(format.infinity() - 1u)) continue;
    double sum = 0.0;
    for (uint32_t k = 0; k < (1u << kDropped); ++k) {
      const double rounded = format.decode(core::round_dithered<Narrow, float>(w, k << (32 - kDropped)));
      const double quantum = 2.0 * format.half_ulp(format.encode(bits_of(w)));
      ASSERT_LT(std::fabs(rounded - w), quantum) << "not a neighbour of " << w;
      sum += rounded;
    }
    const double mean = sum / (1u << kDropped);
    // Exact where fp32 has kDropped digits more; in the narrow type's subnormals the digits below the dither are cut.
    const double unit = 2.0 * format.half_ulp(0);
    const bool subnormal = std::fabs(w) < std::ldexp(1.0, 1 - format.bias());
    ASSERT_LE(std::fabs(mean - w), subnormal && Narrow::kBias != 127 ? unit / (1u << (kDropped - 1)) : 0.0) << w;
  }
}

TEST(WeightUpdate, RoundingWithoutCorrectionIsUnbiasedForBFloat16) { expect_rounding_unbiased<core::BFloat16>(); }
TEST(WeightUpdate, RoundingWithoutCorrectionIsUnbiasedForFloat16) { expect_rounding_unbiased<core::Float16>(); }

TEST(WeightUpdate, RoundingWithoutCorrectionKeepsNarrowValuesInfinitiesAndNanWithEveryDither) {
  for (uint32_t n = 0; n < 0x10000u; ++n) {
    for (uint32_t dither : {0u, 0x7fffffffu, 0xffffffffu}) {
      const uint32_t b = core::round_dithered<core::BFloat16, float>(core::BFloat16::widen<float>(n), dither);
      const uint32_t h = core::round_dithered<core::Float16, float>(core::Float16::widen<float>(n), dither);
      ASSERT_EQ(b, kReferenceBFloat16.is_nan(n) ? kReferenceBFloat16.canonical_nan() : n) << dither;
      ASSERT_EQ(h, kReferenceFloat16.is_nan(n) ? kReferenceFloat16.canonical_nan() : n) << dither;
    }
  }
  const float just_in_range = 65519.0f;
  EXPECT_EQ((core::round_dithered<core::Float16, float>(just_in_range, 0xffffffffu)), 0x7bffu);
}

/// Issue 4, item 4: 1,000 equal updates move the mean of 4,096 weights by 1,000 lr within 2 %.
TEST(WeightUpdate, ThousandEqualUpdatesMoveBySumWhereNearestRoundingStalls) {
  constexpr int64_t kCount = kSanitized ? 512 : 4096;
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (MasterWeights master : {MasterWeights::kCorrection8, MasterWeights::kCorrection16}) {
      for (float start : {1.0f, 0.1f, 1e-3f, 30.0f}) {
        for (double lr : {1e-3, 1.5e-5, 1e-5, 1e-6, 1e-7}) {
          std::vector<float> weights(kCount, start), gradient(kCount, 1.0f);
          std::vector<uint16_t> parameter(kCount), correction(kCount);
          ASSERT_TRUE(
              split_weights(dtype, master, weights.data(), parameter.data(), correction.data(), kCount).is_ok());
          ASSERT_TRUE(
              merge_weights(dtype, master, parameter.data(), correction.data(), weights.data(), kCount).is_ok());
          const double from = weights[0];
          ParameterTensors t;
          t.parameter = parameter.data();
          t.gradient = gradient.data();
          t.correction = correction.data();
          t.layout = {1, kCount};
          t.parameter_dtype = dtype;
          t.master_weights = master;
          Plan plan;
          ASSERT_TRUE(Plan::make(OptimizerKind::kSgd, false, &t, 1, &plan).is_ok());
          Hyperparameters hyper;
          hyper.lr = lr;
          for (hyper.step = 1; hyper.step <= 1000; ++hyper.step) ASSERT_TRUE(plan.step(&hyper, 1).is_ok());
          ASSERT_TRUE(
              merge_weights(dtype, master, parameter.data(), correction.data(), weights.data(), kCount).is_ok());
          double mean = 0.0;
          for (float w : weights) mean += w / static_cast<double>(kCount);
          // Exported weights round to fp32, which at 30 is more than 2 % of 1,000 * 1e-7.
          const double exported = kUnit * std::max(std::fabs(from), std::fabs(mean));
          EXPECT_NEAR(from - mean, 1000 * lr, 0.02 * 1000 * lr + exported)
              << "w " << start << " lr " << lr << " dtype " << static_cast<int>(dtype) << " master "
              << static_cast<int>(master);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashoptim::test
