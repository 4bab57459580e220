// The fidelity laboratory: every codec against float64, on every case.
//
//   flashoptim_fidelity                          everything (minutes), tables on stdout
//   flashoptim_fidelity --optimizer adamw --case spread --codec default,paper --out result.json
//   python plot.py result.json pictures/         a picture per case
#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <thread>

#include "report.h"

namespace {

using namespace flashoptim;
using namespace flashoptim::fidelity;

/// Every optimizer but those that are another with the decay elsewhere.
std::vector<std::string> optimizer_names() {
  std::vector<std::string> names;
  for (int64_t i = 0; i < optimizer_count(); ++i) {
    const OptimizerKind kind = optimizer_at(i);
    if (kind != OptimizerKind::kAdam && kind != OptimizerKind::kSgdw) names.emplace_back(optimizer_name(kind));
  }
  return names;
}

struct Options {
  std::vector<std::string> optimizers = optimizer_names();
  std::vector<std::string> cases, codecs;
  int64_t steps = 0;
  bool quick = false, list = false, no_stall = false, all_codecs = false;
  uint64_t seed = 42;
  int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  std::string out;
};

bool matches(const std::string& name, const std::vector<std::string>& filters) {
  return filters.empty() || std::any_of(filters.begin(), filters.end(),
                                        [&](const std::string& f) { return name.find(f) != std::string::npos; });
}

/// A line on stderr that says what is done, what is running and how long the rest will take.
class Progress {
 public:
  explicit Progress(double total) : total_(total), begin_(std::chrono::steady_clock::now()) {}
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }
  void advance(double work, const std::string& name) {
    const std::lock_guard lock(mutex_);
    done_ += work;
    const double left = seconds() / done_ * (total_ - done_);
    std::fprintf(stderr, "\r\033[K%3.0f %%  %4.0f s  %4.0f s left  %s", 100.0 * done_ / total_, seconds(), left,
                 name.c_str());
    if (done_ >= total_ * 0.999999) std::fputc('\n', stderr);
    std::fflush(stderr);
  }

 private:
  double total_, done_ = 0.0;
  std::chrono::steady_clock::time_point begin_;
  std::mutex mutex_;
};

std::vector<OptimizerReport> select(const Options& options) {
  std::vector<OptimizerReport> reports;
  for (const std::string& name : options.optimizers) {
    OptimizerKind kind{};
    if (!find_optimizer(name.c_str(), &kind).is_ok()) continue;
    OptimizerReport report;
    report.optimizer = kind;
    for (CandidateInfo& candidate : make_candidates(kind)) {
      const bool named =
          std::find(options.codecs.begin(), options.codecs.end(), candidate.name) != options.codecs.end();
      if (options.codecs.empty() ? candidate.by_default || options.all_codecs : named) {
        report.candidates.push_back(std::move(candidate));
      }
    }
    for (Case& c : make_cases(kind)) {
      if (!matches(c.name, options.cases)) continue;
      CaseReport entry;
      entry.c = std::move(c);
      if (options.quick) {
        entry.c.elements = 1024;
        entry.c.steps = std::min<int64_t>(entry.c.steps, 3000);
      }
      if (options.steps > 0) entry.c.steps = options.steps;
      report.cases.push_back(std::move(entry));
    }
    if (!report.cases.empty() && !report.candidates.empty()) reports.push_back(std::move(report));
  }
  return reports;
}

void run_case(const Options& options, const OptimizerReport& report, CaseReport& entry, Progress& progress,
              double unit) {
  const CaseData data = make_data(entry.c, options.seed);
  const Reference reference = run_reference(entry.c, data);
  entry.exact_largest_update = reference.largest_update;
  entry.weight_steps = reference.weight_steps;
  const std::string name = std::string(optimizer_name(report.optimizer)) + " " + entry.c.name;
  progress.advance(unit, name);
  for (const CandidateInfo& candidate : report.candidates) {
    entry.results.push_back(evaluate(entry.c, data, reference, *candidate.make(entry.c, data, options.seed)));
    progress.advance(unit, name + " " + candidate.name);
  }
}

