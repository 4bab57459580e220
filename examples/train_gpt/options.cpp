#include "options.h"

#include <CLI/CLI.hpp>
#include <filesystem>
#include <sstream>

#include "optimizer_names.h"

namespace train_gpt {
namespace {

// Single quotes where a shell would need them, so that the printed resume command can be pasted.
std::string shell_quote(const std::string& word) {
  const bool plain = !word.empty() && word.find_first_not_of(
                                          "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                          "0123456789-_=+./:,@%") == std::string::npos;
  if (plain) return word;
  std::string quoted = "'";
  for (char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

// Numeric checks without a name of their own: CLI11's show their whole range in --help, which helps nobody.
CLI::Validator at_least(std::int64_t minimum) {
  return CLI::Validator(
      [minimum](const std::string& text) {
        std::int64_t value = 0;
        const bool good = CLI::detail::lexical_cast(text, value) && value >= minimum;
        return good ? std::string() : "must be a whole number of at least " + std::to_string(minimum);
      },
      "");
}

CLI::Validator between(double low, double high) {
  return CLI::Validator(
      [low, high](const std::string& text) {
        double value = 0;
        const bool good = CLI::detail::lexical_cast(text, value) && value >= low && value <= high;
        std::ostringstream message;
        if (!good) message << "must be a number between " << low << " and " << high;
        return message.str();
      },
      "");
}

// --clip NORM|WAY[:NORM].
void read_clip(const std::string& text, TrainOptions& train) {
  std::string way = "all", number = text;
  for (const char* const known : {"two_pass", "parameter"}) {
    if (text.rfind(known, 0) != 0) continue;
    way = known;
    number = text.substr(way.size());
    if (number.empty()) number = ":1";
    if (number[0] != ':') break;
    number.erase(0, 1);
  }
  double norm = 0;
  if (!CLI::detail::lexical_cast(number, norm) || !(norm >= 0 && norm <= 1e9) || (way != "all" && norm == 0)) {
    throw CLI::ValidationError("--clip", text +
                                             " must be a number between 0 and 1e9, or two_pass or parameter with "
                                             "a number above 0 behind a colon");
  }
  train.clip = norm;
  train.clip_way = way;
}

// Options that do not go together.
void check_together(const TrainOptions& train) {
  if (train.gradient_release && !is_flash(train.optimizer)) {
    throw UserError("--gradient-release with --optimizer " + train.optimizer + ": must be one of flashoptim's");
  }
  if (train.gradient_release && train.clip > 0 && train.clip_way == "all") {
    throw UserError(
        "--gradient-release: gradients are gone when the norm of all is known. Say how to clip: --clip "
        "two_pass or --clip parameter, or --clip 0");
  }
  if (!train.gradient_release && train.clip_way != "all") {
    throw UserError("--clip " + train.clip_way + " goes with --gradient-release; must be a number without");
  }
}

void add_options(CLI::App& app, Options& options) {
  TrainOptions& train = options.train;
  RunOptions& run = options.run;
  const CLI::Validator positive = at_least(1), not_negative = at_least(0);

  app.option_defaults()->group("Data");
  app.add_option("--data", train.data, "Text to learn from: a file, or a folder whose text files are joined")
      ->type_name("FILE|DIR");
  app.add_option("--validation-fraction", train.validation_fraction, "Share of the text, at its end, held out")
      ->check(between(0.001, 0.9));
  app.add_option("--tokenizer", train.tokenizer, "bytes, or bpe trained on the training split")
      ->check(CLI::IsMember({"bytes", "bpe"}));
  app.add_option("--vocab-size", train.vocab_size, "Vocabulary of --tokenizer bpe")->check(between(256, 65536));

  app.option_defaults()->group("Model");
  app.add_option("--model", train.model,
                 "micro (2 layers of width 64), tiny (4 of 128), small (6 of 384) or gpt2 (12 of 768)")
      ->check(CLI::IsMember({"micro", "tiny", "small", "gpt2"}));
  app.add_option("--context", train.context,
                 "Tokens the model sees at once; 0: 64 (micro, tiny), 256 (small), 1024 (gpt2)")
      ->check(not_negative);
  app.add_flag("--activation-checkpointing", train.activation_checkpointing,
               "Keep only each block's input and recompute the rest in the backward pass");
  app.add_option("--compute-dtype", train.compute_dtype,
                 "Type of activations; auto: bf16 with bf16 parameters on hardware that multiplies it, else fp32")
      ->check(CLI::IsMember({"auto", "fp32", "bf16"}));

  app.option_defaults()->group("Optimization");
  app.add_option("--optimizer", train.optimizer, "Optimizer; the flash ones keep bf16 parameters and gradients")
      ->check(CLI::IsMember(optimizer_names()));
  app.add_option("--master-weight-bits", train.master_weight_bits, "Flash: 24, 32, or 0 for plain bf16 weights")
      ->check(CLI::IsMember({0, 24, 32}));
  app.add_option("--state-codec", train.state_codec, "Flash: how 8-bit states are coded")
      ->check(CLI::IsMember({"default", "paper"}));
  app.add_option("--lr", train.lr, "Peak learning rate; 0: what suits optimizer and width")->check(between(0.0, 1e3));
  app.add_option("--weight-decay", train.weight_decay, "For matrices; negative: what suits the optimizer")
      ->check(between(-1.0, 1e3));
  app.add_option("--warmup", train.warmup, "Steps in which the learning rate rises; a cosine to a tenth follows")
      ->check(not_negative);
  app.add_option_function<std::string>(
         "--clip", [&train](const std::string& text) { read_clip(text, train); },
         "Largest norm of the whole gradient; 0: no clipping. With --gradient-release how to clip to 1, or to a number "
         "behind a colon: two_pass (by the norm of all, measured by a backward pass of its own) or parameter (each by "
         "its own)")
      ->type_name("NORM|WAY[:NORM]")
      ->default_str("1");
  app.add_flag("--gradient-release", train.gradient_release,
               "Step each parameter during the backward pass, as soon as its gradient is there, and free the gradient");
  app.add_option("--steps", train.steps, "Optimizer steps")->check(positive);
  app.add_option("--batch", train.batch, "Windows of text in a step")->check(positive);
  app.add_option("--seed", train.seed, "Decides the initial weights, the batches and the sample")->check(not_negative);

  app.option_defaults()->group("Run");
  app.add_option("--device", train.device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--threads", train.threads, "CPU threads; 0: LibTorch's choice. Another number changes some roundings")
      ->check(not_negative);
  app.add_option("--out", run.out, "Folder for checkpoint.pt, metrics.jsonl, summary.json and sample.txt")
      ->type_name("DIR");
  app.add_flag("--resume", run.resume, "Continue the run in --out, bit for bit; its options need not be repeated");
  app.add_flag("--overwrite", run.overwrite, "Replace the run that --out already holds")->excludes("--resume");
  app.add_option("--eval-every", run.eval_every, "Steps between validations; 0: only at the end")->check(not_negative);
  app.add_option("--eval-windows", run.eval_windows,
                 "Windows in an evaluation, spread evenly over the split; 0: the whole split")
      ->check(not_negative);
  app.add_option("--save-every", run.save_every, "Steps between checkpoints; 0: at the end and when interrupted")
      ->check(not_negative);
  app.add_option("--stop-after", run.stop_after, "Stop at this step as Ctrl-C would; 0: never")->check(not_negative);
  app.add_option("--sample", run.sample, "Tokens of text to write at the end")->check(not_negative);
}

// The checkpoint knows the training options; only what it does not hold has to be said again.
std::string resume_command(const std::string& program, const RunOptions& run) {
  const RunOptions defaults;
  std::string command = shell_quote(program) + " --resume --out " + shell_quote(run.out);
  const auto add = [&](const char* flag, std::int64_t value, std::int64_t default_value) {
    if (value != default_value) command += std::string(" ") + flag + " " + std::to_string(value);
  };
  add("--eval-every", run.eval_every, defaults.eval_every);
  add("--eval-windows", run.eval_windows, defaults.eval_windows);
  add("--save-every", run.save_every, defaults.save_every);
  add("--sample", run.sample, defaults.sample);
  return command;
}

// Where the program was left to decide, the checkpoint holds what it decided then; another machine might not agree.
void keep_decisions(TrainOptions& given, const TrainOptions& stored) {
  if (given.compute_dtype == "auto") given.compute_dtype = stored.compute_dtype;
  if (given.context == 0) given.context = stored.context;
  if (given.threads == 0) given.threads = stored.threads;
}

// An option given with --resume must not contradict the checkpoint. Exceptions: the text may have moved (its content is
// compared when it is loaded), and who asks for other threads knows from --help that the bits depend on them.
void check_unchanged(const TrainOptions& given, const TrainOptions& stored) {
  const nlohmann::json now = given;
  const nlohmann::json then = stored;
  for (const auto& [key, value] : then.items()) {
    if (key == "data" || key == "threads" || now.at(key) == value) continue;
    std::string flag = key;
    for (char& c : flag) c = c == '_' ? '-' : c;
    throw UserError("--" + flag + " " + now.at(key).dump() + " differs from the checkpoint's " + value.dump() +
                    ": a resumed run must keep it (leave the option out, or choose another --out to start anew)");
  }
}

// One pass over the command line, with `options` as defaults.
ParseResult parse_once(int argc, const char* const* argv, Options options) {
  ParseResult result;
  result.options = std::move(options);
  CLI::App app(
      "Trains a small GPT on text, in C++ on LibTorch, with flashoptim's or torch's optimizers.\n"
      "Ctrl-C saves a checkpoint; the same command with --resume continues bit for bit.\n",
      "train_gpt");
  app.get_formatter()->column_width(34);
  app.option_defaults()->always_capture_default();
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);  // scripts append to given options
  add_options(app, result.options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success&) {
    result.exit = true;
    result.message = app.help();
  } catch (const CLI::ParseError& error) {
    result.exit = true;
    result.exit_code = 2;
    result.message = "train_gpt: " + std::string(error.what()) + "\nSee train_gpt --help.\n";
  }
  return result;
}

}  // namespace

std::string checkpoint_path(const std::string& out) { return out + "/checkpoint.pt"; }

ParseResult parse_options(int argc, const char* const* argv, TrainOptions (*stored_options)(const std::string& out)) {
  ParseResult result = parse_once(argc, argv, {});
  if (result.exit) return result;
  if (result.options.run.resume) {
    Options defaults;
    defaults.train = stored_options(result.options.run.out);
    const TrainOptions stored = defaults.train;
    result = parse_once(argc, argv, std::move(defaults));
    keep_decisions(result.options.train, stored);
    check_unchanged(result.options.train, stored);
  } else if (result.options.train.data.empty()) {
    throw UserError("--data FILE|DIR is needed: any text will do, a few hundred kilobytes or more");
  } else if (!result.options.run.overwrite && std::filesystem::exists(checkpoint_path(result.options.run.out))) {
    throw UserError("--out " + result.options.run.out +
                    " holds a run already: --resume continues it, --overwrite replaces it");
  }
  check_together(result.options.train);
  // Absolute, so that a run can be resumed from another folder.
  result.options.train.data = std::filesystem::absolute(result.options.train.data).lexically_normal().string();
  result.options.resume_command = resume_command(argv[0], result.options.run);
  return result;
}

}  // namespace train_gpt
