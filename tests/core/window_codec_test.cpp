// The default codec of variances: never zero, never out of its codes, exact on its grid, unbiased between.
#include <gtest/gtest.h>

#include <cmath>

#include "flashoptim/core/codecs/default_codec.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

using core::WindowCodec;
using Window = WindowCodec::Window<uint32_t>;

/// A group of 32 encoded as the kernels do it.
struct Group {
  std::vector<uint32_t> bits;  ///< storable patterns
  uint32_t header;
  Window window;

  explicit Group(const std::vector<float>& values) {
    uint32_t largest = 0, smallest_minus_one = 0xffffffffu;
    for (float v : values) {
      bits.push_back(WindowCodec::storable<float>(v));
      largest = std::max(largest, bits.back());
      smallest_minus_one = std::min(smallest_minus_one, bits.back() - 1u);
    }
    header = WindowCodec::header<float>(largest, smallest_minus_one);
    window = WindowCodec::window<float>(header);
  }
  uint32_t encode(size_t i, uint32_t dither) const { return WindowCodec::encode<float>(bits[i], window, dither).code; }
  float decode(uint32_t code) const { return WindowCodec::decode<float>(code, window); }
};

/// Largest value that a rule stores: |g| is clamped to 2^60, so v stays below 2^121 (Adam::clamp_gradient).
constexpr float kLargestVariance = 0x1p121f;

/// Groups of every kind: one scale, a spread of up to 250 octaves, outliers, zeros between, subnormals, the ends.
std::vector<float> random_group(Random& random) {
  std::vector<float> values(32);
  const double center = -126.0 + 246.0 * random.uniform();
  const double spread = random.below(3) == 0 ? 0.1 : std::pow(250.0, random.uniform());
  const double zeros = random.below(3) == 0 ? random.uniform() : 0.0;
  for (float& v : values) {
    const double exponent = std::min(120.9, center + spread * (random.uniform() - 0.5));
    v = random.uniform() < zeros ? 0.0f : static_cast<float>(std::exp2(std::max(-148.9, exponent)));
  }
  if (random.below(8) == 0) values[random.below(32)] = 0x1p-149f;
  if (random.below(8) == 0) values[random.below(32)] = kLargestVariance;
  return values;
}

int group_count() { return kSanitized ? 3000 : test_all() ? 2000000 : 200000; }

TEST(WindowCodec, APositiveValueNeverGetsCodeZeroAndNoCodeLeavesEightBits) {
  Random random(6);
  for (int g = 0; g < group_count(); ++g) {
    const std::vector<float> values = random_group(random);
    const Group group(values);
    ASSERT_LE(group.header, 0xffffu);
    for (size_t i = 0; i < values.size(); ++i) {
      for (uint32_t dither : {0u, random.bits(), 0xffffffffu}) {
        const auto out = WindowCodec::encode<float>(group.bits[i], group.window, dither);
        if (values[i] > 0.0f) {
          ASSERT_GE(out.code, 1u) << values[i];
          ASSERT_LE(out.code, 255u) << values[i] << " header " << group.header;
          ASSERT_GT(group.decode(out.code), 0.0f);
          ASSERT_TRUE(std::isfinite(group.decode(out.code))) << values[i];
        } else {
          ASSERT_EQ(out.code, 0u);
          ASSERT_EQ(group.decode(out.code), 0.0f);
        }
        ASSERT_EQ(out.stored, bits_of(group.decode(out.code)))
            << "what momentum is made relative to is what is read back";
      }
    }
  }
}

TEST(WindowCodec, EveryExponentAloneIsStoredWithinTwoTenthsOfAPercent) {
  for (int e = -126; e < 121; ++e) {
    for (float mantissa : {1.0f, 1.3f, 1.99999f}) {
      const float v = std::ldexp(mantissa, e);
      const Group group(std::vector<float>(32, v));
      for (uint32_t dither : {0u, 0x80000000u, 0xffffffffu}) {
        ASSERT_NEAR(group.decode(group.encode(0, dither)) / v, 1.0, 0.002) << v;
      }
    }
  }
}

TEST(WindowCodec, AnySpreadKeepsEveryElementWithinAFactorOfTwo) {
  Random random(7);
  for (int g = 0; g < group_count(); ++g) {
    const std::vector<float> values = random_group(random);
    const Group group(values);
    for (size_t i = 0; i < values.size(); ++i) {
      if (values[i] < WindowCodec::kSmallestNormal) continue;
      const double ratio =
          static_cast<double>(group.decode(group.encode(i, random.bits()))) / static_cast<double>(values[i]);
      ASSERT_GT(ratio, 0.5);
      ASSERT_LT(ratio, 2.0);
    }
  }
}

