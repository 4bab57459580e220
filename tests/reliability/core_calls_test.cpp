// Wrong calls of everything in include/flashoptim: each is the Status that is documented, names what is wrong, and has
// changed nothing. Under the asan preset it also shows that nothing was read or written on the way.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/kernels/test_tensors.h"
#include "tests/reliability/tally.h"

namespace flashoptim::test {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kLeast = std::numeric_limits<int64_t>::min();
constexpr int32_t kMost32 = std::numeric_limits<int32_t>::max(), kLeast32 = std::numeric_limits<int32_t>::min();
constexpr int kNoChoices[] = {-1, 7, 99, kMost32, kLeast32};
const Storage kNarrow{DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection16};
const Storage kStorages[] = {kNarrow,
                             {DType::kFloat32, DType::kFloat32, MasterWeights::kNone},
                             {DType::kFloat16, DType::kFloat32, MasterWeights::kCorrection8Nearest}};
/// Rows of 40 elements: the last group of each is short.
const std::vector<int64_t> kShape{3, 40};

template <class T>
T* misplaced(T* pointer) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + 1);
}

/// Two tensors, a plan over them and the arguments of good calls.
class Sound {
 public:
  explicit Sound(const OptimizerChoice& optimizer, StateCodec codec = StateCodec::kDefault,
                 const Storage& storage = kNarrow)
      : optimizer(optimizer),
        a(optimizer, codec, storage, kShape, 1),
        b(optimizer, codec, storage, kShape, 2),
        list{a.tensors(), b.tensors()},
        values(static_cast<size_t>(a.numel())),
        weights(static_cast<size_t>(a.numel())) {
    EXPECT_TRUE(Plan::make(optimizer.kind, optimizer.has_momentum, list.data(), 2, &plan).is_ok());
    hypers = {busy_hyperparameters(1), busy_hyperparameters(1)};
    EXPECT_TRUE(plan.step(hypers.data(), 2).is_ok());
    for (Hyperparameters& h : hypers) h.step = 2;
  }
  /// All that calls could change, byte by byte.
  std::vector<unsigned char> everything() const {
    std::vector<unsigned char> out;
    const auto append = [&out](const void* p, size_t bytes) {
      out.insert(out.end(), static_cast<const unsigned char*>(p), static_cast<const unsigned char*>(p) + bytes);
    };
    a.append_to(out);
    b.append_to(out);
    for (const TestTensor* t : {&a, &b}) out.push_back(t->guards_intact());
    for (int64_t i = 0; i < plan.size(); ++i) {
      const ParameterTensors& t = plan.tensor(i);
      for (const void* p : {static_cast<const void*>(t.parameter), t.gradient, static_cast<const void*>(t.correction)})
        append(&p, sizeof p);
      append(t.states, sizeof t.states);
      append(t.scales, sizeof t.scales);
      append(&t.hyper_index, sizeof t.hyper_index);
    }
    append(&nonfinite, sizeof nonfinite);
    append(telemetry, sizeof telemetry);
    append(weights.data(), weights.size() * sizeof(float));
    for (const std::vector<float>& slot : values.slots) append(slot.data(), slot.size() * sizeof(float));
    return out;
  }
  Status make(const ParameterTensors* tensors, int64_t count, Plan* made) const {
    return Plan::make(optimizer.kind, optimizer.has_momentum, tensors, count, made);
  }
  Status decode(const ParameterTensors& t) {
    return decode_states(optimizer.kind, optimizer.has_momentum, t, values.pointers);
  }
  Status encode(const ParameterTensors& t) {
    return encode_states(optimizer.kind, optimizer.has_momentum, t, values.pointers);
  }

  const OptimizerChoice& optimizer;
  TestTensor a, b;
  std::vector<ParameterTensors> list;
  Plan plan;
  std::vector<Hyperparameters> hypers;
  StepTelemetry telemetry[2] = {};
  int64_t nonfinite = 0, indices[2] = {0, 1};
  const void* gradients[2] = {nullptr, nullptr};
  SlotValues values;
  std::vector<float> weights;
};

class Calls {
 public:
  explicit Calls(const char* name) : tally_(name) {}
  /// A call that must be refused with `code` and a message that has `text` in it.
  void refused(Sound& sound, const std::string& what, const char* text, const std::function<Status()>& call,
               StatusCode code = StatusCode::kInvalidArgument) {
    const std::vector<unsigned char> before = sound.everything();
    const Status status = call();
    std::string problem;
    if (status.code() != code) problem = "code " + std::to_string(static_cast<int>(status.code()));
    if (status.message().find(text) == std::string::npos) problem += " does not say '" + std::string(text) + "'";
    if (sound.everything() != before) problem += " changed something";
    tally_.count(problem.empty() ? "" : what + ":" + problem + ": " + status.message());
  }
  /// A question whose answer must be `right`.
  void answered(const std::string& what, bool right) { tally_.count(right ? "" : what); }
  int tried() const { return tally_.tried(); }

