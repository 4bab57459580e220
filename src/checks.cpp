#include "src/checks.h"

#include <cmath>
#include <limits>

#include "src/blocks.h"
#include "src/place.h"
#include "src/text.h"

namespace flashoptim {
namespace {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "?";
}

bool in_enum(int value, int count) { return value >= 0 && value < count; }

Status check_formats(const ParameterTensors& t, const TensorName& name) {
  const auto no_value_of = [&name](const char* field, int value, const char* type, const char* allowed) {
    return Status::invalid_argument(name.field(field) + " = " + std::to_string(value) + " is no " + type +
                                    "; allowed are " + allowed);
  };
  constexpr const char* kDTypeNames = "kFloat32, kBFloat16, kFloat16";
  if (!in_enum(static_cast<int>(t.parameter_dtype), cpu::kDTypes))
    return no_value_of("parameter_dtype", static_cast<int>(t.parameter_dtype), "DType", kDTypeNames);
  if (!in_enum(static_cast<int>(t.gradient_dtype), cpu::kDTypes))
    return no_value_of("gradient_dtype", static_cast<int>(t.gradient_dtype), "DType", kDTypeNames);
  if (!in_enum(static_cast<int>(t.master_weights), cpu::kMasterKinds)) {
    return no_value_of("master_weights", static_cast<int>(t.master_weights), "MasterWeights",
                       "kNone, kNoneStochastic, kCorrection8, kCorrection16, kCorrection8Nearest, "
                       "kCorrection16Nearest");
  }
  if (!in_enum(static_cast<int>(t.state_codec), cpu::kCodecs)) {
    return no_value_of("state_codec", static_cast<int>(t.state_codec), "StateCodec", "kFloat32, kPaper, kDefault");
  }
  if (t.parameter_dtype == DType::kFloat32 && t.master_weights != MasterWeights::kNone) {
    return Status::unsupported(name.field("master_weights") +
                               " must be kNone for a float32 parameter, which has no bits to correct");
  }
  if (t.gradient_dtype != t.parameter_dtype && t.gradient_dtype != DType::kFloat32) {
    return Status::unsupported(name.field("gradient_dtype") + " = " + dtype_name(t.gradient_dtype) + " with a " +
                               dtype_name(t.parameter_dtype) +
                               " parameter; allowed are the parameter's dtype and float32");
  }
  return Status::ok();
}

Status check_weight_addresses(const ParameterTensors& t, const TensorName& name) {
  if (t.layout.numel() == 0) return Status::ok();
  if (t.parameter == nullptr) return Status::invalid_argument(name.field("parameter") + " is null");
  if (cpu::element_sizes(t).correction != 0 && t.correction == nullptr) {
    return Status::invalid_argument(name.field("correction") + " is null, but master_weights asks for one");
  }
  return Status::ok();
}

std::string field_text(const char* field, int slot) {
  return slot < 0 ? field : std::string(field) + "[" + std::to_string(slot) + "]";
}

Status check_state_addresses(const ParameterTensors& t, const TensorName& name, int states) {
  if (t.layout.numel() == 0) return Status::ok();
  for (int k = 0; k < states; ++k) {
    if (t.states[k] == nullptr) {
      return Status::invalid_argument(name.field(field_text("states", k).c_str()) + " is null");
    }
    if (t.state_codec != StateCodec::kFloat32 && t.scales[k] == nullptr) {
      return Status::invalid_argument(name.field(field_text("scales", k).c_str()) +
                                      " is null, but state_codec is quantized");
    }
  }
  return Status::ok();
}

/// What a step writes, at most.
class WrittenArrays {
 public:
  void add_weights(const ParameterTensors& t) {
    const cpu::ElementSizes sizes = cpu::element_sizes(t);
    add({"parameter", -1, t.parameter, t.layout.numel() * sizes.parameter});
    add({"correction", -1, t.correction, t.layout.numel() * sizes.correction});
  }
  void add_states(const ParameterTensors& t, int states) {
    const cpu::ElementSizes sizes = cpu::element_sizes(t);
    const int64_t scales = t.state_codec == StateCodec::kFloat32 ? 0 : t.layout.groups() * 2;
    for (int k = 0; k < states; ++k) {
      add({"states", k, t.states[k], t.layout.numel() * sizes.state});
      add({"scales", k, t.scales[k], scales});
    }
  }
  Status check(const TensorName& name) const { return check_apart(arrays_, count_, name); }

