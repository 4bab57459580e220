// Arrays of states on the host, in one stretch of memory that is registered once: exactly as large as they are
// together.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "libtorch/store/arrays.h"

namespace flashoptim::store {

/// Multiples of bytes at which arrays begin; what lies between them is nobody's.
inline constexpr int64_t kHostAlignment = 256;

/// Bytes of memory that host_arrays() takes.
int64_t host_bytes(const std::vector<ArraySpec>& specs);

/// Arrays of zero bytes, one behind the other in memory of their own, pinned for copies from and to `device` where
/// asked. The memory goes with the last of the tensors, each of which has a storage of its own. Throws, with how much
/// was wanted and what the limits are, where the host does not give or pin it.
TensorList host_arrays(Op op, const std::vector<ArraySpec>& specs, Device device, bool pin);

/// Whether an address is in such memory, and in the same as another.
bool is_host_memory(const void* data);
bool is_same_host_memory(const void* a, const void* b);
/// Keeps the memory that an address is in; null where it is in none. Who copies to it by itself holds this.
std::shared_ptr<void> hold_host_memory(const void* data);
/// Bytes of such memory that this process has at the moment.
int64_t host_memory_held();

}  // namespace flashoptim::store
