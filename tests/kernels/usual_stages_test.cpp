// The passes of "usual" blocks (KernelTable::usual), and the general stages of the tables that have them, against the
// scalar loops, byte for byte, under an adversary's contents. Where begin() refuses, nothing may have changed; how many
// blocks it took is asserted, so that refusing is no way through.
#include <gtest/gtest.h>

#include "flashoptim/core/optimizers/adam.h"
#include "tests/kernels/adversary.h"

namespace flashoptim::test {
namespace {

// ---- whole blocks ---------------------------------------------------------------------------------------------------

struct Counts {
  int64_t blocks = 0, taken = 0;
  int64_t near_groups = 0;  ///< of blocks taken, those that are all near one afterwards
};

/// Blocks of one configuration. Stops at the first difference.
void check_blocks(const Configuration& c, int64_t blocks) {
  SCOPED_TRACE(c.name());
  const std::vector<const KernelTable*> tables = tables_with_usual();
  std::vector<Counts> counts(tables.size());
  Adversary adversary(c, 1000 + static_cast<uint64_t>(c.rule) * 100 + static_cast<uint64_t>(c.codec) * 10 +
                             static_cast<uint64_t>(c.master));
  const int parameter = static_cast<int>(c.parameter), gradient = static_cast<int>(c.gradient);
  const bool f32_parameter = c.parameter == DType::kFloat32, f32_gradient = c.gradient == DType::kFloat32;
  Random& random = adversary.random;
  const KernelTable& scalar = cpu::kScalarKernels;
  static Block b;
  for (int64_t n = 0; n < blocks; ++n) {
    const uint64_t draw = random.below(16);
    const auto kind = draw == 0  ? Adversary::Kind::kDamaged
                      : draw < 5 ? Adversary::Kind::kFlawed
                                 : Adversary::Kind::kTaken;
    const int groups = random.below(4) == 0 ? kGroups / 2 : kGroups;
    const Setting setting = adversary.setting(kind);
    cpu::HyperStorage hyper;
    make_hyper(c.rule, setting.p, &hyper);
    Memory before(static_cast<int>(random.below(32)));
    adversary.fill(before, setting, kind);
    if (kind != Adversary::Kind::kDamaged && random.below(2) == 0) {
      Memory scratch = before;
      open_block(b, scratch, setting, hyper, c.bits(), random, groups, f32_gradient, f32_parameter);
      scalar.load_weights[parameter][static_cast<int>(c.master)](b);
      scalar.load_gradient[gradient](b);
      scalar.rule[static_cast<int>(c.rule)][static_cast<int>(c.codec)][0](b);
      adversary.approach(before, b.delta, kind == Adversary::Kind::kTaken && c.rule == RuleKind::kAdam);
    }
    Memory expected = before;
    open_block(b, expected, setting, hyper, c.bits(), random, groups, f32_gradient, f32_parameter);
    run_general(scalar, c, b);
    const int64_t nonfinite = b.nonfinite;

    for (size_t t = 0; t < tables.size(); ++t) {
      const std::string where = std::string(tables[t]->isa) + ", block " + std::to_string(n) + ": " + setting.name();
      Memory general = before;
      open_block(b, general, setting, hyper, c.bits(), random, groups, f32_gradient, f32_parameter);
      run_general(*tables[t], c, b);
      ASSERT_TRUE(general == expected) << "general stages of " << where << ": " << expected.difference(general);
      ASSERT_EQ(b.nonfinite, nonfinite) << "general stages of " << where;

      Memory actual = before;
      open_block(b, actual, setting, hyper, c.bits(), random, groups, f32_gradient, f32_parameter);
      ++counts[t].blocks;
      if (usual_of(*tables[t], c).begin(b)) {
        ++counts[t].taken;
        run_usual(usual_of(*tables[t], c), b);
        for (int group = 0; group < groups; ++group) {
          bool near = true;
          for (int i = group * kGroup; i < (group + 1) * kGroup; ++i)
            near = near && (f32_parameter || is_near(c.parameter, expected.words(Memory::kParameter)[i]));
          counts[t].near_groups += near;
        }
      } else {
        ASSERT_TRUE(actual == before) << where << ": refused, but changed " << before.difference(actual);
        run_general(*tables[t], c, b);
      }
      ASSERT_TRUE(actual == expected) << where << ": " << expected.difference(actual);
      ASSERT_EQ(b.nonfinite, nonfinite) << where;
    }
  }
  for (size_t t = 0; t < tables.size(); ++t) {
    const Counts& k = counts[t];
    SCOPED_TRACE(tables[t]->isa);
    EXPECT_GE(k.taken, k.blocks / 3);
    EXPECT_LE(k.taken, k.blocks * 19 / 20);  // (of 120 blocks under sanitizers, 109 in one format)
    EXPECT_GE(k.near_groups, k.taken * kGroups / 4);
  }
}

int64_t block_count() { return (kSanitized ? 600 : 10000) * (test_all() ? 20 : 1); }

class UsualStages : public testing::Test {
 protected:
  void SetUp() override {
    if (tables_with_usual().empty()) GTEST_SKIP() << "no instruction set of this machine has usual stages";
  }
};

/// Whether there are usual stages: with AdamW for weights that are stored and not rounded stochastically, and gradients
/// of any dtype; with Adam for bf16 weights with corrections, and bf16 gradients.
bool has_usual(const Configuration& c) {
  if (c.codec == StateCodec::kFloat32 || c.master == MasterWeights::kNoneStochastic) return false;
  if (c.parameter == DType::kFloat32 && core::has_correction(c.master)) return false;
  if (c.rule == RuleKind::kAdamW) return true;
  return c.rule == RuleKind::kAdam && c.parameter == DType::kBFloat16 && c.gradient == DType::kBFloat16 &&
         core::has_correction(c.master);
}

/// body(configuration) for everything that a table has places for.
template <class Body>
void for_each_configuration(Body body) {
  constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (int rule = 0; rule < cpu::kRuleKinds; ++rule) {
    for (int codec = 0; codec < cpu::kCodecs; ++codec) {
      for (int master = 0; master < cpu::kMasterKinds; ++master) {
        for (DType parameter : kTypes) {
          for (DType gradient : kTypes) {
            body(Configuration{static_cast<RuleKind>(rule), static_cast<StateCodec>(codec),
                               static_cast<MasterWeights>(master), parameter, gradient});
          }
        }
      }
    }
  }
}

TEST_F(UsualStages, EveryRuleCodecAndFormatHasThem) {
  for (const KernelTable* t : tables_with_usual()) {
    for_each_configuration([t](const Configuration& c) {
      const auto& usual = usual_of(*t, c);
      EXPECT_EQ(usual.begin != nullptr, has_usual(c)) << t->isa << " " << c.name();
      EXPECT_EQ(usual.finish != nullptr, has_usual(c));
      EXPECT_EQ(usual.encode[0] != nullptr, has_usual(c));
    });
  }
}

TEST_F(UsualStages, AdamWDefaultCodec) {
  for (MasterWeights master : kCorrected) check_blocks({RuleKind::kAdamW, StateCodec::kDefault, master}, block_count());
}
TEST_F(UsualStages, AdamDefaultCodec) {
  for (MasterWeights master : kCorrected) check_blocks({RuleKind::kAdam, StateCodec::kDefault, master}, block_count());
}
TEST_F(UsualStages, AdamWPaperCodec) {
  for (MasterWeights master : kCorrected) check_blocks({RuleKind::kAdamW, StateCodec::kPaper, master}, block_count());
}
TEST_F(UsualStages, AdamPaperCodec) {
  for (MasterWeights master : kCorrected) check_blocks({RuleKind::kAdam, StateCodec::kPaper, master}, block_count());
}

/// What the tests above leave out, each with fewer blocks.
TEST_F(UsualStages, OtherFormats) {
  for_each_configuration([](const Configuration& c) {
    const bool all_bf16 = c.parameter == DType::kBFloat16 && c.gradient == DType::kBFloat16;
    if (has_usual(c) && !(all_bf16 && core::has_correction(c.master))) check_blocks(c, block_count() / 5);
  });
}

TEST_F(UsualStages, BlocksOf16And32GroupsAreTakenAndOthersRefused) {
  Random random(5);
  static Block b;
  for (const KernelTable* t : tables_with_usual()) {
    for (StateCodec codec : {StateCodec::kDefault, StateCodec::kPaper}) {
      const Configuration c{RuleKind::kAdamW, codec, MasterWeights::kCorrection8};
      Adversary adversary(c, 7);
      for (int groups = 1; groups <= kGroups; ++groups) {
        Setting setting;
        cpu::HyperStorage hyper;
        make_hyper(c.rule, setting.p, &hyper);
        Memory before(0);
        adversary.fill(before, setting, Adversary::Kind::kTaken);
        for (int i = 0; i < kElements; ++i) before.words(Memory::kGradient)[i] = 0x3f80;
        Memory actual = before;
        open_block(b, actual, setting, hyper, 8, random, groups);
        EXPECT_EQ(usual_of(*t, c).begin(b), groups % 16 == 0) << t->isa << ", groups " << groups;
        if (groups % 16 != 0) {
          EXPECT_TRUE(actual == before) << t->isa << ", groups " << groups;
        }
      }
    }
  }
}

// ---- finish() alone: every narrow value, any step -------------------------------------------------------------------

template <class Rule, class Narrow = core::BFloat16>
void check_finish(const Configuration& c, int passes) {
  SCOPED_TRACE(c.name());
  constexpr uint32_t kBlocks = 65536 / kElements;
  const int bits = c.bits(), n_max = bits == 8 ? 127 : 32767, parameter = static_cast<int>(c.parameter);
  constexpr bool kIsHalf = Narrow::kBias != 127;
  const KernelTable& scalar = cpu::kScalarKernels;
  const std::vector<const KernelTable*> tables = tables_with_usual();
  static Block b;
  static float steps[kElements];
  Random random(77 + static_cast<uint64_t>(c.master));
  int64_t groups = 0, fast = 0;
  for (int pass = 0; pass < passes; ++pass) {
    for (uint32_t block = 0; block < kBlocks; ++block) {
      Setting setting;
      static const double kDecays[] = {0.0, 0.0, 0x1p-10, 0.3, 1.0};
      setting.p.lr = 1.0;
      setting.p.weight_decay = kDecays[random.below(5)];
      setting.dither = core::make_dither_key(random.next(), random.next());
      for (uint32_t& hash : setting.group_hash) hash = random.bits();
      cpu::HyperStorage hyper;
      make_hyper(c.rule, setting.p, &hyper);
      typename Rule::Hyper h;
      std::memcpy(&h, &hyper, sizeof h);
      Memory before(static_cast<int>(random.below(32)));
      for (int group = 0; group < kGroups; ++group) {
        const uint64_t style = random.below(10);
        const int ends[] = {0, n_max, -n_max, -n_max - 1, n_max, 1, -1, 0};
        const uint32_t noise_of_group = random.bits();
        for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
          const uint32_t word = (block * kElements + static_cast<uint32_t>(i)) & 0xffffu, noise = random.bits();
          before.words(Memory::kParameter)[i] = static_cast<uint16_t>(word);
          before.set_correction(bits, i,
                                (noise & 3u) == 0
                                    ? ends[(noise >> 2) & 7u]
                                    : static_cast<int>(noise >> 8) % (n_max + 1) * ((noise & 4u) != 0 ? 1 : -1));
          const float n = Narrow::template widen<float>(word);
          const uint32_t c_bits = static_cast<uint32_t>(before.correction(bits, i));
          const float value = bits == 8 ? core::correction_value<Narrow, 8, float>(n, c_bits)
                                        : core::correction_value<Narrow, 16, float>(n, c_bits);
          const float w = n + value;
          const int exponent = static_cast<int>(core::scale_bits<Narrow, float>(n) >> 23);
          const float half = with_exponent(exponent - Narrow::kMantissaBits - 1, 0, 0);
          float delta = 0.0f;
          switch (style) {
            case 0:
              delta = float_of(noise);
              break;
            case 1:  // cancels
              delta = float_of(bits_of(w) + noise % 64u - 32u);
              break;
            case 2:
              delta = n * (static_cast<float>(noise % 17u) - 8.0f) * 0.25f;
              break;
            case 3:  // ties, and corrections that become N and -N
              delta = half * (static_cast<float>(noise % 17u) - 8.0f) * 0.5f;
              break;
            case 4:
              delta = half * (static_cast<float>(noise) * 0x1p-30f - 2.0f);
              break;
            case 5: {  // to the ends of what is near
              static const int kHalfEdges[] = {102, 103, 111, 112, 113, 114, 142, 143};
              static const int kBf16Edges[] = {62, 63, 64, 65, 190, 191, 192, 193};
              static const auto& kEdges = kIsHalf ? kHalfEdges : kBf16Edges;
              const uint32_t edge_mantissa = (noise & 7u) == 0   ? 0x7f8000u
                                             : (noise & 7u) == 1 ? 0u
                                             : (noise & 7u) == 2 ? (kIsHalf ? 0x7fefffu : 0x7f7fffu)
                                                                 : noise >> 9;
              delta = w - with_exponent(kEdges[(noise_of_group >> 8) & 7u], edge_mantissa, noise >> 8);
              break;
            }
            case 6:  // none, in all places or some
              delta = (noise_of_group & 7u) == 0 || (noise & 31u) == 0 ? ((noise & 0x100u) != 0 ? 0.0f : -0.0f)
                                                                       : half * 0.01f;
              break;
            case 7:
              delta = value + half * (static_cast<float>(noise % 3u) - 1.0f);
              break;
            case 8:  // far below the correction's step, and at the bottom
              delta = (noise_of_group & 1u) != 0
                          ? with_exponent(static_cast<int>(noise % 24u), noise >> 8, noise >> 31)
                          : half * with_exponent(127 - static_cast<int>(noise % 40u), noise >> 8, noise >> 31);
              break;
            default:
              delta = w * with_exponent(127 - static_cast<int>(noise % 30u), noise >> 8, noise >> 31);
              break;
          }
          steps[i] = Rule::kDecoupledDecay ? delta - h.decay * w : delta;
        }
      }
      Memory expected = before;
      open_block(b, expected, setting, hyper, bits, random);
      scalar.load_weights[parameter][static_cast<int>(c.master)](b);
      for (int i = 0; i < kElements; ++i) b.delta[i] = Rule::template decayed<float>(b.weight[i], steps[i], h);
      store_groups(scalar.store_weights[parameter][static_cast<int>(c.master)], b, 0, kGroups);
      for (int group = 0; group < kGroups; ++group) {
        bool near = true;
        for (int i = group * kGroup; i < (group + 1) * kGroup; ++i)
          near = near && is_near(c.parameter, expected.words(Memory::kParameter)[i]) && b.delta[i] != 0.0f;
        fast += near;
        ++groups;
      }
      for (const KernelTable* t : tables) {
        Memory actual = before;
        open_block(b, actual, setting, hyper, bits, random);
        for (int i = 0; i < kElements; ++i)
          b.delta[i] = steps[t->usual_element == nullptr ? i : i / kGroup * kGroup + t->usual_element(i % kGroup)];
        const auto& usual = usual_of(*t, c);
        store_groups(usual.finish, b, 0, kGroups / 2);
        store_groups(usual.finish, b, kGroups / 2, kGroups);
        ASSERT_TRUE(actual == expected) << t->isa << ", pass " << pass << ", block " << block << ", decay "
                                        << setting.p.weight_decay << ": " << expected.difference(actual);
      }
    }
  }
  EXPECT_GE(fast, groups / 8);
}

TEST_F(UsualStages, FinishFromEveryNarrowValueByAnyStep) {
  const int passes = (kSanitized ? 10 : 120) * (test_all() ? 20 : 1);
  for (MasterWeights master : kCorrected) {
    check_finish<core::AdamW>({RuleKind::kAdamW, StateCodec::kDefault, master}, passes);
    check_finish<core::AdamW, core::Float16>({RuleKind::kAdamW, StateCodec::kDefault, master, DType::kFloat16}, passes);
    check_finish<core::Adam>({RuleKind::kAdam, StateCodec::kPaper, master}, passes);
  }
  check_finish<core::AdamW>({RuleKind::kAdamW, StateCodec::kDefault, MasterWeights::kNone}, passes);
  check_finish<core::AdamW, core::Float16>(
      {RuleKind::kAdamW, StateCodec::kDefault, MasterWeights::kNone, DType::kFloat16}, passes);
}

// ---- general stages of the same tables, one by one ------------------------------------------------------------------

bool same_floats(const float* a, const float* b, int count) {
  for (int i = 0; i < count; ++i) {
    // NaN are one value: they are stored as the canonical one.
    if (bits_of(a[i]) != bits_of(b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

TEST_F(UsualStages, GeneralStagesOfTheirTables) {
  static Block want, got;
  const int64_t blocks = (kSanitized ? 40 : 400) * (test_all() ? 20 : 1);
  const KernelTable& scalar = cpu::kScalarKernels;
  for (RuleKind rule : {RuleKind::kAdamW, RuleKind::kAdam, RuleKind::kLion}) {
    for (StateCodec codec : {StateCodec::kDefault, StateCodec::kPaper}) {
      for (int m = 0; m < cpu::kMasterKinds; ++m) {
        const Configuration c{rule, codec, static_cast<MasterWeights>(m)};
        Adversary adversary(c, 31 + static_cast<uint64_t>(m));
        Random& random = adversary.random;
        for (int64_t n = 0; n < blocks; ++n) {
          const auto kind = static_cast<Adversary::Kind>(random.below(3));
          Configuration of = c;
          of.gradient = random.below(2) == 0 ? DType::kBFloat16 : DType::kFloat32;
          const DType gradient = of.gradient;
          const int groups = random.below(2) == 0 ? kGroups : 1 + static_cast<int>(random.below(kGroups));
          const Setting setting = adversary.setting(kind);
          cpu::HyperStorage hyper;
          make_hyper(rule, setting.p, &hyper);
          Memory before(static_cast<int>(random.below(32)));
          adversary.fill(before, setting, kind);
          if (gradient == DType::kFloat32) {
            const bool any = random.below(2) == 0;
            float values[kElements];
            for (int i = 0; i < kElements; ++i) {
              values[i] = any ? float_of(random.bits()) : widened(before.words(Memory::kGradient)[i]);
              if (any && random.below(64) == 0) values[i] = float_of(0x7fffffffu | random.bits());
            }
            std::copy_n(values, kElements, before.floats(Memory::kGradient));
          }
          Memory expected = before;
          open_block(want, expected, setting, hyper, c.bits(), random, groups, gradient == DType::kFloat32);
          run_general(scalar, of, want);
          for (const KernelTable* t : tables_with_usual()) {
            const std::string where =
                std::string(t->isa) + ", " + c.name() + ", block " + std::to_string(n) + ": " + setting.name();
            Memory actual = before;
            open_block(got, actual, setting, hyper, c.bits(), random, groups, gradient == DType::kFloat32);
            run_general(*t, of, got);
            ASSERT_TRUE(same_floats(want.weight, got.weight, groups * kGroup)) << where;
            if (core::has_correction(c.master)) {
              ASSERT_TRUE(same_floats(want.correction_value, got.correction_value, groups * kGroup)) << where;
            }
            ASSERT_TRUE(same_floats(want.gradient_f32, got.gradient_f32, groups * kGroup)) << where;
            ASSERT_TRUE(same_floats(want.delta, got.delta, groups * kGroup)) << where;
            ASSERT_EQ(want.nonfinite, got.nonfinite) << where;
            ASSERT_TRUE(actual == expected) << where << ": " << expected.difference(actual);
          }
        }
      }
    }
  }
}

// Dither carries out of the pattern of a NaN whose payload is all ones (those of GPUs are).
TEST(StochasticWeights, ANanIsStoredAsTheCanonicalOneWhateverItsPayload) {
  static Block b;
  Random random(3);
  const int master = static_cast<int>(MasterWeights::kNoneStochastic);
  for (const KernelTable* t : machine_tables()) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      for (uint32_t nan : {0x7fffffffu, 0xffffffffu, 0x7f800001u, 0xffff8000u, 0x7fc00000u}) {
        Memory m(0);
        Setting setting;
        for (uint32_t& hash : setting.group_hash) hash = random.bits();
        const cpu::HyperStorage hyper{};
        open_block(b, m, setting, hyper, 16, random);
        std::fill_n(b.weight, kElements, float_of(nan));
        std::fill_n(b.delta, kElements, 0.0f);
        store_groups(t->store_weights[static_cast<int>(dtype)][master], b, 0, kGroups);
        const int canonical = dtype == DType::kBFloat16 ? 0x7fc0 : 0x7e00;
        EXPECT_EQ(std::count(m.words(Memory::kParameter), m.words(Memory::kParameter) + kElements, canonical),
                  kElements)
            << t->isa << ", NaN " << std::hex << nan;
      }
    }
  }
}

}  // namespace
}  // namespace flashoptim::test
