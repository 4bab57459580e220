#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "flashoptim/core/optimizers/rule.h"
#include "flashoptim/step.h"
#include "src/blocks.h"
#include "src/conversions.h"
#include "src/cpu/run_block.h"
#include "src/inspect.h"
#include "src/rules.h"
#include "src/shares.h"
#include "src/text.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace flashoptim {

using cpu::Block;
using cpu::BlockAccess;
using cpu::BlockWalker;
using cpu::KernelTable;

GroupLayout group_layout(const int64_t* sizes, int64_t dimensions) {
  int64_t numel = 1;
  for (int64_t d = 0; d < dimensions; ++d) numel *= sizes[d];
  if (dimensions >= 2 && numel > 0 && numel / sizes[0] >= kGroupSize) return {sizes[0], numel / sizes[0]};
  return {numel > 0 ? 1 : 0, numel};
}

namespace {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "?";
}

std::string tensor_name(int64_t index) { return "tensors[" + std::to_string(index) + "]"; }

bool in_enum(int value, int count) { return value >= 0 && value < count; }

Status check_tensor(const ParameterTensors& t, int64_t index, int states) {
  const std::string name = tensor_name(index);
  const auto invalid = [&name](const std::string& rest) { return Status::invalid_argument(name + rest); };
  if (!in_enum(static_cast<int>(t.parameter_dtype), cpu::kDTypes) ||
      !in_enum(static_cast<int>(t.gradient_dtype), cpu::kDTypes)) {
    return invalid(".parameter_dtype or .gradient_dtype is no DType; allowed are kFloat32, kBFloat16, kFloat16");
  }
  if (!in_enum(static_cast<int>(t.master_weights), cpu::kMasterKinds)) {
    return invalid(".master_weights = " + std::to_string(static_cast<int>(t.master_weights)) + " is no MasterWeights");
  }
  if (!in_enum(static_cast<int>(t.state_codec), cpu::kCodecs)) {
    return invalid(".state_codec = " + std::to_string(static_cast<int>(t.state_codec)) +
                   " is no StateCodec; allowed are kFloat32, kPaper, kDefault");
  }
  if (t.layout.rows < 0 || t.layout.row_size < 0) {
    return invalid(".layout has rows = " + std::to_string(t.layout.rows) +
                   ", row_size = " + std::to_string(t.layout.row_size) + "; both must be at least 0");
  }
  if (t.layout.row_size > 0 && t.layout.rows > std::numeric_limits<int64_t>::max() / 64 / t.layout.row_size) {
    return invalid(".layout has more elements than 2^57");
  }
  if (t.first_element < 0) {
    return invalid(".first_element = " + std::to_string(t.first_element) + "; must be at least 0");
  }
  if (t.hyper_index < 0) return invalid(".hyper_index = " + std::to_string(t.hyper_index) + "; must be at least 0");
  if (t.parameter_dtype == DType::kFloat32 && t.master_weights != MasterWeights::kNone) {
    return Status::unsupported(name +
                               ".master_weights must be kNone for a float32 parameter, which has no bits to correct");
  }
  if (t.gradient_dtype != t.parameter_dtype && t.gradient_dtype != DType::kFloat32) {
    return Status::unsupported(name + ".gradient_dtype = " + dtype_name(t.gradient_dtype) + " with a " +
                               dtype_name(t.parameter_dtype) +
                               " parameter; allowed are the parameter's dtype and float32");
  }
  if (t.layout.numel() == 0) return Status::ok();
  if (t.parameter == nullptr) return invalid(".parameter is null");
  if (cpu::element_sizes(t).correction != 0 && t.correction == nullptr) {
    return invalid(".correction is null, but .master_weights asks for one");
  }
  for (int k = 0; k < states; ++k) {
    if (t.states[k] == nullptr) return invalid(".states[" + std::to_string(k) + "] is null");
    if (t.state_codec != StateCodec::kFloat32 && t.scales[k] == nullptr) {
      return invalid(".scales[" + std::to_string(k) + "] is null, but .state_codec is quantized");
    }
  }
  return Status::ok();
}

/// Threads are worth their start only for work of some 100 us.
constexpr int64_t kSmallestParallelBlocks = 64;

void default_parallel_for(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
#if defined(_OPENMP)
  if (count >= kSmallestParallelBlocks && omp_get_max_threads() > 1 && !omp_in_parallel()) {
#pragma omp parallel
    {
      const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
      body(context, count * me / threads, count * (me + 1) / threads);
    }
    return;
  }
#endif
  body(context, 0, count);
}

