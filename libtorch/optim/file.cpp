#include "flashoptim/torch/file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

#include "libtorch/optim/whole_file.h"

namespace flashoptim::libtorch {
namespace {

constexpr char kMagic[] = "flashoptim file\n";
constexpr size_t kMagicBytes = sizeof kMagic - 1;
/// What follows the zip file.
struct Trailer {
  char magic[kMagicBytes];
  uint64_t length, checksum;
};
static_assert(sizeof(Trailer) == 32);
constexpr size_t kBufferBytes = size_t{1} << 20;

std::string reason(int error) { return std::generic_category().message(error); }

/// A file descriptor that closes itself; -1: none.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  int get() const { return descriptor_; }
  bool is_open() const { return descriptor_ >= 0; }
  /// 0, or the error.
  int close() { return ::close(std::exchange(descriptor_, -1)) == 0 ? 0 : errno; }

 private:
  int descriptor_;
};

/// The call again, as long as a signal interrupted it.
template <class Call>
auto retry(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

/// Takes what torch writes. Never fails before torch has finished: torch's writer writes in its destructor, too, and an
/// exception there would end the program.
class Writer {
 public:
  explicit Writer(int descriptor) : descriptor_(descriptor) {}

  size_t write(const void* data, size_t bytes) {
    if (bytes == 0) return 0;  // of no address perhaps, for which zlib would begin anew
    checksum_ = crc32_z(checksum_, static_cast<const Bytef*>(data), bytes);
    length_ += bytes;
    put(data, bytes);
    return bytes;
  }
  void finish() {
    Trailer trailer;
    std::memcpy(trailer.magic, kMagic, kMagicBytes);
    trailer.length = length_;
    trailer.checksum = checksum_;
    put(&trailer, sizeof trailer);
  }
  /// The first error; 0: none.
  int error() const { return error_; }

 private:
  void put(const void* data, size_t bytes) {
    const auto* next = static_cast<const char*>(data);
    while (error_ == 0 && bytes > 0) {
      const ssize_t done = retry([&] { return ::write(descriptor_, next, bytes); });
      if (done < 0) error_ = errno;
      if (done == 0) error_ = ENOSPC;  // not all of a regular file's bytes, and no error: there is no room
      if (done <= 0) return;
      next += done;
      bytes -= static_cast<size_t>(done);
    }
  }

  int descriptor_, error_ = 0;
  uint64_t length_ = 0;
  uLong checksum_ = 0;
};

/// Up to `bytes` bytes from `first`; fewer at the end of the file. -1: errno says why.
ssize_t read_at(int descriptor, void* data, size_t bytes, uint64_t first) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t now = retry([&] {
      return ::pread(descriptor, static_cast<char*>(data) + done, bytes - done, static_cast<off_t>(first + done));
    });
    if (now < 0) return -1;
    if (now == 0) break;
    done += static_cast<size_t>(now);
  }
  return static_cast<ssize_t>(done);
}

/// The length of the zip file in a file of save_archive(), all of which has been read and compared.
uint64_t checked_length(const std::string& where, int descriptor) {
  struct stat status = {};
  TORCH_CHECK(::fstat(descriptor, &status) == 0, where, "cannot be read: ", reason(errno));
  TORCH_CHECK(S_ISREG(status.st_mode), where, "is no regular file; must be a file that save_archive() wrote");
  const auto size = static_cast<uint64_t>(status.st_size);
  Trailer trailer = {};
  const bool has_room = size > sizeof trailer;
  if (has_room) {
    const ssize_t done = read_at(descriptor, &trailer, sizeof trailer, size - sizeof trailer);
    TORCH_CHECK(done >= 0, where, "cannot be read: ", reason(errno));
  }
  TORCH_CHECK(has_room && std::memcmp(trailer.magic, kMagic, kMagicBytes) == 0, where,
              "does not end as files of save_archive() do, after ", size,
              " bytes: it was cut off, or written by something else (torch::load() reads what torch::save() wrote)");
  TORCH_CHECK(trailer.length == size - sizeof trailer, where, "has ", size - sizeof trailer, " bytes of an archive; ",
              trailer.length, " were written: it is damaged");
  std::vector<Bytef> buffer(kBufferBytes);
  uLong checksum = 0;
  for (uint64_t first = 0; first < trailer.length;) {
    const auto bytes = static_cast<size_t>(std::min<uint64_t>(kBufferBytes, trailer.length - first));
    const ssize_t done = read_at(descriptor, buffer.data(), bytes, first);
    TORCH_CHECK(done >= 0, where, "cannot be read: ", reason(errno));
    TORCH_CHECK(static_cast<size_t>(done) == bytes, where, "became shorter while it was read");
    checksum = crc32_z(checksum, buffer.data(), bytes);
    first += bytes;
  }
  TORCH_CHECK(trailer.checksum == checksum, where, "has checksum ", checksum, "; ", trailer.checksum,
              " was written: it is damaged");
  return trailer.length;
}

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

