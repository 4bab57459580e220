// The base class of the optimizers: everything they do; the subclasses (optimizers.h) give it their Options.
//
// A 16-bit parameter's weight is the parameter plus its correction, and steps continue from both. Weights that are
// written from outside (a copy_() into the parameter, torch::load of the module) keep their correction:
// - swapped out and in again, as an average of weights or a sharpness-aware step does, they come back to the same bits;
// - where they are new weights, the old correction is still added, up to half a spacing of the 16-bit type each. Call
//   reset_corrections() after writing them; or write with set_fp32_weight() or set_fp32_model_state(), which set both.
#pragma once

#include <torch/optim/optimizer.h>
#include <torch/ordered_dict.h>
#include <torch/types.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flashoptim/torch/namespace.h"
#include "flashoptim/torch/numerics.h"
#include "flashoptim/torch/options.h"
#include "flashoptim/types.h"

namespace flashoptim::libtorch {

class GradientRelease;
class ParamStore;
struct LiveOptimizers;

/// What is kept for one parameter: plain tensors on its device, each with memory of its own, made at its first step.
///
/// Every step looks whether they go with the parameter and with the options of its group as these are now. Where they
/// do not (module->to(dtype), cast_model() behind a step, other formats, momentum from 0 to 0.9), they are converted,
/// and a correction is taken along exactly where the parameter's new dtype still holds the old one's digits; where it
/// does not, or where the options keep no correction, TORCH_WARN says so.
struct FlashParamState : ::torch::optim::OptimizerCloneableParamState<FlashParamState> {
  int64_t step = 0;  ///< steps taken; where step_on_device is defined, what they were when it was made
  MasterWeights master_weights = MasterWeights::kNone;
  StateCodec state_codec = StateCodec::kFloat32;
  int64_t rows = 0;  ///< rows of the group layout; 0 for empty parameters
  /// Dtype of the parameter that all this was made for: the correction belongs to weights of it.
  ::torch::Dtype param_dtype = ::torch::kFloat;

  /// int8 or int16, shape and strides of the parameter; 0 elements where master_weights needs none.
  ::torch::Tensor correction;
  /// One per state slot, shape and strides of the parameter: int8 or uint8 codes, or float32.
  std::vector<::torch::Tensor> states;
  /// One per state slot, [leading dimensions, groups of a row]: int16 bit patterns ("default") or float16 ("paper"); 0
  /// elements where states are float32.
  std::vector<::torch::Tensor> scales;
  /// With the option `capturable`, steps taken: int64, one element, on the parameter's device; else undefined.
  ::torch::Tensor step_on_device;

  /// Steps taken, wherever they are counted. Waits for the device where that is the device.
  int64_t steps() const;

  void serialize(::torch::serialize::OutputArchive& archive) const override;
  void serialize(::torch::serialize::InputArchive& archive) override;
};

/// Bad arguments and parameters throw c10::Error with a message that names them, and change nothing.
///
/// Parameters: float32, bfloat16 or float16, leaves, each once, of whatever strides; where elements lie in memory with
/// gaps, or otherwise than they did when the state was made, a step costs a copy of that parameter.
/// Gradients: the parameter's shape, and its dtype or float32; other strides than the parameter's cost a copy.
class FlashOptimizer : public ::torch::optim::Optimizer {
 public:
  /// One step over all parameters that have a gradient; returns the closure's loss, if there is a closure.
  ::torch::Tensor step(LossClosure closure = nullptr) override;

  /// One step of `param` alone, if it has a gradient: for gradients that are freed as soon as they are there (a hook on
  /// the parameter's gradient accumulator). It leaves what step() would, at a cost that does not depend on the number
  /// of parameters. `param` must belong to this optimizer.
  void step_param(const ::torch::Tensor& param);

  /// Hides torch::optim::Optimizer's, which is not virtual and drops options that are not torch's own: call it on this
  /// type. A group that went through torch's can have lost its options: the next step() or save() throws and says so,
  /// until the group is given options by param_groups()[i].set_options() or taken out.
  /// A group that was put into param_groups() by hand keeps its options; what they do not set comes from the defaults.
  void add_param_group(const ::torch::optim::OptimizerParamGroup& group);

  /// Clips the next step to gradients of a total norm of at most `max_norm` (finite, > 0); returns the norm of what
  /// there is: float32, no dimensions. On one CUDA device the norm is one pass over all gradients, in an order that
  /// does not depend on the device, and the next step() multiplies by min(1, max_norm / (norm + 1e-6)) as it reads
  /// them: nothing is written, and the host does not wait. zero_grad() forgets it. Elsewhere (gradients on the CPU or
  /// on several devices, or SGD's groups with and without momentum together) gradients are scaled in place, as
  /// torch::nn::utils::clip_grad_norm_ does. While gradients are released: what their clip= was told
  /// (gradient_release.h).
  ::torch::Tensor clip_grad_norm_(double max_norm);

  /// Hides torch::optim::Optimizer's, which is not virtual: this one also ends the step of gradient release and forgets
  /// what clip_grad_norm_() left.
  void zero_grad(bool set_to_none = true);

  /// With the option `capturable`: steps of param_groups()[group] read their learning rate from `lr`, float32 of one
  /// element on the device of the group's parameters, so that replays of a CUDA graph take what it holds then.
  /// Undefined: from the options again. Archives hold the value.
  void set_lr_tensor(size_t group, const ::torch::Tensor& lr);

