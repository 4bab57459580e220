// Candidates for Adam's two states around the library's window codec. Formulas: docs/numerics.md, "What was tried".
#include <algorithm>
#include <bit>
#include <cmath>

#include "lab/lab_codec.h"

namespace flashoptim::fidelity {

namespace {

using core::from_bits;
using core::to_bits;

class AdamCodec : public LabCodec {
 public:
  AdamCodec(int64_t elements, const AdamCodecOptions& options)
      : o_(options),
        v_codes_(static_cast<size_t>(elements)),
        m_codes_(static_cast<size_t>(elements)),
        v_exact_(static_cast<size_t>(elements)),
        m_exact_(static_cast<size_t>(elements)),
        windows_(static_cast<size_t>(elements / 32)),
        m_scales_(static_cast<size_t>(elements / 32)) {}

  void decode(int64_t block, float* m, float* v) override {
    const size_t first = static_cast<size_t>(block) * 32;
    const Window& w = windows_[static_cast<size_t>(block)];
    for (size_t i = 0; i < 32; ++i) v[i] = decode_variance(v_codes_[first + i], v_exact_[first + i], w);
    if (o_.momentum == AdamCodecOptions::Momentum::kExact) {
      std::copy_n(m_exact_.data() + first, 32, m);
      return;
    }
    const int bits = o_.mantissa_bits - w.borrowed;
    const float scale = m_scales_[static_cast<size_t>(block)];
    for (size_t i = 0; i < 32; ++i) {
      const uint32_t code = m_codes_[first + i];
      const float x = from_bits(((code & 127u) << (23 - bits)) | 0x40000000u) - 2.0f;
      m[i] = x * (scale * root(v[i]).scale);
      if (code & 128u) m[i] = -m[i];
    }
  }

  void encode(int64_t block, const core::DitherKey& key, const float* m, const float* v) override {
    const size_t first = static_cast<size_t>(block) * 32;
    Window& w = windows_[static_cast<size_t>(block)];
    uint32_t words[32];
    fill_dither<core::DitherStream::kVariance>(o_.variance_dither, key, block, words);
    w = make_window(v);
    for (size_t i = 0; i < 32; ++i) v_codes_[first + i] = encode_variance(v[i], w, words[i]);
    std::copy_n(v, 32, v_exact_.data() + first);
    std::copy_n(m, 32, m_exact_.data() + first);
    if (o_.momentum == AdamCodecOptions::Momentum::kExact) return;

    float x[32];
    float largest = 0.0f;
    for (size_t i = 0; i < 32; ++i) {
      const float stored = decode_variance(v_codes_[first + i], v_exact_[first + i], w);
      x[i] = std::fabs(m[i]) * root(stored).inverse;
      largest = std::max(largest, x[i]);
    }
    const int bits = o_.mantissa_bits - w.borrowed;
    const uint32_t last = 127u >> w.borrowed;
    const uint32_t shift = 23u - static_cast<uint32_t>(bits);
    const float top = from_bits((last << shift) | 0x40000000u) - 2.0f;
    const auto dropped = static_cast<uint32_t>(23 - o_.scale_mantissa_bits);
    uint32_t pattern = to_bits(largest / top * (1.0f + 0x1p-22f));
    pattern = (pattern + ((1u << dropped) - 1u)) >> dropped << dropped;
    const bool empty = pattern < 0x00800000u;
    const float scale = empty ? 0.0f : from_bits(pattern);
    const float inverse = empty ? 0.0f : 1.0f / scale;
    m_scales_[static_cast<size_t>(block)] = scale;
    fill_dither<core::DitherStream::kMomentum>(o_.momentum_dither, key, block, words);
    for (size_t i = 0; i < 32; ++i) {
      const uint32_t y = to_bits(x[i] * inverse + 2.0f) + (words[i] >> (32 - shift));
      const uint32_t code = std::min((y - 0x40000000u) >> shift, last);
      m_codes_[first + i] = static_cast<uint8_t>(code | (to_bits(m[i]) >> 31 << 7));
    }
  }

 private:
  struct Window {
    uint32_t shift = 8, base = 0, split = ~0u, skipped = 0, largest_code = 255;
    int borrowed = 0;
    float absmax = 0.0f;
  };
  struct Root {
    float scale, inverse;
  };

  /// The power of two (or of its root) that momentum is stored relative to, and its inverse.
  Root root(float v) const {
    if (o_.momentum == AdamCodecOptions::Momentum::kAbsmax) return {1.0f, 1.0f};
    if (v == 0.0f) return {0.0f, 0.0f};
    const uint32_t e = std::max(to_bits(v) >> 23, 1u);
    const uint32_t k = (e + 127u) >> 1;
    const bool odd = o_.half_octaves && (e & 1u) == 0u;
    return {from_bits(k << 23) * (odd ? 1.41421354f : 1.0f), from_bits((254u - k) << 23) * (odd ? 0.70710677f : 1.0f)};
  }

