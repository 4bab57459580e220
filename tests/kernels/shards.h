// Shards of a tensor as ranks hold them: arrays of their own, cut out of the whole's element by element and put back.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "tests/kernels/test_tensors.h"

namespace flashoptim::test {

/// Where the whole's element e has its scale.
inline int64_t group_of_element(const GroupLayout& layout, int64_t e) {
  return e / layout.row_size * layout.groups_per_row() + e % layout.row_size / kGroupSize;
}

/// The whole's element that a shard's element i is, as step.h says.
inline int64_t whole_element(const Place& place, int64_t i) {
  if (place.run == 0) return place.first_element + i;
  return place.first_element + (i / place.run) * place.stride + i % place.run;
}

struct Cut {
  Place place;
  GroupLayout layout;
};

inline Cut flat_cut(const GroupLayout& whole, int64_t begin, int64_t end) {
  Cut cut;
  cut.place.first_element = begin;
  cut.place.whole = whole;
  cut.layout = shard_layout(cut.place, end - begin);
  return cut;
}

/// Slices [0, ends[0]), [ends[0], ends[1]), ... of the whole as one stretch of elements.
inline std::vector<Cut> flat_cuts(const GroupLayout& whole, const std::vector<int64_t>& ends) {
  std::vector<Cut> cuts;
  int64_t begin = 0;
  for (int64_t end : ends) {
    cuts.push_back(flat_cut(whole, begin, end));
    begin = end;
  }
  return cuts;
}

/// Every box of a grid: parts[d] are the sizes along dimension d; none: not cut. Empty where a place cannot be.
inline std::vector<Cut> grid_cuts(const std::vector<int64_t>& sizes, std::vector<std::vector<int64_t>> parts,
                                  RowRule rule = RowRule::kFirstDimension) {
  const size_t dimensions = sizes.size();
  parts.resize(dimensions);
  for (size_t d = 0; d < dimensions; ++d) {
    if (parts[d].empty()) parts[d] = {sizes[d]};
  }
  std::vector<Cut> cuts;
  std::vector<size_t> at(dimensions, 0);
  while (true) {
    std::vector<int64_t> offsets(dimensions, 0), box(dimensions);
    int64_t numel = 1;
    for (size_t d = 0; d < dimensions; ++d) {
      for (size_t k = 0; k < at[d]; ++k) offsets[d] += parts[d][k];
      box[d] = parts[d][at[d]];
      numel *= box[d];
    }
    Cut cut;
    if (!place_of_box(sizes.data(), offsets.data(), box.data(), static_cast<int64_t>(dimensions), rule, &cut.place)
             .is_ok())
      return {};
    cut.layout = shard_layout(cut.place, numel);
    cuts.push_back(cut);
    size_t d = dimensions;
    while (d > 0 && ++at[d - 1] == parts[d - 1].size()) at[--d] = 0;
    if (d == 0) return cuts;
  }
}

/// A shard of `whole`, with a plan of its own.
class Shard {
 public:
  Shard(const OptimizerChoice& optimizer, const TestTensor& whole, const Cut& cut)
      : t_(whole.tensors()), whole_(whole), states_(optimizer.states) {
    t_.layout = cut.layout;
    t_.place = cut.place;
    const ElementSizesOf sizes = element_sizes_of(t_);
    const int64_t n = t_.layout.numel();
    const auto make = [](int64_t bytes) { return std::vector<unsigned char>(static_cast<size_t>(bytes) + 1, 0xa5); };
    parameter_ = make(n * sizes.parameter);
    gradient_ = make(n * sizes.gradient);
    correction_ = make(n * sizes.correction);
    for (int k = 0; k < states_; ++k) {
      state_[k] = make(n * sizes.state);
      scale_[k] = make(t_.layout.groups() * 2);
      t_.states[k] = state_[k].data();
      if (whole.tensors().scales[k] != nullptr) t_.scales[k] = scale_[k].data();
    }
    t_.parameter = parameter_.data();
    t_.gradient = gradient_.data();
    if (t_.correction != nullptr) t_.correction = correction_.data();
    copy_all(Direction::kFromWhole, whole.tensors());
    status_ = Plan::make(optimizer.kind, optimizer.has_momentum, &t_, 1, &plan_);
  }
  Shard(const Shard&) = delete;

  const Status& status() const { return status_; }
  Plan& plan() { return plan_; }

  void take_gradient() {
    const int64_t size = element_sizes_of(t_).gradient;
    copy(Direction::kFromWhole, const_cast<void*>(whole_.tensors().gradient), gradient_, size);
  }
  /// Into a whole's arrays.
  void put_back(const ParameterTensors& to) { copy_all(Direction::kToWhole, to); }
  bool guards_intact() const {
    bool intact = parameter_.back() == 0xa5 && gradient_.back() == 0xa5 && correction_.back() == 0xa5;
    for (int k = 0; k < states_; ++k) intact = intact && state_[k].back() == 0xa5 && scale_[k].back() == 0xa5;
    return intact;
  }

 private:
  enum class Direction { kFromWhole, kToWhole };

  static void move(Direction direction, void* whole, int64_t from, std::vector<unsigned char>& own, int64_t at,
                   int64_t size) {
    unsigned char* const w = static_cast<unsigned char*>(whole) + from * size;
    unsigned char* const s = own.data() + at * size;
    std::memcpy(direction == Direction::kToWhole ? w : s, direction == Direction::kToWhole ? s : w,
                static_cast<size_t>(size));
  }
  /// In the whole that is there, which may itself be rows of a larger one.
  int64_t in_whole(int64_t i) const { return whole_element(t_.place, i) - whole_.tensors().place.first_element; }
  void copy(Direction direction, void* whole, std::vector<unsigned char>& own, int64_t size) {
    for (int64_t i = 0; i < t_.layout.numel() && size > 0; ++i) move(direction, whole, in_whole(i), own, i, size);
  }
  void copy_all(Direction direction, const ParameterTensors& whole) {
    const ElementSizesOf sizes = element_sizes_of(t_);
    copy(direction, whole.parameter, parameter_, sizes.parameter);
    copy(direction, whole.correction, correction_, sizes.correction);
    for (int k = 0; k < states_; ++k) {
      copy(direction, whole.states[k], state_[k], sizes.state);
      if (whole.scales[k] == nullptr) continue;
      for (int64_t i = 0; i < t_.layout.numel(); ++i) {
        move(direction, whole.scales[k], group_of_element(whole.layout, in_whole(i)), scale_[k],
             group_of_element(t_.layout, i), 2);
      }
    }
  }

  ParameterTensors t_;
  const TestTensor& whole_;
  int states_;
  std::vector<unsigned char> parameter_, gradient_, correction_, state_[kMaxSlots], scale_[kMaxSlots];
  Plan plan_;
  Status status_;
};

}  // namespace flashoptim::test
