// What a fuzzer's bytes mean: numbers one after the other, zeros where they have ended.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace flashoptim::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : next_(data), left_(size) {}

  template <class T>
  T take() {
    T value{};
    const size_t bytes = std::min(left_, sizeof value);
    if (bytes > 0) std::memcpy(&value, next_, bytes);  // (of no bytes libFuzzer's address is null)
    next_ += bytes;
    left_ -= bytes;
    return value;
  }
  /// 0 ... count - 1.
  int64_t below(int64_t count) { return static_cast<int64_t>(take<uint16_t>()) % count; }
  bool flip() { return (take<uint8_t>() & 1u) != 0; }
  size_t left() const { return left_; }

 private:
  const uint8_t* next_;
  size_t left_;
};

/// A stream of bits from one number (Steele, Lea and Flood's SplitMix64), for arrays longer than the input.
class Stream {
 public:
  explicit Stream(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

}  // namespace flashoptim::fuzz
