// Shards: their rows, and where they lie in the whole.
#include <string>

#include "flashoptim/step.h"

namespace flashoptim {
namespace {

int64_t product(const int64_t* sizes, int64_t begin, int64_t end) {
  int64_t product = 1;
  for (int64_t d = begin; d < end; ++d) product *= sizes[d];
  return product;
}

}  // namespace

GroupLayout group_layout(const int64_t* sizes, int64_t dimensions) {
  return group_layout(sizes, dimensions, RowRule::kFirstDimension);
}

GroupLayout group_layout(const int64_t* sizes, int64_t dimensions, RowRule rule) {
  const int64_t numel = product(sizes, 0, dimensions);
  if (numel == 0) return {0, 0};
  int64_t row = 1;
  for (int64_t d = dimensions - 1; d >= 1; --d) {
    row *= sizes[d];
    if (rule == RowRule::kShortest && row >= kGroupSize) break;
  }
  if (dimensions >= 2 && row >= kGroupSize) return {numel / row, row};
  return {1, numel};
}

Status place_of_box(const int64_t* whole_sizes, const int64_t* offsets, const int64_t* sizes, int64_t dimensions,
                    RowRule rule, Place* place) {
  const auto at = [](const char* name, int64_t d, int64_t value) {
    return std::string(name) + "[" + std::to_string(d) + "] = " + std::to_string(value);
  };
  int64_t innermost = -1, outer = -1;  // dimensions that are cut: the last, and the last but one
  for (int64_t d = 0; d < dimensions; ++d) {
    if (whole_sizes[d] < 0) {
      return Status::invalid_argument(at("whole_sizes", d, whole_sizes[d]) + "; must be at least 0");
    }
    if (offsets[d] < 0 || sizes[d] < 0 || offsets[d] > whole_sizes[d] || sizes[d] > whole_sizes[d] - offsets[d]) {
      return Status::invalid_argument(at("offsets", d, offsets[d]) + " and " + at("sizes", d, sizes[d]) +
                                      " do not lie within " + at("whole_sizes", d, whole_sizes[d]));
    }
    if (sizes[d] != whole_sizes[d]) {
      outer = innermost;
      innermost = d;
    }
  }
  Place out;
  out.whole = group_layout(whole_sizes, dimensions, rule);
  const bool is_empty = product(sizes, 0, dimensions) == 0;
  for (int64_t d = 0; d < dimensions && !is_empty; ++d) {
    out.first_element = out.first_element * whole_sizes[d] + offsets[d];
  }
  if (!is_empty && outer >= 0 && product(sizes, 0, outer) > 1) {
    return Status::unsupported(at("sizes", outer, sizes[outer]) + " of " + std::to_string(whole_sizes[outer]) +
                               " and " + at("sizes", innermost, sizes[innermost]) + " of " +
                               std::to_string(whole_sizes[innermost]) +
                               " cut two dimensions behind several indices of one; cut the first dimension and one "
                               "other");
  }
  if (!is_empty && innermost > 0 && product(sizes, 0, innermost) > 1) {
    out.run = product(sizes, innermost, dimensions);
    out.stride = product(whole_sizes, innermost, dimensions);
  }
  *place = out;
  return Status::ok();
}

GroupLayout shard_layout(const Place& place, int64_t numel) {
  if (numel == 0) return {0, 0};
  const int64_t row = place.whole.row_size;
  if (place.whole.rows <= 1) return {1, numel};
  const int64_t run = place.run > 0 ? place.run : numel;
  if (place.first_element % row == 0 && run % row == 0) return {numel / row, row};
  return {numel / run, run};
}

}  // namespace flashoptim
