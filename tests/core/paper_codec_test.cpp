// The paper's codec: every code with every scale, golden vectors for the roundings, and the formula in double.
#include "flashoptim/core/codecs/paper_codec.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/core/reference_formats.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

using core::PaperMomentum;
using core::PaperVariance;

constexpr double kUnit = 0x1p-24;  // fp32's relative rounding error

int encode_momentum(float m, float absmax) {
  return static_cast<int8_t>(PaperMomentum::encode<float>(m, PaperMomentum::encoding_factor<float>(absmax)));
}
uint32_t encode_variance(float root, float absmax) {
  return PaperVariance::encode<float>(root, PaperVariance::encoding_factor<float>(absmax));
}

// Numbers of the form q / 127 through the paper's own steps. Five roundings at most, whatever their order: y, 2 - |y|,
// the quotient, and the product with the scale; u = 2^-24 each, relative, and the denominator is never below 1.
TEST(PaperCodec, EveryMomentumCodeWithEveryFiniteScaleDecodesToTheFormula) {
  for (uint32_t header = 0; header < 0x7c00u; ++header) {
    const double scale = kReferenceFloat16.decode(header);
    for (int q = -128; q <= 127; ++q) {
      if (q == -128) continue;  // encode never makes it: 127 y + 1/2 >= -126.5
      const double y = q / 127.0, exact = y / (2.0 - std::fabs(y)) * scale;
      const float decoded = PaperMomentum::decode<float>(static_cast<uint32_t>(q), static_cast<float>(scale));
      ASSERT_LE(std::fabs(decoded - exact), 5.01 * kUnit * std::fabs(exact)) << "code " << q << " scale " << scale;
    }
  }
}

// r = s q / 255 takes two roundings, its square doubles them and adds one.
TEST(PaperCodec, EveryVarianceCodeWithEveryFiniteScaleDecodesToTheFormula) {
  for (uint32_t header = 0; header < 0x7c00u; ++header) {
    const double scale = kReferenceFloat16.decode(header);
    for (uint32_t q = 0; q <= 255; ++q) {
      const double root = scale * q / 255.0, exact = root * root;
      const float decoded = PaperVariance::decode<float>(q, static_cast<float>(scale));
      ASSERT_LE(std::fabs(decoded - exact), 5.01 * kUnit * exact) << "code " << q << " scale " << scale;
    }
  }
}

struct MomentumVector {
  float m;  ///< beside a largest magnitude of 1
  int code, code_of_minus;
};

// Made with exact rational arithmetic from floor(127 * 2 m / (1 + |m|) + 1/2); frozen.
const MomentumVector kMomentumVectors[] = {
    {0.0f, 0, 0},        // zero has a code, for both signs of zero
    {1.0f, 127, -127},   // the largest element takes the last code; -128 is never used
    {0.5f, 85, -85},     // y = 2/3: 84.67 rounds up
    {0.75f, 109, -109},  // y = 6/7: 108.86
    {0.25f, 51, -51},    // y = 0.4: 50.8 rounds up; negative: floor(-50.3) = -51
    // Each side of a code's lower end, 2^-14 of a code away. floor(x + 1/2) keeps halves up on both signs, so
    // beside a tie the negative code is the mirrored one.
    {0x1.027e38p-9f, 0, 0},
    {0x1.028e68p-9f, 1, -1},
    {0x1.854e8cp-8f, 1, -1},
    {0x1.8556b6p-8f, 2, -2},
    {0x1.4e3406p-2f, 62, -62},
    {0x1.4e344p-2f, 63, -63},
    {0x1.555538p-2f, 63, -63},
    {0x1.555572p-2f, 64, -64},
    {0x1.fbfbdcp-1f, 126, -126},
    {0x1.fbfc1cp-1f, 127, -127},
};

TEST(PaperCodec, MomentumCodesAreTheGoldenOnes) {
  for (const MomentumVector& v : kMomentumVectors) {
    for (float scale : {1.0f, 0x1p-20f, 0x1p20f}) {  // scaling by powers of two is exact
      EXPECT_EQ(encode_momentum(v.m * scale, scale), v.code) << v.m;
      EXPECT_EQ(encode_momentum(-v.m * scale, scale), v.code_of_minus) << v.m;
    }
  }
}

struct VarianceVector {
  float root;  ///< beside a largest root of 1
  uint32_t code;
};

// From floor(255 r + 1/2), exactly; frozen.
const VarianceVector kVarianceVectors[] = {
    {0.0f, 0},
    {1.0f, 255},
    {0.5f, 128},   // 127.5: a tie goes up
    {0x1p-9f, 0},  // 0.498: rounds to 0, which is what the default codec never does
    // Each side of a code's lower end, 2^-14 of a code away.
    {0x1.00f8f8p-9f, 0},
    {0x1.01090ap-9f, 1},
    {0x1.817d7ep-8f, 1},
    {0x1.818586p-8f, 2},
    {0x1.fffffp-2f, 127},
    {0x1.000008p-1f, 128},
    {0x1.fefef6p-1f, 254},
    {0x1.feff08p-1f, 255},
};

