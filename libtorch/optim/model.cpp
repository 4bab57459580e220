#include "flashoptim/torch/model.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fnmatch.h>
#include <torch/types.h>

#include <algorithm>
#include <cctype>
#include <functional>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "flashoptim/torch/optimizer.h"
#include "libtorch/optim/handles.h"
#include "libtorch/optim/param_state.h"

namespace flashoptim::libtorch {

const std::vector<std::string> kExactBufferNames = {
    "*freq*",  "*rotary*", "*rope*", "*position*", "pos_ids", "*timestep*", "*schedule*", "alpha",
    "alphas*", "beta",     "betas*", "sigma",      "sigmas*", "*_cumprod*", "*log_snr*",  "*alibi*"};

namespace {

using Dict = ::torch::OrderedDict<std::string, at::Tensor>;
using ::torch::nn::Module;

/// Patterns of an argument and which of them matched something.
class Patterns {
 public:
  Patterns(const char* argument, const char* targets, const std::vector<std::string>& patterns)
      : argument_(argument), targets_(targets), patterns_(patterns), used_(patterns.size(), false) {}

  bool match(const std::string& name) {
    bool any = false;
    for (size_t i = 0; i < patterns_.size(); ++i) {
      if (fnmatch(patterns_[i].c_str(), name.c_str(), 0) != 0) continue;
      any = used_[i] = true;
    }
    return any;
  }

  void check_all_used() const {
    for (size_t i = 0; i < patterns_.size(); ++i) {
      TORCH_CHECK(used_[i], "cast_model: ", argument_, "[", i, "] = \"", patterns_[i], "\" matches no ", targets_,
                  "; must match at least one dotted name");
    }
  }

