// Weights and states from and to fp32, block by block with the kernels of the step: for checkpoints and inspection.
#include <algorithm>
#include <cstring>
#include <string>

#include "flashoptim/step.h"
#include "src/blocks.h"
#include "src/checks.h"
#include "src/conversions.h"
#include "src/rules.h"

namespace flashoptim {

using cpu::Block;
using cpu::BlockAccess;
using cpu::BlockWalker;
using cpu::KernelTable;

namespace {

/// Runs the stages over every block of `tensor`; `before` fills and `after` reads the block's fp32 arrays.
template <class Before, class After>
void for_each_block(const ParameterTensors& tensor, const BlockAccess& access, Before before, After after) {
  Block block{};
  for (int64_t b = 0; b < cpu::block_count(tensor, tensor.layout.groups()); ++b) {
    BlockWalker walker(tensor, b);
    walker.open(block, access);
    before(block, walker);
    walker.close(access);
    after(block, walker);
  }
}

void gather(const BlockWalker& walker, const float* from, float* to) {
  for (int r = 0; r < walker.run_count(); ++r) {
    const cpu::ElementRun& run = walker.run(r);
    std::memcpy(to + run.offset, from + run.first, static_cast<size_t>(run.count) * sizeof(float));
    // Zeros behind a short group, as in the padded copies.
    const int padded =
        (run.count + static_cast<int>(kGroupSize) - 1) / static_cast<int>(kGroupSize) * static_cast<int>(kGroupSize);
    std::fill(to + run.offset + run.count, to + run.offset + padded, 0.0f);
  }
}

void scatter(const BlockWalker& walker, const float* from, float* to) {
  for (int r = 0; r < walker.run_count(); ++r) {
    const cpu::ElementRun& run = walker.run(r);
    std::memcpy(to + run.first, from + run.offset, static_cast<size_t>(run.count) * sizeof(float));
  }
}

Status check_values(const float* const* values, const ParameterTensors& t, int states) {
  if (states == 0 || t.layout.numel() == 0) return Status::ok();
  if (values == nullptr)
    return Status::invalid_argument("values is null; it must have " + std::to_string(states) + " entries");
  const Status status = check_aligned(values, "values");
  if (!status.is_ok()) return status;
  // They lie apart from each other, and from what the states are read from or written to.
  const int64_t numel = t.layout.numel(), state_bytes = numel * cpu::element_sizes(t).state;
  const int64_t scale_bytes = t.state_codec == StateCodec::kFloat32 ? 0 : t.layout.groups() * 2;
  ArrayRange arrays[3 * kMaxSlots];
  int count = 0;
  for (int k = 0; k < states; ++k) {
    if (values[k] == nullptr) return Status::invalid_argument("values[" + std::to_string(k) + "] is null");
    arrays[count++] = {"values", k, values[k], numel * static_cast<int64_t>(sizeof(float))};
    arrays[count++] = {"tensor.states", k, t.states[k], state_bytes};
    if (scale_bytes > 0) arrays[count++] = {"tensor.scales", k, t.scales[k], scale_bytes};
  }
  return check_apart(arrays, count, {});
}

}  // namespace

Status weights_tensor(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                      const float* weights, int64_t count, ParameterTensors* t) {
  if (count < 0 || count > kMostElements) {
    return Status::invalid_argument("count = " + std::to_string(count) + "; allowed are 0 to 2^57");
  }
  if (count > 0 && weights == nullptr) return Status::invalid_argument("weights is null");
  if (static_cast<int>(dtype) < 0 || static_cast<int>(dtype) >= cpu::kDTypes) {
    return Status::invalid_argument("dtype = " + std::to_string(static_cast<int>(dtype)) +
                                    " is no DType; allowed are kFloat32, kBFloat16, kFloat16");
  }
  t->parameter = const_cast<void*>(parameter);
  t->correction = const_cast<void*>(correction);
  t->layout = {count > 0 ? 1 : 0, count};
  t->parameter_dtype = t->gradient_dtype = dtype;
  t->master_weights = master_weights;
  const Status status = check_tensor(*t, {}, 0);
  if (!status.is_ok() || count == 0) return status;
  const cpu::ElementSizes sizes = cpu::element_sizes(*t);
  const ArrayRange arrays[] = {{"weights", -1, weights, count * static_cast<int64_t>(sizeof(float))},
                               {"parameter", -1, parameter, count * sizes.parameter},
                               {"correction", -1, correction, count * sizes.correction}};
  return check_apart(arrays, sizes.correction == 0 ? 2 : 3, {});
}

Status merge_weights(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                     float* weights, int64_t count) {
  return guarded([&] {
    ParameterTensors t;
    Status status = weights_tensor(dtype, master_weights, parameter, correction, weights, count, &t);
    const KernelTable* kernels = status.is_ok() ? cpu::select_kernels(&status) : nullptr;
    if (!status.is_ok()) return status;
    const cpu::Stage load = kernels->load_weights[static_cast<int>(dtype)][static_cast<int>(master_weights)];
    for_each_block(
        t, {false, false, false}, [&](Block& b, const BlockWalker&) { load(b); },
        [&](Block& b, const BlockWalker& walker) { scatter(walker, b.weight, weights); });
    return status;
  });
}

Status split_weights(DType dtype, MasterWeights master_weights, const float* weights, void* parameter, void* correction,
                     int64_t count) {
  return guarded([&] {
    ParameterTensors t;
    Status status = weights_tensor(dtype, master_weights, parameter, correction, weights, count, &t);
    const KernelTable* kernels = status.is_ok() ? cpu::select_kernels(&status) : nullptr;
    if (!status.is_ok()) return status;
    const cpu::Stage split = kernels->split_weights[static_cast<int>(dtype)][static_cast<int>(master_weights)];
    for_each_block(
        t, {false, true, false},
        [&](Block& b, const BlockWalker& walker) {
          gather(walker, weights, b.weight);
          split(b);
        },
        [](Block&, const BlockWalker&) {});
    return status;
  });
}

Status check_states_tensor(OptimizerKind optimizer, bool has_momentum, const float* const* values,
                           ParameterTensors* t) {
  Status status = check_optimizer(optimizer);
  if (!status.is_ok()) return status;
  // Parameter and correction are not touched, whatever they are.
  t->parameter = t->correction = nullptr;
  t->parameter_dtype = t->gradient_dtype = DType::kFloat32;
  t->master_weights = MasterWeights::kNone;
  const int states = state_count(optimizer, has_momentum);
  status = check_states(*t, {"tensor"}, states);
  for (int k = states; k < kMaxSlots; ++k) t->states[k] = t->scales[k] = nullptr;
  return status.is_ok() ? check_values(values, *t, states) : status;
}

Status decode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor, float* const* values) {
  return guarded([&] {
    ParameterTensors t = tensor;
    Status status = check_states_tensor(optimizer, has_momentum, values, &t);
    const KernelTable* kernels = status.is_ok() ? cpu::select_kernels(&status) : nullptr;
    if (!status.is_ok()) return status;
    const cpu::Stage decode =
        kernels->decode[static_cast<int>(rule_kind(optimizer, has_momentum))][static_cast<int>(t.state_codec)];
    const int states = state_count(optimizer, has_momentum);
    for_each_block(
        t, {false, false, false}, [&](Block& b, const BlockWalker&) { decode(b); },
        [&](Block& b, const BlockWalker& walker) {
          for (int k = 0; k < states; ++k) scatter(walker, b.state_f32[k], values[k]);
        });
    return status;
  });
}

Status encode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor,
                     const float* const* values) {
  return guarded([&] {
    ParameterTensors t = tensor;
    Status status = check_states_tensor(optimizer, has_momentum, values, &t);
    const KernelTable* kernels = status.is_ok() ? cpu::select_kernels(&status) : nullptr;
    if (!status.is_ok()) return status;
    const cpu::Stage encode =
        kernels->encode[static_cast<int>(rule_kind(optimizer, has_momentum))][static_cast<int>(t.state_codec)];
    const int states = state_count(optimizer, has_momentum);
    for_each_block(
        t, {false, false, true},
        [&](Block& b, const BlockWalker& walker) {
          for (int k = 0; k < states; ++k) gather(walker, values[k], b.state_f32[k]);
          encode(b);
        },
        [](Block&, const BlockWalker&) {});
    return status;
  });
}

}  // namespace flashoptim
