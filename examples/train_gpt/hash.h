// Two small hash functions: one to draw numbers by counter, one to recognise bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace train_gpt {

// A random-looking 64-bit number for each x (the finalizer of splitmix64).
constexpr std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Hash of `size` bytes, continuing from `hash`; a word at a time because whole models go through it.
inline std::uint64_t hash_bytes(const void* data, std::size_t size, std::uint64_t hash = 0) {
  const char* bytes = static_cast<const char*>(data);
  hash = mix(hash ^ size);
  for (; size >= sizeof(std::uint64_t); bytes += sizeof(std::uint64_t), size -= sizeof(std::uint64_t)) {
    std::uint64_t word;
    std::memcpy(&word, bytes, sizeof word);
    hash = mix(hash ^ word);
  }
  std::uint64_t tail = 0;
  if (size > 0) std::memcpy(&tail, bytes, size);
  return mix(hash ^ tail);
}

}  // namespace train_gpt
