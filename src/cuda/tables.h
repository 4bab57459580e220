// A plan's tables on the device and what the host knows of them: the tensors, the work in chunks, and which launches do
// it.
#pragma once

#include <cstdint>
#include <vector>

#include "src/cuda/arguments.h"
#include "src/cuda/memory.h"

namespace flashoptim::cuda {

/// Blocks of a grid, and tiles of a hot launch, are counted in 32 bits.
inline constexpr int64_t kLargestLaunch = int64_t{1} << 26;

/// One launch: a kernel over a run of chunks.
struct Launch {
  StepLaunch function;
  int64_t first_chunk;
  int64_t chunks;
  int64_t tiles;  ///< of hot kernels
};

/// Where the chunks of one tensor are; they are the only ones between first_chunk and first_chunk + chunks.
struct TensorWork {
  int64_t first_chunk = 0;
  int64_t chunks = 0;
  int64_t tiles = 0;
  StepLaunch function = nullptr;
};

/// What an entry has beside ParameterTensors' fields: of TensorGroups.
struct EntryPlace {
  int64_t first_group = 0;
  const core::PlacedGroups* pieces = nullptr;  ///< on the device; null: not in pieces
};

struct PlanTables {
  int multiprocessors = 0;
  bool takes_large_arguments = false;
  std::vector<Launch> launches;
  std::vector<TensorWork> works;
  std::vector<EntryPlace> places;

  PlanMemory* memory = nullptr;  // holds all of the following
  /// Two tables of tensors: launches that run read the first; those that are captured, and so their replays, the
  /// second, which a replay writes before it reads. So neither finds what the other has left.
  TensorEntry* entries = nullptr;
  TensorEntry* graph_entries = nullptr;
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

  PlanTables() = default;
  ~PlanTables() {
    if (memory != nullptr) memory->release();
  }
  PlanTables(const PlanTables&) = delete;
  PlanTables& operator=(const PlanTables&) = delete;

  /// Lays the tables out, loads the step's kernels and uploads. `device` must be current.
  Status make(const flashoptim::Plan& tensors, RuleKind rule, int states, int32_t hyper_capacity, int32_t device,
              const MakeOptions& options);

  /// Tensor `index` as the kernels read it, once the tables are made.
  TensorEntry entry(const flashoptim::Plan& tensors, int64_t index) const;
};

}  // namespace flashoptim::cuda