TEST(WindowCodec, NarrowGroupsGetFinerStepsThanWideOnes) {
  const auto worst = [](double octaves) {
    std::vector<float> values(32);
    for (int i = 0; i < 32; ++i)
      values[static_cast<size_t>(i)] = static_cast<float>(std::exp2(-10.0 + octaves * i / 31.0));
    const Group group(values);
    double error = 0.0;
    for (size_t i = 0; i < 32; ++i) {
      for (uint32_t dither : {0u, 0xffffffffu}) {
        error = std::max(error, std::fabs(static_cast<double>(group.decode(group.encode(i, dither))) /
                                              static_cast<double>(values[i]) -
                                          1.0));
      }
    }
    return error;
  };
  // 254 codes over k octaves: a step is k / 254 of an octave in the pattern, at most twice that for shifts are whole,
  // and of a value at most twice that again (an octave's mantissa is linear). The base grid costs up to 1/16 octave.
  for (double octaves : {0.5, 1.0, 3.0, 10.0, 50.0, 100.0})
    EXPECT_LE(worst(octaves), 2.0 * (octaves + 1.0 / 16) / 254.0) << octaves;
}

TEST(WindowCodec, DecodedGroupsEncodeToThemselvesWithAnyDither) {
  Random random(8);
  for (int g = 0; g < group_count(); ++g) {
    const std::vector<float> values = random_group(random);
    const Group group(values);
    std::vector<float> decoded(32);
    for (size_t i = 0; i < 32; ++i) decoded[i] = group.decode(group.encode(i, random.bits()));
    const Group again(decoded);
    // The decoded group may fit a finer window, whose grid holds the coarser one's.
    for (size_t i = 0; i < 32; ++i) {
      for (uint32_t dither : {0u, random.bits(), 0xffffffffu}) {
        ASSERT_EQ(again.decode(again.encode(i, dither)), decoded[i])
            << "value " << values[i] << " headers " << group.header << " then " << again.header;
      }
    }
  }
}

TEST(WindowCodec, EveryCodeOfEveryWindowIsExactUnderEveryDither) {
  for (uint32_t header = 0; header <= 0xffffu; ++header) {
    const Window window = WindowCodec::window<float>(header);
    for (uint32_t code = 1; code <= 255; code += header % 7 == 0 ? 1 : 37) {
      const float v = WindowCodec::decode<float>(code, window);
      // Headers that no group makes may start at 0 or reach past the largest float.
      if (!(v >= WindowCodec::kSmallestNormal && v <= kLargestVariance) || window.base_minus_one == 0) continue;
      for (uint32_t dither : {0u, 0xffffffffu}) {
        ASSERT_EQ(WindowCodec::encode<float>(WindowCodec::storable<float>(v), window, dither).code, code)
            << "header " << header;
      }
    }
  }
}

// Over equally spaced dither words the mean of the decoded value is v, to one part in their number of a step: within a
// step an fp32 number is linear in its pattern. No chance is involved.
TEST(WindowCodec, RoundingIsUnbiasedForEveryCode) {
  constexpr uint32_t kWords = 1024;
  Random random(9);
  for (int g = 0; g < group_count() / 500; ++g) {
    const std::vector<float> values = random_group(random);
    const Group group(values);
    for (size_t i = 0; i < 32; ++i) {
      if (values[i] < WindowCodec::kSmallestNormal) continue;
      double sum = 0.0;
      for (uint32_t k = 0; k < kWords; ++k) {
        sum += static_cast<double>(group.decode(group.encode(i, k * (0xffffffffu / kWords + 1u)))) / kWords;
      }
      const uint32_t code = group.encode(i, 0);
      const double step = static_cast<double>(group.decode(code + 1u)) - static_cast<double>(group.decode(code));
      ASSERT_NEAR(sum, static_cast<double>(values[i]), step / kWords + values[i] * 1e-12) << values[i];
    }
  }
}

TEST(WindowCodec, NonFiniteAndZeroElementsDoNotDisturbTheOthers) {
  Random random(10);
  for (int g = 0; g < group_count() / 10; ++g) {
    std::vector<float> values = random_group(random);
    const size_t hit = random.below(32);
    std::vector<float> without = values, with = values;
    without[hit] = 0.0f;
    with[hit] = g % 2 == 0 ? NAN : INFINITY;
    ASSERT_EQ(Group(with).header, Group(without).header);
    ASSERT_EQ(Group(with).encode(hit, 0xffffffffu), 0u);
  }
  const Group zeros(std::vector<float>(32, 0.0f));
  EXPECT_EQ(zeros.header, 0u);
  for (uint32_t dither : {0u, 0x80000000u, 0xffffffffu}) EXPECT_EQ(zeros.encode(0, dither), 0u);
  EXPECT_EQ(zeros.decode(0), 0.0f);
}

TEST(WindowCodec, SubnormalsAreStoredAsTheSmallestNormalNumber) {
  const Group group(std::vector<float>{0x1p-149f, 0x1p-140f, 0x1.8p-127f, 0x1p-126f});
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(group.decode(group.encode(i, 0xffffffffu)), 0x1p-126f);
}

TEST(WindowCodec, TheWholeRangeFrom1eMinus38To1e38IsStoredFinite) {
  for (int k = -3800; k <= 3800; ++k) {
    const float v = static_cast<float>(std::pow(10.0, k / 100.0));
    for (const Group& group : {Group(std::vector<float>(32, v)), Group({v, 1e-38f, 1.0f})}) {
      for (uint32_t dither : {0u, 0x80000000u, 0xffffffffu}) {
        const float stored = group.decode(group.encode(0, dither));
        ASSERT_TRUE(std::isfinite(stored)) << v;
        ASSERT_GT(stored, 0.0f) << v;
      }
    }
  }
}

}  // namespace
}  // namespace flashoptim::test
