#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "flashoptim/core/optimizers/rule.h"
#include "flashoptim/step.h"
#include "src/blocks.h"
#include "src/checks.h"
#include "src/cpu/run_block.h"
#include "src/inspect.h"
#include "src/place.h"
#include "src/rules.h"
#include "src/shares.h"
#include "src/threads.h"

namespace flashoptim {

using cpu::Block;
using cpu::BlockAccess;
using cpu::BlockWalker;
using cpu::KernelTable;

namespace {

struct PreparedHyper {
  cpu::HyperStorage rule;
  core::DitherKey dither;
  float gradient_scale;
  float largest_update;  // for inspect()
};

/// What a step goes over: tensors by index, or all of them.
struct Selection {
  const int64_t* tensors = nullptr;      ///< null: tensor i is the plan's i-th
  const int64_t* first_block = nullptr;  ///< sums of blocks, count + 1 of them
  int64_t count = 0;

  int64_t blocks() const { return first_block[count]; }
  size_t tensor(size_t i) const { return tensors == nullptr ? i : static_cast<size_t>(tensors[i]); }
  /// Where block `block` is: the last entry that begins there or before.
  size_t find(int64_t block) const {
    return static_cast<size_t>(std::upper_bound(first_block, first_block + count + 1, block) - first_block) - 1;
  }
};

}  // namespace

struct Plan::Impl {
  OptimizerKind optimizer;
  bool has_momentum;
  cpu::RuleKind rule;
  const KernelTable* kernels;
  std::vector<ParameterTensors> tensors;
  std::vector<TensorGroups> groups;  // of each tensor
  std::vector<int64_t> first_block;  // prefix sums over tensors, one longer
  std::vector<PreparedHyper> hypers;
  std::atomic<int64_t> nonfinite{0};
  Shares shares;
  Selection selection;  // of the step that runs

  // For step_some(): sums of blocks as above, and in which call a tensor was named and a hyperparameter set made ready.
  std::vector<int64_t> some_first_block;
  std::vector<uint64_t> named_in, prepared_in;
  uint64_t calls = 0;

  /// Block `index` of tensor t, whose `pieces` may be null, which has a next one or not.
  void step_block(Block& block, const ParameterTensors& t, const core::PlacedGroups* pieces, int64_t index,
                  bool has_next) const {
    const PreparedHyper& hyper = hypers[static_cast<size_t>(t.hyper_index)];
    block.hyper = &hyper.rule;
    block.dither = hyper.dither;
    block.gradient_scale = hyper.gradient_scale;
    const BlockAccess access{true, true, true};
    BlockWalker walker(t, index, pieces);
    walker.open(block, access);
    block.ahead = has_next && !walker.is_copied() ? cpu::block_groups(t) * kGroupSize : 0;
    if (has_next && walker.is_copied() && pieces == nullptr) cpu::prefetch_block(t, index + 1);
    kernels->hash_groups(block);
    cpu::run_block(*kernels, {rule, t.state_codec, t.parameter_dtype, t.gradient_dtype, t.master_weights}, block);
    walker.close(access);
  }

  /// Blocks begin ... end - 1, as part of `all_end`.
  void step_range(int64_t begin, int64_t end, int64_t all_end) {
    Block block;
    block.nonfinite = 0;
    size_t i = selection.find(begin);
    for (int64_t b = begin; b < end; ++i) {
      const int64_t first = selection.first_block[i], behind = selection.first_block[i + 1];
      const int64_t last = std::min(end, behind), all_last = std::min(all_end, behind);
      const ParameterTensors& t = tensors[selection.tensor(i)];
      if (t.gradient != nullptr) {
        const core::PlacedGroups* const pieces = groups[selection.tensor(i)].placed();
        for (; b < last; ++b) step_block(block, t, pieces, b - first, b + 1 < all_last);
      }
      b = last;
    }
    if (block.nonfinite != 0) nonfinite.fetch_add(block.nonfinite, std::memory_order_relaxed);
  }

  /// A thread's part of a step; it helps with others' parts when it has done its own.
  void step_shared(int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (end - begin == selection.blocks()) return step_range(begin, end, end);
    shares.work(begin, [this](int64_t from, int64_t to, int64_t share_end) { step_range(from, to, share_end); });
  }

