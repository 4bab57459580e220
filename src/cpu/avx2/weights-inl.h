// AVX2's hot path: weights and their corrections, updated by steps that the states' passes leave in delta.
#pragma once

#include "src/cpu/avx2/formats-inl.h"

namespace flashoptim::cpu::avx2 {

/// Reads a half's gradient, and its weight where the rule takes weight decay into the gradient.
template <core::Rule Rule, DType kGradient, DType kParameter, MasterWeights kMaster, bool kScaled>
struct Inputs : Pieces {
  using Gradient = Format<kGradient>;
  using Parameter = Format<kParameter>;
  const Block& b;
  const void* gradient;
  __m256 factor;
  __m256i unusual = _mm256_setzero_si256();  ///< weights whose corrections have been taken for what they are not

  explicit FLASHOPTIM_HD Inputs(const Block& block)
      : b(block), gradient(block.gradient), factor(all_f(block.gradient_scale)) {}

  FLASHOPTIM_HD void ask_ahead(int group) const { Pieces::ask_ahead<Gradient::kBytes, 0>(b, gradient, group); }
  FLASHOPTIM_HD void operator()(int group, int half, Pair* w, Pair* g) {
    *g = Gradient::load(gradient, group * kGroup + 8 * half);
    if constexpr (kScaled) *g = *g * Pair{{factor}, {factor}};
    if constexpr (!Rule::kDecoupledDecay) {
      using Of = Corrections<kParameter, core::correction_bits(kMaster)>;
      const int first = group * kGroup;
      unusual = _mm256_or_si256(unusual, Parameter::not_normal(b.parameter, first + 8 * half));
      const Pair narrow = Parameter::load(b.parameter, first + 8 * half);
      *w = narrow + Of::fraction(Of::load(b.correction, first), half) * Of::scale(narrow);
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
    const auto h = *static_cast<const Hyper*>(b.hyper);
    if constexpr (kCorrected) {
      const std::conditional_t<kNearest, NoDither, Dither<core::DitherStream::kWeight>> dither(b);
      for (int group = b.store_begin; group < b.store_end; ++group) {
        ask_ahead<2, 1>(b, b.parameter, group);
        ask_ahead<kBits / 8, 1>(b, b.correction, group);
        if (!update_corrected(b, group, dither, h)) [[unlikely]]
          finish_group_generic(b, group);
      }
    } else {
      for (int group = b.store_begin; group < b.store_end; ++group) {
        ask_ahead<Parameter::kBytes, 1>(b, b.parameter, group);
        const bool done = update_alone(b, group, h);
        if constexpr (kParameter != DType::kFloat32) {
          if (!done) [[unlikely]]
            finish_group_generic(b, group);
        }
      }
    }
  }

 private:
  /// False, and nothing written, where core's formulas have to.
  static FLASHOPTIM_HD bool update_alone(Block& b, int group, const Hyper& h) {
    const int first = group * kGroup;
    Pair moved[2];
    for (const int half : {0, 1}) {
      const Pair w = Parameter::load(b.parameter, first + 8 * half);
      moved[half] = w - delta_of(w, b.delta, first + kHalf * half, h);
    }
    if constexpr (kParameter == DType::kFloat32) {
      for (const int half : {0, 1}) Parameter::store(b.parameter, first + 8 * half, core::canonical_nan(moved[half]));
    } else {
      const typename Parameter::Rounded to[2] = {Parameter::round(moved[0]), Parameter::round(moved[1])};
      const __m256i flags = _mm256_or_si256(to[0].flags(), to[1].flags());
      if (!_mm256_testz_si256(flags, all_words(Parameter::kOutside))) [[unlikely]]
        return false;
      for (const int half : {0, 1}) to[half].store(b.parameter, first + 8 * half);
    }
    return true;
  }

  template <class Dithering>
  static FLASHOPTIM_HD bool update_corrected(Block& b, int group, const Dithering& dither, const Hyper& h) {
    using Of = Corrections<kParameter, kBits>;
    const int first = group * kGroup;
    const auto corrections = Of::load(b.correction, first);
    Pair narrow[2], rest[2];  // rest: what the narrow value is too small by; or, to nearest, the new weight
    typename Parameter::Rounded to[2];
    __m256i flags[2];
    for (const int half : {0, 1}) {
      narrow[half] = Parameter::load(b.parameter, first + 8 * half);
      const Pair n = narrow[half], fraction = Of::fraction(corrections, half), scale = Of::scale(n);
      // Their product is exact, so that an fma rounds as the sum does.
      const Pair w = {{_mm256_fmadd_ps(fraction.lo.v, scale.lo.v, n.lo.v)},
                      {_mm256_fmadd_ps(fraction.hi.v, scale.hi.v, n.hi.v)}};
      const Pair delta = delta_of(w, b.delta, first + kHalf * half, h);
      if constexpr (kNearest) {
        rest[half] = w - delta;
        to[half] = Parameter::round(rest[half]);
      } else {
        rest[half] = {{_mm256_fmsub_ps(fraction.lo.v, scale.lo.v, delta.lo.v)},
                      {_mm256_fmsub_ps(fraction.hi.v, scale.hi.v, delta.hi.v)}};
        to[half] = Parameter::round(n + rest[half]);
      }
      // A delta of 0 changes nothing. Products of two small ones may be 0, too: then core's formulas are the slower
      // way.
      const __m256 zeros = _mm256_cmp_ps(_mm256_mul_ps(delta.lo.v, delta.hi.v), _mm256_setzero_ps(), _CMP_EQ_OQ);
      flags[half] = _mm256_or_si256(to[half].flags(), bits_of(zeros));
    }
    if (!_mm256_testz_si256(_mm256_or_si256(flags[0], flags[1]), all_words(Parameter::kOutside))) [[unlikely]]
      return false;
    const __m256i words = dither.group(group);
    __m256i cut[2];
    for (const int half : {0, 1}) {
      const Pair n = to[half].value;
      to[half].store(b.parameter, first + 8 * half);
      if constexpr (kNearest) {
        const Pair off = rest[half] - n;
        cut[half] = _mm256_packs_epi32(Of::cut_nearest(off.lo.v, n.lo.v), Of::cut_nearest(off.hi.v, n.hi.v));
      } else {
        const Pair off = (narrow[half] - n) + rest[half];
        cut[half] = _mm256_packs_epi32(Of::cut(off.lo.v, n.lo.v, dither.of(words, 2 * half)),
                                       Of::cut(off.hi.v, n.hi.v, dither.of(words, 2 * half + 1)));
      }
    }
    Of::store(b.correction, first, cut[0], cut[1]);
    return true;
  }
};

}  // namespace flashoptim::cpu::avx2
