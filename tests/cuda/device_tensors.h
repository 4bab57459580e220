// Tensors of one configuration twice, for the CPU and for the device, with hostile contents and guard bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "flashoptim/cuda.h"
#include "flashoptim/optimizer_info.h"

#define ASSERT_CUDA(call)                                                          \
  do {                                                                             \
    const cudaError_t error_ = (call);                                             \
    ASSERT_EQ(error_, cudaSuccess) << #call << ": " << cudaGetErrorString(error_); \
  } while (0)
#define EXPECT_OK(call)                                \
  do {                                                 \
    const ::flashoptim::Status status_ = (call);       \
    EXPECT_TRUE(status_.is_ok()) << status_.message(); \
  } while (0)
#define ASSERT_OK(call)                                \
  do {                                                 \
    const ::flashoptim::Status status_ = (call);       \
    ASSERT_TRUE(status_.is_ok()) << status_.message(); \
  } while (0)

namespace flashoptim::cuda_test {

struct Config {
  OptimizerKind optimizer = OptimizerKind::kAdamW;
  bool has_momentum = false;
  StateCodec codec = StateCodec::kDefault;
  DType parameter_dtype = DType::kBFloat16;
  DType gradient_dtype = DType::kBFloat16;
  MasterWeights master = MasterWeights::kCorrection8;
};

inline std::string name(const Config& c) {
  static const char* const kCodecs[] = {"f32", "paper", "default"};
  static const char* const kDTypes[] = {"f32", "bf16", "fp16"};
  static const char* const kMasters[] = {"none", "stochastic", "c8", "c16", "c8nearest", "c16nearest"};
  return std::string(optimizer_name(c.optimizer)) + (c.has_momentum ? "_momentum" : "") + " " +
         kCodecs[static_cast<int>(c.codec)] + " " + kDTypes[static_cast<int>(c.parameter_dtype)] +
         " g=" + kDTypes[static_cast<int>(c.gradient_dtype)] + " " + kMasters[static_cast<int>(c.master)];
}

inline std::vector<Config> all_configs() {
  std::vector<Config> configs;
  const auto add_types = [&configs](Config c) {
    for (const DType gradient : {c.parameter_dtype, DType::kFloat32}) {
      c.gradient_dtype = gradient;
      for (int m = 0; m < 6; ++m) {
        c.master = static_cast<MasterWeights>(m);
        if (c.parameter_dtype == DType::kFloat32 && m > 0) break;
        configs.push_back(c);
      }
      if (c.parameter_dtype == DType::kFloat32) break;
    }
  };
  const auto add_codecs = [&](OptimizerKind optimizer, bool has_momentum) {
    for (const StateCodec codec : {StateCodec::kFloat32, StateCodec::kPaper, StateCodec::kDefault}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        Config c;
        c.optimizer = optimizer;
        c.has_momentum = has_momentum;
        c.codec = codec;
        c.parameter_dtype = dtype;
        add_types(c);
      }
    }
  };
  for (int64_t i = 0; i < optimizer_count(); ++i) {
    const OptimizerKind optimizer = optimizer_at(i);
    const bool has_two_rules = state_count(optimizer, true) != state_count(optimizer, false);
    if (has_two_rules) add_codecs(optimizer, true);
    add_codecs(optimizer, false);
  }
  return configs;
}

/// Hyperparameters that use every term of an optimizer's rule. Counts are of a few steps, what is not named here is at
/// its default.
inline Hyperparameters test_hyper(const Config& c, int64_t step) {
  Hyperparameters h = default_hyperparameters(c.optimizer);
  for (int64_t i = kCommonHyperparameters; i < hyperparameter_count(c.optimizer); ++i) {
    if (hyperparameter(c.optimizer, i).kind == HyperparameterKind::kWhole)
      (void)set_hyperparameter(c.optimizer, i, 5.0, &h);
  }
  h.beta1 = 0.9;
  h.eps = 1e-8;
  h.lr = c.optimizer == OptimizerKind::kLion ? 3e-4 : 2e-3;
  h.beta2 = 0.98;
  h.weight_decay = 0.1;
  h.momentum = c.has_momentum ? 0.9 : 0.0;
  h.dampening = c.has_momentum ? 0.1 : 0.0;
  h.step = step;
  h.seed = 1234567;
  return h;
}

struct Gradients {
  bool hostile = false;  ///< some NaN, infinities, zeros, subnormals, huge values
  float magnitude = 1e-3f;
};

/// Memory of one array on both sides: `bytes` at an offset from an aligned start, guards around it.
class Mirror {
 public:
  static constexpr size_t kGuard = 64;
  Mirror() = default;
  Mirror(size_t bytes, size_t offset)
      : bytes_(bytes), offset_(kGuard + offset), host_(bytes + offset + 2 * kGuard + 16, 0xa5) {
    std::memset(data(), 0, bytes);
    if (cudaMalloc(reinterpret_cast<void**>(&device_), host_.size()) != cudaSuccess) device_ = nullptr;
    to_device();
  }
  ~Mirror() { cudaFree(device_); }
  Mirror(Mirror&& other) noexcept { *this = std::move(other); }
  Mirror& operator=(Mirror&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(offset_, other.offset_);
    std::swap(host_, other.host_);
    std::swap(device_, other.device_);
    return *this;
  }

