// The passes of "usual" blocks (KernelTable::usual), and the general stages of the tables that have them, against the
// scalar loops, byte for byte, under contents made to break their conditions: every bf16 pattern beside every kind of
// correction, weights at the ends of what a fast group may hold, headers and codes at all ends and damaged ones,
// gradients of all exponents, chosen dither, cancellation and ties. Where begin() refuses, nothing may have changed;
// how many blocks it took is asserted, so that refusing is no way through.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <initializer_list>
#include <iterator>
#include <string>
#include <vector>

#include "flashoptim/core/default_codec.h"
#include "flashoptim/core/optimizers/adam.h"
#include "flashoptim/core/weight_split.h"
#include "src/cpu/run_block.h"
#include "src/rules.h"
#include "tests/core/machine_isas.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {
namespace {

using cpu::Block;
using cpu::KernelTable;
using cpu::RuleKind;

constexpr int kGroups = cpu::kBlockGroups, kElements = cpu::kBlockElements, kGroup = static_cast<int>(kGroupSize);
constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);
constexpr MasterWeights kCorrected[] = {MasterWeights::kCorrection8, MasterWeights::kCorrection16,
                                        MasterWeights::kCorrection8Nearest, MasterWeights::kCorrection16Nearest};

/// What a block's step reads and writes, between guard bytes, `shift` elements off a 64-byte boundary.
class Memory {
 public:
  enum Array { kParameter, kGradient, kCorrection, kMomentum, kVariance, kMomentumScale, kVarianceScale, kArrays };
  static constexpr const char* kNames[] = {"parameter",     "gradient",        "correction",     "momentum code",
                                           "variance code", "momentum header", "variance header"};

  explicit Memory(int shift) : shift_(shift) { std::memset(bytes_, 0xa5, sizeof bytes_); }

  uint16_t* words(Array a) { return reinterpret_cast<uint16_t*>(bytes_ + offset(a, 2)); }
  uint8_t* bytes(Array a) { return bytes_ + offset(a, 1); }
  float* floats(Array a) { return reinterpret_cast<float*>(bytes_ + offset(a, 4)); }
  int correction(int bits, int i) {
    return bits == 8 ? static_cast<int8_t>(bytes(kCorrection)[i]) : static_cast<int16_t>(words(kCorrection)[i]);
  }
  void set_correction(int bits, int i, int value) {
    if (bits == 8) {
      bytes(kCorrection)[i] = static_cast<uint8_t>(value);
    } else {
      words(kCorrection)[i] = static_cast<uint16_t>(value);
    }
  }

  void attach(Block& b, int correction_bits, bool f32_gradient = false) {
    b.parameter = words(kParameter);
    b.gradient = f32_gradient ? static_cast<void*>(floats(kGradient)) : words(kGradient);
    b.correction = correction_bits == 8 ? static_cast<void*>(bytes(kCorrection)) : words(kCorrection);
    b.states[0] = bytes(kMomentum);
    b.states[1] = bytes(kVariance);
    b.scales[0] = words(kMomentumScale);
    b.scales[1] = words(kVarianceScale);
  }

  bool operator==(const Memory& other) const { return std::memcmp(bytes_, other.bytes_, sizeof bytes_) == 0; }

  /// Where `other` first differs.
  std::string difference(const Memory& other) const {
    size_t at = 0;
    while (at < sizeof bytes_ && bytes_[at] == other.bytes_[at]) ++at;
    const int array = static_cast<int>(at / kStride);
    char text[160];
    std::snprintf(text, sizeof text, "%s, byte %td of its array: expected %02x, got %02x",
                  kNames[array < kArrays ? array : 0], static_cast<std::ptrdiff_t>(at % kStride) - 64, bytes_[at],
                  other.bytes_[at]);
    return text;
  }

 private:
  static constexpr size_t kStride = 4 * kElements + 256;
  size_t offset(Array a, int size) const {
    return static_cast<size_t>(a) * kStride + 64 + static_cast<size_t>(shift_ * size);
  }

