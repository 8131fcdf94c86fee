// The rules of the format, one lie at a time; then every truncation and seeded corruption of a good file.
#include <loramix/io/safetensors.hpp>

#include <random>

#include "io/support.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using loramix_test::file_of;
using loramix_test::Folder;
using loramix_test::get;
using loramix_test::has;
using loramix_test::length_of;
using loramix_test::put;
using loramix_test::refusal;

namespace {

std::string opened(const Folder& folder, const std::string& bytes) {
  const std::string path = folder / "t.safetensors";
  put(path, bytes);
  return refusal([&path] { lm::io::Safetensors file(path); });
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::string good_file(const Folder& folder) {
  const std::string path = folder / "good.safetensors", a(24, 'a'), b(6, 'b'), c(8, 'c');
  const lm::io::TensorBytes tensors[] = {{"b", lm::io::Dtype::BF16, {3}, bytes_of(b)},
                                         {"a", lm::io::Dtype::F32, {2, 3}, bytes_of(a)},
                                         {"c", lm::io::Dtype::I64, {}, bytes_of(c)},
                                         {"none", lm::io::Dtype::F32, {0, 7}, {}}};
  lm::io::write_safetensors(path, tensors, {{"key", "value"}, {"format", "pt"}});
  return path;
}

const std::string one = R"({"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}})";

}  // namespace

TEST_CASE("safetensors: the reference's own vectors") {
  const Folder folder;
  CHECK(one.size() == 0x3c);
  CHECK(opened(folder, file_of(one, 16)) == "");
  CHECK(has(opened(folder, file_of(one, 17)), "MetadataIncompleteBuffer"));
  CHECK(has(opened(folder, file_of(one, 14)), "lists tensors of 16 bytes, but the file has 14"));
  CHECK(has(opened(folder, std::string("\x3c\0\0\0\0\xff\xff\xff", 8)), "HeaderTooLarge"));
  CHECK(has(opened(folder, length_of(0)), "does not begin with '{'"));
  CHECK(opened(folder, file_of("{}", 0)) == "");
  CHECK(opened(folder, file_of("{}      ", 0)) == "");
  CHECK(
      has(opened(folder, file_of("\t\n{}\r ", 0)), "does not begin with '{'"));  // Rust reads it; the format forbids it
  CHECK(opened(folder, file_of("{" + tensor("t", "I32", "[]", "[0,4]") + "}", 4)) == "");
  CHECK(opened(folder, file_of("{" + tensor("t", "I32", "[2,0]", "[0,0]") + "}", 0)) == "");
}

TEST_CASE("safetensors: lengths that lie") {
  const Folder folder;
  for (std::size_t n = 0; n < 8; ++n) CHECK(has(opened(folder, std::string(n, '\0')), "HeaderTooSmall"));
  CHECK(has(opened(folder, length_of(100'000'001) + "{}"), "100000001 bytes, the limit is 100000000"));
  CHECK(has(opened(folder, length_of(100'000'000) + "{}"), "InvalidHeaderLength"));
  CHECK(has(opened(folder, length_of(3) + "{}"), "header of 3 bytes, but has only 2"));
  CHECK(has(opened(folder, length_of(~std::uint64_t{0}) + "{}"), "18446744073709551615"));
  CHECK(has(opened(folder, length_of(std::uint64_t{1} << 63) + "{}"), "HeaderTooLarge"));
}

