#include "libtorch/ops/tensor_layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace flashoptim::ops {
namespace {

/// The one offset between `begin` and `end` at which every probe has its value.
template <class Base, class Value>
std::intptr_t find(const char* what, const std::vector<Probe>& probes, std::intptr_t begin, std::intptr_t end,
                   Base base, Value value, std::intptr_t mask = -1) {
  std::intptr_t found = -1;
  for (std::intptr_t at = begin; at < end; at += 8) {
    const bool is_here = std::all_of(probes.begin(), probes.end(), [&](const Probe& probe) {
      return (word_at(base(probe), at) & mask) == value(probe);
    });
    if (!is_here) continue;
    if (found >= 0) throw std::runtime_error(std::string(what) + " is found twice");
    found = at;
  }
  if (found < 0) throw std::runtime_error(std::string(what) + " is not found");
  return found;
}

void demand(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string(what) + " is not where it should be");
}

std::vector<Probe> some_of(const std::vector<Probe>& probes, bool (*wanted)(const Probe&)) {
  std::vector<Probe> some;
  std::copy_if(probes.begin(), probes.end(), std::back_inserter(some), wanted);
  return some;
}

}  // namespace

TensorLayout find_layout(const std::vector<Probe>& probes) {
  constexpr std::intptr_t kHead = 8, kInline = Shape::kMostDims * 8, kStorageSize = 64, kAutogradSize = 64;
  const auto itself = [](const Probe& p) { return p.implementation; };
  const auto storage_of = [](const Probe& p) { return reinterpret_cast<const char*>(p.storage); };
  demand(probes.size() >= 8, "a probe");
  TensorLayout l;
  // Sizes and strides are where torch says; all else in the implementation stands around them.
  l.sizes = reinterpret_cast<const char*>(probes[0].sizes) - probes[0].implementation;
  l.strides = reinterpret_cast<const char*>(probes[0].strides) - probes[0].implementation;
  demand(l.sizes > kHead && l.sizes < 256 && l.sizes % 8 == 0 && l.strides == l.sizes + kInline, "a size");
  for (const Probe& p : probes) {
    demand(reinterpret_cast<const char*>(p.sizes) - p.implementation == l.sizes, "a size");
    demand(reinterpret_cast<const char*>(p.strides) - p.implementation == l.strides, "a stride");
  }
  const std::intptr_t behind = l.strides + kInline;
  l.dim = find("dim", probes, kHead, l.sizes, itself, [](const Probe& p) { return p.dim; });
  l.storage = find("storage", probes, kHead, l.sizes, itself, [](const Probe& p) { return p.storage; });
  l.object = find("object", probes, kHead, l.sizes, itself, [](const Probe& p) { return p.object; }, ~1);
  l.offset = find("offset", probes, behind, behind + 16, itself, [](const Probe& p) { return p.offset; });
  const std::intptr_t numel =
      find("numel", probes, behind, behind + 16, itself, [](const Probe& p) { return p.numel; });
  const std::intptr_t keys = find("keys", probes, behind, behind + 32, itself, [](const Probe& p) { return p.keys; });
  // Between the number of elements and the keys: dtype, device, and bits that say what kind of tensor it is.
  demand(numel == behind + 8 && l.offset == behind && keys == numel + 16, "what is behind the strides");
  l.rest = numel + 8;
  l.data = find("data", probes, kHead, kStorageSize - 8, storage_of, [](const Probe& p) { return p.data; });
  l.bytes = find("bytes", probes, kHead, kStorageSize, storage_of, [](const Probe& p) { return p.bytes; });

  // A storage, autograd's data, more data, a version counter: pointers one behind the other.
  l.autograd = l.storage + 8;
  l.version = l.storage + 24;
  demand(l.version < l.object, "a version");
  for (const Probe& p : probes) {
    const std::intptr_t autograd = word_at(p.implementation, l.autograd),
                        version = word_at(p.implementation, l.version);
    demand((p.has_autograd < 0 || (autograd != 0) == (p.has_autograd == 1)) && autograd % 8 == 0, "autograd's data");
    demand(p.gradient == 0 || autograd != 0, "a gradient");
    demand((version != 0) == (p.version >= 0) && version % 8 == 0, "a version");
  }
  const auto autograd_of = [](std::intptr_t at) {
    return [at](const Probe& p) { return static_cast<const char*>(pointer_at(p.implementation, at)); };
  };
  l.gradient = find("gradient", some_of(probes, [](const Probe& p) { return p.gradient != 0; }), kHead, kAutogradSize,
                    autograd_of(l.autograd), [](const Probe& p) { return p.gradient; });
  for (const Probe& p : some_of(probes, [](const Probe& q) { return q.has_autograd == 1 && q.gradient == 0; })) {
    const std::intptr_t none = word_at(autograd_of(l.autograd)(p), l.gradient);
    demand(none != 0 && (l.no_gradient == 0 || l.no_gradient == none), "a gradient that is not there");
    l.no_gradient = none;
  }
  demand(l.no_gradient != 0, "a gradient that is not there");
  l.count = find(
      "version", some_of(probes, [](const Probe& p) { return p.version >= 0; }), kHead, 32, autograd_of(l.version),
      [](const Probe& p) { return p.version; }, 0xffffffff);
  l.is_known = true;
  return l;
}

void Trace::remember(const void* object, const void* implementation, TensorKinds* kinds) {
  *this = {};
  const TensorLayout& l = tensor_layout();
  if (!l.is_known) return;
  TensorKind kind;
  Shape& shape = kind.shape;
  shape.dim = word_at(implementation, l.dim);
  const void* const storage = pointer_at(implementation, l.storage);
  if (shape.dim < 0 || shape.dim > Shape::kMostDims || storage == nullptr) return;
  for (int64_t d = 0; d < shape.dim; ++d) {
    shape.sizes[static_cast<size_t>(d)] = word_at(implementation, l.sizes + 8 * d);
    shape.strides[static_cast<size_t>(d)] = word_at(implementation, l.strides + 8 * d);
  }
  kind.rest = {word_at(implementation, l.rest), word_at(implementation, l.rest + 8)};
  kind.offset = word_at(implementation, l.offset);
  kind.owner = word_at(storage, l.data + 8);
  kind.bytes = word_at(storage, l.bytes);
  object_ = object;
  implementation_ = implementation;
  storage_ = storage;
  data_ = word_at(storage, l.data);
  kind_ = &*kinds->insert(kind).first;
}

}  // namespace flashoptim::ops
