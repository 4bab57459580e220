// Shards: their rows, and where they lie in the whole.
#include "src/place.h"

#include <algorithm>
#include <limits>
#include <string>

namespace flashoptim {
namespace {

/// What the functions that return a layout say of arguments that have none.
constexpr GroupLayout kNoLayout{-1, -1};

/// Of sizes whose product over all dimensions fits.
int64_t product(const int64_t* sizes, int64_t begin, int64_t end) {
  int64_t product = 1;
  for (int64_t d = begin; d < end; ++d) product *= sizes[d];
  return product;
}

bool is_row_rule(RowRule rule) { return rule == RowRule::kFirstDimension || rule == RowRule::kShortest; }

}  // namespace

GroupLayout group_layout(const int64_t* sizes, int64_t dimensions) {
  return group_layout(sizes, dimensions, RowRule::kFirstDimension);
}

GroupLayout group_layout(const int64_t* sizes, int64_t dimensions, RowRule rule) {
  if (dimensions < 0 || (dimensions > 0 && sizes == nullptr) || !is_row_rule(rule)) return kNoLayout;
  if (reinterpret_cast<uintptr_t>(sizes) % alignof(int64_t) != 0) return kNoLayout;
  // A 0 anywhere makes no elements, whatever would overflow beside it.
  bool is_empty = false, overflows = false;
  int64_t numel = 1;
  for (int64_t d = 0; d < dimensions; ++d) {
    if (sizes[d] < 0) return kNoLayout;
    is_empty = is_empty || sizes[d] == 0;
    overflows = overflows || __builtin_mul_overflow(numel, sizes[d], &numel);
  }
  if (is_empty) return {0, 0};
  if (overflows) return kNoLayout;
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
  return guarded([&] {
    if (place == nullptr) return Status::invalid_argument("place is null");
    if (!is_row_rule(rule)) {
      return Status::invalid_argument("rule = " + std::to_string(static_cast<int>(rule)) +
                                      " is no RowRule; allowed are kFirstDimension, kShortest");
    }
    if (dimensions < 0) {
      return Status::invalid_argument("dimensions = " + std::to_string(dimensions) + "; must be at least 0");
    }
    if (dimensions > 0 && (whole_sizes == nullptr || offsets == nullptr || sizes == nullptr)) {
      return Status::invalid_argument("whole_sizes, offsets or sizes is null; each must have " +
                                      std::to_string(dimensions) + " entries");
    }
    Status status = check_aligned(place, "place");
    if (status.is_ok()) status = check_aligned(whole_sizes, "whole_sizes");
    if (status.is_ok()) status = check_aligned(offsets, "offsets");
    if (status.is_ok()) status = check_aligned(sizes, "sizes");
    if (!status.is_ok()) return status;
    const auto at = [](const char* name, int64_t d, int64_t value) {
      return std::string(name) + "[" + std::to_string(d) + "] = " + std::to_string(value);
    };
    int64_t innermost = -1, outer = -1;  // dimensions that are cut: the last, and the last but one
    bool is_empty = false;
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
      is_empty = is_empty || sizes[d] == 0;
    }
    Place out;
    out.whole = group_layout(whole_sizes, dimensions, rule);
    if (out.whole == kNoLayout) {
      return Status::invalid_argument("whole_sizes have a product above 2^63 - 1, the most elements that are counted");
    }
    // Without empty dimensions no product overflows: the whole's is the largest.
    if (!is_empty) {
      for (int64_t d = 0; d < dimensions; ++d) out.first_element = out.first_element * whole_sizes[d] + offsets[d];
      if (outer >= 0 && product(sizes, 0, outer) > 1) {
        return Status::unsupported(at("sizes", outer, sizes[outer]) + " of " + std::to_string(whole_sizes[outer]) +
                                   " and " + at("sizes", innermost, sizes[innermost]) + " of " +
                                   std::to_string(whole_sizes[innermost]) +
                                   " cut two dimensions behind several indices of one; cut the first dimension and "
                                   "one other");
      }
      if (innermost > 0 && product(sizes, 0, innermost) > 1) {
        out.run = product(sizes, innermost, dimensions);
        out.stride = product(whole_sizes, innermost, dimensions);
      }
    }
    *place = out;
    return Status::ok();
  });
}

GroupLayout shard_layout(const Place& place, int64_t numel) {
  if (numel == 0) return {0, 0};
  const int64_t run = place.run > 0 && place.run < numel ? place.run : numel;
  if (numel < 0 || numel % run != 0) return kNoLayout;
  const int64_t row = place.whole.row_size;
  if (place.whole.rows <= 1 || row <= 0) return {1, numel};
  if (place.first_element % row == 0 && run % row == 0) return {numel / row, row};
  return {numel / run, run};
}

