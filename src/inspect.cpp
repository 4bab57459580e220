#include "src/inspect.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "flashoptim/core/inspect.h"
#include "flashoptim/core/optimizer_list.h"
#include "src/blocks.h"

namespace flashoptim {
namespace {

constexpr int kGroup = static_cast<int>(kGroupSize);
using Elements = core::StoredElements<kGroup>;

/// Elements [first, first + count) of an array whose elements have `size` bytes; zeros behind them, or where there is
/// none.
void load_patterns(const void* base, int64_t size, int64_t first, int count, uint32_t* out) {
  if (base == nullptr) count = 0;
  const unsigned char* p = static_cast<const unsigned char*>(base) + (count == 0 ? 0 : first * size);
  for (int i = 0; i < count; ++i) {
    uint8_t bits8;
    uint16_t bits16;
    switch (size) {
      case 1:
        std::memcpy(&bits8, p + i, 1);
        out[i] = bits8;
        break;
      case 2:
        std::memcpy(&bits16, p + 2 * i, 2);
        out[i] = bits16;
        break;
      default:
        std::memcpy(out + i, p + 4 * i, 4);
    }
  }
  std::fill(out + count, out + kGroup, 0u);
}

void load_elements(const ParameterTensors& t, const cpu::ElementSizes& sizes, int64_t group, int64_t first, int count,
                   Elements& e) {
  e.valid = count;
  load_patterns(t.parameter, sizes.parameter, first, count, e.parameter);
  load_patterns(t.gradient, sizes.gradient, first, count, e.gradient);
  load_patterns(t.correction, sizes.correction, first, count, e.correction);
  const uint32_t unused_bits = 32u - 8u * static_cast<uint32_t>(sizes.correction);
  if (t.correction != nullptr) {
    for (uint32_t& c : e.correction) c = core::shift_right_signed(c << unused_bits, unused_bits);
  }
  for (int k = 0; k < kMaxSlots; ++k) {
    load_patterns(t.states[k], sizes.state, first, count, e.states.codes[k]);
    uint16_t header = 0;
    if (t.scales[k] != nullptr) std::memcpy(&header, static_cast<const unsigned char*>(t.scales[k]) + 2 * group, 2);
    e.states.header[k] = header;
  }
}

template <core::Rule Rule, StateCodec kCodec>
void inspect_elements(const TensorInspection& in, const Elements& e, const core::GroupDither& dither,
                      core::Inspection& out) {
  const ParameterTensors& t = in.tensor;
  typename Rule::Hyper hyper;
  std::memcpy(&hyper, &in.hyper, sizeof hyper);
  core::inspect_elements<Rule, kCodec>({t.parameter_dtype, t.gradient_dtype, t.master_weights}, e,
                                       core::InspectedStep<Rule>{hyper, in.gradient_scale, in.largest_update}, dither,
                                       core::WholeGroup(), out);
}

using Inspect = void (*)(const TensorInspection&, const Elements&, const core::GroupDither&, core::Inspection&);

template <core::Rule Rule>
Inspect choose(StateCodec codec) {
  if constexpr (Rule::kSlotCount > 0) {
    if (codec == StateCodec::kPaper) return inspect_elements<Rule, StateCodec::kPaper>;
    if (codec == StateCodec::kDefault) return inspect_elements<Rule, StateCodec::kDefault>;
  }
  return inspect_elements<Rule, StateCodec::kFloat32>;
}

Inspect choose(cpu::RuleKind rule, StateCodec codec) {
  switch (rule) {
#define FLASHOPTIM_CASE(name)  \
  case cpu::RuleKind::k##name: \
    return choose<core::name>(codec);
    FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CASE)
#undef FLASHOPTIM_CASE
    case cpu::RuleKind::kCount:
      break;
  }
  return nullptr;
}

void add(const core::Inspection& from, StepTelemetry* to) {
  const auto add_count = [](uint32_t count, int64_t& total) {
    if (count != 0) std::atomic_ref<int64_t>(total).fetch_add(count, std::memory_order_relaxed);
  };
  add_count(from.examined, to->examined);
  add_count(from.nonfinite_gradients, to->nonfinite_gradients);
  add_count(from.lost_updates, to->lost_updates);
  add_count(from.floored_codes, to->floored_codes);
  add_count(from.saturated_codes, to->saturated_codes);
  std::atomic_ref<float> ratio(to->largest_update_ratio);
  float largest = ratio.load(std::memory_order_relaxed);
  while (from.largest_update_ratio > largest &&
         !ratio.compare_exchange_weak(largest, from.largest_update_ratio, std::memory_order_relaxed)) {
  }
}

}  // namespace

Status check_inspection(const InspectOptions& options, const StepTelemetry* telemetry, int64_t entries,
                        const char* where) {
  if (options.stride < 1) {
    return Status::invalid_argument("inspect_options.stride = " + std::to_string(options.stride) +
                                    "; must be at least 1");
  }
  if (telemetry == nullptr && entries > 0) {
    return Status::invalid_argument("telemetry is null; it must have " + std::to_string(entries) + " entries" + where);
  }
  return check_aligned(telemetry, "telemetry");
}

void inspect_groups(const TensorInspection& in, int64_t begin, int64_t end, StepTelemetry* out) {
  // Counts of so many groups stay below 2^32.
  constexpr int64_t kGroupsPerSum = int64_t{1} << 20;
  const ParameterTensors& t = in.tensor;
  const GroupLayout& layout = t.layout;
  const Inspect inspect = choose(in.rule, t.state_codec);
  const cpu::ElementSizes sizes = cpu::element_sizes(t);
  // Which groups are looked at is counted in the whole: what shards find adds up to what the whole finds.
  const int64_t chosen = core::first_inspected_group(in.dither, in.index, in.stride);
  core::Inspection sum;
  int64_t summed = 0;
  const auto look_at = [&](int64_t group, const core::GroupPiece& piece) {
    Elements e;
    load_elements(t, sizes, group, piece.first, piece.count, e);
    const uint64_t whole_first = static_cast<uint64_t>(piece.whole_first);
    const uint32_t hash = core::dither_group_hash<float>(in.dither, static_cast<uint32_t>(whole_first),
                                                         static_cast<uint32_t>(whole_first >> 32));
    inspect(in, e, core::GroupDither{in.dither, hash, piece.lane}, sum);
    if (++summed == kGroupsPerSum) {
      add(sum, out);
      sum = {};
      summed = 0;
    }
  };
  if (const core::PlacedGroups* const pieces = in.groups.placed()) {
    for (int64_t p = begin; p < end; ++p) {
      const core::GroupPiece piece = pieces->piece(p / pieces->groups_per_run, p % pieces->groups_per_run);
      if (piece.count == 0) continue;
      if (core::groups_to_inspected(chosen, pieces->group_of(piece.whole_first), in.stride) == 0) look_at(p, piece);
    }
  } else {
    const int64_t per_row = layout.groups_per_row();
    const int64_t skipped = core::groups_to_inspected(chosen, begin + in.groups.first_group, in.stride);
    // (the step to the next one may not fit 64 bits)
    const int64_t count = skipped >= end - begin ? 0 : (end - begin - skipped - 1) / in.stride + 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t group = begin + skipped + i * in.stride;
      const int64_t column = group % per_row * kGroupSize;
      const int64_t first = group / per_row * layout.row_size + column;
      look_at(group, {first, static_cast<int>(std::min(kGroupSize, layout.row_size - column)), 0,
                      t.place.first_element + first});
    }
  }
  if (summed > 0) add(sum, out);
}

}  // namespace flashoptim
