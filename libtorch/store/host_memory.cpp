#include "libtorch/store/host_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#if FLASHOPTIM_HAS_CUDA
#include "flashoptim/cuda_offload.h"
#endif

namespace flashoptim::store {
namespace {

class HostMemory;

/// Every stretch that is alive, by where it begins. Never destroyed: tensors may go behind everything else.
struct Stretches {
  struct Stretch {
    int64_t bytes;
    std::weak_ptr<HostMemory> memory;
  };
  std::mutex mutex;
  std::map<uintptr_t, Stretch> known;

  static Stretches& instance() {
    static Stretches& all = *new Stretches;
    return all;
  }
  /// Where the stretch with an address begins; 0: in none.
  uintptr_t begin_of(const void* data, std::weak_ptr<HostMemory>* memory = nullptr) {
    const auto at = reinterpret_cast<uintptr_t>(data);
    const std::lock_guard lock(mutex);
    auto found = known.upper_bound(at);
    if (found == known.begin()) return 0;
    --found;
    if (at >= found->first + static_cast<uintptr_t>(found->second.bytes)) return 0;
    if (memory != nullptr) *memory = found->second.memory;
    return found->first;
  }
};

/// Whole pages of zeros, pinned or not.
class HostMemory {
 public:
  HostMemory(int64_t bytes, Device device, bool pin) {
    const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    bytes_ = (bytes + page - 1) / page * page;
    void* const data = mmap(nullptr, size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      status_ = Status::out_of_memory("the host gives no " + std::to_string(bytes_) + " bytes of memory for states (" +
                                      std::strerror(errno) + ")");
      return;
    }
    data_ = data;
    static_cast<void>(madvise(data_, size(), MADV_HUGEPAGE));  // fewer pages to pin, where the system has large ones
#if FLASHOPTIM_HAS_CUDA
    if (pin) status_ = cuda::pin_host_memory(data_, bytes_, device.index);
    is_pinned_ = pin && status_.is_ok();
#else
    static_cast<void>(device);
    if (pin) status_ = Status::unsupported("this build has no CUDA, for which memory would be pinned");
#endif
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  ~HostMemory() {
    if (data_ == nullptr) return;
    {
      Stretches& all = Stretches::instance();
      const std::lock_guard lock(all.mutex);
      all.known.erase(reinterpret_cast<uintptr_t>(data_));
    }
#if FLASHOPTIM_HAS_CUDA
    if (is_pinned_) cuda::unpin_host_memory(data_);
#endif
    munmap(data_, size());
  }

  const Status& status() const { return status_; }
  static void remember(const std::shared_ptr<HostMemory>& memory) {
    Stretches& all = Stretches::instance();
    const std::lock_guard lock(all.mutex);
    all.known[reinterpret_cast<uintptr_t>(memory->data_)] = {memory->bytes_, memory};
  }
  char* data() const { return static_cast<char*>(data_); }

 private:
  size_t size() const { return static_cast<size_t>(bytes_); }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
  bool is_pinned_ = false;
  Status status_;
};

int64_t bytes_of(const ArraySpec& spec) {
  auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(spec.dtype));
  for (const int64_t size : spec.sizes) bytes *= size;
  return bytes;
}

int64_t aligned(int64_t bytes) { return (bytes + kHostAlignment - 1) / kHostAlignment * kHostAlignment; }

}  // namespace

int64_t host_bytes(const std::vector<ArraySpec>& specs) {
  int64_t bytes = 0;
  for (const ArraySpec& spec : specs) bytes += aligned(bytes_of(spec));
  return bytes;
}

TensorList host_arrays(Op op, const std::vector<ArraySpec>& specs, Device device, bool pin) {
  using Owner = std::shared_ptr<HostMemory>;
  TensorList made;
  if (specs.empty()) return made;
  // (A kilobyte where all arrays are empty: every tensor has an address.)
  const Owner memory = std::make_shared<HostMemory>(std::max(host_bytes(specs), int64_t{1024}), device, pin);
  op.check(memory->status());
  HostMemory::remember(memory);
  int64_t offset = 0;
  for (const ArraySpec& spec : specs) {
    auto owner = std::make_unique<Owner>(memory);
    AtenTensorHandle handle = nullptr;
    check_torch(
        torch_from_blob(
            memory->data() + offset, static_cast<int64_t>(spec.sizes.size()), spec.sizes.data(), spec.strides.data(),
            /*storage_offset=*/0, spec.dtype, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
            nullptr, 0, [](void*, void* context) { delete static_cast<Owner*>(context); }, owner.get()),
        "from_blob");
    owner.release();
    made.emplace_back(handle);
    offset += aligned(bytes_of(spec));
  }
  return made;
}

bool is_host_memory(const void* data) { return Stretches::instance().begin_of(data) != 0; }

bool is_same_host_memory(const void* a, const void* b) {
  const uintptr_t begin = Stretches::instance().begin_of(a);
  return begin != 0 && begin == Stretches::instance().begin_of(b);
}

int64_t host_memory_held() {
  Stretches& all = Stretches::instance();
  const std::lock_guard lock(all.mutex);
  int64_t held = 0;
  for (const auto& [begin, stretch] : all.known) held += stretch.bytes;
  return held;
}

std::shared_ptr<void> hold_host_memory(const void* data) {
  std::weak_ptr<HostMemory> memory;
  return Stretches::instance().begin_of(data, &memory) == 0 ? nullptr : memory.lock();
}

}  // namespace flashoptim::store
