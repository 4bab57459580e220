// The numbers of the CUDA back end, each with what was measured (benchmarks/cuda, one H100 80GB HBM3).
#pragma once

namespace flashoptim::cuda {

/// A unit is what one thread updates at a time: 8 elements, so that 4 threads hold a group of 32.
inline constexpr int kUnit = 8;
inline constexpr int kThreadsPerGroup = 4;

/// Threads of a block, and blocks that must fit a multiprocessor (caps registers at 64).
#ifndef FLASHOPTIM_THREADS
#define FLASHOPTIM_THREADS 256
#define FLASHOPTIM_BLOCKS 4
#endif
inline constexpr int kThreads = FLASHOPTIM_THREADS;
inline constexpr int kBlocksPerMultiprocessor = FLASHOPTIM_BLOCKS;

/// Groups that one pass of a block covers, and passes of a block over a large tensor.
inline constexpr int kTileGroups = kThreads / kThreadsPerGroup;
inline constexpr int kTilesPerChunk = 4;
/// Models of fewer tiles than this get one tile per block: work is then cut finely enough for every multiprocessor.
inline constexpr int kFewTiles = 20000;

/// Hyperparameter sets that travel in the step kernel's own arguments; more go through device memory.
inline constexpr int kInlineHypers = 16;
/// Entries per launch of the small preparing kernels: their arguments stay within 4 KB.
inline constexpr int kHypersPerLaunch = 28;
inline constexpr int kUpdatesPerLaunch = 240;

/// Blocks of the gradient norm's reduction take this many groups each.
inline constexpr int kNormChunkGroups = 2048;

}  // namespace flashoptim::cuda
