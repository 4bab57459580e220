#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "flashoptim/core/optimizer_list.h"
#include "flashoptim/cuda.h"
#include "src/blocks.h"
#include "src/cuda/arguments.h"
#include "src/cuda/device.h"
#include "src/inspect.h"
#include "src/rules.h"

namespace flashoptim::cuda {

#define FLASHOPTIM_DECLARE(name) StepLaunches step_launches_##name();
FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_DECLARE)
#undef FLASHOPTIM_DECLARE

const StepLaunches& step_launches(RuleKind rule) {
  static const StepLaunches kTable[cpu::kRuleKinds] = {
#define FLASHOPTIM_ENTRY(name) step_launches_##name(),
      FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_ENTRY)
#undef FLASHOPTIM_ENTRY
  };
  return kTable[static_cast<int>(rule)];
}

namespace {

/// Cuts [0, groups) of a tensor into chunks.
void add_chunks(int32_t tensor, int64_t groups, int64_t groups_per_chunk, std::vector<Chunk>* chunks) {
  for (int64_t first = 0; first < groups; first += groups_per_chunk) {
    chunks->push_back({first, tensor, static_cast<int32_t>(std::min(groups_per_chunk, groups - first))});
  }
}

/// Chunks in the hot kernels' form; a chunk lies in one segment, whose size is a multiple of a chunk's.
void make_hot(Chunk* begin, Chunk* end) {
  static_assert((int64_t{1} << kSegmentBits) % kHotChunkGroups == 0);
  for (Chunk* chunk = begin; chunk != end; ++chunk) {
    constexpr int64_t kMask = (int64_t{1} << kSegmentBits) - 1;
    const HotChunk hot{static_cast<uint32_t>(chunk->first_group & kMask), chunk->groups, chunk->tensor,
                       static_cast<uint32_t>(chunk->first_group >> kSegmentBits)};
    std::memcpy(static_cast<void*>(chunk), &hot, sizeof hot);
  }
}

}  // namespace

struct Plan::Impl {
  /// One launch of step(): a kernel's chunks.
  struct Launch {
    StepLaunch function;
    int64_t first_chunk;
    int64_t chunks;
    int64_t work_counter;
  };

  flashoptim::Plan tensors;  // checks and keeps the host's copy
  OptimizerKind optimizer;
  RuleKind rule;
  int32_t device = 0;
  int multiprocessors = 0;
  bool takes_large_arguments = false;
  int states = 0;
  int32_t hyper_capacity = 0;
  std::vector<Launch> launches;

  unsigned char* memory = nullptr;  // one allocation for all of the following
  TensorEntry* entries = nullptr;
  Chunk* chunks = nullptr;
  PreparedHyper* hypers = nullptr;
  float* largest_updates = nullptr;
  Chunk* inspect_chunks = nullptr;
  int64_t inspect_chunk_count = 0;
  Chunk* norm_chunks = nullptr;
  int64_t norm_chunk_count = 0;
  double* partial = nullptr;
  unsigned int* finished = nullptr;
  WorkCounter* work = nullptr;

  // What steps look at again and again, side by side: `tensors` has a few cache lines for each.
  std::vector<const void*> gradients;
  int32_t used_hypers = -1;  // sets 0 ... used_hypers - 1 are used by a tensor with a gradient; -1: to be counted

  // Entries [dirty_begin, dirty_end) differ from the device's: in their gradients, and if dirty_indices in more than
  // that.
  int64_t dirty_begin = 0, dirty_end = 0;
  bool dirty_indices = false;
  // Once captured, a replay may have put older gradients into the table at any time.
  bool captured = false;

  ~Impl() {
    if (memory == nullptr) return;
    DeviceGuard guard(device);
    cudaFree(memory);
  }

  void mark_dirty(int64_t begin, int64_t end) {
    dirty_begin = dirty_begin == dirty_end ? begin : std::min(dirty_begin, begin);
    dirty_end = std::max(dirty_end, end);
  }

