// Momentum alone, whose groups choose K: no code saturates, rounding is unbiased down to the sign floor, only 0 is 0.
#include <gtest/gtest.h>

#include <cmath>

#include "flashoptim/core/codecs/default_codec.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

using Codec = core::MuLawGroupCodec;

constexpr uint32_t kShifts[] = {17, 18, 19, 20};
/// Patterns from the smallest to the largest |x| with which a group takes a shift: its first, and its last.
constexpr uint32_t kFirstSpan[] = {0, Codec::kWide5, Codec::kWide4, Codec::kWide3};
constexpr uint32_t kLastSpan[] = {Codec::kWide5 - 1, Codec::kWide4 - 1, Codec::kWide3 - 1, 30u << 23};

uint32_t header_of(float largest, float smallest) {
  return Codec::header<float>(bits_of(largest), bits_of(smallest) - 1u);
}

/// A group as the kernels use it.
struct Group {
  uint32_t header;
  float scale, inverse;
  Codec::Group<float> constants;
  explicit Group(uint32_t h)
      : header(h),
        scale(Codec::scale<float>(h)),
        inverse(Codec::inverse_scale<float>(h)),
        constants(Codec::group<float>(h)) {}
  Group(float largest, float smallest) : Group(header_of(largest, smallest)) {}
  uint32_t encode(float x, uint32_t dither) const { return Codec::encode<float>(x, inverse, constants, dither); }
  double relative(uint32_t code) const {
    return Codec::decode<float>(static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(code))), constants);
  }
  double decode(uint32_t code) const { return relative(code) * static_cast<double>(scale); }
  double step() const { return std::ldexp(1.0, static_cast<int>(constants.shift) - 22); }  ///< d
  double floor() const { return step() / 8.0; }                                            ///< f
};

/// The group of a shift with this largest |x|.
Group group_of_shift(int k, float largest) {
  const Group g(largest, float_of(bits_of(largest) - kFirstSpan[k]));
  EXPECT_EQ(g.constants.shift, kShifts[k]) << largest;
  return g;
}

TEST(MuLawGroupCodec, DecodesTheFormulaOfTheDocumentation) {
  for (uint32_t k = 0; k < 4; ++k) {
    const Group g((127u << 8) | k);
    const int bits = 23 - static_cast<int>(kShifts[k]);
    ASSERT_EQ(g.scale, 1.0f);
    const double d = std::ldexp(1.0, 1 - bits);
    ASSERT_EQ(g.relative(0), 0.0);
    ASSERT_EQ(g.relative(1), d / 8.0);
    for (uint32_t a = 1; a < 128; ++a) {
      const int octave = static_cast<int>(a) >> bits;
      const double mantissa = 1.0 + std::ldexp(static_cast<double>(a) - std::ldexp(octave, bits), -bits);
      const double x = std::ldexp(mantissa, 1 + octave) - (2.0 + d - d / 8.0);
      ASSERT_EQ(g.relative(a), x) << "K " << bits << " code " << a;
      ASSERT_EQ(g.relative(a | 0x80u), -x);
    }
    ASSERT_EQ(g.relative(127), static_cast<double>(Codec::largest(kShifts[k])));
  }
}

TEST(MuLawGroupCodec, KFollowsTheSpanOfTheGroup) {
  for (const float largest : {0x1.8p-60f, 1.0f, 0x1.fffffep0f, 0x1p100f}) {
    for (int k = 0; k < 4; ++k) {
      for (const uint32_t span : {kFirstSpan[k], kLastSpan[k]}) {
        const Group g(largest, float_of(bits_of(largest) - span));
        EXPECT_EQ(g.constants.shift, kShifts[k]) << largest << " span " << span;
      }
    }
  }
  // 6.5, 8.5 and 12.5 octaves.
  EXPECT_EQ(Codec::kWide5, static_cast<uint32_t>(6.5 * (1 << 23)));
  EXPECT_EQ(Codec::kWide4, static_cast<uint32_t>(8.5 * (1 << 23)));
  EXPECT_EQ(Codec::kWide3, static_cast<uint32_t>(12.5 * (1 << 23)));
}

