// Archives that are not what was saved: refused by name, with nothing changed. Files of save_archive(): every cut and
// every flip of a bit is found.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>

#include "tests/libtorch/archives.h"
#include "tests/reliability/tally.h"

namespace flashoptim_test {
namespace {

using torch::serialize::InputArchive;
using torch::serialize::OutputArchive;

bool is_long() { return std::getenv("FLASHOPTIM_TEST_ALL") != nullptr; }

/// A folder that goes away with the test.
struct Folder {
  std::string path = (std::filesystem::temp_directory_path() / "flashoptim_damage_XXXXXX").string();
  Folder() { EXPECT_NE(::mkdtemp(path.data()), nullptr); }
  ~Folder() { std::filesystem::remove_all(path); }
  std::string file(const std::string& name) const { return path + "/" + name; }
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator(path)) found.push_back(entry.path().filename());
    return found;
  }
};

std::string bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_bytes(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

/// An optimizer after three steps.
struct Trained {
  std::vector<Tensor> params;
  std::unique_ptr<flash::FlashOptimizer> optimizer;

  explicit Trained(const MakeOptimizer& make, std::vector<Tensor> of) : params(std::move(of)), optimizer(make(params)) {
    for (int64_t i = 0; i < 3; ++i) step(*optimizer, params, i);
  }
};

Trained small(const std::string& codec) {
  return Trained(maker<flash::FlashAdamW>(flash::FlashAdamWOptions(1e-2).min_quantized_numel(0).state_codec(codec)),
                 {parameter({2, 40}, 1), parameter({3}, 2, torch::kFloat)});
}

TEST(Damage, EveryCutAndFlipOfAFileIsFound) {
  flashoptim::test::Tally tally("cuts and flips of files of save_archive()");
  const Folder folder;
  for (const std::string codec : {"default", "paper"}) {
    SCOPED_TRACE(codec);
    Trained trained = small(codec);
    OutputArchive out;
    trained.optimizer->save(out);
    const std::string path = folder.file("whole"), damaged = folder.file("damaged");
    flash::save_archive(path, out);
    EXPECT_EQ(std::filesystem::exists(path + ".partial"), false);
    const std::string bytes = bytes_of(path);
    const Snapshot before(*trained.optimizer);
    InputArchive whole;
    flash::load_archive(path, whole);
    trained.optimizer->load(whole);
    EXPECT_TRUE(before == Snapshot(*trained.optimizer));
    {
      InputArchive plain;
      plain.load_from(path);  // the 32 bytes behind the zip file are passed over
      trained.optimizer->load(plain);
    }
    const auto attack = [&](const std::string& with) {
      write_bytes(damaged, with);
      InputArchive archive;
      const std::string message = error_of([&] { flash::load_archive(damaged, archive); });
      tally.count(message.find(damaged) == std::string::npos ? "says " + message : "");
    };
    const size_t stride = is_long() ? 1 : 19;
    for (size_t i = 0; i < bytes.size(); i += stride) {
      attack(bytes.substr(0, i));
      for (int bit = 0; bit < 8; bit += is_long() ? 1 : 3) {
        std::string flipped = bytes;
        flipped[i] = static_cast<char>(flipped[i] ^ (1 << bit));
        attack(flipped);
      }
    }
  }
  EXPECT_GT(tally.tried(), 2000);
}

TEST(Damage, FilesThatCannotBeWrittenOrReadAreNamed) {
  const Folder folder;
  OutputArchive out;
  out.write("x", torch::ones({3}), /*is_buffer=*/true);
  InputArchive in;
  const std::string nowhere = folder.file("no/such/file");
  expect_error([&] { flash::save_archive(nowhere, out); }, {"save_archive: " + nowhere, "No such file"});
  expect_error([&] { flash::load_archive(nowhere, in); }, {"load_archive: " + nowhere, "No such file"});
  expect_error([&] { flash::load_archive(folder.path, in); }, {folder.path, "no regular file"});
  // A disk that is full from the first byte on.
  const std::string full = folder.file("full");
  std::filesystem::create_symlink("/dev/full", full + ".partial");
  expect_error([&] { flash::save_archive(full, out); }, {"save_archive: " + full, "cannot write", "No space left"});
  EXPECT_TRUE(folder.names().empty()) << "nothing is left";
  write_bytes(full, "old");
  std::filesystem::create_symlink("/dev/full", full + ".partial");
  expect_error([&] { flash::save_archive(full, out); }, {"as it was before"});
  EXPECT_EQ(bytes_of(full), "old");
}

struct Attack {
  std::string path;
  c10::IValue value;  // None: the entry is left out
  std::vector<std::string> parts;
};

void refuse(const Trained& trained, const std::vector<Attack>& attacks) {
  const Snapshot before(*trained.optimizer);
  for (const Attack& attack : attacks) {
    SCOPED_TRACE(attack.path);
    for (const bool with_checksums : {false, true}) {
      std::stringstream stream = edited(*trained.optimizer, put(attack.path, attack.value), with_checksums);
      std::vector<std::string> parts{"FlashAdamW::load: "};
      if (!with_checksums) parts.insert(parts.end(), attack.parts.begin(), attack.parts.end());
      expect_error([&] { load(*trained.optimizer, stream); }, parts);
      EXPECT_TRUE(before == Snapshot(*trained.optimizer));
    }
  }
}

TEST(Damage, EntriesThatAreNotWhatTheyMustBeAreNamed) {
  const Trained trained = small("default");
  const std::string state = "state/0/";
  const int64_t many = int64_t{1} << 53;
  refuse(trained, {
                      {"state_format_version", int64_t{3}, {"state_format_version = 3"}},
                      {"optimizer", int64_t{3}, {"optimizer", "must be a string"}},
                      {"param_groups", int64_t{3}, {"param_groups is no archive"}},
                      {"param_groups/0/options/lr", std::numeric_limits<double>::quiet_NaN(), {"lr = nan"}},
                      {"param_groups/0/options/lr", std::string("x"), {"lr", "must be a number"}},
                      {"param_groups/0/options/betas", 0.5, {"betas", "must be two numbers"}},
                      {"param_groups/0/options/seed", {}, {"seed is missing"}},
                      {"state/0", int64_t{3}, {"state.0 is no archive"}},
                      {state + "step", int64_t{-1}, {"params[0]: step = -1"}},
                      {state + "step", many, {"step = 9007199254740992", "2^53"}},
                      {state + "step", 3.0, {"step", "must be an int"}},
                      {state + "slots", int64_t{-1}, {"slots = -1"}},
                      {state + "slots", int64_t{1} << 40, {"slots = 1099511627776"}},
                      {state + "slots", int64_t{1}, {"states1 of the archive is unknown"}},
                      {state + "slots", int64_t{0}, {"states0 of the archive is unknown"}},
                      {state + "master_weights", int64_t{6}, {"master_weights = 6"}},
                      {state + "state_codec", int64_t{-1}, {"state_codec = -1"}},
                      {state + "rows", int64_t{1}, {"rows = 1"}},
                      {state + "param_dtype", std::string("Double"), {"param_dtype = \"Double\""}},
                      {state + "param_dtype", std::string("Float"), {"Float parameter", "no bits to correct"}},
                      {state + "states0", torch::zeros({2, 41}, torch::kByte), {"shape [2, 41]"}},
                      {state + "states0", torch::zeros({2, 40}, torch::kInt), {"states[0]", "dtype Int"}},
                      {state + "states1", {}, {"states1 is missing"}},
                      {state + "scales0", torch::zeros({2, 3}, torch::kShort), {"scales[0]", "[2, 3]"}},
                      {state + "correction", torch::zeros({2}, torch::kChar), {"correction", "[2]"}},
                      {state + "correction", torch::full({2, 40}, -128, torch::kChar), {"correction holds -128"}},
                      {state + "correction", torch::zeros({2, 40}).to_sparse(), {"correction", "dense"}},
                      {"state/1/correction", torch::zeros({3}, torch::kChar), {"correction has 3 elements"}},
                  });
  // Headers beyond the largest number.
  refuse(trained, {{state + "scales1", torch::full({2, 2}, -1, torch::kShort), {"scales[1]", "infinite or NaN"}}});
  const Trained wide(maker<flash::FlashAdamW>(flash::FlashAdamWOptions(1e-2)), {parameter({3}, 1)});
  refuse(wide, {{"state/0/states1", torch::full({3}, -1.0), {"states[1] holds a negative number"}},
                {"state/0/scales1", torch::zeros({1}, torch::kShort), {"scales[1] has 1 elements"}}});
  const Trained paper = small("paper");
  for (const double bad : {-1.0, 1.0 / 0.0, std::nan("")}) {
    refuse(paper, {{state + "scales0", torch::full({2, 2}, bad, torch::kHalf), {"scales[0]", "negative, infinite"}},
                   {state + "scales1", torch::full({2, 2}, bad, torch::kHalf), {"scales[1]", "negative, infinite"}}});
  }
  refuse(paper, {{state + "states0", torch::full({2, 40}, -128, torch::kChar), {"states[0] holds the code -128"}}});
}

TEST(Damage, ATensorThatIsLargerThanItsStorageIsNotRead) {
  const Trained trained = small("default");
  Tensor large = torch::zeros({2, 40}, torch::kByte);
  large.unsafeGetTensorImpl()->set_sizes_and_strides(std::vector<int64_t>{1 << 20, 1 << 10},
                                                     std::vector<int64_t>{1 << 10, 1});
  Tensor far = torch::zeros({2, 40}, torch::kByte);
  far.unsafeGetTensorImpl()->set_sizes_and_strides(std::vector<int64_t>{2, 40},
                                                   std::vector<int64_t>{int64_t{1} << 62, 1});
  const Snapshot before(*trained.optimizer);
  for (const Tensor& bad : {large, far}) {
    // This torch looks itself; an older one leaves it to ArchiveReader.
    std::stringstream stream = edited(*trained.optimizer, put("state/0/states0", bad));
    expect_error([&] { load(*trained.optimizer, stream); }, {"storage", "80 bytes"});
    EXPECT_TRUE(before == Snapshot(*trained.optimizer));
  }
}

TEST(Damage, NothingUnknownIsPassedOverAndNoStateVanishes) {
  const Trained trained = small("default");
  const Snapshot before(*trained.optimizer);
  const auto extra = [](const std::string& beside, const std::string& key) -> Edit {
    return [=](const std::string& path, const std::string&, OutputArchive& out) {
      if (path == beside) out.write(key, c10::IValue(int64_t{1}));
      return false;
    };
  };
  for (const auto& [beside, key] :
       std::vector<std::pair<std::string, std::string>>{{"optimizer", "more"},
                                                        {"state/0", "2"},
                                                        {"state/0", "x"},
                                                        {"state/0/step", "more"},
                                                        {"param_groups/size", "1"},
                                                        {"param_groups/0/params", "more"},
                                                        {"param_groups/0/options/lr", "amsgrad"}}) {
    SCOPED_TRACE(beside);
    std::stringstream stream = edited(*trained.optimizer, extra(beside, key));
    expect_error([&] { load(*trained.optimizer, stream); }, {key + " of the archive is unknown"});
    EXPECT_TRUE(before == Snapshot(*trained.optimizer));
  }
  // With checksums a state that is left out, or comes from another archive, is told.
  std::stringstream stream = edited(*trained.optimizer, put("state/1", {}), /*with_checksums=*/true);
  expect_error([&] { load(*trained.optimizer, stream); }, {"which parameters have states", "damaged"});
  stream = edited(*trained.optimizer, put("state/0/step", int64_t{4}), /*with_checksums=*/true);
  expect_error([&] { load(*trained.optimizer, stream); }, {"params[0]: the state is not what its checksum says"});
  stream = edited(*trained.optimizer, put("checksum", {}), /*with_checksums=*/true);
  expect_error([&] { load(*trained.optimizer, stream); }, {"checksum is missing"});
  stream = edited(*trained.optimizer, put("flashoptim_archive_version", int64_t{1}), /*with_checksums=*/true);
  expect_error([&] { load(*trained.optimizer, stream); }, {"checksum is unknown"});
  EXPECT_TRUE(before == Snapshot(*trained.optimizer));
  // And unchanged, both kinds load.
  for (const bool with_checksums : {false, true}) {
    stream = edited(*trained.optimizer, [](auto&&...) { return false; }, with_checksums);
    load(*trained.optimizer, stream);
    EXPECT_TRUE(before == Snapshot(*trained.optimizer));
  }
}

}  // namespace
}  // namespace flashoptim_test