  /// Telemetry: on, every step looks at what it will lose to its formats (in a sample of large models), and throws,
  /// with nothing changed, where a learning rate is too small for a weight's precision. It costs steps' time
  /// (docs/numerics.md, "Telemetry").
  void check_numerics(bool on = true);
  /// Waits for the device.
  NumericsReport numerics_report() const;
  void reset_numerics();
  /// The largest weights, which check_numerics() compares learning rates with, are measured anew at the next step.
  void recompute_param_stats();

  /// What parameters and their states take, by group and format, once each has taken a step.
  OptimizerDescription describe() const;
  /// The name that the parameter was given with, or "param_groups[0].params[1]".
  std::string name(const ::torch::Tensor& param) const;

  /// Corrections become 0, and so the weights exactly what the 16-bit parameters hold: all, or those of `params`, each
  /// of which must belong to this optimizer. To be called when new weights were written into parameters.
  void reset_corrections();
  void reset_corrections(const std::vector<::torch::Tensor>& params);

  /// Everything but the parameters themselves, bit-exactly; before the first step, too. Parameters are told apart by
  /// their order. load() replaces options and states, or throws c10::Error that names the entry and changes nothing:
  /// for archives of another optimizer, of other parameters, and for everything that save() does not write or a
  /// checksum does not bear out. Files on a disk: save_archive() and load_archive() (file.h).
  void save(::torch::serialize::OutputArchive& archive) const override;
  void load(::torch::serialize::InputArchive& archive) override;
  /// load() of an archive that was edited on purpose: checksums are not compared, and may be missing. All else is
  /// looked at as closely: what a step could have written is taken, whatever it means.
  void load_unverified(::torch::serialize::InputArchive& archive);

  FlashOptimizer(FlashOptimizer&& other) noexcept;
  FlashOptimizer& operator=(FlashOptimizer&& other) noexcept;
  ~FlashOptimizer() override;

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
  /// The same for several pairs of parameter and weight: all of them, or none where one is refused.
  void set_fp32_weights(const std::vector<std::pair<::torch::Tensor, ::torch::Tensor>>& weights);
  /// Corrections, states and scales that exist, those of 0 elements left out.
  std::vector<::torch::Tensor> state_tensors() const;
  /// Elements of gradients that were NaN or infinite, over all steps of this object. Waits for the device.
  int64_t nonfinite_gradients() const;

 protected:
  FlashOptimizer(const std::vector<::torch::optim::OptimizerParamGroup>& groups,
                 std::unique_ptr<FlashOptions> defaults);

  using NamedParameters = ::torch::OrderedDict<std::string, ::torch::Tensor>;
  /// Patterns and the options that are set on each; those that the patterns of a name set apply, later ones over
  /// earlier ones. Parameters with equal options are one group, in the order in which each first appears.
  using PolicyEntries = std::vector<std::pair<std::string, const FlashOptions*>>;
  FlashOptimizer(const NamedParameters& params, std::unique_ptr<FlashOptions> defaults, const PolicyEntries& policy);

 private:
  friend class GradientRelease;
  friend struct LiveOptimizers;
  friend class ParamStore;
  friend class StateImport;

  /// Where a parameter stands: param_groups()[group].params()[index].
  struct Position {
    size_t group, index;
    std::string str() const;
  };

  /// "FlashAdamW: param_groups[0]."
  std::string group_prefix(size_t group) const;
  /// Options for a group's steps, from its own and, for what those do not set, the defaults; checked. `where` precedes
  /// names in messages.
  std::unique_ptr<FlashOptions> settled_options(const std::string& where,
                                                const ::torch::optim::OptimizerParamGroup& group) const;
  /// Whether the options of param_groups()[group] are settled; throws where they may have been lost.
  bool is_settled(size_t group) const;
  /// Throws unless the options of every group are there and allowed.
  void check_groups() const;
  /// The options of a group, settled in their place where they were not.
  FlashOptions& group_options(size_t group);
  /// Gives the store the options of a group, checked where they have changed.
  void read_group(size_t group);
  std::optional<Position> find_position(const ::torch::Tensor& param) const;
  /// As find_position, for `function`; throws where there is none.
  Position position_of(const char* function, const ::torch::Tensor& param) const;
  FlashParamState* find_state(const ::torch::Tensor& param) const;
  void reset_correction(const ::torch::Tensor& param);
  /// What set_fp32_weight() writes, made before anything is written.
  struct NewWeight;
  NewWeight new_weight(const std::string& where, const ::torch::Tensor& param, const ::torch::Tensor& weight);
  void write(NewWeight weight);
  void load(::torch::serialize::InputArchive& archive, bool verify);
  /// Replaces options (one object a group) and states, all checked: what load() and its kin end with.
  using ReplacedState = std::pair<::torch::Tensor, std::unique_ptr<FlashParamState>>;
  void replace(std::vector<std::unique_ptr<FlashOptions>> options, std::vector<ReplacedState> states);
  void step_released(const ::torch::Tensor& param, const ::torch::Tensor& coefficient);

  OptimizerKind kind_;
  std::unique_ptr<ParamStore> store_;
  std::shared_ptr<GradientRelease> release_;  // null: gradients are not released
  ::torch::Tensor clip_;                      // coefficient for the next step; undefined: none
};

/// FlashOptimizer::state_tensors where `optimizer` is one; none for any other.
std::vector<::torch::Tensor> state_tensors(const ::torch::optim::Optimizer& optimizer);

}  // namespace flashoptim::libtorch

namespace torch {
using ::flashoptim::libtorch::FlashOptimizer;
using ::flashoptim::libtorch::FlashParamState;
using ::flashoptim::libtorch::state_tensors;
}  // namespace torch
