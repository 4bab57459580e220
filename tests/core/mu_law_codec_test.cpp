// The default codec of momentum: no code saturates, rounding is unbiased, and the power of two it is relative to.
#include <gtest/gtest.h>

#include <cmath>

#include "flashoptim/core/codecs/default_codec.h"
#include "flashoptim/core/optimizer_list.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

using core::MuLawCodec;

/// A scale as the kernels use it: from the group's largest |x|.
template <int K>
struct Scale {
  uint32_t header;
  float value, inverse;
  explicit Scale(float absmax)
      : header(MuLawCodec<K>::template header<float>(absmax)),
        value(MuLawCodec<K>::template scale<float>(header)),
        inverse(MuLawCodec<K>::template inverse_scale<float>(header)) {}
  uint32_t encode(float x, uint32_t dither) const { return MuLawCodec<K>::template encode<float>(x, inverse, dither); }
  float decode(uint32_t code) const { return MuLawCodec<K>::template decode<float>(code) * value; }
  /// Distance between the two codes around x; above the last code, of the last two.
  double step_at(double x) const {
    uint32_t code = 0;
    while (code < 126 && decode(code + 1) <= std::fabs(x)) ++code;
    return static_cast<double>(decode(code + 1)) - static_cast<double>(decode(code));
  }
};

/// A random largest |x|, log-uniform over all that is not stored as zeros: there G is a normal number.
template <int K>
float random_absmax(Random& random) {
  const double lowest = std::log2(static_cast<double>(MuLawCodec<K>::largest())) - 125.9;
  return static_cast<float>(std::exp2(lowest + (126.0 - lowest) * random.uniform()));
}

template <int K>
void expect_codes_hold() {
  Random random(11);
  const int count = kSanitized ? 3000 : 200000;
  for (int g = 0; g < count; ++g) {
    const float absmax = random_absmax<K>(random);
    const Scale<K> scale(absmax);
    ASSERT_LE(scale.header, 0xffffu);
    ASSERT_GT(scale.header, 0u) << absmax;
    ASSERT_TRUE(std::isfinite(scale.value)) << absmax;
    for (uint32_t dither : {0u, random.bits(), 0xffffffffu}) {
      const uint32_t top = scale.encode(absmax, dither), minus_top = scale.encode(-absmax, dither);
      ASSERT_LE(top, 127u) << "saturates or carries into the sign: " << absmax;
      ASSERT_EQ(minus_top, top | 0x80u);
      // Dithered up, the largest may gain a step, never more.
      ASSERT_LE(scale.decode(top), absmax + scale.step_at(absmax) * (1.0 + 1e-4));
      const float x = static_cast<float>((2.0 * random.uniform() - 1.0) * absmax);
      const uint32_t code = scale.encode(x, dither);
      ASSERT_LE(code, 0xffu);
      ASSERT_LE(std::fabs(static_cast<double>(scale.decode(code)) - x), scale.step_at(x) * (1.0 + 1e-4));
    }
    // One rounding of the scale: as close above what is needed as its 8 bits of mantissa allow.
    ASSERT_GE(static_cast<double>(scale.value) * MuLawCodec<K>::largest(), absmax * (1.0 - 1e-6));
    ASSERT_LE(static_cast<double>(scale.value) * MuLawCodec<K>::largest(), absmax * (1.0 + 1.01 / 128));
  }
}

template <int K>
void expect_unbiased() {
  // y = 2 + |x| / G takes three fp32 roundings (1 / G, product, sum) of at most 2^-24 of it.
  constexpr uint32_t kWords = 1024;
  Random random(12);
  for (int g = 0; g < (kSanitized ? 200 : 20000); ++g) {
    const float absmax = random_absmax<K>(random);
    const Scale<K> scale(absmax);
    const float x = static_cast<float>((2.0 * random.uniform() - 1.0) * absmax *
                                       (g % 2 == 0 ? 1.0 : std::exp2(-10.0 * random.uniform())));
    double sum = 0.0;
    for (uint32_t k = 0; k < kWords; ++k)
      sum += scale.decode(scale.encode(x, k * (0xffffffffu / kWords + 1u))) / static_cast<double>(kWords);
    const double g_value = scale.value, y = 2.0 + std::fabs(x) / g_value;
    ASSERT_NEAR(sum, x, scale.step_at(x) * 2.0 / kWords + 3 * 0x1p-24 * y * g_value) << "absmax " << absmax;
  }
}

