// Every system call that save_archive() makes fails once, in every way: the file is the old one or the new one, whole,
// the error is said, nothing is left beside it, and the next save goes well.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "flashoptim/torch/file.h"
#include "tests/reliability/tally.h"

extern "C" {  // io_shim.c
void io_shim_arm(const char* path, long number, const char* how);
long io_shim_seen();
const char* io_shim_faulted();
}

namespace flashoptim::test {
namespace {

namespace fs = std::filesystem;

/// Saves an archive that is told from others by `value`; what the error says, "" where there is none.
std::string save(const std::string& path, int64_t value) {
  ::torch::serialize::OutputArchive archive;
  archive.write("value", c10::IValue(value));
  for (const char* name : {"a", "b", "c"}) {
    archive.write(name, ::torch::full({10000}, static_cast<double>(value)), /*is_buffer=*/true);
  }
  try {
    libtorch::save_archive(path, archive);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

/// The value of a file that is whole; -1 where it is not.
int64_t value_of(const std::string& path) {
  ::torch::serialize::InputArchive archive;
  try {
    libtorch::load_archive(path, archive);
    c10::IValue value;
    archive.read("value", value);
    for (const char* name : {"a", "b", "c"}) {
      ::torch::Tensor tensor;
      archive.read(name, tensor, /*is_buffer=*/true);
      if (tensor.numel() != 10000 || !(tensor == static_cast<double>(value.toInt())).all().item<bool>()) return -1;
    }
    return value.toInt();
  } catch (const c10::Error&) {
    return -1;
  }
}

struct Folder {
  std::string path = (fs::temp_directory_path() / "flashoptim_io_XXXXXX").string();
  Folder() { EXPECT_NE(::mkdtemp(path.data()), nullptr); }
  ~Folder() { fs::remove_all(path); }
  size_t files() const { return static_cast<size_t>(std::distance(fs::directory_iterator(path), {})); }
};

/// What is wrong behind a save of 2 over 1 in which `call` failed by `mode`.
std::string problem_of(const std::string& path, const Folder& folder, size_t before, const std::string& call,
                       const std::string& mode, bool is_behind_rename, const std::string& error) {
  const bool had_file = before > 0;
  const int64_t value = fs::exists(path) ? value_of(path) : 0;
  const int64_t old_value = had_file ? 1 : 0;
  // What a signal or a short write interrupted is done again; of the folder's descriptor nothing is lost.
  const bool goes_well = mode == "short" ||
                         (mode == "EINTR" && (call == "open" || call == "write" || call == "fsync")) ||
                         (is_behind_rename && call == "close");
  const int64_t wanted = goes_well || is_behind_rename ? 2 : old_value;
  if (value != wanted) return "the file is " + std::to_string(value) + ", not " + std::to_string(wanted);
  if (goes_well != error.empty()) return goes_well ? "an error though all is well: " + error : "no error";
  if (!error.empty() && error.find("save_archive: " + path + ": ") != 0) return "says " + error;
  if (folder.files() != (wanted == 0 ? 0u : 1u)) return "something is left";
  return "";
}

TEST(IoFaults, EveryCallOfSaveArchiveFailsOnce) {
  Tally tally("I/O faults in save_archive()");
  for (const bool over_a_file : {false, true}) {
    for (const std::string mode : {"EIO", "ENOSPC", "EINTR", "short", "full"}) {
      for (long number = 0;; ++number) {
        const Folder folder;
        const std::string path = folder.path + "/checkpoint.pt";
        if (over_a_file) {
          ASSERT_EQ(save(path, 1), "");
        }
        const size_t before = folder.files();
        io_shim_arm(folder.path.c_str(), number, mode.c_str());
        const std::string error = save(path, 2);
        const std::string call = io_shim_faulted();
        const long seen = io_shim_seen();
        io_shim_arm("", -1, "EIO");
        if (number >= seen) {  // every call has failed
          ASSERT_GT(seen, 12) << "the shim sees nothing";
          break;
        }
        if (call.empty()) continue;  // "full", behind the last write
        // Behind the rename are open, fsync and close of the folder: the last three calls of a save that comes there.
        const bool is_behind_rename = number >= seen - 3 && error.find("as it was before") == std::string::npos &&
                                      error.find("cannot open") == std::string::npos && call != "rename";
        const std::string problem = problem_of(path, folder, before, call, mode, is_behind_rename, error);
        tally.count(problem.empty() ? "" : mode + " at call " + std::to_string(number) + ", " + call + ": " + problem);
        const std::string again = save(path, 3);
        EXPECT_TRUE(again.empty() && value_of(path) == 3) << again;
      }
    }
  }
  EXPECT_GT(tally.tried(), 100);
}

}  // namespace
}  // namespace flashoptim::test
