#include "src/threads.h"

#include <pthread.h>

#include <atomic>

#include "flashoptim/step.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace flashoptim {
namespace {

std::atomic<bool> g_is_forked_child{false};

// From the start, not from the first step on: another library of the process may have started OpenMP's threads.
[[maybe_unused]] const int g_fork_handler =
    pthread_atfork(nullptr, nullptr, [] { g_is_forked_child.store(true, std::memory_order_relaxed); });

/// Threads are worth their start only for work of some 100 us.
[[maybe_unused]] constexpr int64_t kSmallestParallelBlocks = 64;

}  // namespace

bool is_forked_child() { return g_is_forked_child.load(std::memory_order_relaxed); }

void default_parallel_for(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
#if defined(_OPENMP)
  if (count >= kSmallestParallelBlocks && !is_forked_child() && omp_get_max_threads() > 1 && !omp_in_parallel()) {
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

}  // namespace flashoptim
