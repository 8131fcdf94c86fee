// Errors as values: what a call threw, and a check of its code and of what its message names.
#pragma once
#include <doctest/doctest.h>

#include <initializer_list>
#include <string>

#include <loramix/core/error.hpp>

namespace loramix_test {

struct Caught {
  bool any = false;
  loramix::ErrorCode code{};
  std::string text;
  bool names(const std::string& part) const { return text.find(part) != std::string::npos; }
};

template <class F>
Caught caught(F&& f) {
  try {
    f();
  } catch (const loramix::Error& error) {
    return {true, error.code(), error.what()};
  }
  return {};
}

/// f must throw a loramix::Error with this code, whose message holds every part.
template <class F>
void check_error(loramix::ErrorCode code, std::initializer_list<std::string> parts, F&& f) {
  const Caught error = caught(f);
  CAPTURE(error.text);
  CHECK_MESSAGE(error.any, "no error was thrown");
  if (!error.any) return;
  CHECK(static_cast<int>(error.code) == static_cast<int>(code));
  for (const std::string& part : parts) CHECK_MESSAGE(error.names(part), "the message lacks: ", part);
}

}  // namespace loramix_test
