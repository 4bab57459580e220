// Numbers in messages.
#pragma once

#include <charconv>
#include <string>

namespace flashoptim {

/// Shortest text that reads back as the same number.
inline std::string number_text(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value);
  return std::string(text, end.ptr);
}

}  // namespace flashoptim
