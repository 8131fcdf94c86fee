/// Strict reading of JSON that nobody trusts: events instead of a tree, and every event refused unless its reader expects
/// it there. Depth, duplicates and types are then the reader's grammar, and memory is what the reader keeps.
///
/// Computes:    the events of RFC 8259 text that begins with '{': valid UTF-8, whole surrogate pairs, one value.
/// Reads:       text
/// Errors:      whatever the reader's refuse() makes of a sentence and a position.
/// Cost:        linear in the text; no recursion.
/// Determinism: a pure function of the text.
/// Example:     io/safetensors.hpp (HeaderReader); tests/io/safetensors.cpp
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include <loramix/core/config.hpp>
#include <nlohmann/json.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace io {
namespace detail {

/// All events of nlohmann's parser, each refused. A Reader declares those it accepts, and
/// refuse(sentence) [[noreturn]], unexpected(what) [[noreturn]].
template <class Reader>
class JsonEvents {
 public:
  bool null() { return no("null"); }
  bool boolean(bool) { return no("a boolean"); }
  bool number_integer(std::int64_t) { return no("a negative number"); }
  bool number_unsigned(std::uint64_t) { return no("a number"); }
  bool number_float(double, const std::string&) { return no("a number with a fraction, an exponent or over 64 bits"); }
  bool string(std::string&) { return no("a string"); }
  bool binary(nlohmann::json::binary_t&) { return no("binary data"); }
  bool start_object(std::size_t) { return no("an object"); }
  bool key(std::string&) { return no("a key"); }
  bool end_object() { return no("the end of an object"); }
  bool start_array(std::size_t) { return no("an array"); }
  bool end_array() { return no("the end of an array"); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception& error) {
    const std::string_view what = error.what();  // "[json.exception.…] parse error at …: reason"
    const std::size_t tag = what.find("] ");
    self().refuse("is not JSON: byte " + std::to_string(position) + ": " +
                  std::string(tag == std::string_view::npos ? what : what.substr(tag + 2)));
    return false;
  }

 private:
  Reader& self() { return static_cast<Reader&>(*this); }
  bool no(const char* what) {
    self().unexpected(what);
    return false;
  }
};

/// Sends the events of `text` to `reader`.
template <class Reader>
void read_json(std::string_view text, Reader& reader) {
  if (text.empty() || text.front() != '{') reader.refuse("does not begin with '{'");
  if (text.find('\0') != std::string_view::npos) reader.refuse("holds a NUL byte");  // would end nlohmann's input
  nlohmann::json::sax_parse(text.begin(), text.end(), &reader);
}

/// `text` as a JSON string. Bytes from 0x80 on stand as they are: whoever reads it back checks that they are UTF-8.
inline std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    const unsigned code = static_cast<unsigned char>(c);
    if (code < 0x20) {
      constexpr char digits[] = "0123456789abcdef";
      out += {'\\', 'u', '0', '0', digits[code / 16], digits[code % 16]};
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + '"';
}

}  // namespace detail
}  // namespace io
}  // namespace LORAMIX_ABI
}  // namespace loramix