int run(const Options& options) {
  std::vector<OptimizerReport> reports = select(options);
  if (options.list) {
    for (const OptimizerReport& report : reports) {
      std::printf("%s\n  cases\n", optimizer_name(report.optimizer));
      for (const CaseReport& c : report.cases) std::printf("    %-24s %s\n", c.c.name.c_str(), c.c.what.c_str());
      std::puts("  codecs");
      for (const CandidateInfo& c : make_candidates(report.optimizer)) {
        std::printf("    %-24s %s%s\n", c.name.c_str(), c.what.c_str(), c.by_default ? "" : " (only when named)");
      }
    }
    return 0;
  }
  std::vector<StallReport> stalls;
  if (!options.no_stall) {
    for (const StallCase& c : make_stall_cases(
             {MasterWeights::kCorrection8, MasterWeights::kCorrection8Nearest, MasterWeights::kCorrection16})) {
      if (!matches("corrections", options.cases)) break;
      stalls.push_back({c, {}});
      if (options.quick) stalls.back().c.elements /= 4;
    }
  }
  struct Job {
    double work = 0.0;
    double unit = 0.0;
    OptimizerReport* report = nullptr;
    CaseReport* entry = nullptr;
    StallReport* stall = nullptr;
  };
  std::vector<Job> jobs;
  double total = 0.0;
  for (OptimizerReport& report : reports) {
    for (CaseReport& entry : report.cases) {
      const double unit = static_cast<double>(entry.c.steps * entry.c.elements);
      jobs.push_back({unit * static_cast<double>(report.candidates.size() + 1), unit, &report, &entry, nullptr});
    }
  }
  for (StallReport& stall : stalls) {
    const double unit = 0.3 * static_cast<double>(stall.c.steps * stall.c.elements);
    jobs.push_back({unit, unit, nullptr, nullptr, &stall});
  }
  for (const Job& job : jobs) total += job.work;
  // Long jobs first, so that the threads end together.
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.work > b.work; });
  Progress progress(total);
  std::atomic<size_t> next{0};
  const auto worker = [&] {
    for (size_t k = next++; k < jobs.size(); k = next++) {
      const Job& job = jobs[k];
      if (job.stall != nullptr) {
        job.stall->result = run_stall(job.stall->c, options.seed);
        progress.advance(job.unit, job.stall->c.name());
      } else {
        run_case(options, *job.report, *job.entry, progress, job.unit);
      }
    }
  };
  std::vector<std::thread> threads;
  for (int k = 1; k < options.threads; ++k) threads.emplace_back(worker);
  worker();
  for (std::thread& thread : threads) thread.join();

  const int missed = print_tables(reports) + print_stalls(stalls);
  std::printf("%zu cases in %.0f s. Figures that the default codec misses: %d.\n", jobs.size(), progress.seconds(),
              missed);
  if (!options.out.empty()) write_json(options.out, reports, stalls, options.seed, progress.seconds());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"Every state codec and correction against float64, on every case (docs/numerics.md)"};
  app.add_option("--optimizer", options.optimizers, "those to look at; all without it")
      ->delimiter(',')
      ->check(CLI::IsMember(optimizer_names()));
  app.add_option("--case", options.cases,
                 "only cases whose names contain one of these (`corrections`: the stall cases)")
      ->delimiter(',');
  app.add_option("--codec", options.codecs, "only these rows")->delimiter(',');
  app.add_flag("--all-codecs", options.all_codecs, "also the rows that show where the error comes from");
  app.add_option("--steps", options.steps, "steps of every case instead of its own")->check(CLI::PositiveNumber);
  app.add_flag("--quick", options.quick,
               "1,024 elements and at most 3,000 steps: noisier figures in a quarter of the time");
  app.add_flag("--no-corrections", options.no_stall, "without the stall cases");
  app.add_option("--seed", options.seed, "of gradients and dither");
  app.add_option("--threads", options.threads, "one case each")->check(CLI::PositiveNumber);
  app.add_option("--out", options.out, "JSON for plot.py");
  app.add_flag("--list", options.list, "names of cases and codecs");
  CLI11_PARSE(app, argc, argv);
  return run(options);
}