namespace {

/// Whether a shard of `numel` elements is more than one stretch of the whole.
bool has_inner_cut(const Place& place, int64_t numel) {
  return place.run > 0 && place.run < numel && place.stride != place.run;
}

/// Whether the groups of `layout` are groups of the whole, each all of it.
bool groups_agree(const GroupLayout& layout, const Place& place) {
  const int64_t numel = layout.numel(), row = place.whole.row_size;
  const bool is_cut = has_inner_cut(place, numel);
  const int64_t run = is_cut ? place.run : numel, column = place.first_element % row;
  // Whether groups are at multiples of 32, in the whole and here; only the last may be short then.
  const bool whole_by_32 = row % kGroupSize == 0 || place.whole.rows <= 1;
  const bool by_32 = layout.row_size % kGroupSize == 0 || layout.rows <= 1;
  const auto is_edge = [row](int64_t in_row) { return in_row == row || in_row % kGroupSize == 0; };
  if (column % kGroupSize != 0) return false;
  if (layout.row_size == row && column == 0 && run % row == 0 && (!is_cut || place.stride % row == 0)) return true;
  if (is_cut) {
    if (whole_by_32 && by_32 && place.stride % kGroupSize == 0 && run % kGroupSize == 0) return true;
    // Rows are the same part of rows.
    const bool has_rows = layout.row_size == run || (by_32 && run % kGroupSize == 0);
    return has_rows && place.stride % row == 0 && column + run <= row && is_edge(column + run);
  }
  if (whole_by_32 && by_32) return is_edge((place.first_element + run - 1) % row + 1);
  return by_32 && column + run <= row && is_edge(column + run);
}

core::PlacedGroups placed_groups(const Place& place, int64_t numel) {
  const bool is_cut = has_inner_cut(place, numel);
  const int64_t row = place.whole.row_size, column = place.first_element % row;
  core::PlacedGroups out{};
  out.first_element = place.first_element;
  out.run = is_cut ? place.run : numel;
  out.stride = is_cut ? place.stride : 0;
  out.runs = numel / out.run;
  out.row_size = row;
  out.groups_per_row = place.whole.groups_per_row();
  const bool whole_by_32 = row % kGroupSize == 0 || place.whole.rows <= 1;
  const bool same_column = out.stride % row == 0;
  const bool has_lane =
      whole_by_32 ? same_column || out.stride % kGroupSize == 0 : same_column && column + out.run <= row;
  if (has_lane) {
    out.lane = static_cast<int32_t>(column % kGroupSize);
    out.groups_per_run = (out.lane + out.run + kGroupSize - 1) / kGroupSize;
    return out;
  }
  out.lane = -1;
  if (same_column) {
    out.groups_per_run = out.group_of(place.first_element + out.run - 1) - out.group_of(place.first_element) + 1;
  } else {
    // Of the run with the most: one that begins in a group's last lane, and at the end of a row.
    out.groups_per_run = (out.run + kGroupSize - 2) / kGroupSize + 1 + (out.run + row - 2) / row;
  }
  return out;
}

}  // namespace

TensorGroups tensor_groups(const ParameterTensors& t) {
  TensorGroups out;
  out.count = t.layout.groups();
  if (out.count == 0 || t.place.whole.numel() == 0) return out;
  out.pieces = placed_groups(t.place, t.layout.numel());
  out.in_pieces = has_inner_cut(t.place, t.layout.numel()) || !groups_agree(t.layout, t.place);
  if (out.in_pieces) {
    out.count = out.pieces.groups();
  } else {
    out.first_group = out.pieces.group_of(t.place.first_element);
  }
  return out;
}

Status check_place(const ParameterTensors& t, const TensorName& name, bool is_quantized) {
  const Place& place = t.place;
  const auto field = [](const char* field_name, int64_t value) {
    return std::string(field_name) + " = " + std::to_string(value);
  };
  // `rest` begins with a field of the place.
  const auto invalid = [&name](const std::string& rest) {
    return Status::invalid_argument(name.field(("place" + rest).c_str()));
  };
  if (place.first_element < 0) return invalid(field(".first_element", place.first_element) + "; must be at least 0");
  if (place.run < 0) return invalid(field(".run", place.run) + "; must be at least 0");
  const GroupLayout& whole = place.whole;
  const Status status = check_layout(whole, name, "place.whole");
  if (!status.is_ok()) return status;
  const int64_t numel = t.layout.numel();
  if (numel == 0) return Status::ok();
  const bool has_runs = place.run > 0 && place.run < numel;
  if (has_runs && numel % place.run != 0) {
    return invalid(field(".run", place.run) + " does not divide the " + std::to_string(numel) + " elements of layout");
  }
  if (has_runs && place.stride < place.run) {
    return invalid(field(".stride", place.stride) + "; must be at least run, " + std::to_string(place.run));
  }
  if (whole.numel() == 0) {
    if (has_inner_cut(place, numel))
      return invalid(field(".run", place.run) + " without whole, which says where rows and groups begin");
    if (place.first_element > std::numeric_limits<int64_t>::max() - numel) {
      return invalid(field(".first_element", place.first_element) + "; with numel = " + std::to_string(numel) +
                     " it must be below 2^63");
    }
    return Status::ok();
  }
  const int64_t run = has_runs ? place.run : numel, runs = numel / run;
  const int64_t last_start = whole.numel() - run;  // the last run must begin here or before
  if (place.first_element > last_start ||
      (runs > 1 && place.stride > (last_start - place.first_element) / (runs - 1))) {
    return invalid(field(".first_element", place.first_element) + ", " + field("run", place.run) + ", " +
                   field("stride", place.stride) + " with " + std::to_string(numel) +
                   " elements goes past the end of whole, which has " + std::to_string(whole.numel()));
  }
  if (is_quantized && !groups_agree(t.layout, place)) {
    return invalid(field(".first_element", place.first_element) + ", " + field("run", place.run) + ", " +
                   field("stride", place.stride) + " with layout " + std::to_string(t.layout.rows) + " x " +
                   std::to_string(t.layout.row_size) + " cuts groups of " + std::to_string(kGroupSize) +
                   " of the whole, " + std::to_string(whole.rows) + " x " + std::to_string(whole.row_size) +
                   ", which quantized states do not allow: cut between rows or at multiples of " +
                   std::to_string(kGroupSize) +
                   " within them (with layout by shard_layout), or keep this tensor's states in StateCodec::kFloat32");
  }
  return Status::ok();
}

}  // namespace flashoptim