  void inspect_range(int64_t begin, int64_t end, int64_t stride, StepTelemetry* telemetry) const {
    size_t t = selection.find(begin);
    for (int64_t b = begin; b < end; ++t) {
      const int64_t last = std::min(end, first_block[t + 1]);
      if (tensors[t].gradient != nullptr) {
        const PreparedHyper& hyper = hypers[static_cast<size_t>(tensors[t].hyper_index)];
        const int64_t per_block = cpu::block_groups(tensors[t]);
        const int64_t first_group = (b - first_block[t]) * per_block;
        const int64_t end_group = std::min(groups[t].count, (last - first_block[t]) * per_block);
        inspect_groups({tensors[t], groups[t], static_cast<int64_t>(t), rule, hyper.rule, hyper.dither,
                        hyper.gradient_scale, hyper.largest_update, stride},
                       first_group, end_group, telemetry + t);
      }
      b = last;
    }
  }

  Selection all() const { return {nullptr, first_block.data(), static_cast<int64_t>(tensors.size())}; }

  /// Checks a step's arguments; sets 0 ... *used - 1 of the hyperparameters are its.
  Status check(const Hyperparameters* given, int64_t count, const StepOptions& options, int32_t* used) const;
  void prepare(const Hyperparameters& given, const StepOptions& options, PreparedHyper* out) const;
  /// check() and prepare() for a step over everything.
  Status begin(const Hyperparameters* given, int64_t count, const StepOptions& options);
  /// And for one over some, which become the selection.
  Status begin_some(const int64_t* indices, int64_t count, const Hyperparameters* given, int64_t hyper_count,
                    const StepOptions& options);
  /// Steps the selection, whose hyperparameters are ready.
  void run(const StepOptions& options);

  /// Runs body(context, begin, end) over the selection's blocks.
  void for_each_block(const StepOptions& options, void (*body)(void*, int64_t, int64_t), void* context) const {
    const int64_t blocks = selection.blocks();
    if (blocks == 0) return;
    if (options.parallel_for != nullptr) {
      options.parallel_for(options.parallel_for_user, blocks, body, context);
    } else {
      default_parallel_for(blocks, body, context);
    }
  }

