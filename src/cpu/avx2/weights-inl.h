// AVX2's hot path: weights and their corrections, updated by steps that the states' passes leave in delta.
#pragma once

#include "src/cpu/avx2/formats-inl.h"

namespace flashoptim::cpu::avx2 {

/// Reads a half's gradient, and its weight where the rule takes weight decay into the gradient.
template <core::Rule Rule, DType kGradient, DType kParameter, MasterWeights kMaster, bool kScaled>
struct Inputs : Pieces {
  using Gradient = Format<kGradient>;
  using Parameter = Format<kParameter>;
  struct None {};
  using Corrected =
      typename std::conditional_t<Rule::kDecoupledDecay, std::type_identity<None>,
                                  std::type_identity<Corrections<kParameter, core::correction_bits(kMaster)>>>::type;
  const Block& b;
  const void* gradient;
  const char* ahead;
  __m256 factor;
  Corrected corrections;
  __m256i unusual = _mm256_setzero_si256();  ///< weights whose corrections have been taken for what they are not

  explicit FLASHOPTIM_HD Inputs(const Block& block)
      : b(block),
        gradient(block.gradient),
        ahead(ahead_of<Gradient::kBytes>(block, gradient)),
        factor(all_f(block.gradient_scale)) {}

  FLASHOPTIM_HD void ask_ahead(int group) const { ask<Gradient::kBytes, 0>(ahead, group); }
  FLASHOPTIM_HD void operator()(int group, int half, Pair* w, Pair* g) {
    *g = Gradient::load(gradient, group * kGroup + 8 * half);
    if constexpr (kScaled) *g = *g * Pair{{factor}, {factor}};
    if constexpr (!Rule::kDecoupledDecay) {
      const int first = group * kGroup;
      unusual = _mm256_or_si256(unusual, Parameter::not_normal(b.parameter, first + 8 * half));
      const Pair narrow = Parameter::load(b.parameter, first + 8 * half);
      *w = narrow + corrections.fraction(corrections.load(b.correction, first), half) * corrections.scale(narrow);
    }
  }
};

/// finish() of UsualStages.
template <core::Rule Rule, DType kParameter, MasterWeights kMaster>
struct Weights : Pieces {
  using Hyper = typename Rule::Hyper;
  using Lane = BoundedLane<Pair>;
  using Parameter = Format<kParameter>;
  static constexpr bool kCorrected = core::has_correction(kMaster), kNearest = core::is_nearest(kMaster);
  static constexpr int kBits = core::correction_bits(kMaster);

  static FLASHOPTIM_HD Pair delta_of(Pair w, const float* steps, int at, const Hyper& h) {
    return Rule::template decayed<Lane>({w}, {core::load_f32<Pair>(steps + at)}, h).v;
  }

  /// By the general stages, which want numbers in elements' order.
  [[gnu::cold, gnu::noinline]] static void finish_group_generic(Block& b, int group) {
    const auto h = *static_cast<const Hyper*>(b.hyper);
    const int begin = b.store_begin, end = b.store_end, first = group * kGroup;
    float steps[kGroup];
    for (int at = 0; at < kGroup; ++at) steps[element(at)] = b.delta[first + at];
    using Narrow = typename Parameter::Narrow;
    Generic::template load_narrow_weights_of<Narrow, kMaster>(b, group, group + 1);
    for (int i = 0; i < kGroup; i += kLanes) {
      const BoundedLane<F> w{core::load_f32<F>(b.weight + first + i)}, step{core::load_f32<F>(steps + i)};
      core::store_f32(b.delta + first + i, Rule::template decayed<BoundedLane<F>>(w, step, h).v);
    }
    b.store_begin = group;
    b.store_end = group + 1;
    Generic::template store_narrow_weights<Narrow, kMaster>(b);
    b.store_begin = begin;
    b.store_end = end;
  }

  /// Weights of groups store_begin ... store_end - 1, whose steps stand in delta.
  static void finish(Block& b) {
    const int begin = b.store_begin, end = b.store_end;
    if constexpr (kCorrected) {
      Corrected groups(b);
      const auto update = [&](int group, const Prepared& from) __attribute__((always_inline)) {
        if (!groups.update(group, from)) [[unlikely]]
          finish_group_generic(b, group);
      };
      Prepared even, odd;
      groups.prepare(begin, &even);
      for (int group = begin; group < end; group += 2) {
        groups.prepare(group + 1, &odd);
        update(group, even);
        if (group + 2 < end) groups.prepare(group + 2, &even);
        update(group + 1, odd);
      }
    } else {
      const Alone groups(b);
      for (int group = begin; group < end; ++group) {
        const bool done = groups.update(group);
        if constexpr (kParameter != DType::kFloat32) {
          if (!done) [[unlikely]]
            finish_group_generic(b, group);
        }
      }
    }
  }

 private:
  struct Alone {
    Hyper h;
    void* parameter;
    const float* steps;
    const char* ahead;
    Parameter format;

    explicit FLASHOPTIM_HD Alone(const Block& b)
        : h(*static_cast<const Hyper*>(b.hyper)),
          parameter(b.parameter),
          steps(b.delta),
          ahead(ahead_of<Parameter::kBytes>(b, parameter)) {}