 private:
  Tally tally_;
};

// ---- What describes a tensor ---------------------------------------------------------------------------------------

struct Spoiled {
  const char* text;
  void (*spoil)(ParameterTensors&);
  bool of_states = false;  ///< decode_states and encode_states look at it, too
  StatusCode code = StatusCode::kInvalidArgument;
};
const Spoiled kSpoiled[] = {
    {"parameter is null", [](ParameterTensors& t) { t.parameter = nullptr; }},
    {"states[0] is null", [](ParameterTensors& t) { t.states[0] = nullptr; }, true},
    {"overlaps", [](ParameterTensors& t) { t.states[0] = t.parameter; }},
    {"overlaps", [](ParameterTensors& t) { t.states[0] = static_cast<char*>(t.parameter) + 1; }},
    {"overlaps", [](ParameterTensors& t) { t.parameter = static_cast<char*>(t.states[0]) + 39; }},
    {"goes past the last address",
     [](ParameterTensors& t) { t.states[0] = reinterpret_cast<void*>(std::numeric_limits<uintptr_t>::max() - 8); },
     true},
    {"layout", [](ParameterTensors& t) { t.layout.rows = -1; }, true},
    {"layout", [](ParameterTensors& t) { t.layout.row_size = -1; }, true},
    {"layout", [](ParameterTensors& t) { t.layout = {kLeast, kLeast}; }, true},
    {"layout", [](ParameterTensors& t) { t.layout = {kMost, kMost}; }, true},
    {"layout", [](ParameterTensors& t) { t.layout = {kMost, 1}; }, true},
    {"layout", [](ParameterTensors& t) { t.layout = {1, kMost}; }, true},
    {"layout", [](ParameterTensors& t) { t.layout = {0, kMost}; }, true},
    {"layout", [](ParameterTensors& t) { t.layout = {int64_t{1} << 29, int64_t{1} << 29}; }, true},
    {"place.first_element", [](ParameterTensors& t) { t.place.first_element = -1; }, true},
    {"place.first_element", [](ParameterTensors& t) { t.place.first_element = kMost; }, true},
    {"place.first_element", [](ParameterTensors& t) { t.place = {41, 0, 0, {4, 40}}; }, true},
    {"place.run", [](ParameterTensors& t) { t.place.run = -1; }, true},
    {"place.run", [](ParameterTensors& t) { t.place = {0, 7, 14, {40, 14}}; }, true},
    {"place.run", [](ParameterTensors& t) { t.place = {0, 40, 80, {}}; }, true},
    {"place.stride", [](ParameterTensors& t) { t.place = {0, 40, 39, {3, 80}}; }, true},
    {"place.stride", [](ParameterTensors& t) { t.place = {0, 40, kLeast, {3, 80}}; }, true},
    {"place.first_element", [](ParameterTensors& t) { t.place = {0, 40, kMost, {3, 80}}; }, true},
    {"place.whole", [](ParameterTensors& t) { t.place.whole = {-3, 40}; }, true},
    {"place.whole", [](ParameterTensors& t) { t.place.whole = {kMost, 40}; }, true},
    {"hyper_index", [](ParameterTensors& t) { t.hyper_index = -1; }, true},
    {"hyper_index", [](ParameterTensors& t) { t.hyper_index = kLeast32; }, true},
    {"hyper_index", [](ParameterTensors& t) { t.hyper_index = kMost32; }, true},
    {"hyper_index", [](ParameterTensors& t) { t.hyper_index = kMost32 - 1; }, true},
    {"hyper_index", [](ParameterTensors& t) { t.hyper_index = kMaxHyperparameterSets; }, true},
};

