// The threads of a step whose caller brings none.
#pragma once

#include <cstdint>

namespace flashoptim {

/// OpenMP's threads for work that is worth their start, the calling thread otherwise and in a child of fork().
void default_parallel_for(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);

}  // namespace flashoptim