/// Every mantissa of the largest |x|, in a binade where nothing is special and in the lowest and highest that fit.
TEST(MuLawGroupCodec, NoCodeSaturatesAndTheHeaderIsMonotone) {
  const uint32_t thinning = kSanitized ? 997 : 1;
  for (int k = 0; k < 4; ++k) {
    for (const uint32_t binade : {40u, 127u, 254u}) {
      uint32_t last = 0;
      for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += thinning) {
        const float largest = float_of(binade << 23 | mantissa);
        const Group g(largest, float_of(bits_of(largest) - kFirstSpan[k]));
        ASSERT_EQ(g.constants.shift, kShifts[k]);
        ASSERT_LE(g.header, 0xffffu);
        ASSERT_GE(g.header, last) << largest;
        last = g.header;
        // A wrap behind 127 would read back as next to nothing.
        const uint32_t up = g.encode(largest, 0xffffffffu), down = g.encode(-largest, 0u);
        ASSERT_LE(up, 127u) << largest;
        ASSERT_GE(g.decode(up), largest * (1.0 - 1e-6)) << largest;
        ASSERT_EQ(down & 0x80u, 0x80u);
        ASSERT_GE(-g.decode(down), largest * 0.88) << largest;
        // As close above what is needed as 6 bits of mantissa allow.
        ASSERT_LE(g.decode(127), largest * (1.0 + 1.01 / 64)) << largest;
      }
    }
  }
}

TEST(MuLawGroupCodec, RoundingIsUnbiasedOverAllDithersDownToTheFloor) {
  Random random(31);
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < (kSanitized ? 2 : 40); ++i) {
      const float largest = static_cast<float>(std::exp2(200.0 * random.uniform() - 100.0));
      const Group g = group_of_shift(k, largest);
      const double lowest = g.floor() * static_cast<double>(g.scale) * (1.0 + 1e-6);
      const float x =
          static_cast<float>(i % 2 == 0 ? lowest + (largest - lowest) * random.uniform()
                                        : lowest * std::exp2(random.uniform() * std::log2(largest / lowest)));
      const uint32_t words = 1u << kShifts[k];
      double sum = 0.0;
      for (uint32_t word = 0; word < words; ++word) sum += g.decode(g.encode(x, word << (32u - kShifts[k])));
      // y takes three fp32 roundings (1 / G, product, sum) of at most 2^-24 of it.
      const double tolerance = 3 * 0x1p-24 * (2.0 + x / static_cast<double>(g.scale)) * static_cast<double>(g.scale);
      ASSERT_NEAR(sum / words, x, tolerance) << "shift " << kShifts[k] << " largest " << largest;
    }
  }
}

TEST(MuLawGroupCodec, BelowTheFloorEveryDitherGivesTheFloorWithTheSign) {
  Random random(32);
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 2000; ++i) {
      const float largest = static_cast<float>(std::exp2(100.0 * random.uniform() - 50.0));
      const Group g = group_of_shift(k, largest);
      const double lowest = g.floor() * static_cast<double>(g.scale);
      const float x = static_cast<float>(lowest * std::exp2(-20.0 * random.uniform()) * (1.0 - 1e-6));
      for (uint32_t dither : {0u, random.bits(), 0xffffffffu}) {
        ASSERT_EQ(g.encode(x, dither), 1u) << x << " of " << largest;
        ASSERT_EQ(g.encode(-x, dither), 0x81u);
      }
      ASSERT_EQ(g.decode(1), lowest);
    }
  }
}

/// The bias is that of K = 3 alone: elsewhere the smallest that a group may have is above the floor.
TEST(MuLawGroupCodec, OnlyGroupsOfTheLargestSpanReachTheFloor) {
  for (int k = 0; k < 3; ++k) {
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += kSanitized ? 99991 : 7) {
      const float largest = float_of(100u << 23 | mantissa);
      const float smallest = float_of(bits_of(largest) - kLastSpan[k]);
      const Group g(largest, smallest);
      ASSERT_EQ(g.constants.shift, kShifts[k]);
      ASSERT_GT(smallest * g.inverse, g.floor()) << largest;
    }
  }
  // There the floor is 2^-21.8 of the largest.
  const Group g = group_of_shift(3, 1.0f);
  EXPECT_LE(g.decode(1), std::exp2(-21.8));
}

