// Tensors for whole steps: every array in storage of its own between guard bytes, at any alignment.
#pragma once

#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "flashoptim/core/optimizer_list.h"
#include "flashoptim/optimizer_info.h"
#include "flashoptim/step.h"
#include "tests/core/reference_formats.h"
#include "tests/core/test_support.h"

namespace flashoptim::test {

/// What core/optimizer_list.h calls a rule, and how the public interface asks for it.
struct OptimizerChoice {
  const char* name;
  OptimizerKind kind;
  bool has_momentum;
  int states;  ///< slots it has
};
#define FLASHOPTIM_CHOICE(name) \
  {#name, core::name::kKind, !core::kIsWithoutMomentum<core::name>, core::name::kSlotCount},
inline constexpr OptimizerChoice kOptimizers[] = {FLASHOPTIM_FOR_EACH_RULE(FLASHOPTIM_CHOICE)};
#undef FLASHOPTIM_CHOICE

struct Storage {
  DType dtype;
  DType gradient_dtype;
  MasterWeights master;
};

/// Every combination that Plan::make accepts.
inline std::vector<Storage> all_storages() {
  std::vector<Storage> all{{DType::kFloat32, DType::kFloat32, MasterWeights::kNone}};
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (DType gradient : {dtype, DType::kFloat32}) {
      for (int m = 0; m < 6; ++m) all.push_back({dtype, gradient, static_cast<MasterWeights>(m)});
    }
  }
  return all;
}

inline constexpr StateCodec kCodecs[] = {StateCodec::kFloat32, StateCodec::kPaper, StateCodec::kDefault};

inline std::string describe(const OptimizerChoice& o, StateCodec codec, const Storage& s) {
  static const char* const kDTypeNames[] = {"float32", "bfloat16", "float16"};
  static const char* const kCodecNames[] = {"float32", "paper", "default"};
  return std::string(o.name) + " codec " + kCodecNames[static_cast<int>(codec)] + " parameter " +
         kDTypeNames[static_cast<int>(s.dtype)] + " gradient " + kDTypeNames[static_cast<int>(s.gradient_dtype)] +
         " master " + std::to_string(static_cast<int>(s.master));
}

/// Hyperparameters with which no term of any optimizer vanishes: of what is not named here, averages forget within a
/// few steps, counts are of a few.
inline Hyperparameters busy_hyperparameters(int64_t step) {
  Hyperparameters h;
  for (const OptimizerChoice& o : kOptimizers) {
    for (int64_t i = kCommonHyperparameters; i < hyperparameter_count(o.kind); ++i) {
      const HyperparameterInfo info = hyperparameter(o.kind, i);
      if (info.kind == HyperparameterKind::kFlag) continue;
      const double value = info.kind == HyperparameterKind::kWhole ? 9.0 : info.highest == 1.0 ? 0.9375 : 1.625;
      (void)set_hyperparameter(o.kind, i, value, &h);
    }
  }
  h.lr = 0.013;
  h.beta1 = 0.87;
  h.beta2 = 0.983;
  h.eps = 1e-3;
  h.weight_decay = 0.11;
  h.momentum = 0.79;
  h.dampening = 0.23;
  h.step = step;
  h.seed = 42;
  return h;
}

/// The address of array `number`, 1 to 15, of a tensor that is not touched: no array of one reaches another's.
inline void* far_apart(int number) { return reinterpret_cast<void*>(static_cast<uintptr_t>(number) << 60); }

/// fp32 values of every slot that there may be, as the conversions take them.
struct SlotValues {
  std::vector<float> slots[kMaxSlots];
  float* pointers[kMaxSlots];

