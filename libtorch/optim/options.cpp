#include "flashoptim/torch/options.h"

#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>

#include <cmath>
#include <cstring>

namespace flashoptim::torch {
namespace {

OptionValues default_values(OptimizerKind kind) {
  OptionValues values;
  if (kind == OptimizerKind::kAdamW) values.weight_decay = 1e-2;
  if (kind == OptimizerKind::kLion) values.betas = {0.9, 0.99};
  return values;
}

bool is_nonnegative(double value) { return std::isfinite(value) && value >= 0; }

}  // namespace

FlashOptions::FlashOptions(OptimizerKind kind) : values_(default_values(kind)), kind_(kind) {}

void FlashOptions::mark_set(const char* name) {
  for_each_option([&](int index, const char* option, auto) {
    if (std::strcmp(option, name) == 0) set_ |= uint32_t{1} << index;
  });
}

void FlashOptions::inherit(const FlashOptions& defaults) {
  const OptionValues fresh = default_values(kind_);
  for_each_option([&](int index, const char*, auto member) {
    const bool was_set = (set_ >> index & 1) != 0 || !(values_.*member == fresh.*member);
    if (!was_set) values_.*member = defaults.values_.*member;
  });
}

bool FlashOptions::has_momentum() const {
  const bool is_sgd = kind_ == OptimizerKind::kSgd || kind_ == OptimizerKind::kSgdw;
  return !is_sgd || values_.momentum != 0;
}

void FlashOptions::check(const std::string& where) const {
  const OptionValues& v = values_;
  const auto need = [&where](bool ok, const char* name, const auto& value, const char* allowed) {
    TORCH_CHECK(ok, where, name, " = ", value, "; must be ", allowed);
  };
  constexpr const char* kNonnegative = "finite and at least 0";
  constexpr const char* kBeta = "at least 0 and below 1";
  const auto [beta1, beta2] = v.betas;
  need(is_nonnegative(v.lr), "lr", v.lr, kNonnegative);
  need(beta1 >= 0 && beta1 < 1, "betas[0]", beta1, kBeta);
  need(beta2 >= 0 && beta2 < 1, "betas[1]", beta2, kBeta);
  need(is_nonnegative(v.eps), "eps", v.eps, kNonnegative);
  need(is_nonnegative(v.weight_decay), "weight_decay", v.weight_decay, kNonnegative);
  need(is_nonnegative(v.momentum), "momentum", v.momentum, kNonnegative);
  need(std::isfinite(v.dampening), "dampening", v.dampening, "finite");
  need(!v.nesterov || v.momentum > 0, "momentum", v.momentum, "above 0 with nesterov = true");
  need(!v.nesterov || v.dampening == 0, "dampening", v.dampening, "0 with nesterov = true");
  need(is_nonnegative(v.initial_lr), "initial_lr", v.initial_lr, kNonnegative);
  need(v.master_weight_bits == 0 || v.master_weight_bits == 24 || v.master_weight_bits == 32, "master_weight_bits",
       v.master_weight_bits, "0, 24 or 32");
  need(v.state_codec == "default" || v.state_codec == "paper", "state_codec", "\"" + v.state_codec + "\"",
       "\"default\" or \"paper\"");
  need(v.min_quantized_numel >= 0, "min_quantized_numel", v.min_quantized_numel, "at least 0");
  need(v.seed >= 0 && v.seed < int64_t{1} << 53, "seed", v.seed, "at least 0 and below 2^53");
}

void FlashOptions::serialize(::torch::serialize::OutputArchive& archive) const {
  for_each_option([&](int, const char* name, auto member) { archive.write(name, c10::IValue(values_.*member)); });
}

void FlashOptions::serialize(::torch::serialize::InputArchive& archive) {
  for_each_option([&](int, const char* name, auto member) {
    c10::IValue value;
    archive.read(name, value);
    values_.*member = value.to<std::decay_t<decltype(values_.*member)>>();
  });
}

}  // namespace flashoptim::torch
