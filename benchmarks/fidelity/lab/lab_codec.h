// State codecs that exist only here: candidates that lost, or that nobody has decided about, and other people's.
//
// A codec sees the states of one block as fp32 numbers. The update rule is the library's (core/optimizers), the weights
// are fp32. Plain loops; whatever is chosen is written again in include/flashoptim/core.
#pragma once

#include <array>

#include "flashoptim/core/dither.h"
#include "lab/candidate.h"

namespace flashoptim::fidelity {

class LabCodec {
 public:
  virtual ~LabCodec() = default;
  virtual int64_t block_size() const { return 32; }
  /// Signed slot m and, where the optimizer has one, unsigned slot v of one block.
  virtual void decode(int64_t block, float* m, float* v) = 0;
  virtual void encode(int64_t block, const core::DitherKey& key, const float* m, const float* v) = 0;
};

enum class DitherKind {
  kLowDiscrepancy,  ///< the library's
  kWhite,           ///< independent random words
  kNearest,         ///< always half: rounding to nearest
};

template <core::DitherStream kStream>
inline void fill_dither(DitherKind kind, const core::DitherKey& key, int64_t block, uint32_t (&words)[32]) {
  const uint32_t hash = core::dither_group_hash<float>(key, static_cast<uint32_t>(block * 32), 0u);
  const uint32_t start = core::dither_group_start<kStream, float>(key, hash);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    words[lane] = start + lane * core::kDitherLaneStep<kStream>;
    if (kind == DitherKind::kWhite) words[lane] = core::mix32<float>(words[lane] ^ core::mix32<float>(key.step + lane));
    if (kind == DitherKind::kNearest) words[lane] = 0x80000000u;
  }
}

/// Adam's two states.
struct AdamCodecOptions {
  enum class Variance { kWindow, kSqrt, kRoot4, kExact };
  enum class Momentum { kRelative, kAbsmax, kExact };
  Variance variance = Variance::kWindow;
  Momentum momentum = Momentum::kRelative;
  DitherKind variance_dither = DitherKind::kLowDiscrepancy;
  DitherKind momentum_dither = DitherKind::kLowDiscrepancy;
  int mantissa_bits = 6;        ///< K of the momentum's mu-law
  int scale_mantissa_bits = 8;  ///< of the momentum's G
  bool half_octaves = false;    ///< S = sqrt(2)^k instead of 2^k
  int borrow_from = 99;         ///< windows of this shift and above take a bit of the momentum's code
  bool gap = false;             ///< one run of empty octaves is cut out of the window
};
std::unique_ptr<LabCodec> make_adam_codec(int64_t elements, const AdamCodecOptions& options);

/// One signed state alone.
struct MomentumCodecOptions {
  enum class Rule {
    kFixed,
    kMean,      ///< K by the mean of log2(max / |m|): a sum of integers
    kSmallest,  ///< K by log2(max / smallest non-zero |m|)
    kQuads,     ///< K by log2(max / smallest of the 8 maxima of 4 consecutive elements)
    kOctets,    ///< the same over 4 maxima of 8
    kPairs,     ///< the same over 16 maxima of 2
  };
  Rule rule = Rule::kFixed;
  std::array<double, 3> thresholds{};  ///< octaves below which K is 6, 5, 4; else 3
  int mantissa_bits = 5;               ///< K, where fixed
  int scale_mantissa_bits = 8;
  DitherKind dither = DitherKind::kLowDiscrepancy;
  /// Keeps the sign of what is small: code 1 stands for this share of the first step, and m != 0 never becomes 0.
  double sign_floor = 0.0;
  int lowest_mantissa_bits = 3;
};
std::unique_ptr<LabCodec> make_momentum_codec(int64_t elements, const MomentumCodecOptions& options);

/// Dettmers et al. 2022, "8-bit optimizers via block-wise quantization": dynamic tree codes, blocks of 256, fp32
/// absmax, nearest code; variance (not its root) in the unsigned code.
std::unique_ptr<LabCodec> make_dynamic8_codec(int64_t elements);

}  // namespace flashoptim::fidelity
