// Makes one system call of a program fail: preloaded (LD_PRELOAD), or linked before the C library. Calls are counted
// that name a path with IO_SHIM_MATCH in it, or a descriptor that such a call opened; the IO_SHIM_AT-th of them (from
// 0) ends as IO_SHIM_MODE says. A program that links it can say the same by io_shim_arm().
//
//   EIO, ENOSPC, EINTR   the call does nothing and fails (close() closes all the same, as Linux does)
//   short                write() writes half; other calls go through
//   full                 this write() and all after it fail with ENOSPC
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { kMostDescriptors = 4096 };
static char watched[kMostDescriptors];
static char match[4096];
static long at = -1, seen = 0;
static char mode[16];
static char faulted[32];

#define REAL(name) __typeof__(name)* const real = (__typeof__(name)*)dlsym(RTLD_NEXT, #name)

/// From now on: no call fails where `number` is negative. Counting begins anew.
void io_shim_arm(const char* path, long number, const char* how) {
  memset(watched, 0, sizeof watched);
  snprintf(match, sizeof match, "%s", path);
  snprintf(mode, sizeof mode, "%s", how);
  at = number;
  seen = 0;
  faulted[0] = '\0';
}
/// Calls counted since.
long io_shim_seen(void) { return seen; }
/// The call that was made to fail; "" where none was.
const char* io_shim_faulted(void) { return faulted; }

__attribute__((constructor)) static void read_environment(void) {
  const char *path = getenv("IO_SHIM_MATCH"), *number = getenv("IO_SHIM_AT"), *how = getenv("IO_SHIM_MODE");
  if (path != NULL) io_shim_arm(path, number == NULL ? -1 : atol(number), how == NULL ? "EIO" : how);
}

__attribute__((destructor)) static void write_log(void) {
  const char* path = getenv("IO_SHIM_LOG");
  if (path == NULL) return;
  match[0] = '\0';
  FILE* file = fopen(path, "w");
  if (file == NULL) return;
  fprintf(file, "%ld %s\n", seen, faulted[0] == '\0' ? "-" : faulted);
  fclose(file);
}

/// Counts a call; whether it is the one that fails, with errno set.
static int fails(const char* name) {
  const long number = seen++;
  const int is_full = strcmp(mode, "full") == 0;
  if (at < 0 || number < at || (number > at && !(is_full && strcmp(name, "write") == 0))) return 0;
  if (is_full && strcmp(name, "write") != 0) return 0;
  if (number == at || faulted[0] == '\0') snprintf(faulted, sizeof faulted, "%s", name);
  if (strcmp(mode, "short") == 0) return 0;
  errno = strcmp(mode, "ENOSPC") == 0 || is_full ? ENOSPC : strcmp(mode, "EINTR") == 0 ? EINTR : EIO;
  return 1;
}

static int is_named(const char* path) { return match[0] != '\0' && path != NULL && strstr(path, match) != NULL; }
static int is_watched(int descriptor) {
  return descriptor >= 0 && descriptor < kMostDescriptors && watched[descriptor];
}
static int opened(int descriptor) {
  if (descriptor >= 0 && descriptor < kMostDescriptors) watched[descriptor] = 1;
  return descriptor;
}

#define OPEN(name)                                                      \
  int name(const char* path, int flags, ...) {                          \
    va_list arguments;                                                  \
    va_start(arguments, flags);                                         \
    const mode_t how = flags & O_CREAT ? va_arg(arguments, mode_t) : 0; \
    va_end(arguments);                                                  \
    REAL(name);                                                         \
    if (!is_named(path)) return real(path, flags, how);                 \
    if (fails("open")) return -1;                                       \
    return opened(real(path, flags, how));                              \
  }
OPEN(open)
OPEN(open64)

#define FOPEN(name)                               \
  FILE* name(const char* path, const char* how) { \
    REAL(name);                                   \
    if (!is_named(path)) return real(path, how);  \
    if (fails("open")) return NULL;               \
    FILE* const file = real(path, how);           \
    if (file != NULL) opened(fileno(file));       \
    return file;                                  \
  }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int descriptor, const void* data, size_t bytes) {
  REAL(write);
  if (!is_watched(descriptor)) return real(descriptor, data, bytes);
  const int is_short = strcmp(mode, "short") == 0 && seen == at && bytes > 1;
  if (fails("write")) return -1;
  return real(descriptor, data, is_short ? bytes / 2 : bytes);
}

int fsync(int descriptor) {
  REAL(fsync);
  return is_watched(descriptor) && fails("fsync") ? -1 : real(descriptor);
}

int ftruncate(int descriptor, off_t length) {
  REAL(ftruncate);
  return is_watched(descriptor) && fails("ftruncate") ? -1 : real(descriptor, length);
}

int close(int descriptor) {
  REAL(close);
  if (!is_watched(descriptor)) return real(descriptor);
  watched[descriptor] = 0;
  const int failed = fails("close"), error = errno, result = real(descriptor);
  if (!failed) return result;
  errno = error;
  return -1;
}

int rename(const char* from, const char* to) {
  REAL(rename);
  return is_named(to) && fails("rename") ? -1 : real(from, to);
}

int unlink(const char* path) {
  REAL(unlink);
  return is_named(path) && fails("unlink") ? -1 : real(path);
}
