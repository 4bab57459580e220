#include "report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "flashoptim/step.h"

namespace flashoptim::fidelity {

namespace {

std::string number(double x) {
  char text[32];
  if (!(x < HUGE_VAL)) return "NaN";
  std::snprintf(text, sizeof text, x >= 100.0 ? "%.0f" : x >= 10.0 ? "%.1f" : x >= 1.0 ? "%.2f" : "%.4f", x);
  return text;
}

std::string number_short(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}

/// Columns as wide as their widest cell; the first is left-aligned.
void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> width;
  for (const auto& row : rows) {
    width.resize(std::max(width.size(), row.size()), 3);
    for (size_t k = 0; k < row.size(); ++k) width[k] = std::max(width[k], row[k].size());
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t k = 0; k < rows[r].size(); ++k) {
      std::printf(k == 0 ? "| %-*s " : "| %*s ", static_cast<int>(width[k]), rows[r][k].c_str());
    }
    std::puts("|");
    if (r != 0) continue;
    for (size_t k = 0; k < width.size(); ++k) {
      std::printf("|%s%s", std::string(width[k] + 1, '-').c_str(), k == 0 ? "-" : ":");
    }
    std::puts("|");
  }
  std::puts("");
}

int print_optimizer(const OptimizerReport& report) {
  const auto name = optimizer_name(report.optimizer);
  const bool has_bound = family_of(report.optimizer) == Family::kAdam;
  int missed = 0;
  std::printf("### %s: error\n\n", name);
  std::vector<std::vector<std::string>> rows(1, {"case", "figure"});
  for (const CandidateInfo& candidate : report.candidates) rows[0].push_back(candidate.name);
  std::vector<double> worst(report.candidates.size(), 0.0);
  std::vector<std::string> worst_case(report.candidates.size());
  for (const CaseReport& c : report.cases) {
    rows.push_back({c.c.name, c.c.target < HUGE_VAL ? number(c.c.target) : ""});
    for (size_t k = 0; k < c.results.size(); ++k) {
      const Result& r = c.results[k];
      const bool over = r.error > c.c.target;
      const bool jumps = has_bound && r.largest_update > allowed_update(c);
      if (report.candidates[k].name == "default") missed += (over ? 1 : 0) + (jumps ? 1 : 0);
      rows.back().push_back(number(r.error) + (over ? "*" : "") + (jumps ? "!" : ""));
      if (!(r.error <= worst[k])) {
        worst[k] = r.error;
        worst_case[k] = c.c.name;
      }
    }
  }
  rows.push_back({"worst", ""});
  for (const double w : worst) rows.back().push_back(number(w));
  rows.push_back({"bytes of state", ""});
  for (const CandidateInfo& candidate : report.candidates) rows.back().push_back(number(candidate.state_bytes));
  print_table(rows);
  for (size_t k = 0; k < worst.size(); ++k) {
    std::printf("- `%s`: %s; worst on %s\n", report.candidates[k].name.c_str(), report.candidates[k].what.c_str(),
                worst_case[k].c_str());
  }
  std::puts("");
  if (!has_bound) return missed;
  std::printf("### %s: largest update over %s\n\n", name,
              report.optimizer == OptimizerKind::kAdamW ? "lr max(1, (1 - beta1) / sqrt(1 - beta2))"
                                                        : "what its rule says is the largest");
  rows.assign(1, {"case", "exact"});
  for (const CandidateInfo& candidate : report.candidates) rows[0].push_back(candidate.name);
  for (const CaseReport& c : report.cases) {
    rows.push_back({c.c.name, number(c.exact_largest_update)});
    for (const Result& r : c.results) {
      rows.back().push_back(number(r.largest_update) + (r.largest_update > allowed_update(c) ? "!" : ""));
    }
  }
  print_table(rows);
  return missed;
}

}  // namespace

double allowed_update(const CaseReport& report) { return 1.1 * std::max(1.0, report.exact_largest_update); }