struct PreparedHyper {
  cpu::HyperStorage rule;
  core::DitherKey dither;
  float gradient_scale;
  float largest_update;  // for inspect()
};

}  // namespace

struct Plan::Impl {
  OptimizerKind optimizer;
  cpu::RuleKind rule;
  const KernelTable* kernels;
  std::vector<ParameterTensors> tensors;
  std::vector<int64_t> first_block;  // prefix sums over tensors, one longer
  std::vector<PreparedHyper> hypers;
  std::atomic<int64_t> nonfinite{0};
  Shares shares;

  /// Block `index` of tensor t, which has a next one or not.
  void step_block(Block& block, const ParameterTensors& t, int64_t index, bool has_next) const {
    const PreparedHyper& hyper = hypers[static_cast<size_t>(t.hyper_index)];
    block.hyper = &hyper.rule;
    block.dither = hyper.dither;
    block.gradient_scale = hyper.gradient_scale;
    const BlockAccess access{true, true, true};
    BlockWalker walker(t, index);
    walker.open(block, access);
    block.ahead = has_next && walker.is_contiguous() ? cpu::block_groups(t) * kGroupSize : 0;
    if (has_next && !walker.is_contiguous()) cpu::prefetch_block(t, index + 1);
    kernels->hash_groups(block);
    cpu::run_block(*kernels, {rule, t.state_codec, t.parameter_dtype, t.gradient_dtype, t.master_weights}, block);
    walker.close(access);
  }

  /// Blocks begin ... end - 1, as part of `all_end`.
  void step_range(int64_t begin, int64_t end, int64_t all_end) {
    Block block;
    block.nonfinite = 0;
    size_t t =
        static_cast<size_t>(std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin()) - 1;
    for (int64_t b = begin; b < end;) {
      const int64_t last = std::min(end, first_block[t + 1]), all_last = std::min(all_end, first_block[t + 1]);
      if (tensors[t].gradient != nullptr) {
        for (; b < last; ++b) {
          step_block(block, tensors[t], b - first_block[t], b + 1 < all_last);
        }
      }
      b = last;
      ++t;
    }
    if (block.nonfinite != 0) nonfinite.fetch_add(block.nonfinite, std::memory_order_relaxed);
  }

  /// A thread's part of a step; it helps with others' parts when it has done its own.
  void step_shared(int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (end - begin == first_block.back()) return step_range(begin, end, end);
    shares.work(begin, [this](int64_t from, int64_t to, int64_t share_end) { step_range(from, to, share_end); });
  }

  void inspect_range(int64_t begin, int64_t end, int64_t stride, StepTelemetry* telemetry) const {
    size_t t =
        static_cast<size_t>(std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin()) - 1;
    for (int64_t b = begin; b < end; ++t) {
      const int64_t last = std::min(end, first_block[t + 1]);
      if (tensors[t].gradient != nullptr) {
        const PreparedHyper& hyper = hypers[static_cast<size_t>(tensors[t].hyper_index)];
        const int64_t per_block = cpu::block_groups(tensors[t]);
        const int64_t first_group = (b - first_block[t]) * per_block;
        const int64_t end_group = std::min(tensors[t].layout.groups(), (last - first_block[t]) * per_block);
        inspect_groups({tensors[t], static_cast<int64_t>(t), rule, hyper.rule, hyper.dither, hyper.gradient_scale,
                        hyper.largest_update, stride},
                       first_group, end_group, telemetry + t);
      }
      b = last;
    }
  }

  /// Checks a step's arguments and prepares the hyperparameters that it uses.
  Status prepare(const Hyperparameters* given, int64_t count, const StepOptions& options);

  /// Runs body(context, begin, end) over the plan's blocks.
  void for_each_block(const StepOptions& options, void (*body)(void*, int64_t, int64_t), void* context) const {
    const int64_t blocks = first_block.back();
    if (blocks == 0) return;
    if (options.parallel_for != nullptr) {
      options.parallel_for(options.parallel_for_user, blocks, body, context);
    } else {
      default_parallel_for(blocks, body, context);
    }
  }
};

Plan::Plan() = default;
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