 private:
  void add(const ArrayRange& array) {
    if (array.base != nullptr && array.bytes > 0) arrays_[count_++] = array;
  }
  ArrayRange arrays_[2 + 2 * kMaxSlots];
  int count_ = 0;
};

/// All but addresses.
Status check_description(const ParameterTensors& t, const TensorName& name, int states) {
  Status status = check_formats(t, name);
  if (status.is_ok()) status = check_layout(t.layout, name, "layout");
  if (status.is_ok()) status = check_place(t, name, states > 0 && t.state_codec != StateCodec::kFloat32);
  if (!status.is_ok()) return status;
  if (t.hyper_index < 0 || t.hyper_index >= kMaxHyperparameterSets) {
    return Status::invalid_argument(name.field("hyper_index") + " = " + std::to_string(t.hyper_index) +
                                    "; allowed are 0 to " + std::to_string(kMaxHyperparameterSets - 1));
  }
  return status;
}

}  // namespace

Status misaligned(const char* name, uintptr_t address, size_t alignment) {
  return Status::invalid_argument(std::string(name) + " is at address " + std::to_string(address) +
                                  ", which is no multiple of " + std::to_string(alignment));
}

Status check_apart(const ArrayRange* arrays, int count, const TensorName& name) {
  const auto text = [&](const ArrayRange& a) { return name.field(field_text(a.field, a.slot).c_str()); };
  for (int i = 0; i < count; ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(arrays[i].base);
    const auto bytes = static_cast<uintptr_t>(arrays[i].bytes);
    if (begin > std::numeric_limits<uintptr_t>::max() - bytes) {
      return Status::invalid_argument(text(arrays[i]) + " of " + std::to_string(bytes) + " bytes at address " +
                                      std::to_string(begin) + " goes past the last address");
    }
    for (int j = 0; j < i; ++j) {
      const auto other = reinterpret_cast<uintptr_t>(arrays[j].base);
      if (begin < other + static_cast<uintptr_t>(arrays[j].bytes) && other < begin + bytes) {
        return Status::invalid_argument(text(arrays[i]) + " overlaps " + text(arrays[j]) +
                                        "; arrays must lie apart from each other");
      }
    }
  }
  return Status::ok();
}

std::string TensorName::field(const char* name) const {
  if (list == nullptr) return name;
  std::string text = list;
  if (index >= 0) text.append("[").append(std::to_string(index)).append("]");
  return text.append(".").append(name);
}

Status check_layout(const GroupLayout& layout, const TensorName& name, const char* field) {
  const auto sizes = [&] {
    return name.field(field) + " has rows = " + std::to_string(layout.rows) +
           ", row_size = " + std::to_string(layout.row_size);
  };
  if (layout.rows < 0 || layout.row_size < 0) return Status::invalid_argument(sizes() + "; both must be at least 0");
  if (layout.rows > kMostElements || layout.row_size > kMostElements ||
      (layout.row_size > 0 && layout.rows > kMostElements / layout.row_size)) {
    return Status::invalid_argument(sizes() + "; both and their product must be at most 2^57");
  }
  return Status::ok();
}

Status check_tensor(const ParameterTensors& t, const TensorName& name, int states) {
  Status status = check_description(t, name, states);
  if (status.is_ok()) status = check_weight_addresses(t, name);
  if (status.is_ok()) status = check_state_addresses(t, name, states);
  if (!status.is_ok()) return status;
  WrittenArrays arrays;
  arrays.add_weights(t);
  arrays.add_states(t, states);
  return arrays.check(name);
}

Status check_states(const ParameterTensors& t, const TensorName& name, int states) {
  Status status = check_description(t, name, states);
  if (status.is_ok()) status = check_state_addresses(t, name, states);
  if (!status.is_ok()) return status;
  WrittenArrays arrays;
  arrays.add_states(t, states);
  return arrays.check(name);
}