  size_t size() const { return bytes_; }
  // 64 bytes of guard keep a 16-byte alignment where the offset is 0.
  unsigned char* data() { return aligned() + offset_; }
  unsigned char* device() { return device_ + offset_; }
  bool ok() const { return device_ != nullptr; }
  void to_device() { cudaMemcpy(device_, aligned(), total(), cudaMemcpyHostToDevice); }

  /// Whether the device holds the host's bytes, guards included; `difference` says where not.
  bool same(std::string* difference) {
    std::vector<unsigned char> copy(total());
    if (cudaMemcpy(copy.data(), device_, copy.size(), cudaMemcpyDeviceToHost) != cudaSuccess) {
      *difference = "cannot read the device's memory";
      return false;
    }
    if (std::memcmp(copy.data(), aligned(), copy.size()) == 0) return true;
    size_t at = 0, count = 0;
    for (size_t i = copy.size(); i-- > 0;) {
      if (copy[i] != aligned()[i]) {
        at = i;
        ++count;
      }
    }
    *difference = std::to_string(count) + " bytes differ, the first at " +
                  std::to_string(static_cast<int64_t>(at) - static_cast<int64_t>(offset_)) + " of " +
                  std::to_string(bytes_) + ": host " + std::to_string(aligned()[at]) + ", device " +
                  std::to_string(copy[at]);
    return false;
  }

 private:
  unsigned char* aligned() {
    const uintptr_t start = reinterpret_cast<uintptr_t>(host_.data());
    return host_.data() + (16 - start % 16) % 16;
  }
  size_t total() const { return bytes_ + offset_ + kGuard; }

  size_t bytes_ = 0, offset_ = 0;
  std::vector<unsigned char> host_;
  unsigned char* device_ = nullptr;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// fp32 to a dtype, by the library's own split without correction.
inline void narrow(DType dtype, const float* values, void* out, int64_t count) {
  (void)split_weights(dtype, MasterWeights::kNone, values, out, nullptr, count);
}

/// One tensor on both sides.
class TensorPair {
 public:
  /// `offsets` misaligns every array by so many bytes.
  TensorPair(const Config& config, GroupLayout layout, std::mt19937& random, size_t offset = 0, const Place& place = {})
      : config_(config) {
    const int64_t n = layout.numel();
    const size_t parameter_bytes = config.parameter_dtype == DType::kFloat32 ? 4 : 2;
    const size_t gradient_bytes = config.gradient_dtype == DType::kFloat32 ? 4 : 2;
    size_t correction_bytes = 0;
    if (config.master == MasterWeights::kCorrection8 || config.master == MasterWeights::kCorrection8Nearest)
      correction_bytes = 1;
    if (config.master == MasterWeights::kCorrection16 || config.master == MasterWeights::kCorrection16Nearest)
      correction_bytes = 2;
    const size_t state_bytes = config.codec == StateCodec::kFloat32 ? 4 : 1;
    states_ = state_count(config.optimizer, config.has_momentum);
    const size_t count = static_cast<size_t>(n);
    parameter_ = Mirror(count * parameter_bytes, offset);
    gradient_ = Mirror(count * gradient_bytes, offset);
    if (correction_bytes != 0) correction_ = Mirror(count * correction_bytes, offset);
    for (int k = 0; k < states_; ++k) {
      state_[k] = Mirror(count * state_bytes, offset);
      if (config.codec != StateCodec::kFloat32)
        scale_[k] = Mirror(static_cast<size_t>(layout.groups()) * 2, offset & ~size_t{1});
    }
    host_.layout = layout;
    host_.place = place;
    host_.parameter_dtype = config.parameter_dtype;
    host_.gradient_dtype = config.gradient_dtype;
    host_.master_weights = config.master;
    host_.state_codec = config.codec;
    device_ = host_;
    host_.parameter = parameter_.data();
    host_.gradient = gradient_.data();
    device_.parameter = parameter_.device();
    device_.gradient = gradient_.device();
    if (correction_bytes != 0) {
      host_.correction = correction_.data();
      device_.correction = correction_.device();
    }
    for (int k = 0; k < states_; ++k) {
      host_.states[k] = state_[k].data();
      device_.states[k] = state_[k].device();
      if (config.codec != StateCodec::kFloat32) {
        host_.scales[k] = scale_[k].data();
        device_.scales[k] = scale_[k].device();
      }
    }
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> weights(count);
    for (float& w : weights) w = normal(random);
    (void)split_weights(config.parameter_dtype, config.master, weights.data(), host_.parameter, host_.correction, n);
    parameter_.to_device();
    if (correction_bytes != 0) correction_.to_device();
  }

  const ParameterTensors& host() const { return host_; }
  const ParameterTensors& device() const { return device_; }
  ParameterTensors& host() { return host_; }
  ParameterTensors& device() { return device_; }
  bool ok() const { return host_.layout.numel() == 0 || parameter_.ok(); }