  explicit SlotValues(size_t count) {
    for (int k = 0; k < kMaxSlots; ++k) {
      slots[k].resize(count);
      pointers[k] = slots[k].data();
    }
  }
  SlotValues(const SlotValues&) = delete;
};

inline uint32_t to_narrow(DType dtype, float value) {
  return (dtype == DType::kBFloat16 ? kReferenceBFloat16 : kReferenceFloat16).encode(bits_of(value));
}

/// Elements between 64 guard bytes on each side, `shift` elements off a 64-byte boundary.
class GuardedArray {
 public:
  GuardedArray() = default;
  GuardedArray(int64_t count, int64_t element_size, int64_t shift)
      : begin_(64 + shift * element_size), bytes_(count * element_size) {
    storage_.assign(static_cast<size_t>(begin_ + bytes_ + 64 + 64), kGuard);
    begin_ += static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(storage_.data()) % 64) % 64);
    std::memset(data(), 0, static_cast<size_t>(bytes_));
  }
  unsigned char* data() { return storage_.data() + begin_; }
  const unsigned char* data() const { return storage_.data() + begin_; }
  int64_t bytes() const { return bytes_; }
  bool guards_intact() const {
    for (size_t i = 0; i < storage_.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i) - begin_;
      if ((at < 0 || at >= bytes_) && storage_[i] != kGuard) return false;
    }
    return true;
  }
  void append_to(std::vector<unsigned char>& out) const { out.insert(out.end(), data(), data() + bytes_); }

 private:
  static constexpr unsigned char kGuard = 0xa5;
  std::vector<unsigned char> storage_;
  int64_t begin_ = 0, bytes_ = 0;
};

/// Bytes per element of a tensor's arrays.
struct ElementSizesOf {
  int64_t parameter, gradient, correction, state;
};
inline ElementSizesOf element_sizes_of(const ParameterTensors& t) {
  const int m = static_cast<int>(t.master_weights);
  const bool eight =
      m == static_cast<int>(MasterWeights::kCorrection8) || m == static_cast<int>(MasterWeights::kCorrection8Nearest);
  return {t.parameter_dtype == DType::kFloat32 ? 4 : 2, t.gradient_dtype == DType::kFloat32 ? 4 : 2,
          m < 2   ? 0
          : eight ? 1
                  : 2,
          t.state_codec == StateCodec::kFloat32 ? 4 : 1};
}

/// kRarelyHostile: so seldom that most blocks have none; and weights, too.
enum class Gradients { kOrdinary, kHostile, kRarelyHostile };

/// One parameter with everything it has; values depend on `seed` alone, never on alignment.
class TestTensor {
 public:
  TestTensor(const OptimizerChoice& optimizer, StateCodec codec, const Storage& storage, std::vector<int64_t> sizes,
             uint64_t seed, int64_t shift = 0, Gradients gradients = Gradients::kOrdinary) {
    Random random(seed);
    t_.layout = group_layout(sizes.data(), static_cast<int64_t>(sizes.size()));
    t_.parameter_dtype = storage.dtype;
    t_.gradient_dtype = storage.gradient_dtype;
    t_.master_weights = storage.master;
    t_.state_codec = codec;
    const int64_t count = t_.layout.numel();
    parameter_ = GuardedArray(count, storage.dtype == DType::kFloat32 ? 4 : 2, shift);
    const float hostile[] = {0.0f,     -0.0f,        0x1p-149f, -0x1p-130f, 0x1p-126f, 1e-30f,
                             0x1p-64f, -0x1.ffp-64f, 0x1p-63f,  1e30f,      0x1p65f,   0x1.fcp64f,
                             3.0e38f,  NAN,          INFINITY,  -INFINITY,  65504.0f,  6e-8f};
    for (int64_t i = 0; i < count; ++i) {
      float w = static_cast<float>(random.normal() * 0.3);
      if (gradients == Gradients::kRarelyHostile && random.below(700) == 0)
        w = hostile[random.below(std::size(hostile))];
      put(parameter_, storage.dtype, i, w);
    }
    t_.parameter = parameter_.data();
    const int correction = correction_bits();
    correction_ = GuardedArray(count, correction / 8, shift);
    for (int64_t i = 0; i < count; ++i) {
      if (correction == 8) correction_.data()[i] = static_cast<unsigned char>(random.below(255) + 129u);
      if (correction == 16) {
        const int16_t c = static_cast<int16_t>(static_cast<int>(random.below(65535)) - 32767);
        std::memcpy(correction_.data() + 2 * i, &c, 2);
      }
    }
    t_.correction = correction == 0 ? nullptr : correction_.data();
    for (int k = 0; k < optimizer.states; ++k) {
      states_[k] = GuardedArray(count, codec == StateCodec::kFloat32 ? 4 : 1, shift);
      scales_[k] = GuardedArray(codec == StateCodec::kFloat32 ? 0 : t_.layout.groups(), 2, shift);
      t_.states[k] = states_[k].data();
      t_.scales[k] = codec == StateCodec::kFloat32 ? nullptr : scales_[k].data();
    }
    make_gradients(random, count, shift, gradients);
    set_step(0);
  }
  TestTensor(const TestTensor&) = delete;