Status Plan::make(OptimizerKind optimizer, bool has_momentum, const ParameterTensors* tensors, int64_t count,
                  Plan* plan) {
  Status status = check_optimizer(optimizer);
  if (!status.is_ok()) return status;
  if (count < 0 || (count > 0 && tensors == nullptr)) {
    return Status::invalid_argument("count = " + std::to_string(count) + " with tensors " +
                                    (tensors == nullptr ? "null" : "set") + "; count must be the number of tensors");
  }
  const KernelTable* kernels = cpu::select_kernels(&status);
  if (kernels == nullptr) return status;
  const int states = state_count(optimizer, has_momentum);
  for (int64_t i = 0; i < count; ++i) {
    status = check_tensor(tensors[i], i, states);
    if (!status.is_ok()) return status;
  }
  auto impl = std::make_unique<Impl>();
  impl->optimizer = optimizer;
  impl->rule = rule_kind(optimizer, has_momentum);
  impl->kernels = kernels;
  impl->tensors.assign(tensors, tensors + count);
  impl->first_block.assign(1, 0);
  int32_t hypers = 0;
  for (ParameterTensors& t : impl->tensors) {
    for (int k = states; k < kMaxSlots; ++k) t.states[k] = t.scales[k] = nullptr;
    if (cpu::element_sizes(t).correction == 0) t.correction = nullptr;
    impl->first_block.push_back(impl->first_block.back() + cpu::block_count(t));
    hypers = std::max(hypers, t.hyper_index + 1);
  }
  // Room for one set per tensor, so that set_hyper_index never needs more.
  impl->hypers.resize(static_cast<size_t>(std::max<int64_t>(hypers, count)));
  plan->impl_ = std::move(impl);
  return Status::ok();
}

int64_t Plan::size() const { return impl_ == nullptr ? 0 : static_cast<int64_t>(impl_->tensors.size()); }

const ParameterTensors& Plan::tensor(int64_t index) const { return impl_->tensors[static_cast<size_t>(index)]; }

Status Plan::set_gradient(int64_t index, const void* gradient) {
  if (index < 0 || index >= size()) {
    return Status::invalid_argument("index = " + std::to_string(index) + "; the plan has " + std::to_string(size()) +
                                    " tensors");
  }
  impl_->tensors[static_cast<size_t>(index)].gradient = gradient;
  return Status::ok();
}

Status Plan::set_hyper_index(int64_t index, int32_t hyper_index) {
  if (index < 0 || index >= size()) {
    return Status::invalid_argument("index = " + std::to_string(index) + "; the plan has " + std::to_string(size()) +
                                    " tensors");
  }
  if (hyper_index < 0 || static_cast<size_t>(hyper_index) >= impl_->hypers.size()) {
    return Status::invalid_argument("hyper_index = " + std::to_string(hyper_index) + "; allowed are 0 to " +
                                    std::to_string(impl_->hypers.size() - 1));
  }
  impl_->tensors[static_cast<size_t>(index)].hyper_index = hyper_index;
  return Status::ok();
}

Status Plan::Impl::prepare(const Hyperparameters* given, int64_t count, const StepOptions& options) {
  int32_t used = 0;
  for (const ParameterTensors& t : tensors) {
    if (t.gradient != nullptr) used = std::max(used, t.hyper_index + 1);
  }
  if (used > count) {
    return Status::invalid_argument("hypers has " + std::to_string(count) + " entries, but a tensor's hyper_index is " +
                                    std::to_string(used - 1));
  }
  if (options.gradient_scale - options.gradient_scale != 0.0f) {
    return Status::invalid_argument(
        "options.gradient_scale = " + number_text(static_cast<double>(options.gradient_scale)) + "; must be finite");
  }
  for (int32_t i = 0; i < used; ++i) {
    const Status status = check_hyperparameter_set(optimizer, given[i], i);
    if (!status.is_ok()) return status;
  }
  for (int32_t i = 0; i < used; ++i) {
    PreparedHyper& prepared = hypers[static_cast<size_t>(i)];
    make_hyper(rule, given[i], &prepared.rule);
    prepared.dither = core::make_dither_key(given[i].seed, static_cast<uint64_t>(given[i].step));
    prepared.gradient_scale = core::directed_factor(options.gradient_scale, given[i]);
    prepared.largest_update = largest_update(rule, given[i]);
  }
  return Status::ok();
}

