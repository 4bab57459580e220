// CUDA's shorter sequences against core's formulas, over every pattern.
#include "src/cuda/hot_identities.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

/// Corrections rounded to nearest, as the hot path computes them, against split(): all fp32 weights whose bf16 is
/// finite.
TEST(HotIdentities, NearestCorrections) {
  using Narrow = core::BFloat16;
  const uint64_t stride = (test_all() ? 1 : 37) * kThinning;
  uint64_t wrong = 0, first_wrong = 0;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += stride) {
    const float w = core::from_bits(static_cast<uint32_t>(bits));
    const core::SplitWeight<float> expected = core::split<Narrow, 8, float>(w);
    const float n = Narrow::template widen<float>(expected.narrow);
    const uint32_t scale = core::scale_bits<Narrow, float>(n);
    if (scale == 0x7f800000u) continue;
    const float factor = core::from_bits((0x7f800000u - scale) | cuda::kMantissaOf127);
    const uint32_t correction = cuda::nearest_correction(w - n, factor);
    if (((correction ^ expected.correction) & 0xffu) != 0u && wrong++ == 0) first_wrong = bits;
  }
  EXPECT_EQ(wrong, 0u) << "the first at " << std::hex << first_wrong;
}

/// Dithered corrections, as the hot path computes them, against split_update_dithered(): weights and updates of all
/// magnitudes, and updates that leave a weight half an ULP from its narrow value, where roundings reach past it.
template <class Narrow, int kBits>
void expect_dithered_corrections() {
  using Fixed = cuda::FixedCorrection<Narrow, kBits>;
  constexpr float kUnits = static_cast<float>(1 << Narrow::kMantissaBits) * static_cast<float>(Fixed::kLargest);
  constexpr auto kLargest = static_cast<uint32_t>(core::Correction<kBits>::kMax);
  Random random(17);
  uint64_t wrong = 0;
  const uint64_t count = (test_all() ? 400'000'000 : 10'000'000) / kThinning;
  for (uint64_t i = 0; i < count; ++i) {
    const uint32_t narrow = random.bits() & 0xffffu;
    const float n = Narrow::template widen<float>(narrow);
    if (!std::isfinite(n)) continue;
    const uint32_t spread = i % 4 == 0 ? 2u : kLargest;
    const uint32_t correction = random.bits() % (2u * spread + 1u) - spread;
    const float value = core::correction_value<Narrow, kBits, float>(n, correction);
    const float share = static_cast<float>(random.bits() % 2001u) / 1000.0f - 1.0f;
    float delta = std::ldexp(share * (std::fabs(n) + 1e-7f), -static_cast<int>(random.bits() % 30u));
    if (i % 3 == 0) {
      const float ulp = std::ldexp(core::from_bits(core::scale_bits<Narrow, float>(n)), -Narrow::kMantissaBits);
      delta = value - ulp * (static_cast<float>(random.bits() % 9u) - 4.5f) + delta * 0x1p-18f;
    }
    if (delta == 0.0f) continue;
    const uint32_t word = random.bits();
    const auto expected = core::split_update_dithered<Narrow, kBits, float>(narrow, correction, value, delta, word);
    const float n_new = Narrow::template widen<float>(expected.narrow);
    if (!std::isfinite(n_new)) continue;
    const float rest = (n - n_new) + (value - delta);
    const float inverse = core::twice_inverse_scale<float>(core::scale_bits<Narrow, float>(n_new));
    const uint32_t fixed = Fixed::make((rest * inverse) * kUnits);
    const uint32_t found = Fixed::dithered(fixed, word, Fixed::kMinusLargest) >> (32 - kBits);
    wrong += ((found ^ expected.correction) & ((1u << kBits) - 1u)) != 0u;
  }
  EXPECT_EQ(wrong, 0u);
}

TEST(HotIdentities, DitheredCorrections) {
  expect_dithered_corrections<core::BFloat16, 8>();
  expect_dithered_corrections<core::BFloat16, 16>();
  expect_dithered_corrections<core::Float16, 8>();
  expect_dithered_corrections<core::Float16, 16>();
}

}  // namespace
}  // namespace flashoptim::test
