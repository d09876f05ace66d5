// surfattn layer 0: what happens when a caller makes a mistake

#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace surfattn {

/// Receives the message of an error that a public function found in its arguments. It must not
/// return: it throws, longjmps or ends the program. If it returns all the same, the library calls
/// std::abort().
using ErrorHandler = void (*)(const std::string& message);

/// The handler in place at the start: throws std::invalid_argument, or, in a build without
/// exceptions, prints the message to standard error and ends the program.
[[noreturn]] inline void default_error_handler(const std::string& message) {
#if defined(__cpp_exceptions)
  throw std::invalid_argument(message);
#else
  std::fprintf(stderr, "%s\n", message.c_str());
  std::abort();
#endif
}

namespace detail {
inline std::atomic<ErrorHandler> error_handler{&default_error_handler};
}  // namespace detail

/// Replaces the error handler of the whole program and returns the one it replaces. A null pointer
/// puts the default back. Safe to call from any thread.
inline ErrorHandler set_error_handler(ErrorHandler handler) {
  return detail::error_handler.exchange(handler ? handler : &default_error_handler);
}

namespace detail {

/// Every mistake that a public function finds ends here, before anything is written.
[[noreturn]] inline void fail(const std::string& message) {
  error_handler.load()(message);
  std::abort();
}

}  // namespace detail
}  // namespace surfattn
