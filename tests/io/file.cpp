// Writes happen whole or not at all.
#include <loramix/io/file.hpp>

#include <sys/resource.h>
#include <csignal>

#include "io/support.hpp"

using loramix::io::detail::write_file;
using loramix_test::Folder;
using loramix_test::get;
using loramix_test::has;
using loramix_test::put;
using loramix_test::refusal;

namespace {

void write(const std::string& path, const std::string& text) {
  const std::span<const std::byte> parts[] = {std::as_bytes(std::span(text.data(), text.size()))};
  write_file("test", path, parts);
}

/// Files may not grow beyond `bytes` while this lives: the disk is full.
class FullDisk {
 public:
  explicit FullDisk(rlim_t bytes) : signal_(std::signal(SIGXFSZ, SIG_IGN)) {
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &before_) == 0);
    const rlimit limit{bytes, before_.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  }
  FullDisk(const FullDisk&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;
  ~FullDisk() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, signal_);
  }

 private:
  void (*signal_)(int);
  rlimit before_{};
};

}  // namespace

TEST_CASE("file: a new file and a replaced one") {
  const Folder folder;
  const std::string path = folder / "f";
  write(path, "first");
  CHECK(get(path) == "first");
  std::filesystem::permissions(path, std::filesystem::perms(0640));
  write(path, "second");
  CHECK(get(path) == "second");
  CHECK((std::filesystem::status(path).permissions() & std::filesystem::perms::mask) == std::filesystem::perms(0640));
  CHECK(folder.count() == 1);
}

TEST_CASE("file: a full disk leaves the old file and no other") {
  const Folder folder;
  const std::string path = folder / "f";
  put(path, "old");
  std::string text, fresh;
  {
    const FullDisk full(4096);
    text = refusal([&] { write(path, std::string(100'000, 'x')); });
    fresh = refusal([&] { write(folder / "new", std::string(100'000, 'x')); });
  }
  CHECK(has(text, "cannot be written: File too large"));
  CHECK(has(fresh, "cannot be written"));
  CHECK(get(path) == "old");
  CHECK(folder.count() == 1);
}

TEST_CASE("file: a rename that fails leaves nothing behind") {
  const Folder folder;
  const std::string path = folder / "f";
  put(path, "old");
  // The target becomes a folder after it was looked at: rename fails at the last step.
  loramix::io::detail::OutputFile file("test", path);
  file.write(std::as_bytes(std::span("new")));
  std::filesystem::remove(path);
  std::filesystem::create_directories(path + "/inside");
  CHECK(folder.count() == 2);
  CHECK(has(refusal([&file] { file.commit(); }), "cannot be replaced"));
  CHECK(folder.count() == 1);
}

TEST_CASE("file: an OutputFile that is dropped leaves nothing behind") {
  const Folder folder;
  { loramix::io::detail::OutputFile file("test", folder / "f"); }
  CHECK(folder.count() == 0);
}

TEST_CASE("file: targets that cannot be") {
  const Folder folder;
  CHECK(has(refusal([&] { write(folder / "absent/f", "x"); }), "cannot be written: No such file or directory"));
  CHECK(has(refusal([&] { write("", "x"); }), "is no path"));
  CHECK(has(refusal([&] { write(std::string("a\0b", 3), "x"); }), "is no path"));
  CHECK(has(refusal([&] { write(folder.path(), "x"); }), "not a regular file"));
  CHECK(has(refusal([&] { write("/dev/null", "x"); }), "not a regular file"));
  CHECK(has(refusal([&] { write(folder / std::string(300, 'n'), "x"); }), "File name too long"));
  CHECK(folder.count() == 0);
  if (::access("/proc/self", F_OK) == 0) {  // a folder in which nobody, not even root, makes files
    CHECK(has(refusal([] { write("/proc/self/f", "x"); }), "cannot be written"));
  }
  if (::geteuid() != 0) {
    put(folder / "locked", "old");
    std::filesystem::permissions(folder / "locked", std::filesystem::perms(0444));
    CHECK(has(refusal([&] { write(folder / "locked", "x"); }), "cannot be replaced"));
    std::filesystem::permissions(folder.path(), std::filesystem::perms(0555));
    CHECK(has(refusal([&] { write(folder / "f", "x"); }), "Permission denied"));
    std::filesystem::permissions(folder.path(), std::filesystem::perms(0755));
  }
}

TEST_CASE("file: names in messages cannot move the cursor") {
  CHECK(loramix::io::detail::shown("a\x1b[2J\nb") == "'a?[2J?b'");
  CHECK(loramix::io::detail::shown("abcdef", 3) == "'abc…'");
  CHECK(loramix::io::detail::shown("größe 模型 \U0001F600") == "'größe 模型 \U0001F600'");
  CHECK(loramix::io::detail::shown("größe", 3) == "'gr…'");  // not half an ö
  CHECK(loramix::io::detail::shown("\xff\xc2\x9b\xe6\xa8x\xc3") == "'?????x?'");
  CHECK(loramix::io::detail::shown(std::string(5, 'x'), 5) == "'xxxxx'");
}
