// How often an attack was tried and how often it went through.
#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <string>

namespace flashoptim::test {

/// Prints "NAME: N tried, M failed" at its end; every failure is one of the test's.
class Tally {
 public:
  explicit Tally(const char* name) : name_(name) {}
  Tally(const Tally&) = delete;
  ~Tally() {
    std::printf("[ attack ] %s: %d tried, %d failed\n", name_, tried_, failed_);
    ::testing::Test::RecordProperty("tried", tried_);
    ::testing::Test::RecordProperty("failed", failed_);
  }
  /// One try, which ended as it should (`problem` empty) or not.
  void count(const std::string& problem) {
    ++tried_;
    if (problem.empty()) return;
    ++failed_;
    ADD_FAILURE() << problem;
  }
  int tried() const { return tried_; }

 private:
  const char* name_;
  int tried_ = 0, failed_ = 0;
};

}  // namespace flashoptim::test
