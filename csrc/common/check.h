// Input checks of the compiled operators. A message names the operator, the argument, what was expected and what came,
// like those of the Python side, and carries no source location: a user cannot act on one.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastsr {

template <typename Got>
[[noreturn]] void fail(const char* op, const char* argument, const std::string& expected, const Got& got) {
  std::ostringstream message;
  message << op << ": argument '" << argument << "': expected " << expected << ", got " << got;
  throw std::runtime_error(message.str());
}

template <typename Got>
inline void expect(bool holds, const char* op, const char* argument, const std::string& expected, const Got& got) {
  if (!holds) {
    fail(op, argument, expected, got);
  }
}

}  // namespace fastsr
