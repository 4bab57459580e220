#include "libtorch/optim/operators.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <array>
#include <sstream>

extern "C" int flashoptim_ops_version();

namespace flashoptim::libtorch::operators {
namespace {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  // Naming a symbol of the operators' library keeps the linker from dropping it, which would leave them unregistered.
  TORCH_INTERNAL_ASSERT(flashoptim_ops_version() == 1);
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// Calls an operator below autograd: its results have no gradients, and its mutations are recorded by the callers.
/// The operators throw std::runtime_error, the stable ABI knows no other; here it becomes what LibTorch users catch.
template <class Signature, class... Args>
auto call(const c10::TypedOperatorHandle<Signature>& op, Args&&... args) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  try {
    return op.call(std::forward<Args>(args)...);
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception& error) {
    TORCH_CHECK(false, error.what());
  }
}

constexpr size_t kOptimizers = static_cast<size_t>(OptimizerKind::kLion) + 1;

using OptionalTensor = std::optional<at::Tensor>;

OptionalTensor correction_of(const at::Tensor& correction, MasterWeights master_weights) {
  if (master_weights == MasterWeights::kNone || master_weights == MasterWeights::kNoneStochastic) return std::nullopt;
  return correction;
}

}  // namespace

const char* name_of(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kAdamW:
      return "adamw";
    case OptimizerKind::kAdam:
      return "adam";
    case OptimizerKind::kSgd:
      return "sgd";
    case OptimizerKind::kSgdw:
      return "sgdw";
    case OptimizerKind::kLion:
      return "lion";
  }
  return "?";
}

void step_(OptimizerKind kind, const StepLists& lists, const at::Tensor& nonfinite) {
  using Signature = void(std::string_view, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                         at::TensorList, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                         at::IntArrayRef, at::ArrayRef<double>, double, const OptionalTensor&, const OptionalTensor&);
  static const auto op = find<Signature>("flashoptim::step_");
  call(op, name_of(kind), lists.params, lists.grads, lists.corrections, lists.states, lists.scales,
       lists.master_weights, lists.state_codecs, lists.rows, lists.first_elements, lists.hyper_index, lists.hypers, 1.0,
       OptionalTensor(), OptionalTensor(nonfinite));
}

at::Tensor merge_weights(const at::Tensor& param, const at::Tensor& correction, MasterWeights master_weights) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const OptionalTensor&, int64_t)>("flashoptim::merge_weights");
  return call(op, param, correction_of(correction, master_weights), static_cast<int64_t>(master_weights));
}

void split_weights_(const at::Tensor& weights, const at::Tensor& param, const at::Tensor& correction,
                    MasterWeights master_weights) {
  static const auto op =
      find<void(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t)>("flashoptim::split_weights_");
  call(op, weights, param, correction_of(correction, master_weights), static_cast<int64_t>(master_weights));
}

std::vector<at::Tensor> decode_states(OptimizerKind kind, const std::vector<at::Tensor>& states,
                                      const std::vector<at::Tensor>& scales, StateCodec codec, int64_t rows) {
  using Signature = std::vector<at::Tensor>(std::string_view, at::TensorList, at::TensorList, int64_t, int64_t);
  static const auto op = find<Signature>("flashoptim::decode_states");
  return call(op, name_of(kind), states, scales, static_cast<int64_t>(codec), rows);
}

void zero_(const std::vector<at::Tensor>& tensors) {
  static const auto op = find<void(at::TensorList)>("flashoptim::zero_");
  call(op, tensors);
}

std::vector<int64_t> group_layout(at::IntArrayRef sizes) {
  static const auto op = find<std::vector<int64_t>(at::IntArrayRef)>("flashoptim::group_layout");
  return call(op, sizes);
}

const std::vector<std::string>& state_names(OptimizerKind kind) {
  // Asked once, because torch (2.13) leaks the strings that operators of the stable ABI return.
  static const auto all = [] {
    const auto op = find<std::string(std::string_view, bool)>("flashoptim::state_names");
    std::array<std::vector<std::string>, kOptimizers> names;
    for (size_t k = 0; k < names.size(); ++k) {
      std::istringstream joined(call(op, name_of(static_cast<OptimizerKind>(k)), true));
      for (std::string name; std::getline(joined, name, ',');) names[k].push_back(name);
    }
    return names;
  }();
  return all[static_cast<size_t>(kind)];
}

std::vector<int64_t> state_signs(OptimizerKind kind) {
  static const auto op = find<std::vector<int64_t>(std::string_view, bool)>("flashoptim::state_signs");
  return call(op, name_of(kind), true);
}

}  // namespace flashoptim::libtorch::operators
