#include "flashoptim/torch/model.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fnmatch.h>
#include <torch/types.h>

#include <algorithm>
#include <functional>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "flashoptim/torch/optimizer.h"
#include "libtorch/optim/handles.h"

namespace flashoptim::libtorch {
namespace {

using Dict = ::torch::OrderedDict<std::string, at::Tensor>;
using ::torch::nn::Module;

/// Names of keep_fp32_patterns and which of them matched something.
class Patterns {
 public:
  explicit Patterns(const std::vector<std::string>& patterns) : patterns_(patterns), used_(patterns.size(), false) {}

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
      TORCH_CHECK(used_[i], "cast_model: keep_fp32_patterns[", i, "] = \"", patterns_[i],
                  "\" matches no parameter, buffer or module; must match at least one dotted name");
    }
  }

 private:
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

struct Tied {
  std::vector<at::Tensor> tensors;
  bool keep = false;
};

void collect(const Module& module, const std::string& name, bool keep, Patterns& patterns,
             std::map<Memory, Tied>& all) {
  if (!name.empty()) keep = patterns.match(name) || keep;
  const bool keep_own = keep || has_running_statistics(module);
  const auto add = [&](const auto& item) {
    const bool keep_this = patterns.match(join(name, item.key())) || keep_own;
    if (!at::isFloatingType(item.value().scalar_type())) return;
    Tied& tied = all[memory_of(item.value())];
    tied.tensors.push_back(item.value());
    tied.keep = tied.keep || keep_this;
  };
  for (const auto& item : module.named_parameters(/*recurse=*/false)) add(item);
  for (const auto& item : module.named_buffers(/*recurse=*/false)) add(item);
  for (const auto& child : module.named_children())
    collect(*child.value(), join(name, child.key()), keep, patterns, all);
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

/// cast_model(); optimizer may be null.
void cast(Module& module, FlashOptimizer* optimizer, ::torch::Dtype dtype,
          const std::vector<std::string>& keep_fp32_patterns) {
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf, "cast_model: dtype = ", dtype,
              "; must be BFloat16 or Half");
  Patterns patterns(keep_fp32_patterns);
  std::map<Memory, Tied> all;
  collect(module, "", /*keep=*/false, patterns, all);
  patterns.check_all_used();
  const at::NoGradGuard no_grad;
  for (auto& [memory, tied] : all) {
    if (tied.keep) continue;
    const auto owned = std::find_if(tied.tensors.begin(), tied.tensors.end(), [&](const at::Tensor& tensor) {
      return optimizer != nullptr && optimizer->holds(tensor) && optimizer->param_state(tensor) != nullptr;
    });
    const at::Tensor weights = owned == tied.tensors.end() ? at::Tensor() : optimizer->fp32_weight(*owned);
    const at::Tensor cast = tied.tensors.front().detach().to(dtype);
    for (at::Tensor& tensor : tied.tensors) {
      tensor.set_data(cast);
      if (tensor.grad().defined() && tensor.grad().scalar_type() != dtype) {
        tensor.mutable_grad() = tensor.grad().to(dtype);
      }
    }
    if (weights.defined()) optimizer->set_fp32_weight(*owned, weights);
  }
}

}  // namespace

void cast_model(Module& module, ::torch::Dtype dtype, const std::vector<std::string>& keep_fp32_patterns) {
  cast(module, nullptr, dtype, keep_fp32_patterns);
}

void cast_model(Module& module, ::torch::optim::Optimizer& optimizer, ::torch::Dtype dtype,
                const std::vector<std::string>& keep_fp32_patterns) {
  cast(module, const_cast<FlashOptimizer*>(&as_flash("cast_model", optimizer)), dtype, keep_fp32_patterns);
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
    TORCH_CHECK(value->defined() && value->layout() == at::kStrided && value->has_storage() &&
                    (!value->is_meta() || item.value().is_meta()),
                where, "state[\"", item.key(), "\"] is undefined, sparse or without values; must be a dense tensor");
    const std::string entry = "state[\"" + item.key() + "\"]";
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