  alignas(64) unsigned char bytes_[kArrays * kStride];
  int shift_;
};

struct Configuration {
  RuleKind rule;
  StateCodec codec;
  MasterWeights master;

  int bits() const { return core::correction_bits(master); }
  std::string name() const {
    return std::string(rule == RuleKind::kAdamW  ? "AdamW"
                       : rule == RuleKind::kAdam ? "Adam"
                                                 : "other rule") +
           ", " + (codec == StateCodec::kPaper ? "paper" : "default") + " codec, master " +
           std::to_string(static_cast<int>(master));
  }
};

/// What a step is asked for.
struct Setting {
  Hyperparameters p;
  float gradient_scale = 1.0f;
  core::DitherKey dither{};
  uint32_t group_hash[kGroups] = {};

  std::string name() const {
    char text[256];
    std::snprintf(text, sizeof text, "lr %g, betas %.9g %.9g, eps %g, weight decay %g, step %lld, gradient scale %g",
                  p.lr, p.beta1, p.beta2, p.eps, p.weight_decay, static_cast<long long>(p.step),
                  static_cast<double>(gradient_scale));
    return text;
  }
};

/// A block over `m`, its scratch full of what an earlier one could have left.
void open_block(Block& b, Memory& m, const Setting& s, const cpu::HyperStorage& hyper, int bits, Random& random,
                int groups = kGroups, bool f32_gradient = false) {
  static const int kPoison[] = {0x00, 0xff, 0x7f, 0x40};
  std::memset(static_cast<void*>(&b), kPoison[random.below(4)], sizeof b);
  b.groups = groups;
  b.hyper = &hyper;
  b.dither = s.dither;
  b.gradient_scale = s.gradient_scale;
  b.nonfinite = 0;
  b.usual = random.below(2) != 0;
  b.ahead = 0;
  b.store_begin = b.store_end = 0;
  std::copy_n(s.group_hash, kGroups, b.group_hash);
  m.attach(b, bits, f32_gradient);
}

void run_general(const KernelTable& t, const Configuration& c, Block& b, DType gradient = DType::kBFloat16) {
  cpu::run_stages(t, {c.rule, c.codec, DType::kBFloat16, gradient, c.master}, b);
}

const cpu::UsualStages& usual_of(const KernelTable& t, const Configuration& c) {
  return t.usual[static_cast<int>(c.rule)][static_cast<int>(c.codec)][static_cast<int>(c.master)];
}

std::vector<const KernelTable*> tables_with_usual() {
  std::vector<const KernelTable*> tables;
  for (const KernelTable* t : machine_tables()) {
    if (t->usual[0][static_cast<int>(StateCodec::kDefault)][static_cast<int>(MasterWeights::kCorrection8)].begin !=
        nullptr)
      tables.push_back(t);
  }
  return tables;
}

uint32_t bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
float widened(uint32_t word) { return float_of(word << 16); }
uint32_t exponent_of(uint32_t word) { return (word >> 7) & 0xffu; }
bool is_normal(uint32_t word) { return exponent_of(word) != 0 && exponent_of(word) != 255; }
/// Weights of which finish() makes fast groups.
bool is_near(uint32_t word) { return exponent_of(word) >= 64 && exponent_of(word) <= 191; }

float with_exponent(int exponent, uint32_t mantissa, uint32_t sign) {
  const int e = exponent < 0 ? 0 : exponent > 254 ? 254 : exponent;
  return float_of((sign & 1u) << 31 | static_cast<uint32_t>(e) << 23 | (mantissa & 0x7fffffu));
}

/// Makes contents. Blocks are kTaken: at the edges of what begin() takes, but within; kFlawed: such with a few places
/// that it may not take; kDamaged: anything at all.
class Adversary {
 public:
  Adversary(const Configuration& c, uint64_t seed) : c_(c), bits_(c.bits()), random(seed) {}

  enum class Kind { kTaken, kFlawed, kDamaged };

