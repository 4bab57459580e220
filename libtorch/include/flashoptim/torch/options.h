// Options of the optimizers, in the style of torch::optim: FlashAdamWOptions(1e-3).weight_decay(0.1).
//
// Options remember what was set on them: a group's take from the optimizer's defaults only what was not, and keep a
// value that happens to be a new object's. Set is what went through a setter, the constructor, set_lr() of the base
// class, or the mutable getter: options.lr() = x. That one hands out a reference and cannot see what is done with it,
// so reading through it, too, counts as setting the value that was read; where that is not meant, read through a const
// object or values(). The memory goes with copies, clones and archives. In an optimizer's group every option counts as
// set: those are the values that steps use, and they come along where the group is given to another optimizer.
#pragma once

#include <torch/optim/optimizer.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>

#include "flashoptim/torch/namespace.h"
#include "flashoptim/types.h"

namespace flashoptim::libtorch {

using Betas = std::tuple<double, double>;

/// The values behind the Options structs. Each of those shows the ones that its optimizer reads; what a rule reads
/// (core/optimizers) has the rule's name here, and its default and range from there. beta1 and beta2 are `betas`.
struct OptionValues {
  double lr = 1e-3;                     ///< finite, >= 0
  Betas betas{0.9, 0.999};              ///< each >= 0 and < 1
  double eps = 1e-8;                    ///< finite, >= 0
  double weight_decay = 0;              ///< finite, >= 0; decoupled in AdamW, SGDW, Lion, coupled (L2) in Adam, SGD
  double momentum = 0;                  ///< finite, >= 0; 0 keeps no momentum buffer
  double dampening = 0;                 ///< finite
  bool nesterov = false;                ///< needs momentum > 0 and dampening == 0
  bool maximize = false;                ///< steps along the gradient instead of against it
  bool decouple_lr = false;             ///< decay by weight_decay * lr / initial_lr instead of weight_decay * lr
  double initial_lr = 0;                ///< what decouple_lr is relative to; 0: the group's lr when it is added
  int64_t master_weight_bits = 24;      ///< 0 (the parameter alone), 24 or 32; float32 parameters need and get none
  std::string state_codec = "default";  ///< "default" or "paper"
  bool quantize = true;                 ///< false: states in fp32
  int64_t min_quantized_numel = 4096;   ///< smaller parameters keep fp32 states; >= 0, 0 quantizes everything
  bool stochastic_rounding = false;     ///< needs master_weight_bits 0: 16-bit parameters are rounded without bias
  double beta3 = 0.9999;                ///< of the slow average, >= 0 and < 1
  double alpha = 5;                     ///< share of the slow average in an update; finite, >= 0
  int64_t t_alpha = 0;                  ///< steps in which alpha grows to its value; 0: it has it
  int64_t t_beta3 = 0;                  ///< steps in which beta3 grows from beta1; 0: it has its value
  int64_t seed = 0;                     ///< of the dither and of stochastic rounding; >= 0 and < 2^53
  bool capturable = false;              ///< steps are counted on the device, so that CUDA graphs can replay them

  bool operator==(const OptionValues&) const = default;
};

/// Calls f(index, name, member pointer) for every option.
template <class F>
constexpr void for_each_option(F&& f) {
  int index = 0;
  const auto visit = [&](const char* name, auto member) { f(index++, name, member); };
  visit("lr", &OptionValues::lr);
  visit("betas", &OptionValues::betas);
  visit("eps", &OptionValues::eps);
  visit("weight_decay", &OptionValues::weight_decay);
  visit("momentum", &OptionValues::momentum);
  visit("dampening", &OptionValues::dampening);
  visit("nesterov", &OptionValues::nesterov);
  visit("maximize", &OptionValues::maximize);
  visit("decouple_lr", &OptionValues::decouple_lr);
  visit("initial_lr", &OptionValues::initial_lr);
  visit("master_weight_bits", &OptionValues::master_weight_bits);
  visit("state_codec", &OptionValues::state_codec);
  visit("quantize", &OptionValues::quantize);
  visit("min_quantized_numel", &OptionValues::min_quantized_numel);
  visit("stochastic_rounding", &OptionValues::stochastic_rounding);
  visit("seed", &OptionValues::seed);
  visit("beta3", &OptionValues::beta3);
  visit("alpha", &OptionValues::alpha);
  visit("t_alpha", &OptionValues::t_alpha);
  visit("t_beta3", &OptionValues::t_beta3);
  visit("capturable", &OptionValues::capturable);
}

/// The option's place in for_each_option; an unknown name does not compile.
consteval int option_index(std::string_view name) {
  int found = -1;
  for_each_option([&](int index, const char* option, auto) { found = name == option ? index : found; });
  if (found < 0) throw "no option has this name";
  return found;
}

/// Base of all Options. Parameter groups hold them through torch::optim::OptimizerOptions, so learning-rate schedulers
/// of torch::optim work. A group's options inherit from the optimizer's what was not set on them.
class FlashOptions : public ::torch::optim::OptimizerOptions {
 public:
  OptimizerKind kind() const { return kind_; }
  const OptionValues& values() const { return values_; }

