// What was set on options, however it was set, is remembered and kept beside an optimizer's defaults.
#include <cmath>
#include <limits>
#include <sstream>

#include "flashoptim/optimizer_info.h"
#include "tests/libtorch/support.h"

namespace flashoptim_test {
namespace {

using flashoptim::libtorch::for_each_option;
using flashoptim::libtorch::OptionValues;

/// Ways to set one option of `Options` to the value that it has.
template <class Options>
struct Setters {
  std::string name;
  std::vector<std::function<void(Options&)>> ways;
};

#define SETTERS(option)                                                      \
  Setters<Options> {                                                         \
    #option, {                                                               \
      [](Options& o) { o.option(std::as_const(o).option()); },               \
          [](Options& o) { o.option() = std::as_const(o).option(); },        \
          [](Options& o) { [[maybe_unused]] const auto& read = o.option(); } \
    }                                                                        \
  }

template <class Options>
std::vector<Setters<Options>> setters_of() {
  std::vector<Setters<Options>> all{SETTERS(lr),
                                    SETTERS(weight_decay),
                                    SETTERS(maximize),
                                    SETTERS(master_weight_bits),
                                    SETTERS(state_codec),
                                    SETTERS(quantize),
                                    SETTERS(min_quantized_numel),
                                    SETTERS(stochastic_rounding),
                                    SETTERS(seed)};
  all[0].ways.push_back([](Options& o) { o.set_lr(o.get_lr()); });
  all[0].ways.push_back([](Options& o) { static_cast<torch::optim::OptimizerOptions&>(o).set_lr(o.get_lr()); });
  all[0].ways.push_back([](Options& o) { o = Options(o.get_lr()); });
  if constexpr (requires(Options o) { o.betas(); }) all.push_back(SETTERS(betas));
  if constexpr (requires(Options o) { o.eps(); }) all.push_back(SETTERS(eps));
  if constexpr (requires(Options o) { o.momentum(); }) {
    all.push_back(SETTERS(momentum));
    all.push_back(SETTERS(dampening));
    all.push_back(SETTERS(nesterov));
  }
  if constexpr (requires(Options o) { o.decouple_lr(); }) {
    all.push_back(SETTERS(decouple_lr));
    all.push_back(SETTERS(initial_lr));
  }
  return all;
}

std::vector<std::string> set_names(const flash::FlashOptions& options) {
  std::vector<std::string> names;
  for_each_option([&](int, const char* name, auto) {
    if (options.is_set(name)) names.emplace_back(name);
  });
  return names;
}

/// Defaults that differ from a new object's in every option and are allowed.
template <class Options>
Options other_defaults() {
  Options o = Options(0.5)
                  .weight_decay(0.3)
                  .maximize(true)
                  .master_weight_bits(0)
                  .state_codec("paper")
                  .quantize(false)
                  .min_quantized_numel(7)
                  .stochastic_rounding(true)
                  .seed(9);
  if constexpr (requires { o.betas(); }) o.betas({0.5, 0.6});
  if constexpr (requires { o.eps(); }) o.eps(1e-3);
  if constexpr (requires { o.momentum(); }) o.momentum(0.7).dampening(0.0);
  if constexpr (requires { o.decouple_lr(); }) o.decouple_lr(true).initial_lr(0.4);
  return o;
}

template <class Options>
void check_copies(const Options& options) {
  const std::vector<std::string> names = set_names(options);
  Options assigned(0.25);
  assigned.weight_decay(3);
  assigned = options;
  EXPECT_EQ(set_names(Options(options)), names);
  EXPECT_EQ(set_names(assigned), names);
  EXPECT_EQ(set_names(static_cast<const Options&>(*options.clone())), names);
  EXPECT_EQ(set_names(static_cast<const Options&>(*options.clone()->clone())), names);
  std::stringstream stream;
  torch::serialize::OutputArchive out;
  options.serialize(out);
  out.save_to(stream);
  torch::serialize::InputArchive in;
  in.load_from(stream);
  Options read(0.25);
  read.serialize(in);
  EXPECT_EQ(set_names(read), names);
}

template <class Optimizer>
void check_all_setters() {
  using Options = typename Optimizer::Options;
  EXPECT_EQ(set_names(Options()), std::vector<std::string>{});
  for (const Setters<Options>& setters : setters_of<Options>()) {
    Options defaults = other_defaults<Options>();
    if (setters.name == "master_weight_bits") defaults.stochastic_rounding(false);  // which needs 0
    for (size_t way = 0; way < setters.ways.size(); ++way) {
      SCOPED_TRACE(setters.name + ", way " + std::to_string(way));
      Options options;
      setters.ways[way](options);
      EXPECT_EQ(set_names(options), std::vector<std::string>{setters.name});
      check_copies(options);
      if (setters.name == "nesterov" || setters.name == "momentum") continue;  // both depend on others; below

      std::vector<torch::optim::OptimizerParamGroup> groups;
      groups.emplace_back(std::vector<Tensor>{parameter({8}, 1)}, options.clone());
      groups.emplace_back(std::vector<Tensor>{parameter({8}, 2)});
      Optimizer optimizer(groups, defaults);
      const OptionValues& merged = static_cast<const Options&>(optimizer.param_groups()[0].options()).values();
      for_each_option([&](int, const char* name, auto member) {
        const OptionValues source = name == setters.name ? Options().values() : defaults.values();
        // initial_lr that is 0 becomes lr.
        if (setters.name == "initial_lr" && std::string(name) == "initial_lr") {
          EXPECT_EQ(merged.initial_lr, defaults.values().lr);
        } else if (source.initial_lr != 0 || std::string(name) != "initial_lr") {
          EXPECT_TRUE(merged.*member == source.*member) << name;
        }
      });
    }
  }
}

TEST(Options, WhatWasSetIsKeptWhateverItsValue){
#define CHECK_OPTIMIZER(name) check_all_setters<flash::Flash##name>();
    FLASHOPTIM_FOR_EACH_OPTIMIZER(CHECK_OPTIMIZER)
#undef CHECK_OPTIMIZER
}

TEST(Options, MomentumOfZeroIsKept) {
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{parameter({8}, 1)},
                      std::make_unique<flash::FlashSGDOptions>(flash::FlashSGDOptions().momentum(0).nesterov(false)));
  flash::FlashSGD optimizer(groups, flash::FlashSGDOptions(0.1).momentum(0.9).nesterov(true));
  const auto& values = static_cast<const flash::FlashOptions&>(optimizer.param_groups()[0].options()).values();
  EXPECT_EQ(values.momentum, 0);
  EXPECT_FALSE(values.nesterov);
}