Status Plan::step(const Hyperparameters* hypers, int64_t count, const StepOptions& options) {
  if (impl_ == nullptr) return Status::invalid_argument("plan is empty: call Plan::make first");
  if (options.found_inf != nullptr && *options.found_inf != 0.0f) return Status::ok();
  const Status status = impl_->prepare(hypers, count, options);
  if (!status.is_ok()) return status;
  impl_->nonfinite.store(0, std::memory_order_relaxed);
  impl_->shares.reset(impl_->first_block.back());
  impl_->for_each_block(
      options, [](void* impl, int64_t begin, int64_t end) { static_cast<Impl*>(impl)->step_shared(begin, end); },
      impl_.get());
  if (options.nonfinite_gradients != nullptr) {
    *options.nonfinite_gradients += impl_->nonfinite.load(std::memory_order_relaxed);
  }
  return Status::ok();
}

Status Plan::inspect(const Hyperparameters* hypers, int64_t count, const StepOptions& options,
                     const InspectOptions& inspect_options, StepTelemetry* telemetry) {
  if (impl_ == nullptr) return Status::invalid_argument("plan is empty: call Plan::make first");
  Status status = check_inspection(inspect_options, telemetry, size());
  if (!status.is_ok()) return status;
  if (options.found_inf != nullptr && *options.found_inf != 0.0f) return Status::ok();
  status = impl_->prepare(hypers, count, options);
  if (!status.is_ok()) return status;
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
  return Status::ok();
}

// ---- element-wise conversions ---------------------------------------------------------------------------------------

namespace {

/// Runs the stages over every block of `tensor`; `before` fills and `after` reads the block's fp32 arrays.
template <class Before, class After>
void for_each_block(const ParameterTensors& tensor, const BlockAccess& access, Before before, After after) {
  Block block{};
  for (int64_t b = 0; b < cpu::block_count(tensor); ++b) {
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
    std::copy_n(from + run.first, run.count, to + run.offset);
    // Zeros behind a short group, as in the padded copies.
    const int padded =
        (run.count + static_cast<int>(kGroupSize) - 1) / static_cast<int>(kGroupSize) * static_cast<int>(kGroupSize);
    std::fill(to + run.offset + run.count, to + run.offset + padded, 0.0f);
  }
}

void scatter(const BlockWalker& walker, const float* from, float* to) {
  for (int r = 0; r < walker.run_count(); ++r) {
    const cpu::ElementRun& run = walker.run(r);
    std::copy_n(from + run.offset, run.count, to + run.first);
  }
}

}  // namespace

Status weights_tensor(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                      int64_t count, ParameterTensors* t) {
  t->parameter = const_cast<void*>(parameter);
  t->correction = const_cast<void*>(correction);
  t->layout = {count > 0 ? 1 : 0, count};
  t->parameter_dtype = t->gradient_dtype = dtype;
  t->master_weights = master_weights;
  return check_tensor(*t, 0, 0);
}

Status merge_weights(DType dtype, MasterWeights master_weights, const void* parameter, const void* correction,
                     float* weights, int64_t count) {
  ParameterTensors t;
  Status status = weights_tensor(dtype, master_weights, parameter, correction, count, &t);
  const KernelTable* kernels = status.is_ok() ? cpu::select_kernels(&status) : nullptr;
  if (!status.is_ok()) return status;
  const cpu::Stage load = kernels->load_weights[static_cast<int>(dtype)][static_cast<int>(master_weights)];
  for_each_block(
      t, {false, false, false}, [&](Block& b, const BlockWalker&) { load(b); },
      [&](Block& b, const BlockWalker& walker) { scatter(walker, b.weight, weights); });
  return status;
}

Status split_weights(DType dtype, MasterWeights master_weights, const float* weights, void* parameter, void* correction,
                     int64_t count) {
  ParameterTensors t;
  Status status = weights_tensor(dtype, master_weights, parameter, correction, count, &t);
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
}

Status check_states_tensor(OptimizerKind optimizer, bool has_momentum, ParameterTensors* t) {
  // Parameter and correction are not touched: allow them to be absent.
  static char untouched;
  t->parameter = &untouched;
  t->correction = nullptr;
  t->parameter_dtype = t->gradient_dtype = DType::kFloat32;
  t->master_weights = MasterWeights::kNone;
  const Status status = check_tensor(*t, 0, state_count(optimizer, has_momentum));
  t->parameter = nullptr;
  return status;
}

Status decode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor, float* const* values) {
  ParameterTensors t = tensor;
  Status status = check_states_tensor(optimizer, has_momentum, &t);
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
}

Status encode_states(OptimizerKind optimizer, bool has_momentum, const ParameterTensors& tensor,
                     const float* const* values) {
  ParameterTensors t = tensor;
  Status status = check_states_tensor(optimizer, has_momentum, &t);
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
}

}  // namespace flashoptim