  double get_lr() const override { return values_.lr; }
  void set_lr(double lr) override {
    mark_set<option_index("lr")>();
    values_.lr = lr;
  }

  /// What a step takes by the name that the optimizer's rule gives it (optimizer_info.h): "lr", "beta1", "eps", "seed";
  /// a flag as 0 or 1. For programs that read names and numbers from elsewhere. Throws c10::Error for another name.
  double number(std::string_view name) const;
  /// Sets it, which counts as setting the option; its range is looked at by check(). Throws c10::Error for another name
  /// and for what the option's type cannot hold: 0.5 for a flag or a count.
  void set_number(std::string_view name, double value);

  /// Whether the option was set. Throws c10::Error for a name that no optimizer has.
  bool is_set(std::string_view name) const;

  /// Writes and reads every value, bit-exactly, and which of them were set; an archive that does not say: all. Throws
  /// c10::Error that names the option, with none read, where one is missing or of another type; ranges are check()'s.
  void serialize(::torch::serialize::OutputArchive& archive) const override;
  void serialize(::torch::serialize::InputArchive& archive) override;

  /// Throws c10::Error naming option, value and what is allowed. `where` precedes the option's name in the message.
  void check(const std::string& where) const;

  /// Takes every value from `defaults` that was not set here; counts none of them as set.
  void inherit(const FlashOptions& defaults);

  /// Takes what was set on `other`, an object of the same optimizer, which counts as set here, too.
  void adopt(const FlashOptions& other);
  /// Whether the same options were set, to the same values.
  bool sets_the_same(const FlashOptions& other) const { return set_ == other.set_ && values_ == other.values_; }

  /// Whether steps keep a momentum buffer or moments.
  bool has_momentum() const;

 protected:
  explicit FlashOptions(OptimizerKind kind);

  template <int index>
  void mark_set() noexcept {
    set_ |= uint32_t{1} << index;
  }
  OptionValues values_;

 private:
  /// What an object stands for; its copies and clones, too. Assigning gives an object other values but leaves it what
  /// it is, except that those of a group are then to be settled again.
  struct Role {
    enum Kind : uint8_t {
      kGiven,     // a user's
      kDefaults,  // an optimizer's defaults
      kGroup      // a group's, with every value settled by FlashOptimizer
    } kind = kGiven;

    Role() = default;
    Role(const Role&) = default;
    Role& operator=(const Role&) {
      if (kind == kGroup) kind = kGiven;
      return *this;
    }
  };

  /// Every option counts as set, and the object as a group's.
  void settle();
  /// As check, and initial_lr must be there where it is needed.
  void check_settled(const std::string& where) const;

