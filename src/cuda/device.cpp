#include "src/cuda/device.h"

#include <cstdint>

namespace flashoptim::cuda {
namespace {

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

Status check_scales(const ParameterTensors& t, const TensorName& name) {
  for (int k = 0; k < kMaxSlots; ++k) {
    if (reinterpret_cast<uintptr_t>(t.scales[k]) % sizeof(uint16_t) != 0) {
      return Status::invalid_argument(name.field("scales") + "[" + std::to_string(k) +
                                      "] is at an odd address; scales are 16-bit numbers");
    }
  }
  return Status::ok();
}

TensorEntry make_entry(const ParameterTensors& t) {
  TensorEntry e{};
  e.parameter = t.parameter;
  e.gradient = t.gradient;
  e.correction = t.correction;
  bool aligned = is_aligned(t.parameter) && is_aligned(t.correction);
  for (int k = 0; k < kMaxSlots; ++k) {
    e.states[k] = t.states[k];
    e.scales[k] = static_cast<uint16_t*>(t.scales[k]);
    aligned = aligned && is_aligned(t.states[k]);
  }
  e.row_size = t.layout.row_size;
  e.groups_per_row = t.layout.groups_per_row();
  e.numel = t.layout.numel();
  e.first_element = t.place.first_element;
  e.hyper_index = t.hyper_index;
  e.parameter_dtype = static_cast<uint8_t>(t.parameter_dtype);
  e.gradient_dtype = static_cast<uint8_t>(t.gradient_dtype);
  e.master_weights = static_cast<uint8_t>(t.master_weights);
  if (aligned) e.flags |= kVectorAligned;
  if (t.layout.rows > 1 && t.layout.row_size % kGroupSize != 0) e.flags |= kShortRows;
  if (t.state_codec == StateCodec::kPaper) e.flags |= kPaperStates;
  if (t.state_codec == StateCodec::kDefault) e.flags |= kDefaultStates;
  return e;
}

}  // namespace flashoptim::cuda
