/// safetensors files: a strict reader that trusts nothing, and a writer that replaces a file whole or not at all.
///
/// Computes:    N (8 bytes, little-endian), N bytes of JSON header, tensors: row-major, little-endian, without gaps
///              (https://github.com/huggingface/safetensors).
/// Reads:       Safetensors(path): the header, at once and completely checked; a tensor's bytes when asked for. Nothing is
///              mapped, so a file that shrinks meanwhile is an error.
/// Writes:      write_safetensors(): header padded with spaces to 8 bytes, tensors by falling alignment (the format's
///              dtype order), then name, as the Rust writer does; io/file.hpp says how the file is replaced.
/// Errors:      ErrorCode::file with the path, the rule and the sizes, for: fewer than 8 bytes; N > 100,000,000 or beyond
///              the file; a header that is not UTF-8 JSON or does not begin with '{'; unknown, missing or duplicate keys;
///              an unknown dtype; sizes that are negative, fractional or overflow; data_offsets that do not match shape
///              and dtype, overlap, leave a hole or do not end where the file ends; a name with NUL; metadata values that
///              are not strings. The writer checks its own header with the reader's rules before it opens a file.
/// Cost:        linear in the header; one pread per tensor.
/// Determinism: equal tensors and metadata give equal files.
/// Example:     tests/io/safetensors.cpp
#pragma once
#include <bit>
#include <map>
#include <vector>

#include <loramix/core/check.hpp>
#include <loramix/core/scalars.hpp>
#include <loramix/io/file.hpp>
#include <loramix/io/json.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace io {

static_assert(std::endian::native == std::endian::little, "loramix: io/safetensors.hpp needs a little-endian machine");

/// The element types of the format, in its own order: by alignment.
enum class Dtype {
  BOOL,
  F4,
  F6_E2M3,
  F6_E3M2,
  U8,
  I8,
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  F8_E4M3FNUZ,
  F8_E5M2FNUZ,
  I16,
  U16,
  F16,
  BF16,
  I32,
  U32,
  F32,
  C64,
  F64,
  I64,
  U64
};

namespace detail {
struct DtypeRow {
  const char* name;
  Index bits;
};
inline constexpr DtypeRow dtype_table[] = {
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
inline constexpr int dtype_count = sizeof dtype_table / sizeof dtype_table[0];
static_assert(dtype_count == static_cast<int>(Dtype::U64) + 1);

template <class T>
struct dtype_of {
  static constexpr bool known = false;
};
template <Dtype D>
struct known_dtype {
  static constexpr bool known = true;
  static constexpr Dtype value = D;
};
template <>
struct dtype_of<float> : known_dtype<Dtype::F32> {};
template <>
struct dtype_of<double> : known_dtype<Dtype::F64> {};
template <>
struct dtype_of<half> : known_dtype<Dtype::F16> {};
template <>
struct dtype_of<bfloat16> : known_dtype<Dtype::BF16> {};
}  // namespace detail

/// The format's name of a dtype.
constexpr const char* name_of(Dtype dtype) { return detail::dtype_table[static_cast<int>(dtype)].name; }
/// Bits per element: 4 and 6 occur.
constexpr Index bits_of(Dtype dtype) { return detail::dtype_table[static_cast<int>(dtype)].bits; }

/// Strings by name; std::map, so that files come out the same every time.
using Metadata = std::map<std::string, std::string, std::less<>>;

/// A tensor of a file: bytes [begin, end) of what follows the header.
struct Tensor {
  std::string name;
  Dtype dtype{};
  std::vector<Index> shape;
  Index begin = 0;
  Index end = 0;
};

/// A tensor to be written: row-major bytes that live until write_safetensors returns.
struct TensorBytes {
  std::string name;
  Dtype dtype{};
  std::vector<Index> shape;
  std::span<const std::byte> bytes;
};

namespace detail {

inline constexpr Index largest_header = 100'000'000;

inline std::string shown_shape(const std::vector<Index>& shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size() && i < 8; ++i) out += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return out + (shape.size() > 8 ? ", …]" : "]");
}

/// A header as read: tensors by position in the file.
struct Header {
  std::vector<Tensor> tensors;
  Metadata metadata;
};

/// Builds a Header from events, and checks every rule that needs one tensor only.
class HeaderReader : public JsonEvents<HeaderReader> {
 public:
  HeaderReader(const char* op, const std::string& path) : op_(op), path_(path) {}
  Header take() { return std::move(header_); }

