#include "src/cuda/tables.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "flashoptim/core/optimizer_list.h"
#include "src/cuda/device.h"
#include "src/place.h"

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

/// Of chunks of which all but the last are full.
int64_t tiles_of(int64_t chunks, int64_t last_groups) {
  return (chunks - 1) * kWarpTilesPerChunk + (last_groups + kWarpGroups - 1) / kWarpGroups;
}

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

template <class T>
void put(const std::vector<T>& from, int64_t at, std::vector<unsigned char>* image) {
  if (!from.empty()) std::memcpy(image->data() + at, from.data(), from.size() * sizeof(T));
}

}  // namespace

Status PlanTables::make(const flashoptim::Plan& tensors, RuleKind rule, int states, int32_t hyper_capacity,
                        int32_t device, const MakeOptions& options) {
  const int64_t count = tensors.size();
  std::vector<TensorEntry> entry_table;
  std::vector<TensorGroups> groups;
  std::vector<core::PlacedGroups> pieces_table;
  std::vector<Chunk> chunk_table, inspect_table, norm_table;
  // Before tables are made of it: one that does not fit the device's counters would not fit the host's memory.
  int64_t all_groups = 0;
  for (int64_t i = 0; i < count; ++i) {
    groups.push_back(tensor_groups(tensors.tensor(i)));
    if (groups.back().count > (int64_t{1} << 42) - all_groups)
      return Status::unsupported("the plan has more than 2^42 groups of 32 elements");
    all_groups += groups.back().count;
    if (groups.back().in_pieces) pieces_table.push_back(groups.back().pieces);
  }
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t of_tensor = groups[static_cast<size_t>(i)].count, numel = tensors.tensor(i).layout.numel();
    tiles += (of_tensor + kTileGroups - 1) / kTileGroups;
    add_chunks(static_cast<int32_t>(i), of_tensor, kInspectChunkGroups, &inspect_table);
    add_chunks(static_cast<int32_t>(i), (numel + kGroupSize - 1) / kGroupSize, kNormChunkGroups, &norm_table);
  }
  const int64_t chunk_groups = tiles <= kFewTiles ? kTileGroups : kTileGroups * kTilesPerChunk;
  // One launch per kernel.
  const StepLaunches& functions = step_launches(rule);
  works.resize(static_cast<size_t>(count));
  for (int kernel = 0; kernel < kStepKernels; ++kernel) {
    const bool hot = kernel < kHotKernels;
    const int64_t per_chunk = hot ? int64_t{kHotChunkGroups} : chunk_groups;
    const auto first = static_cast<int64_t>(chunk_table.size());
    int64_t last_groups = 0;
    for (int64_t i = 0; i < count; ++i) {
      const TensorGroups& of_tensor = groups[static_cast<size_t>(i)];
      if (step_kernel_of(tensors.tensor(i), states, of_tensor) != kernel) continue;
      const auto begin = static_cast<int64_t>(chunk_table.size());
      add_chunks(static_cast<int32_t>(i), of_tensor.count, per_chunk, &chunk_table);
      const auto chunks_of = static_cast<int64_t>(chunk_table.size()) - begin;
      if (chunks_of == 0) continue;
      last_groups = chunk_table.back().groups;
      works[static_cast<size_t>(i)] = {begin, chunks_of, tiles_of(chunks_of, last_groups), functions.kernel[kernel]};
    }
    const auto end = static_cast<int64_t>(chunk_table.size());
    if (hot) make_hot(chunk_table.data() + first, chunk_table.data() + end);
    for (int64_t begin = first; begin < end; begin += kLargestLaunch) {
      const int64_t size = std::min(kLargestLaunch, end - begin);
      const int64_t last = begin + size == end ? last_groups : per_chunk;
      launches.push_back({functions.kernel[kernel], begin, size, tiles_of(size, last)});
    }
  }
  norm_chunk_count = static_cast<int64_t>(norm_table.size());
  inspect_chunk_count = static_cast<int64_t>(inspect_table.size());
  if (std::max(norm_chunk_count, inspect_chunk_count) > std::numeric_limits<int32_t>::max())
    return Status::unsupported("the plan has more chunks of 2048 groups than 2^31 - 1");

  Arena arena;
  const int64_t entries_at = arena.add<TensorEntry>(count);
  const int64_t chunks_at = arena.add<Chunk>(static_cast<int64_t>(chunk_table.size()));
  const int64_t inspect_chunks_at = arena.add<Chunk>(inspect_chunk_count);
  const int64_t norm_chunks_at = arena.add<Chunk>(norm_chunk_count);
  const int64_t pieces_at = arena.add<core::PlacedGroups>(static_cast<int64_t>(pieces_table.size()));
  const int64_t uploaded = arena.size();
  const int64_t graph_entries_at = arena.add<TensorEntry>(count);
  const int64_t hypers_at = arena.add<PreparedHyper>(std::max(hyper_capacity, 1));
  const int64_t largest_updates_at = arena.add<float>(std::max(hyper_capacity, 1));
  const int64_t partial_at = arena.add<double>(norm_chunk_count);
  const int64_t zeroed = arena.size();
  const int64_t finished_at = arena.add<unsigned int>(1);
  const int64_t work_at = arena.add<WorkCounter>(1);

  std::vector<unsigned char> image(static_cast<size_t>(uploaded));
  put(chunk_table, chunks_at, &image);
  put(inspect_table, inspect_chunks_at, &image);
  put(norm_table, norm_chunks_at, &image);
  put(pieces_table, pieces_at, &image);

  Status status = device_status(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                                "cudaDeviceGetAttribute");
  int driver = 0;
  if (status.is_ok()) status = device_status(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  takes_large_arguments = driver >= kLargeArgumentsDriver;
  for (size_t i = 0; status.is_ok() && i < launches.size(); ++i) {
    const StepArguments load_only{};
    status = device_status(static_cast<cudaError_t>(launches[i].function(load_only, options.stream)),
                           "loading the step's kernels");
  }
  if (status.is_ok()) status = PlanMemory::allocate(device, arena.size(), options, &memory);
  if (!status.is_ok()) return status;
  unsigned char* const data = memory->data();
  entries = reinterpret_cast<TensorEntry*>(data + entries_at);
  graph_entries = reinterpret_cast<TensorEntry*>(data + graph_entries_at);
  chunks = reinterpret_cast<Chunk*>(data + chunks_at);
  inspect_chunks = reinterpret_cast<Chunk*>(data + inspect_chunks_at);
  norm_chunks = reinterpret_cast<Chunk*>(data + norm_chunks_at);
  hypers = reinterpret_cast<PreparedHyper*>(data + hypers_at);
  largest_updates = reinterpret_cast<float*>(data + largest_updates_at);
  partial = reinterpret_cast<double*>(data + partial_at);
  finished = reinterpret_cast<unsigned int*>(data + finished_at);
  work = reinterpret_cast<WorkCounter*>(data + work_at);
  const auto* pieces = reinterpret_cast<const core::PlacedGroups*>(data + pieces_at);
  for (int64_t i = 0; i < count; ++i) {
    const TensorGroups& of_tensor = groups[static_cast<size_t>(i)];
    places.push_back({of_tensor.first_group, of_tensor.in_pieces ? pieces++ : nullptr});
    entry_table.push_back(entry(tensors, i));
  }
  put(entry_table, entries_at, &image);
  const auto stream = static_cast<cudaStream_t>(options.stream);
  if (!image.empty()) {
    status = device_status(cudaMemcpyAsync(data, image.data(), image.size(), cudaMemcpyHostToDevice, stream),
                           "uploading the plan");
  }
  if (status.is_ok()) {
    status = device_status(cudaMemsetAsync(data + zeroed, 0, static_cast<size_t>(arena.size() - zeroed), stream),
                           "uploading the plan");
  }
  // Steps on any stream must see it, and `image` goes.
  const Status done = device_status(cudaStreamSynchronize(stream), "uploading the plan");
  return status.is_ok() ? done : status;
}

TensorEntry PlanTables::entry(const flashoptim::Plan& tensors, int64_t index) const {
  TensorEntry out = make_entry(tensors.tensor(index));
  const EntryPlace& place = places[static_cast<size_t>(index)];
  out.first_group = place.first_group;
  out.pieces = place.pieces;
  if (place.pieces != nullptr) out.flags |= kInPieces;
  return out;
}

}  // namespace flashoptim::cuda