TEST(MuLawGroupCodec, ErrorsAreBelowOneStepAndOnlyZeroIsZero) {
  Random random(33);
  for (int i = 0; i < (kSanitized ? 2000 : 200000); ++i) {
    const int k = i % 4;
    const float largest = static_cast<float>(std::exp2(200.0 * random.uniform() - 90.0));
    const Group g = group_of_shift(k, largest);
    const float x = largest * static_cast<float>(std::exp2(-40.0 * random.uniform() * random.uniform()));
    const uint32_t code = g.encode(x, random.bits());
    ASSERT_GE(code, 1u) << x;
    ASSERT_LE(code, 127u) << x;
    // The step of the octave above y, or the floor's.
    const double y = x / static_cast<double>(g.scale) + 2.0;
    const double step = std::ldexp(g.step(), std::ilogb(y + g.step()) - 1) * (1.0 + 1e-6);
    ASSERT_LE(std::fabs(g.decode(code) - x), step * static_cast<double>(g.scale)) << x << " of " << largest;
    for (uint32_t dither : {0u, random.bits(), 0xffffffffu}) {
      ASSERT_EQ(g.encode(0.0f, dither), 0u);
      ASSERT_EQ(g.encode(-0.0f, dither), 0x80u);
    }
  }
}

TEST(MuLawGroupCodec, ValuesOnTheGridStayWithEveryDither) {
  // y of a grid value is a code's lower end but for its roundings: dithers next to either end may give a neighbour.
  Random random(34);
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < (kSanitized ? 20 : 2000); ++i) {
      const Group g = group_of_shift(k, static_cast<float>(std::exp2(200.0 * random.uniform() - 90.0)));
      const uint32_t part = 1u << (32 - kShifts[k]);
      for (uint32_t code = 1; code < 128; ++code) {
        const float x = static_cast<float>(g.decode(code));
        for (uint32_t dither : {4 * part, 0x80000000u, 0u - 4 * part}) {
          ASSERT_EQ(g.encode(x, dither), code) << "shift " << kShifts[k] << " scale " << g.scale;
        }
      }
    }
  }
}

TEST(MuLawGroupCodec, HostileGroups) {
  // Zeros, and what is below the normal range of G: header 0, and every code reads 0.
  EXPECT_EQ(Codec::header<float>(0u, 0xffffffffu), 0u);
  for (float largest : {0x1p-149f, 0x1p-127f, 0x1p-124f}) {
    const Group g(largest, largest);
    EXPECT_EQ(g.header, 0u) << largest;
    for (uint32_t dither : {0u, 0xffffffffu}) EXPECT_EQ(g.decode(g.encode(largest, dither)), 0.0) << largest;
  }
  const Group low(0x1p-111f, 0x1p-126f);  // K = 3
  EXPECT_EQ(low.header, 0u);
  // The ends of fp32.
  for (float smallest : {0x1p-149f, 0x1p-126f, 1.0f, 0x1.fffffep127f}) {
    const Group g(0x1.fffffep127f, smallest);
    ASSERT_TRUE(std::isfinite(g.scale));
    ASSERT_GT(g.inverse, 0.0f);
    for (uint32_t dither : {0u, 0xffffffffu}) {
      const uint32_t code = g.encode(0x1.fffffep127f, dither);
      EXPECT_LE(code, 127u);
      EXPECT_GE(g.decode(code), 0x1.cp127);
    }
  }
  // Any bytes decode to something, the same for codes with and without a sign.
  for (uint32_t header = 0; header < 0x10000u; ++header) {
    const Group g(header);
    for (uint32_t code : {0u, 1u, 127u}) ASSERT_EQ(g.relative(code | 0x80u), -g.relative(code));
  }
}

}  // namespace
}  // namespace flashoptim::test