  Setting setting(Kind kind) {
    Setting s;
    exact_ = kind == Kind::kTaken && random.below(8) == 0;
    Hyperparameters& p = s.p;
    const bool paper = c_.codec == StateCodec::kPaper;
    const bool tame = kind == Kind::kTaken || random.below(3) != 0;
    p.lr = pick({0.0, 1e-12, 1e-3, 1e-3, 1.0, 1e10, std::pow(10.0, 8.0 * random.uniform() - 7.0)});
    p.beta1 = pick({0.0, 0.9, 0.9, 0.999, 0.9999999, 0.5});
    p.beta2 = pick({0.9, 0.999, 0.999, 0.9999999, 0.95, 0.5, 1.0 - 0x1p-24});
    if (random.below(24) == 0) p.beta2 = 0x1p-20;
    p.eps = paper ? pick({0x1p-62, 1e-8, 1e-8, 1.0, 0x1p38}) : pick({0.0, 1e-30, 1e-8, 1e-8, 1.0, 0x1p38});
    p.weight_decay = pick({0.0, 0.01, 0.01, 1.0});
    p.step = pick({1.0, 2.0, 1000.0}) + 0.5;
    if (!tame) {
      p.beta2 = pick({0.0, 0.9, 0.999, 0.99999995, 0.9999999, 1e-7, 1e-30, 1e-40});
      p.eps = pick({0.0, 1e-30, 1e-8, 0x1p-62, 1.0, 1e30});
      p.weight_decay = pick({0.0, 0.01, 1.0, 100.0, 1e30});
    } else if (c_.rule == RuleKind::kAdamW && p.lr * p.weight_decay > 1.0) {
      p.weight_decay = 0.0;
    }
    if (exact_) {
      // The new m is g and the new v is g^2: delta is lr, a power of two, and weights make ties of it.
      p.beta1 = 0.0;
      p.beta2 = 0.5;
      p.eps = paper ? 0x1p-62 : 0.0;
      p.lr = std::ldexp(1.0, -static_cast<int>(random.below(16)));
      p.weight_decay = pick({0.0, 0.0, 0x1p-8});
      p.step = 1000;
    }
    s.gradient_scale =
        static_cast<float>(pick({1.0, 1.0, 1.0, 1.0, 0.37, -1.0, 0.0, -0.0, 0x1p-20, 0x1p20, 3e30, -1e-30, 1e-45}));
    p.seed = random.next();
    s.dither = core::make_dither_key(p.seed, random.below(4) == 0 ? random.next() : static_cast<uint64_t>(p.step));
    for (uint32_t& hash : s.group_hash) hash = random.below(2) == 0 ? random.bits() : hash_for(s.dither);
    return s;
  }

  void fill(Memory& m, const Setting& s, Kind kind) {
    // Gradients are chosen as the rule sees them.
    const float scale = s.gradient_scale;
    scale_exponent_ = scale == 0.0f ? 0 : std::ilogb(scale);
    at_bounds_ = random.below(8) == 0;
    // A weight of any size is no gradient of Adam's.
    largest_exponent_ = c_.rule == RuleKind::kAdam && s.p.weight_decay != 0.0 && random.below(8) != 0 ? 150 : 255;
    for (int group = 0; group < kGroups; ++group) {
      if (kind == Kind::kDamaged) {
        damage(m, group);
        continue;
      }
      if (c_.codec == StateCodec::kPaper) {
        paper_states(m, group);
      } else {
        default_states(m, group);
      }
      gradients(m, group);
      weights(m, group, kind == Kind::kTaken && c_.rule == RuleKind::kAdam);
      corrections(m, group);
    }
    if (kind == Kind::kFlawed) {
      for (uint64_t n = 1 + random.below(3); n > 0; --n) flaw(m);
    }
  }

