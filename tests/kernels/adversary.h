// A block's memory between guard bytes, and contents made to break the conditions of "usual" blocks (cpu/kernels.h):
// every pattern of weights beside every kind of correction, weights at the ends of what a fast group may hold, headers
// and codes at all ends and damaged ones, gradients of all exponents, chosen dither, cancellation and ties.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <initializer_list>
#include <iterator>
#include <string>
#include <vector>

#include "flashoptim/core/codecs/default_codec.h"
#include "flashoptim/core/weight_split.h"
#include "src/cpu/run_block.h"
#include "src/rules.h"
#include "tests/core/machine_isas.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {

using cpu::Block;
using cpu::KernelTable;
using cpu::RuleKind;

inline constexpr int kGroups = cpu::kBlockGroups, kElements = cpu::kBlockElements,
                     kGroup = static_cast<int>(kGroupSize);
inline constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);
inline constexpr MasterWeights kCorrected[] = {MasterWeights::kCorrection8, MasterWeights::kCorrection16,
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

  void attach(Block& b, int correction_bits, bool f32_gradient = false, bool f32_parameter = false) {
    b.parameter = f32_parameter ? static_cast<void*>(floats(kParameter)) : words(kParameter);
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
  DType parameter = DType::kBFloat16, gradient = DType::kBFloat16;

  int bits() const { return core::correction_bits(master); }
  std::string name() const {
    return std::string(rule == RuleKind::kAdamW  ? "AdamW"
                       : rule == RuleKind::kAdam ? "Adam"
                                                 : "other rule") +
           ", " + (codec == StateCodec::kPaper ? "paper" : "default") + " codec, master " +
           std::to_string(static_cast<int>(master)) + ", weights " + dtype_name(parameter) + ", gradients " +
           dtype_name(gradient);
  }
  static const char* dtype_name(DType dtype) {
    return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kBFloat16 ? "bf16" : "fp16";
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
                int groups = kGroups, bool f32_gradient = false, bool f32_parameter = false) {
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
  m.attach(b, bits, f32_gradient, f32_parameter);
}

inline void run_general(const KernelTable& t, const Configuration& c, Block& b) {
  cpu::run_stages(t, {c.rule, c.codec, c.parameter, c.gradient, c.master}, b);
}

inline const cpu::UsualStages& usual_of(const KernelTable& t, const Configuration& c) {
  return cpu::usual_stages(t, {c.rule, c.codec, c.parameter, c.gradient, c.master});
}

inline std::vector<const KernelTable*> tables_with_usual() {
  std::vector<const KernelTable*> tables;
  for (const KernelTable* t : machine_tables()) {
    if (usual_of(*t, {RuleKind::kAdamW, StateCodec::kDefault, MasterWeights::kCorrection8}).begin != nullptr)
      tables.push_back(t);
  }
  return tables;
}

inline uint32_t bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline float widened(uint32_t word) { return float_of(word << 16); }
inline uint32_t exponent_of(uint32_t word) { return (word >> 7) & 0xffu; }
inline bool is_normal(uint32_t word) { return exponent_of(word) != 0 && exponent_of(word) != 255; }
/// Weights of which finish() makes fast groups, of a dtype of 16 bits.
inline bool is_near(DType dtype, uint32_t word) {
  if (dtype == DType::kFloat16) return (word & 0x7c00u) != 0x7c00u;
  return exponent_of(word) >= 64 && exponent_of(word) <= 191;
}
/// Infinity is the largest number.
inline uint32_t finite_half(float value) {
  const uint32_t half = core::float_to_half(value);
  return (half & 0x7fffu) == 0x7c00u && std::isfinite(value) ? half - 1u : half;
}

inline float with_exponent(int exponent, uint32_t mantissa, uint32_t sign) {
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
    store_gradients(m);
    // Weights of fp16 are of the same patterns.
    if (c_.parameter == DType::kFloat32) store_as_f32(m, Memory::kParameter);
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
        if (c_.parameter == DType::kFloat32) {
          m.floats(Memory::kParameter)[i] = target;
          continue;
        }
        if (c_.parameter == DType::kFloat16) {
          m.words(Memory::kParameter)[i] = static_cast<uint16_t>(finite_half(target));
          continue;
        }
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

  /// bf16 numbers in place, with more digits.
  void store_as_f32(Memory& m, Memory::Array array) {
    const bool more = !exact_ && random.below(2) == 0;
    float values[kElements];
    for (int i = 0; i < kElements; ++i)
      values[i] = float_of(m.words(array)[i] * 0x10000u + (more ? random.bits() & 0xffffu : 0u));
    std::copy_n(values, kElements, m.floats(array));
  }
  void store_gradients(Memory& m) {
    if (c_.gradient == DType::kFloat32) store_as_f32(m, Memory::kGradient);
    if (c_.gradient != DType::kFloat16) return;
    for (int i = 0; i < kElements; ++i) {
      uint16_t& word = m.words(Memory::kGradient)[i];
      word = static_cast<uint16_t>(finite_half(widened(word)));
    }
  }

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

}  // namespace flashoptim::test
