// Walking a tensor in blocks of up to kBlockGroups groups: which memory a block covers, padded copies where groups are short.
#pragma once

#include <algorithm>
#include <cstdint>

#include "flashoptim/step.h"
#include "src/cpu/kernels.h"

namespace flashoptim::cpu {

inline int64_t block_count(const GroupLayout& layout) {
  return (layout.groups() + kBlockGroups - 1) / kBlockGroups;
}

/// Bytes per element of each array of a tensor; 0 for arrays it does not have.
struct ElementSizes {
  int64_t parameter, gradient, correction, state;
};
ElementSizes element_sizes(const ParameterTensors& tensor);

/// Which of a block's arrays an operation reads and writes.
struct BlockAccess {
  bool gradient;
  bool write_parameter;
  bool write_states;
};

/// Asks for the memory of one block of `tensor` ahead of its use, an array at a time: seven streams of a few hundred bytes a
/// block, with page boundaries in them, are more than hardware prefetchers follow.
class BlockPrefetch {
 public:
  /// `index` must lie within the tensor, or be negative: then nothing is asked for.
  BlockPrefetch(const ParameterTensors& tensor, int64_t index)
      : tensor_(tensor),
        sizes_(element_sizes(tensor)),
        first_(index * kBlockElements),
        // Rows with short groups start blocks at other elements; close enough for a hint, and never behind the end.
        count_(index < 0 ? 0 : std::min<int64_t>(kBlockElements, tensor.layout.numel() - first_)) {}

  void parameter() const { prefetch(tensor_.parameter, sizes_.parameter); }
  void gradient() const { prefetch(tensor_.gradient, sizes_.gradient); }
  void correction() const { prefetch(tensor_.correction, sizes_.correction); }
  void state(int k) const { prefetch(tensor_.states[k], sizes_.state); }

 private:
  void prefetch(const void* base, int64_t size) const {
    if (base == nullptr) return;
    const char* p = static_cast<const char*>(base) + first_ * size;
    for (int64_t offset = 0; offset < count_ * size; offset += 64) __builtin_prefetch(p + offset, 1, 3);
  }
  const ParameterTensors& tensor_;
  ElementSizes sizes_;
  int64_t first_, count_;
};

/// A stretch of elements that is contiguous both in the tensor and in the block.
struct ElementRun {
  int64_t first;   ///< element of the tensor
  int offset;      ///< element of the block
  int count;       ///< 1 ... kBlockElements
};

/// The memory of one block of a tensor. Where every group of the block is full, open() points at the tensor's own
/// memory; otherwise at copies in which short groups are padded with zeros (a zero weight, gradient and state stays
/// zero under every rule), and close() copies the results back.
class BlockWalker {
 public:
  BlockWalker(const ParameterTensors& tensor, int64_t index);

  int run_count() const { return run_count_; }
  const ElementRun& run(int i) const { return runs_[i]; }
  bool is_contiguous() const { return contiguous_; }

  /// Sets the block's pointers, group count and where its groups start.
  void open(Block& block, const BlockAccess& access);
  /// Copies back what was written.
  void close(const BlockAccess& access);

 private:
  const ParameterTensors& tensor_;
  ElementSizes sizes_;
  bool contiguous_;
  int run_count_ = 0;
  int groups_;
  int64_t first_group_;
  int64_t first_element_;
  ElementRun runs_[kBlockGroups];
  alignas(64) unsigned char parameter_[kBlockElements * 4];
  alignas(64) unsigned char gradient_[kBlockElements * 4];
  alignas(64) unsigned char correction_[kBlockElements * 2];
  alignas(64) unsigned char states_[kMaxStates][kBlockElements * 4];
};

}  // namespace flashoptim::cpu