 private:
  const char *argument_, *targets_;
  const std::vector<std::string>& patterns_;
  std::vector<bool> used_;
};

bool has_running_statistics(const Module& module) {
  for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
    if (buffer.key() == "running_mean" || buffer.key() == "running_var") return true;
  }
  return false;
}

std::string join(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

/// Tensors that are one memory: tied parameters, as one tensor under two names or as two over the same storage.
using Memory = std::tuple<const void*, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

Memory memory_of(const at::Tensor& t) {
  return {t.storage().unsafeGetStorageImpl(), t.storage_offset(), t.sizes().vec(), t.strides().vec()};
}

constexpr int64_t kShortestSequence = 8, kLargestLookedAt = int64_t{1} << 22;

bool is_true(const at::Tensor& value) { return value.item<bool>(); }

/// Whether a buffer is to stay as it is where a model is cast to `dtype`: cast_model()'s rule in model.h.
bool needs_its_precision(const std::string& name, const at::Tensor& buffer, at::ScalarType dtype) {
  if (!at::isFloatingType(buffer.scalar_type()) || buffer.element_size() <= 2) return false;
  std::string last = name;
  std::transform(last.begin(), last.end(), last.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const std::string& pattern : kExactBufferNames) {
    if (fnmatch(pattern.c_str(), last.c_str(), 0) == 0) return true;
  }
  const int64_t numel = buffer.numel();
  if (buffer.is_meta() || buffer.layout() != at::kStrided || numel == 0 || numel > kLargestLookedAt) return false;
  const at::Tensor values = buffer.detach().reshape({-1});
  const int64_t longest = buffer.dim() == 0 ? 1 : *std::max_element(buffer.sizes().begin(), buffer.sizes().end());
  if (longest == numel && numel >= kShortestSequence) {
    const at::Tensor steps = values.diff();
    if (is_true((steps > 0).all()) || is_true((steps < 0).all())) return true;
  }
  const at::Tensor finite = values.index({values.isfinite()});
  const at::Tensor rounded = finite.to(dtype).to(values.scalar_type());
  if (is_true((finite == finite.round()).all()) && is_true((rounded != finite).any())) return true;
  return is_true((rounded.isfinite().logical_not() | ((rounded == 0) & (finite != 0))).any());
}

struct Tied {
  std::vector<at::Tensor> tensors;
  bool keep = false;
};

/// What cast_model() was told.
struct CastRules {
  at::ScalarType dtype;
  Patterns keep, buffers;
};

void collect(const Module& module, const std::string& name, bool keep, CastRules& rules, std::map<Memory, Tied>& all) {
  if (!name.empty()) keep = rules.keep.match(name) || keep;
  const bool keep_own = keep || has_running_statistics(module);
  const auto add = [&](const auto& item, bool is_buffer) {
    const std::string full = join(name, item.key());
    bool keep_this = rules.keep.match(full) || keep_own;
    if (keep_this && item.value().defined() && !item.value().has_storage()) return;  // sparse, and to be left alone
    if (is_buffer && !rules.buffers.match(full)) {
      keep_this = keep_this || needs_its_precision(item.key(), item.value(), rules.dtype);
    }
    if (!item.value().defined() || !at::isFloatingType(item.value().scalar_type())) return;
    TORCH_CHECK(item.value().layout() == at::kStrided && item.value().has_storage(), "cast_model: ", full,
                " has layout ", item.value().layout(), "; must be a dense tensor, or named in keep_fp32_patterns");
    Tied& tied = all[memory_of(item.value())];
    tied.tensors.push_back(item.value());
    tied.keep = tied.keep || keep_this;
  };
  for (const auto& item : module.named_parameters(/*recurse=*/false)) add(item, /*is_buffer=*/false);
  for (const auto& item : module.named_buffers(/*recurse=*/false)) add(item, /*is_buffer=*/true);
  for (const auto& child : module.named_children()) {
    collect(*child.value(), join(name, child.key()), keep, rules, all);
  }
}

const FlashOptimizer& as_flash(const char* function, const ::torch::optim::Optimizer& optimizer) {
  const auto* flash = dynamic_cast<const FlashOptimizer*>(&optimizer);
  TORCH_CHECK(flash != nullptr, function,
              ": optimizer is none of flashoptim's; must be a FlashOptimizer (FlashAdamW, ...)");
  return *flash;
}

at::Tensor fp32_copy(const at::Tensor& tensor) {
  const at::ScalarType dtype = at::isFloatingType(tensor.scalar_type()) ? at::kFloat : tensor.scalar_type();
  return tensor.detach().to(dtype, /*non_blocking=*/false, /*copy=*/true);
}

/// An optimizer that is to learn of a cast, and the weights that its steps would continue from.
struct Owner {
  FlashOptimizer* optimizer;
  at::Tensor param, weights;
};

std::vector<Owner> owners_of(const Tied& tied, const std::vector<FlashOptimizer*>& optimizers) {
  std::vector<Owner> owners;
  for (FlashOptimizer* const optimizer : optimizers) {
    for (const at::Tensor& tensor : tied.tensors) {
      const bool has_more = tensor.scalar_type() == at::kFloat && tensor.requires_grad() && !tensor.is_meta();
      if (!optimizer->holds(tensor) || (!has_more && optimizer->param_state(tensor) == nullptr)) continue;
      owners.push_back({optimizer, tensor, {}});
      break;
    }
  }
  return owners;
}

/// cast_model(), of which `optimizers` are to learn.
void cast(Module& module, const std::vector<FlashOptimizer*>& optimizers, ::torch::Dtype dtype,
          const std::vector<std::string>& keep_fp32_patterns, const std::vector<std::string>& cast_buffers) {
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf, "cast_model: dtype = ", dtype,
              "; must be BFloat16 or Half");
  CastRules rules{dtype, Patterns("keep_fp32_patterns", "parameter, buffer or module", keep_fp32_patterns),
                  Patterns("cast_buffers", "buffer", cast_buffers)};
  std::map<Memory, Tied> all;
  const at::NoGradGuard no_grad;
  collect(module, "", /*keep=*/false, rules, all);
  rules.keep.check_all_used();
  rules.buffers.check_all_used();
  // Whatever an optimizer refuses, it refuses before the first tensor is cast.
  for (const auto& [memory, tied] : all) {
    if (tied.keep || tied.tensors.front().scalar_type() == dtype) continue;
    for (const Owner& owner : owners_of(tied, optimizers)) LiveOptimizers::check_groups(*owner.optimizer);
  }
  for (auto& [memory, tied] : all) {
    const at::Tensor& first = tied.tensors.front();
    if (tied.keep || first.scalar_type() == dtype) continue;
    std::vector<Owner> owners = owners_of(tied, optimizers);
    for (Owner& owner : owners) owner.weights = owner.optimizer->fp32_weight(owner.param);
    const at::Tensor cast = first.detach().to(dtype);
    for (at::Tensor& tensor : tied.tensors) {
      tensor.set_data(cast);
      if (tensor.grad().defined() && tensor.grad().scalar_type() != dtype) {
        tensor.mutable_grad() = tensor.grad().to(dtype);
      }
    }
    for (const Owner& owner : owners) owner.optimizer->set_fp32_weight(owner.param, owner.weights);
  }
}

}  // namespace

