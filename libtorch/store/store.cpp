#include "libtorch/store/store.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "libtorch/store/host_memory.h"

namespace flashoptim::store {
namespace {

bool same_extents(const Facts& facts, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                  bool is_empty) {
  const auto dim = static_cast<int64_t>(sizes.size());
  if (facts.dim != dim) return false;
  for (int64_t d = 0; d < dim; ++d) {
    const auto at = static_cast<size_t>(d);
    if (facts.sizes[d] != sizes[at]) return false;
    if (facts.strides[d] != strides[at] && sizes[at] != 1 && !is_empty) return false;
  }
  return true;
}

/// Throws where two written arrays share memory.
void check_no_overlap(Op op, const std::vector<ParameterTensors>& tensors, const std::vector<int64_t>& numbers) {
  struct Range {
    const char* begin;
    const char* end;
    const char* what;
    int64_t tensor;
  };
  std::vector<Range> ranges;
  ranges.reserve(tensors.size() * 6);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ParameterTensors& t = tensors[i];
    const auto add = [&](const void* data, int64_t bytes, const char* what) {
      const char* begin = static_cast<const char*>(data);
      if (data != nullptr && bytes > 0) ranges.push_back({begin, begin + bytes, what, numbers[i]});
    };
    const int64_t numel = t.layout.numel();
    add(t.parameter, numel * (t.parameter_dtype == DType::kFloat32 ? 4 : 2), "the parameter");
    add(t.correction, numel * correction_bits(t.master_weights) / 8, "the correction");
    for (int k = 0; k < kMaxSlots; ++k) {
      add(t.states[k], t.state_codec == StateCodec::kFloat32 ? numel * 4 : numel, "a state");
      add(t.scales[k], t.layout.groups() * 2, "a scale");
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    const Range &a = ranges[i - 1], &b = ranges[i];
    if (b.begin >= a.end) continue;
    op.fail(std::string(b.what) + " of tensor " + std::to_string(b.tensor) + " and " + a.what + " of tensor " +
            std::to_string(a.tensor) + " share memory; every parameter must be listed once, with arrays of its own");
  }
}

/// Whether a plan over `a` serves for `b` with other addresses.
bool same_but_addresses(const ParameterTensors& a, const ParameterTensors& b) {
  return a.layout == b.layout && a.place == b.place && a.parameter_dtype == b.parameter_dtype &&
         a.gradient_dtype == b.gradient_dtype && a.master_weights == b.master_weights && a.state_codec == b.state_codec;
}

/// Whether the arrays of `b` are where those of `a` are; a parameter that is a copy is in memory of its own anyway.
bool same_addresses(const ParameterTensors& a, const ParameterTensors& b, bool is_copy) {
  return (is_copy || a.parameter == b.parameter) && a.correction == b.correction &&
         std::equal(a.states, a.states + kMaxSlots, b.states) && std::equal(a.scales, a.scales + kMaxSlots, b.scales);
}

int32_t dtype_code(DType dtype) {
  if (dtype == DType::kBFloat16) return codes().bfloat16;
  return dtype == DType::kFloat16 ? codes().float16 : codes().float32;
}

}  // namespace

bool Record::fits(const Facts& facts, int32_t dtype) const {
  return is_known_ && facts.dtype == dtype && same_extents(facts, sizes_, strides_, tensors_.layout.numel() == 0);
}

bool Record::fits_scale(const Facts& facts, int slot) const {
  if (!is_known_ || facts.dtype != scale_dtypes_[slot]) return false;
  // Contiguous, of as many elements as there are groups; its shape is the owner's affair.
  int64_t numel = 1;
  for (int64_t d = facts.dim - 1; d >= 0; --d) {
    if (facts.sizes[d] != 1 && facts.strides[d] != numel && tensors_.layout.groups() != 0) return false;
    numel *= facts.sizes[d];
  }
  return numel == tensors_.layout.groups();
}

// Here, so that callers need not see what plans consist of.
Store::Store(OptimizerKind optimizer) : optimizer_(optimizer) {}
Store::~Store() = default;

void Store::reset(int64_t count) {
  records_.assign(static_cast<size_t>(count), Record());
  plans_.clear();
  is_stale_ = false;
  taken_ = 0;
}

void Store::forget(int64_t index) {
  Record& record = records_[static_cast<size_t>(index)];
  if (record.plan_ >= 0) is_stale_ = true;
  const int32_t plan = record.plan_, at = record.index_;
  record = Record();
  if (plan >= 0) plans_[static_cast<size_t>(plan)]->records[static_cast<size_t>(at)] = -1;
}

void Store::describe(Op op, int64_t index, const std::string& name, const RecordOptions& options,
                     AtenTensorHandle param, const StateTensors& stored, AtenTensorHandle correction) {
  Record next;
  const Name param_name{name.c_str()};
  const TensorInfo info = read_dense(op, param_name, param);
  next.is_known_ = true;
  next.options_ = options;
  next.device_ = info.device;
  next.backend_ = select_backend(op.name, name, info.device);
  next.sizes_.assign(info.sizes, info.sizes + info.dim);
  next.strides_.assign(info.strides, info.strides + info.dim);
  next.dtype_ = info.dtype;
  next.storage_ = info.storage_needed;
  const bool is_meta = next.backend_ == Backend::kMeta;
  if (options.is_offloaded && next.backend_ == Backend::kCpu && !ring_.is_simulated) {
    op.fail(name +
            " is on the CPU, where its states are; offload is for parameters on CUDA devices: move the model "
            "there before the first step, or leave the group without offload");
  }
  // What is stored lies as the parameter does, on the host where it is offloaded.
  TensorInfo like = info;
  if (options.is_offloaded) like.device = {aoti_torch_device_type_cpu(), info.device.index};
  const auto check_home = [&](Name array, const void* data) {
    if (!options.is_offloaded || data == nullptr || is_host_memory(data)) return;
    op.fail(array.str() + " is in memory of its own; offloaded states must be in the optimizer's host memory");
  };

  ParameterTensors& t = next.tensors_;
  t.parameter_dtype = parse_param_dtype(op, param_name, info.dtype);
  check_master(op, {"master_weights"}, t.parameter_dtype, options.format.master_weights, param_name);
  t.gradient_dtype = options.gradient_dtype;
  if (t.gradient_dtype != t.parameter_dtype && t.gradient_dtype != DType::kFloat32) {
    op.fail("the gradient of " + name + " has dtype " + dtype_name(dtype_code(t.gradient_dtype)) +
            "; allowed are the parameter's, " + dtype_name(info.dtype) + ", and float32");
  }
  next.gradient_dtype_ = dtype_code(t.gradient_dtype);
  t.master_weights = options.format.master_weights;
  t.state_codec = options.format.codec;
  t.place = options.shard.place;
  const StorageOrder order = storage_order(info.sizes, info.strides, info.dim);
  if (options.shard.is_set() && !order.empty()) {
    op.fail(name + " is a shard with strides " + ints(info.strides, info.dim) + "; a shard must be contiguous");
  }
  t.layout = layout_of(next.sizes_, order, options.shard);
  t.parameter = is_meta ? nullptr : mutable_data(param);

  const int slots = state_count(optimizer_, options.has_momentum);
  if (stored.states.size() != static_cast<size_t>(slots)) {
    op.fail(name + " has " + std::to_string(stored.states.size()) + " states; needed are " + std::to_string(slots));
  }
  const bool quantized = t.state_codec != StateCodec::kFloat32;
  for (int k = 0; k < slots; ++k) {
    const auto at = static_cast<size_t>(k);
    const std::string state_name = "state '" + array_name(optimizer_, Role::kState, k, t.state_codec) + "' of " + name;
    const std::string scale_name = "state '" + array_name(optimizer_, Role::kScale, k, t.state_codec) + "' of " + name;
    const Name state{state_name.c_str()}, scale{scale_name.c_str()};
    const TensorInfo codes_info = read_tensor(op, state, stored.states[at]);
    next.state_dtypes_[k] = state_dtype(optimizer_, k, t.state_codec);
    check_dtype(op, state, codes_info.dtype, next.state_dtypes_[k], "its state codec");
    if (options.is_offloaded) like.device = {aoti_torch_device_type_cpu(), codes_info.device.index};
    check_like(op, state, codes_info, param_name, like);
    next.state_storages_[k] = codes_info.storage_needed;
    t.states[k] = is_meta ? nullptr : mutable_data(stored.states[at]);
    check_home(state, t.states[k]);
    if (!quantized) continue;
    const TensorInfo scale_info = read_tensor(op, scale, stored.scales[at]);
    if (!accepts_scale_dtype(t.state_codec, scale_info.dtype)) {
      op.fail(scale_name + " has dtype " + dtype_name(scale_info.dtype) + "; its state codec needs " +
              dtype_name(scale_dtype(t.state_codec)));
    }
    next.scale_dtypes_[k] = scale_info.dtype;
    next.scale_storages_[k] = scale_info.storage_needed;
    check_contiguous(op, scale, scale_info);
    if (options.is_offloaded) like.device = {aoti_torch_device_type_cpu(), scale_info.device.index};
    check_device(op, scale, scale_info.device, param_name, like.device);
    if (scale_info.numel != t.layout.groups()) {
      op.fail(scale_name + " has shape " + ints(scale_info.sizes, scale_info.dim) + "; needed are " +
              std::to_string(t.layout.rows) + " x " + std::to_string(t.layout.groups_per_row()) + " elements");
    }
    t.scales[k] = is_meta ? nullptr : mutable_data(stored.scales[at]);
    check_home(scale, t.scales[k]);
  }
  if (correction_bits(t.master_weights) != 0) {
    const std::string correction_name = "state 'correction' of " + name;
    const Name corrected{correction_name.c_str()};
    const TensorInfo read = read_tensor(op, corrected, correction);
    next.correction_dtype_ = correction_dtype(t.master_weights);
    check_dtype(op, corrected, read.dtype, next.correction_dtype_, "its master_weights");
    if (options.is_offloaded) like.device = {aoti_torch_device_type_cpu(), read.device.index};
    check_like(op, corrected, read, param_name, like);
    next.correction_storage_ = read.storage_needed;
    t.correction = is_meta ? nullptr : mutable_data(correction);
    check_home(corrected, t.correction);
  }

  if (!is_meta) check_no_overlap(op, {t}, {index});
  Record& record = records_[static_cast<size_t>(index)];
  const bool stays = record.plan_ >= 0 && record.device_ == next.device_ &&
                     record.options_.has_momentum == options.has_momentum &&
                     record.options_.is_offloaded == options.is_offloaded &&
                     // Arrays that follow each other are copied together: other arrays make other units.
                     (!options.is_offloaded || same_addresses(record.tensors_, next.tensors_, /*is_copy=*/true)) &&
                     same_but_addresses(record.tensors_, next.tensors_);
  if (stays) {
    next.plan_ = record.plan_;
    next.index_ = record.index_;
    if (!is_meta) {
      Planned& planned = *plans_[static_cast<size_t>(next.plan_)];
      ParameterTensors moved = next.tensors_;
      moved.gradient = nullptr;
      moved.hyper_index = planned.hyper_index[static_cast<size_t>(next.index_)];
      op.check(planned.plan.set_tensor(next.index_, moved));
      if (planned.offload != nullptr && options.is_offloaded) planned.offload->move(index, next.tensors_);
    }
    next.is_apart_ = record.is_apart_ && same_addresses(record.tensors_, next.tensors_, options.is_copy);
  } else {
    if (record.plan_ >= 0) {
      plans_[static_cast<size_t>(record.plan_)]->records[static_cast<size_t>(record.index_)] = -1;
    }
    is_stale_ = true;
  }
  record = std::move(next);
}

std::unique_ptr<Offload> Store::make_offload(Op op, const Planned& planned) const {
  std::vector<OffloadedRecord> offloaded;
  std::vector<int64_t> order;
  for (const int64_t i : planned.records) {
    const Record& one = record(i);
    if (!one.options_.is_offloaded) continue;
    offloaded.push_back({i, one.tensors_});
    if (one.touched_ >= 0) order.push_back(i);
  }
  if (offloaded.empty()) return nullptr;
  auto made = std::make_unique<Offload>(op, planned.backend, planned.device, optimizer_, planned.has_momentum,
                                        static_cast<int64_t>(planned.records.size()), offloaded, ring_);
  std::sort(order.begin(), order.end(),
            [this](int64_t a, int64_t b) { return record(a).touched_ < record(b).touched_; });
  made->expect(order);
  return made;
}

bool Store::plan(Op op) {
  if (!is_stale_) return false;
  synchronize(op);
  for (const auto& planned : plans_) planned->offload.reset();  // its ring's memory is the next one's
  std::map<std::tuple<int32_t, int32_t, bool>, std::unique_ptr<Planned>> made;
  for (size_t i = 0; i < records_.size(); ++i) {
    const Record& record = records_[i];
    if (!record.is_known_) continue;
    std::unique_ptr<Planned>& planned = made[{record.device_.type, record.device_.index, record.options_.has_momentum}];
    if (planned == nullptr) {
      planned = std::make_unique<Planned>();
      planned->device = record.device_;
      planned->backend = record.backend_;
      planned->has_momentum = record.options_.has_momentum;
    }
    planned->records.push_back(static_cast<int64_t>(i));
  }
  std::vector<std::unique_ptr<Planned>> plans;
  for (auto& [key, planned] : made) {
    planned->gradients.assign(planned->records.size(), nullptr);
    planned->hyper_index.assign(planned->records.size(), 0);
    if (planned->backend != Backend::kMeta) {
      std::vector<ParameterTensors> tensors;
      for (const int64_t i : planned->records) tensors.push_back(record(i).tensors_);
      op.check(DevicePlan::make(planned->backend, planned->device, optimizer_, planned->has_momentum, tensors,
                                &planned->plan));
      planned->offload = make_offload(op, *planned);
    }
    plans.push_back(std::move(planned));
  }
  for (size_t p = 0; p < plans.size(); ++p) {
    for (size_t at = 0; at < plans[p]->records.size(); ++at) {
      Record& record = records_[static_cast<size_t>(plans[p]->records[at])];
      record.plan_ = static_cast<int32_t>(p);
      record.index_ = static_cast<int32_t>(at);
      record.was_stepped_alone_ = false;
    }
  }
  plans_ = std::move(plans);
  is_stale_ = false;
  return true;
}

size_t Store::plan_size(int64_t index) const {
  const int32_t plan = record(index).plan_;
  return plan < 0 ? 1 : plans_[static_cast<size_t>(plan)]->records.size();
}

void Store::drop(int64_t index) {
  const Record& one = record(index);
  if (one.plan_ < 0 || !one.options_.is_offloaded) return;
  Offload* const offload = plans_[static_cast<size_t>(one.plan_)]->offload.get();
  if (offload != nullptr) offload->drop(index);
}

void Store::flush(Op op) {
  for (const auto& planned : plans_) {
    if (planned->offload != nullptr) op.check(planned->offload->flush());
  }
}

void Store::synchronize(Op op) {
  for (const auto& planned : plans_) {
    if (planned->offload != nullptr) op.check(planned->offload->synchronize());
  }
}

OffloadCounts Store::offload_counts() const {
  OffloadCounts sum;
  for (const auto& planned : plans_) {
    if (planned->offload == nullptr) continue;
    const OffloadCounts& one = planned->offload->counts();
    sum.up_bytes += one.up_bytes, sum.down_bytes += one.down_bytes;
    sum.up_copies += one.up_copies, sum.down_copies += one.down_copies;
    sum.prefetched += one.prefetched, sum.fetched += one.fetched;
  }
  return sum;
}

Store::PlanView Store::plan_view(int64_t plan) const {
  const Planned& planned = *plans_[static_cast<size_t>(plan)];
  return {planned.device, planned.backend, planned.records};
}

void Store::begin() {
  for (const auto& planned : plans_) {
    std::fill(planned->gradients.begin(), planned->gradients.end(), nullptr);
    planned->sets.clear();
    planned->places.clear();
    planned->taken = 0;
  }
  taken_ = 0;
  has_moved_ = false;
}

int32_t Store::place_of(Planned& planned, const Set& set) {
  // Mostly the set of the parameter before.
  if (!planned.sets.empty() && planned.sets.back() == set) return static_cast<int32_t>(planned.sets.size() - 1);
  const auto [found, is_new] = planned.places.try_emplace(set, static_cast<int32_t>(planned.sets.size()));
  if (is_new) planned.sets.push_back(set);
  return found->second;
}

void Store::take(int64_t index, const void* gradient, StepCount count) {
  const Record& record = records_[static_cast<size_t>(index)];
  Planned& planned = *plans_[static_cast<size_t>(record.plan_)];
  const auto at = static_cast<size_t>(record.index_);
  // An empty tensor has no address; it takes part all the same, so that its steps are counted.
  planned.gradients[at] = gradient;
  const int32_t set = place_of(planned, {record.options_.group, count});
  if (planned.hyper_index[at] != set) {
    planned.hyper_index[at] = set;
    if (planned.backend != Backend::kMeta) {
      static_cast<void>(planned.plan.set_hyper_index(record.index_, set));  // in range: fewer sets than records
    }
  }
  has_moved_ = has_moved_ || !record.is_apart_;
  ++planned.taken;
  ++taken_;
}

void Store::check_moved(Op op) {
  for (const auto& planned : plans_) {
    if (planned->backend == Backend::kMeta) continue;
    std::vector<ParameterTensors> tensors;
    std::vector<int64_t> taken;
    for (size_t at = 0; at < planned->records.size(); ++at) {
      if (planned->gradients[at] == nullptr) continue;
      taken.push_back(planned->records[at]);
      tensors.push_back(record(taken.back()).tensors_);
    }
    check_no_overlap(op, tensors, taken);
    for (const int64_t i : taken) records_[static_cast<size_t>(i)].is_apart_ = true;
  }
}

int64_t Store::only_plan(Op op) const {
  int64_t found = -1;
  for (size_t p = 0; p < plans_.size(); ++p) {
    if (plans_[p]->taken == 0) continue;
    if (found >= 0) op.fail("gradients are on several devices or of different numbers of states; needed is one plan");
    found = static_cast<int64_t>(p);
  }
  return found;
}

void Store::fill_in(const Planned& planned, const std::vector<GroupHyperparameters>& groups, const Controls& controls,
                    std::vector<Hyperparameters>* hypers, StepControls* step) const {
  bool has_lrs = false, has_counters = false;
  for (const Set& set : planned.sets) {
    const GroupHyperparameters& group = groups[static_cast<size_t>(set.group)];
    hypers->push_back(group.values);
    hypers->back().step = set.count.on_device == nullptr ? set.count.taken + 1 : 1;
    step->lrs.push_back(group.lr);
    step->steps.push_back(set.count.on_device);
    has_lrs = has_lrs || group.lr != nullptr;
    has_counters = has_counters || set.count.on_device != nullptr;
  }
  if (!has_lrs) step->lrs.clear();
  if (!has_counters) step->steps.clear();
  step->gradient_scale = controls.gradient_scale;
  step->gradient_divisor = controls.gradient_divisor;
  step->clip_coefficient = controls.clip_coefficient;
  step->found_inf = controls.found_inf;
  step->nonfinite_gradients = controls.nonfinite_gradients;
  step->telemetry = controls.telemetry;
  step->telemetry_stride = controls.telemetry_stride;
}

void Store::step(Op op, const std::vector<GroupHyperparameters>& groups, const std::vector<Controls>& controls) {
  struct Work {
    Planned* planned;
    std::vector<Hyperparameters> hypers;
    StepControls controls;
  };
  stepped_.clear();
  if (has_moved_) check_moved(op);
  std::vector<Work> works;
  for (size_t p = 0; p < plans_.size(); ++p) {
    Planned& planned = *plans_[p];
    if (planned.taken == 0 || planned.backend == Backend::kMeta) continue;
    Work& work = works.emplace_back();
    work.planned = &planned;
    fill_in(planned, groups, controls[p], &work.hypers, &work.controls);
    op.check(planned.plan.set_gradients(planned.gradients.data()));
  }
  if (works.size() > 1) {
    for (Work& work : works) op.check(work.planned->plan.check_step(work.hypers, work.controls));
  }
  for (Work& work : works) {
    Planned& planned = *work.planned;
    if (planned.offload != nullptr) {
      step_offloaded(op, planned, work.hypers, work.controls);
    } else {
      op.check(planned.plan.step(work.hypers, work.controls));
    }
    for (size_t at = 0; at < planned.records.size(); ++at) {
      const bool is_stepped = planned.gradients[at] != nullptr && !record(planned.records[at]).options_.is_offloaded;
      if (is_stepped) stepped_.push_back(planned.records[at]);
    }
  }
}

void Store::step_offloaded(Op op, Planned& planned, std::vector<Hyperparameters>& hypers,
                           const StepControls& controls) {
  std::vector<OffloadedStep> taken;
  std::vector<int64_t> others;  // places in the plan of those whose states are on the device
  for (size_t at = 0; at < planned.records.size(); ++at) {
    if (planned.gradients[at] == nullptr) continue;
    const int64_t index = planned.records[at];
    if (record(index).options_.is_offloaded) {
      taken.push_back({index, planned.gradients[at], planned.hyper_index[at]});
    } else {
      others.push_back(static_cast<int64_t>(at));
    }
  }
  op.check(planned.plan.check_step(hypers, controls));
  op.check(planned.plan.count(hypers, controls));
  if (!others.empty()) {
    op.check(planned.plan.step_counted(others.data(), static_cast<int64_t>(others.size()), hypers, controls));
  }
  op.check(planned.offload->step(taken, /*is_alone=*/false, hypers, controls, &stepped_));
}

void Store::step_one(Op op, int64_t index, const void* gradient, StepCount count, const GroupHyperparameters& group,
                     const Controls& controls) {
  Record& record = records_[static_cast<size_t>(index)];
  stepped_.clear();
  if (record.backend_ == Backend::kMeta) return;
  if (record.options_.is_offloaded) return step_one_offloaded(op, index, gradient, count, group, controls);
  Planned alone, *planned = &alone;
  int64_t at = 0;
  if (record.plan_ >= 0) {
    planned = plans_[static_cast<size_t>(record.plan_)].get();
    at = record.index_;
    op.check(planned->plan.set_gradient(at, gradient));
    if (planned->hyper_index[static_cast<size_t>(at)] != 0) {
      planned->hyper_index[static_cast<size_t>(at)] = 0;
      op.check(planned->plan.set_hyper_index(at, 0));
    }
  } else {
    ParameterTensors tensors = record.tensors_;
    tensors.gradient = gradient;
    op.check(DevicePlan::make(record.backend_, record.device_, optimizer_, record.options_.has_momentum, {tensors},
                              &alone.plan));
    record.was_stepped_alone_ = true;
  }
  Planned one;
  one.sets = {{0, count}};
  std::vector<Hyperparameters> hypers;
  StepControls step;
  fill_in(one, {group}, controls, &hypers, &step);
  const Status status = planned->plan.step_some(&at, 1, hypers, step);
  if (record.plan_ >= 0) static_cast<void>(planned->plan.set_gradient(at, nullptr));
  op.check(status);
  stepped_.push_back(index);
}

void Store::step_one_offloaded(Op op, int64_t index, const void* gradient, StepCount count,
                               const GroupHyperparameters& group, const Controls& controls) {
  Record& record = records_[static_cast<size_t>(index)];
  Planned one;
  one.sets = {{0, count}};
  std::vector<Hyperparameters> hypers;
  StepControls step;
  fill_in(one, {group}, controls, &hypers, &step);
  Offload* offload = nullptr;
  std::unique_ptr<Offload> alone;
  if (record.plan_ >= 0) offload = plans_[static_cast<size_t>(record.plan_)]->offload.get();
  if (offload == nullptr) {
    alone = std::make_unique<Offload>(op, record.backend_, record.device_, optimizer_, record.options_.has_momentum, 1,
                                      std::vector<OffloadedRecord>{{index, record.tensors_}}, ring_);
    offload = alone.get();
    record.was_stepped_alone_ = true;
    record.touched_ = touches_++;
  }
  op.check(offload->plan().count(hypers, step));
  op.check(offload->step({{index, gradient, 0}}, /*is_alone=*/true, hypers, step, &stepped_));
}

void Store::gradient_norm(Op op, int64_t plan, float gradient_scale, const float* gradient_divisor, float max_norm,
                          cuda::GradientNorm* result) {
  Planned& planned = *plans_[static_cast<size_t>(plan)];
  op.check(planned.plan.set_gradients(planned.gradients.data()));
  op.check(planned.plan.gradient_norm(gradient_scale, gradient_divisor, max_norm, result));
}

}  // namespace flashoptim::store
