// CUDA's shorter sequences against core's formulas, over every pattern.
#include "src/cuda/hot_identities.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace flashoptim::test