int print_tables(const std::vector<OptimizerReport>& reports) {
  const char* isa = "?";
  (void)cpu_isa(&isa);
  std::printf(
      "Error: |w - w64| / |w64 - w0| after the last step. *: above issue 4's figure. !: an update more than 10 %% "
      "above exact Adam's bound. Kernels: %s.\n\n",
      isa);
  int missed = 0;
  for (const OptimizerReport& report : reports) missed += print_optimizer(report);
  return missed;
}

int print_stalls(const std::vector<StallReport>& stalls) {
  if (stalls.empty()) return 0;
  std::printf(
      "### Corrections: way gone by 1,000 updates of lr over 1,000 lr (random: by updates lr (1/2 + N(0, 1)), lr = "
      "1e-6 w)\n\n");
  std::vector<std::vector<std::string>> rows(1, {"weight"});
  int missed = 0;
  std::string row;
  for (const StallReport& s : stalls) {
    const std::string name = s.c.row_name();
    if (name != row) rows.push_back({name});
    row = name;
    if (rows.size() == 2) rows[0].push_back(s.c.random_updates ? "random" : "lr " + number_short(s.c.lr));
    const bool off = !(std::fabs(s.result.moved - 1.0) <= 0.02);
    const bool dithered =
        s.c.master_weights == MasterWeights::kCorrection8 || s.c.master_weights == MasterWeights::kCorrection16;
    missed += off && dithered ? 1 : 0;
    char cell[32];
    std::snprintf(cell, sizeof cell, "%.4f%s", s.result.moved, off ? "*" : "");
    rows.back().push_back(cell);
  }
  print_table(rows);
  return missed;
}

void write_json(const std::string& path, const std::vector<OptimizerReport>& reports,
                const std::vector<StallReport>& stalls, uint64_t seed, double seconds) {
  using nlohmann::json;
  const auto finite = [](double x) { return std::isfinite(x) ? json(x) : json(nullptr); };
  const char* isa = "?";
  (void)cpu_isa(&isa);
  json out = {{"seed", seed},
              {"isa", isa},
              {"seconds", seconds},
              {"ratio_bins", {{"first", kRatioFirst}, {"width", kRatioWidth}, {"count", kRatioBins}}}};
  for (const OptimizerReport& report : reports) {
    json rows = json::array();
    for (const CandidateInfo& c : report.candidates) {
      rows.push_back(
          {{"name", c.name}, {"what", c.what}, {"in_library", c.in_library}, {"state_bytes", c.state_bytes}});
    }
    json cases = json::array();
    for (const CaseReport& c : report.cases) {
      json results = json::object();
      for (size_t k = 0; k < c.results.size(); ++k) {
        const Result& r = c.results[k];
        json over_time = json::array();
        for (const double e : r.error_over_time) over_time.push_back(finite(e));
        results[report.candidates[k].name] = {{"error", finite(r.error)},
                                              {"error_over_time", over_time},
                                              {"largest_update", finite(r.largest_update)},
                                              {"update_noise", finite(r.update_noise)},
                                              {"ratios", r.ratios},
                                              {"seconds", r.seconds}};
      }
      cases.push_back({{"name", c.c.name},
                       {"what", c.c.what},
                       {"steps", c.c.steps},
                       {"elements", c.c.elements},
                       {"figure", finite(c.c.target)},
                       {"exact_largest_update", c.exact_largest_update},
                       {"weight_steps", c.weight_steps},
                       {"results", results}});
    }
    out["optimizers"][optimizer_name(report.optimizer)] = {{"codecs", rows}, {"cases", cases}};
  }
  for (const StallReport& s : stalls) {
    out["corrections"].push_back(
        {{"name", s.c.name()}, {"moved", s.result.moved}, {"worst_steps", s.result.worst_steps}});
  }
  std::ofstream(path) << out.dump(1) << '\n';
}

}  // namespace flashoptim::fidelity
