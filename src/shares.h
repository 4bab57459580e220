// A step's blocks, shared out among threads of different speed.
//
// Equal ranges are right for equal threads. On a busy or virtual machine they are not equal: one that was interrupted
// keeps all others waiting (docs/benchmarks.md). So a thread works through the shares of its own range, piece by piece,
// and then helps with the others'. It keeps to its own memory as far as possible, for the sake of caches and NUMA.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

namespace flashoptim {

class Shares {
 public:
  /// Shares out items 0 ... count - 1. Not while work() runs.
  void reset(int64_t count) {
    count_ = count;
    shares_ = std::clamp<int64_t>(count / kSmallestShare, 1, kMostShares);
    piece_ = std::clamp<int64_t>(count / kPieces, kSmallestPiece, kLargestPiece);
    for (int64_t s = 0; s < shares_; ++s)
      next_[static_cast<size_t>(s)].item.store(begin_of(s), std::memory_order_relaxed);
  }

  /// Calls body(begin, end, share_end) for pieces begin ... end - 1 of a share that goes on to share_end, until none is
  /// left, first for those about item `first`. Threads that call it at the same time divide the pieces between them;
  /// each item is in one piece.
  template <class Body>
  void work(int64_t first, Body body) {
    const int64_t own = ((first + 1) * shares_ - 1) / count_;  // the last share that begins at `first` or before
    for (int64_t k = 0; k < shares_; ++k) {
      const int64_t s = (own + k) % shares_;
      std::atomic<int64_t>& next = next_[static_cast<size_t>(s)].item;
      const int64_t end = begin_of(s + 1);
      while (next.load(std::memory_order_relaxed) < end) {  // so that those who come late only read
        const int64_t begin = next.fetch_add(piece_, std::memory_order_relaxed);
        if (begin >= end) break;
        body(begin, std::min(begin + piece_, end), end);
      }
    }
  }

 private:
  /// Enough pieces for some 100 threads, but none so small that taking it counts: a block takes 0.5 to 2 us.
  static constexpr int64_t kMostShares = 64, kSmallestShare = 16, kPieces = 512, kSmallestPiece = 4, kLargestPiece = 64;

  struct alignas(64) Next {
    std::atomic<int64_t> item{0};
  };

  /// count * s / shares, which would overflow.
  int64_t begin_of(int64_t s) const { return count_ / shares_ * s + count_ % shares_ * s / shares_; }

  int64_t count_ = 0, shares_ = 1, piece_ = 1;
  std::array<Next, kMostShares> next_;
};

}  // namespace flashoptim
