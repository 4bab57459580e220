// What a step looks at in a tensor, read where torch keeps it in its own objects.
//
// Asking torch takes six calls a tensor through its C interface, and a Python object for every new gradient; reading in
// place takes less time (docs/cuda.md). Where in its objects torch keeps what is read is no part of its interface: it
// is found when the library is set up, by probes of which Python knows all that is looked for, and held against torch's
// own answers (python/flashoptim_native/_layout.py). Where anything is not found, or found twice, torch is asked.
//
// Nothing is read of an object but of one that is alive: a tensor that a container of Python's holds owns its
// implementation, which owns its storage and, by its autograd data, its gradient. All under Python's lock.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <set>
#include <vector>

namespace flashoptim::ops {

/// Offsets, in bytes.
struct TensorLayout {
  bool is_known = false;
  // In a tensor's implementation. `rest`: 16 bytes that say dtype, device, kind of tensor and dispatch keys.
  std::intptr_t storage = 0, autograd = 0, version = 0, object = 0, dim = 0, sizes = 0, strides = 0, offset = 0;
  std::intptr_t rest = 0;
  std::intptr_t data = 0, bytes = 0;  // in a storage; behind `data`, who frees it
  std::intptr_t gradient = 0;         // in a tensor's autograd data
  std::intptr_t count = 0;            // in a version counter, 32 bits
  std::intptr_t no_gradient = 0;      // what stands in place of a gradient that is not there
};
inline TensorLayout g_tensor_layout;  // here, so that a look at a tensor is a few loads
inline TensorLayout& tensor_layout() { return g_tensor_layout; }

/// A tensor of which all is known that a layout is to be found by.
struct Probe {
  const char* implementation = nullptr;
  const int64_t *sizes = nullptr, *strides = nullptr;  // as torch says
  std::intptr_t storage = 0, data = 0, bytes = 0, offset = 0, numel = 0, dim = 0, keys = 0, object = 0;
  std::intptr_t has_autograd = 0;           // 1, 0; -1: nobody knows
  std::intptr_t gradient = 0, version = 0;  // its implementation, or 0; -1: it counts none
};
/// Throws std::runtime_error, which says what was not found.
TensorLayout find_layout(const std::vector<Probe>& probes);

inline std::intptr_t word_at(const void* base, std::intptr_t offset) {
  std::intptr_t word = 0;
  std::memcpy(&word, static_cast<const char*>(base) + offset, sizeof word);
  return word;
}
inline const void* pointer_at(const void* base, std::intptr_t offset) {
  return reinterpret_cast<const void*>(word_at(base, offset));
}

/// Sizes and strides; torch keeps those of more dimensions elsewhere.
struct Shape {
  static constexpr int64_t kMostDims = 5;
  int64_t dim = 0;
  std::array<int64_t, kMostDims> sizes = {}, strides = {};
  auto operator<=>(const Shape&) const = default;
  bool is_of(const void* implementation) const;
};

/// All of a tensor's words but where it is: many tensors have the same.
struct TensorKind {
  Shape shape;
  std::array<std::intptr_t, 2> rest = {};
  std::intptr_t offset = 0, owner = 0, bytes = 0;
  auto operator<=>(const TensorKind&) const = default;
};
using TensorKinds = std::set<TensorKind>;

/// A tensor as it was when it was looked at in full and found good: as long as every word says the same, it is.
class Trace {
 public:
  /// Whether the tensor with this implementation has address, storage, shape, dtype, device and kind of that one.
  bool is(const void* implementation) const;
  /// Whether it could be put in its place, lying elsewhere: its address. `numel` elements of `element_size` bytes.
  bool is_like(const void* implementation, int64_t numel, int64_t element_size, const void** address) const;
  /// `kinds` outlives the trace. object: Python's, in whose place the tensor was found.
  void remember(const void* object, const void* implementation, TensorKinds* kinds);
  /// Starts to fetch what a look will read, if the tensor is where it was.
  void prefetch() const;

 private:
  bool is_same_kind(const void* implementation) const;

  const void *object_ = nullptr, *implementation_ = nullptr;  // for prefetch() alone: they may be gone
  const void* storage_ = nullptr;
  std::intptr_t data_ = 0;
  const TensorKind* kind_ = nullptr;  // null: nothing was remembered
};

/// Starts to fetch what a look reads of a tensor's implementation; of its storage.
void prefetch_implementation(const void* implementation);
void prefetch_storage(const void* storage);

inline bool Shape::is_of(const void* implementation) const {
  const TensorLayout& l = tensor_layout();
  if (word_at(implementation, l.dim) != dim) return false;
  for (int64_t d = 0; d < dim; ++d) {
    const auto at = static_cast<size_t>(d);
    if (word_at(implementation, l.sizes + 8 * d) != sizes[at]) return false;
    if (word_at(implementation, l.strides + 8 * d) != strides[at]) return false;
  }
  return true;
}

inline bool Trace::is_same_kind(const void* implementation) const {
  const TensorLayout& l = tensor_layout();
  return kind_ != nullptr && word_at(implementation, l.rest) == kind_->rest[0] &&
         word_at(implementation, l.rest + 8) == kind_->rest[1] && kind_->shape.is_of(implementation);
}

inline bool Trace::is(const void* implementation) const {
  const TensorLayout& l = tensor_layout();
  return is_same_kind(implementation) && pointer_at(implementation, l.storage) == storage_ &&
         word_at(implementation, l.offset) == kind_->offset && word_at(storage_, l.data) == data_ &&
         word_at(storage_, l.data + 8) == kind_->owner && word_at(storage_, l.bytes) == kind_->bytes;
}

inline bool Trace::is_like(const void* implementation, int64_t numel, int64_t element_size,
                           const void** address) const {
  const TensorLayout& l = tensor_layout();
  if (!is_same_kind(implementation)) return false;
  const void* const storage = pointer_at(implementation, l.storage);
  if (storage == nullptr) return false;
  const std::intptr_t data = word_at(storage, l.data), offset = word_at(implementation, l.offset);
  if (numel != 0 && (offset + numel) * element_size > word_at(storage, l.bytes)) return false;
  *address = reinterpret_cast<const void*>(data == 0 ? 0 : data + offset * element_size);
  return true;
}

inline void prefetch_at(const void* base, std::intptr_t offset) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::intptr_t>(base) + offset));
}

inline void prefetch_implementation(const void* implementation) {
  const TensorLayout& l = tensor_layout();
  prefetch_at(implementation, l.storage);
  prefetch_at(implementation, l.sizes);
  prefetch_at(implementation, l.strides);
  prefetch_at(implementation, l.rest + 8);
}

inline void prefetch_storage(const void* storage) {
  const TensorLayout& l = tensor_layout();
  prefetch_at(storage, l.data);
  prefetch_at(storage, l.bytes);
}

inline void Trace::prefetch() const {
  if (kind_ == nullptr) return;
  prefetch_at(object_, 8);  // behind the count of references: the type, and the implementation
  prefetch_implementation(implementation_);
  prefetch_storage(storage_);
}

}  // namespace flashoptim::ops