void write_whole_file(const std::string& where, const std::string& path, bool has_trailer,
                      const std::function<void(const ByteSink&)>& produce) {
  const std::string partial = path + ".partial";
  File file(retry([&] { return ::open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666); }));
  TORCH_CHECK(file.is_open(), where, "cannot open ", partial, ": ", reason(errno));
  std::string failed;
  const auto check = [&](const char* what, int error) {
    if (failed.empty() && error != 0) failed = std::string(what) + " " + partial + ": " + reason(error);
  };
  Writer writer(file.get());
  try {
    produce([&](const void* data, size_t bytes) { return writer.write(data, bytes); });
  } catch (...) {
    ::unlink(partial.c_str());
    throw;
  }
  if (has_trailer) writer.finish();
  check("cannot write", writer.error());
  if (failed.empty()) check("cannot flush", retry([&] { return ::fsync(file.get()); }) == 0 ? 0 : errno);
  check("cannot close", file.close());
  if (failed.empty()) check("cannot rename", std::rename(partial.c_str(), path.c_str()) == 0 ? 0 : errno);
  if (!failed.empty()) {
    ::unlink(partial.c_str());
    TORCH_CHECK(false, where, failed, ". The file is as it was before");
  }
  const File folder(retry([&] { return ::open(folder_of(path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  // EINVAL: a file system that keeps no folders on a disk.
  const bool is_flushed = folder.is_open() && (retry([&] { return ::fsync(folder.get()); }) == 0 || errno == EINVAL);
  TORCH_CHECK(is_flushed, where, "the new file is there, but its folder cannot be flushed: ", reason(errno),
              ". After a power cut it may be the old one");
}

void save_archive(const std::string& path, ::torch::serialize::OutputArchive& archive) {
  write_whole_file("save_archive: " + path + ": ", path, /*has_trailer=*/true,
                   [&](const ByteSink& sink) { archive.save_to(sink); });
}

void load_archive(const std::string& path, ::torch::serialize::InputArchive& archive,
                  std::optional<::torch::Device> device) {
  const std::string where = "load_archive: " + path + ": ";
  const File file(retry([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC); }));
  TORCH_CHECK(file.is_open(), where, "cannot be opened: ", reason(errno));
  const uint64_t length = checked_length(where, file.get());
  int error = 0;
  const auto read = [&](uint64_t first, void* data, size_t bytes) -> size_t {
    if (first >= length) return 0;
    const auto wanted = static_cast<size_t>(std::min<uint64_t>(bytes, length - first));
    const ssize_t done = read_at(file.get(), data, wanted, first);
    if (done < 0) error = errno;
    return done < 0 ? 0 : static_cast<size_t>(done);
  };
  try {
    archive.load_from(read, [&] { return static_cast<size_t>(length); }, device);
  } catch (const c10::Error& failure) {
    TORCH_CHECK(error == 0, where, "cannot be read: ", reason(error));
    TORCH_CHECK(false, where, "holds no archive: ", failure.what_without_backtrace());
  } catch (const std::exception& failure) {
    TORCH_CHECK(false, where, "holds no archive: ", failure.what());
  }
  TORCH_CHECK(error == 0, where, "cannot be read: ", reason(error));
}

}  // namespace flashoptim::libtorch