  Status set_gradient(int64_t index, const void* gradient) {
    if (index >= 0 && index < tensors.size() && gradients[static_cast<size_t>(index)] == gradient) return Status::ok();
    Status status = tensors.set_gradient(index, gradient);
    if (!status.is_ok()) return status;
    const void*& kept = gradients[static_cast<size_t>(index)];
    if ((kept == nullptr) != (gradient == nullptr)) used_hypers = -1;
    kept = gradient;
    mark_dirty(index, index + 1);
    return status;
  }

  Status upload();
  Status upload_changes(void* stream);
  Status upload_entries(void* stream) const;
  template <int capacity>
  Status upload_gradients(void* stream) const;
  Status prepare_inline(const Hyperparameters* given, int32_t used, const StepOptions& options,
                        StepArguments* args) const;
  Status prepare_on_device(const Hyperparameters* given, int32_t used, const StepOptions& options,
                           float* updates) const;

  /// What a step reads of its arguments, after checking them.
  struct Use {
    int32_t hypers = 0;      ///< sets 0 ... hypers - 1; none: no tensor has a gradient
    bool on_device = false;  ///< some of their numbers are only known there
  };
  Status check(const Hyperparameters* given, int64_t count, const StepOptions& options, Use* use);
};

namespace {

/// Places arrays one behind the other in a single allocation.
class Arena {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t offset = size_;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return offset;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

}  // namespace

Status Plan::Impl::upload() {
  const int64_t count = tensors.size();
  std::vector<TensorEntry> entry_table;
  std::vector<Chunk> chunk_table, inspect_table, norm_table;
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    entry_table.push_back(make_entry(tensors.tensor(i)));
    tiles += (tensors.tensor(i).layout.groups() + kTileGroups - 1) / kTileGroups;
    add_chunks(static_cast<int32_t>(i), tensors.tensor(i).layout.groups(), kInspectChunkGroups, &inspect_table);
    add_chunks(static_cast<int32_t>(i), (entry_table.back().numel + kGroupSize - 1) / kGroupSize, kNormChunkGroups,
               &norm_table);
  }
  const int64_t chunk_groups = tiles <= kFewTiles ? kTileGroups : kTileGroups * kTilesPerChunk;
  // One launch per kernel.
  const StepLaunches& functions = step_launches(rule);
  // Blocks of a grid, and shares of a hot launch, are counted in 32 bits.
  constexpr int64_t kLargestLaunch = int64_t{1} << 26;
  for (int kernel = 0; kernel < kStepKernels; ++kernel) {
    const bool hot = kernel < kHotKernels;
    const int64_t first = static_cast<int64_t>(chunk_table.size());
    for (int64_t i = 0; i < count; ++i) {
      if (step_kernel_of(tensors.tensor(i), states) != kernel) continue;
      add_chunks(static_cast<int32_t>(i), tensors.tensor(i).layout.groups(),
                 hot ? int64_t{kHotChunkGroups} : chunk_groups, &chunk_table);
    }
    const int64_t end = static_cast<int64_t>(chunk_table.size());
    if (hot) make_hot(chunk_table.data() + first, chunk_table.data() + end);
    for (int64_t begin = first; begin < end; begin += kLargestLaunch) {
      launches.push_back({functions.kernel[kernel], begin, std::min(kLargestLaunch, end - begin),
                          static_cast<int64_t>(launches.size())});
    }
  }
  norm_chunk_count = static_cast<int64_t>(norm_table.size());
  inspect_chunk_count = static_cast<int64_t>(inspect_table.size());
  if (std::max(norm_chunk_count, inspect_chunk_count) > std::numeric_limits<int32_t>::max())
    return Status::unsupported("the plan has more than 2^47 elements");

