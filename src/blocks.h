// Walking a tensor in blocks of up to kBlockGroups groups: which memory a block covers, padded copies where groups are
// short.
#pragma once

#include <cstdint>

#include "flashoptim/core/place.h"
#include "flashoptim/step.h"
#include "src/cpu/kernels.h"

namespace flashoptim::cpu {

/// Groups of a tensor's blocks but the last: fewer where weights or states are fp32, so that two blocks' memory and the
/// working set fit into the first-level cache.
inline int block_groups(const ParameterTensors& tensor) {
  const bool wide = tensor.parameter_dtype == DType::kFloat32 || tensor.state_codec == StateCodec::kFloat32;
  return wide ? kBlockGroups / 2 : kBlockGroups;
}
/// Of a tensor of `groups` groups or pieces.
inline int64_t block_count(const ParameterTensors& tensor, int64_t groups) {
  return (groups + block_groups(tensor) - 1) / block_groups(tensor);
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

/// Whether each array starts at a multiple of its element's size.
bool is_element_aligned(const ParameterTensors& tensor);

/// Asks for the memory of block `index` of `tensor`, which must lie within it, ahead of its use: for blocks whose
/// memory the passes do not see, because it is copied.
void prefetch_block(const ParameterTensors& tensor, int64_t index);

/// A stretch of elements that is contiguous both in the tensor and in the block.
struct ElementRun {
  int64_t first;  ///< element of the tensor
  int offset;     ///< element of the block
  int count;      ///< 0 ... kBlockElements
};

/// The memory of one block of a tensor. Where every group of the block is full and every array starts at a multiple of
/// its element's size, open() points at the tensor's own memory; otherwise at aligned copies in which short groups are
/// padded with zeros (a zero weight, gradient and state stays zero under every rule), and close() copies the results
/// back. Pieces of groups stand at their lanes.
class BlockWalker {
 public:
  /// `pieces`: of a tensor that is walked through in pieces, else null. It must live as long as the walker.
  BlockWalker(const ParameterTensors& tensor, int64_t index, const core::PlacedGroups* pieces = nullptr);

  int run_count() const { return run_count_; }
  const ElementRun& run(int i) const { return runs_[i]; }
  bool is_copied() const { return copied_; }

  /// Sets the block's pointers, group count and where its groups start.
  void open(Block& block, const BlockAccess& access);
  /// Copies back what was written.
  void close(const BlockAccess& access);

 private:
  void find_pieces();

  const ParameterTensors& tensor_;
  const core::PlacedGroups* pieces_;
  ElementSizes sizes_;
  bool contiguous_;  ///< every group is full: one run
  bool copied_;
  int run_count_ = 0;
  int groups_;
  int64_t first_group_;
  int64_t first_element_;
  ElementRun runs_[kBlockGroups];
  int64_t whole_first_[kBlockGroups];  ///< of pieces: first element of the group in the whole
  alignas(64) unsigned char parameter_[kBlockElements * 4];
  alignas(64) unsigned char gradient_[kBlockElements * 4];
  alignas(64) unsigned char correction_[kBlockElements * 2];
  alignas(64) unsigned char states_[kMaxSlots][kBlockElements * 4];
  alignas(64) uint16_t scales_[kMaxSlots][kBlockGroups];
};

}  // namespace flashoptim::cpu
