// Types at the public boundary of the torch-free library: element types, choices, hyperparameters and status.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace flashoptim {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

/// Which update rule a step applies. Sgd and Sgdw hold a momentum buffer only where momentum != 0.
enum class OptimizerKind : int32_t { kAdamW = 0, kAdam = 1, kSgd = 2, kSgdw = 3, kLion = 4, kAdEMAMix = 5, kAdopt = 6 };

/// How optimizer states are stored.
enum class StateCodec : int32_t {
  kFloat32 = 0,  ///< fp32, no scales
  kPaper = 1,    ///< the FlashOptim paper's: softsign / sqrt companding, fp16 absmax scales, nearest rounding
  kDefault = 2,  ///< windowed float codes, full range, unbiased rounding (docs/numerics.md)
};

/// How the weight is kept between steps.
enum class MasterWeights : int32_t {
  kNone = 0,                 ///< the parameter alone, rounded to nearest
  kNoneStochastic = 1,       ///< the parameter alone, rounded without bias
  kCorrection8 = 2,          ///< "24 bit": int8 correction per weight, rounded without bias
  kCorrection16 = 3,         ///< "32 bit": int16 correction per weight, rounded without bias
  kCorrection8Nearest = 4,   ///< as the paper: int8 correction, rounded to nearest
  kCorrection16Nearest = 5,  ///< as the paper: int16 correction, rounded to nearest
};

/// Most state slots that a plan holds; an optimizer has state_count() of them (optimizer_info.h).
inline constexpr int kMaxSlots = 4;
inline constexpr int64_t kGroupSize = 32;

/// What one parameter group asks of one step. Plain numbers in double; every back end rounds them to fp32 in one place
/// (core/optimizers). Which fields an optimizer reads, their ranges and their defaults: optimizer_info.h.
struct Hyperparameters {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  double beta3 = 0.9999;
  double alpha = 5.0;
  double momentum = 0.0;
  double dampening = 0.0;
  /// Learning rate that decoupled weight decay is relative to: 0 decays by lr * weight_decay; otherwise by
  /// weight_decay * lr / decay_lr (`decouple_lr`).
  double decay_lr = 0.0;
  /// Steps of warm-ups; 0: none.
  int64_t t_alpha = 0, t_beta3 = 0;
  bool nesterov = false;
  bool maximize = false;
  /// Counts from 1: this step's number, for bias correction, dither and the first momentum.
  int64_t step = 1;
  /// Seed of the dither.
  uint64_t seed = 0;
};

enum class StatusCode : int32_t { kOk = 0, kInvalidArgument = 1, kUnsupported = 2, kDeviceError = 3, kOutOfMemory = 4 };

/// Result of every fallible call: the library neither throws, prints nor exits.
class [[nodiscard]] Status {
 public:
  Status() = default;
  static Status ok() { return {}; }
  static Status invalid_argument(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }
  static Status unsupported(std::string message) { return {StatusCode::kUnsupported, std::move(message)}; }
  static Status device_error(std::string message) { return {StatusCode::kDeviceError, std::move(message)}; }
  static Status out_of_memory(std::string message) { return {StatusCode::kOutOfMemory, std::move(message)}; }

  bool is_ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace flashoptim
