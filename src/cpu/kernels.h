// The CPU kernels' interface: one table of functions per instruction set, each function one pass over a block of up to
// 32 groups (1,024 elements) that stays in the first-level cache.
//
// A step of a block is: load weights and gradients as fp32, decode + update + encode the states (the rule), store the
// weights. Cutting it there keeps the number of compiled loops a sum (dtypes + rules x codecs) instead of a product,
// and costs three loads and stores of L1 per 16 elements.
#pragma once

#include <cstdint>

#include "flashoptim/core/dither.h"
#include "flashoptim/core/optimizer_list.h"
#include "flashoptim/types.h"

namespace flashoptim::cpu {

inline constexpr int kBlockGroups = 32;
inline constexpr int kBlockElements = kBlockGroups * static_cast<int>(kGroupSize);

/// Which compiled rule, in the list's order: OptimizerKind with SGD's momentum-free form apart.
#define FLASHOPTIM_KIND(name) k##name,
enum class RuleKind : int32_t { FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_KIND) kCount };
#undef FLASHOPTIM_KIND
inline constexpr int kRuleKinds = static_cast<int>(RuleKind::kCount);
inline constexpr int kCodecs = 3;
inline constexpr int kMasterKinds = 6;
inline constexpr int kDTypes = 3;
/// Most constants that a codec reads of a header.
inline constexpr int kGroupConstants = 6;

/// Large enough for every rule's Hyper.
struct HyperStorage {
  alignas(8) float values[12];
};

/// Working set of one block; `groups` full groups of 32 (a short group is padded by the caller).
struct Block {
  int groups;
  /// First element of every group in the whole tensor, low and high half.
  alignas(64) uint32_t group_first_low[kBlockGroups];
  alignas(64) uint32_t group_first_high[kBlockGroups];
  alignas(64) uint32_t group_hash[kBlockGroups];
  const void* hyper;  ///< the rule's Hyper
  core::DitherKey dither;
  void* parameter;
  const void* gradient;
  void* correction;
  void* states[kMaxSlots];
  uint16_t* scales[kMaxSlots];
  float gradient_scale;
  int64_t nonfinite;
  alignas(64) float weight[kBlockElements];
  alignas(64) float correction_value[kBlockElements];  ///< what the corrections add; weight includes it
  alignas(64) float gradient_f32[kBlockElements];
  alignas(64) float delta[kBlockElements];
  alignas(64) float state_f32[kMaxSlots][kBlockElements];
  /// What slots' codecs read of their headers (core/codecs/slot_codecs.h), per group: found by one stage from
  /// statistics over the group, used by the next.
  alignas(64) uint32_t constants[kMaxSlots][kGroupConstants][kBlockGroups];
  /// Set by the rule's first stage for its others: that states are such as nearly always (avx512/).
  bool usual = false;
  int64_t ahead = 0;  ///< elements from this block's to those whose memory is asked for; 0: none
  /// Groups that store_weights works on.
  int store_begin, store_end;
};

using Stage = void (*)(Block&);

/// A step of a block runs load_weights, load_gradient, rule[0], rule[1], rule[2]; null stages are skipped. Each rule
/// stage but the last ends with a long chain of dependent instructions from statistics to headers; the caller runs half
/// of store_weights, which does not depend on it, behind each, to keep the processor busy (measured on Zen 5: 49 -> 43
/// cycles per 16 elements).
inline constexpr int kRuleStages = 3;

/// A step of a block in fewer passes, where its values allow it: begin, finish, encode[0], finish, encode[1], with half
/// of the groups to each finish. Where begin returns false, nothing has happened and the stages above do the step.
struct UsualStages {
  bool (*begin)(Block&);
  Stage finish;     ///< of groups store_begin ... store_end - 1
  Stage encode[2];  ///< the second may be null
};

struct KernelTable {
  const char* isa;
  Stage hash_groups;  ///< group_first -> group_hash
  Stage load_weights[kDTypes][kMasterKinds];
  Stage load_gradient[kDTypes];
  Stage rule[kRuleKinds][kCodecs][kRuleStages];
  /// Of a dtype of parameters, one of gradients, master weights; null where there is none.
  UsualStages usual[kRuleKinds][kCodecs][kDTypes][kDTypes][kMasterKinds];
  /// Element of a group whose numbers the usual stages leave each other at place i of its fp32 arrays; null: i.
  int (*usual_element)(int i);
  Stage store_weights[kDTypes][kMasterKinds];  ///< of groups store_begin ... store_end - 1
  Stage split_weights[kDTypes][kMasterKinds];  ///< weight -> parameter, correction (nearest)
  Stage decode[kRuleKinds][kCodecs];           ///< states -> state_f32
  Stage encode[kRuleKinds][kCodecs];           ///< state_f32 -> states (nearest)
};

/// What a block's stages are chosen by.
struct BlockKind {
  RuleKind rule;
  StateCodec codec;
  DType parameter, gradient;
  MasterWeights master;
};

/// Those of a table for one kind of blocks.
template <class Table>
constexpr auto& usual_stages(Table& t, const BlockKind& k) {
  return t.usual[static_cast<int>(k.rule)][static_cast<int>(k.codec)][static_cast<int>(k.parameter)]
                [static_cast<int>(k.gradient)][static_cast<int>(k.master)];
}

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;      ///< F, BW, DQ, VL
extern const KernelTable kAvx512Bf16Kernels;  ///< and VBMI, BF16: Sapphire Rapids, Zen 4 and later
#elif defined(__aarch64__)
extern const KernelTable kNeonKernels;
#endif

/// The table of an instruction set by its name; null where this machine lacks it, or there is none of that name.
const KernelTable* find_kernels(const char* isa);

/// The table for this machine (see cpu_isa in step.h), or null with `status` set.
const KernelTable* select_kernels(Status* status);

}  // namespace flashoptim::cpu
