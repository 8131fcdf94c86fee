/// One exception type, with a message that names the op, the argument and both sizes.
///
/// Errors:  fail(Error) throws. With exceptions off (-fno-exceptions) it calls the handler set by set_error_handler,
///          which must not return; the default prints the message to stderr and aborts.
/// Example: catch (const lm::Error& e) { if (e.code() == lm::ErrorCode::arena) grow(); }
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

enum class ErrorCode { shape, stride, null, alias, overflow, value, arena, state, file, device };

class Error : public std::exception {
 public:
  explicit Error(ErrorCode code) noexcept : code_(code) { text_[0] = '\0'; }

  const char* what() const noexcept override { return text_; }
  ErrorCode code() const noexcept { return code_; }

  Error& operator<<(const char* text) noexcept {
    const std::size_t room = capacity - 1 - length_;
    const std::size_t wanted = std::strlen(text);
    const std::size_t taken = wanted < room ? wanted : room;
    std::memcpy(text_ + length_, text, taken);
    length_ += taken;
    text_[length_] = '\0';
    return *this;
  }
  Error& operator<<(Index number) noexcept {
    char digits[24];
    std::snprintf(digits, sizeof digits, "%lld", static_cast<long long>(number));
    return *this << digits;
  }

 private:
  static constexpr std::size_t capacity = 512;
  ErrorCode code_;
  std::size_t length_ = 0;
  char text_[capacity];
};

using ErrorHandler = void (*)(const Error&);

namespace detail {
[[noreturn]] inline void print_and_abort(const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  std::abort();
}
inline ErrorHandler& error_handler() {
  static ErrorHandler handler = nullptr;
  return handler;
}
}  // namespace detail

/// Sets what happens to an error where exceptions are off; nullptr restores the default. Returns the one before.
inline ErrorHandler set_error_handler(ErrorHandler handler) {
  const ErrorHandler before = detail::error_handler();
  detail::error_handler() = handler;
  return before;
}

[[noreturn]] inline void fail(const Error& error) {
  detail::throw_if_possible(error);
  if (const ErrorHandler handler = detail::error_handler()) handler(error);
  detail::print_and_abort(error);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