TEST_CASE("safetensors: tensors that lie") {
  const Folder folder;
  const auto refused = [&folder](const std::string& tensors, std::size_t data, const std::string& why) {
    const std::string text = opened(folder, file_of("{" + tensors + "}", data));
    CAPTURE(text);
    CHECK(has(text, why));
    CHECK(has(text, "t.safetensors"));
  };
  const std::string comma = ",";
  refused(tensor("a", "I32", "[2]", "[0,8]") + comma + tensor("b", "I32", "[2]", "[4,12]"), 12,
          "inside the one before");
  refused(tensor("a", "I32", "[2]", "[0,8]") + comma + tensor("b", "I32", "[2]", "[0,8]"), 8, "InvalidOffset");
  refused(tensor("a", "I32", "[1]", "[0,4]") + comma + tensor("b", "I32", "[1]", "[8,12]"), 12,
          "after a hole from byte 4");
  refused(tensor("a", "I32", "[1]", "[4,8]"), 8, "begins at byte 4");
  refused(tensor("a", "I32", "[1]", "[4,0]"), 4, "end before they begin");
  refused(tensor("a", "I32", "[2]", "[0,4]"), 4, "takes 8 bytes, but data_offsets [0, 4] hold 4 (TensorInvalidInfo)");
  refused(tensor("a", "U8", "[4294967296,4294967296]", "[0,0]"), 0, "ValidationOverflow");
  refused(tensor("a", "U8", "[4294967296,4294967296]", "[0,16]"), 16, "ValidationOverflow");
  refused(tensor("a", "F64", "[1152921504606846976]", "[0,8]"), 8, "ValidationOverflow");
  refused(tensor("a", "U8", "[9223372036854775808]", "[0,8]"), 8, "over 63 bits");
  refused(tensor("a", "U8", "[8]", "[18446744073709551608,0]"), 8, "over 63 bits");
  refused(tensor("a", "U8", "[8]", "[18446744073709551616,0]"), 8, "over 64 bits");
  refused(tensor("a", "F4", "[3]", "[0,2]"), 2, "takes 12 bits, no whole bytes (MisalignedSlice)");
  refused(tensor("a", "F6_E2M3", "[2]", "[0,2]"), 2, "MisalignedSlice");
  refused(tensor("a", "I32", "[-2]", "[0,8]"), 8, "a negative number");
  refused(tensor("a", "I32", "[2]", "[0,8.0]"), 8, "a fraction");
  refused(tensor("a", "I32", "[2]", "[0,1e1]"), 8, "an exponent");
  refused(tensor("a", "I32", "[2]", "[0,\"8\"]"), 8, "a string");
  refused(tensor("a", "I32", "[[2]]", "[0,8]"), 8, "an array");
  refused(tensor("a", "I32", "[null]", "[0,8]"), 8, "null");
  refused(tensor("a", "I32", "2", "[0,8]"), 8, "holds a number where an array belongs");
  refused(tensor("a", "I32", "[2]", "[0,8,8]"), 8, "more than 2");
  refused(tensor("a", "I32", "[2]", "[8]"), 8, "fewer than 2");
  refused(tensor("a", "I33", "[2]", "[0,8]"), 8, "unknown dtype 'I33'");
  refused(tensor("a", "i32", "[2]", "[0,8]"), 8, "unknown dtype");
  refused(tensor("a", "I32", "[2]", "[0,8]") + comma + tensor("a", "I32", "[2]", "[8,16]"), 16, "'a' twice");
  refused("\"a\":{\"dtype\":\"I32\",\"dtype\":\"I32\",\"shape\":[2],\"data_offsets\":[0,8]}", 8, "dtype twice");
  refused("\"a\":{\"dtype\":\"I32\",\"shape\":[2]}", 8, "lacks data_offsets");
  refused("\"a\":{\"dtype\":\"I32\",\"data_offsets\":[0,8]}", 8, "lacks shape");
  refused("\"a\":{\"dtype\":\"I32\",\"shape\":[2],\"data_offsets\":[0,8],\"stride\":[1]}", 8, "unknown key 'stride'");
  refused("\"a\":[]", 0, "holds an array where an object belongs");
  refused("\"a\":true", 0, "a boolean");
  refused(tensor("a\\u0000b", "I32", "[2]", "[0,8]"), 8, "a NUL");
  CHECK(opened(folder, file_of("{" + tensor("a", "F4", "[4]", "[0,2]") + "}", 2)) == "");
  CHECK(opened(folder, file_of("{" + tensor("a", "F6_E3M2", "[4]", "[0,3]") + "}", 3)) == "");
}

TEST_CASE("safetensors: metadata that lies") {
  const Folder folder;
  const auto refused = [&folder](const std::string& header, const std::string& why) {
    const std::string text = opened(folder, file_of(header, 0));
    CAPTURE(text);
    CHECK(has(text, why));
  };
  CHECK(opened(folder, file_of(R"({"__metadata__":{"a":"b","":"","c":"\u0000"}})", 0)) == "");
  refused(R"({"__metadata__":{"a":1}})", "holds a number where a string belongs");
  refused(R"({"__metadata__":{"a":null}})", "null");
  refused(R"({"__metadata__":{"a":{"b":"c"}}})", "an object");
  refused(R"({"__metadata__":["a"]})", "an array");
  refused(R"({"__metadata__":"a"})", "a string");
  refused(R"({"__metadata__":{"a":"b","a":"c"}})", "twice");
  refused(R"({"__metadata__":{},"__metadata__":{}})", "twice");
}

