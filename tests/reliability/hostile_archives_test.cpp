// Archives with one entry that is not what save() wrote: refused by c10::Error that names the entry, with nothing
// changed, or taken and then as good as any: finite, steps go on, and it is saved and loaded again. Every optimizer and
// format; every entry; what comes in its place is of every type, and of its own type at the ends of its range.
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "tests/libtorch/archives.h"
#include "tests/reliability/tally.h"

namespace flashoptim_test {
namespace {

using flashoptim::test::Tally;
using torch::serialize::InputArchive;
using torch::serialize::OutputArchive;

bool is_long() { return std::getenv("FLASHOPTIM_TEST_ALL") != nullptr; }

struct Entry {
  std::string path;
  c10::IValue value;  // None: an archive of its own
};

void list_entries(InputArchive& in, const std::string& path, std::vector<Entry>& found) {
  for (const std::string& key : in.keys()) {
    const std::string inner_path = path.empty() ? key : path + "/" + key;
    InputArchive inner;
    c10::IValue value;
    if (in.try_read(key, inner)) {
      found.push_back({inner_path, {}});
      list_entries(inner, inner_path, found);
    } else if (in.try_read(key, value)) {
      found.push_back({inner_path, value});
    }
  }
}

/// Whether an entry stays what it is: of a tensor of no elements bytes and strides mean nothing.
bool is_the_same(const c10::IValue& a, const c10::IValue& b) {
  if (a.isString() && b.isString()) return a.toStringRef() == b.toStringRef();
  if (!a.isTensor() || !b.isTensor()) return false;
  const Tensor x = a.toTensor(), y = b.toTensor();
  return same_bytes(x, y) && (x.numel() == 0 || x.strides() == y.strides());
}

/// One thing to come in an entry's place.
struct Change {
  std::string what;
  c10::IValue value;  // None: nothing
};

void change_number(const c10::IValue& value, std::vector<Change>& changes) {
  if (value.isInt()) {
    const int64_t n = value.toInt(), most = std::numeric_limits<int64_t>::max();
    for (const int64_t other : {n + 1, n - 1, int64_t{-1}, int64_t{0}, int64_t{1} << 31, (int64_t{1} << 53) - 1,
                                int64_t{1} << 53, most, -most - 1}) {
      if (other != n) changes.push_back({"the int " + std::to_string(other), other});
    }
  }
  if (value.isBool()) changes.push_back({"the other bool", !value.toBool()});
  if (value.isDouble()) {
    for (const double other :
         {std::nan(""), HUGE_VAL, -HUGE_VAL, -1.0, 0.5, 1.0, 1e300, -std::numeric_limits<double>::denorm_min()}) {
      changes.push_back({"the number " + std::to_string(other), other});
    }
  }
  if (value.isTuple()) {
    for (const double other : {std::nan(""), -0.1, 0.5, 1.0, HUGE_VAL}) {
      changes.push_back({"two numbers " + std::to_string(other), c10::ivalue::Tuple::create({0.9, other})});
      changes.push_back({"two numbers, first " + std::to_string(other), c10::ivalue::Tuple::create({other, 0.9})});
    }
    changes.push_back({"a tuple of ints", c10::ivalue::Tuple::create({int64_t{0}, int64_t{0}})});
    changes.push_back({"a tuple of three", c10::ivalue::Tuple::create({0.9, 0.9, 0.9})});
  }
}

void change_tensor(const Tensor& tensor, std::vector<Change>& changes) {
  const auto add = [&](const std::string& what, const Tensor& other) { changes.push_back({what, other}); };
  for (const auto dtype : {torch::kByte, torch::kChar, torch::kShort, torch::kHalf, torch::kFloat, torch::kDouble,
                           torch::kLong, torch::kBool, torch::kComplexFloat, torch::kBFloat16}) {
    if (dtype != tensor.scalar_type()) add(std::string("dtype ") + toString(dtype), tensor.to(dtype));
  }
  std::vector<int64_t> longer = tensor.sizes().vec(), more = tensor.sizes().vec();
  more.push_back(1);
  if (longer.empty()) longer.push_back(2);
  longer.back() += 1;
  add("one longer", torch::zeros(longer, tensor.options()));
  add("one dimension more", tensor.reshape(more));
  add("0 elements", torch::zeros({0}, tensor.options()));
  add("no dimensions", torch::zeros({}, tensor.options()));
  add("flat", tensor.flatten());
  if (tensor.dim() > 1) add("transposed", tensor.transpose(0, 1));
  if (tensor.dim() > 1) add("other order in memory", tensor.transpose(0, 1).contiguous().transpose(0, 1));
  add("strides of 0", torch::zeros({}, tensor.options()).expand(tensor.sizes()));
  if (tensor.is_floating_point()) {
    for (const double value : {std::nan(""), HUGE_VAL, -HUGE_VAL, -1.0, 0.0, 3e38, 1e-45}) {
      add("all " + std::to_string(value), torch::full(tensor.sizes(), value, torch::kDouble).to(tensor.scalar_type()));
    }
    if (tensor.numel() > 0) {
      Tensor one = tensor.clone();
      one.flatten()[-1] = std::nan("");
      add("a NaN at its end", one);
    }
  } else {
    // (In bytes of every kind: whatever a header, a code or a correction can be.)
    for (const int byte : {0x00, 0x01, 0x7f, 0x80, 0xff}) {
      Tensor filled = tensor.clone();
      if (filled.numel() > 0) std::memset(filled.mutable_data_ptr(), byte, filled.nbytes());
      add("bytes " + std::to_string(byte), filled);
    }
    if (tensor.numel() > 0) {
      Tensor one = tensor.clone();
      std::memset(static_cast<char*>(one.mutable_data_ptr()) + one.nbytes() - one.itemsize(), 0x80, one.itemsize());
      add("bytes 128 at its end", one);
    }
  }
}

std::vector<Change> changes_of(const c10::IValue& value) {
  std::vector<Change> changes{{"nothing", {}}};
  const auto other = [&](const std::string& what, const c10::IValue& to) {
    if (value.isNone() || to.tagKind() != value.tagKind()) changes.push_back({what, to});
  };
  other("an int", int64_t{1});
  other("a number", 0.5);
  other("a bool", true);
  other("a string", std::string("adamw"));
  other("a tensor", torch::ones({3}));
  other("a list", c10::IValue(std::vector<int64_t>{1, 2}));
  other("a tuple", c10::ivalue::Tuple::create({0.5, std::string("x")}));
  change_number(value, changes);
  if (value.isString()) {
    for (const char* text : {"", "x", "lion", "Float", "Half", "BFloat16", "paper", "default"}) {
      changes.push_back({std::string("the string ") + text, std::string(text)});
    }
  }
  if (value.isTensor()) change_tensor(value.toTensor(), changes);
  return changes;
}

/// An optimizer and its parameters, as bytes.
std::string bytes_of(const flash::FlashOptimizer& optimizer, const std::vector<Tensor>& params) {
  std::string bytes = saved(optimizer).str();
  for (const Tensor& param : params) {
    const Tensor plain = param.detach().contiguous();
    bytes.append(static_cast<const char*>(plain.const_data_ptr()), plain.nbytes());
  }
  return bytes;
}

/// Small ones of every dtype: rows of whole groups, a rest, 1-D, no elements.
std::vector<Tensor> small_parameters() {
  return {parameter({2, 40}, 1), parameter({3, 64}, 2, torch::kHalf), parameter({33}, 3, torch::kFloat),
          parameter({0, 4}, 4), parameter({}, 5)};
}

/// What is wrong with an optimizer that took an archive; "" where it is as good as any.
std::string problem_behind(flash::FlashOptimizer& optimizer, const std::vector<Tensor>& params,
                           const MakeOptimizer& make) {
  for (const Tensor& param : params) {
    for (const auto& item : optimizer.decoded_state(param)) {
      if (!torch::isfinite(item.value()).all().item<bool>()) return "a state that is not finite was taken";
    }
    if (!torch::isfinite(optimizer.fp32_weight(param)).all().item<bool>()) return "a weight is not finite";
  }
  std::stringstream stream = saved(optimizer);
  const std::vector<Tensor> others = copies(params);
  const auto second = make(others);
  step(*second, others, 9);
  load(*second, stream);
  if (saved(*second).str() != saved(optimizer).str()) return "what was taken is saved and loaded as something else";
  for (int64_t i = 0; i < 2; ++i) step(optimizer, params, 20 + i);
  return "";
}

/// Whether a message says where, and of which entry: "states0" by its name, as "states[0]", or what its checksum is of.
bool says_what(const std::string& message, const std::string& entry) {
  std::string name = entry.substr(entry.rfind('/') + 1);
  while (!name.empty() && std::isdigit(static_cast<unsigned char>(name.back())) != 0) name.pop_back();
  if (name.empty()) name = entry.substr(0, entry.find('/')) == "state" ? "state" : "param_groups";
  const auto has = [&](const std::string& part) { return message.find(part) != std::string::npos; };
  if (message.find("Flash") != 0 || !has("::load: ")) return false;
  if (has(name) || has("checksum")) return true;
  // Where entries do not go together, any of them can be named, beside the parameter.
  return name == "size" ? has("param_groups") : entry.find("state/") == 0 && has("params[");
}

/// How an archive that was changed at `entry` ended: "" well, else what is wrong.
std::string problem_of(const MakeOptimizer& make, std::stringstream& stream, const std::string& entry,
                       bool must_be_refused, int* taken) {
  const std::vector<Tensor> params = small_parameters();
  const auto optimizer = make(params);
  step(*optimizer, params, 7);
  const std::string before = bytes_of(*optimizer, params);
  try {
    load(*optimizer, stream);
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    if (bytes_of(*optimizer, params) != before) return "something has changed before it was refused: " + message;
    return says_what(message, entry) ? "" : "says " + message;
  } catch (const std::exception& error) {
    return std::string("not c10::Error: ") + error.what();
  }
  if (must_be_refused) return "was taken, though a checksum is wrong";
  ++*taken;
  try {
    return problem_behind(*optimizer, params, make);
  } catch (const std::exception& error) {
    return std::string("was taken, and throws later: ") + error.what();
  }
}

class HostileArchives : public testing::TestWithParam<NamedOptimizer> {};

TEST_P(HostileArchives, AreRefusedByNameOrAsGoodAsAny) {
  const MakeOptimizer& make = GetParam().make;
  const std::vector<Tensor> params = small_parameters();
  const auto trained = make(params);
  for (int64_t i = 0; i < 3; ++i) step(*trained, params, i);
  std::vector<Entry> entries;
  InputArchive in;
  std::stringstream stream = saved(*trained);
  in.load_from(stream);
  list_entries(in, "", entries);
  Tally tally("hostile C++ archives");
  int taken = 0;
  // Of the short form: other changes in each optimizer.
  size_t number = std::hash<std::string>()(GetParam().name) % 17;
  for (const Entry& entry : entries) {
    for (const Change& change : changes_of(entry.value)) {
      if (is_the_same(entry.value, change.value) || (!is_long() && number++ % 17 != 0)) continue;
      for (const bool with_checksums : {false, true}) {
        if (!with_checksums && entry.path.find("checksum") != std::string::npos) continue;
        std::stringstream hostile = edited(*trained, put(entry.path, change.value), with_checksums);
        const bool is_version = entry.path == "flashoptim_archive_version";
        const std::string problem = problem_of(make, hostile, entry.path, with_checksums && !is_version, &taken);
        tally.count(problem.empty() ? "" : entry.path + ", " + change.what + ": " + problem);
      }
    }
  }
  RecordProperty("taken", taken);
  std::printf("             (%d of them taken as what a step could have written)\n", taken);
}

INSTANTIATE_TEST_SUITE_P(Reliability, HostileArchives, testing::ValuesIn(all_optimizers()),
                         [](const auto& info) { return info.param.name; });

TEST(HostileArchives, OfEveryOtherOptimizerAreRefused) {
  Tally tally("archives of other optimizers");
  for (const NamedOptimizer& theirs : all_optimizers()) {
    const std::vector<Tensor> params = small_parameters();
    const auto from = theirs.make(params);
    for (int64_t i = 0; i < 2; ++i) step(*from, params, i);
    for (const NamedOptimizer& ours : all_optimizers()) {
      const std::vector<Tensor> own = small_parameters();
      const auto to = ours.make(own);
      if (to->kind() == from->kind()) continue;
      step(*to, own, 5);
      const std::string before = bytes_of(*to, own);
      std::stringstream stream = saved(*from);
      const std::string message = error_of([&] { load(*to, stream); });
      tally.count(message.find("optimizer = \"") == std::string::npos ? "says " + message
                  : bytes_of(*to, own) != before                      ? "something has changed"
                                                                      : "");
    }
  }
}

TEST(HostileArchives, OptionsThatTheOptimizerDoesNotShowAndNamesThatAreNone) {
  const auto make = maker<flash::FlashAdamW>(flash::FlashAdamWOptions(1e-2).min_quantized_numel(0));
  const std::vector<Tensor> params = small_parameters(), own = small_parameters();
  const auto from = make(params), to = make(own);
  step(*from, params, 1);
  const std::string before = bytes_of(*to, own), where = "param_groups/0/options/";
  c10::List<std::string> names;
  names.push_back("beta9");
  for (const auto& [key, value] : std::vector<std::pair<std::string, c10::IValue>>{
           {"momentum", 0.5}, {"dampening", std::nan("")}, {"nesterov", true}}) {
    std::stringstream stream = edited(*from, put(where + key, value));
    expect_error([&] { load(*to, stream); }, {key, "FlashAdamW has no such option"});
  }
  const Edit more = [&](const std::string& path, const std::string&, OutputArchive& out) {
    if (path == where + "lr") out.write("explicitly_set", c10::IValue(names));
    return false;
  };
  std::stringstream stream = edited(*from, more);
  expect_error([&] { load(*to, stream); }, {"explicitly_set", "beta9"});
  EXPECT_EQ(bytes_of(*to, own), before);
  // A few bytes that claim to be many.
  const Tensor large = torch::zeros({1}, torch::kByte).expand({int64_t{1} << 40});
  stream = edited(*from, put("state/0/states0", large));
  expect_error([&] { load(*to, stream); }, {"states0"});
  // Read onto a device that has no values.
  stream = saved(*from);
  InputArchive archive;
  archive.load_from(stream, torch::Device(torch::kMeta));
  expect_error([&] { to->load(archive); }, {"values"});
  EXPECT_EQ(bytes_of(*to, own), before);
}

TEST(HostileArchives, AnEditedArchiveHasAWayToBeTaken) {
  const auto make = maker<flash::FlashAdamW>(flash::FlashAdamWOptions(1e-2).min_quantized_numel(0));
  const std::vector<Tensor> params = small_parameters(), own = small_parameters();
  const auto from = make(params), to = make(own);
  for (int64_t i = 0; i < 3; ++i) step(*from, params, i);
  const auto load_unverified = [&](std::stringstream stream) {
    InputArchive archive;
    archive.load_from(stream);
    to->load_unverified(archive);
  };
  const auto changed = put("state/0/step", int64_t{41});
  std::stringstream verified = edited(*from, changed, /*with_checksums=*/true);
  expect_error([&] { load(*to, verified); }, {"checksum", "load_unverified()"});
  load_unverified(edited(*from, changed, /*with_checksums=*/true));
  EXPECT_EQ(to->param_state(own[0])->step, 41);
  EXPECT_EQ(to->param_state(own[1])->step, 3);
  load_unverified(edited(*from, put("param_groups/0/options/lr", 0.25), /*with_checksums=*/true));
  EXPECT_EQ(to->param_groups()[0].options().get_lr(), 0.25);
  load_unverified(edited(*from, put("checksum", {}), /*with_checksums=*/true));
  EXPECT_EQ(to->param_state(own[0])->step, 3);
  load_unverified(edited(*from, put("state/1", {}), /*with_checksums=*/true));
  EXPECT_EQ(to->param_state(own[1]), nullptr);
  // What no step can have written is refused there, too.
  const std::string before = bytes_of(*to, own);
  expect_error([&] { load_unverified(edited(*from, put("state/0/step", int64_t{-1}), /*with_checksums=*/true)); },
               {"params[0]: step = -1"});
  expect_error(
      [&] {
        load_unverified(edited(*from, put("state/0/correction", torch::full({2, 40}, -128, torch::kChar)), true));
      },
      {"correction holds -128"});
  EXPECT_EQ(bytes_of(*to, own), before);
}

}  // namespace
}  // namespace flashoptim_test