  [[noreturn]] void refuse(const std::string& sentence) const {
    Error error = about_file(op_, path_);
    error << ": header ";
    if (place_ == Place::metadata || place_ == Place::text) error << "__metadata__ ";
    if (!name_.empty()) error << shown(name_).c_str() << " ";
    fail(error << printable(sentence, 240).c_str());
  }
  [[noreturn]] void unexpected(const char* what) const {
    refuse(std::string(field_.empty() ? "" : field_ + " ") + "holds " + what + " where " + wanted() + " belongs");
  }

  bool start_object(std::size_t) {
    if (place_ == Place::before) return go(Place::root);
    if (place_ == Place::metadata_value) return go(Place::metadata);
    if (place_ == Place::tensor_value) return go(Place::tensor);
    unexpected("an object");
  }
  bool key(std::string& name) {
    if (place_ == Place::root) return root_key(name);
    if (place_ == Place::metadata) {
      name_ = name;
      if (!header_.metadata.emplace(name, std::string()).second) refuse("is there twice");
      return go(Place::text);
    }
    field_ = name;
    const unsigned bit = name == "dtype" ? 1 : name == "shape" ? 2 : name == "data_offsets" ? 4 : 0;
    if (bit == 0) refuse("has an unknown key " + shown(name, 40));
    if ((seen_ & bit) != 0) refuse("has " + name + " twice");
    seen_ |= bit;
    return go(bit == 1 ? Place::dtype : bit == 2 ? Place::shape : Place::offsets);
  }
  bool string(std::string& value) {
    if (place_ == Place::text) {
      header_.metadata[name_] = value;
      return go(Place::metadata);
    }
    if (place_ != Place::dtype) unexpected("a string");
    const auto row = std::find_if(std::begin(dtype_table), std::end(dtype_table),
                                  [&value](const DtypeRow& known) { return value == known.name; });
    if (row == std::end(dtype_table)) refuse("has an unknown dtype " + shown(value, 40));
    tensor_.dtype = static_cast<Dtype>(row - std::begin(dtype_table));
    return go(Place::tensor);
  }
  bool start_array(std::size_t) {
    if (place_ == Place::shape) return go(Place::dimension);
    if (place_ == Place::offsets) return go(Place::offset);
    unexpected("an array");
  }
  bool number_unsigned(std::uint64_t value) {
    if (place_ != Place::dimension && place_ != Place::offset) unexpected("a number");
    if (value > static_cast<std::uint64_t>(INT64_MAX)) refuse(field_ + " holds a number over 63 bits");
    if (place_ == Place::offset && offsets_.size() == 2) refuse("data_offsets holds more than 2 numbers");
    (place_ == Place::dimension ? tensor_.shape : offsets_).push_back(static_cast<Index>(value));
    return true;
  }
  bool end_array() { return go(Place::tensor); }
  bool end_object() {
    if (place_ == Place::tensor) finish_tensor();
    name_.clear();
    return go(place_ == Place::root ? Place::after : Place::root);
  }

 private:
  enum class Place {
    before,
    root,
    metadata_value,
    metadata,
    text,
    tensor_value,
    tensor,
    dtype,
    shape,
    dimension,
    offsets,
    offset,
    after
  };

