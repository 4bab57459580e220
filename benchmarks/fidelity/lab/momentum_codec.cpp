// Candidates for one signed state alone (SGD, Lion): mu-law codes whose range a group may choose.
#include <algorithm>
#include <cmath>

#include "lab/lab_codec.h"

namespace flashoptim::fidelity {

namespace {

using core::from_bits;
using core::to_bits;

class MomentumCodec : public LabCodec {
 public:
  MomentumCodec(int64_t elements, const MomentumCodecOptions& options)
      : o_(options),
        codes_(static_cast<size_t>(elements)),
        scales_(static_cast<size_t>(elements / 32)),
        bits_(static_cast<size_t>(elements / 32), options.mantissa_bits) {}

  void decode(int64_t block, float* m, float*) override {
    const size_t first = static_cast<size_t>(block) * 32;
    const float scale = scales_[static_cast<size_t>(block)];
    const auto shift = static_cast<uint32_t>(23 - bits_[static_cast<size_t>(block)]);
    const float offset = floor_offset(shift);
    for (size_t i = 0; i < 32; ++i) {
      const uint32_t code = codes_[first + i], magnitude = code & 127u;
      float x = from_bits((magnitude << shift) | 0x40000000u) - offset;
      x = magnitude == 0u ? 0.0f : x;
      m[i] = from_bits(to_bits(x * scale) | (code >> 7 << 31));
    }
  }

  void encode(int64_t block, const core::DitherKey& key, const float* m, const float*) override {
    const size_t first = static_cast<size_t>(block) * 32;
    float largest = 0.0f;
    for (size_t i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(m[i]));
    const int bits = choose_bits(m, largest);
    const auto shift = static_cast<uint32_t>(23 - bits);
    const float offset = floor_offset(shift);
    const float top = from_bits((127u << shift) | 0x40000000u) - offset;
    const auto dropped = static_cast<uint32_t>(23 - o_.scale_mantissa_bits);
    uint32_t pattern = to_bits(largest / top * (1.0f + 0x1p-22f));
    pattern = (pattern + ((1u << dropped) - 1u)) >> dropped << dropped;
    const bool empty = pattern < 0x00800000u;
    const float scale = empty ? 0.0f : from_bits(pattern);
    const float inverse = empty ? 0.0f : 1.0f / scale;
    scales_[static_cast<size_t>(block)] = scale;
    bits_[static_cast<size_t>(block)] = bits;
    uint32_t words[32];
    fill_dither<core::DitherStream::kMomentum>(o_.dither, key, block, words);
    for (size_t i = 0; i < 32; ++i) {
      const float y = std::max(std::fabs(m[i]) * inverse + offset, lowest(shift));
      uint32_t code = (to_bits(y) + (words[i] >> (32u - shift)) - 0x40000000u) >> shift;
      code = m[i] == 0.0f ? 0u : std::min(code, 127u);
      codes_[first + i] = static_cast<uint8_t>(empty ? 0u : code | (to_bits(m[i]) >> 31 << 7));
    }
  }

 private:
  /// What code 1 (0 without a floor) is as a float, and what that is above |x| / G.
  float lowest(uint32_t shift) const { return from_bits((o_.sign_floor > 0.0 ? 1u << shift : 0u) | 0x40000000u); }
  float floor_offset(uint32_t shift) const {
    const float step = lowest(shift) - 2.0f;
    return 2.0f + step - static_cast<float>(o_.sign_floor) * step;
  }

  /// Bits of the pattern, in octaves, from |m| up to the largest.
  static double octaves_below(float largest, float m) {
    return static_cast<double>(std::min(to_bits(largest) - to_bits(std::fabs(m)), 20u << 23)) * 0x1p-23;
  }

  int choose_bits(const float* m, float largest) const {
    using Rule = MomentumCodecOptions::Rule;
    if (o_.rule == Rule::kFixed) return o_.mantissa_bits;
    double octaves = 0.0;
    const auto smallest_maximum = [&](int count, int size, int stride, int next) {
      for (int k = 0; k < count; ++k) {
        float x = 0.0f;
        for (int j = 0; j < size; ++j) x = std::max(x, std::fabs(m[k * next + j * stride]));
        if (x != 0.0f) octaves = std::max(octaves, octaves_below(largest, x));
      }
    };
    switch (o_.rule) {
      case Rule::kMean:
        for (int i = 0; i < 32; ++i)
          octaves += m[i] == 0.0f && o_.sign_floor > 0.0 ? 0.0 : octaves_below(largest, m[i]) / 32.0;
        break;
      case Rule::kSmallest:
        for (int i = 0; i < 32; ++i) {
          if (m[i] != 0.0f) octaves = std::max(octaves, octaves_below(largest, m[i]));
        }
        break;
      case Rule::kQuads:
        smallest_maximum(8, 4, 1, 4);
        break;
      case Rule::kOctets:
        smallest_maximum(4, 8, 1, 8);
        break;
      case Rule::kPairs:
        smallest_maximum(16, 2, 1, 2);
        break;
      default:
        break;
    }
    int bits = 6;
    for (const double threshold : o_.thresholds) bits -= octaves < threshold ? 0 : 1;
    return std::max(bits, o_.lowest_mantissa_bits);
  }

  MomentumCodecOptions o_;
  std::vector<uint8_t> codes_;
  std::vector<float> scales_;
  std::vector<int> bits_;
};

}  // namespace

std::unique_ptr<LabCodec> make_momentum_codec(int64_t elements, const MomentumCodecOptions& options) {
  return std::make_unique<MomentumCodec>(elements, options);
}

}  // namespace flashoptim::fidelity