TEST_CASE("safetensors: text that is no JSON") {
  const Folder folder;
  const auto refused = [&folder](const std::string& header, const std::string& why) {
    const std::string text = opened(folder, file_of(header, 0));
    CAPTURE(text);
    CHECK(has(text, why));
  };
  for (const char* text : {"{", "{\"", "{\"a\"", "{\"a\":", "{}}", "{} {}", "{,}", "{\"__metadata__\":{},}", "{'a':{}}",
                           "{}//", "{nan:1}"}) {
    refused(text, "not JSON");
  }
  refused("[]", "does not begin with '{'");
  refused("\xef\xbb\xbf{}", "does not begin with '{'");  // a byte order mark
  refused(std::string("{}\0garbage", 10), "NUL");
  refused(std::string("{\"a\0b\":{}}", 10), "NUL");
  refused("{\"a\x01\":{}}", "not JSON");
  refused("{\"\xff\":{}}", "not JSON");
  refused("{\"\xc0\x80\":{}}", "not JSON");          // overlong
  refused("{\"\xed\xa0\x80\":{}}", "not JSON");      // a surrogate as UTF-8
  refused("{\"\xf4\x90\x80\x80\":{}}", "not JSON");  // beyond U+10FFFF
  refused(R"({"\ud800":{}})", "not JSON");
  refused(R"({"\udc00":{}})", "not JSON");
  refused(R"({"\ud800\u0041":{}})", "not JSON");
  refused(R"({"a":1e999})", "not JSON");
}

TEST_CASE("safetensors: nesting is refused at its second level, a million of them at once") {
  const Folder folder;
  const std::size_t deep = 1'000'000;
  CHECK(has(opened(folder, file_of("{\"a\":" + std::string(deep, '['), 0)), "an array"));
  std::string objects = "{";
  for (std::size_t i = 0; i < deep; ++i) objects += "\"a\":{";
  CHECK(has(opened(folder, file_of(objects, 0)), "unknown key 'a'"));
}

TEST_CASE("safetensors: files that are none") {
  const Folder folder;
  const auto open = [](const std::string& path) { return refusal([&path] { lm::io::Safetensors file(path); }); };
  CHECK(has(open(folder / "absent"), "cannot be opened: No such file"));
  CHECK(has(open(folder.path()), "not a regular file"));
  CHECK(has(open("/dev/zero"), "not a regular file"));
  CHECK(has(open(""), "cannot be opened"));
  CHECK(has(open(std::string("a\0b", 3)), "NUL"));
  CHECK(has(open(folder / std::string(3000, 'x')), "cannot be opened"));
}

TEST_CASE("safetensors: a file comes back as it was written") {
  const Folder folder;
  const std::string path = good_file(folder), bytes = get(path);
  const lm::io::Safetensors file(path);
  CHECK(file.metadata() == lm::io::Metadata{{"key", "value"}, {"format", "pt"}});
  REQUIRE(file.tensors().size() == 4);
  CHECK(file.tensors()[0].name == "c");  // by falling alignment, then name
  CHECK(file.find("b") == &file.tensors()[3]);
  CHECK(file.find("d") == nullptr);
  CHECK(file.find("") == nullptr);
  for (const auto& tensor : file.tensors()) {
    const auto data = file.read(tensor);
    CHECK(data == std::vector<std::byte>(data.size(), static_cast<std::byte>(tensor.name[0])));
  }
  CHECK(file.find("a")->shape == std::vector<lm::Index>{2, 3});
  CHECK(file.find("a")->dtype == lm::io::Dtype::F32);
  CHECK(file.find("c")->shape.empty());
  CHECK(file.read(*file.find("none")).empty());
  const std::size_t header = static_cast<unsigned char>(bytes[0]) + 256u * static_cast<unsigned char>(bytes[1]);
  CHECK(header % 8 == 0);
  CHECK(bytes.size() == 8 + header + 38);

  lm::io::Tensor forged = *file.find("a");
  forged.end = 1000;
  CHECK(has(refusal([&] { file.read(forged); }), "is not in it"));

  lm::io::write_safetensors(folder / "empty.safetensors", {});
  CHECK(get(folder / "empty.safetensors") == file_of("{}      ", 0));
}

