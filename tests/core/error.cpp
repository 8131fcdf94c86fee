// Errors: code, message, truncation, and that the handler is for builds without exceptions (noexcept/).
#include <doctest/doctest.h>

#include <cstring>
#include <string>
#include <type_traits>

#include <loramix/core/check.hpp>

#include "core/caught.hpp"

namespace lm = loramix;
using loramix_test::check_error;

TEST_CASE("an error carries its code and what was streamed into it") {
  for (const lm::ErrorCode code : {lm::ErrorCode::shape, lm::ErrorCode::file, lm::ErrorCode::device}) {
    CHECK(lm::Error(code).code() == code);
    CHECK(std::string(lm::Error(code).what()).empty());
  }
  lm::Error error(lm::ErrorCode::state);
  error << "rows " << lm::Index{-3} << " and " << INT64_MAX << ", " << INT64_MIN << "";
  CHECK(std::string(error.what()) == "rows -3 and 9223372036854775807, -9223372036854775808");
  const lm::Error copy = error;
  CHECK(std::string(copy.what()) == error.what());
  CHECK(copy.what() != error.what());
  CHECK(copy.code() == lm::ErrorCode::state);
  static_assert(std::is_base_of_v<std::exception, lm::Error> && std::is_nothrow_copy_constructible_v<lm::Error>);
}

TEST_CASE("a message longer than the room is cut, never overrun") {
  for (const std::size_t first : {0u, 1u, 400u, 509u, 510u, 511u, 512u, 5000u}) {
    lm::Error error(lm::ErrorCode::value);
    const std::string text(first, 'a');
    error << text.c_str() << lm::Index{1234567890} << "tail";
    const std::string want = (text + "1234567890tail").substr(0, 511);
    CHECK(std::string(error.what()) == want);
  }
}

TEST_CASE("fail throws: as lm::Error and as std::exception; the handler stays asleep") {
  static int called;
  called = 0;
  const lm::ErrorHandler before = lm::set_error_handler([](const lm::Error&) { ++called; });
  CHECK((before == nullptr));
  check_error(lm::ErrorCode::alias, {"loramix: the op: the argument"},
              [] { lm::fail(lm::check::detail::about(lm::ErrorCode::alias, "the op", "the argument")); });
  bool as_standard = false;
  try {
    lm::fail(lm::Error(lm::ErrorCode::file) << "gone");
  } catch (const std::exception& e) {
    as_standard = std::strcmp(e.what(), "gone") == 0;
  }
  CHECK(as_standard);
  CHECK(called == 0);
  CHECK((lm::set_error_handler(nullptr) != nullptr));
  CHECK((lm::set_error_handler(nullptr) == nullptr));
}
