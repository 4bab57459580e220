#include "memory.h"

#include <ATen/DeviceAccelerator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <malloc.h>
#include <sys/resource.h>

#include <atomic>
#include <unordered_set>

#include "optimizers.h"

namespace train_gpt {
namespace {

std::atomic<std::int64_t> live_bytes{0};
std::atomic<std::int64_t> peak_bytes{0};

// LibTorch's own CPU allocation with a count around it. The C library knows a block's size when it is freed, so no
// header has to be put in front of the data.
class CountingAllocator final : public c10::Allocator {
 public:
  at::DataPtr allocate(std::size_t size) override {
    void* data = c10::alloc_cpu(size);
    const auto usable = static_cast<std::int64_t>(malloc_usable_size(data));
    const std::int64_t now = live_bytes.fetch_add(usable, std::memory_order_relaxed) + usable;
    std::int64_t peak = peak_bytes.load(std::memory_order_relaxed);
    while (now > peak && !peak_bytes.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
    }
    return {data, data, &release, at::Device(at::kCPU)};
  }

  at::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* destination, const void* source, std::size_t size) const override {
    default_copy_data(destination, source, size);
  }

 private:
  static void release(void* data) {
    live_bytes.fetch_sub(static_cast<std::int64_t>(malloc_usable_size(data)), std::memory_order_relaxed);
    c10::free_cpu(data);
  }
};

std::int64_t storage_bytes(const std::vector<torch::Tensor>& tensors) {
  std::unordered_set<const void*> seen;
  std::int64_t bytes = 0;
  for (const auto& tensor : tensors) {
    if (!tensor.defined() || !seen.insert(tensor.storage().unsafeGetStorageImpl()).second) continue;
    bytes += static_cast<std::int64_t>(tensor.storage().nbytes());
  }
  return bytes;
}

}  // namespace

MemoryReport measure_memory(torch::nn::Module& model, torch::optim::Optimizer& optimizer) {
  MemoryReport report;
  std::vector<torch::Tensor> parameters, gradients;
  for (const auto& parameter : model.parameters()) {
    report.parameter_count += parameter.numel();
    parameters.push_back(parameter);
    gradients.push_back(parameter.grad());
  }
  report.parameter_bytes = storage_bytes(parameters);
  report.gradient_bytes = storage_bytes(gradients);
  report.optimizer_bytes = storage_bytes(optimizer_tensors(optimizer));
  return report;
}

void count_cpu_allocations() {
  static CountingAllocator allocator;
  constexpr std::uint8_t kAboveDefault = 1;
  c10::SetCPUAllocator(&allocator, kAboveDefault);
}

std::int64_t live_cpu_bytes() { return live_bytes; }

std::int64_t peak_tensor_bytes(const torch::Device& device) {
  if (!device.is_cuda()) return peak_bytes;
  constexpr auto kAll = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return at::accelerator::getDeviceStats(device.has_index() ? device.index() : 0).allocated_bytes[kAll].peak;
}

std::int64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * std::int64_t{1024};  // Linux counts in KiB
}

}  // namespace train_gpt
