// What the library's functions check of their arguments, on every device.
#pragma once

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "flashoptim/step.h"

namespace flashoptim {

/// Runs a body that returns a Status and may allocate: the library throws nothing. (The message is short enough to need
/// no memory.)
template <class Body>
Status guarded(Body body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory("out of memory");
  } catch (const std::length_error&) {
    return Status::out_of_memory("out of memory");
  }
}

Status misaligned(const char* name, uintptr_t address, size_t alignment);

/// Shards and tensors have fewer elements than this, so that no count of bytes overflows.
inline constexpr int64_t kMostElements = int64_t{1} << 57;

/// How messages call a tensor, made into text only when there is something to say.
struct TensorName {
  const char* list = nullptr;  ///< of `list`[index]; null: fields stand alone, as arguments of a function
  int64_t index = -1;          ///< -1: `list` alone
  std::string field(const char* name) const;
};

/// `field` is the layout's in messages.
Status check_layout(const GroupLayout& layout, const TensorName& name, const char* field);

/// Whether a tensor fits an optimizer of `states` slots.
Status check_tensor(const ParameterTensors& tensor, const TensorName& name, int states);

/// The same of its states and scales alone: parameter and correction are not looked at.
Status check_states(const ParameterTensors& tensor, const TensorName& name, int states);

/// One array of a call.
struct ArrayRange {
  const char* field;
  int slot;  ///< field[slot]; -1: field
  const void* base;
  int64_t bytes;
};
/// Whether no two of `count` arrays have a byte in common, and each ends within what addresses can say. Null and empty
/// ones are apart from all.
Status check_apart(const ArrayRange* arrays, int count, const TensorName& name);

/// Whether what a pointer points to can be a T, as far as its address says. Null is left to others.
template <class T>
Status check_aligned(const T* pointer, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % alignof(T) == 0) return Status::ok();
  return misaligned(name, address, alignof(T));
}

/// Whether `now` differs from `before` in nothing but addresses and hyper_index.
Status check_same_format(const ParameterTensors& before, const ParameterTensors& now, const TensorName& name);

Status check_index(int64_t index, int64_t size);

/// Of a list of `count` tensors.
Status check_tensor_list(const ParameterTensors* tensors, int64_t count);

/// What step_some() is given: `indices` of tensors of a plan of `size`.
Status check_selection(const int64_t* indices, int64_t count, int64_t size);

/// Whether indices[i] names one of the plan's `size` tensors, for the first time in call number `call`: `named_in`
/// keeps in which call each was named last.
Status check_named(const int64_t* indices, int64_t i, int64_t size, uint64_t call, uint64_t* named_in);

/// Whether `hypers`, of `count` entries, has those below `used`.
Status check_hyper_count(const Hyperparameters* hypers, int64_t count, int32_t used);

Status check_gradient_scale(float gradient_scale);

/// Whether what a step's options point to, on the host, can be what it should.
Status check_step_options(const StepOptions& options);

}  // namespace flashoptim