/// What cannot be spoiled in every tensor: by what it has.
std::vector<Spoiled> spoiled_of(const ParameterTensors& t, int states) {
  std::vector<Spoiled> all;
  for (const Spoiled& s : kSpoiled) {
    const bool needs_states = std::string(s.text).find("states") != std::string::npos ||
                              std::string(s.text) == "overlaps" || std::string(s.text).find("past") == 5;
    if (states > 0 || !needs_states) all.push_back(s);
  }
  if (t.correction != nullptr) {
    all.push_back({"correction is null", [](ParameterTensors& b) { b.correction = nullptr; }});
    all.push_back({"correction overlaps", [](ParameterTensors& b) { b.correction = b.parameter; }});
  }
  if (states > 0 && t.scales[0] != nullptr) {
    all.push_back({"scales[0] is null", [](ParameterTensors& b) { b.scales[0] = nullptr; }, true});
    all.push_back({"scales[0] overlaps", [](ParameterTensors& b) { b.scales[0] = b.states[0]; }, true});
    // A group of the whole is cut.
    all.push_back({"place.first_element", [](ParameterTensors& b) { b.place = {7, 0, 0, {30, 40}}; }, true});
  }
  if (states > 1) {
    all.push_back({"states[1] is null", [](ParameterTensors& b) { b.states[1] = nullptr; }, true});
    all.push_back({"states[1] overlaps", [](ParameterTensors& b) { b.states[1] = b.states[0]; }, true});
  }
  return all;
}

TEST(WrongCalls, TensorsOfPlansAndConversions) {
  Calls calls("torch-free API: tensors");
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (const StateCodec codec : kCodecs) {
      for (const Storage& storage : kStorages) {
        Sound s(optimizer, codec, storage);
        const std::string where = describe(optimizer, codec, storage);
        for (const Spoiled& bad : spoiled_of(s.list[1], optimizer.states)) {
          std::vector<ParameterTensors> list = s.list;
          bad.spoil(list[1]);
          const std::string what = where + ", " + bad.text;
          calls.refused(s, "make " + what, bad.text, [&] { return s.make(list.data(), 2, &s.plan); }, bad.code);
          calls.refused(s, "set_tensor " + what, "tensor.", [&] { return s.plan.set_tensor(1, list[1]); }, bad.code);
          if (!bad.of_states || optimizer.states == 0) continue;
          calls.refused(s, "decode " + what, bad.text, [&] { return s.decode(list[1]); }, bad.code);
          calls.refused(s, "encode " + what, bad.text, [&] { return s.encode(list[1]); }, bad.code);
        }
      }
    }
  }
  EXPECT_GT(calls.tried(), 3000);
}

TEST(WrongCalls, ChoicesThatAreNone) {
  Calls calls("torch-free API: choices");
  const struct {
    const char* text;
    void (*spoil)(ParameterTensors&, int);
  } fields[] = {
      {"parameter_dtype", [](ParameterTensors& t, int v) { t.parameter_dtype = static_cast<DType>(v); }},
      {"gradient_dtype", [](ParameterTensors& t, int v) { t.gradient_dtype = static_cast<DType>(v); }},
      {"master_weights", [](ParameterTensors& t, int v) { t.master_weights = static_cast<MasterWeights>(v); }},
      {"state_codec", [](ParameterTensors& t, int v) { t.state_codec = static_cast<StateCodec>(v); }},
  };
  for (const OptimizerChoice& optimizer : kOptimizers) {
    Sound s(optimizer);
    std::vector<ParameterTensors> list = s.list;
    for (const int value : kNoChoices) {
      for (const auto& field : fields) {
        list[1] = s.list[1];
        field.spoil(list[1], value);
        const std::string text = std::string(field.text) + " = " + std::to_string(value);
        calls.refused(s, "make", text.c_str(), [&] { return s.make(list.data(), 2, &s.plan); });
        calls.refused(s, "set_tensor", text.c_str(), [&] { return s.plan.set_tensor(1, list[1]); });
      }
      list[1] = s.list[1];
      list[1].state_codec = static_cast<StateCodec>(value);
      calls.refused(s, "decode", "state_codec", [&] { return s.decode(list[1]); });
      calls.refused(s, "encode", "state_codec", [&] { return s.encode(list[1]); });
      const auto kind = static_cast<OptimizerKind>(value);
      const std::string text = "optimizer = " + std::to_string(value);
      for (const bool momentum : {false, true}) {
        calls.refused(s, "make", text.c_str(), [&] { return Plan::make(kind, momentum, s.list.data(), 2, &s.plan); });
        calls.refused(s, "decode", text.c_str(),
                      [&] { return decode_states(kind, momentum, s.list[0], s.values.pointers); });
        calls.refused(s, "encode", text.c_str(),
                      [&] { return encode_states(kind, momentum, s.list[0], s.values.pointers); });
        calls.answered("state_count", state_count(kind, momentum) == 0);
      }
      calls.refused(s, "check_optimizer", text.c_str(), [&] { return check_optimizer(kind); });
      calls.refused(s, "check_hyperparameters", text.c_str(), [&] { return check_hyperparameters(kind, s.hypers[0]); });
      calls.refused(s, "set_hyperparameter", text.c_str(),
                    [&] { return set_hyperparameter(kind, 0, 0.1, &s.hypers[0]); });
      calls.answered("names", *optimizer_name(kind) == '\0' && *optimizer_title(kind) == '\0');
      calls.answered("counts", hyperparameter_count(kind) == 0 && *hyperparameter(kind, 0).name == '\0' &&
                                   *state_slot(kind, 0).name == '\0');
    }
    calls.refused(
        s, "make", "master_weights",
        [&] {
          list = s.list;
          list[1].parameter_dtype = list[1].gradient_dtype = DType::kFloat32;
          return s.make(list.data(), 2, &s.plan);
        },
        StatusCode::kUnsupported);
    calls.refused(
        s, "make", "gradient_dtype",
        [&] {
          list = s.list;
          list[1].gradient_dtype = DType::kFloat16;
          return s.make(list.data(), 2, &s.plan);
        },
        StatusCode::kUnsupported);
  }
  for (const int64_t index : {int64_t{-1}, optimizer_count(), int64_t{1} << 32, kMost, kLeast}) {
    calls.answered("optimizer_at", !check_optimizer(optimizer_at(index)).is_ok());
  }
  EXPECT_GT(calls.tried(), 500);
}