  Arena arena;
  const int64_t entries_at = arena.add<TensorEntry>(count);
  const int64_t chunks_at = arena.add<Chunk>(static_cast<int64_t>(chunk_table.size()));
  const int64_t inspect_chunks_at = arena.add<Chunk>(inspect_chunk_count);
  const int64_t norm_chunks_at = arena.add<Chunk>(norm_chunk_count);
  const int64_t uploaded = arena.size();
  const int64_t hypers_at = arena.add<PreparedHyper>(hyper_capacity);
  const int64_t largest_updates_at = arena.add<float>(hyper_capacity);
  const int64_t partial_at = arena.add<double>(norm_chunk_count);
  const int64_t zeroed = arena.size();
  const int64_t finished_at = arena.add<unsigned int>(1);
  const int64_t work_at = arena.add<WorkCounter>(static_cast<int64_t>(launches.size()));

  std::vector<unsigned char> image(static_cast<size_t>(uploaded));
  std::copy_n(reinterpret_cast<const unsigned char*>(entry_table.data()), entry_table.size() * sizeof(TensorEntry),
              image.data() + entries_at);
  std::copy_n(reinterpret_cast<const unsigned char*>(chunk_table.data()), chunk_table.size() * sizeof(Chunk),
              image.data() + chunks_at);
  std::copy_n(reinterpret_cast<const unsigned char*>(inspect_table.data()), inspect_table.size() * sizeof(Chunk),
              image.data() + inspect_chunks_at);
  std::copy_n(reinterpret_cast<const unsigned char*>(norm_table.data()), norm_table.size() * sizeof(Chunk),
              image.data() + norm_chunks_at);

  DeviceGuard guard(device);
  Status status = device_status(guard.error(), "cannot use the device of the plan");
  if (status.is_ok()) {
    status = device_status(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                           "cudaDeviceGetAttribute");
  }
  int driver = 0;
  if (status.is_ok()) status = device_status(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  takes_large_arguments = driver >= kLargeArgumentsDriver;
  if (status.is_ok())
    status = device_status(cudaMalloc(reinterpret_cast<void**>(&memory), static_cast<size_t>(arena.size())),
                           "cudaMalloc for the plan");
  if (!status.is_ok()) return status;
  entries = reinterpret_cast<TensorEntry*>(memory + entries_at);
  chunks = reinterpret_cast<Chunk*>(memory + chunks_at);
  inspect_chunks = reinterpret_cast<Chunk*>(memory + inspect_chunks_at);
  norm_chunks = reinterpret_cast<Chunk*>(memory + norm_chunks_at);
  hypers = reinterpret_cast<PreparedHyper*>(memory + hypers_at);
  largest_updates = reinterpret_cast<float*>(memory + largest_updates_at);
  partial = reinterpret_cast<double*>(memory + partial_at);
  finished = reinterpret_cast<unsigned int*>(memory + finished_at);
  work = reinterpret_cast<WorkCounter*>(memory + work_at);
  status = device_status(cudaMemcpy(memory, image.data(), image.size(), cudaMemcpyHostToDevice), "uploading the plan");
  if (status.is_ok())
    status =
        device_status(cudaMemset(memory + zeroed, 0, static_cast<size_t>(arena.size() - zeroed)), "uploading the plan");
  // The legacy stream's work above must be seen by every later one.
  if (status.is_ok()) status = device_status(cudaStreamSynchronize(nullptr), "uploading the plan");
  return status;
}

Status Plan::Impl::upload_changes(void* stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  Status status =
      device_status(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture), "cudaStreamIsCapturing");
  if (!status.is_ok()) return status;
  captured = captured || capture != cudaStreamCaptureStatusNone;
  if (captured) mark_dirty(0, tensors.size());
  if (dirty_begin == dirty_end) return status;
  const int64_t count = dirty_end - dirty_begin;
  if (captured || dirty_indices) {
    status = upload_entries(stream);
  } else if (count > kGradientsPerLaunch && takes_large_arguments) {
    status = upload_gradients<kLargeGradientsPerLaunch>(stream);
  } else {
    status = upload_gradients<kGradientsPerLaunch>(stream);
  }
  if (!status.is_ok()) return status;
  dirty_begin = dirty_end = 0;
  dirty_indices = false;
  return status;
}