Status check_same_format(const ParameterTensors& before, const ParameterTensors& now, const TensorName& name) {
  const struct {
    const char* field;
    int64_t before, now;
  } fields[] = {
      {"layout.rows", before.layout.rows, now.layout.rows},
      {"layout.row_size", before.layout.row_size, now.layout.row_size},
      {"place.first_element", before.place.first_element, now.place.first_element},
      {"place.run", before.place.run, now.place.run},
      {"place.stride", before.place.stride, now.place.stride},
      {"place.whole.rows", before.place.whole.rows, now.place.whole.rows},
      {"place.whole.row_size", before.place.whole.row_size, now.place.whole.row_size},
      {"parameter_dtype", static_cast<int64_t>(before.parameter_dtype), static_cast<int64_t>(now.parameter_dtype)},
      {"gradient_dtype", static_cast<int64_t>(before.gradient_dtype), static_cast<int64_t>(now.gradient_dtype)},
      {"master_weights", static_cast<int64_t>(before.master_weights), static_cast<int64_t>(now.master_weights)},
      {"state_codec", static_cast<int64_t>(before.state_codec), static_cast<int64_t>(now.state_codec)},
  };
  for (const auto& f : fields) {
    if (f.before == f.now) continue;
    return Status::invalid_argument(name.field(f.field) + " = " + std::to_string(f.now) + "; the plan was made with " +
                                    std::to_string(f.before) + ", and another needs a new plan");
  }
  return Status::ok();
}

Status check_index(int64_t index, int64_t size) {
  if (index >= 0 && index < size) return Status::ok();
  return Status::invalid_argument("index = " + std::to_string(index) + "; the plan has " + std::to_string(size) +
                                  " tensors");
}

Status check_tensor_list(const ParameterTensors* tensors, int64_t count) {
  const Status status = check_aligned(tensors, "tensors");
  if (!status.is_ok()) return status;
  // The CUDA back end counts tensors in 32 bits.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (count >= 0 && count <= kMost && (count == 0 || tensors != nullptr)) return Status::ok();
  return Status::invalid_argument("count = " + std::to_string(count) + " with tensors " +
                                  (tensors == nullptr ? "null" : "set") +
                                  "; count must be the number of tensors, 0 to " + std::to_string(kMost));
}

Status check_selection(const int64_t* indices, int64_t count, int64_t size) {
  const Status status = check_aligned(indices, "indices");
  if (!status.is_ok()) return status;
  if (count < 0 || count > size) {
    return Status::invalid_argument("count = " + std::to_string(count) + "; allowed are 0 to " + std::to_string(size) +
                                    ", the plan's tensors");
  }
  if (count > 0 && indices == nullptr) {
    return Status::invalid_argument("indices is null; it must have " + std::to_string(count) + " entries");
  }
  return Status::ok();
}

Status check_named(const int64_t* indices, int64_t i, int64_t size, uint64_t call, uint64_t* named_in) {
  const int64_t index = indices[i];
  const auto entry = [i, index] { return "indices[" + std::to_string(i) + "] = " + std::to_string(index); };
  if (index < 0 || index >= size) {
    return Status::invalid_argument(entry() + "; allowed are 0 to " + std::to_string(size - 1));
  }
  if (named_in[index] == call) return Status::invalid_argument(entry() + " names a tensor for the second time");
  named_in[index] = call;
  return Status::ok();
}

Status check_hyper_count(const Hyperparameters* hypers, int64_t count, int32_t used) {
  const Status status = check_aligned(hypers, "hypers");
  if (!status.is_ok()) return status;
  if (count < 0) return Status::invalid_argument("count = " + std::to_string(count) + "; must be at least 0");
  if (used > count) {
    return Status::invalid_argument("hypers has " + std::to_string(count) + " entries, but a tensor's hyper_index is " +
                                    std::to_string(used - 1));
  }
  if (used > 0 && hypers == nullptr) {
    return Status::invalid_argument("hypers is null; it must have " + std::to_string(count) + " entries");
  }
  return Status::ok();
}

Status check_step_options(const StepOptions& options) {
  const Status status = check_aligned(options.found_inf, "options.found_inf");
  return status.is_ok() ? check_aligned(options.nonfinite_gradients, "options.nonfinite_gradients") : status;
}

Status check_gradient_scale(float gradient_scale) {
  if (std::isfinite(gradient_scale)) return Status::ok();
  return Status::invalid_argument("options.gradient_scale = " + number_text(static_cast<double>(gradient_scale)) +
                                  "; must be finite");
}

}  // namespace flashoptim