  bool go(Place place) {
    place_ = place;
    if (place == Place::tensor) field_.clear();
    return true;
  }
  const char* wanted() const {
    switch (place_) {
      case Place::text:
      case Place::dtype:
        return "a string";
      case Place::shape:
      case Place::offsets:
        return "an array";
      case Place::dimension:
      case Place::offset:
        return "a whole number from 0 on";
      default:
        return "an object";
    }
  }
  bool root_key(const std::string& name) {
    name_ = name;
    if (name == "__metadata__") {
      if (has_metadata_) refuse("is there twice");
      has_metadata_ = true;
      return go(Place::metadata_value);
    }
    if (name.find('\0') != std::string::npos) refuse("is no name: it holds a NUL");
    tensor_ = {};
    tensor_.name = name;
    offsets_.clear();
    seen_ = 0;
    return go(Place::tensor_value);
  }
  void finish_tensor() {
    field_.clear();
    if (seen_ != 7) {
      refuse("lacks " + std::string((seen_ & 1) == 0 ? "dtype" : (seen_ & 2) == 0 ? "shape" : "data_offsets"));
    }
    if (offsets_.size() != 2) refuse("data_offsets holds fewer than 2 numbers");
    tensor_.begin = offsets_[0];
    tensor_.end = offsets_[1];
    const std::string offsets =
        "data_offsets [" + std::to_string(tensor_.begin) + ", " + std::to_string(tensor_.end) + "]";
    const std::string shape = std::string(name_of(tensor_.dtype)) + " " + shown_shape(tensor_.shape);
    if (tensor_.end < tensor_.begin) refuse(offsets + " end before they begin (InvalidOffset)");
    Index bits = bits_of(tensor_.dtype);
    for (const Index size : tensor_.shape) {
      bits = check::detail::product(bits, size);
      if (bits < 0) refuse(shape + " overflows 63 bits (ValidationOverflow)");
    }
    if (bits % 8 != 0) refuse(shape + " takes " + std::to_string(bits) + " bits, no whole bytes (MisalignedSlice)");
    if (bits / 8 != tensor_.end - tensor_.begin) {
      refuse(shape + " takes " + std::to_string(bits / 8) + " bytes, but " + offsets + " hold " +
             std::to_string(tensor_.end - tensor_.begin) + " (TensorInvalidInfo)");
    }
    header_.tensors.push_back(std::move(tensor_));
  }