  /// Weights about as large as their updates, so that they cancel and round in all ways.
  void approach(Memory& m, const float* delta, bool normal) {
    for (int group = 0; group < kGroups; ++group) {
      if (random.below(4) == 0) continue;
      const uint64_t style = random.below(4);
      const int octaves = exact_ ? static_cast<int>(random.below(12)) : static_cast<int>(random.below(30));
      for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
        float target = delta[i];
        if (style == 0) target *= 1.0f + 0x1p-8f * static_cast<float>(static_cast<int>(random.below(9)) - 4);
        if (style == 1) target *= std::ldexp(1.0f, static_cast<int>(random.below(18)));
        if (style >= 2) target = std::ldexp(target, octaves);
        if (random.below(2) == 0) target = -target;
        uint32_t word = bfloat16(target) & 0xffffu;
        if (random.below(4) == 0) word = (word & 0xff80u) | (random.below(2) == 0 ? 0x7fu : 0u);
        if ((normal && !is_normal(word)) || exponent_of(word) > largest_exponent_) word = 0x3f80u;
        m.words(Memory::kParameter)[i] = static_cast<uint16_t>(word);
      }
    }
  }

 private:
  const Configuration c_;
  const int bits_;

 public:
  Random random;

 private:
  uint32_t next_pattern_ = 0;
  bool exact_ = false;
  int scale_exponent_ = 0;
  bool at_bounds_ = false;  ///< variances as small or large as they may be
  uint32_t largest_exponent_ = 255;
  float root_[kGroup] = {};  ///< of the group's variances

  double pick(std::initializer_list<double> list) { return list.begin()[random.below(list.size())]; }

  static uint32_t inverse_of(uint32_t odd) {
    uint32_t x = odd;
    for (int i = 0; i < 5; ++i) x *= 2u - odd * x;
    return x;
  }
  /// A hash that gives one lane of one stream a word at an end of its range.
  uint32_t hash_for(const core::DitherKey& key) {
    const uint32_t ends[] = {0u, 1u, 0xffffffffu, 0x80000000u, 0x7fffffffu, 0x000001ffu, 0xfffffe00u, random.bits()};
    const uint32_t word = ends[random.below(8)], lane = static_cast<uint32_t>(random.below(32));
    switch (random.below(3)) {
      case 0:
        return word - lane * core::kDitherLaneStep<core::DitherStream::kVariance> -
               key.step * core::kDitherTimeStep<core::DitherStream::kVariance>;
      case 1:
        return (word - lane * core::kDitherLaneStep<core::DitherStream::kMomentum> -
                key.step * core::kDitherTimeStep<core::DitherStream::kMomentum>)*inverse_of(0x85ebca6bu);
      default:
        return (word - lane * core::kDitherLaneStep<core::DitherStream::kWeight> -
                key.step * core::kDitherTimeStep<core::DitherStream::kWeight>)*inverse_of(0xc2b2ae35u);
    }
  }

  void momentum_codes(Memory& m, int group) {
    const uint64_t style = random.below(6);
    const uint32_t one = random.bits();
    for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
      static const uint8_t kEnds[] = {0x00, 0x80, 0x7f, 0xff, 0x01, 0x81};
      m.bytes(Memory::kMomentum)[i] = style == 0   ? static_cast<uint8_t>(one)
                                      : style == 1 ? kEnds[random.below(6)]
                                      : style == 2 ? static_cast<uint8_t>(random.below(2) << 7)
                                                   : static_cast<uint8_t>(random.bits());
    }
  }

  void default_states(Memory& m, int group) {
    uint32_t low = 100, high = 130;  // exponents
    const uint64_t range = exact_ ? 7 : random.below(12);
    if (range == 0) low = 8, high = 178;
    if (range == 1) low = 8, high = 60;
    if (range == 2) low = 160, high = 178;
    if (range == 3 && at_bounds_) low = 3, high = 5;
    if (range == 4 && at_bounds_) low = 178, high = 181;
    uint32_t shift = 8 + static_cast<uint32_t>(random.below(16));
    if (random.below(4) == 0) shift = random.below(2) == 0 ? 8 : 23;
    uint32_t pattern = (low + static_cast<uint32_t>(random.below(high - low))) << 23 | (random.bits() & 0x7fffffu);
    if (exact_) pattern = (pattern & 0x7f000000u) | 0x00800000u;  // a power of 4
    // The last code of the window must be below 2^31, and may be just below.
    const uint32_t last_base = 0x7fffffffu - (255u << shift);
    if (pattern > last_base)
      pattern = exact_                 ? 1u << 23
                : random.below(2) == 0 ? last_base
                                       : static_cast<uint32_t>(random.below(last_base + 1));
    const uint32_t field = pattern >> 19;
    m.words(Memory::kVarianceScale)[group] = static_cast<uint16_t>(field << 4 | (shift - 8));
    const auto window = core::WindowCodec::window<float>(field << 4 | (shift - 8));
    const auto code_at = [&window](uint32_t bits) {
      const int64_t code = static_cast<int64_t>(bits >> window.shift) - window.base_minus_one;
      return static_cast<uint32_t>(code < 1 ? 1 : code > 255 ? 255 : code);
    };
    const uint32_t least = code_at((low << 23) + (1u << window.shift)), most = std::max(least, code_at(high << 23));
    const uint64_t style = random.below(5);
    const uint32_t one = least + static_cast<uint32_t>(random.below(most - least + 1));
    for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
      uint32_t code = least + static_cast<uint32_t>(random.below(most - least + 1));
      if (style == 0) code = one;
      if (style == 1) code = random.below(2) == 0 ? least : most;
      if (exact_) code = code_at((pattern & 0x7f000000u) | 0x00800000u);
      m.bytes(Memory::kVariance)[i] = static_cast<uint8_t>(code);
      root_[i - group * kGroup] = std::sqrt(core::WindowCodec::decode<float>(code, window));
    }
    // From 2^-50, the least that is taken, to damaged ones, which read as 2^30.
    uint32_t header = (110u << 8) + static_cast<uint32_t>(random.below(20u << 8));
    if (random.below(8) == 0) {
      const uint32_t ends[] = {77u << 8, (77u << 8) + 1u, 157u << 8, (157u << 8) + 1u, (157u << 8) - 1u,
                               0x7fffu,  0x8000u,         0xff00u,   0xffffu};
      header = ends[random.below(std::size(ends))];
    } else if (random.below(8) == 0) {
      header = (77u << 8) + static_cast<uint32_t>(random.below(0x10000u - (77u << 8)));
    }
    m.words(Memory::kMomentumScale)[group] = static_cast<uint16_t>(header);
    momentum_codes(m, group);
  }

  void paper_states(Memory& m, int group) {
    uint32_t headers[2];
    for (uint32_t& header : headers) {
      header = static_cast<uint32_t>(random.below(0x7c00u));
      const uint32_t ends[] = {0u, 1u, 0x3ffu, 0x400u, 0x7bffu, 0x8000u, 0x8001u, 0xfbffu, 0x3c00u, 0x0fffu};
      if (random.below(4) == 0) header = ends[random.below(std::size(ends))];
    }
    m.words(Memory::kMomentumScale)[group] = static_cast<uint16_t>(headers[0]);
    m.words(Memory::kVarianceScale)[group] = static_cast<uint16_t>(headers[1]);
    const uint64_t style = random.below(6);
    const uint32_t one = random.bits();
    for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
      uint32_t code = random.bits() & 0xffu;
      if (style == 0) code = one & 0xffu;
      if (style == 1) code = random.below(2) == 0 ? 0 : 255;
      if (style == 2) code = 0;
      m.bytes(Memory::kVariance)[i] = static_cast<uint8_t>(code);
      root_[i - group * kGroup] = static_cast<float>(code) / 255.0f * std::abs(core::half_to_float(headers[1]));
    }
    momentum_codes(m, group);
  }

  void gradients(Memory& m, int group) {
    const uint64_t style = random.below(8);
    const int one = static_cast<int>(random.below(40));
    for (int j = 0; j < kGroup; ++j) {
      const uint32_t noise = random.bits();
      // Mostly about sqrt(v). Up to 2^26, whose square vouches for the rule's bounds as 2^52.
      const int root = root_[j] == 0.0f ? 90 : std::ilogb(root_[j]) + 127;
      int exponent = root + static_cast<int>(random.below(7)) - 3;
      if (style == 0) exponent = root + 14 - one;
      if (style == 1) exponent = static_cast<int>(random.below(153));
      if (style == 2) exponent = 153;
      if (exponent > 153) exponent = 153;
      exponent -= scale_exponent_;
      uint32_t word = bits_of(with_exponent(exponent, noise >> 1, noise)) >> 16;
      if (style == 3 && random.below(4) == 0) word = 0x8000u * (noise & 1u);
      if (style == 4) word = 0x8000u * (noise & 1u) + (random.below(2) == 0 ? 0u : noise >> 25);  // zero, subnormal
      if (exact_) word = bfloat16((noise & 1u) != 0 ? root_[j] : -root_[j]);
      m.words(Memory::kGradient)[group * kGroup + j] = static_cast<uint16_t>(word);
    }
  }

  void weights(Memory& m, int group, bool normal) {
    static const uint32_t kEdges[] = {62, 63, 64, 65, 190, 191, 192, 193};
    const uint64_t style = random.below(9);
    const uint32_t exponent = 100 + static_cast<uint32_t>(random.below(40)), edge = kEdges[random.below(8)];
    for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
      const uint32_t noise = random.bits();
      uint32_t word = (noise & 0x807fu) | exponent << 7;
      if (style == 0) word = next_pattern_++ & 0xffffu;
      if (style == 1) word = (noise & 0x807fu) | edge << 7;
      if (style == 2) word = (noise & 0x807fu) | kEdges[(noise >> 16) & 7] << 7;
      if (style == 3) word = (noise & 0x8000u) | exponent << 7 | ((noise & 1) != 0 ? 0x7fu : 0u);
      if (style == 4) word = (noise & 0x807fu) | (110 + (noise >> 16) % 18) << 7;
      if (style == 6) word = noise & 0x807fu;  // zero and subnormal, which an update may bring near one
      if (style == 5 && (noise >> 16) % 8 == 0) word = (noise & 0x807fu) | ((noise >> 8) & 1u) * 0x7f80u;
      if ((normal && !is_normal(word)) || exponent_of(word) > largest_exponent_) word = 0x3f80u | (word & 0x807fu);
      m.words(Memory::kParameter)[i] = static_cast<uint16_t>(word);
    }
  }

  void corrections(Memory& m, int group) {
    const int n = bits_ == 8 ? 127 : 32767;
    const int ends[] = {0, n, -n, 1, -1, n - 1, 1 - n, -n - 1, n, -n};
    const uint64_t style = random.below(4);
    const int one = static_cast<int>(random.below(static_cast<uint64_t>(2 * n + 2))) - n - 1;
    for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
      int c = static_cast<int>(random.below(static_cast<uint64_t>(2 * n + 2))) - n - 1;
      if (style == 0) c = one;
      if (style == 1) c = ends[random.below(10)];
      if (style == 2) c = ends[random.below(3)];
      m.set_correction(bits_, i, c);
    }
  }

  /// One place, or one group, of what is not usual.
  void flaw(Memory& m) {
    const int i = static_cast<int>(random.below(kElements)), group = i / kGroup;
    const uint32_t noise = random.bits();
    static const uint32_t kWords[] = {0x7f80, 0xff80, 0x7fc0, 0xffc0, 0x7f81, 0x7fff, 0xffff,
                                      0x7f7f, 0xff7f, 0x0000, 0x8000, 0x0001, 0x807f, 0x0080};
    const uint32_t word = random.below(2) == 0 ? kWords[random.below(std::size(kWords))] : noise & 0xffffu;
    static const uint32_t kHalves[] = {0x7c00, 0xfc00, 0x7e00, 0xfe00, 0x7c01, 0xfc01, 0xffff, 0x0000, 0x8000, 0xfbff};
    const uint32_t half = random.below(2) == 0 ? kHalves[random.below(std::size(kHalves))] : noise & 0xffffu;
    const uint32_t header = c_.codec == StateCodec::kPaper ? half : random.below(4) == 0 ? 0u : noise & 0xffffu;
    switch (random.below(8)) {
      case 0:
        m.bytes(Memory::kVariance)[i] = 0;
        break;
      case 1:
        m.words(Memory::kVarianceScale)[group] = static_cast<uint16_t>(header);
        break;
      case 2:
        m.words(Memory::kMomentumScale)[group] = static_cast<uint16_t>(header);
        break;
      case 3:  // about where its square, or it, is bounded
        m.words(Memory::kGradient)[i] = static_cast<uint16_t>(
            bits_of(with_exponent(150 + static_cast<int>(random.below(45)) - scale_exponent_, noise, noise >> 31)) >>
            16);
        break;
      case 4:
        m.words(Memory::kGradient)[i] = static_cast<uint16_t>(word);
        break;
      case 5:
        m.words(Memory::kParameter)[i] = static_cast<uint16_t>(word);
        break;
      case 6:  // variances so small that they vouch for nothing, and gradients
        m.words(Memory::kVarianceScale)[group] = static_cast<uint16_t>((noise % (10u << 4)) << 4 | (noise >> 28));
        for (int k = group * kGroup; k < (group + 1) * kGroup; ++k) {
          m.words(Memory::kGradient)[k] = static_cast<uint16_t>((random.bits() & 0x807fu) | (random.bits() % 64) << 7);
        }
        break;
      default:
        m.bytes(Memory::kVariance)[i] = static_cast<uint8_t>(noise);
        break;
    }
  }

  void damage(Memory& m, int group) {
    m.words(Memory::kMomentumScale)[group] = static_cast<uint16_t>(random.bits());
    m.words(Memory::kVarianceScale)[group] = static_cast<uint16_t>(random.bits());
    for (int i = group * kGroup; i < (group + 1) * kGroup; ++i) {
      const uint64_t noise = random.next();
      m.words(Memory::kParameter)[i] = static_cast<uint16_t>(noise);
      m.words(Memory::kGradient)[i] = static_cast<uint16_t>(noise >> 16);
      m.bytes(Memory::kMomentum)[i] = static_cast<uint8_t>(noise >> 32);
      m.bytes(Memory::kVariance)[i] = static_cast<uint8_t>(noise >> 40);
      m.set_correction(bits_, i, static_cast<int>(noise >> 48));
    }
  }
};

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
      open_block(b, scratch, setting, hyper, c.bits(), random, groups);
      scalar.load_weights[kBFloat16][static_cast<int>(c.master)](b);
      scalar.load_gradient[kBFloat16](b);
      scalar.rule[static_cast<int>(c.rule)][static_cast<int>(c.codec)][0](b);
      adversary.approach(before, b.delta, kind == Adversary::Kind::kTaken && c.rule == RuleKind::kAdam);
    }
    Memory expected = before;
    open_block(b, expected, setting, hyper, c.bits(), random, groups);
    run_general(scalar, c, b);
    const int64_t nonfinite = b.nonfinite;

    for (size_t t = 0; t < tables.size(); ++t) {
      const std::string where = std::string(tables[t]->isa) + ", block " + std::to_string(n) + ": " + setting.name();
      Memory general = before;
      open_block(b, general, setting, hyper, c.bits(), random, groups);
      run_general(*tables[t], c, b);
      ASSERT_TRUE(general == expected) << "general stages of " << where << ": " << expected.difference(general);
      ASSERT_EQ(b.nonfinite, nonfinite) << "general stages of " << where;

      Memory actual = before;
      open_block(b, actual, setting, hyper, c.bits(), random, groups);
      ++counts[t].blocks;
      if (usual_of(*tables[t], c).begin(b)) {
        ++counts[t].taken;
        run_usual(usual_of(*tables[t], c), b);
        for (int group = 0; group < groups; ++group) {
          bool near = true;
          for (int i = group * kGroup; i < (group + 1) * kGroup; ++i)
            near = near && is_near(expected.words(Memory::kParameter)[i]);
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
    EXPECT_LE(k.taken, k.blocks * 9 / 10);
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

TEST_F(UsualStages, EveryRuleCodecAndMasterWeightsHaveThem) {
  for (const KernelTable* t : tables_with_usual()) {
    for (int rule = 0; rule < cpu::kRuleKinds; ++rule) {
      for (int codec = 0; codec < cpu::kCodecs; ++codec) {
        for (int master = 0; master < cpu::kMasterKinds; ++master) {
          const auto& usual = t->usual[rule][codec][master];
          const bool has = rule <= static_cast<int>(RuleKind::kAdam) &&
                           codec != static_cast<int>(StateCodec::kFloat32) &&
                           core::has_correction(static_cast<MasterWeights>(master));
          EXPECT_EQ(usual.begin != nullptr, has) << t->isa << " " << rule << " " << codec << " " << master;
          EXPECT_EQ(usual.finish != nullptr, has);
          EXPECT_EQ(usual.encode[0] != nullptr, has);
        }
      }
    }
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

template <class Rule>
void check_finish(const Configuration& c, int passes) {
  SCOPED_TRACE(c.name());
  constexpr uint32_t kBlocks = 65536 / kElements;
  const int bits = c.bits(), n_max = bits == 8 ? 127 : 32767;
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
          const float n = widened(word);
          const uint32_t c_bits = static_cast<uint32_t>(before.correction(bits, i));
          const float value = bits == 8 ? core::correction_value<core::BFloat16, 8, float>(n, c_bits)
                                        : core::correction_value<core::BFloat16, 16, float>(n, c_bits);
          const float w = n + value;
          const float half = with_exponent(static_cast<int>(exponent_of(word)) - 8, 0, 0);
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
              static const int kEdges[] = {62, 63, 64, 65, 190, 191, 192, 193};
              const uint32_t edge_mantissa = (noise & 7u) == 0   ? 0x7f8000u
                                             : (noise & 7u) == 1 ? 0u
                                             : (noise & 7u) == 2 ? 0x7f7fffu
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
      scalar.load_weights[kBFloat16][static_cast<int>(c.master)](b);
      for (int i = 0; i < kElements; ++i) b.delta[i] = Rule::template decayed<float>(b.weight[i], steps[i], h);
      store_groups(scalar.store_weights[kBFloat16][static_cast<int>(c.master)], b, 0, kGroups);
      for (int group = 0; group < kGroups; ++group) {
        bool near = true;
        for (int i = group * kGroup; i < (group + 1) * kGroup; ++i)
          near = near && is_near(expected.words(Memory::kParameter)[i]) && b.delta[i] != 0.0f;
        fast += near;
        ++groups;
      }
      for (const KernelTable* t : tables) {
        Memory actual = before;
        open_block(b, actual, setting, hyper, bits, random);
        std::copy_n(steps, kElements, b.delta);
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
    check_finish<core::Adam>({RuleKind::kAdam, StateCodec::kPaper, master}, passes);
  }
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
          const DType gradient = random.below(2) == 0 ? DType::kBFloat16 : DType::kFloat32;
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
          run_general(scalar, c, want, gradient);
          for (const KernelTable* t : tables_with_usual()) {
            const std::string where =
                std::string(t->isa) + ", " + c.name() + ", block " + std::to_string(n) + ": " + setting.name();
            Memory actual = before;
            open_block(got, actual, setting, hyper, c.bits(), random, groups, gradient == DType::kFloat32);
            run_general(*t, c, got, gradient);
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