// ---- Hyperparameters ------------------------------------------------------------------------------------------------

/// Values of a field that are not allowed, as far as the field can hold them.
std::vector<double> not_allowed(const HyperparameterInfo& info) {
  std::vector<double> values{NAN, INFINITY, -INFINITY, -1.0, 1e300, std::nextafter(info.lowest, -INFINITY)};
  if (!info.lowest_allowed) values.push_back(info.lowest);
  if (std::isfinite(info.highest)) values.push_back(std::nextafter(info.highest, INFINITY));
  if (std::isfinite(info.highest) && !info.highest_allowed) values.push_back(info.highest);
  if (info.kind != HyperparameterKind::kNumber) values.push_back(0.5);
  std::erase_if(values, [&info](double v) {
    const bool is_in = (info.lowest_allowed ? v >= info.lowest : v > info.lowest) &&
                       (info.highest_allowed ? v <= info.highest : v < info.highest);
    return is_in && (info.kind == HyperparameterKind::kNumber || v == std::floor(v));
  });
  return values;
}

/// The field of a whole number or number, by the offset at which set_hyperparameter() writes.
bool write_raw(OptimizerKind kind, int64_t index, double value, Hyperparameters* hyper) {
  const HyperparameterInfo info = hyperparameter(kind, index);
  if (info.kind != HyperparameterKind::kNumber) return false;  // counts: below
  const Hyperparameters before = *hyper;
  // Whatever of the two the field had, it changes with one of them.
  for (const double probe : {0.25, 0.75}) {
    Hyperparameters changed = before;
    if (!set_hyperparameter(kind, index, probe, &changed).is_ok()) continue;
    unsigned char a[sizeof before], b[sizeof before];
    std::memcpy(a, &before, sizeof a);
    std::memcpy(b, &changed, sizeof b);
    for (size_t at = 0; at < sizeof a; at += sizeof(double)) {
      if (std::memcmp(a + at, b + at, sizeof(double)) == 0) continue;
      std::memcpy(reinterpret_cast<unsigned char*>(hyper) + at, &value, sizeof value);
      return true;
    }
  }
  return false;
}