  OptimizerKind kind_;
  Role role_;
  uint32_t set_ = 0;  // bit per option, in the order of for_each_option
  friend class FlashOptimizer;
  friend class StateImport;
};

/// As TORCH_ARG: a chaining setter, a getter and a mutable getter, which counts as setting.
#define FLASHOPTIM_OPTION(T, name)                        \
  auto name(const T& value) -> decltype(*this) {          \
    this->name() = value;                                 \
    return *this;                                         \
  }                                                       \
  const T& name() const noexcept { return values_.name; } \
  T& name() noexcept {                                    \
    mark_set<option_index(#name)>();                      \
    return values_.name;                                  \
  }

#define FLASHOPTIM_COMMON_OPTIONS(Options)                                                         \
  Options() : FlashOptions(kKind) {}                                                               \
  Options(double new_lr) : FlashOptions(kKind) { lr(new_lr); } /* NOLINT: implicit, as in torch */ \
  std::unique_ptr<::torch::optim::OptimizerOptions> clone() const override {                       \
    return std::make_unique<Options>(*this);                                                       \
  }                                                                                                \
  FLASHOPTIM_OPTION(double, lr)                                                                    \
  FLASHOPTIM_OPTION(double, weight_decay)                                                          \
  FLASHOPTIM_OPTION(bool, maximize)                                                                \
  FLASHOPTIM_OPTION(int64_t, master_weight_bits)                                                   \
  FLASHOPTIM_OPTION(std::string, state_codec)                                                      \
  FLASHOPTIM_OPTION(bool, quantize)                                                                \
  FLASHOPTIM_OPTION(int64_t, min_quantized_numel)                                                  \
  FLASHOPTIM_OPTION(bool, stochastic_rounding)                                                     \
  FLASHOPTIM_OPTION(bool, capturable)                                                              \
  FLASHOPTIM_OPTION(int64_t, seed)

/// Adam with decoupled weight decay.
/// Defaults: lr 1e-3, betas (0.9, 0.999), eps 1e-8, weight_decay 1e-2.
struct FlashAdamWOptions final : FlashOptions {
  static constexpr OptimizerKind kKind = OptimizerKind::kAdamW;
  FLASHOPTIM_COMMON_OPTIONS(FlashAdamWOptions)
  FLASHOPTIM_OPTION(Betas, betas)
  FLASHOPTIM_OPTION(double, eps)
  FLASHOPTIM_OPTION(bool, decouple_lr)
  FLASHOPTIM_OPTION(double, initial_lr)
};

/// Adam with L2 regularization.
/// Defaults: lr 1e-3, betas (0.9, 0.999), eps 1e-8, weight_decay 0 (L2).
struct FlashAdamOptions final : FlashOptions {
  static constexpr OptimizerKind kKind = OptimizerKind::kAdam;
  FLASHOPTIM_COMMON_OPTIONS(FlashAdamOptions)
  FLASHOPTIM_OPTION(Betas, betas)
  FLASHOPTIM_OPTION(double, eps)
};

/// SGD with momentum, dampening, Nesterov momentum and L2 regularization.
/// Defaults: lr 1e-3, momentum 0, dampening 0, weight_decay 0 (L2), nesterov false.
struct FlashSGDOptions final : FlashOptions {
  static constexpr OptimizerKind kKind = OptimizerKind::kSgd;
  FLASHOPTIM_COMMON_OPTIONS(FlashSGDOptions)
  FLASHOPTIM_OPTION(double, momentum)
  FLASHOPTIM_OPTION(double, dampening)
  FLASHOPTIM_OPTION(bool, nesterov)
};

/// SGD with decoupled weight decay.
/// Defaults: lr 1e-3, momentum 0, dampening 0, weight_decay 0 (decoupled), nesterov false.
struct FlashSGDWOptions final : FlashOptions {
  static constexpr OptimizerKind kKind = OptimizerKind::kSgdw;
  FLASHOPTIM_COMMON_OPTIONS(FlashSGDWOptions)
  FLASHOPTIM_OPTION(double, momentum)
  FLASHOPTIM_OPTION(double, dampening)
  FLASHOPTIM_OPTION(bool, nesterov)
  FLASHOPTIM_OPTION(bool, decouple_lr)
  FLASHOPTIM_OPTION(double, initial_lr)
};

/// Lion (sign of interpolated momentum) with decoupled weight decay.
/// Defaults: betas (0.9, 0.99), weight_decay 0 (decoupled).
struct FlashLionOptions final : FlashOptions {
  static constexpr OptimizerKind kKind = OptimizerKind::kLion;
  FLASHOPTIM_COMMON_OPTIONS(FlashLionOptions)
  FLASHOPTIM_OPTION(Betas, betas)
  FLASHOPTIM_OPTION(bool, decouple_lr)
  FLASHOPTIM_OPTION(double, initial_lr)
};

/// AdEMAMix (Pagliardini et al. 2024): Adam with a slow second average. The paper warms alpha and beta3 up over the
/// run. Defaults: betas (0.9, 0.999), beta3 0.9999, alpha 5, no warm-ups, eps 1e-8, weight_decay 1e-2 (decoupled).
struct FlashAdEMAMixOptions final : FlashOptions {
  static constexpr OptimizerKind kKind = OptimizerKind::kAdEMAMix;
  FLASHOPTIM_COMMON_OPTIONS(FlashAdEMAMixOptions)
  FLASHOPTIM_OPTION(Betas, betas)
  FLASHOPTIM_OPTION(double, beta3)
  FLASHOPTIM_OPTION(double, alpha)
  FLASHOPTIM_OPTION(int64_t, t_alpha)
  FLASHOPTIM_OPTION(int64_t, t_beta3)
  FLASHOPTIM_OPTION(double, eps)
  FLASHOPTIM_OPTION(bool, decouple_lr)
  FLASHOPTIM_OPTION(double, initial_lr)
};

/// ADOPT (Taniguchi et al. 2024), clipped. The first step makes the variance and moves no weight.
/// Defaults: betas (0.9, 0.9999), eps 1e-6, weight_decay 0 (decoupled).
struct FlashADOPTOptions final : FlashOptions {
  static constexpr OptimizerKind kKind = OptimizerKind::kAdopt;
  FLASHOPTIM_COMMON_OPTIONS(FlashADOPTOptions)
  FLASHOPTIM_OPTION(Betas, betas)
  FLASHOPTIM_OPTION(double, eps)
  FLASHOPTIM_OPTION(bool, decouple_lr)
  FLASHOPTIM_OPTION(double, initial_lr)
};

#undef FLASHOPTIM_COMMON_OPTIONS
#undef FLASHOPTIM_OPTION

/// X(name) for every optimizer: its options are Flash<name>Options, its class Flash<name>, both in flashoptim::libtorch
/// and in torch.
#define FLASHOPTIM_FOR_EACH_OPTIMIZER(X) \
  X(AdamW)                               \
  X(Adam)                                \
  X(SGD)                                 \
  X(SGDW)                                \
  X(Lion)                                \
  X(AdEMAMix)                            \
  X(ADOPT)

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::FlashOptions;
#define FLASHOPTIM_OPTIONS(name) using ::flashoptim::libtorch::Flash##name##Options;
FLASHOPTIM_FOR_EACH_OPTIMIZER(FLASHOPTIM_OPTIONS)
#undef FLASHOPTIM_OPTIONS
}  // namespace torch
