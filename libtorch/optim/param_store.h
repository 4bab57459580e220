// The store behind an optimizer: its parameters as records, and the one way through a step.
//
// At every step the address, dtype, sizes and strides of every tensor of a parameter with a gradient are compared with
// what its record was described with. Where something is not as it was, it is seen to: a state is made, converted or
// left as it is, a parameter or gradient that lies otherwise is copied, and the record is described anew. Then the
// store steps. No tensor is held from step to step: parameters belong to their groups, states to the optimizer.
#pragma once

#include <torch/optim/optimizer.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flashoptim/torch/optimizer.h"
#include "libtorch/optim/param_state.h"
#include "libtorch/optim/telemetry.h"
#include "libtorch/store/store.h"

namespace flashoptim::libtorch {

class ParamStore {
 public:
  using Groups = std::vector<::torch::optim::OptimizerParamGroup>;
  using States = ska::flat_hash_map<void*, std::unique_ptr<::torch::optim::OptimizerParamState>>;

  using Position = FlashOptimizer::Position;

  explicit ParamStore(OptimizerKind kind) : kind_(kind), store_(kind) {}

  /// Makes the parameters of `groups` the records, where they are not yet; throws where one cannot be stepped.
  void follow(const Groups& groups);
  /// The record of a parameter, at a cost that does not depend on their number; -1 where it is none as of follow().
  int64_t find(const Groups& groups, const at::Tensor& param) const;
  Position position(int64_t record) const { return positions_[static_cast<size_t>(record)]; }
  /// Forgets what was described: every record is looked at anew.
  void reset();

  /// Whether read() has seen these values as the group's.
  bool has_read(size_t group, const OptionValues& values) const;
  /// Takes a group's options, which have been checked.
  void read(size_t group, const FlashOptions& options);

  /// A step of everything that has a gradient, multiplied with `clip` (float32, one element; undefined: 1). Nothing has
  /// changed where it throws.
  void step(const Groups& groups, States& states, const at::Tensor& clip);
  /// A step of one record, which has a gradient.
  void step_one(const Groups& groups, States& states, int64_t record, const at::Tensor& clip);
  /// The norm of all gradients, where one CUDA device has them all in one plan, and what the next step is to multiply
  /// them with; undefined elsewhere. States that were not there yet are there then.
  at::Tensor fused_norm(const Groups& groups, States& states, double max_norm, at::Tensor* coefficient);

  /// Where a group's steps read their learning rate; undefined: from its options.
  void set_lr(size_t group, const at::Tensor& lr);
  const at::Tensor& lr(size_t group) const;

  void set_name(const at::Tensor& param, std::string name) { names_[param.unsafeGetTensorImpl()] = std::move(name); }
  /// The name that a parameter was given, or its position.
  std::string label(const at::Tensor& param, Position position) const;

  int64_t nonfinite_gradients() const;
  Telemetry& telemetry() { return telemetry_; }
  /// Starts all counts anew.
  void reset_numerics();

 private:
  /// A group's options as steps take them.
  struct GroupOptions {
    bool is_known = false;
    OptionValues values;
    bool has_momentum = true;
    store::GroupHyperparameters hyper;
  };
  /// A record that takes part in a step.
  struct Taken {
    int64_t record;
    const at::Tensor* param;
    FlashParamState* state;  // null: none yet
    bool is_ready;           // all is as it was described; else it has to be seen to
    const void* gradient;    // where is_ready
    bool is_fresh = false;   // it had no state before
  };
  /// What a step makes for a record. Nobody sees it before the step has been taken.
  struct Made {
    std::unique_ptr<FlashParamState> state;  // new or converted
    at::Tensor values;                       // new ones of the parameter, in another dtype's digits
    at::Tensor before;                       // the parameter's own, once `values` have been written
    at::Tensor weights, gradient;            // copies that lie as the state does
  };
  using Change = std::map<int64_t, Made>;

  const at::Tensor& param(const Groups& groups, int64_t record) const;
  std::string name(int64_t record) const;
  bool is_current(int64_t record, const at::Tensor& param, const FlashParamState* state) const;
  Taken look(const Groups& groups, const States& states, int64_t record) const;
  void see_to(std::vector<Taken>* taken, Change* change);
  void describe(Taken* taken, Made* made);
  std::vector<Taken> with_gradients(const Groups& groups, const States& states) const;
  /// A group's hyperparameters, its learning rate on the device if it is there.
  store::GroupHyperparameters hyper_of(size_t group) const;
  /// Has the steps of `taken` counted where their groups want it.
  void count_steps(const std::vector<Taken>& taken, States& states, bool capturing);
  static store::StepCount count_of(const Taken& one);
  /// Whether a CUDA graph is being captured; throws where these steps cannot be.
  bool is_captured(const std::vector<Taken>& taken) const;
  /// A replay of the step being captured writes to these: they must not be freed before the optimizer is.
  void keep_captured(const std::vector<Taken>& taken, const std::vector<at::Tensor>& read);
  void watch_precision(const Groups& groups, const std::vector<Taken>& taken);
  StepTelemetry* telemetry_of(const Groups& groups, int64_t key, const std::vector<int64_t>& records,
                              at::Device device);
  /// What a step on a device takes beside gradients; `read` keeps the tensors that it reads.
  store::Controls controls(at::Device device, store::Backend backend, const at::Tensor& clip,
                           std::vector<at::Tensor>* read);
  void make_plans();
  /// Behind a step: a state that was made for the record is the optimizer's, and is as it was described.
  void settle(const Taken& one, Made* made, States& states);
  /// A step: what has to be seen to, `plan`, `step`, and what follows it; or nothing, where one of them throws.
  template <class Plan, class Step>
  void run(const Groups& groups, States& states, std::vector<Taken>* taken, const Plan& plan, const Step& step);

  OptimizerKind kind_;
  store::Store store_;
  std::vector<const void*> known_;  // implementations of the records' parameters: compared, never followed
  std::vector<Position> positions_;
  std::unordered_map<const void*, int64_t> index_;
  std::vector<GroupOptions> groups_;
  int64_t elements_ = 0;               // of all parameters
  std::vector<at::Tensor> nonfinite_;  // int64, one element for each device
  std::vector<at::Tensor> lrs_;        // by group
  std::unordered_map<const void*, std::string> names_;
  Telemetry telemetry_;
  std::vector<at::Tensor> captured_;  // what replays of CUDA graphs write to, beside what users hold
};

}  // namespace flashoptim::libtorch