TEST(WrongCalls, Hyperparameters) {
  Calls calls("torch-free API: hyperparameters");
  for (const OptimizerChoice& optimizer : kOptimizers) {
    Sound s(optimizer);
    const std::vector<Hyperparameters> good = s.hypers;
    const auto refused_in_steps = [&](const std::string& name) {
      const std::string at_1 = "hypers[1]." + name;
      EXPECT_TRUE(s.plan.set_hyper_index(1, 1).is_ok());
      calls.refused(s, "step", at_1.c_str(), [&] { return s.plan.step(s.hypers.data(), 2); });
      calls.refused(s, "check_step", at_1.c_str(), [&] { return s.plan.check_step(s.hypers.data(), 2); });
      calls.refused(s, "step_some", at_1.c_str(), [&] { return s.plan.step_some(s.indices, 2, s.hypers.data(), 2); });
      calls.refused(s, "inspect", at_1.c_str(),
                    [&] { return s.plan.inspect(s.hypers.data(), 2, {}, {}, s.telemetry); });
      calls.refused(s, "check", name.c_str(), [&] { return check_hyperparameters(optimizer.kind, s.hypers[1]); });
    };
    for (int64_t i = 0; i < hyperparameter_count(optimizer.kind); ++i) {
      const HyperparameterInfo info = hyperparameter(optimizer.kind, i);
      for (const double value : not_allowed(info)) {
        s.hypers = good;
        calls.refused(s, optimizer.name, info.name,
                      [&] { return set_hyperparameter(optimizer.kind, i, value, &s.hypers[1]); });
        calls.answered("set_hyperparameter left it", get_hyperparameter(optimizer.kind, i, s.hypers[1]) ==
                                                         get_hyperparameter(optimizer.kind, i, good[1]));
        if (write_raw(optimizer.kind, i, value, &s.hypers[1])) refused_in_steps(info.name);
      }
    }
    for (const int64_t step : {int64_t{0}, int64_t{-1}, kLeast}) {
      s.hypers = good;
      s.hypers[1].step = step;
      refused_in_steps("step = " + std::to_string(step));
    }
    if (optimizer.kind == OptimizerKind::kAdEMAMix) {
      for (int64_t Hyperparameters::*const field : {&Hyperparameters::t_alpha, &Hyperparameters::t_beta3}) {
        s.hypers = good;
        s.hypers[1].*field = -1;
        refused_in_steps("t_");
      }
    }
    s.hypers = good;
    for (const int64_t index : {int64_t{-1}, hyperparameter_count(optimizer.kind), kMost, kLeast}) {
      calls.refused(s, "set_hyperparameter", "index",
                    [&] { return set_hyperparameter(optimizer.kind, index, 0.1, &s.hypers[0]); });
      calls.answered("no such hyperparameter", *hyperparameter(optimizer.kind, index).name == '\0' &&
                                                   get_hyperparameter(optimizer.kind, index, s.hypers[0]) == 0.0);
    }
    for (const int slot : {-1, kMaxSlots, kMost32, kLeast32}) {
      calls.answered("no such slot", *state_slot(optimizer.kind, slot).name == '\0');
    }
    for (const float scale : {NAN, INFINITY, -INFINITY}) {
      StepOptions options;
      options.gradient_scale = scale;
      calls.refused(s, "step", "gradient_scale", [&] { return s.plan.step(s.hypers.data(), 2, options); });
      calls.refused(s, "check_step", "gradient_scale", [&] { return s.plan.check_step(s.hypers.data(), 2, options); });
      calls.refused(s, "step_some", "gradient_scale",
                    [&] { return s.plan.step_some(s.indices, 2, s.hypers.data(), 2, options); });
      calls.refused(s, "inspect", "gradient_scale",
                    [&] { return s.plan.inspect(s.hypers.data(), 2, options, {}, s.telemetry); });
    }
  }
  EXPECT_GT(calls.tried(), 1000);
}

// ---- Pointers, counts and indices of calls --------------------------------------------------------------------------

