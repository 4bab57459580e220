// The numbers of the CUDA back end, each with what was measured (benchmarks/cuda, one H100 80GB HBM3).
#pragma once

namespace flashoptim::cuda {

/// Kernels that take any configuration: a thread updates a unit of 8 elements at a time, 4 threads hold a group of 32.
inline constexpr int kUnit = 8;
inline constexpr int kThreadsPerGroup = 4;
inline constexpr int kThreads = 256;
inline constexpr int kBlocksPerMultiprocessor = 4;

/// Hot kernels: 16 elements a thread, 2 threads a group. With 8 elements what is done once per unit (addresses, hashes,
/// headers) cost 31 of then 134 instructions an element; with 16 it costs half of that, in 128 registers. 3 blocks
/// instead of 4 on a multiprocessor: the same.
inline constexpr int kHotUnit = 16;
inline constexpr int kHotThreadsPerGroup = 2;
inline constexpr int kHotThreads = 128;
inline constexpr int kHotBlocksPerMultiprocessor = 4;
/// Groups of a warp's tile, tiles of a chunk (a chunk is what the table of work has an entry for), and groups, as a
/// power of two, within which offsets have 32 bits.
inline constexpr int kWarpGroups = 32 / kHotThreadsPerGroup;
inline constexpr int kWarpTilesPerChunk = 32;
inline constexpr int kHotChunkGroups = kWarpGroups * kWarpTilesPerChunk;
inline constexpr int kSegmentBits = 25;

/// Of the tiles that a warp gets, these are its own, every n-th of all; the rest is handed out on demand, at the end.
/// Median ms at 60, 70, 75, 80 and 90 %: 268 M (248 tiles a warp) 1.177, 1.167, 1.163, 1.155, 1.162; a Llama layer
/// .958, .950, .945, .941, .945; GPT-2 (115) .554, .552, .550, .550, .575; ResNet-50 (24) the same. All fixed: 268 M +
/// 10 %, for warps end at different times; all on demand: + 7 %, for the counter is the limit. Two or four tiles at a
/// time: 1 to 3 % slower, ResNet-50 20 %.
inline constexpr unsigned int kFixedPercent = 80;

/// Groups that one pass of a block of the other kernels covers, and passes of a block over a large tensor.
inline constexpr int kTileGroups = 64;
inline constexpr int kTilesPerChunk = 4;
/// Models of fewer tiles than this get one tile per block: work is then cut finely enough for every multiprocessor.
inline constexpr int kFewTiles = 20000;

/// Hyperparameter sets that travel in the step kernel's own arguments; more go through device memory.
inline constexpr int kInlineHypers = 16;
/// Entries per launch of the small preparing kernels: their arguments stay within 4 KB.
inline constexpr int kHypersPerLaunch = 28;

/// New addresses of gradients, as after zero_grad(): of a model's 300 tensors in one launch.
inline constexpr int kGradientsPerLaunch = 500;
/// And for more of them, in 32 KB, which drivers of CUDA 12.1 (R530) and later take. A launch copies all of its
/// arguments.
inline constexpr int kLargeGradientsPerLaunch = 4000;
inline constexpr int kLargeArgumentsDriver = 12010;

/// Arrays that one launch of zero() takes, its threads a block, and blocks on a multiprocessor.
inline constexpr int kZeroArrays = 250;
inline constexpr int kZeroThreads = 256;
inline constexpr int kZeroBlocksPerMultiprocessor = 8;

/// Blocks of the gradient norm's reduction take this many groups each.
inline constexpr int kNormChunkGroups = 2048;

/// Blocks of inspect() look through this many groups each: one pass of the block at stride 32. (268 M: 3.4 steps at
/// stride 1, 0.14 at stride 64.)
inline constexpr int kInspectChunkGroups = 2048;

}  // namespace flashoptim::cuda
