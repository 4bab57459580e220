// What slot_codecs.h says of every rule's slots: which is relative to which, in which order they are coded, and that no
// two of an element share a dither stream.
#include "flashoptim/core/codecs/slot_codecs.h"

#include <gtest/gtest.h>

#include <type_traits>
#include <vector>

#include "flashoptim/core/optimizer_list.h"

namespace flashoptim::core {
namespace {

/// Two averages of the gradient, one relative to the variance and one alone, in an order that is not that of coding.
struct ThreeSlots {
  static constexpr OptimizerKind kKind = OptimizerKind::kAdamW;
  static constexpr const char* kName = "three";
  static constexpr const char* kTitle = "Three";
  static constexpr auto kHyperparameters = hyperparameter_list({});
  static constexpr bool kDecoupledDecay = true;
  static constexpr int kSlotCount = 3;
  static constexpr StateSlot kSlots[] = {{"alone", StateKind::kSigned, kNoSlot, 5},
                                         {"relative", StateKind::kSigned, 2, 6},
                                         {"variance", StateKind::kUnsigned}};
  struct Hyper {};
  static Hyper make_hyper(const Hyperparameters&) { return {}; }
  template <class F>
  static F update(F, F g, F (&)[3], const Hyper&) {
    return g;
  }
  static double largest_update(const Hyperparameters&) { return 0.0; }
};
static_assert(Rule<ThreeSlots>);

/// What is no rule: a slot relative to a signed one, and one that chooses K beside a variance.
struct RelativeToSigned : ThreeSlots {
  static constexpr StateSlot kSlots[] = {{"alone", StateKind::kSigned, kNoSlot, 5},
                                         {"relative", StateKind::kSigned, 0, 6},
                                         {"variance", StateKind::kUnsigned}};
};
struct RelativeChoosesK : ThreeSlots {
  static constexpr StateSlot kSlots[] = {{"alone", StateKind::kSigned, kNoSlot, 5},
                                         {"relative", StateKind::kSigned, 2, 0},
                                         {"variance", StateKind::kUnsigned}};
};
struct RelativeUnsigned : ThreeSlots {
  static constexpr StateSlot kSlots[] = {
      {"a", StateKind::kSigned, kNoSlot, 5}, {"b", StateKind::kUnsigned, 2, 6}, {"c", StateKind::kUnsigned}};
};
struct TooManySlots : ThreeSlots {
  static constexpr int kSlotCount = kMaxSlots + 1;
};
struct WithoutName {
  static constexpr int kSlotCount = 0;
};
static_assert(!Rule<RelativeToSigned> && !Rule<RelativeChoosesK> && !Rule<RelativeUnsigned>);
static_assert(!Rule<TooManySlots> && !Rule<WithoutName>);
#define FLASHOPTIM_IS_RULE(name) static_assert(Rule<name>);
FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_IS_RULE)
#undef FLASHOPTIM_IS_RULE

template <class Slots>
std::vector<int> order() {
  std::vector<int> visited;
  Slots::for_each([&](auto index) { visited.push_back(decltype(index)::value); });
  return visited;
}

TEST(SlotCodecs, BasesAreCodedFirst) {
  using Three = SlotCodecs<ThreeSlots, StateCodec::kDefault>;
  EXPECT_EQ(order<Three>(), (std::vector<int>{2, 0, 1}));
  EXPECT_EQ((order<SlotCodecs<ThreeSlots, StateCodec::kPaper>>()), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ((order<SlotCodecs<AdamW, StateCodec::kDefault>>()), (std::vector<int>{1, 0}));
  EXPECT_EQ((order<SlotCodecs<Lion, StateCodec::kDefault>>()), (std::vector<int>{0}));
  EXPECT_EQ((order<SlotCodecs<SgdPlain, StateCodec::kDefault>>()), std::vector<int>{});
  static_assert(Three::kHasBases && Three::is_base(2) && Three::is_relative(1) && !Three::is_relative(0));
  static_assert(!SlotCodecs<ThreeSlots, StateCodec::kPaper>::kHasBases);
  static_assert(!SlotCodecs<Lion, StateCodec::kDefault>::kHasBases);
}

TEST(SlotCodecs, EverySlotHasTheCodecThatItsRuleAsksFor) {
  using Adam = SlotCodecs<AdamW, StateCodec::kDefault>;
  static_assert(std::is_same_v<Adam::Of<0>, MuLawSlot<6, true, false>> && std::is_same_v<Adam::Of<1>, WindowSlot>);
  static_assert(std::is_same_v<SlotCodecs<Sgd, StateCodec::kDefault>::Of<0>, MuLawSlot<5, false, false>>);
  static_assert(std::is_same_v<SlotCodecs<Lion, StateCodec::kDefault>::Of<0>, MuLawGroupSlot>);
  using Paper = SlotCodecs<AdamW, StateCodec::kPaper>;
  static_assert(std::is_same_v<Paper::Of<0>, PaperSlot<true>> && std::is_same_v<Paper::Of<1>, PaperSlot<false>>);
}

TEST(SlotCodecs, StreamsOfAnElementAreDistinctAndNotTheWeights) {
  using Three = SlotCodecs<ThreeSlots, StateCodec::kDefault>;
  static_assert(Three::stream(0) == DitherStream::kMomentum && Three::stream(1) == DitherStream::kSecondMomentum &&
                Three::stream(2) == DitherStream::kVariance);
  const uint32_t time[] = {kDitherTimeStep<DitherStream::kVariance>, kDitherTimeStep<DitherStream::kMomentum>,
                           kDitherTimeStep<DitherStream::kSecondMomentum>};
  const uint32_t lanes[] = {kDitherLaneStep<DitherStream::kVariance>, kDitherLaneStep<DitherStream::kMomentum>,
                            kDitherLaneStep<DitherStream::kSecondMomentum>, kDitherLaneStep<DitherStream::kWeight>};
  for (const uint32_t step : time) EXPECT_EQ(step & 1u, 1u);  // a full period
  EXPECT_TRUE(time[0] != time[1] && time[1] != time[2] && time[0] != time[2]);
  for (int a = 0; a < 4; ++a) {
    EXPECT_EQ(lanes[a] & 1u, 1u);
    for (int b = 0; b < a; ++b) EXPECT_NE(lanes[a], lanes[b]);
  }
  // Of groups, too.
  const DitherKey key = make_dither_key(1, 1);
  const uint32_t hash = dither_group_hash<float>(key, 64u, 0u);
  EXPECT_NE((dither_group_start<DitherStream::kMomentum, float>(key, hash)),
            (dither_group_start<DitherStream::kSecondMomentum, float>(key, hash)));
}

TEST(SlotCodecs, HotPathsAreForOneMomentumOverOneVariance) {
  static_assert(MomentumOverVariance<AdamW>::kFits && MomentumOverVariance<AdamW>::kMomentum == 0 &&
                MomentumOverVariance<AdamW>::kVariance == 1);
  static_assert(!MomentumOverVariance<Lion>::kFits && !MomentumOverVariance<Sgd>::kFits &&
                !MomentumOverVariance<SgdPlain>::kFits && !MomentumOverVariance<ThreeSlots>::kFits);
}

/// Rounded up to a power of two, from every mantissa; what the codes are then stays within them.
TEST(SlotCodecs, ASlowSlotsScaleIsTheNextPowerOfTwo) {
  using Plain = MuLawSlot<6, true, false>;
  using Slow = MuLawSlot<6, true, true>;
  EXPECT_EQ(Slow::header<float>(0u, 0u), 0u);
  for (uint32_t exponent : {2u, 3u, 64u, 127u, 200u, 253u}) {
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += 1021u) {
      const uint32_t largest = exponent << 23 | mantissa;
      const uint32_t plain = Plain::header<float>(largest, 0u), slow = Slow::header<float>(largest, 0u);
      ASSERT_EQ(slow & 0xffu, 0u);
      ASSERT_GE(slow, plain);
      ASSERT_LT(slow, plain + 0x100u);
    }
  }
}

}  // namespace
}  // namespace flashoptim::core
