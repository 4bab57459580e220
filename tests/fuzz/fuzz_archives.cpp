// What is read from files: an archive with entries that are not what save() wrote, and safetensors files of any bytes.
// Either is refused by c10::Error with nothing changed, or taken; then states are finite, steps go on, and what is
// saved loads again. The input chooses entries and what comes in their place, or is the file. (Zip files of any bytes
// are not fuzzed: torch's reader, which opens them, is not ours; load_archive() compares a checksum before it does.)
#include <torch/torch.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "flashoptim/torch/flashoptim.h"
#include "tests/fuzz/input.h"

namespace flashoptim::fuzz {
namespace {

namespace flash = ::flashoptim::torch;
using ::torch::serialize::InputArchive;
using ::torch::serialize::OutputArchive;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz_archives: %s\n", what.c_str());
  std::abort();
}

/// A small optimizer behind two steps.
struct Trained {
  std::vector<at::Tensor> params;
  std::unique_ptr<flash::FlashOptimizer> optimizer;

  explicit Trained(int64_t choice) {
    at::manual_seed(1);
    for (const auto dtype : {at::kBFloat16, at::kFloat})
      params.push_back(at::randn({2, 40}).to(dtype).requires_grad_());
    params.push_back(at::randn({3}).to(at::kHalf).requires_grad_());
    const std::string codec = choice % 2 == 0 ? "default" : "paper";
    const bool quantize = choice % 3 != 0;
    const auto with = [&](auto options) {
      options.min_quantized_numel(0).state_codec(codec).quantize(quantize);
      return options;
    };
    if (choice / 6 % 3 == 0) {
      optimizer = std::make_unique<flash::FlashAdamW>(params, with(flash::FlashAdamWOptions(1e-2)));
    } else if (choice / 6 % 3 == 1) {
      optimizer = std::make_unique<flash::FlashLion>(params, with(flash::FlashLionOptions(1e-2)));
    } else {
      optimizer = std::make_unique<flash::FlashSGD>(params, with(flash::FlashSGDOptions(1e-2).momentum(0.9)));
    }
    for (int i = 0; i < 2; ++i) step();
  }
  void step() {
    for (at::Tensor& param : params) param.mutable_grad() = at::full_like(param.detach(), 0.25);
    optimizer->step();
  }
  std::string bytes() const {
    std::stringstream stream;
    OutputArchive archive;
    optimizer->save(archive);
    archive.save_to(stream);
    std::string all = stream.str();
    for (const at::Tensor& param : params) {
      all.append(static_cast<const char*>(param.detach().const_data_ptr()), param.nbytes());
    }
    return all;
  }
};

at::Tensor any_tensor(const at::Tensor& like, Input& input) {
  constexpr at::ScalarType kDtypes[] = {at::kByte,  at::kChar,   at::kShort, at::kHalf, at::kBFloat16,
                                        at::kFloat, at::kDouble, at::kLong,  at::kBool};
  const bool is_like = input.flip();
  std::vector<int64_t> sizes = like.sizes().vec();
  if (!is_like) {
    sizes.resize(static_cast<size_t>(input.below(4)));
    for (int64_t& size : sizes) size = input.below(41);
  }
  const at::ScalarType dtype = is_like && input.flip() ? like.scalar_type() : kDtypes[input.below(std::size(kDtypes))];
  at::Tensor made = is_like && input.flip() ? like.to(dtype, false, /*copy=*/true) : at::zeros(sizes, dtype);
  auto* const bytes = static_cast<unsigned char*>(made.mutable_data_ptr());
  Stream stream(input.take<uint64_t>());
  const int64_t how = input.below(4), changes = how == 0 ? static_cast<int64_t>(made.nbytes()) : input.below(8);
  for (int64_t i = 0; i < changes && made.nbytes() > 0; ++i) {
    const auto at = how == 0 ? static_cast<size_t>(i) : static_cast<size_t>(stream.next() % made.nbytes());
    bytes[at] = static_cast<unsigned char>(stream.next());
  }
  if (dtype == at::kBool) made = made.to(at::kByte).ne(0);
  if (input.below(8) == 0 && made.dim() > 1) made = made.transpose(0, 1);
  return made;
}

c10::IValue any_value(const c10::IValue& like, Input& input) {
  switch (input.below(8)) {
    case 0:
      return input.flip();
    case 1:
      return std::string(input.flip() ? "default" : "adamw");
    case 2:
      return c10::ivalue::Tuple::create({input.take<double>(), input.take<double>()});
    case 3:
      return input.take<double>();
    case 4:
      return input.take<int64_t>();
    case 5:
      return int64_t{input.take<int8_t>()};
    default:
      return any_tensor(like.isTensor() ? like.toTensor() : at::zeros({3}), input);
  }
}

void write(OutputArchive& out, const std::string& key, const c10::IValue& value) {
  value.isTensor() ? out.write(key, value.toTensor(), /*is_buffer=*/true) : out.write(key, value);
}

/// A copy, each entry of which may be another or none.
void copy(InputArchive& in, Input& input, int64_t rarity, bool with_checksums, OutputArchive& out) {
  for (const std::string& key : in.keys()) {
    if (!with_checksums && key == "checksum") continue;
    InputArchive inner;
    c10::IValue value;
    const bool is_changed = input.below(rarity) == 1;
    if (is_changed && input.below(4) == 0) continue;
    if (in.try_read(key, inner)) {
      OutputArchive made(out.compilation_unit());
      copy(inner, input, rarity, with_checksums, made);
      out.write(key, made);
    } else if (in.try_read(key, value)) {
      if (!with_checksums && key == "flashoptim_archive_version") value = int64_t{1};
      write(out, key, is_changed ? any_value(value, input) : value);
    }
  }
}

/// `load` throws c10::Error and has changed nothing, or what it took is as good as any.
void try_load(Trained& own, const std::function<void()>& load) {
  const std::string before = own.bytes();
  try {
    load();
  } catch (const c10::Error&) {
    if (own.bytes() != before) fail("something has changed before it was refused");
    return;
  }
  for (const at::Tensor& param : own.params) {
    for (const auto& item : own.optimizer->decoded_state(param)) {
      if (!at::isfinite(item.value()).all().item<bool>()) fail("a state that is not finite was taken: " + item.key());
    }
  }
  own.step();
  std::stringstream stream;
  OutputArchive out;
  own.optimizer->save(out);
  out.save_to(stream);
  InputArchive in;
  in.load_from(stream);
  own.optimizer->load(in);
}

void fuzz_archive(Input& input) {
  const int64_t choice = input.below(18);
  Trained from(choice), own(input.below(4) == 0 ? input.below(18) : choice);
  std::stringstream stream, changed;
  OutputArchive saved, out;
  from.optimizer->save(saved);
  saved.save_to(stream);
  InputArchive in;
  in.load_from(stream);
  const bool unverified = input.flip(), with_checksums = unverified && input.flip();
  copy(in, input, 2 + input.below(30), with_checksums, out);
  out.save_to(changed);
  InputArchive archive;
  archive.load_from(changed);
  try_load(own, [&] { unverified ? own.optimizer->load_unverified(archive) : own.optimizer->load(archive); });
}

void fuzz_safetensors(const uint8_t* data, size_t size) {
  static const std::string path = "/tmp/fuzz_archives." + std::to_string(::getpid());
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    (void)flash::read_safetensors(path);
  } catch (const c10::Error&) {
  }
  static Trained own(0);
  try_load(own, [&] { flash::load_safetensors(path, *own.optimizer); });
}

}  // namespace
}  // namespace flashoptim::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  if (data[0] % 2 == 0) {
    flashoptim::fuzz::fuzz_safetensors(data + 1, size - 1);
  } else {
    flashoptim::fuzz::Input input(data + 1, size - 1);
    flashoptim::fuzz::fuzz_archive(input);
  }
  return 0;
}