  /// Other rows of the same elements, and scales for them.
  void set_layout(const OptimizerChoice& optimizer, const GroupLayout& layout) {
    t_.layout = layout;
    for (int k = 0; k < optimizer.states && t_.scales[k] != nullptr; ++k) {
      scales_[k] = GuardedArray(layout.groups(), 2, 0);
      t_.scales[k] = scales_[k].data();
    }
  }

  const ParameterTensors& tensors() const { return t_; }
  ParameterTensors& tensors() { return t_; }
  int64_t numel() const { return t_.layout.numel(); }
  int correction_bits() const {
    switch (t_.master_weights) {
      case MasterWeights::kCorrection8:
      case MasterWeights::kCorrection8Nearest:
        return 8;
      case MasterWeights::kCorrection16:
      case MasterWeights::kCorrection16Nearest:
        return 16;
      default:
        return 0;
    }
  }

  /// Chooses the gradient of a step: the pool from another place, so that no two neighbouring steps agree.
  void set_step(int64_t step) {
    offset_ = step * 37 % kPool;
    t_.gradient = gradient_.data() + offset_ * gradient_size();
  }
  float gradient_at(int64_t i) const { return get(gradient_, t_.gradient_dtype, i + offset_); }
  GuardedArray& gradient() { return gradient_; }
  float parameter_at(int64_t i) const { return get(parameter_, t_.parameter_dtype, i); }

  /// n + (c / N) h in double; the parameter alone without a correction.
  double weight_at(int64_t i) const {
    if (t_.parameter_dtype == DType::kFloat32) return get(parameter_, DType::kFloat32, i);
    const ReferenceFormat& format = narrow_format();
    const uint32_t n = narrow_at(i);
    return format.decode(n) +
           (correction_bits() == 0 ? 0.0 : format.half_ulp(n) * correction_at(i) / largest_correction());
  }
  const ReferenceFormat& narrow_format() const {
    return t_.parameter_dtype == DType::kBFloat16 ? kReferenceBFloat16 : kReferenceFloat16;
  }
  uint32_t narrow_at(int64_t i) const {
    uint16_t bits;
    std::memcpy(&bits, parameter_.data() + 2 * i, 2);
    return bits;
  }
  int correction_at(int64_t i) const {
    if (correction_bits() == 8) return static_cast<int8_t>(correction_.data()[i]);
    int16_t c;
    std::memcpy(&c, correction_.data() + 2 * i, 2);
    return c;
  }
  double largest_correction() const { return correction_bits() == 8 ? 127.0 : 32767.0; }
  uint16_t scale_at(int slot, int64_t group) const {
    uint16_t header;
    std::memcpy(&header, scales_[slot].data() + 2 * group, 2);
    return header;
  }

