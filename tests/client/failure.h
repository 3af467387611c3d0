// What ends the client: a message for whoever runs it, and the exit code that a script can act on.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <stdexcept>
#include <string>

enum class Exit {
  kUsage = 2,    // the command line
  kFile = 3,     // a file is missing, cannot be read, or is not what it should be
  kModel = 4,    // a model or a library does not load, or a model needs operators that no library has brought
  kInputs = 5,   // a request does not give what the model reads
  kScoring = 6,  // the model failed on a request
  kScores = 7,   // scores differ from the expected ones by more than --tolerance
};

struct Failure : std::runtime_error {
  Failure(Exit code, const std::string& message) : std::runtime_error(message), code(code) {}
  Exit code;
};

// What an exception tells whoever runs the client: without the backtrace and the places in sources that libtorch adds.
inline std::string told(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  return of_torch == nullptr ? error.what() : of_torch->what_without_backtrace();
}
