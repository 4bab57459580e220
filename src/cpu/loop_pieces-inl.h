// What the loops are made of, over F, an instruction set's lane type: groups of a block, headers one group per lane,
// dither, extremes.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "flashoptim/core/dither.h"
#include "flashoptim/core/lanes.h"
#include "src/cpu/kernels.h"

namespace flashoptim::cpu {

template <class F>
struct LoopPieces {
  using I = core::IntOf<F>;
  using H = typename core::Half<F>::type;  ///< lanes are groups: headers and their constants
  using HI = core::IntOf<H>;
  static constexpr int kWidth = core::LaneTraits<F>::kWidth;
  static constexpr int kGroup = static_cast<int>(kGroupSize);
  static constexpr int kVectors = kGroup / kWidth;  ///< per group

  /// Asks for the memory of the next block where vector i of this one is taken, a line at a time: asking for all of it
  /// at once costs up to a third of a step, because the processor can wait for some 24 lines. (Seven streams of a few
  /// hundred bytes a block, with page boundaries in them, are more than hardware prefetchers follow.)
  template <class T>
  static FLASHOPTIM_HD void ask_ahead(const Block& b, const T* array, int i) {
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    if (i % kLine != 0) return;
    for (int k = 0; k < std::max(kWidth, kLine); k += kLine) __builtin_prefetch(array + i + k + b.ahead, 1, 3);
  }

  /// Runs body(group) for the first of every kWidth groups: headers are made and read one group per lane.
  template <class Body>
  static FLASHOPTIM_HD void for_each_header(Body body) {
    for (int group = 0; group < kBlockGroups; group += core::LaneTraits<H>::kWidth) body(group);
  }

  /// One uint32 or float per group of a block.
  struct PerGroup {
    alignas(64) uint32_t bits[kBlockGroups];

    FLASHOPTIM_HD HI load(int group) const { return core::load_u32<H>(bits + group); }
    FLASHOPTIM_HD void store(int group, HI value) { core::store_u32(bits + group, value); }
    /// One group's value in every lane.
    FLASHOPTIM_HD I spread(int group) const { return core::splat_bits<F>(bits[group]); }
  };

  /// Runs body(i, group, dither word) over the vectors of groups begin ... end - 1, for one dither stream.
  template <core::DitherStream kStream, class Body>
  static FLASHOPTIM_HD void for_each_dithered(const Block& b, int begin, int end, Body body) {
    I lanes[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      lanes[j] = core::lane_multiples<F>(core::kDitherLaneStep<kStream>) +
                 core::splat_bits<F>(static_cast<uint32_t>(j * kWidth) * core::kDitherLaneStep<kStream>);
    }
    PerGroup start;
    for_each_header([&](int group) {
      start.store(group, core::dither_group_start<kStream, H>(b.dither, core::load_u32<H>(b.group_hash + group)));
    });
    for (int group = begin; group < end; ++group) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) body(group * kGroup + j * kWidth, group, start.spread(group) + lanes[j]);
    }
  }

  /// A vector per group, for a reduction over the lanes of all groups at once.
  struct GroupVectors {
    static constexpr int kRow = core::LaneTraits<H>::kWidth;
    alignas(64) uint32_t bits[kBlockGroups * kRow];

    /// Groups behind the block's last are read by the reduction.
    FLASHOPTIM_HD void pad(int groups) {
      for (int group = groups; group < kBlockGroups; ++group) store(group, core::splat_bits<H>(0u));
    }
    FLASHOPTIM_HD void store(int group, HI value) { core::store_u32(bits + group * kRow, value); }
    FLASHOPTIM_HD void maxima(PerGroup& out) const {
      for (int group = 0; group < kBlockGroups; group += 16)
        core::LaneMemory<H>::max_of_rows(bits + group * kRow, out.bits + group);
    }
    FLASHOPTIM_HD void unsigned_minima(PerGroup& out) const {
      for (int group = 0; group < kBlockGroups; group += 16)
        core::LaneMemory<H>::unsigned_min_of_rows(bits + group * kRow, out.bits + group);
    }
  };

  static FLASHOPTIM_HD PerGroup load_headers(const Block& b, int slot) {
    constexpr int kAtOnce = core::LaneTraits<H>::kWidth;
    PerGroup headers{};
    int group = 0;
    for (; group + kAtOnce <= b.groups; group += kAtOnce)
      headers.store(group, core::load_u16<H>(b.scales[slot] + group));
    for (; group < b.groups; ++group) headers.bits[group] = b.scales[slot][group];
    return headers;
  }
  static FLASHOPTIM_HD void store_headers(Block& b, int slot, const PerGroup& headers) {
    constexpr int kAtOnce = core::LaneTraits<H>::kWidth;
    int group = 0;
    for (; group + kAtOnce <= b.groups; group += kAtOnce) core::store_16(b.scales[slot] + group, headers.load(group));
    for (; group < b.groups; ++group) b.scales[slot][group] = static_cast<uint16_t>(headers.bits[group]);
  }

  static FLASHOPTIM_HD uint8_t* codes(const Block& b, int slot) { return static_cast<uint8_t*>(b.states[slot]); }
};

}  // namespace flashoptim::cpu
