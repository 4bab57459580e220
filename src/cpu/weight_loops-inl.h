// The loops over weights and gradients, over F, an instruction set's lane type.
#pragma once

#include "flashoptim/core/weight_split.h"
#include "src/cpu/loop_pieces-inl.h"

namespace flashoptim::cpu {

template <class F>
struct WeightLoops : LoopPieces<F> {
  using Pieces = LoopPieces<F>;
  using Pieces::ask_ahead;
  using Pieces::for_each_header;
  using Pieces::kGroup;
  using Pieces::kWidth;
  using typename Pieces::H;
  using typename Pieces::I;

  /// Dither hashes of the block's groups.
  static void hash_groups(Block& b) {
    for_each_header([&](int group) {
      core::store_u32(b.group_hash + group,
                      core::dither_group_hash<H>(b.dither, core::load_u32<H>(b.group_first_low + group),
                                                 core::load_u32<H>(b.group_first_high + group)));
    });
  }

  template <MasterWeights kMaster>
  static FLASHOPTIM_HD I load_correction(const void* base, int i) {
    if constexpr (core::correction_bits(kMaster) == 8) {
      return core::load_i8<F>(static_cast<const uint8_t*>(base) + i);
    } else {
      return core::load_i16<F>(static_cast<const uint16_t*>(base) + i);
    }
  }

  template <MasterWeights kMaster>
  static FLASHOPTIM_HD void store_correction(void* base, int i, I value) {
    if constexpr (core::correction_bits(kMaster) == 8) {
      core::store_8(static_cast<uint8_t*>(base) + i, value);
    } else {
      core::store_16(static_cast<uint16_t*>(base) + i, value);
    }
  }

  /// Of groups begin ... end - 1.
  template <class Narrow, MasterWeights kMaster>
  static void load_narrow_weights_of(Block& b, int begin, int end) {
    const auto* parameter = static_cast<const uint16_t*>(b.parameter);
    for (int i = begin * kGroup; i < end * kGroup; i += kWidth) {
      ask_ahead(b, parameter, i);
      if constexpr (core::has_correction(kMaster)) {
        using Correction = std::conditional_t<core::correction_bits(kMaster) == 8, uint8_t, uint16_t>;
        ask_ahead(b, static_cast<const Correction*>(b.correction), i);
      }
      F w = Narrow::template widen<F>(core::load_u16<F>(parameter + i));
      if constexpr (core::has_correction(kMaster)) {
        const F value = core::correction_value<Narrow, core::correction_bits(kMaster), F>(
            w, load_correction<kMaster>(b.correction, i));
        core::store_f32(b.correction_value + i, value);
        w = w + value;
      }
      core::store_f32(b.weight + i, w);
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static void load_narrow_weights(Block& b) {
    load_narrow_weights_of<Narrow, kMaster>(b, 0, b.groups);
  }

  static void load_f32_weights(Block& b) {
    const auto* parameter = static_cast<const float*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      ask_ahead(b, parameter, i);
      core::store_f32(b.weight + i, core::load_f32<F>(parameter + i));
    }
  }

  template <class Load>
  static FLASHOPTIM_HD void load_gradients(Block& b, Load load) {
    const F scale = core::splat<F>(b.gradient_scale);
    I largest = core::splat_bits<F>(0u);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      const F g = load(i) * scale;
      largest = core::int_max(largest, core::to_bits(core::abs(g)));
      core::store_f32(b.gradient_f32 + i, g);
    }
    // Patterns order as magnitudes, infinity and NaN last. The count is only taken where there is one.
    alignas(64) uint32_t lanes[core::LaneTraits<H>::kWidth];
    core::store_u32(lanes, core::fold_int_max(largest));
    if (*std::max_element(std::begin(lanes), std::end(lanes)) >= 0x7f800000u) {
      for (int i = 0; i < b.groups * kGroup; ++i) {
        b.nonfinite += (core::to_bits(b.gradient_f32[i]) & 0x7f800000u) == 0x7f800000u;
      }
    }
  }

  template <class Narrow>
  static void load_narrow_gradient(Block& b) {
    const auto* gradient = static_cast<const uint16_t*>(b.gradient);
    load_gradients(b, [&b, gradient](int i) {
      ask_ahead(b, gradient, i);
      return Narrow::template widen<F>(core::load_u16<F>(gradient + i));
    });
  }

  static void load_f32_gradient(Block& b) {
    const auto* gradient = static_cast<const float*>(b.gradient);
    load_gradients(b, [&b, gradient](int i) {
      ask_ahead(b, gradient, i);
      return core::load_f32<F>(gradient + i);
    });
  }