template <int K>
void expect_grid_is_exact() {
  // On the grid y is a code's lower end but for its three roundings, up to two of the 2^(23 - K) parts of a step: a
  // dither within three parts of either end may round to a neighbour. All others must not move a value.
  Random random(13);
  for (int g = 0; g < (kSanitized ? 50 : 3000); ++g) {
    const Scale<K> scale(random_absmax<K>(random));
    constexpr uint32_t kPart = 1u << (32 - MuLawCodec<K>::kShift);
    for (uint32_t code = 0; code < 256; ++code) {
      const float x = scale.decode(code);
      for (uint32_t dither : {3 * kPart, 0x80000000u, 0u - 3 * kPart}) {
        ASSERT_EQ(scale.decode(scale.encode(x, dither)), x) << "code " << code << " scale " << scale.value;
      }
    }
  }
}

TEST(MuLawCodec, NoCodeSaturatesAndEveryErrorIsBelowOneStep) {
  expect_codes_hold<4>();
  expect_codes_hold<5>();
  expect_codes_hold<6>();
}
TEST(MuLawCodec, RoundingIsUnbiased) {
  expect_unbiased<4>();
  expect_unbiased<5>();
  expect_unbiased<6>();
}
TEST(MuLawCodec, ValuesOnTheGridStayWithEveryDither) {
  expect_grid_is_exact<4>();
  expect_grid_is_exact<5>();
  expect_grid_is_exact<6>();
}

TEST(MuLawCodec, AGroupOfZerosAndOneBelowTheNormalRangeAreStoredAsZeros) {
  for (float absmax : {0.0f, 0x1p-149f, 0x1p-127f}) {
    const Scale<5> scale(absmax);
    EXPECT_EQ(scale.header, 0u) << absmax;
    for (uint32_t dither : {0u, 0xffffffffu}) EXPECT_EQ(scale.decode(scale.encode(absmax, dither)), 0.0f) << absmax;
  }
}

TEST(MuLawCodec, NegativeZeroKeepsItsMagnitudeAtZero) {
  const Scale<5> scale(1.0f);
  EXPECT_EQ(scale.decode(scale.encode(-0.0f, 0xffffffffu)), 0.0f);
  EXPECT_EQ(scale.decode(scale.encode(0.0f, 0xffffffffu)), 0.0f);
}

TEST(RootScale, TimesItsInverseIsExactlyOneAndItIsThePowerOfTwoBelowTheRoot) {
  const PatternSweep sweep;
  for (uint64_t i = 0; i < sweep.count() / 2; ++i) {
    const uint32_t bits = sweep.pattern(i) & 0x7fffffffu;
    if (bits < 0x00800000u || bits >= 0x7f800000u) continue;  // stored variances are normal
    const float s = core::root_scale<float>(bits), inverse = core::inverse_root_scale<float>(bits);
    ASSERT_EQ(s * inverse, 1.0f) << std::hex << bits;
    ASSERT_EQ(bits_of(s) & 0x007fffffu, 0u) << "a power of two";
    const double root = std::sqrt(static_cast<double>(float_of(bits)));
    ASSERT_TRUE(s <= root && root < 2.0 * s) << std::hex << bits << ": " << s << " for " << root;
  }
}

TEST(RootScale, MomentumBesideAZeroVarianceIsZero) {
  EXPECT_EQ(core::relative_to_root<float>(1.0f, 0u), 0.0f);
  EXPECT_EQ(core::relative_to_root<float>(NAN, 0u), 0.0f);
  EXPECT_EQ(core::relative_to_root<float>(3.0f, bits_of(4.0f)), 1.5f);
}

TEST(RootScale, MomentumFarAboveTheRootIsBoundedBeforeItIsInfinite) {
  for (float m : {1e30f, 0x1p127f, 0x1p64f}) {
    for (float sign : {1.0f, -1.0f}) {
      const float x = core::relative_to_root<float>(sign * m, bits_of(0x1p-126f));
      EXPECT_EQ(x, sign * 0x1p126f) << m;
    }
  }
  EXPECT_EQ(core::relative_to_root<float>(0x1p62f, bits_of(0x1p-126f)), 0x1p125f);
  // So a group's largest is a number to the codec.
  const Scale<6> scale(0x1p126f);
  for (uint32_t dither : {0u, 0xffffffffu})
    EXPECT_NEAR(scale.decode(scale.encode(0x1p126f, dither)), 0x1p126f, 0x1p120f);
}

}  // namespace
}  // namespace flashoptim::test