TEST_CASE("safetensors: names of any text") {
  const Folder folder;
  const std::string names[] = {"", "\"\\/", "tab\tnew\nline\x1f\x7f", "größe 模型 \U0001F600", "a.b.c"};
  std::vector<lm::io::TensorBytes> tensors;
  lm::io::Metadata metadata{{std::string("\0k", 2), std::string("v\0", 2)}};
  for (const std::string& name : names) tensors.push_back({name, lm::io::Dtype::U8, {0}, {}});
  for (const std::string& name : names) metadata[name] = name;
  const std::string path = folder / "names.safetensors";
  lm::io::write_safetensors(path, tensors, metadata);
  const lm::io::Safetensors file(path);
  for (const std::string& name : names) CHECK(file.find(name) != nullptr);
  CHECK(file.metadata() == metadata);
}

TEST_CASE("safetensors: the writer refuses what the reader would") {
  const Folder folder;
  const std::string path = folder / "w.safetensors", four(4, 'x');
  const auto write = [&](std::vector<lm::io::TensorBytes> tensors, const lm::io::Metadata& metadata = {}) {
    return refusal([&] { lm::io::write_safetensors(path, tensors, metadata); });
  };
  using lm::io::Dtype;
  CHECK(has(write({{"a", Dtype::F32, {2}, bytes_of(four)}}), "takes 8 bytes"));
  CHECK(has(write({{"a", Dtype::F32, {-1}, bytes_of(four)}}), "negative"));
  CHECK(has(write({{"a", Dtype::F32, {1}, bytes_of(four)}, {"a", Dtype::F32, {1}, bytes_of(four)}}), "twice"));
  CHECK(has(write({{"__metadata__", Dtype::F32, {1}, bytes_of(four)}}), "__metadata__"));
  CHECK(has(write({{"\xff", Dtype::F32, {1}, bytes_of(four)}}), "not JSON"));
  CHECK(has(write({}, {{"a", "\xff"}}), "not JSON"));
  CHECK(folder.count() == 0);
}

TEST_CASE("safetensors: a file cut at any byte is refused") {
  const Folder folder;
  const std::string path = good_file(folder), bytes = get(path);
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    const std::string text = opened(folder, bytes.substr(0, n));
    CHECK_MESSAGE(!text.empty(), "cut at byte ", n);
  }
  CHECK(opened(folder, bytes) == "");
}

TEST_CASE("safetensors: a file that shrinks while it is open is an error") {
  const Folder folder;
  const std::string path = good_file(folder), bytes = get(path);
  const lm::io::Safetensors file(path);
  std::filesystem::resize_file(path, bytes.size() - 20);
  CHECK(has(refusal([&] { file.read(*file.find("a")); }), "but had " + std::to_string(bytes.size()) + " bytes"));
}

TEST_CASE("safetensors: corrupted headers give an error or a file that holds together") {
  const Folder folder;
  const std::string good = get(good_file(folder));
  const std::size_t header = static_cast<unsigned char>(good[0]) + 256u * static_cast<unsigned char>(good[1]);
  std::mt19937_64 random(loramix_test::seed(0x5afe));
  const std::string syntax = "{}[]\",:\\0129-.eE untf\t\x80\xff";
  const std::string path = folder / "t.safetensors";
  int refused = 0, read = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string bytes = good;
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < (round % 2 == 0 ? 1 : changes); ++i) {
      const std::size_t at = random() % (8 + header);
      if (round % 4 < 2)
        bytes[at] = static_cast<char>(random());
      else if (round % 4 == 2)
        bytes[at] = syntax[random() % syntax.size()];
      else
        bytes[at] = good[random() % (8 + header)];
    }
    put(path, bytes);
    const std::string text = refusal([&] {
      const lm::io::Safetensors file(path);
      std::size_t total = 0;
      for (const auto& tensor : file.tensors()) total += file.read(tensor).size();
      CHECK(total == 38);
    });
    text.empty() ? ++read : ++refused;
  }
  CHECK(refused > 4000);
  CHECK(read > 100);  // a changed name or metadata value is still a file
}
