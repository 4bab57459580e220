// Runs a function in a child process under one FLASHOPTIM_ISA: the library reads the variable once per process, so that
// a program that compares instruction sets must not call it itself.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tests/core/machine_isas.h"

namespace flashoptim::test {

/// A child that writes to an unnamed file; start several, then read() each.
class Child {
 public:
  /// body(FILE*) returns the exit status; null `isa` leaves the variable unset.
  template <class Body>
  Child(const char* isa, Body body) : file_(std::tmpfile()) {
    std::fflush(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      if (isa == nullptr) {
        unsetenv("FLASHOPTIM_ISA");
      } else {
        setenv("FLASHOPTIM_ISA", isa, 1);
      }
      const int status = body(file_);
      std::fflush(file_);
      _exit(status);
    }
  }
  ~Child() { std::fclose(file_); }
  Child(const Child&) = delete;

  /// Waits, and gives what the child wrote; exit_status() is -1 where a signal ended it.
  std::vector<unsigned char> read() {
    int status = 0;
    waitpid(pid_, &status, 0);
    exit_status_ = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    std::fseek(file_, 0, SEEK_END);
    std::vector<unsigned char> bytes(static_cast<size_t>(std::ftell(file_)));
    std::rewind(file_);
    if (!bytes.empty() && std::fread(bytes.data(), 1, bytes.size(), file_) != bytes.size()) exit_status_ = -1;
    return bytes;
  }
  int exit_status() const { return exit_status_; }

 private:
  std::FILE* file_;
  pid_t pid_;
  int exit_status_ = -1;
};

}  // namespace flashoptim::test
