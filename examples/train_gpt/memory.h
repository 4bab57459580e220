// How much memory training holds, counted from what is alive rather than from what should be.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

namespace train_gpt {

// Bytes held by each kind of tensor.
struct MemoryReport {
  std::int64_t parameter_count = 0;
  std::int64_t parameter_bytes = 0;
  std::int64_t gradient_bytes = 0;
  std::int64_t optimizer_bytes = 0;

  // All three kinds, divided by the number of parameters.
  double bytes_per_parameter() const {
    return static_cast<double>(parameter_bytes + gradient_bytes + optimizer_bytes) /
           static_cast<double>(parameter_count);
  }
};

// Counts the storages that are alive now, each once however many tensors share it. Call it between the optimizer's
// step and zero_grad, when everything exists.
MemoryReport measure_memory(torch::nn::Module& model, torch::optim::Optimizer& optimizer);

// From here on every CPU tensor's allocation is counted. Call it before the first tensor is made.
void count_cpu_allocations();

// Bytes of CPU tensors alive now; only those made after count_cpu_allocations().
std::int64_t live_cpu_bytes();

// Most bytes that tensors held at one time so far: on the GPU for "cuda", else on the CPU.
std::int64_t peak_tensor_bytes(const torch::Device& device);

// Most memory the process has had so far, code and libraries included.
std::int64_t peak_resident_bytes();

}  // namespace train_gpt
