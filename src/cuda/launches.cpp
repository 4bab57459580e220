// cuda::Plan's launches: what they bring to the device first, what they read, and their order.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "flashoptim/core/optimizers/rule.h"
#include "src/checks.h"
#include "src/cuda/plan_impl.h"
#include "src/rules.h"

namespace flashoptim::cuda {
namespace {

/// Some of them are only known to the device.
bool has_device_controls(const StepOptions& options) {
  return options.gradient_divisor != nullptr || options.clip_coefficient != nullptr || options.found_inf != nullptr;
}
bool has_device_numbers(const StepOptions& options, int64_t hyper) {
  return (options.lr != nullptr && options.lr[hyper] != nullptr) ||
         (options.step != nullptr && options.step[hyper] != nullptr);
}

}  // namespace

// ---- the tables -----------------------------------------------------------------------------------------------------

template <int capacity>
Status Plan::Impl::upload_gradients(void* stream) const {
  Status status;
  GradientArguments<capacity> args;
  for (int64_t begin = dirty_begin; status.is_ok() && begin < dirty_end; begin += capacity) {
    args.tensors = tables.entries + begin;
    args.count = static_cast<int32_t>(std::min<int64_t>(capacity, dirty_end - begin));
    std::copy_n(gradients.data() + begin, args.count, args.gradients);
    status = launched(launch_gradients(args, stream), "launching the plan's update");
  }
  return status;
}

template <int capacity, class Next>
Status Plan::Impl::upload_entries(TensorEntry* to, void* stream, Next next) const {
  EntryArguments<capacity> args;
  args.tensors = to;
  args.count = 0;
  Status status;
  int64_t index = 0;
  for (bool more = next(&index); status.is_ok() && more;) {
    args.indices[args.count] = static_cast<int32_t>(index);
    args.entries[args.count] = tables.entry(tensors, index);
    ++args.count;
    more = next(&index);
    if (more && args.count < capacity) continue;
    status = launched(launch_entries(args, stream), "launching the plan's update");
    args.count = 0;
  }
  return status;
}

template <class Next>
Status Plan::Impl::upload_entries(TensorEntry* to, void* stream, Next next) const {
  // The first look decides: a launch copies all of its arguments, used or not.
  Next counted = next;
  int64_t index = 0, count = 0;
  while (count <= kEntriesPerLaunch && counted(&index)) ++count;
  return count > kEntriesPerLaunch && tables.takes_large_arguments
             ? upload_entries<kLargeEntriesPerLaunch>(to, stream, next)
             : upload_entries<kEntriesPerLaunch>(to, stream, next);
}

Status Plan::Impl::upload(LaunchTarget target, void* stream, const TensorEntry** entries) {
  if (target == LaunchTarget::kGraph) {
    *entries = tables.graph_entries;
    return upload_entries(tables.graph_entries, stream, [next = int64_t{0}, end = tensors.size()](int64_t* i) mutable {
      *i = next++;
      return *i < end;
    });
  }
  *entries = tables.entries;
  if (dirty_begin == dirty_end) return Status::ok();
  Status status;
  if (!only_gradients) {
    status = upload_entries(tables.entries, stream, [this, next = dirty_begin](int64_t* i) mutable {
      while (next < dirty_end && changes[static_cast<size_t>(next)] == Change::kNone) ++next;
      *i = next++;
      return *i < dirty_end;
    });
  } else if (dirty_end - dirty_begin > kGradientsPerLaunch && tables.takes_large_arguments) {
    status = upload_gradients<kLargeGradientsPerLaunch>(stream);
  } else {
    status = upload_gradients<kGradientsPerLaunch>(stream);
  }
  if (!status.is_ok()) return status;
  std::fill(changes.begin() + dirty_begin, changes.begin() + dirty_end, Change::kNone);
  dirty_begin = dirty_end = 0;
  only_gradients = true;
  return status;
}

Status Plan::Impl::upload_some(LaunchTarget target, void* stream, const TensorEntry** entries) {
  const bool all = target == LaunchTarget::kGraph;
  TensorEntry* const to = all ? tables.graph_entries : tables.entries;
  *entries = to;
  const Status status = upload_entries(to, stream, [this, all, next = size_t{0}](int64_t* i) mutable {
    while (next < some.size() && !all && changes[static_cast<size_t>(some[next])] == Change::kNone) ++next;
    if (next == some.size()) return false;
    *i = some[next++];
    return true;
  });
  if (!status.is_ok() || all) return status;
  // The range stays: it may now hold some that have not changed.
  for (const int64_t i : some) changes[static_cast<size_t>(i)] = Change::kNone;
  return status;
}

// ---- hyperparameters ------------------------------------------------------------------------------------------------

Status Plan::Impl::check_set(const Hyperparameters* given, int64_t index, const StepOptions& options) const {
  Hyperparameters hyper = given[index];
  // The device's own numbers stand for these.
  if (options.lr != nullptr && options.lr[index] != nullptr) hyper.lr = 0.0;
  if (options.step != nullptr && options.step[index] != nullptr) hyper.step = 1;
  return check_hyperparameter_set(optimizer, hyper, index);
}

Status Plan::Impl::check(const Hyperparameters* given, int64_t count, const StepOptions& options, int32_t* used) const {
  *used = used_hypers;
  if (*used < 0) {
    *used = 0;
    for (int64_t i = 0; i < tensors.size(); ++i) {
      if (tensors.tensor(i).gradient != nullptr) *used = std::max(*used, tensors.tensor(i).hyper_index + 1);
    }
  }
  Status status = check_hyper_count(given, count, *used);
  if (status.is_ok()) status = check_gradient_scale(options.gradient_scale);
  for (int32_t i = 0; status.is_ok() && i < *used; ++i) status = check_set(given, i, options);
  return status;
}

Status Plan::Impl::check_some(const int64_t* indices, int64_t count, const Hyperparameters* given, int64_t hyper_count,
                              const StepOptions& options) {
  Status status = check_selection(indices, count, tensors.size());
  if (status.is_ok()) status = check_hyper_count(given, hyper_count, 0);
  if (status.is_ok()) status = check_gradient_scale(options.gradient_scale);
  if (!status.is_ok()) return status;
  ++calls;
  some.clear();
  for (int64_t i = 0; i < count; ++i) {
    status = check_named(indices, i, tensors.size(), calls, named_in.data());
    if (!status.is_ok()) return status;
    const ParameterTensors& t = tensors.tensor(indices[i]);
    if (t.gradient == nullptr) continue;
    uint64_t& last_use = used_in[static_cast<size_t>(t.hyper_index)];
    if (last_use != calls) {
      status = check_hyper_count(given, hyper_count, t.hyper_index + 1);
      if (status.is_ok()) status = check_set(given, t.hyper_index, options);
      if (!status.is_ok()) return status;
      last_use = calls;
    }
    if (work_of(indices[i]).chunks > 0) some.push_back(indices[i]);  // room for every tensor is reserved
  }
  return status;
}

PreparedHyper Plan::Impl::prepared(const Hyperparameters& given, const StepOptions& options) const {
  PreparedHyper out;
  make_hyper(rule, given, &out.rule);
  out.dither = core::make_dither_key(given.seed, static_cast<uint64_t>(given.step));
  out.gradient_scale = core::directed_factor(options.gradient_scale, given);
  out.skip = 0;
  return out;
}

Status Plan::Impl::prepare_on_device(const Hyperparameters* given, int64_t begin, int64_t end,
                                     const StepOptions& options, int64_t at, float* updates) const {
  PrepareArguments args;
  args.rule = rule;
  args.gradient_scale = options.gradient_scale;
  args.gradient_divisor = options.gradient_divisor;
  args.clip_coefficient = options.clip_coefficient;
  args.found_inf = options.found_inf;
  for (; begin < end; begin += kHypersPerLaunch, at += kHypersPerLaunch) {
    args.count = static_cast<int32_t>(std::min<int64_t>(kHypersPerLaunch, end - begin));
    args.out = tables.hypers + at;
    args.largest_updates = updates == nullptr ? nullptr : updates + at;
    for (int32_t i = 0; i < args.count; ++i) {
      args.hypers[i] = given[begin + i];
      args.lr[i] = options.lr == nullptr ? nullptr : options.lr[begin + i];
      args.step[i] = options.step == nullptr ? nullptr : options.step[begin + i];
    }
    const Status status = launched(launch_prepare(args, options.stream), "launching the step's preparation");
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

// ---- launches -------------------------------------------------------------------------------------------------------

StepArguments Plan::Impl::step_arguments(const TensorEntry* entries, bool on_device, const StepOptions& options) const {
  StepArguments args;
  args.tensors = entries;
  args.work = tables.work;
  args.hypers = on_device ? tables.hypers : nullptr;
  args.nonfinite = reinterpret_cast<unsigned long long*>(options.nonfinite_gradients);
  args.multiprocessors = static_cast<uint32_t>(tables.multiprocessors);
  return args;
}

// Several launches change all of their tensors or none, but for a device that fails in between: their kernels have been
// loaded by make(), grids and arguments are within every device's limits by construction, an error of an earlier call
// has been taken out in front (PlanMemory::before_launches), and a launch needs no memory of its own. What remains (a
// kernel that runs into an error while others wait, a device that is lost) ends the CUDA context and with it every
// tensor in it; and a stream's capture that is invalidated in between runs nothing at all.
Status Plan::Impl::launch(const Launch& what, StepArguments* args, void* stream) const {
  for (int64_t done = 0; done < what.chunks; done += kLargestLaunch) {
    const int64_t chunks = std::min(kLargestLaunch, what.chunks - done);
    const int64_t tiles = what.tiles - done * kWarpTilesPerChunk;
    args->chunks = tables.chunks + what.first_chunk + done;
    args->chunk_count = static_cast<uint32_t>(chunks);
    args->tile_count = static_cast<uint32_t>(std::min(tiles, chunks * kWarpTilesPerChunk));
    const Status status = launched(what.function(*args, stream), "launching the step");
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status Plan::Impl::step(const Hyperparameters* given, int32_t used, const StepOptions& options) {
  const auto stream = static_cast<cudaStream_t>(options.stream);
  LaunchTarget target;
  const TensorEntry* entries = nullptr;
  Status status = tables.memory->before_launches(stream, &target);
  if (status.is_ok()) status = upload(target, options.stream, &entries);
  if (!status.is_ok()) return status;
  bool on_device = used > kInlineHypers || has_device_controls(options);
  for (int32_t i = 0; i < used; ++i) on_device = on_device || has_device_numbers(options, i);
  StepArguments args = step_arguments(entries, on_device, options);
  if (on_device) {
    status = prepare_on_device(given, 0, used, options, 0, nullptr);
  } else {
    for (int32_t i = 0; i < used; ++i) args.inline_hypers[i] = prepared(given[i], options);
  }
  for (const Launch& what : tables.launches) {
    if (!status.is_ok()) return status;
    status = launch(what, &args, options.stream);
  }
  tables.memory->after_launches(stream, target);
  return status;
}

/// Everything about each tensor travels in its launch: nothing is brought to the tables.
Status Plan::Impl::step_singles(const Hyperparameters* given, const StepOptions& options) {
  int32_t ready = -1;  // which set is in the first place
  StepArguments args{};
  for (const int64_t index : some) {
    const ParameterTensors& t = tensors.tensor(index);
    if (t.hyper_index != ready) {
      ready = t.hyper_index;
      const bool on_device = has_device_controls(options) || has_device_numbers(options, ready);
      args = step_arguments(nullptr, on_device, options);
      if (on_device) {
        const Status status = prepare_on_device(given, ready, ready + 1, options, 0, nullptr);
        if (!status.is_ok()) return status;
      } else {
        args.inline_hypers[0] = prepared(given[ready], options);
      }
    }
    args.inline_tensor = tables.entry(tensors, index);
    args.inline_tensor.hyper_index = 0;
    const TensorWork& work = work_of(index);
    const Status status = launch({work.function, work.first_chunk, work.chunks, work.tiles}, &args, options.stream);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status Plan::Impl::step_runs(const Hyperparameters* given, const StepOptions& options, LaunchTarget target) {
  const TensorEntry* entries = nullptr;
  Status status = upload_some(target, options.stream, &entries);
  if (!status.is_ok()) return status;
  int32_t first_set = kMaxHyperparameterSets, last_set = 0;
  bool on_device = has_device_controls(options);
  for (const int64_t index : some) {
    const int32_t set = tensors.tensor(index).hyper_index;
    first_set = std::min(first_set, set);
    last_set = std::max(last_set, set);
    on_device = on_device || has_device_numbers(options, set);
  }
  on_device = on_device || last_set >= kInlineHypers;
  StepArguments args = step_arguments(entries, on_device, options);
  if (on_device) {
    status = prepare_on_device(given, first_set, last_set + 1, options, first_set, nullptr);
    if (!status.is_ok()) return status;
  } else {
    for (int32_t set = first_set; set <= last_set; ++set) {
      if (used_in[static_cast<size_t>(set)] == calls) args.inline_hypers[set] = prepared(given[set], options);
    }
  }
  for (size_t begin = 0; status.is_ok() && begin < some.size();) {
    const TensorWork& first = work_of(some[begin]);
    size_t end = begin + 1;
    while (end < some.size() && continues(end)) ++end;
    const TensorWork& last = work_of(some[end - 1]);
    const int64_t before_last = last.first_chunk - first.first_chunk;
    status = launch(
        {first.function, first.first_chunk, before_last + last.chunks, before_last * kWarpTilesPerChunk + last.tiles},
        &args, options.stream);
    begin = end;
  }
  return status;
}

Status Plan::Impl::step_some(const Hyperparameters* given, const StepOptions& options) {
  const auto stream = static_cast<cudaStream_t>(options.stream);
  LaunchTarget target;
  Status status = tables.memory->before_launches(stream, &target);
  if (!status.is_ok()) return status;
  std::sort(some.begin(), some.end(),
            [this](int64_t a, int64_t b) { return work_of(a).first_chunk < work_of(b).first_chunk; });
  bool has_neighbours = false;
  for (size_t i = 1; i < some.size(); ++i) has_neighbours = has_neighbours || continues(i);
  status = has_neighbours ? step_runs(given, options, target) : step_singles(given, options);
  tables.memory->after_launches(stream, target);
  return status;
}

}  // namespace flashoptim::cuda
