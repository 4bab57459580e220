// The norm of all gradients in one pass: every block sums the squares of one chunk in double, the last block to finish
// adds the chunks' sums in their order. Chunks depend on the plan alone, so the result does too.
#include <cuda_runtime.h>

#include "flashoptim/core/narrow_float.h"
#include "flashoptim/core/optimizers/rule.h"
#include "src/cuda/arguments.h"

namespace flashoptim::cuda {
namespace {

using F = float;

__device__ __forceinline__ F load_element(const unsigned char* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) {
    uint32_t bits = 0;
    for (int b = 0; b < 4; ++b) bits |= static_cast<uint32_t>(p[4 * i + b]) << (8 * b);
    return core::from_bits(bits);
  }
  const uint32_t bits = p[2 * i] | static_cast<uint32_t>(p[2 * i + 1]) << 8;
  return dtype == DType::kBFloat16 ? core::BFloat16::widen<F>(bits) : core::Float16::widen<F>(bits);
}

__device__ __forceinline__ double square(F g, float scale) {
  const double x = static_cast<double>(g * scale);
  return x * x;
}

/// One number per thread to one for the block, in a fixed order; the result is thread 0's.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kThreads / 32; ++i) total += sums[i];
  }
  __syncthreads();
  return total;
}

/// Sum of the squares of elements [first, end), each thread taking 8 at a time.
__device__ double sum_of_squares(const TensorEntry& t, int64_t first, int64_t end, float scale) {
  const auto* p = static_cast<const unsigned char*>(t.gradient);
  const DType dtype = static_cast<DType>(t.gradient_dtype);
  const bool aligned = (reinterpret_cast<uintptr_t>(p) & 15u) == 0;
  double sum = 0.0;
  for (int64_t i = first + static_cast<int64_t>(threadIdx.x) * kUnit; i < end;
       i += static_cast<int64_t>(kThreads) * kUnit) {
    if (aligned && i + kUnit <= end) {
      uint32_t words[8];
      const int quads = dtype == DType::kFloat32 ? 2 : 1;
      for (int j = 0; j < quads; ++j) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(p + i * (quads * 2)) + j);
        words[4 * j] = v.x;
        words[4 * j + 1] = v.y;
        words[4 * j + 2] = v.z;
        words[4 * j + 3] = v.w;
      }
      for (int j = 0; j < kUnit; ++j) {
        if (dtype == DType::kFloat32) {
          sum += square(core::from_bits(words[j]), scale);
        } else {
          const uint32_t bits = j % 2 == 0 ? words[j / 2] & 0xffffu : words[j / 2] >> 16;
          sum +=
              square(dtype == DType::kBFloat16 ? core::BFloat16::widen<F>(bits) : core::Float16::widen<F>(bits), scale);
        }
      }
    } else {
      for (int j = 0; j < kUnit; ++j) {
        if (i + j < end) sum += square(load_element(p, dtype, i + j), scale);
      }
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArguments args) {
  const Chunk chunk = args.chunks[blockIdx.x];
  const TensorEntry& t = args.tensors[chunk.tensor];
  const float scale = core::gradient_factor(args.gradient_scale, args.gradient_divisor, nullptr);
  double sum = 0.0;
  if (t.gradient != nullptr) {
    const int64_t first = chunk.first_group * kGroupSize;
    const int64_t end = min(t.numel, first + chunk.groups * kGroupSize);
    sum = sum_of_squares(t, first, end, scale);
  }
  sum = block_sum(sum);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    args.partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(args.finished, 1u) + 1u == gridDim.x;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < args.chunk_count; i += kThreads) total += __ldcg(args.partial + i);
  total = block_sum(total);
  if (threadIdx.x == 0) {
    *args.finished = 0u;
    const double norm = core::double_sqrt(total);
    args.result->sum_of_squares = total;
    args.result->norm = static_cast<float>(norm);
    const double coefficient = static_cast<double>(args.max_norm) / (norm + static_cast<double>(args.epsilon));
    // NaN stays NaN, as torch's clip_grad_norm_ has it.
    args.result->coefficient = args.max_norm > 0.0f && !(coefficient >= 1.0) ? static_cast<float>(coefficient) : 1.0f;
  }
}

__global__ void empty_norm_kernel(const __grid_constant__ NormArguments args) { *args.result = {0.0, 0.0f, 1.0f}; }

}  // namespace

int launch_norm(const NormArguments& args, void* stream) {
  if (args.chunk_count == 0) {
    empty_norm_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(args);
  } else {
    norm_kernel<<<static_cast<unsigned int>(args.chunk_count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace flashoptim::cuda
