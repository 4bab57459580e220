// The base class of the optimizers: everything they do; the subclasses (optimizers.h) give it their Options.
#pragma once

#include <torch/optim/optimizer.h>
#include <torch/ordered_dict.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "flashoptim/torch/options.h"
#include "flashoptim/types.h"

namespace flashoptim::torch {

/// What is kept for one parameter: plain tensors on its device, made at its first step.
struct FlashParamState : ::torch::optim::OptimizerCloneableParamState<FlashParamState> {
  int64_t step = 0;  ///< steps taken
  MasterWeights master_weights = MasterWeights::kNone;
  StateCodec state_codec = StateCodec::kFloat32;
  int64_t rows = 0;  ///< rows of the group layout; 0 for empty parameters

  /// int8 or int16, shape and strides of the parameter; 0 elements where master_weights needs none.
  ::torch::Tensor correction;
  /// One per state slot, shape and strides of the parameter: int8 or uint8 codes, or float32.
  std::vector<::torch::Tensor> states;
  /// One per state slot, [rows, groups_per_row]: int16 bit patterns ("default") or float16 ("paper"); 0 elements where
  /// states are float32.
  std::vector<::torch::Tensor> scales;

  void serialize(::torch::serialize::OutputArchive& archive) const override;
  void serialize(::torch::serialize::InputArchive& archive) override;
};

/// Bad arguments and parameters throw c10::Error with a message that names them, and change nothing.
///
/// Parameters: float32, bfloat16 or float16, dense (contiguous, channels_last, transposed ...), leaves, each once.
/// Gradients: the parameter's shape, and its dtype or float32; other strides than the parameter's cost a copy.
class FlashOptimizer : public ::torch::optim::Optimizer {
 public:
  /// One step over all parameters that have a gradient; returns the closure's loss, if there is a closure.
  ::torch::Tensor step(LossClosure closure = nullptr) override;

  /// Hides torch::optim::Optimizer's, which knows only torch's own optimizers and drops the options of others' groups.
  /// Not virtual there: call it on this type.
  void add_param_group(const ::torch::optim::OptimizerParamGroup& group);

  /// Everything but the parameters themselves, bit-exactly; before the first step, too. Parameters are told apart by
  /// their order. load() replaces options and states, or throws and changes nothing.
  void save(::torch::serialize::OutputArchive& archive) const override;
  void load(::torch::serialize::InputArchive& archive) override;

  OptimizerKind kind() const { return kind_; }

  /// Whether `param` is in one of the groups.
  bool holds(const ::torch::Tensor& param) const;
  /// Null before the parameter's first step. `param` must belong to this optimizer.
  const FlashParamState* param_state(const ::torch::Tensor& param) const;
  /// fp32 values of each state by name (exp_avg, ...), in the parameter's shape; empty before its first step.
  ::torch::OrderedDict<std::string, ::torch::Tensor> decoded_state(const ::torch::Tensor& param) const;
  /// The weight that steps continue from, float32: parameter and correction merged.
  ::torch::Tensor fp32_weight(const ::torch::Tensor& param) const;
  /// Sets parameter and correction to the nearest of `weight` (any floating dtype, the parameter's shape).
  void set_fp32_weight(const ::torch::Tensor& param, const ::torch::Tensor& weight);
  /// Corrections, states and scales that exist, those of 0 elements left out.
  std::vector<::torch::Tensor> state_tensors() const;
  /// Elements of gradients that were NaN or infinite, over all steps of this object. Waits for the device.
  int64_t nonfinite_gradients() const;

 protected:
  FlashOptimizer(const std::vector<::torch::optim::OptimizerParamGroup>& groups,
                 std::unique_ptr<FlashOptions> defaults);

 private:
  struct Work;   // a parameter to step
  struct Batch;  // parameters that one call of the operator takes

  /// Where a parameter stands: param_groups()[group].params()[index].
  struct Place {
    size_t group, index;
    std::string str() const;
  };

  FlashOptions& group_options(size_t group);
  std::optional<Place> find_place(const ::torch::Tensor& param) const;
  /// As find_place, for `function`; throws where there is none.
  Place place_of(const char* function, const ::torch::Tensor& param) const;
  FlashParamState* find_state(const ::torch::Tensor& param) const;
  /// Everything that has a gradient, checked; makes states, but stores none.
  std::vector<Work> collect_work();
  std::vector<Batch> make_batches(const std::vector<Work>& works);
  ::torch::Tensor nonfinite_counter(::torch::Device device);

  OptimizerKind kind_;
  std::vector<::torch::Tensor> nonfinite_;  // int64, one element per device used
};

/// FlashOptimizer::state_tensors where `optimizer` is one; none for any other.
std::vector<::torch::Tensor> state_tensors(const ::torch::optim::Optimizer& optimizer);

}  // namespace flashoptim::torch