TEST(WrongCalls, PointersCountsAndIndices) {
  Calls calls("torch-free API: pointers, counts, indices");
  for (const OptimizerChoice& optimizer : kOptimizers) {
    Sound s(optimizer);
    Hyperparameters* const hypers = s.hypers.data();
    ASSERT_TRUE(s.plan.set_hyper_index(1, 1).is_ok());
    const auto check = [&](const char* text, const std::function<Status()>& call) {
      calls.refused(s, std::string(optimizer.name) + " " + text, text, call);
    };
    check("plan is null", [&] { return s.make(s.list.data(), 2, nullptr); });
    check("plan is at", [&] { return s.make(s.list.data(), 2, misplaced(&s.plan)); });
    check("tensors null", [&] { return s.make(nullptr, 2, &s.plan); });
    check("tensors is at", [&] { return s.make(misplaced(s.list.data()), 1, &s.plan); });
    for (const int64_t count : {int64_t{-1}, kLeast, int64_t{1} << 31, kMost}) {
      check("count", [&] { return s.make(s.list.data(), count, &s.plan); });
    }
    for (const int64_t index : {int64_t{-1}, int64_t{2}, int64_t{1} << 32, kMost, kLeast}) {
      check("index", [&] { return s.plan.set_gradient(index, nullptr); });
      check("index", [&] { return s.plan.set_hyper_index(index, 0); });
      check("index", [&] { return s.plan.set_tensor(index, s.list[0]); });
      calls.answered("tensor", s.plan.tensor(index).parameter == nullptr);
      const int64_t named[] = {0, index};
      check("indices[1]", [&] { return s.plan.step_some(named, 2, hypers, 2); });
    }
    for (const int32_t index : {-1, 2, kMost32, kLeast32}) {
      check("hyper_index", [&] { return s.plan.set_hyper_index(1, index); });
    }
    check("gradients is null", [&] { return s.plan.set_gradients(nullptr); });
    check("gradients is at", [&] { return s.plan.set_gradients(misplaced(s.gradients)); });
    const int64_t twice[] = {1, 1};
    check("second time", [&] { return s.plan.step_some(twice, 2, hypers, 2); });
    check("indices is null", [&] { return s.plan.step_some(nullptr, 2, hypers, 2); });
    check("indices is at", [&] { return s.plan.step_some(misplaced(s.indices), 1, hypers, 2); });
    for (const int64_t count : {int64_t{-1}, int64_t{3}, kMost, kLeast}) {
      check("count", [&] { return s.plan.step_some(s.indices, count, hypers, 2); });
    }
    const std::function<Status(const Hyperparameters*, int64_t, const StepOptions&)> steps[] = {
        [&](auto* h, int64_t count, const StepOptions& o) { return s.plan.step(h, count, o); },
        [&](auto* h, int64_t count, const StepOptions& o) { return s.plan.check_step(h, count, o); },
        [&](auto* h, int64_t count, const StepOptions& o) { return s.plan.step_some(s.indices, 2, h, count, o); },
        [&](auto* h, int64_t count, const StepOptions& o) { return s.plan.inspect(h, count, o, {}, s.telemetry); },
    };
    const float no_inf = 0.0f;
    for (const auto& step : steps) {
      check("hypers is null", [&] { return step(nullptr, 2, {}); });
      check("hypers is at", [&] { return step(misplaced(hypers), 2, {}); });
      check("count", [&] { return step(hypers, -1, {}); });
      check("count", [&] { return step(hypers, kLeast, {}); });
      for (const int64_t count : {int64_t{0}, int64_t{1}}) check("hypers has", [&] { return step(hypers, count, {}); });
      StepOptions options;
      options.found_inf = misplaced(&no_inf);
      check("found_inf", [&] { return step(hypers, 2, options); });
      options.found_inf = nullptr;
      options.nonfinite_gradients = misplaced(&s.nonfinite);
      check("nonfinite_gradients", [&] { return step(hypers, 2, options); });
    }
    check("telemetry is null", [&] { return s.plan.inspect(hypers, 2, {}, {}, nullptr); });
    check("telemetry is at", [&] { return s.plan.inspect(hypers, 2, {}, {}, misplaced(s.telemetry)); });
    for (const int64_t stride : {int64_t{0}, int64_t{-1}, kLeast}) {
      check("stride", [&] { return s.plan.inspect(hypers, 2, {}, {stride}, s.telemetry); });
    }
    Plan empty;
    check("index", [&] { return empty.set_gradient(0, nullptr); });
    check("index", [&] { return empty.set_hyper_index(0, 0); });
    check("index", [&] { return empty.set_tensor(0, s.list[0]); });
    check("plan is empty", [&] { return empty.step(hypers, 2); });
    check("plan is empty", [&] { return empty.step_some(s.indices, 0, hypers, 2); });
    check("plan is empty", [&] { return empty.check_step(hypers, 2); });
    check("plan is empty", [&] { return empty.inspect(hypers, 2, {}, {}, s.telemetry); });
    calls.answered("an empty plan", empty.size() == 0 && empty.tensor(0).parameter == nullptr);
    if (optimizer.states == 0) continue;
    const auto convert = [&](const char* text, float* const* values, const ParameterTensors& t) {
      check(text, [&] { return decode_states(optimizer.kind, optimizer.has_momentum, t, values); });
      check(text, [&] { return encode_states(optimizer.kind, optimizer.has_momentum, t, values); });
    };
    convert("values is null", nullptr, s.list[0]);
    convert("values is at", misplaced(&s.values.pointers[0]), s.list[0]);
    for (int k = 0; k < optimizer.states; ++k) {
      float* pointers[kMaxSlots];
      const auto with = [&](float* p) {
        std::copy_n(s.values.pointers, kMaxSlots, pointers);
        pointers[k] = p;
        return pointers;
      };
      convert(("values[" + std::to_string(k) + "] is null").c_str(), with(nullptr), s.list[0]);
      convert("overlaps", with(static_cast<float*>(s.list[0].states[k])), s.list[0]);
      convert("overlaps", with(reinterpret_cast<float*>(static_cast<char*>(s.list[0].scales[k]) - 3)), s.list[0]);
      if (k > 0) convert("overlaps", with(s.values.pointers[0] + 5), s.list[0]);
    }
  }
  EXPECT_GT(calls.tried(), 500);
}