void cast_model(Module& module, ::torch::Dtype dtype, const std::vector<std::string>& keep_fp32_patterns,
                const std::vector<std::string>& cast_buffers) {
  cast(module, LiveOptimizers::all(), dtype, keep_fp32_patterns, cast_buffers);
}

void cast_model(Module& module, ::torch::optim::Optimizer& optimizer, ::torch::Dtype dtype,
                const std::vector<std::string>& keep_fp32_patterns, const std::vector<std::string>& cast_buffers) {
  cast(module, {const_cast<FlashOptimizer*>(&as_flash("cast_model", optimizer))}, dtype, keep_fp32_patterns,
       cast_buffers);
}

Dict get_fp32_model_state(const Module& module, const ::torch::optim::Optimizer& optimizer) {
  const FlashOptimizer& flash = as_flash("get_fp32_model_state", optimizer);
  const at::NoGradGuard no_grad;
  Dict state;
  for (const auto& item : module.named_parameters()) {
    state.insert(item.key(), flash.holds(item.value()) ? flash.fp32_weight(item.value()) : fp32_copy(item.value()));
  }
  for (const auto& item : module.named_buffers()) state.insert(item.key(), fp32_copy(item.value()));
  return state;
}

void set_fp32_model_state(Module& module, ::torch::optim::Optimizer& optimizer, const Dict& state) {
  const char* const where = "set_fp32_model_state: ";
  auto& flash = const_cast<FlashOptimizer&>(as_flash("set_fp32_model_state", optimizer));
  const Dict parameters = module.named_parameters(), buffers = module.named_buffers();
  std::map<const void*, std::pair<std::string, at::Tensor>> given;  // by tensor, to see that tied ones agree
  const auto check = [&](const auto& item) {
    const at::Tensor* value = state.find(item.key());
    TORCH_CHECK(value != nullptr, where, "state[\"", item.key(), "\"] is missing; the module has it");
    const std::string entry = "state[\"" + item.key() + "\"]";
    check_has_values(where + entry, *value, /*may_be_meta=*/item.value().is_meta());
    in_store([&] { store::read_tensor({"set_fp32_model_state"}, {entry.c_str()}, handle_of(*value)); });
    TORCH_CHECK(value->sizes() == item.value().sizes(), where, "state[\"", item.key(), "\"] has shape ", value->sizes(),
                "; must be ", item.value().sizes());
    TORCH_CHECK(at::isFloatingType(value->scalar_type()) == at::isFloatingType(item.value().scalar_type()), where,
                "state[\"", item.key(), "\"] has dtype ", value->scalar_type(), "; must go with the module's ",
                item.value().scalar_type());
    TORCH_CHECK(item.value().numel() == 0 || at::has_internal_overlap(item.value()) != at::MemOverlap::Yes, where,
                item.key(), " of the module has strides ", item.value().strides(),
                ", by which elements share memory; each must be its own to be written");
    const auto [found, is_new] = given.emplace(item.value().unsafeGetTensorImpl(), std::pair{item.key(), *value});
    TORCH_CHECK(is_new || at::equal(found->second.second, *value), where, "state[\"", item.key(),
                "\"] differs from state[\"", found->second.first, "\"], but they are one tied tensor; must be equal");
  };
  for (const auto& item : parameters) check(item);
  for (const auto& item : buffers) check(item);
  for (const auto& item : state) {
    TORCH_CHECK(parameters.contains(item.key()) || buffers.contains(item.key()), where, "state[\"", item.key(),
                "\"] is unexpected; the module has no such parameter or buffer");
  }
  // Whatever can fail is done before the first value is written.
  const at::NoGradGuard no_grad;
  std::vector<std::pair<at::Tensor, at::Tensor>> weights, copies;
  const auto copy = [&](const auto& item) {
    copies.emplace_back(item.value().detach(), state[item.key()].detach().to(item.value().options()));
  };
  for (const auto& item : parameters) {
    if (flash.holds(item.value())) {
      weights.emplace_back(item.value(), state[item.key()]);
    } else {
      copy(item);
    }
  }
  for (const auto& item : buffers) copy(item);
  flash.set_fp32_weights(weights);
  for (auto& [to, from] : copies) to.copy_(from);
}

}  // namespace flashoptim::libtorch
