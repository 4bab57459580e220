// bfloat16 and binary16 conversion against an integer implementation: every 16-bit pattern, every fp32 pattern.
#include "flashoptim/core/narrow_float.h"

#include <gtest/gtest.h>

#include <memory>

#include "tests/core/machine_isas.h"
#include "tests/core/reference_formats.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

template <class Narrow>
void expect_widening_is_exact(const ReferenceFormat& format, uint32_t nan_bits(uint32_t pattern)) {
  for (uint32_t pattern = 0; pattern < 0x10000u; ++pattern) {
    const float wide = Narrow::template widen<float>(pattern);
    if (format.is_nan(pattern)) {
      ASSERT_EQ(bits_of(wide), nan_bits(pattern)) << format.name << " pattern " << pattern;
      continue;
    }
    ASSERT_EQ(bits_of(wide), bits_of(static_cast<float>(format.decode(pattern)))) << format.name << ' ' << pattern;
  }
}

TEST(NarrowFloat, EveryBFloat16PatternWidensExactly) {
  expect_widening_is_exact<core::BFloat16>(kReferenceBFloat16, [](uint32_t pattern) { return pattern << 16; });
}

TEST(NarrowFloat, EveryFloat16PatternWidensExactlyAndItsNansBecomeTheCanonicalOne) {
  expect_widening_is_exact<core::Float16>(kReferenceFloat16, [](uint32_t) { return core::kCanonicalNan; });
}

template <class Narrow>
void expect_rounding_is_nearest_even(const ReferenceFormat& format) {
  const PatternSweep sweep;
  std::atomic<uint64_t> wrong{0};
  std::atomic<uint32_t> first{0};
  on_two_threads(sweep.count(), uint64_t{1} << 20, [&](uint64_t begin, uint64_t end) {
    for (uint64_t i = begin; i < end; ++i) {
      const uint32_t pattern = sweep.pattern(i);
      if (Narrow::template round<float>(float_of(pattern)) != format.encode(pattern)) {
        if (wrong.fetch_add(1) == 0) first = pattern;
      }
    }
  });
  EXPECT_EQ(wrong, 0u) << format.name << ": first (of either thread) is fp32 pattern " << std::hex << first;
}

TEST(NarrowFloat, BFloat16RoundsEveryFp32PatternToNearestEven) {
  expect_rounding_is_nearest_even<core::BFloat16>(kReferenceBFloat16);
}

TEST(NarrowFloat, Float16RoundsEveryFp32PatternToNearestEven) {
  expect_rounding_is_nearest_even<core::Float16>(kReferenceFloat16);
}

// The strided sweep rarely meets a tie: these are all of them, with both neighbours, and the ends of the range.
template <class Narrow>
void expect_ties_to_even(const ReferenceFormat& format) {
  for (uint32_t pattern = 0; pattern < 0x8000u; ++pattern) {
    if (format.is_nan(pattern) || format.is_infinite(pattern)) continue;
    for (double sign : {1.0, -1.0}) {
      const double tie = sign * (format.decode(pattern) + format.half_ulp(pattern));
      // Above the largest finite fp32 (or at a tie of bfloat16 subnormals, always) the tie is still an fp32 number.
      const uint32_t bits = bits_of(static_cast<float>(tie));
      for (uint32_t b : {bits - 1, bits, bits + 1}) {
        ASSERT_EQ(Narrow::template round<float>(float_of(b)), format.encode(b)) << format.name << " fp32 bits " << b;
      }
      const uint32_t even = ((pattern & 1u) == 0 ? pattern : pattern + 1) | (sign < 0 ? 0x8000u : 0u);
      ASSERT_EQ(format.encode(bits), even) << "the reference itself: " << format.name << ' ' << pattern;
    }
  }
}

TEST(NarrowFloat, EveryBFloat16TieGoesToEven) { expect_ties_to_even<core::BFloat16>(kReferenceBFloat16); }
TEST(NarrowFloat, EveryFloat16TieGoesToEven) { expect_ties_to_even<core::Float16>(kReferenceFloat16); }

TEST(NarrowFloat, EveryNarrowValueSurvivesWideningAndRounding) {
  for (uint32_t pattern = 0; pattern < 0x10000u; ++pattern) {
    if (!kReferenceBFloat16.is_nan(pattern)) {
      ASSERT_EQ(core::BFloat16::round<float>(core::BFloat16::widen<float>(pattern)), pattern);
    }
    if (!kReferenceFloat16.is_nan(pattern)) {
      ASSERT_EQ(core::Float16::round<float>(core::Float16::widen<float>(pattern)), pattern);
    }
  }
}

// SIMD conversions through the kernels that use them: parameters without master weights are only converted.
TEST(NarrowFloat, EveryInstructionSetWidensAsScalarCodeDoes) {
  const int none = static_cast<int>(MasterWeights::kNone);
  for (const cpu::KernelTable* table : machine_tables()) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      auto block = std::make_unique<cpu::Block>();
      uint16_t patterns[cpu::kBlockElements];
      block->groups = cpu::kBlockGroups;
      block->parameter = patterns;
      for (uint32_t first = 0; first < 0x10000u; first += cpu::kBlockElements) {
        for (uint32_t i = 0; i < cpu::kBlockElements; ++i) patterns[i] = static_cast<uint16_t>(first + i);
        table->load_weights[static_cast<int>(dtype)][none](*block);
        for (uint32_t i = 0; i < cpu::kBlockElements; ++i) {
          const float expected = dtype == DType::kBFloat16 ? core::BFloat16::widen<float>(first + i)
                                                           : core::Float16::widen<float>(first + i);
          ASSERT_EQ(bits_of(block->weight[i]), bits_of(expected)) << table->isa << " pattern " << first + i;
        }
      }
    }
  }
}

TEST(NarrowFloat, EveryInstructionSetRoundsEveryFp32PatternAsScalarCodeDoes) {
  const int none = static_cast<int>(MasterWeights::kNone);
  const PatternSweep sweep;
  for (const cpu::KernelTable* table : machine_tables()) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      std::atomic<uint64_t> wrong{0};
      on_two_threads(sweep.count() / cpu::kBlockElements, 1024, [&](uint64_t begin, uint64_t end) {
        auto block = std::make_unique<cpu::Block>();
        uint16_t patterns[cpu::kBlockElements];
        block->groups = cpu::kBlockGroups;
        block->parameter = patterns;
        for (uint64_t b = begin; b < end; ++b) {
          for (int i = 0; i < cpu::kBlockElements; ++i) {
            block->weight[i] = float_of(sweep.pattern(b * cpu::kBlockElements + static_cast<uint64_t>(i)));
          }
          table->split_weights[static_cast<int>(dtype)][none](*block);
          uint64_t bad = 0;
          for (int i = 0; i < cpu::kBlockElements; ++i) {
            const uint32_t expected = dtype == DType::kBFloat16 ? core::BFloat16::round<float>(block->weight[i])
                                                                : core::Float16::round<float>(block->weight[i]);
            bad += patterns[i] != expected;
          }
          wrong += bad;
        }
      });
      EXPECT_EQ(wrong, 0u) << table->isa;
    }
  }
}

}  // namespace
}  // namespace flashoptim::test
