// A thread's 8 elements of each array: 16-byte accesses where the memory allows, byte by byte where it does not.
#pragma once

#include <cstdint>

#include "src/cuda/tuning.h"

namespace flashoptim::cuda {

/// Each byte of a step is touched once: past the caches.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) { return __ldcs(p); }
__device__ __forceinline__ uint2 load_streaming(const uint2* p) { return __ldcs(p); }
__device__ __forceinline__ void store_streaming(uint4* p, uint4 v) { __stcs(p, v); }
__device__ __forceinline__ void store_streaming(uint2* p, uint2 v) { __stcs(p, v); }

/// 8 elements of kBytes bytes as words, in memory order.
template <int kBytes>
struct Words {
  static constexpr int kCount = kUnit * kBytes / 4;
  uint32_t w[kCount];
};

/// Elements [0, valid) at `p`; the others become 0. `vector`: all 8, and p is aligned to 8 elements or 16 bytes.
template <int kBytes>
__device__ __forceinline__ Words<kBytes> load_unit(const unsigned char* p, int valid, bool vector) {
  Words<kBytes> out;
  if (vector) {
    if constexpr (kUnit * kBytes == 8) {
      const uint2 v = load_streaming(reinterpret_cast<const uint2*>(p));
      out.w[0] = v.x;
      out.w[1] = v.y;
    } else {
#pragma unroll
      for (int j = 0; j < kUnit * kBytes / 16; ++j) {
        const uint4 v = load_streaming(reinterpret_cast<const uint4*>(p) + j);
        out.w[4 * j] = v.x;
        out.w[4 * j + 1] = v.y;
        out.w[4 * j + 2] = v.z;
        out.w[4 * j + 3] = v.w;
      }
    }
    return out;
  }
#pragma unroll
  for (int j = 0; j < Words<kBytes>::kCount; ++j) out.w[j] = 0;
#pragma unroll
  for (int b = 0; b < kUnit * kBytes; ++b) {
    if (b < valid * kBytes) out.w[b / 4] |= static_cast<uint32_t>(p[b]) << (8 * (b % 4));
  }
  return out;
}

template <int kBytes>
__device__ __forceinline__ void store_unit(unsigned char* p, const Words<kBytes>& words, int valid, bool vector) {
  if (vector) {
    if constexpr (kUnit * kBytes == 8) {
      store_streaming(reinterpret_cast<uint2*>(p), make_uint2(words.w[0], words.w[1]));
    } else {
#pragma unroll
      for (int j = 0; j < kUnit * kBytes / 16; ++j) {
        store_streaming(reinterpret_cast<uint4*>(p) + j,
                        make_uint4(words.w[4 * j], words.w[4 * j + 1], words.w[4 * j + 2], words.w[4 * j + 3]));
      }
    }
    return;
  }
#pragma unroll
  for (int b = 0; b < kUnit * kBytes; ++b) {
    if (b < valid * kBytes) p[b] = static_cast<unsigned char>(words.w[b / 4] >> (8 * (b % 4)));
  }
}

/// Element i, zero-extended.
template <int kBytes>
__device__ __forceinline__ uint32_t element(const Words<kBytes>& words, int i) {
  if constexpr (kBytes == 4) return words.w[i];
  if constexpr (kBytes == 2) return i % 2 == 0 ? words.w[i / 2] & 0xffffu : words.w[i / 2] >> 16;
  if constexpr (kBytes == 1) return (words.w[i / 4] >> (8 * (i % 4))) & 0xffu;
}

template <int kBytes>
__device__ __forceinline__ uint32_t signed_element(const Words<kBytes>& words, int i) {
  if constexpr (kBytes == 2)
    return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(element(words, i))));
  if constexpr (kBytes == 1) return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(element(words, i))));
}

/// The low bytes of 8 values.
template <int kBytes>
__device__ __forceinline__ Words<kBytes> pack(const uint32_t (&values)[kUnit]) {
  Words<kBytes> out;
  if constexpr (kBytes == 1) {
#pragma unroll
    for (int j = 0; j < kUnit / 4; ++j) {
      const uint32_t low = __byte_perm(values[4 * j], values[4 * j + 1], 0x0040);
      const uint32_t high = __byte_perm(values[4 * j + 2], values[4 * j + 3], 0x0040);
      out.w[j] = __byte_perm(low, high, 0x5410);
    }
  } else if constexpr (kBytes == 2) {
#pragma unroll
    for (int j = 0; j < kUnit / 2; ++j) out.w[j] = __byte_perm(values[2 * j], values[2 * j + 1], 0x5410);
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) out.w[j] = values[j];
  }
  return out;
}

}  // namespace flashoptim::cuda