  Window make_window(const float* v) const {
    Window w;
    if (o_.variance != AdamCodecOptions::Variance::kWindow) {
      w.absmax = *std::max_element(v, v + 32);
      return w;
    }
    uint32_t largest = 0, smallest = ~0u;
    for (int i = 0; i < 32; ++i) {
      const uint32_t bits = storable(v[i]);
      largest = std::max(largest, bits);
      smallest = std::min(smallest, bits - 1u);
    }
    if (largest == 0) return w;
    smallest += 1u;
    uint32_t octaves = 0;  // which octaves above the smallest are occupied
    for (int i = 0; i < 32; ++i) {
      const uint32_t bits = storable(v[i]);
      if (bits != 0) octaves |= 1u << std::min(31u, (bits >> 23) - (smallest >> 23));
    }
    uint32_t gap_start = 0, gap_length = 0;
    if (o_.gap) find_gap(octaves, gap_start, gap_length);
    for (w.shift = 8; w.shift <= 23; ++w.shift) {
      const uint32_t s = w.shift;
      const uint32_t grid = std::max(s, 19u);
      w.borrowed = static_cast<int>(s) >= o_.borrow_from ? 1 : 0;
      w.largest_code = (256u << w.borrowed) - 1u;
      w.base = smallest >> grid << (grid - s);
      const uint32_t codes = ((largest + ((1u << s) - 1u)) >> s) - w.base + 1u;
      w.split = ~0u;
      w.skipped = 0;
      if (codes <= w.largest_code) break;
      if (gap_length == 0) continue;
      // The bottom of the first empty octave keeps its code: rounding up out of the lower cluster lands there.
      w.split = (((smallest >> 23) + gap_start) << (23 - s)) - w.base + 2u;
      w.skipped = (gap_length << (23 - s)) - 1u;
      if (codes - w.skipped <= w.largest_code) break;
    }
    return w;
  }

  /// Longest run of empty octaves below the highest occupied one; at most 30, even, from octave 15 at the latest.
  static void find_gap(uint32_t octaves, uint32_t& start, uint32_t& length) {
    uint32_t holes = ~octaves & (std::bit_floor(octaves) - 1u), last = 0, run = 0;
    while (holes != 0) {
      last = holes;
      ++run;
      holes &= holes >> 1;
    }
    start = last == 0 ? 0 : static_cast<uint32_t>(std::countr_zero(last));
    length = start <= 15 ? std::min(run & ~1u, 30u) : 0u;
  }

  static uint32_t storable(float v) { return v > 0.0f ? std::max(to_bits(v), 0x00800000u) : 0u; }

  uint16_t encode_variance(float v, const Window& w, uint32_t word) const {
    if (v == 0.0f) return 0;
    if (o_.variance == AdamCodecOptions::Variance::kExact) return 0;
    if (o_.variance == AdamCodecOptions::Variance::kWindow) {
      const uint32_t k = ((storable(v) + (word >> (32u - w.shift))) >> w.shift) - w.base + 1u;
      return static_cast<uint16_t>(std::min(k >= w.split ? k - w.skipped : k, w.largest_code));
    }
    // A power compander rounded without bias between the two values that neighbouring codes stand for; never 0.
    const double x = static_cast<double>(v) / static_cast<double>(w.absmax);
    const double y =
        255.0 * (o_.variance == AdamCodecOptions::Variance::kSqrt ? std::sqrt(x) : std::sqrt(std::sqrt(x)));
    const double lower = std::min(std::floor(y), 254.0);
    const double low = power(lower), high = power(lower + 1.0);
    const double u = static_cast<double>(word) * 0x1p-32;
    const double code = lower + (u < (power(y) - low) / (high - low) ? 1.0 : 0.0);
    return static_cast<uint16_t>(std::max(code, 1.0));
  }
  double power(double code) const {
    const double square = code * code;
    return o_.variance == AdamCodecOptions::Variance::kSqrt ? square : square * square;
  }
  float decode_variance(uint32_t code, float exact, const Window& w) const {
    switch (o_.variance) {
      case AdamCodecOptions::Variance::kExact:
        return exact;
      case AdamCodecOptions::Variance::kWindow: {
        const uint32_t k = code >= w.split ? code + w.skipped : code;
        return code == 0 ? 0.0f : from_bits((k - 1u + w.base) << w.shift);
      }
      default:
        return static_cast<float>(power(code) / power(255.0) * static_cast<double>(w.absmax));
    }
  }

  AdamCodecOptions o_;
  std::vector<uint16_t> v_codes_;
  std::vector<uint8_t> m_codes_;
  std::vector<float> v_exact_, m_exact_;
  std::vector<Window> windows_;
  std::vector<float> m_scales_;
};

}  // namespace

std::unique_ptr<LabCodec> make_adam_codec(int64_t elements, const AdamCodecOptions& options) {
  return std::make_unique<AdamCodec>(elements, options);
}

}  // namespace flashoptim::fidelity
