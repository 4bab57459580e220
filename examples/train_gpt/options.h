// What a run is asked to do: the command line, its defaults, and what a resumed run may not change.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace train_gpt {

// A mistake of the caller (a bad option, a missing file ...): shown as one line, without a stack trace.
struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Everything that decides the numbers of a run. A checkpoint stores it and a resumed run must agree with it.
struct TrainOptions {
  std::string data;
  double validation_fraction = 0.1;
  std::string tokenizer = "bytes";
  std::int64_t vocab_size = 512;  // of the bpe tokenizer; bytes always has 256
  std::string model = "tiny";
  std::int64_t context = 0;  // 0: the model's own
  bool activation_checkpointing = false;
  std::string optimizer = "flash-adamw";
  std::int64_t master_weight_bits = 24;
  std::string state_codec = "default";
  double lr = 0;             // 0: the optimizer's own
  double weight_decay = -1;  // negative: the optimizer's own
  std::int64_t warmup = 100;
  double clip = 1.0;             // largest norm; 0: no clipping
  std::string clip_way = "all";  // by the norm of all gradients; with gradient release: "two_pass" or "parameter"
  bool gradient_release = false;
  std::int64_t steps = 2000;
  std::int64_t batch = 16;
  std::int64_t seed = 0;
  std::string device = "cpu";
  std::string compute_dtype = "auto";
  std::int64_t threads = 0;  // 0: LibTorch's choice
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(TrainOptions, data, validation_fraction, tokenizer, vocab_size, model,
                                                context, activation_checkpointing, optimizer, master_weight_bits,
                                                state_codec, lr, weight_decay, warmup, clip, clip_way, gradient_release,
                                                steps, batch, seed, device, compute_dtype, threads)

// What may differ between the parts of an interrupted run without changing its numbers.
struct RunOptions {
  std::string out = "train_gpt_out";
  bool resume = false;
  bool overwrite = false;
  std::int64_t eval_every = 200;
  std::int64_t eval_windows = 512;  // 0: all
  std::int64_t save_every = 0;      // 0: only at the end and when interrupted
  std::int64_t stop_after = 0;      // 0: never
  std::int64_t sample = 300;
};

// A parsed command line.
struct Options {
  TrainOptions train;
  RunOptions run;
  std::string resume_command;  // what to type to continue this run
};

// Result of parse_options: either options, or an exit code because --help was asked for or an option was wrong.
struct ParseResult {
  Options options;
  bool exit = false;
  int exit_code = 0;
  std::string message;  // what to show before exiting
};

// Parses the command line. With --resume, `stored_options(out)` must give the options of the checkpoint in that
// folder: they are the defaults then, and an explicit option that contradicts them is a UserError naming both.
ParseResult parse_options(int argc, const char* const* argv, TrainOptions (*stored_options)(const std::string& out));

// Path of the checkpoint in a run's folder.
std::string checkpoint_path(const std::string& out);

}  // namespace train_gpt
