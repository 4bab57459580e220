#include "benchmarks/step/machine.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

// The streams are compiled for the widest vectors that the machine has; the loops are what the compiler makes of them.
#if defined(__x86_64__)
#define FLASHOPTIM_STREAM __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#else
#define FLASHOPTIM_STREAM
#endif

namespace flashoptim::benchmarks {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

FLASHOPTIM_STREAM void scale_in_place(float* a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) a[i] = a[i] * 0.999f + 1e-3f;
}

FLASHOPTIM_STREAM void update(float* __restrict a, const float* __restrict b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) a[i] = a[i] * 0.999f + b[i] * 1e-3f;
}

FLASHOPTIM_STREAM void update_three(float* __restrict a, float* __restrict b, float* __restrict c,
                                    const float* __restrict g, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = g[i];
    b[i] = b[i] * 0.9f + gradient * 0.1f;
    c[i] = c[i] * 0.999f + gradient * 1e-3f;
    a[i] = a[i] * 0.999f + b[i] * c[i];
  }
}

/// Best of three passes of body(begin, end) over [0, count) on `threads` threads, in seconds.
template <class Body>
double best_time(int threads, int64_t count, Body body) {
  double best = 1e30;
  for (int pass = 0; pass < 3; ++pass) {
    const double start = seconds();
#pragma omp parallel num_threads(threads)
    {
      // Whole cache lines a thread.
      const int64_t lines = count / 16, of = omp_get_num_threads(), me = omp_get_thread_num();
      body(lines * me / of * 16, lines * (me + 1) / of * 16);
    }
    best = std::min(best, seconds() - start);
  }
  return best;
}

}  // namespace

double core_clock() {
#if defined(__x86_64__)
  constexpr int64_t kRounds = 200000, kUnrolled = 32;
  double best = 1e30;
  for (int pass = 0; pass < 3; ++pass) {
    uint64_t x = 1;
    const double start = seconds();
    for (int64_t i = 0; i < kRounds; ++i) {
      // An addition of two registers has a latency of one cycle on every x86 core. (One of an immediate can be merged
      // with its neighbours by the renamer.)
      asm volatile(".rept 32\n\tadd %0, %0\n\t.endr" : "+r"(x));
    }
    best = std::min(best, seconds() - start);
  }
  return static_cast<double>(kRounds * kUnrolled) / best;
#else
  return 0.0;
#endif
}

double read_modify_write_bandwidth(int threads) {
  constexpr int64_t kCount = int64_t{32} << 20;  // 128 MiB an array
  Arena& arena = Arena::instance();
  arena.reserve(4 * Arena::round_up(4 * kCount));
  float* array[4];
  for (float*& a : array) {
    a = static_cast<float*>(arena.take(4 * kCount));
    std::fill(a, a + kCount, 1.0f);
  }
  const double bytes = 4.0 * static_cast<double>(kCount);
  const double scale = 2 * bytes / best_time(threads, kCount, [&](int64_t begin, int64_t end) {
                         scale_in_place(array[0] + begin, end - begin);
                       });
  const double updated = 3 * bytes / best_time(threads, kCount, [&](int64_t begin, int64_t end) {
                           update(array[0] + begin, array[1] + begin, end - begin);
                         });
  const double three =
      7 * bytes / best_time(threads, kCount, [&](int64_t begin, int64_t end) {
        update_three(array[0] + begin, array[1] + begin, array[2] + begin, array[3] + begin, end - begin);
      });
  const double copy = 2 * bytes / best_time(threads, kCount, [&](int64_t begin, int64_t end) {
                        std::memcpy(array[0] + begin, array[1] + begin, static_cast<size_t>(4 * (end - begin)));
                      });
  return std::max({scale, updated, three, copy});
}

int64_t available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  int64_t kilobytes = 0;
  while (file >> key >> kilobytes) {
    if (key == "MemAvailable:") return kilobytes * 1024;
    std::getline(file, unit);
  }
  return int64_t{4} << 30;
}

Arena& Arena::instance() {
  static Arena arena;
  return arena;
}

void Arena::reserve(int64_t bytes) {
  used_ = 0;
  if (bytes <= size_) return;
  std::free(base_);
  size_ = (bytes + (int64_t{1} << 21) - 1) >> 21 << 21;
  base_ = static_cast<std::byte*>(std::aligned_alloc(size_t{1} << 21, static_cast<size_t>(size_)));
  if (base_ == nullptr) {
    std::fprintf(stderr, "step_benchmark: no %lld bytes of memory\n", static_cast<long long>(size_));
    std::exit(1);
  }
  // Touched by the threads that will use it, as they will.
#pragma omp parallel
  {
    const int64_t of = omp_get_num_threads(), me = omp_get_thread_num();
    std::memset(base_ + size_ / of * me, 0, static_cast<size_t>(size_ / of));
  }
}

void* Arena::take(int64_t bytes) {
  void* piece = base_ + used_;
  used_ += round_up(bytes);
  return piece;
}

}  // namespace flashoptim::benchmarks