TEST(WrongCalls, ConversionsOfWeights) {
  Calls calls("torch-free API: conversions of weights");
  Sound s(kOptimizers[0]);
  ParameterTensors& t = s.list[0];
  const int64_t numel = t.layout.numel();
  struct Arguments {
    DType dtype;
    MasterWeights master;
    void *parameter, *correction;
    float* weights;
    int64_t count;
  };
  const Arguments good{t.parameter_dtype, t.master_weights, t.parameter, t.correction, s.weights.data(), numel};
  const auto check = [&](const char* text, const std::function<void(Arguments&)>& spoil,
                         StatusCode code = StatusCode::kInvalidArgument) {
    Arguments a = good;
    spoil(a);
    calls.refused(
        s, "merge_weights", text,
        [&] { return merge_weights(a.dtype, a.master, a.parameter, a.correction, a.weights, a.count); }, code);
    calls.refused(
        s, "split_weights", text,
        [&] { return split_weights(a.dtype, a.master, a.weights, a.parameter, a.correction, a.count); }, code);
  };
  check("weights is null", [](Arguments& a) { a.weights = nullptr; });
  check("parameter is null", [](Arguments& a) { a.parameter = nullptr; });
  check("correction is null", [](Arguments& a) { a.correction = nullptr; });
  check("overlaps", [](Arguments& a) { a.weights = static_cast<float*>(a.parameter); });
  check("overlaps", [](Arguments& a) { a.weights = static_cast<float*>(a.correction); });
  check("overlaps", [](Arguments& a) { a.parameter = a.weights + 119; });
  check("overlaps", [](Arguments& a) { a.correction = static_cast<char*>(a.parameter) + 1; });
  for (const int64_t count : {int64_t{-1}, kLeast, kMost, (int64_t{1} << 57) + 1}) {
    check("count", [count](Arguments& a) { a.count = count; });
  }
  check("past the last address",
        [](Arguments& a) { a.weights = reinterpret_cast<float*>(std::numeric_limits<uintptr_t>::max() - 3); });
  for (const int value : kNoChoices) {
    check("dtype", [value](Arguments& a) { a.dtype = static_cast<DType>(value); });
    check("master_weights", [value](Arguments& a) { a.master = static_cast<MasterWeights>(value); });
  }
  check("master_weights", [](Arguments& a) { a.dtype = DType::kFloat32; }, StatusCode::kUnsupported);

  constexpr auto k8 = MasterWeights::kCorrection8, k16 = MasterWeights::kCorrection16;
  int16_t narrow[64] = {}, wide[64] = {};
  const auto rescale = [&](const char* text, MasterWeights from, const void* in, MasterWeights to, void* out,
                           int64_t count) {
    calls.refused(s, "rescale_corrections", text, [&] { return rescale_corrections(from, in, to, out, count); });
  };
  for (const int value : {-1, 0, 1, 6, kMost32, kLeast32}) {
    rescale("from", static_cast<MasterWeights>(value), narrow, k16, wide, 60);
    rescale("to", k8, narrow, static_cast<MasterWeights>(value), wide, 60);
  }
  rescale("corrections is null", k8, nullptr, k16, wide, 60);
  rescale("rescaled is null", k8, narrow, k16, nullptr, 60);
  rescale("overlaps", k8, narrow, k16, narrow, 60);
  rescale("overlaps", k16, narrow, k16, narrow + 1, 60);
  rescale("overlaps", k16, narrow, k8, narrow + 59, 60);
  for (const int64_t count : {int64_t{-1}, kLeast, kMost}) rescale("count", k8, narrow, k16, wide, count);
  calls.answered("in place", rescale_corrections(k16, narrow, k16, narrow, 60).is_ok());

  calls.refused(s, "cpu_isa", "name is null", [] { return cpu_isa(nullptr); });
  const char* isa = nullptr;
  calls.refused(s, "cpu_isa", "name is at", [&] { return cpu_isa(misplaced(&isa)); });
  OptimizerKind kind = OptimizerKind::kLion;
  for (const char* name : {"", "AdamW", "adamw ", "lamb"}) {
    calls.refused(s, "find_optimizer", "allowed are", [&] { return find_optimizer(name, &kind); });
  }
  calls.refused(s, "find_optimizer", "name is null", [&] { return find_optimizer(nullptr, &kind); });
  calls.refused(s, "find_optimizer", "optimizer is null", [] { return find_optimizer("adamw", nullptr); });
  calls.refused(s, "find_optimizer", "optimizer is at", [&] { return find_optimizer("adamw", misplaced(&kind)); });
  calls.answered("kind", kind == OptimizerKind::kLion);
  calls.refused(s, "set_hyperparameter", "null",
                [] { return set_hyperparameter(OptimizerKind::kAdam, 0, 1.0, nullptr); });
  calls.refused(s, "set_hyperparameter", "is at",
                [&] { return set_hyperparameter(OptimizerKind::kAdam, 0, 1.0, misplaced(s.hypers.data())); });
  EXPECT_GT(calls.tried(), 60);
}