  /// Drops what the optimizer and the formats do not have, so that nothing looks at it.
  void normalize(ParameterTensors* t) const {
    for (int k = states(); k < kMaxSlots; ++k) t->states[k] = t->scales[k] = nullptr;
    if (t->state_codec == StateCodec::kFloat32) std::fill_n(t->scales, kMaxSlots, nullptr);
    if (cpu::element_sizes(*t).correction == 0) t->correction = nullptr;
  }
  int states() const { return state_count(optimizer, has_momentum); }
};

Plan::Plan() = default;
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

Status Plan::make(OptimizerKind optimizer, bool has_momentum, const ParameterTensors* tensors, int64_t count,
                  Plan* plan) {
  return guarded([&] {
    if (plan == nullptr) return Status::invalid_argument("plan is null");
    Status status = check_aligned(plan, "plan");
    if (status.is_ok()) status = check_optimizer(optimizer);
    if (status.is_ok()) status = check_tensor_list(tensors, count);
    const KernelTable* kernels = status.is_ok() ? cpu::select_kernels(&status) : nullptr;
    if (!status.is_ok()) return status;
    auto impl = std::make_unique<Impl>();
    impl->optimizer = optimizer;
    impl->has_momentum = has_momentum;
    impl->rule = rule_kind(optimizer, has_momentum);
    impl->kernels = kernels;
    // Room for one hyperparameter set per tensor, so that set_hyper_index() rarely needs more than there are.
    int64_t hypers = std::min<int64_t>(count, kMaxHyperparameterSets);
    const auto size = static_cast<size_t>(count);
    impl->groups.reserve(size);
    impl->first_block.reserve(size + 1);
    impl->first_block.assign(1, 0);
    for (int64_t i = 0; i < count; ++i) {
      status = check_tensor(tensors[i], {"tensors", i}, impl->states());
      if (!status.is_ok()) return status;
      impl->groups.push_back(tensor_groups(tensors[i]));
      int64_t blocks = impl->first_block.back();
      if (__builtin_add_overflow(blocks, cpu::block_count(tensors[i], impl->groups.back().count), &blocks)) {
        return Status::invalid_argument("tensors[0] to tensors[" + std::to_string(i) +
                                        "] have more elements than a plan counts");
      }
      impl->first_block.push_back(blocks);
      hypers = std::max<int64_t>(hypers, tensors[i].hyper_index + 1);
    }
    impl->tensors.assign(tensors, tensors + count);
    for (ParameterTensors& t : impl->tensors) impl->normalize(&t);
    impl->hypers.resize(static_cast<size_t>(hypers));
    impl->prepared_in.resize(static_cast<size_t>(hypers));
    impl->named_in.resize(size);
    impl->some_first_block.resize(size + 1);
    plan->impl_ = std::move(impl);
    return status;
  });
}

int64_t Plan::size() const { return impl_ == nullptr ? 0 : static_cast<int64_t>(impl_->tensors.size()); }

const ParameterTensors& Plan::tensor(int64_t index) const {
  static constexpr ParameterTensors kNone;
  return index >= 0 && index < size() ? impl_->tensors[static_cast<size_t>(index)] : kNone;
}

Status Plan::set_gradient(int64_t index, const void* gradient) {
  return guarded([&] {
    const Status status = check_index(index, size());
    if (status.is_ok()) impl_->tensors[static_cast<size_t>(index)].gradient = gradient;
    return status;
  });
}

Status Plan::set_gradients(const void* const* gradients) {
  return guarded([&] {
    if (gradients == nullptr && size() > 0) {
      return Status::invalid_argument("gradients is null; it must have " + std::to_string(size()) + " entries");
    }
    const Status status = check_aligned(gradients, "gradients");
    if (!status.is_ok()) return status;
    for (int64_t i = 0; i < size(); ++i) impl_->tensors[static_cast<size_t>(i)].gradient = gradients[i];
    return status;
  });
}

Status Plan::set_hyper_index(int64_t index, int32_t hyper_index) {
  return guarded([&] {
    const Status status = check_index(index, size());
    if (!status.is_ok()) return status;
    if (hyper_index < 0 || static_cast<size_t>(hyper_index) >= impl_->hypers.size()) {
      return Status::invalid_argument("hyper_index = " + std::to_string(hyper_index) + "; allowed are 0 to " +
                                      std::to_string(impl_->hypers.size() - 1));
    }
    impl_->tensors[static_cast<size_t>(index)].hyper_index = hyper_index;
    return status;
  });
}

Status Plan::set_tensor(int64_t index, const ParameterTensors& tensor) {
  return guarded([&] {
    Status status = check_index(index, size());
    if (!status.is_ok()) return status;
    ParameterTensors& kept = impl_->tensors[static_cast<size_t>(index)];
    status = check_same_format(kept, tensor, {"tensor"});
    if (status.is_ok()) status = check_tensor(tensor, {"tensor"}, impl_->states());
    if (status.is_ok()) status = set_hyper_index(index, tensor.hyper_index);
    if (!status.is_ok()) return status;
    kept = tensor;
    impl_->normalize(&kept);
    return status;
  });
}

Status Plan::Impl::check(const Hyperparameters* given, int64_t count, const StepOptions& options, int32_t* used) const {
  *used = 0;
  for (const ParameterTensors& t : tensors) {
    if (t.gradient != nullptr) *used = std::max(*used, t.hyper_index + 1);
  }
  Status status = check_hyper_count(given, count, *used);
  if (status.is_ok()) status = check_gradient_scale(options.gradient_scale);
  for (int32_t i = 0; status.is_ok() && i < *used; ++i) status = check_hyperparameter_set(optimizer, given[i], i);
  return status;
}

void Plan::Impl::prepare(const Hyperparameters& given, const StepOptions& options, PreparedHyper* out) const {
  make_hyper(rule, given, &out->rule);
  out->dither = core::make_dither_key(given.seed, static_cast<uint64_t>(given.step));
  out->gradient_scale = core::directed_factor(options.gradient_scale, given);
  out->largest_update = largest_update(rule, given);
}

Status Plan::Impl::begin(const Hyperparameters* given, int64_t count, const StepOptions& options) {
  int32_t used = 0;
  const Status status = check(given, count, options, &used);
  if (!status.is_ok()) return status;
  for (int32_t i = 0; i < used; ++i) prepare(given[i], options, &hypers[static_cast<size_t>(i)]);
  selection = all();
  return status;
}

Status Plan::Impl::begin_some(const int64_t* indices, int64_t count, const Hyperparameters* given, int64_t hyper_count,
                              const StepOptions& options) {
  Status status = check_selection(indices, count, static_cast<int64_t>(tensors.size()));
  if (status.is_ok()) status = check_hyper_count(given, hyper_count, 0);
  if (status.is_ok()) status = check_gradient_scale(options.gradient_scale);
  if (!status.is_ok()) return status;
  ++calls;
  some_first_block[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    status = check_named(indices, i, static_cast<int64_t>(tensors.size()), calls, named_in.data());
    if (!status.is_ok()) return status;
    const auto tensor = static_cast<size_t>(indices[i]);
    const ParameterTensors& t = tensors[tensor];
    const bool is_stepped = t.gradient != nullptr;
    const int64_t so_far = some_first_block[static_cast<size_t>(i)];
    some_first_block[static_cast<size_t>(i) + 1] =
        so_far + (is_stepped ? cpu::block_count(t, groups[tensor].count) : 0);
    const auto hyper = static_cast<size_t>(t.hyper_index);
    if (!is_stepped || prepared_in[hyper] == calls) continue;
    status = check_hyper_count(given, hyper_count, t.hyper_index + 1);
    if (status.is_ok()) status = check_hyperparameter_set(optimizer, given[hyper], t.hyper_index);
    if (!status.is_ok()) return status;
    prepare(given[hyper], options, &hypers[hyper]);
    prepared_in[hyper] = calls;
  }
  selection = {indices, some_first_block.data(), count};
  return status;
}

void Plan::Impl::run(const StepOptions& options) {
  nonfinite.store(0, std::memory_order_relaxed);
  shares.reset(selection.blocks());
  for_each_block(
      options, [](void* impl, int64_t begin, int64_t end) { static_cast<Impl*>(impl)->step_shared(begin, end); }, this);
  if (options.nonfinite_gradients != nullptr) {
    *options.nonfinite_gradients += nonfinite.load(std::memory_order_relaxed);
  }
}

namespace {

Status empty_plan() { return Status::invalid_argument("plan is empty: call Plan::make first"); }
/// Of options that passed check_step_options.
bool is_skipped(const StepOptions& options) { return options.found_inf != nullptr && *options.found_inf != 0.0f; }

}  // namespace

Status Plan::step(const Hyperparameters* hypers, int64_t count, const StepOptions& options) {
  const Status status = guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    const Status checked = check_step_options(options);
    return !checked.is_ok() || is_skipped(options) ? checked : impl_->begin(hypers, count, options);
  });
  if (status.is_ok() && !is_skipped(options)) impl_->run(options);
  return status;
}