  const char* op_;
  const std::string& path_;
  Header header_;
  Place place_ = Place::before;
  std::string name_, field_;
  Tensor tensor_;
  std::vector<Index> offsets_;
  unsigned seen_ = 0;
  bool has_metadata_ = false;
};

/// The header of a file with `data_bytes` bytes after it: every rule of the format.
inline Header parse_header(const char* op, const std::string& path, std::string_view text, Index data_bytes) {
  HeaderReader reader(op, path);
  read_json(text, reader);
  Header header = reader.take();

  std::vector<std::string_view> names;
  for (const Tensor& tensor : header.tensors) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  const auto twin = std::adjacent_find(names.begin(), names.end());
  if (twin != names.end()) reader.refuse("has the tensor " + shown(*twin) + " twice");

  std::stable_sort(header.tensors.begin(), header.tensors.end(), [](const Tensor& a, const Tensor& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  Index end = 0;
  for (const Tensor& tensor : header.tensors) {
    if (tensor.begin != end) {
      reader.refuse("tensor " + shown(tensor.name) + " begins at byte " + std::to_string(tensor.begin) +
                    (tensor.begin < end ? ", inside the one before, which ends at " : ", after a hole from byte ") +
                    std::to_string(end) + " (InvalidOffset)");
    }
    end = tensor.end;
  }
  if (end != data_bytes) {
    reader.refuse("lists tensors of " + std::to_string(end) + " bytes, but the file has " + std::to_string(data_bytes) +
                  " after its header (MetadataIncompleteBuffer)");
  }
  return header;
}

/// Element i of row-major bytes at any alignment.
template <class T>
T element(std::span<const std::byte> bytes, Index i) {
  T value;
  std::memcpy(&value, bytes.data() + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
  return value;
}

}  // namespace detail

/// An open safetensors file whose header has passed every check. Threads may share it.
class Safetensors {
 public:
  explicit Safetensors(const std::string& path) : file_("io::Safetensors", path) {
    const char* const op = "io::Safetensors";
    if (file_.size() < 8) {
      fail(detail::about_file(op, path) << " has " << file_.size()
                                        << " bytes, a header begins with 8 (HeaderTooSmall)");
    }
    std::uint64_t length = 0;
    file_.read(0, std::as_writable_bytes(std::span(&length, 1)));
    const std::string shown = std::to_string(length);
    if (length > static_cast<std::uint64_t>(detail::largest_header)) {
      fail(detail::about_file(op, path) << " announces a header of " << shown.c_str() << " bytes, the limit is "
                                        << detail::largest_header << " (HeaderTooLarge)");
    }
    data_ = 8 + static_cast<Index>(length);
    if (data_ > file_.size()) {
      fail(detail::about_file(op, path) << " announces a header of " << shown.c_str() << " bytes, but has only "
                                        << file_.size() - 8 << " after the length (InvalidHeaderLength)");
    }
    std::string text(static_cast<std::size_t>(length), ' ');
    file_.read(8, std::as_writable_bytes(std::span(text.data(), text.size())));
    header_ = detail::parse_header(op, path, text, file_.size() - data_);
    for (const Tensor& tensor : header_.tensors) by_name_.push_back(&tensor);
    std::sort(by_name_.begin(), by_name_.end(), [](const Tensor* a, const Tensor* b) { return a->name < b->name; });
  }

  const std::string& path() const { return file_.path(); }
  const Metadata& metadata() const { return header_.metadata; }
  /// In the order of the file.
  std::span<const Tensor> tensors() const { return header_.tensors; }
  /// nullptr where there is none.
  const Tensor* find(std::string_view name) const {
    const auto at = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                     [](const Tensor* tensor, std::string_view key) { return tensor->name < key; });
    return at != by_name_.end() && (*at)->name == name ? *at : nullptr;
  }
  /// The bytes of one of tensors(): row-major, little-endian.
  std::vector<std::byte> read(const Tensor& tensor) const {
    if (tensor.begin < 0 || tensor.end < tensor.begin || tensor.end > file_.size() - data_) {
      fail(detail::about_file("io::Safetensors", path())
           << ": " << detail::shown(tensor.name).c_str() << " is not in it");
    }
    std::vector<std::byte> bytes(static_cast<std::size_t>(tensor.end - tensor.begin));
    file_.read(data_ + tensor.begin, bytes);
    return bytes;
  }

 private:
  detail::InputFile file_;
  Index data_ = 0;
  detail::Header header_;
  std::vector<const Tensor*> by_name_;
};

/// Replaces the file at `path`, whole or not at all.
inline void write_safetensors(const std::string& path, std::span<const TensorBytes> tensors,
                              const Metadata& metadata = {}) {
  const char* const op = "io::write_safetensors";
  std::vector<const TensorBytes*> order;
  for (const TensorBytes& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const TensorBytes* a, const TensorBytes* b) {
    return a->dtype != b->dtype ? a->dtype > b->dtype : a->name < b->name;
  });

  std::string header = "{";
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) header += detail::quoted(key) + ":" + detail::quoted(value) + ",";
    header.back() = '}';
    header += ',';
  }
  std::vector<std::span<const std::byte>> parts(2);
  Index end = 0;
  for (const TensorBytes* tensor : order) {
    header += detail::quoted(tensor->name) + ":{\"dtype\":\"" + name_of(tensor->dtype) + "\",\"shape\":[";
    for (const Index size : tensor->shape) header += std::to_string(size) + ",";
    if (!tensor->shape.empty()) header.pop_back();
    header += "],\"data_offsets\":[" + std::to_string(end);
    end += static_cast<Index>(tensor->bytes.size());
    header.append(",").append(std::to_string(end)).append("]},");  // "," + string: gcc 12 warns at -O3 (bug 105651)
    parts.push_back(tensor->bytes);
  }
  if (header.size() > 1) header.pop_back();
  header += '}';
  header.append((8 - header.size() % 8) % 8, ' ');
  if (static_cast<Index>(header.size()) > detail::largest_header) {
    fail(detail::about_file(op, path) << ": a header of " << static_cast<Index>(header.size())
                                      << " bytes is over the limit of " << detail::largest_header);
  }
  static_cast<void>(detail::parse_header(op, path, header, end));

  const std::uint64_t length = header.size();
  parts[0] = std::as_bytes(std::span(&length, 1));
  parts[1] = std::as_bytes(std::span(header.data(), header.size()));
  detail::write_file(op, path, parts);
}

}  // namespace io
}  // namespace LORAMIX_ABI
}  // namespace loramix