TEST(Options, ReadingThroughConstOrValuesSetsNothing) {
  flash::FlashAdamWOptions options;
  EXPECT_EQ(options.get_lr(), 1e-3);
  EXPECT_EQ(options.values().eps, 1e-8);
  EXPECT_EQ(std::as_const(options).state_codec(), "default");
  EXPECT_EQ(set_names(options), std::vector<std::string>{});
  expect_error([&] { return options.is_set("beta9"); }, {"is_set", "beta9"});
}

TEST(Options, AGroupGivenToAnotherOptimizerKeepsItsValues) {
  flash::FlashAdamW first(std::vector<Tensor>{parameter({8}, 1)}, flash::FlashAdamWOptions(0.2).betas({0.5, 0.6}));
  flash::FlashAdamW second(std::vector<Tensor>{parameter({8}, 2)}, flash::FlashAdamWOptions(0.7).eps(1e-3));
  second.add_param_group(first.param_groups()[0]);
  const auto& values = static_cast<const flash::FlashOptions&>(second.param_groups()[1].options()).values();
  EXPECT_EQ(values.lr, 0.2);
  EXPECT_EQ(std::get<1>(values.betas), 0.6);
  EXPECT_EQ(values.eps, 1e-8) << "what steps of the first used, too, though nobody set it";
}