    /// False, and nothing written, where core's formulas have to.
    FLASHOPTIM_HD bool update(int group) const {
      const int first = group * kGroup;
      ask<Parameter::kBytes, 1>(ahead, group);
      Pair moved[2];
      for (const int half : {0, 1}) {
        const Pair w = format.load(parameter, first + 8 * half);
        moved[half] = w - delta_of(w, steps, first + kHalf * half, h);
      }
      if constexpr (kParameter == DType::kFloat32) {
        for (const int half : {0, 1}) format.store(parameter, first + 8 * half, core::canonical_nan(moved[half]));
      } else {
        const typename Parameter::Rounded to[2] = {format.round(moved[0]), format.round(moved[1])};
        const __m256i flags = _mm256_or_si256(format.flags(to[0]), format.flags(to[1]));
        if (!_mm256_testz_si256(flags, format.outside)) [[unlikely]]
          return false;
        for (const int half : {0, 1}) to[half].store(parameter, first + 8 * half);
      }
      return true;
    }
  };

  struct Prepared {
    /// What narrow values are too small by; or, where corrections are rounded to nearest, the new weights.
    alignas(32) float rest[kGroup];
    /// Marks deltas of 0, which change nothing. Products of two small ones may be 0, too: then core's formulas are the
    /// slower way.
    __m256i zeros;
  };

  /// The first half of a group's operations beside the second of the one before: chains of half the length, of which
  /// more fit into the processor's window.
  struct Corrected {
    Hyper h;
    void* parameter;
    void* base;
    const float* steps;
    const char* parameter_ahead;
    const char* corrections_ahead;
    std::conditional_t<kNearest, NoDither, Dither<core::DitherStream::kWeight>> dither;
    Corrections<kParameter, kBits> corrections;
    const Parameter& format = corrections.format;

    explicit FLASHOPTIM_HD Corrected(const Block& b)
        : h(*static_cast<const Hyper*>(b.hyper)),
          parameter(b.parameter),
          base(b.correction),
          steps(b.delta),
          parameter_ahead(ahead_of<2>(b, parameter)),
          corrections_ahead(ahead_of<kBits / 8>(b, base)),
          dither(b) {}

    FLASHOPTIM_HD void prepare(int group, Prepared* to) const {
      const int first = group * kGroup;
      ask<2, 1>(parameter_ahead, group);
      ask<kBits / 8, 1>(corrections_ahead, group);
      const auto of_group = corrections.load(base, first);
      __m256i flags[2];
      for (const int half : {0, 1}) {
        const Pair n = format.load(parameter, first + 8 * half), fraction = corrections.fraction(of_group, half),
                   scale = corrections.scale(n);
        // Their product is exact, so that an fma rounds as the sum does.
        const Pair w = {{_mm256_fmadd_ps(fraction.lo.v, scale.lo.v, n.lo.v)},
                        {_mm256_fmadd_ps(fraction.hi.v, scale.hi.v, n.hi.v)}};
        const Pair delta = delta_of(w, steps, first + kHalf * half, h);
        Pair rest;
        if constexpr (kNearest) {
          rest = w - delta;
        } else {
          rest = {{_mm256_fmsub_ps(fraction.lo.v, scale.lo.v, delta.lo.v)},
                  {_mm256_fmsub_ps(fraction.hi.v, scale.hi.v, delta.hi.v)}};
        }
        core::store_f32(to->rest + kHalf * half, rest);
        flags[half] = bits_of(_mm256_cmp_ps(_mm256_mul_ps(delta.lo.v, delta.hi.v), _mm256_setzero_ps(), _CMP_EQ_OQ));
      }
      to->zeros = _mm256_or_si256(flags[0], flags[1]);
    }
    /// False, and nothing written, where core's formulas have to.
    FLASHOPTIM_HD bool update(int group, const Prepared& from) const {
      const int first = group * kGroup;
      Pair narrow[2], rest[2];
      typename Parameter::Rounded to[2];
      __m256i flags[2];
      for (const int half : {0, 1}) {
        narrow[half] = format.load(parameter, first + 8 * half);
        rest[half] = core::load_f32<Pair>(from.rest + kHalf * half);
        to[half] = format.round(kNearest ? rest[half] : narrow[half] + rest[half]);
        flags[half] = format.flags(to[half]);
      }
      flags[0] = _mm256_or_si256(flags[0], from.zeros);
      if (!_mm256_testz_si256(_mm256_or_si256(flags[0], flags[1]), format.outside)) [[unlikely]]
        return false;
      const __m256i words = dither.group(group);
      __m256i cut[2];
      for (const int half : {0, 1}) {
        const Pair n = to[half].value;
        to[half].store(parameter, first + 8 * half);
        if constexpr (kNearest) {
          const Pair off = rest[half] - n;
          cut[half] =
              _mm256_packs_epi32(corrections.cut_nearest(off.lo.v, n.lo.v), corrections.cut_nearest(off.hi.v, n.hi.v));
        } else {
          const Pair off = (narrow[half] - n) + rest[half];
          cut[half] = _mm256_packs_epi32(corrections.cut(off.lo.v, n.lo.v, dither.of(words, 2 * half)),
                                         corrections.cut(off.hi.v, n.hi.v, dither.of(words, 2 * half + 1)));
        }
      }
      corrections.store(base, first, cut[0], cut[1]);
      return true;
    }
  };
};

}  // namespace flashoptim::cpu::avx2
