// train_gpt: trains a small GPT on text. See --help, and run_demo.sh for two runs side by side.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "interrupt.h"
#include "memory.h"
#include "progress.h"
#include "trainer.h"

namespace train_gpt {
namespace {

constexpr int kUserErrorExit = 1;
constexpr int kSignalExit = 128;  // plus the signal's number, as a shell reports it

TrainOptions stored_options(const std::string& out) { return read_checkpoint_header(checkpoint_path(out)).options; }

// Steps until the end, an interrupt or --stop-after; true if the run is complete.
bool run_steps(Trainer& trainer) {
  const RunOptions& run = trainer.options().run;
  const std::int64_t steps = trainer.options().train.steps;
  MetricsLog log(run.out + "/metrics.jsonl", trainer.step());
  Progress progress(trainer.step(), steps);
  while (trainer.step() < steps) {
    if (interrupt_signal() != 0 || (run.stop_after > 0 && trainer.step() >= run.stop_after)) break;
    StepMetrics metrics = trainer.train_step();
    const bool due = run.eval_every > 0 && metrics.step % run.eval_every == 0;
    if (due || metrics.step == steps) metrics.validation_loss = trainer.evaluate(Dataset::Split::kValidation);
    log.write(metrics);
    progress.update(metrics.step, metrics.loss, metrics.validation_loss, metrics.tokens_per_second);
    if (run.save_every > 0 && metrics.step % run.save_every == 0) trainer.save();
  }
  progress.finish();
  return trainer.step() >= steps;
}

// On CPUs every operation of this program repeats its bits; on GPUs only those chosen here do.
void make_cuda_deterministic() {
  ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*replace=*/0);  // read at cuBLAS's first use
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(false);  // costs time and is there to find bugs
}

void report(Trainer& trainer) {
  const RunOptions& run = trainer.options().run;
  const nlohmann::json summary = trainer.summarize();
  write_json(run.out + "/summary.json", summary);
  std::printf("train loss %.4f, validation loss %.4f (%.3f bits a byte); a unigram model: %.4f (%.3f bits a byte)\n",
              summary.at("train_loss").get<double>(), summary.at("val_loss").get<double>(),
              summary.at("val_bits_per_byte").get<double>(), summary.at("unigram_loss").get<double>(),
              summary.at("unigram_bits_per_byte").get<double>());
  const auto& memory = summary.at("memory");
  std::printf(
      "%.3f bytes a parameter (parameters, gradients, optimizer), checkpoint %.2f MB, optimizer %.2f ms a step\n",
      memory.at("bytes_per_parameter").get<double>(), summary.at("checkpoint_bytes").get<double>() / 1e6,
      summary.at("optimizer_ms").get<double>());
}

void write_sample(Trainer& trainer) {
  const RunOptions& run = trainer.options().run;
  if (run.sample == 0) return;
  const std::string text = trainer.sample(run.sample);
  std::ofstream file(run.out + "/sample.txt");
  file << text << "\n" << std::flush;
  if (!file) throw std::runtime_error("cannot write " + run.out + "/sample.txt");
  std::printf("\n--- sample ---\n%s\n--------------\n", text.c_str());
}

int run(int argc, char** argv) {
  ParseResult parsed = parse_options(argc, argv, stored_options);
  if (parsed.exit) {
    std::fputs(parsed.message.c_str(), parsed.exit_code == 0 ? stdout : stderr);
    return parsed.exit_code;
  }
  count_cpu_allocations();
  if (parsed.options.train.device == "cuda") make_cuda_deterministic();
  const std::string out = parsed.options.run.out;
  Trainer trainer(std::move(parsed.options));
  std::filesystem::create_directories(out);
  std::fputs(trainer.describe().c_str(), stdout);
  if (trainer.options().run.resume) std::printf("resumed    after step %lld\n", static_cast<long long>(trainer.step()));
  std::fflush(stdout);
  if (trainer.step() >= trainer.options().train.steps) {
    std::printf("this run is complete\n");
    write_sample(trainer);
    return EXIT_SUCCESS;
  }

  install_interrupt_handlers();
  if (!run_steps(trainer)) {
    trainer.save();
    std::printf("stopped after step %lld; checkpoint in %s\nto resume:  %s\n", static_cast<long long>(trainer.step()),
                checkpoint_path(out).c_str(), trainer.options().resume_command.c_str());
    return interrupt_signal() == 0 ? EXIT_SUCCESS : kSignalExit + interrupt_signal();
  }
  report(trainer);
  write_sample(trainer);
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace train_gpt

int main(int argc, char** argv) {
  try {
    return train_gpt::run(argc, argv);
  } catch (const train_gpt::UserError& error) {
    std::fprintf(stderr, "train_gpt: %s\n", error.what());
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "train_gpt: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_gpt: %s\n", error.what());
  }
  return train_gpt::kUserErrorExit;
}
