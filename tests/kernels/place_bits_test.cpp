// A tensor stepped whole, and in shards that each know their place alone: the same bytes, and telemetry that adds up,
// with every instruction set. Nothing here calls the library outside a child process (in_child.h).
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>

#include "tests/kernels/in_child.h"
#include "tests/kernels/shards.h"

namespace flashoptim::test {
namespace {

const std::vector<Storage> kStorages{{DType::kFloat32, DType::kFloat32, MasterWeights::kNone},
                                     {DType::kBFloat16, DType::kBFloat16, MasterWeights::kCorrection8},
                                     {DType::kFloat16, DType::kFloat32, MasterWeights::kCorrection16},
                                     {DType::kBFloat16, DType::kFloat32, MasterWeights::kNoneStochastic},
                                     {DType::kFloat16, DType::kFloat16, MasterWeights::kCorrection8Nearest}};

struct Case {
  const char* name;
  std::vector<int64_t> sizes;
  RowRule rule;
  std::vector<Cut> cuts;
  int64_t rows_before = 0;  ///< of the whole that all of this lies in
};

/// Cuts between groups: with any states.
std::vector<Case> aligned_cases() {
  constexpr RowRule kFirst = RowRule::kFirstDimension, kShortest = RowRule::kShortest;
  const auto grid = [](const char* name, std::vector<int64_t> sizes, std::vector<std::vector<int64_t>> parts,
                       RowRule rule) { return Case{name, sizes, rule, grid_cuts(sizes, std::move(parts), rule)}; };
  const auto flat = [](const char* name, std::vector<int64_t> sizes, std::vector<int64_t> ends) {
    const GroupLayout whole = group_layout(sizes.data(), static_cast<int64_t>(sizes.size()));
    return Case{name, sizes, kFirst, flat_cuts(whole, ends)};
  };
  return {
      grid("rows, uneven and empty", {10, 33}, {{3, 0, 1, 6}}, kFirst),
      grid("more ranks than rows", {3, 40}, {{1, 1, 1, 0}}, kFirst),
      grid("columns", {12, 96}, {{}, {32, 64, 0}}, kFirst),
      grid("rows and columns", {13, 160}, {{6, 7}, {64, 32, 64}}, kFirst),
      grid("columns, the last short", {6, 72}, {{}, {64, 8}}, kFirst),
      grid("columns of long rows", {5, 4096}, {{}, {512, 2048, 1536}}, kFirst),
      grid("rows and columns, two short", {4, 1000}, {{1, 3}, {992, 8}}, kFirst),
      grid("experts, the middle", {4, 6, 16}, {{}, {2, 4}}, kFirst),
      grid("experts, first and middle", {4, 6, 16}, {{3, 1}, {4, 2}}, kFirst),
      grid("experts, the last", {3, 4, 64}, {{}, {}, {32, 32}}, kFirst),
      grid("experts, the middle, short rows", {3, 5, 40}, {{}, {2, 3}}, kShortest),
      grid("experts, the last, short rows", {3, 4, 72}, {{2, 1}, {}, {32, 40}}, kShortest),
      grid("experts, one slice each", {2, 3, 64}, {{1, 1}, {1, 2}, {32, 32}}, kShortest),
      grid("flat, between groups", {1000}, {{32, 512, 456}}, kFirst),
      grid("thin rows, between groups", {64, 3}, {{32, 32}}, kFirst),
      flat("slices of rows", {12, 96}, {160, 192, 1152}),
      flat("slices at row ends", {10, 33}, {66, 98, 99, 330}),
      {"columns beyond 2^32", {6, 96}, kFirst, grid_cuts({6, 96}, {{2, 4}, {32, 64}}), (int64_t{1} << 32) / 96 - 3},
      {"rows beyond 2^40", {6, 33}, kFirst, grid_cuts({6, 33}, {{2, 4}}), (int64_t{1} << 40) / 33 - 3},
      grid("nothing", {0, 64}, {{0, 0}}, kFirst),
      grid("nothing wide", {64, 0}, {{31, 33}}, kFirst),
  };
}

/// Cuts within groups: with fp32 states.
std::vector<Case> unaligned_cases() {
  constexpr RowRule kFirst = RowRule::kFirstDimension, kShortest = RowRule::kShortest;
  const auto grid = [](const char* name, std::vector<int64_t> sizes, std::vector<std::vector<int64_t>> parts,
                       RowRule rule) { return Case{name, sizes, rule, grid_cuts(sizes, std::move(parts), rule)}; };
  const auto flat = [](const char* name, std::vector<int64_t> sizes, std::vector<int64_t> ends) {
    const GroupLayout whole = group_layout(sizes.data(), static_cast<int64_t>(sizes.size()));
    return Case{name, sizes, kFirst, flat_cuts(whole, ends)};
  };
  return {
      grid("bias", {3000}, {{1, 31, 33, 0, 2935}}, kFirst),
      grid("bias, from lane 31", {97}, {{31, 1, 65}}, kFirst),
      grid("thin rows", {1000, 3}, {{7, 0, 993}}, kFirst),
      grid("columns of thin rows", {40, 31}, {{}, {15, 16}}, kFirst),
      grid("columns of rows of 16", {40, 16}, {{30, 10}, {8, 8}}, kFirst),
      grid("columns", {12, 96}, {{}, {33, 63}}, kFirst),
      grid("halves", {7, 100}, {{3, 4}, {50, 50}}, kFirst),
      grid("columns of long rows", {3, 4100}, {{}, {1025, 3075}}, kFirst),
      grid("convolution", {8, 3, 7, 7}, {{}, {1, 2}}, kFirst),
      grid("convolution, short rows", {8, 3, 7, 7}, {{}, {1, 2}}, kShortest),
      grid("experts, the last", {2, 3, 40}, {{}, {}, {7, 33}}, kFirst),
      grid("experts, the last, short rows", {2, 3, 40}, {{}, {}, {7, 33}}, kShortest),
      {"columns beyond 2^32", {6, 100}, kFirst, grid_cuts({6, 100}, {{}, {33, 67}}), (int64_t{1} << 32) / 100 - 3},
      flat("slices anywhere", {10, 33}, {5, 100, 132, 330}),
      flat("slices of full groups", {12, 96}, {1, 33, 500, 1152}),
  };
}

bool same(const StepTelemetry& a, const StepTelemetry& b) {
  return a.examined == b.examined && a.nonfinite_gradients == b.nonfinite_gradients &&
         a.lost_updates == b.lost_updates && a.floored_codes == b.floored_codes &&
         a.saturated_codes == b.saturated_codes && a.largest_update_ratio == b.largest_update_ratio;
}

/// What differs, or nothing.
std::string compare(const OptimizerChoice& optimizer, StateCodec codec, const Storage& storage, const Case& c) {
  if (c.cuts.empty()) return "no places";
  TestTensor whole(optimizer, codec, storage, c.sizes, 5, 0, Gradients::kHostile);
  TestTensor gathered(optimizer, codec, storage, c.sizes, 5, 0, Gradients::kHostile);
  whole.set_layout(optimizer, group_layout(c.sizes.data(), static_cast<int64_t>(c.sizes.size()), c.rule));
  gathered.set_layout(optimizer, whole.tensors().layout);
  GroupLayout all = whole.tensors().layout;
  all.rows += c.rows_before;
  const int64_t origin = c.rows_before * all.row_size;
  whole.tensors().place = {origin, 0, 0, all};
  Plan plan;
  Status status = Plan::make(optimizer.kind, optimizer.has_momentum, &whole.tensors(), 1, &plan);
  std::vector<std::unique_ptr<Shard>> shards;
  for (Cut cut : c.cuts) {
    cut.place.first_element += origin;
    cut.place.whole = all;
    shards.push_back(std::make_unique<Shard>(optimizer, whole, cut));
    if (status.is_ok()) status = shards.back()->status();
  }
  for (int64_t step = 1; step <= 5 && status.is_ok(); ++step) {
    whole.set_step(step);
    status = plan.set_gradient(0, whole.tensors().gradient);
    const Hyperparameters hyper = busy_hyperparameters(step);
    for (const auto& s : shards) s->take_gradient();
    for (int64_t stride : {1, 3}) {
      StepTelemetry of_whole{}, sum{};
      if (status.is_ok()) status = plan.inspect(&hyper, 1, {}, {stride}, &of_whole);
      for (const auto& s : shards) {
        if (status.is_ok()) status = s->plan().inspect(&hyper, 1, {}, {stride}, &sum);
      }
      if (!same(of_whole, sum))
        return "telemetry at stride " + std::to_string(stride) + ", step " + std::to_string(step);
    }
    if (status.is_ok()) status = plan.step(&hyper, 1);
    for (const auto& s : shards) {
      if (status.is_ok()) status = s->plan().step(&hyper, 1);
      s->put_back(gathered.tensors());
      if (!s->guards_intact()) return "bytes behind a shard";
    }
    if (whole.bytes() != gathered.bytes()) return "step " + std::to_string(step);
  }
  return status.is_ok() ? "" : status.message();
}

/// Writes what is wrong, and how many comparisons there were.
int write_differences(std::FILE* file, const char* isa) {
  const char* used = nullptr;
  if (!cpu_isa(&used).is_ok() || std::string(used) != isa) return 10;
  int64_t count = 0;
  const auto run = [&](const OptimizerChoice& optimizer, StateCodec codec, const Storage& storage,
                       const std::vector<Case>& cases) {
    for (const Case& c : cases) {
      ++count;
      const std::string difference = compare(optimizer, codec, storage, c);
      if (!difference.empty())
        std::fprintf(file, "%s, %s: %s\n", describe(optimizer, codec, storage).c_str(), c.name, difference.c_str());
    }
  };
  for (const OptimizerChoice& optimizer : kOptimizers) {
    for (StateCodec codec : kCodecs) {
      for (const Storage& storage : kStorages) {
        run(optimizer, codec, storage, aligned_cases());
        if (codec == StateCodec::kFloat32 || optimizer.states == 0) run(optimizer, codec, storage, unaligned_cases());
      }
    }
  }
  const auto rules = static_cast<int64_t>(std::size(kOptimizers));
  const int64_t stateless =
      std::count_if(std::begin(kOptimizers), std::end(kOptimizers), [](const auto& o) { return o.states == 0; });
  return count == rules * 3 * 5 * 21 + (rules + 2 * stateless) * 5 * 15 ? 0 : 11;
}

TEST(PlaceBits, ShardsHoldTheBytesOfTheWholeAndTheirTelemetryAddsUp) {
  std::vector<std::unique_ptr<Child>> children;
  const std::vector<std::string> isas = machine_isas();
  for (const std::string& isa : isas) {
    children.push_back(
        std::make_unique<Child>(isa.c_str(), [&isa](std::FILE* file) { return write_differences(file, isa.c_str()); }));
  }
  for (size_t i = 0; i < isas.size(); ++i) {
    const std::vector<unsigned char> text = children[i]->read();
    EXPECT_EQ(children[i]->exit_status(), 0)
        << isas[i] << " (10: FLASHOPTIM_ISA was not obeyed, 11: cases are missing)";
    EXPECT_EQ(std::string(text.begin(), text.end()), "") << isas[i];
  }
}

}  // namespace
}  // namespace flashoptim::test
