#include "libtorch/store/offload.h"

#include <algorithm>
#include <string>
#include <utility>

#include "libtorch/store/arrays.h"
#include "libtorch/store/host_memory.h"
#include "libtorch/store/late_copies.h"

#if FLASHOPTIM_HAS_CUDA
#include "flashoptim/cuda_offload.h"
#endif

namespace flashoptim::store {
namespace {

/// Slots are at least this large, and pieces in them at multiples of kHostAlignment.
constexpr int64_t kSmallestSlot = 4096;

int64_t aligned(int64_t bytes) { return (bytes + kHostAlignment - 1) / kHostAlignment * kHostAlignment; }
int64_t state_width(const ParameterTensors& t) { return t.state_codec == StateCodec::kFloat32 ? 4 : 1; }
int64_t correction_width(const ParameterTensors& t) { return correction_bits(t.master_weights) / 8; }
int64_t width(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <class T>
T* advance(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : static_cast<T*>(static_cast<Byte*>(data) + bytes);
}

/// body(array, offset in the slot, bytes an element, elements) of every array of a piece.
template <class Body>
void for_each_array(ParameterTensors& t, int64_t* states_at, int64_t* scales_at, int64_t* correction_at, Body body) {
  const int64_t numel = t.layout.numel(), groups = t.layout.groups();
  for (int k = 0; k < kMaxSlots; ++k) {
    if (t.states[k] != nullptr) body(t.states[k], states_at + k, state_width(t), numel);
    if (t.scales[k] != nullptr) body(t.scales[k], scales_at + k, int64_t{2}, groups);
  }
  if (t.correction != nullptr) body(t.correction, correction_at, correction_width(t), numel);
}

/// Elements at which a tensor can be cut: a row, a run of an inner cut, or a group of a tensor that is one row.
int64_t cut_unit(const ParameterTensors& t) {
  const bool has_runs = t.place.run > 0 && t.place.run < t.layout.numel() && t.place.stride != t.place.run;
  if (has_runs) return t.place.run;
  return t.layout.rows > 1 ? t.layout.row_size : kGroupSize;
}

/// `count` elements from `first` on, a multiple of cut_unit(), as a shard.
ParameterTensors piece_of(const ParameterTensors& t, int64_t first, int64_t count) {
  if (first == 0 && count == t.layout.numel()) return t;
  ParameterTensors piece = t;
  const int64_t unit = cut_unit(t), first_group = first / unit * ((unit + kGroupSize - 1) / kGroupSize);
  piece.layout = t.layout.rows > 1 ? GroupLayout{count / t.layout.row_size, t.layout.row_size} : GroupLayout{1, count};
  if (t.place.whole.numel() == 0) {
    // Rows of the whole, or stretches of its only one.
    if (t.layout.rows == 1) piece.place.whole = {1, t.place.first_element + t.layout.numel()};
    piece.place.first_element = t.place.first_element + first;
  } else {
    const bool is_run = t.place.run > 0 && unit == t.place.run;
    piece.place.first_element = t.place.first_element + (is_run ? first / unit * t.place.stride : first);
    piece.layout = shard_layout(piece.place, count);
  }
  piece.parameter = advance(t.parameter, first * width(t.parameter_dtype));
  piece.correction = advance(t.correction, first * correction_width(t));
  for (int k = 0; k < kMaxSlots; ++k) {
    piece.states[k] = advance(t.states[k], first * state_width(t));
    piece.scales[k] = advance(t.scales[k], first_group * 2);
  }
  return piece;
}

std::unique_ptr<OffloadDevice> make_copies(Op op, Backend backend, Device device) {
#if FLASHOPTIM_HAS_CUDA
  if (backend == Backend::kCuda) {
    std::unique_ptr<cuda::CopyStreams> made;
    op.check(cuda::CopyStreams::make(device.index, &made));
    made->use_stream(current_stream(device));
    return made;
  }
#else
  static_cast<void>(op), static_cast<void>(backend), static_cast<void>(device);
#endif
  return std::make_unique<LateCopies>();
}

}  // namespace

int64_t offloaded_bytes(const ParameterTensors& tensors) {
  ParameterTensors t = tensors;
  int64_t at[kMaxSlots], scales_at[kMaxSlots], correction_at = 0, bytes = 0;
  for_each_array(t, at, scales_at, &correction_at,
                 [&](void*, int64_t*, int64_t element, int64_t count) { bytes += element * count; });
  return bytes;
}

void Offload::cut(const OffloadedRecord& record, int64_t slot_bytes, std::vector<Piece>* pieces) const {
  const ParameterTensors& t = record.tensors;
  const int64_t numel = t.layout.numel(), bytes = offloaded_bytes(t);
  const int64_t spare = (2 * kMaxSlots + 1) * kHostAlignment;  // between arrays
  int64_t count = numel;
  if (bytes + spare > slot_bytes && numel > 0) {
    const int64_t room = std::max(slot_bytes - spare, int64_t{1});
    const int64_t parts = (bytes + room - 1) / room, unit = cut_unit(t);
    count = std::max((numel / parts) / unit * unit, unit);
    // Whole multiples of 8 rows or groups, where there are many: pieces then begin where vectors do.
    if (count / unit >= 64) count = count / (8 * unit) * (8 * unit);
  }
  int64_t first = 0;
  do {
    Piece piece;
    const int64_t size = std::min(count, numel - first);
    piece.record = record.record;
    piece.first = first;
    piece.tensors = piece_of(t, first, size);
    std::fill_n(piece.states_at, kMaxSlots, -1);
    std::fill_n(piece.scales_at, kMaxSlots, -1);
    pieces->push_back(piece);
    first += size;
  } while (first < numel);
}

/// Gives a piece's arrays their places in a slot from `offset` on; where they end.
int64_t Offload::place(Piece* piece, int64_t offset, std::vector<OffloadCopy>* copies, bool may_join) const {
  for_each_array(piece->tensors, piece->states_at, piece->scales_at, &piece->correction_at,
                 [&](void* host, int64_t* at, int64_t element, int64_t count) {
                   const int64_t bytes = element * count;
                   *at = offset;
                   if (bytes > 0) {
                     OffloadCopy* const last = copies->empty() ? nullptr : &copies->back();
                     // host_arrays() leaves nothing of anybody between arrays that follow each other.
                     const bool joins = may_join && last != nullptr &&
                                        static_cast<char*>(last->host) + (offset - last->offset) == host &&
                                        offset - last->offset - last->bytes < kHostAlignment &&
                                        is_same_host_memory(last->host, host);
                     if (joins) {
                       last->bytes = offset - last->offset + bytes;
                     } else {
                       copies->push_back({host, offset, bytes});
                     }
                   }
                   offset = aligned(offset + bytes);
                 });
  return offset;
}

ParameterTensors Offload::in_slot(const Piece& piece, void* slot) {
  ParameterTensors t = piece.tensors;
  for (int k = 0; k < kMaxSlots; ++k) {
    if (t.states[k] != nullptr) t.states[k] = static_cast<char*>(slot) + piece.states_at[k];
    if (t.scales[k] != nullptr) t.scales[k] = static_cast<char*>(slot) + piece.scales_at[k];
  }
  if (t.correction != nullptr) t.correction = static_cast<char*>(slot) + piece.correction_at;
  return t;
}

Offload::Offload(Op op, Backend backend, Device device, OptimizerKind optimizer, bool has_momentum, int64_t hyper_sets,
                 const std::vector<OffloadedRecord>& records, const RingOptions& options)
    : backend_(backend), device_(device), copies_(make_copies(op, backend, device)) {
  const int64_t wanted = std::max(aligned(options.slot_bytes), kSmallestSlot);
  for (const OffloadedRecord& record : records) cut(record, wanted, &pieces_);
  // Units: what fits into a slot together; a record that was cut has units of its own.
  struct Unit {
    std::vector<OffloadCopy> copies;
    int64_t bytes = 0, parts = 0;
    bool is_cut = false;
  };
  std::vector<Unit> units;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    Piece& piece = pieces_[i];
    const bool is_cut = piece.first != 0 || (i + 1 < pieces_.size() && pieces_[i + 1].record == piece.record);
    const int64_t most = offloaded_bytes(piece.tensors) + (2 * kMaxSlots + 1) * kHostAlignment;
    if (units.empty() || is_cut || units.back().is_cut || units.back().bytes + most > wanted) units.emplace_back();
    Unit& unit = units.back();
    unit.is_cut = is_cut;
    for_each_array(piece.tensors, piece.states_at, piece.scales_at, &piece.correction_at,
                   [&](void* host, int64_t*, int64_t, int64_t) { host_.insert(hold_host_memory(host)); });
    unit.bytes = place(&piece, unit.bytes, &unit.copies, !is_cut);
    piece.unit = static_cast<int64_t>(units.size()) - 1;
    piece.part = unit.parts++;
    records_[piece.record].pieces.push_back(static_cast<int64_t>(i));
  }
  int64_t slot_bytes = kSmallestSlot;
  for (const Unit& unit : units) slot_bytes = std::max(slot_bytes, aligned(unit.bytes));
  const int64_t slots = std::clamp<int64_t>(static_cast<int64_t>(units.size()), 2, std::max<int64_t>(options.slots, 2));
  memory_ = empty({slot_bytes * slots}, {1}, codes().uint8, device);
  void* const memory = mutable_data(memory_);
  op.check(OffloadRing::make(copies_.get(), memory, slot_bytes, slots, &ring_));
  for (Unit& unit : units) ring_.add(std::move(unit.copies), unit.parts);

