// What this machine can do, measured in the same run as the steps: clock and memory bandwidth; and the memory they use.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashoptim::benchmarks {

/// Clock of the core this runs on, in Hz: a chain of additions, one cycle each. Takes some milliseconds.
double core_clock();

/// Bytes a second that `threads` threads read and write together, the best of a few streaming patterns (scaling one
/// array in place, updating one array from another, three of four in place as fp32 AdamW does, copying) over arrays far
/// larger than the caches.
double read_modify_write_bandwidth(int threads);

/// Bytes of memory that can be had without swapping.
int64_t available_memory();

/// Memory that all benchmarks share, so that all see the same pages and only the first pays for them.
class Arena {
 public:
  static Arena& instance();
  /// At least `bytes` of touched memory; what was taken before is void.
  void reserve(int64_t bytes);
  /// A 64-byte aligned piece.
  void* take(int64_t bytes);
  static constexpr int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  std::byte* base_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace flashoptim::benchmarks