  void new_gradient(std::mt19937& random, const Gradients& kind) {
    const int64_t n = host_.layout.numel();
    std::normal_distribution<float> normal(0.0f, kind.magnitude);
    std::vector<float> g(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      float& x = g[static_cast<size_t>(i)];
      x = normal(random);
      // Groups of their own scale, and zeros.
      if (i / 32 % 5 == 1) x *= bits_to_float((127u - 40u + static_cast<uint32_t>(i) % 60u) << 23);
      if (i / 32 % 7 == 2) x = 0.0f;
      if (kind.hostile && random() % 61 == 0) x = bits_to_float(static_cast<uint32_t>(random()));
      if (kind.hostile && random() % 127 == 0) x = bits_to_float(random() % 2 ? 0x7f800000u : 0xff800000u);
    }
    set_gradient(g);
  }
  void set_gradient(const std::vector<float>& values) {
    narrow(config_.gradient_dtype, values.data(), gradient_.data(), static_cast<int64_t>(values.size()));
    gradient_.to_device();
  }
  void set_weights(const std::vector<float>& values) {
    (void)split_weights(config_.parameter_dtype, config_.master, values.data(), host_.parameter, host_.correction,
                        static_cast<int64_t>(values.size()));
    parameter_.to_device();
    if (host_.correction != nullptr) correction_.to_device();
  }

  /// Empty if both sides hold the same bytes.
  std::string difference() {
    std::string text;
    if (!parameter_.same(&text)) return "parameter: " + text;
    if (host_.correction != nullptr && !correction_.same(&text)) return "correction: " + text;
    for (int k = 0; k < states_; ++k) {
      if (config_.codec != StateCodec::kFloat32 && !scale_[k].same(&text))
        return "scales[" + std::to_string(k) + "]: " + text;
      if (!state_[k].same(&text)) return "states[" + std::to_string(k) + "]: " + text;
    }
    if (!gradient_.same(&text)) return "gradient: " + text;
    return "";
  }

 private:
  Config config_;
  int states_ = 0;
  ParameterTensors host_, device_;
  Mirror parameter_, gradient_, correction_, state_[kMaxSlots], scale_[kMaxSlots];
};

/// Several tensors and a plan on each side.
class PlanPair {
 public:
  explicit PlanPair(const Config& config) : config_(config), random_(42) {}

  void add(GroupLayout layout, size_t offset = 0, int64_t first_element = 0) {
    add(config_, layout, offset, first_element);
  }
  void add(const Config& config, GroupLayout layout, size_t offset = 0, int64_t first_element = 0) {
    add(config, layout, offset, Place{first_element, 0, 0, {}});
  }
  void add(const Config& config, GroupLayout layout, size_t offset, const Place& place) {
    tensors_.emplace_back(config, layout, random_, offset, place);
  }
  TensorPair& tensor(size_t i) { return tensors_[i]; }
  size_t size() const { return tensors_.size(); }

  Status make() {
    std::vector<ParameterTensors> host, device;
    for (const TensorPair& t : tensors_) {
      if (!t.ok()) return Status::device_error("cudaMalloc failed");
      host.push_back(t.host());
      device.push_back(t.device());
    }
    Status status =
        Plan::make(config_.optimizer, config_.has_momentum, host.data(), static_cast<int64_t>(host.size()), &cpu_);
    if (!status.is_ok()) return status;
    return cuda::Plan::make(config_.optimizer, config_.has_momentum, device.data(), static_cast<int64_t>(device.size()),
                            0, &cuda_);
  }

  void new_gradients(const Gradients& kind) {
    for (TensorPair& t : tensors_) t.new_gradient(random_, kind);
  }

  /// Empty if everything agrees.
  std::string difference() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const std::string text = tensors_[i].difference();
      if (!text.empty()) {
        const GroupLayout& l = tensors_[i].host().layout;
        return "tensor " + std::to_string(i) + " (" + std::to_string(l.rows) + " x " + std::to_string(l.row_size) +
               ") " + text;
      }
    }
    return "";
  }

  Plan& cpu() { return cpu_; }
  cuda::Plan& cuda() { return cuda_; }
  std::mt19937& random() { return random_; }

 private:
  Config config_;
  std::mt19937 random_;
  std::vector<TensorPair> tensors_;
  Plan cpu_;
  cuda::Plan cuda_;
};

/// A counter or factor in device memory.
template <class T>
class DeviceValue {
 public:
  explicit DeviceValue(T value) {
    (void)cudaMalloc(reinterpret_cast<void**>(&pointer_), sizeof(T));
    set(value);
  }
  ~DeviceValue() { cudaFree(pointer_); }
  DeviceValue(const DeviceValue&) = delete;
  DeviceValue& operator=(const DeviceValue&) = delete;
  void set(T value) { cudaMemcpy(pointer_, &value, sizeof value, cudaMemcpyHostToDevice); }
  T get() const {
    T value{};
    cudaMemcpy(&value, pointer_, sizeof value, cudaMemcpyDeviceToHost);
    return value;
  }
  T* pointer() const { return pointer_; }

 private:
  T* pointer_ = nullptr;
};

}  // namespace flashoptim::cuda_test
