/// Files as io/ needs them: positioned reads of a regular file, and a write that either happens whole or not at all.
///
/// Computes:    InputFile::read(): bytes [begin, begin + size) of an open file. write_file(): temporary file in the same
///              folder (own name, O_EXCL), all bytes, fsync, rename over the target, fsync of the folder.
/// Reads:       regular files only. Nothing is mapped: a file that shrinks while it is open is an error, not a SIGBUS.
/// Writes:      the target, by rename. Its permissions stay; a read-only target or one that is no file is refused.
/// Errors:      ErrorCode::file with the path, the step and the system's reason; after a failed write the target is as
///              it was and the temporary file is gone.
/// Cost:        one system call per read, two per gigabyte written.
/// Determinism: a pure function of the bytes.
/// Example:     tests/io/file.cpp
#pragma once
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <loramix/core/error.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace io {
namespace detail {

/// Text from a file or a caller as it may stand in a message: short, UTF-8, nothing that moves a cursor.
inline std::string printable(std::string_view text, std::size_t most) {
  const auto byte = [text](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  std::string out;
  std::size_t size = 1;
  for (std::size_t i = 0; i < text.size(); i += size) {
    const unsigned first = byte(i);
    size = first < 0xc2 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    bool good = size == 1 ? first >= 0x20 && first < 0x7f : first < 0xf5 && !(first == 0xc2 && byte(i + 1) < 0xa0);
    for (std::size_t k = 1; k < size; ++k) good = good && (byte(i + k) & 0xc0u) == 0x80u;
    if (!good) size = 1;
    if (out.size() + size > most) return out + "…";
    out += good ? text.substr(i, size) : "?";
  }
  return out;
}
inline std::string shown(std::string_view text, std::size_t most = 80) {
  std::string out(1, '\'');  // GCC 12 warns of a literal + a string, wrongly (PR 105651)
  out += printable(text, most);
  out += '\'';
  return out;
}

/// "loramix: <op>: '<path>'", of a long path its end.
inline Error about_file(const char* op, const std::string& path) {
  constexpr std::size_t most = 160;
  const std::string end = path.size() > most ? "…" + path.substr(path.size() - most) : path;
  Error error(ErrorCode::file);
  error << "loramix: " << op << ": " << shown(end, end.size()).c_str();
  return error;
}

/// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() { close(); }
  int get() const { return fd_; }
  bool close() {
    const int fd = std::exchange(fd_, -1);
    return fd < 0 || ::close(fd) == 0;
  }

 private:
  int fd_;
};

/// A regular file open for reading, with the size it had when it was opened.
class InputFile {
 public:
  InputFile(const char* op, const std::string& path) : op_(op), path_(path) {
    if (path.find('\0') != std::string::npos) fail(about_file(op, path) << " is no path: it holds a NUL");
    file_ = Descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // a FIFO must not block
    struct ::stat status = {};
    if (file_.get() < 0 || ::fstat(file_.get(), &status) != 0) {
      fail(about_file(op, path) << " cannot be opened: " << std::strerror(errno));
    }
    if (!S_ISREG(status.st_mode)) fail(about_file(op, path) << " is not a regular file");
    size_ = static_cast<Index>(status.st_size);
  }

  const std::string& path() const { return path_; }
  Index size() const { return size_; }

  void read(Index begin, std::span<std::byte> into) const {
    Index at = begin;
    while (!into.empty()) {
      const ssize_t count = ::pread(file_.get(), into.data(), into.size(), static_cast<off_t>(at));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail(about_file(op_, path_) << " cannot be read at byte " << at << ": " << std::strerror(errno));
      if (count == 0) {
        fail(about_file(op_, path_) << " ends at byte " << at << ", but had " << size_ << " bytes when it was opened");
      }
      at += count;
      into = into.subspan(static_cast<std::size_t>(count));
    }
  }

 private:
  const char* op_;
  std::string path_;
  Descriptor file_;
  Index size_ = 0;
};

/// A new file beside `target`, removed again unless commit() has given it the target's name.
class OutputFile {
 public:
  OutputFile(const char* op, const std::string& target) : op_(op), target_(target) {
    if (target.empty() || target.find('\0') != std::string::npos) refuse("is no path", 0);
    struct ::stat old = {};
    const bool exists = ::stat(target.c_str(), &old) == 0;
    if (exists && !S_ISREG(old.st_mode)) refuse("is not a regular file", 0);
    if (exists && ::access(target.c_str(), W_OK) != 0) refuse("cannot be replaced", errno);
    const std::size_t slash = target.rfind('/');
    folder_ = slash == std::string::npos ? "." : target.substr(0, slash + 1);
    open();
    if (exists) static_cast<void>(::fchmod(file_.get(), old.st_mode & 07777));
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() { remove(); }

  void write(std::span<const std::byte> bytes) {
    constexpr std::size_t most = std::size_t{1} << 30;
    while (!bytes.empty()) {
      const ssize_t count = ::write(file_.get(), bytes.data(), std::min(bytes.size(), most));
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) refuse("cannot be written", count < 0 ? errno : EIO);
      bytes = bytes.subspan(static_cast<std::size_t>(count));
    }
  }

  void commit() {
    if (::fsync(file_.get()) != 0) refuse("cannot be written to disk", errno);
    if (!file_.close()) refuse("cannot be closed", errno);
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) refuse("cannot be replaced", errno);
    temporary_.clear();
    const Descriptor folder(::open(folder_.c_str(), O_RDONLY | O_CLOEXEC));
    if (folder.get() >= 0) static_cast<void>(::fsync(folder.get()));  // best effort: either file is whole
  }

 private:
  void open() {
    static std::atomic<unsigned> count{0};
    for (int tries = 0; tries < 1000 && file_.get() < 0; ++tries) {
      const std::string name = "/.loramix-" + std::to_string(::getpid()) + "-" + std::to_string(count++) + ".tmp";
      const int fd = ::open((folder_ + name).c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (fd >= 0) {
        temporary_ = folder_ + name;
        file_ = Descriptor(fd);
      } else if (errno != EEXIST) {
        break;
      }
    }
    if (file_.get() < 0) refuse("cannot be written", errno);
  }
  void remove() {
    file_.close();
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    temporary_.clear();
  }
  [[noreturn]] void refuse(const char* what, int reason) {
    remove();  // before fail(), which does not unwind where exceptions are off
    Error error = about_file(op_, target_);
    error << " " << what;
    if (reason != 0) error << ": " << std::strerror(reason);
    fail(error);
  }

  const char* op_;
  std::string target_, folder_, temporary_;
  Descriptor file_;
};

inline void write_file(const char* op, const std::string& path, std::span<const std::span<const std::byte>> parts) {
  OutputFile file(op, path);
  for (const auto part : parts) file.write(part);
  file.commit();
}

}  // namespace detail
}  // namespace io
}  // namespace LORAMIX_ABI
}  // namespace loramix