TEST(Options, ArchivesOfGroupsAreAsBefore) {
  flash::FlashAdamW optimizer(std::vector<Tensor>{parameter({8}, 1)}, flash::FlashAdamWOptions(0.2));
  torch::serialize::OutputArchive out;
  optimizer.param_groups()[0].options().serialize(out);
  std::stringstream stream;
  out.save_to(stream);
  torch::serialize::InputArchive in;
  in.load_from(stream);
  c10::IValue value;
  EXPECT_FALSE(in.try_read("explicitly_set", value));
  flash::FlashAdamWOptions read;
  read.serialize(in);
  size_t options = 0;
  for_each_option([&options](int, const char*, auto) { ++options; });
  EXPECT_EQ(set_names(read).size(), options) << "an archive that does not say: all";
}

// ---- against the rules ----------------------------------------------------------------------------------------------

/// Of a rule's hyperparameter: for decay_lr initial_lr, where the optimizer shows it.
template <class Options>
std::function<void(Options&, double)> setter_of(const std::string& name) {
  if (name != "decay_lr") return [name](Options& o, double value) { o.set_number(name, value); };
  if constexpr (requires(Options o) { o.initial_lr(); })
    return [](Options& o, double value) { o.initial_lr() = value; };
  return nullptr;
}

template <class Optimizer>
void expect_as_the_rule_says() {
  using Options = typename Optimizer::Options;
  constexpr flashoptim::OptimizerKind kKind = Options::kKind;
  SCOPED_TRACE(flashoptim::optimizer_name(kKind));
  for (int64_t i = 0; i < flashoptim::hyperparameter_count(kKind); ++i) {
    const flashoptim::HyperparameterInfo info = flashoptim::hyperparameter(kKind, i);
    SCOPED_TRACE(info.name);
    Options options;
    const auto set = setter_of<Options>(info.name);
    if (set == nullptr || i == flashoptim::kStepIndex) continue;
    if (i != flashoptim::kDecayLrIndex) {
      EXPECT_EQ(options.number(info.name), info.default_value);
    }
    if (info.kind == flashoptim::HyperparameterKind::kFlag) continue;
    const double edge = std::numeric_limits<double>::denorm_min(), inf = std::numeric_limits<double>::infinity();
    const bool is_whole = info.kind == flashoptim::HyperparameterKind::kWhole;
    for (const double value : is_whole ? std::vector<double>{-1.0, 0.0, 1.0, 1e6, 0x1p60}
                                       : std::vector<double>{-inf, -1.0, -edge, 0.0, 0.5, std::nextafter(1.0, 0.0), 1.0,
                                                             2.0, 1e6, inf, double(NAN)}) {
      flashoptim::Hyperparameters hyper = flashoptim::default_hyperparameters(kKind);
      set(options, value);
      EXPECT_EQ(error_of([&] { options.check(""); }).empty(),
                flashoptim::set_hyperparameter(kKind, i, value, &hyper).is_ok())
          << value;
    }
  }
  expect_error([] { Options().set_number("step", 1); }, {"name = \"step\""});
  // The name in archives.
  Optimizer optimizer(std::vector<Tensor>{parameter({8}, 1)});
  std::stringstream stream;
  torch::save(optimizer, stream);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  c10::IValue name;
  archive.read("optimizer", name);
  EXPECT_EQ(name.toStringRef(), flashoptim::optimizer_name(kKind));
}

TEST(Options, DefaultsAndRangesAreTheRules) {
  std::vector<std::string> titles;
#define CHECK_OPTIMIZER(name)                    \
  expect_as_the_rule_says<flash::Flash##name>(); \
  titles.emplace_back(#name);
  FLASHOPTIM_FOR_EACH_OPTIMIZER(CHECK_OPTIMIZER)
#undef CHECK_OPTIMIZER
  std::vector<std::string> rules;
  for (int64_t i = 0; i < flashoptim::optimizer_count(); ++i)
    rules.emplace_back(flashoptim::optimizer_title(flashoptim::optimizer_at(i)));
  EXPECT_EQ(titles, rules) << "FLASHOPTIM_FOR_EACH_OPTIMIZER";
}

}  // namespace
}  // namespace flashoptim_test