  template <class Narrow, MasterWeights kMaster>
  static void store_narrow_weights(Block& b) {
    auto* parameter = static_cast<uint16_t*>(b.parameter);
    if constexpr (core::has_correction(kMaster) && !core::is_nearest(kMaster)) {
      void* const corrections = b.correction;
      Pieces::template for_each_dithered<core::DitherStream::kWeight>(
          b, b.store_begin, b.store_end,
          [&b, parameter, corrections ](int i, int, I dither) __attribute__((always_inline)) {
            const auto out = core::split_update_dithered<Narrow, core::correction_bits(kMaster), F>(
                core::load_u16<F>(parameter + i), load_correction<kMaster>(corrections, i),
                core::load_f32<F>(b.correction_value + i), core::load_f32<F>(b.delta + i), dither);
            core::store_16(parameter + i, out.narrow);
            store_correction<kMaster>(corrections, i, out.correction);
          });
    } else if constexpr (kMaster == MasterWeights::kNoneStochastic) {
      Pieces::template for_each_dithered<core::DitherStream::kWeight>(
          b, b.store_begin, b.store_end, [&](int i, int, I dither) {
            const F w = core::load_f32<F>(b.weight + i) - core::load_f32<F>(b.delta + i);
            core::store_16(parameter + i, core::round_dithered<Narrow, F>(w, dither));
          });
    } else if constexpr (core::is_nearest(kMaster)) {
      for (int i = b.store_begin * kGroup; i < b.store_end * kGroup; i += kWidth) {
        const auto out = core::split_update_nearest<Narrow, core::correction_bits(kMaster), F>(
            core::load_u16<F>(parameter + i), load_correction<kMaster>(b.correction, i),
            core::load_f32<F>(b.weight + i), core::load_f32<F>(b.delta + i));
        core::store_16(parameter + i, out.narrow);
        store_correction<kMaster>(b.correction, i, out.correction);
      }
    } else {
      for (int i = b.store_begin * kGroup; i < b.store_end * kGroup; i += kWidth) {
        const F w = core::load_f32<F>(b.weight + i) - core::load_f32<F>(b.delta + i);
        core::store_16(parameter + i, Narrow::template round<F>(w));
      }
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static void split_narrow_weights(Block& b) {
    auto* parameter = static_cast<uint16_t*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      const F w = core::load_f32<F>(b.weight + i);
      if constexpr (core::has_correction(kMaster)) {
        const auto out = core::split<Narrow, core::correction_bits(kMaster), F>(w);
        core::store_16(parameter + i, out.narrow);
        store_correction<kMaster>(b.correction, i, out.correction);
      } else {
        core::store_16(parameter + i, Narrow::template round<F>(w));
      }
    }
  }

  static void store_f32_weights(Block& b) {
    auto* parameter = static_cast<float*>(b.parameter);
    for (int i = b.store_begin * kGroup; i < b.store_end * kGroup; i += kWidth) {
      const F w = core::load_f32<F>(b.weight + i) - core::load_f32<F>(b.delta + i);
      core::store_f32(parameter + i, core::canonical_nan(w));
    }
  }

  static void split_f32_weights(Block& b) {
    auto* parameter = static_cast<float*>(b.parameter);
    for (int i = 0; i < b.groups * kGroup; i += kWidth) {
      core::store_f32(parameter + i, core::canonical_nan(core::load_f32<F>(b.weight + i)));
    }
  }

  template <class Narrow, MasterWeights kMaster>
  static constexpr void add_format(KernelTable& t, DType dtype) {
    const int d = static_cast<int>(dtype), m = static_cast<int>(kMaster);
    t.load_weights[d][m] = load_narrow_weights<Narrow, kMaster>;
    t.store_weights[d][m] = store_narrow_weights<Narrow, kMaster>;
    t.split_weights[d][m] = split_narrow_weights<Narrow, kMaster>;
  }

  template <class Narrow>
  static constexpr void add_narrow(KernelTable& t, DType dtype) {
    add_format<Narrow, MasterWeights::kNone>(t, dtype);
    add_format<Narrow, MasterWeights::kNoneStochastic>(t, dtype);
    add_format<Narrow, MasterWeights::kCorrection8>(t, dtype);
    add_format<Narrow, MasterWeights::kCorrection16>(t, dtype);
    add_format<Narrow, MasterWeights::kCorrection8Nearest>(t, dtype);
    add_format<Narrow, MasterWeights::kCorrection16Nearest>(t, dtype);
    t.load_gradient[static_cast<int>(dtype)] = load_narrow_gradient<Narrow>;
  }

  static constexpr void add_weights(KernelTable& t) {
    t.hash_groups = hash_groups;
    add_narrow<core::BFloat16>(t, DType::kBFloat16);
    add_narrow<core::Float16>(t, DType::kFloat16);
    const int f32 = static_cast<int>(DType::kFloat32);
    t.load_weights[f32][static_cast<int>(MasterWeights::kNone)] = load_f32_weights;
    t.store_weights[f32][static_cast<int>(MasterWeights::kNone)] = store_f32_weights;
    t.split_weights[f32][static_cast<int>(MasterWeights::kNone)] = split_f32_weights;
    t.load_gradient[f32] = load_f32_gradient;
  }
};

}  // namespace flashoptim::cpu