  std::vector<ParameterTensors> tensors;
  for (const Piece& piece : pieces_) tensors.push_back(in_slot(piece, memory));
  // A plan takes as many sets as it has tensors, or as the largest index says.
  if (!tensors.empty()) tensors[0].hyper_index = static_cast<int32_t>(std::max<int64_t>(hyper_sets - 1, 0));
  op.check(DevicePlan::make(backend, device, optimizer, has_momentum, tensors, &plan_));
}

Offload::~Offload() {
  // What cannot be brought home is on a device that is gone, and there is nobody to tell.
  if (copies_ != nullptr) static_cast<void>(ring_.synchronize());
}

void Offload::use_stream() {
#if FLASHOPTIM_HAS_CUDA
  if (backend_ == Backend::kCuda) static_cast<cuda::CopyStreams*>(copies_.get())->use_stream(current_stream(device_));
#endif
}

void Offload::move(int64_t record, const ParameterTensors& tensors) {
  for (const int64_t index : records_.at(record).pieces) {
    Piece& piece = pieces_[static_cast<size_t>(index)];
    piece.tensors = piece_of(tensors, piece.first, piece.tensors.layout.numel());
  }
}

void Offload::drop(int64_t record) {
  for (const int64_t index : records_.at(record).pieces) ring_.drop(pieces_[static_cast<size_t>(index)].unit);
}

void Offload::expect(const std::vector<int64_t>& records) {
  std::vector<int64_t> units;
  std::vector<bool> seen(static_cast<size_t>(ring_.units()));
  for (const int64_t record : records) {
    for (const int64_t index : records_.at(record).pieces) {
      const int64_t unit = pieces_[static_cast<size_t>(index)].unit;
      if (seen[static_cast<size_t>(unit)]) continue;
      seen[static_cast<size_t>(unit)] = true;
      units.push_back(unit);
    }
  }
  ring_.expect(units);
}

Status Offload::step(const std::vector<OffloadedStep>& taken, bool is_alone, std::vector<Hyperparameters>& hypers,
                     const StepControls& controls, std::vector<int64_t>* done) {
  struct Part {
    Piece* piece;
    const OffloadedStep* step;
    Known* known;
  };
  struct Work {
    int64_t unit;
    std::vector<Part> parts;
  };
  use_stream();
  std::vector<Work> works;
  std::map<int64_t, size_t> place_of;
  for (const OffloadedStep& step : taken) {
    Known& known = records_.at(step.record);
    for (size_t i = known.stepped; i < known.pieces.size(); ++i) {
      Piece& piece = pieces_[static_cast<size_t>(known.pieces[i])];
      const auto [found, is_new] = place_of.try_emplace(piece.unit, works.size());
      if (is_new) works.push_back({piece.unit, {}});
      works[found->second].parts.push_back({&piece, &step, &known});
    }
  }
  if (!is_alone) {
    std::vector<int64_t> order;
    for (const Work& work : works) order.push_back(work.unit);
    ring_.expect(order);
  }
  for (const Work& work : works) {
    void* slot = nullptr;
    Status status = ring_.open(work.unit, &slot);
    if (!status.is_ok()) return status;
    std::vector<int64_t> indices;
    for (const Part& part : work.parts) {
      const Piece& piece = *part.piece;
      ParameterTensors t = in_slot(piece, slot);
      t.gradient = advance(part.step->gradient, piece.first * width(t.gradient_dtype));
      t.hyper_index = part.step->hyper_index;
      indices.push_back(part.piece - pieces_.data());
      if (status.is_ok()) status = plan_.set_tensor(indices.back(), t);
    }
    if (status.is_ok()) {
      status = plan_.step_counted(indices.data(), static_cast<int64_t>(indices.size()), hypers, controls);
    }
    if (!status.is_ok()) {
      ring_.cancel(work.unit);
      return status;
    }
    status = ring_.close(work.unit, is_alone ? work.parts[0].piece->part : -1);
    for (const Part& part : work.parts) {
      if (++part.known->stepped < part.known->pieces.size()) continue;
      part.known->stepped = 0;
      done->push_back(part.step->record);
    }
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

Status Offload::flush() {
  use_stream();
  return ring_.flush();
}

Status Offload::synchronize() {
  use_stream();
  const Status status = ring_.synchronize();
  if (status.is_ok()) ring_.drop_all();
  return status;
}

}  // namespace flashoptim::store