Status Plan::step_some(const int64_t* indices, int64_t count, const Hyperparameters* hypers, int64_t hyper_count,
                       const StepOptions& options) {
  const Status status = guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    const Status checked = check_step_options(options);
    if (!checked.is_ok() || is_skipped(options)) return checked;
    return impl_->begin_some(indices, count, hypers, hyper_count, options);
  });
  if (status.is_ok() && !is_skipped(options)) impl_->run(options);
  return status;
}

Status Plan::check_step(const Hyperparameters* hypers, int64_t count, const StepOptions& options) const {
  return guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    int32_t used = 0;
    const Status checked = check_step_options(options);
    return checked.is_ok() ? impl_->check(hypers, count, options, &used) : checked;
  });
}

Status Plan::inspect(const Hyperparameters* hypers, int64_t count, const StepOptions& options,
                     const InspectOptions& inspect_options, StepTelemetry* telemetry) {
  const Status status = guarded([&] {
    if (impl_ == nullptr) return empty_plan();
    Status checked = check_step_options(options);
    if (checked.is_ok()) checked = check_inspection(inspect_options, telemetry, size());
    if (!checked.is_ok() || is_skipped(options)) return checked;
    return impl_->begin(hypers, count, options);
  });
  if (!status.is_ok() || is_skipped(options)) return status;
  struct Work {
    const Impl* impl;
    int64_t stride;
    StepTelemetry* telemetry;
  } work{impl_.get(), inspect_options.stride, telemetry};
  const auto body = [](void* context, int64_t begin, int64_t end) {
    const Work& w = *static_cast<const Work*>(context);
    w.impl->inspect_range(begin, end, w.stride, w.telemetry);
  };
  impl_->for_each_block(options, body, &work);
  return status;
}

}  // namespace flashoptim