TEST(WrongCalls, LayoutsAndPlaces) {
  Calls calls("torch-free API: layouts and places");
  Sound s(kOptimizers[0]);
  const int64_t huge[] = {int64_t{1} << 40, int64_t{1} << 40}, negative[] = {4, -1}, some[] = {4, 64}, none[] = {0, 0};
  const auto is_none = [&](const GroupLayout& layout) {
    calls.answered("a layout that is none", layout.rows == -1 && layout.row_size == -1);
    std::vector<ParameterTensors> list = s.list;
    list[1].layout = layout;
    calls.refused(s, "make", "layout", [&] { return s.make(list.data(), 2, &s.plan); });
  };
  for (const RowRule rule : {RowRule::kFirstDimension, RowRule::kShortest}) {
    is_none(group_layout(huge, 2, rule));
    is_none(group_layout(negative, 2, rule));
    is_none(group_layout(nullptr, 2, rule));
    is_none(group_layout(misplaced(some), 1, rule));
    for (const int64_t dimensions : {int64_t{-1}, kLeast}) is_none(group_layout(some, dimensions, rule));
  }
  for (const int rule : kNoChoices) is_none(group_layout(some, 2, static_cast<RowRule>(rule)));
  for (const int64_t numel : {int64_t{-64}, kLeast}) is_none(shard_layout({0, 0, 0, {4, 64}}, numel));
  is_none(shard_layout({0, 30, 64, {4, 64}}, 100));

  Place place{77, 0, 0, {}};
  const Place before = place;
  constexpr RowRule kRule = RowRule::kShortest;
  const auto refused = [&](const char* text, const int64_t* whole, const int64_t* offsets, const int64_t* sizes,
                           int64_t dimensions, RowRule rule, Place* out,
                           StatusCode code = StatusCode::kInvalidArgument) {
    calls.refused(
        s, "place_of_box", text, [&] { return place_of_box(whole, offsets, sizes, dimensions, rule, out); }, code);
    calls.answered("the place is as it was", place == before);
  };
  refused("place is null", some, none, some, 2, kRule, nullptr);
  refused("place is at", some, none, some, 2, kRule, misplaced(&place));
  refused("null", nullptr, none, some, 2, kRule, &place);
  refused("null", some, nullptr, some, 2, kRule, &place);
  refused("null", some, none, nullptr, 2, kRule, &place);
  refused("whole_sizes is at", misplaced(some), none, some, 1, kRule, &place);
  refused("offsets is at", some, misplaced(none), some, 1, kRule, &place);
  refused("sizes is at", some, none, misplaced(some), 1, kRule, &place);
  for (const int64_t dimensions : {int64_t{-1}, kLeast})
    refused("dimensions", some, none, some, dimensions, kRule, &place);
  for (const int rule : kNoChoices) refused("rule", some, none, some, 2, static_cast<RowRule>(rule), &place);
  refused("whole_sizes", huge, none, some, 2, kRule, &place);
  refused("whole_sizes[1] = -1", negative, none, some, 2, kRule, &place);
  const int64_t values[] = {-1, 5, kMost, kLeast};
  for (const int64_t value : values) {
    const int64_t offset[] = {value, 0}, size[] = {value, 64};
    refused("offsets[0]", some, offset, some, 2, kRule, &place);
    refused("sizes[0]", some, none, size, 2, kRule, &place);
  }
  const int64_t cube[] = {4, 4, 64}, corner[] = {0, 0, 0}, part[] = {2, 2, 32};
  refused("cut two dimensions", cube, corner, part, 3, kRule, &place, StatusCode::kUnsupported);
  EXPECT_GT(calls.tried(), 80);
}

}  // namespace
}  // namespace flashoptim::test