TEST(PaperCodec, VarianceCodesAreTheGoldenOnes) {
  for (const VarianceVector& v : kVarianceVectors) {
    for (float scale : {1.0f, 0x1p-20f, 0x1p20f}) {
      EXPECT_EQ(encode_variance(v.root * scale, scale), v.code) << v.root;
    }
  }
  EXPECT_EQ(encode_variance(254.5f, 255.0f), 255u) << "a tie below the last code goes up";
}

// 127 y in fp32: the denominator, the quotient and the product round by u each, relative, to at most 127; adding 128
// 1/2 rounds by half an ULP of numbers below 256, 2^-17. Closer to a half than that, either neighbour is right.
TEST(PaperCodec, MomentumCodesFollowTheFormulaInDoubleExceptBesideTies) {
  constexpr double kSlack = 3 * 127 * kUnit + 0x1p-17;
  Random random(4);
  int besides = 0;
  const int count = kSanitized ? 100000 : 4000000;
  for (int i = 0; i < count; ++i) {
    const float absmax = float_of(0x2c000000u + static_cast<uint32_t>(random.below(0x40000000u)));  // 1.8e-12 to 2e27
    const float m = static_cast<float>((2.0 * random.uniform() - 1.0) *
                                       (i % 2 == 0 ? 1.0 : std::pow(10.0, -6.0 * random.uniform()))) *
                    absmax;
    const double x = static_cast<double>(m) / absmax, scaled = 127.0 * (2.0 * x / (1.0 + std::fabs(x))) + 0.5;
    const int code = encode_momentum(m, absmax);
    if (std::fabs(scaled - std::nearbyint(scaled)) <= kSlack) {
      ++besides;
      ASSERT_NEAR(code, scaled - 0.5, 0.5 + kSlack);
    } else {
      ASSERT_EQ(code, static_cast<int>(std::floor(scaled))) << m << " of " << absmax;
    }
  }
  EXPECT_LT(besides, count / 1000) << "the exception must stay one";
}

TEST(PaperCodec, VarianceCodesFollowTheFormulaInDoubleExceptBesideTies) {
  constexpr double kSlack = 2 * 255 * kUnit + 0x1p-17;  // factor, product; adding 1/2
  Random random(5);
  int besides = 0;
  const int count = kSanitized ? 100000 : 4000000;
  for (int i = 0; i < count; ++i) {
    const float absmax = float_of(0x2c000000u + static_cast<uint32_t>(random.below(0x40000000u)));
    const float root = static_cast<float>(random.uniform()) * absmax;
    const double scaled = 255.0 * (static_cast<double>(root) / absmax) + 0.5;
    const uint32_t code = encode_variance(root, absmax);
    if (std::fabs(scaled - std::nearbyint(scaled)) <= kSlack) {
      ++besides;
      ASSERT_NEAR(code, scaled - 0.5, 0.5 + kSlack);
    } else {
      ASSERT_EQ(code, static_cast<uint32_t>(std::floor(scaled))) << root << " of " << absmax;
    }
  }
  EXPECT_LT(besides, count / 1000);
}

TEST(PaperCodec, TheLargestElementAlwaysTakesTheLastCode) {
  for (uint32_t bits = bits_of(core::kPaperSmallestAbsmax); bits < 0x7f000000u; bits += 9973) {
    const float absmax = float_of(bits);
    ASSERT_EQ(encode_momentum(absmax, absmax), 127) << absmax;
    ASSERT_EQ(encode_momentum(-absmax, absmax), -127) << absmax;
    ASSERT_EQ(encode_variance(absmax, absmax), 255u) << absmax;
  }
}

TEST(PaperCodec, ScalesAreFloat16RoundedToNearestAndSaturateInsteadOfOverflowing) {
  EXPECT_EQ(core::paper_header<float>(1.0f), 0x3c00u);
  EXPECT_EQ(core::paper_header<float>(65504.0f), 0x7bffu);
  EXPECT_EQ(core::paper_header<float>(65519.0f), 0x7bffu);  // nearest would still be 65504
  EXPECT_EQ(core::paper_header<float>(65520.0f), 0x7bffu);  // nearest would be infinity, and NaN on the way back
  EXPECT_EQ(core::paper_header<float>(1e30f), 0x7bffu);
  EXPECT_EQ(core::paper_header<float>(1e-12f), 0u);    // the smallest absmax is no float16: such a group reads as 0
  EXPECT_EQ(core::paper_header<float>(0x1p-24f), 1u);  // smallest subnormal
  EXPECT_EQ(core::paper_header<float>(0x1p-25f), 0u);  // half of it: tie to even
  EXPECT_EQ(core::paper_header<float>(1.0f + 0x1p-11f), 0x3c00u);  // tie to even
  EXPECT_EQ(core::paper_header<float>(1.0f + 3 * 0x1p-11f), 0x3c02u);
}

TEST(PaperCodec, NonFiniteStatesAreStoredAsZero) {
  EXPECT_EQ(core::finite_or_zero<float>(NAN), 0.0f);
  EXPECT_EQ(core::finite_or_zero<float>(INFINITY), 0.0f);
  EXPECT_EQ(core::finite_or_zero<float>(-INFINITY), 0.0f);
  EXPECT_EQ(core::finite_or_zero<float>(3.0e38f), 3.0e38f);
  EXPECT_EQ(core::finite_or_zero<float>(-0x1p-149f), -0x1p-149f);
}

}  // namespace
}  // namespace flashoptim::test
