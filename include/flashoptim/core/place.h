// Which elements of a shard belong to which group of the whole. Dither is a function of an element's group in the whole
// and its lane there, so this is what makes a shard's bits the whole's (docs/numerics.md, "Places").
#pragma once

#include <cstdint>

#include "flashoptim/core/lanes.h"
#include "flashoptim/types.h"

namespace flashoptim::core {

/// What a shard has of one group of the whole: elements that follow each other in both.
struct GroupPiece {
  int64_t first;        ///< the shard's element
  int count;            ///< 0 ... 32
  int lane;             ///< of the first, in its group
  int64_t whole_first;  ///< first element of the group in the whole
};

/// A shard as `runs` runs of `run` elements, each of them `groups_per_run` pieces, of which some may be empty where
/// runs begin at different lanes. Piece p is the (p % groups_per_run)-th of run p / groups_per_run.
struct PlacedGroups {
  int64_t first_element;  ///< of the shard in the whole
  int64_t run;            ///< at least 1
  int64_t stride;         ///< whole elements from one run's start to the next one's
  int64_t runs;
  int64_t groups_per_run;
  int64_t row_size;        ///< of the whole
  int64_t groups_per_row;  ///< of the whole
  /// Lane at which every run begins, if they agree on it and no run goes past the end of a row that ends in a short
  /// group: a run's pieces then need no division. Else -1.
  int32_t lane;

  FLASHOPTIM_HD int64_t groups() const { return runs * groups_per_run; }

  /// Group of the whole that has its element x.
  FLASHOPTIM_HD int64_t group_of(int64_t x) const {
    const int64_t row = x / row_size;
    return row * groups_per_row + (x - row * row_size) / kGroupSize;
  }

  FLASHOPTIM_HD GroupPiece piece(int64_t run_index, int64_t group_in_run) const {
    const int64_t begin = first_element + run_index * stride, end = begin + run;
    GroupPiece out{};
    int64_t group_end;
    if (lane >= 0) {
      out.whole_first = begin - lane + group_in_run * kGroupSize;
      group_end = out.whole_first + kGroupSize;
    } else {
      const int64_t group = group_of(begin) + group_in_run;
      const int64_t row = group / groups_per_row;
      const int64_t column = (group - row * groups_per_row) * kGroupSize;
      out.whole_first = row * row_size + column;
      group_end = out.whole_first + (row_size - column < kGroupSize ? row_size - column : kGroupSize);
    }
    const int64_t from = out.whole_first > begin ? out.whole_first : begin, to = group_end < end ? group_end : end;
    out.first = run_index * run + (from - begin);
    out.count = to > from ? static_cast<int>(to - from) : 0;
    out.lane = static_cast<int>(from - out.whole_first);
    return out;
  }
};

}  // namespace flashoptim::core