Status Plan::Impl::upload_entries(void* stream) const {
  Status status;
  UpdateArguments args;
  for (int64_t begin = dirty_begin; status.is_ok() && begin < dirty_end; begin += kUpdatesPerLaunch) {
    args.tensors = entries + begin;
    args.count = static_cast<int32_t>(std::min<int64_t>(kUpdatesPerLaunch, dirty_end - begin));
    for (int32_t i = 0; i < args.count; ++i) {
      const ParameterTensors& t = tensors.tensor(begin + i);
      args.updates[i] = {t.gradient, t.hyper_index};
    }
    status = device_status(static_cast<cudaError_t>(launch_update(args, stream)), "launching the plan's update");
  }
  return status;
}

template <int capacity>
Status Plan::Impl::upload_gradients(void* stream) const {
  Status status;
  GradientArguments<capacity> args;
  for (int64_t begin = dirty_begin; status.is_ok() && begin < dirty_end; begin += capacity) {
    args.tensors = entries + begin;
    args.count = static_cast<int32_t>(std::min<int64_t>(capacity, dirty_end - begin));
    std::copy_n(gradients.data() + begin, args.count, args.gradients);
    status = device_status(static_cast<cudaError_t>(launch_gradients(args, stream)), "launching the plan's update");
  }
  return status;
}

Status Plan::Impl::prepare_inline(const Hyperparameters* given, int32_t used, const StepOptions& options,
                                  StepArguments* args) const {
  for (int32_t i = 0; i < used; ++i) {
    PreparedHyper& prepared = args->inline_hypers[i];
    make_hyper(rule, given[i], &prepared.rule);
    prepared.dither = core::make_dither_key(given[i].seed, static_cast<uint64_t>(given[i].step));
    prepared.gradient_scale = core::directed_factor(options.gradient_scale, given[i]);
    prepared.skip = 0;
  }
  return Status::ok();
}

