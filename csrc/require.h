// Checks of what Python has not checked. PyTorch's own macro streams its words, and in a build that links the C++ library
// statically the stream breaks off at the first number: there its errors do not say what is wrong.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ordered {

inline std::string text(const char* words) { return words; }
inline std::string text(int64_t number) { return std::to_string(number); }

template <class... Words>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Words&... words) {
  throw std::runtime_error((std::string() + ... + text(words)));
}

// Throws the words and numbers, a RuntimeError in Python.
template <class... Words>
void require(bool condition, const Words&... words) {
  if (__builtin_expect(!condition, 0)) fail(words...);
}

}  // namespace ordered