  bool guards_intact() const {
    bool intact = parameter_.guards_intact() && correction_.guards_intact() && gradient_.guards_intact();
    for (int k = 0; k < kMaxSlots; ++k) intact = intact && states_[k].guards_intact() && scales_[k].guards_intact();
    return intact;
  }
  /// Everything that a step writes.
  void append_to(std::vector<unsigned char>& out) const {
    for (const GuardedArray* a : {&parameter_, &correction_}) a->append_to(out);
    for (const GuardedArray& a : states_) a.append_to(out);
    for (const GuardedArray& a : scales_) a.append_to(out);
  }
  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> out;
    append_to(out);
    return out;
  }

 private:
  static constexpr int64_t kPool = 128;

  int64_t gradient_size() const { return t_.gradient_dtype == DType::kFloat32 ? 4 : 2; }

  static void put(GuardedArray& array, DType dtype, int64_t i, float value) {
    if (dtype == DType::kFloat32) {
      std::memcpy(array.data() + 4 * i, &value, 4);
    } else {
      const uint16_t bits = static_cast<uint16_t>(to_narrow(dtype, value));
      std::memcpy(array.data() + 2 * i, &bits, 2);
    }
  }
  static float get(const GuardedArray& array, DType dtype, int64_t i) {
    if (dtype == DType::kFloat32) {
      float value;
      std::memcpy(&value, array.data() + 4 * i, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, array.data() + 2 * i, 2);
    return static_cast<float>((dtype == DType::kBFloat16 ? kReferenceBFloat16 : kReferenceFloat16).decode(bits));
  }

  void make_gradients(Random& random, int64_t count, int64_t shift, Gradients kind) {
    gradient_ = GuardedArray(count + kPool, gradient_size(), shift);
    const float hostile[] = {NAN,     INFINITY, -INFINITY, -0.0f,  0x1p-149f, -0x1p-140f,
                             3.0e38f, -3.0e38f, 65504.0f,  1e-20f, 1e20f};
    for (int64_t i = 0; i < count + kPool; ++i) {
      const uint64_t what = random.below(16);
      // Mostly one scale; zeros; and a spread of ten decades.
      double g = random.normal() * 0.02;
      if (what == 0) g = 0.0;
      if (what == 1) g *= std::pow(10.0, 4.0 - 10.0 * random.uniform());
      put(gradient_, t_.gradient_dtype, i, static_cast<float>(g));
      if ((kind == Gradients::kHostile && random.below(24) == 0) ||
          (kind == Gradients::kRarelyHostile && random.below(5000) == 0))
        put(gradient_, t_.gradient_dtype, i, hostile[random.below(11)]);
    }
  }

  ParameterTensors t_;
  GuardedArray parameter_, correction_, gradient_, states_[kMaxSlots], scales_[kMaxSlots];
  int64_t offset_ = 0;
};

/// What PyTorch's optimizers have without arguments, but for weight decay and momentum.
inline Hyperparameters default_hyperparameters(int64_t step) {
  Hyperparameters h;
  h.lr = 1e-3;
  h.weight_decay = 0.01;
  h.momentum = 0.9;
  h.step = step;
  return h;
}
/// Nothing moves.
inline Hyperparameters frozen_hyperparameters(int64_t step) {
  Hyperparameters h = default_hyperparameters(step);
  h.lr = 0.0;
  return h;
}

/// A plan over tensors that it does not own, stepped with changing gradients.
inline Status run_steps(const OptimizerChoice& optimizer, const std::vector<std::unique_ptr<TestTensor>>& tensors,
                        int64_t first_step, int64_t steps, const StepOptions& options = {},
                        Hyperparameters (*hyperparameters)(int64_t) = busy_hyperparameters) {
  std::vector<ParameterTensors> list;
  for (const auto& t : tensors) list.push_back(t->tensors());
  Plan plan;
  Status status =
      Plan::make(optimizer.kind, optimizer.has_momentum, list.data(), static_cast<int64_t>(list.size()), &plan);
  for (int64_t s = first_step; status.is_ok() && s < first_step + steps; ++s) {
    for (size_t i = 0; i < tensors.size() && status.is_ok(); ++i) {
      tensors[i]->set_step(s);
      status = plan.set_gradient(static_cast<int64_t>(i), tensors[i]->tensors().gradient);
    }
    const Hyperparameters hyper = hyperparameters(s);
    if (status.is_ok()) status = plan.step(&hyper, 1, options);
  }
  return status;
}

}  // namespace flashoptim::test
