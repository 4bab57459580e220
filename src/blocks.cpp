#include "src/blocks.h"

#include <algorithm>
#include <cstring>

namespace flashoptim::cpu {

ElementSizes element_sizes(const ParameterTensors& t) {
  const auto bytes = [](DType dtype) -> int64_t { return dtype == DType::kFloat32 ? 4 : 2; };
  ElementSizes sizes{};
  sizes.parameter = bytes(t.parameter_dtype);
  sizes.gradient = bytes(t.gradient_dtype);
  switch (t.master_weights) {
    case MasterWeights::kCorrection8:
    case MasterWeights::kCorrection8Nearest:
      sizes.correction = 1;
      break;
    case MasterWeights::kCorrection16:
    case MasterWeights::kCorrection16Nearest:
      sizes.correction = 2;
      break;
    default:
      sizes.correction = 0;
  }
  sizes.state = t.state_codec == StateCodec::kFloat32 ? 4 : 1;
  return sizes;
}

bool is_element_aligned(const ParameterTensors& t) {
  const ElementSizes sizes = element_sizes(t);
  const auto off = [](const void* base, int64_t size) {
    return reinterpret_cast<uintptr_t>(base) & static_cast<uintptr_t>(size - 1);
  };
  uintptr_t any = off(t.parameter, sizes.parameter) | off(t.gradient, sizes.gradient);
  if (sizes.correction != 0) any |= off(t.correction, sizes.correction);
  for (int k = 0; k < kMaxSlots; ++k) any |= off(t.states[k], sizes.state) | off(t.scales[k], sizeof(uint16_t));
  return any == 0;
}

void prefetch_block(const ParameterTensors& t, int64_t index) {
  constexpr int64_t kLine = 64;
  const ElementSizes sizes = element_sizes(t);
  // Rows with short groups start blocks at other elements; close enough for a hint, and never behind the end.
  const int64_t elements = block_groups(t) * kGroupSize;
  const int64_t first = index * elements;
  const int64_t count = std::min(elements, t.layout.numel() - first);
  const auto prefetch = [first, count](const void* base, int64_t size) {
    if (base == nullptr) return;
    const char* p = static_cast<const char*>(base) + first * size;
    for (int64_t offset = 0; offset < count * size; offset += kLine) __builtin_prefetch(p + offset, 1, 3);
  };
  prefetch(t.parameter, sizes.parameter);
  prefetch(t.gradient, sizes.gradient);
  prefetch(t.correction, sizes.correction);
  for (int k = 0; k < kMaxSlots; ++k) prefetch(t.states[k], sizes.state);
}

/// Neither a division for each piece nor a copy where full groups follow each other, as in a matrix that is cut into
/// columns at multiples of 32.
void BlockWalker::find_pieces() {
  groups_ = static_cast<int>(std::min<int64_t>(block_groups(tensor_), pieces_->groups() - first_group_));
  int64_t run = first_group_ / pieces_->groups_per_run;
  int64_t in_run = first_group_ - run * pieces_->groups_per_run;
  contiguous_ = true;
  for (int g = 0; g < groups_; ++g) {
    const core::GroupPiece piece = pieces_->piece(run, in_run);
    runs_[g] = {piece.first, g * static_cast<int>(kGroupSize) + piece.lane, piece.count};
    whole_first_[g] = piece.whole_first;
    contiguous_ = contiguous_ && piece.count == kGroupSize && piece.first == runs_[0].first + g * kGroupSize;
    if (++in_run == pieces_->groups_per_run) {
      in_run = 0;
      ++run;
    }
  }
  copied_ = !contiguous_ || !is_element_aligned(tensor_);
  first_element_ = runs_[0].first;
  run_count_ = groups_;
}

BlockWalker::BlockWalker(const ParameterTensors& tensor, int64_t index, const core::PlacedGroups* pieces)
    : tensor_(tensor), pieces_(pieces), sizes_(element_sizes(tensor)), first_group_(index * block_groups(tensor)) {
  if (pieces != nullptr) {
    find_pieces();
    return;
  }
  const GroupLayout& layout = tensor.layout;
  const int64_t per_row = layout.groups_per_row();
  groups_ = static_cast<int>(std::min<int64_t>(block_groups(tensor), layout.groups() - first_group_));
  // Without short groups in the block, group g starts at element 32 g: no walk over rows.
  const bool full_rows = layout.row_size % kGroupSize == 0;
  contiguous_ = full_rows || (layout.rows == 1 && (first_group_ + groups_) * kGroupSize <= layout.row_size);
  copied_ = !contiguous_ || !is_element_aligned(tensor);
  if (contiguous_) {
    first_element_ = first_group_ * kGroupSize;
    runs_[0] = {first_element_, 0, groups_ * static_cast<int>(kGroupSize)};
    run_count_ = 1;
    return;
  }
  int64_t row = first_group_ / per_row;
  int64_t in_row = first_group_ % per_row;
  for (int g = 0; g < groups_; ++g) {
    const int64_t column = in_row * kGroupSize;
    runs_[g] = {row * layout.row_size + column, g * static_cast<int>(kGroupSize),
                static_cast<int>(std::min(kGroupSize, layout.row_size - column))};
    if (++in_row == per_row) {
      in_row = 0;
      ++row;
    }
  }
  run_count_ = groups_;
  first_element_ = runs_[0].first;
}

void BlockWalker::open(Block& block, const BlockAccess& access) {
  block.groups = groups_;
  const auto set_first = [&block](auto in_whole) {
    for (int g = 0; g < kBlockGroups; ++g) {
      const uint64_t first = static_cast<uint64_t>(in_whole(g));
      block.group_first_low[g] = static_cast<uint32_t>(first);
      block.group_first_high[g] = static_cast<uint32_t>(first >> 32);
    }
  };
  // Groups behind the last are counted too, past 2^63 in a tensor that ends there.
  const uint64_t origin = static_cast<uint64_t>(tensor_.place.first_element);
  if (pieces_ != nullptr) {
    set_first([this](int g) { return whole_first_[std::min(g, groups_ - 1)]; });
  } else if (contiguous_) {
    set_first([this, origin](int g) { return origin + static_cast<uint64_t>(first_element_ + g * kGroupSize); });
  } else {
    set_first([this, origin](int g) { return origin + static_cast<uint64_t>(runs_[std::min(g, groups_ - 1)].first); });
  }
  for (int k = 0; k < kMaxSlots; ++k) {
    // Counted in bytes: an odd address is no uint16_t's.
    block.scales[k] =
        tensor_.scales[k] == nullptr
            ? nullptr
            : reinterpret_cast<uint16_t*>(static_cast<unsigned char*>(tensor_.scales[k]) + first_group_ * 2);
  }
  const int64_t first = first_element_;
  const auto at = [first](const void* base, int64_t size) -> void* {
    return base == nullptr ? nullptr
                           : const_cast<unsigned char*>(static_cast<const unsigned char*>(base)) + first * size;
  };
  if (!copied_) {
    block.parameter = at(tensor_.parameter, sizes_.parameter);
    block.gradient = access.gradient ? at(tensor_.gradient, sizes_.gradient) : nullptr;
    block.correction = at(tensor_.correction, sizes_.correction);
    for (int k = 0; k < kMaxSlots; ++k) block.states[k] = at(tensor_.states[k], sizes_.state);
    return;
  }
  const auto copy_in = [this](unsigned char* to, const void* from, int64_t size) {
    std::memset(to, 0, static_cast<size_t>(groups_ * kGroupSize * size));
    for (int r = 0; r < run_count_; ++r) {
      std::memcpy(to + runs_[r].offset * size, static_cast<const unsigned char*>(from) + runs_[r].first * size,
                  static_cast<size_t>(runs_[r].count * size));
    }
  };
  if (tensor_.parameter != nullptr) copy_in(parameter_, tensor_.parameter, sizes_.parameter);
  if (access.gradient) copy_in(gradient_, tensor_.gradient, sizes_.gradient);
  if (tensor_.correction != nullptr) copy_in(correction_, tensor_.correction, sizes_.correction);
  block.parameter = parameter_;
  block.gradient = access.gradient ? gradient_ : nullptr;
  block.correction = correction_;
  for (int k = 0; k < kMaxSlots; ++k) {
    if (tensor_.states[k] != nullptr) copy_in(states_[k], tensor_.states[k], sizes_.state);
    block.states[k] = states_[k];
    if (tensor_.scales[k] == nullptr) continue;
    std::memcpy(scales_[k], block.scales[k], static_cast<size_t>(groups_) * sizeof(uint16_t));
    block.scales[k] = scales_[k];
  }
}

void BlockWalker::close(const BlockAccess& access) {
  if (!copied_) return;
  const auto copy_out = [this](void* to, const unsigned char* from, int64_t size) {
    for (int r = 0; r < run_count_; ++r) {
      std::memcpy(static_cast<unsigned char*>(to) + runs_[r].first * size, from + runs_[r].offset * size,
                  static_cast<size_t>(runs_[r].count * size));
    }
  };
  if (access.write_parameter) {
    copy_out(tensor_.parameter, parameter_, sizes_.parameter);
    if (tensor_.correction != nullptr) copy_out(tensor_.correction, correction_, sizes_.correction);
  }
  if (access.write_states) {
    for (int k = 0; k < kMaxSlots; ++k) {
      if (tensor_.states[k] != nullptr) copy_out(tensor_.states[k], states_[k], sizes_.state);
      if (tensor_.scales[k] != nullptr) {
        std::memcpy(static_cast<unsigned char*>(tensor_.scales[k]) + first_group_ * 2, scales_[k],
                    static_cast<size_t>(groups_) * sizeof(uint16_t));
      }
    }
  }
}

}  // namespace flashoptim::cpu