Status Plan::Impl::prepare_on_device(const Hyperparameters* given, int32_t used, const StepOptions& options,
                                     float* updates) const {
  PrepareArguments args;
  args.rule = rule;
  args.gradient_scale = options.gradient_scale;
  args.gradient_divisor = options.gradient_divisor;
  args.clip_coefficient = options.clip_coefficient;
  args.found_inf = options.found_inf;
  for (int32_t begin = 0; begin < used; begin += kHypersPerLaunch) {
    args.count = std::min(kHypersPerLaunch, used - begin);
    args.out = hypers + begin;
    args.largest_updates = updates == nullptr ? nullptr : updates + begin;
    for (int32_t i = 0; i < args.count; ++i) {
      args.hypers[i] = given[begin + i];
      args.lr[i] = options.lr == nullptr ? nullptr : options.lr[begin + i];
      args.step[i] = options.step == nullptr ? nullptr : options.step[begin + i];
    }
    const Status status = device_status(static_cast<cudaError_t>(launch_prepare(args, options.stream)),
                                        "launching the step's preparation");
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Plan::Plan() = default;
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

Status Plan::make(OptimizerKind optimizer, bool has_momentum, const ParameterTensors* tensors, int64_t count,
                  int32_t device, Plan* plan) {
  auto impl = std::make_unique<Impl>();
  Status status = flashoptim::Plan::make(optimizer, has_momentum, tensors, count, &impl->tensors);
  if (!status.is_ok()) return status;
  impl->optimizer = optimizer;
  impl->rule = rule_kind(optimizer, has_momentum);
  impl->states = state_count(optimizer, has_momentum);
  impl->device = device;
  impl->hyper_capacity = static_cast<int32_t>(count);
  for (int64_t i = 0; i < count; ++i) impl->gradients.push_back(tensors[i].gradient);
  for (int64_t i = 0; i < count; ++i) {
    impl->hyper_capacity = std::max(impl->hyper_capacity, tensors[i].hyper_index + 1);
    for (int k = 0; k < kMaxSlots; ++k) {
      if (reinterpret_cast<uintptr_t>(impl->tensors.tensor(i).scales[k]) % sizeof(uint16_t) != 0) {
        return Status::invalid_argument("tensors[" + std::to_string(i) + "].scales[" + std::to_string(k) +
                                        "] is at an odd address; scales are 16-bit numbers");
      }
    }
  }
  status = impl->upload();
  if (!status.is_ok()) return status;
  plan->impl_ = std::move(impl);
  return status;
}

int64_t Plan::size() const { return impl_ == nullptr ? 0 : impl_->tensors.size(); }
const ParameterTensors& Plan::tensor(int64_t index) const { return impl_->tensors.tensor(index); }
int32_t Plan::device() const { return impl_ == nullptr ? -1 : impl_->device; }
int32_t Plan::launches() const { return impl_ == nullptr ? 0 : static_cast<int32_t>(impl_->launches.size()); }

Status Plan::set_gradient(int64_t index, const void* gradient) {
  if (impl_ == nullptr) return Status::invalid_argument("plan is empty: call Plan::make first");
  return impl_->set_gradient(index, gradient);
}

Status Plan::set_gradients(const void* const* gradients) {
  Status status;
  for (int64_t i = 0, count = size(); status.is_ok() && i < count; ++i) status = impl_->set_gradient(i, gradients[i]);
  return status;
}

Status Plan::set_hyper_index(int64_t index, int32_t hyper_index) {
  if (impl_ == nullptr) return Status::invalid_argument("plan is empty: call Plan::make first");
  if (index >= 0 && index < size() && tensor(index).hyper_index == hyper_index) return Status::ok();
  Status status = impl_->tensors.set_hyper_index(index, hyper_index);
  if (status.is_ok()) {
    impl_->mark_dirty(index, index + 1);
    impl_->dirty_indices = true;
    impl_->used_hypers = -1;
  }
  return status;
}

Status Plan::Impl::check(const Hyperparameters* given, int64_t count, const StepOptions& options, Use* use) {
  if (used_hypers < 0) {
    used_hypers = 0;
    for (int64_t i = 0; i < tensors.size(); ++i) {
      if (tensors.tensor(i).gradient != nullptr) used_hypers = std::max(used_hypers, tensors.tensor(i).hyper_index + 1);
    }
  }
  const int32_t used = used_hypers;
  if (used > count) {
    return Status::invalid_argument("hypers has " + std::to_string(count) + " entries, but a tensor's hyper_index is " +
                                    std::to_string(used - 1));
  }
  use->hypers = used;
  use->on_device = used > kInlineHypers || options.gradient_divisor != nullptr || options.clip_coefficient != nullptr ||
                   options.found_inf != nullptr;
  for (int32_t i = 0; i < used; ++i) {
    const bool device_step = options.step != nullptr && options.step[i] != nullptr;
    const bool device_lr = options.lr != nullptr && options.lr[i] != nullptr;
    use->on_device = use->on_device || device_step || device_lr;
    // What only the device knows is not checked.
    Hyperparameters known = given[i];
    if (device_step) known.step = 1;
    if (device_lr) known.lr = 0.0;
    const Status status = check_hyperparameter_set(optimizer, known, i);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status Plan::step(const Hyperparameters* hypers, int64_t count, const StepOptions& options) {
  if (impl_ == nullptr) return Status::invalid_argument("plan is empty: call Plan::make first");
  Impl::Use use;
  Status status = impl_->check(hypers, count, options, &use);
  if (!status.is_ok() || use.hypers == 0) return status;
  DeviceGuard guard(impl_->device);
  status = device_status(guard.error(), "cannot use the device of the plan");
  if (status.is_ok()) status = impl_->upload_changes(options.stream);
  StepArguments args;
  args.tensors = impl_->entries;
  args.multiprocessors = static_cast<uint32_t>(impl_->multiprocessors);
  args.hypers = use.on_device ? impl_->hypers : nullptr;
  args.nonfinite = reinterpret_cast<unsigned long long*>(options.nonfinite_gradients);
  if (status.is_ok()) {
    status = use.on_device ? impl_->prepare_on_device(hypers, use.hypers, options, nullptr)
                           : impl_->prepare_inline(hypers, use.hypers, options, &args);
  }
  for (const Impl::Launch& launch : impl_->launches) {
    if (!status.is_ok()) return status;
    args.chunks = impl_->chunks + launch.first_chunk;
    args.chunk_count = static_cast<uint32_t>(launch.chunks);
    args.work = impl_->work + launch.work_counter;
    status = device_status(static_cast<cudaError_t>(launch.function(args, options.stream)), "launching the step");
  }
  return status;
}

Status Plan::inspect(const Hyperparameters* hypers, int64_t count, const StepOptions& options,
                     const InspectOptions& inspect_options, StepTelemetry* telemetry) {
  if (impl_ == nullptr) return Status::invalid_argument("plan is empty: call Plan::make first");
  Status status = check_inspection(inspect_options, telemetry, size(), " in device memory");
  if (!status.is_ok()) return status;
  Impl::Use use;
  status = impl_->check(hypers, count, options, &use);
  if (!status.is_ok() || use.hypers == 0 || impl_->inspect_chunk_count == 0) return status;
  DeviceGuard guard(impl_->device);
  status = device_status(guard.error(), "cannot use the device of the plan");
  if (status.is_ok()) status = impl_->upload_changes(options.stream);
  if (status.is_ok()) status = impl_->prepare_on_device(hypers, use.hypers, options, impl_->largest_updates);
  if (!status.is_ok()) return status;
  InspectArguments args;
  args.tensors = impl_->entries;
  args.chunks = impl_->inspect_chunks;
  args.hypers = impl_->hypers;
  args.largest_updates = impl_->largest_updates;
  args.telemetry = telemetry;
  args.stride = inspect_options.stride;
  args.chunk_count = static_cast<uint32_t>(impl_->inspect_chunk_count);
  return device_status(static_cast<cudaError_t>(launch_inspect(impl_->rule, args, options.stream)),
                       "launching the inspection");
}

Status Plan::gradient_norm(const NormOptions& options, GradientNorm* result) {
  if (impl_ == nullptr) return Status::invalid_argument("plan is empty: call Plan::make first");
  if (result == nullptr) return Status::invalid_argument("result is null");
  DeviceGuard guard(impl_->device);
  Status status = device_status(guard.error(), "cannot use the device of the plan");
  if (status.is_ok()) status = impl_->upload_changes(options.stream);
  if (!status.is_ok()) return status;
  NormArguments args;
  args.tensors = impl_->entries;
  args.chunks = impl_->norm_chunks;
  args.chunk_count = impl_->norm_chunk_count;
  args.partial = impl_->partial;
  args.finished = impl_->finished;
  args.result = result;
  args.gradient_scale = options.gradient_scale;
  args.gradient_divisor = options.gradient_divisor;
  args.max_norm = options.max_norm;
  args.epsilon = options.epsilon;
  return device_status(static_cast<cudaError_t>(launch_norm(args, options.stream)), "launching the gradient norm");
}

Status advance_step(int64_t* counter, const float* found_inf, int32_t device, void* stream) {
  if (counter == nullptr) return Status::invalid_argument("counter is null");
  DeviceGuard guard(device);
  const Status status = device_status(guard.error(), "cannot use the device of the counter");
  if (!status.is_ok()) return status;
  return device_status(static_cast<cudaError_t>(launch_advance(counter, found_inf, stream)),
                       "launching the step counter");
}

}  // namespace flashoptim::cuda
