/// Memory that the caller owns and an op cuts into pieces: no op of the library allocates.
///
///   workspace   passed by value: what an op takes is free again when it returns
///   reserve     passed by address: what forward takes stays taken until the caller resets it, after backward
///
/// Sizes are asked by running the code that carves on a counting arena, so a query cannot disagree with its op.
///
/// Errors:  an arena that is too small is refused before anything is written, saying by how much (ErrorCode::arena).
/// Example: std::vector<std::byte> scratch(lm::workspace_bytes(be, lora, max_tokens)); … lm::Arena{scratch}
#pragma once
#include <cstddef>
#include <cstdint>

#include <loramix/core/check.hpp>
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
template <class C>
concept ByteContainer = requires(C& container) {
  static_cast<void*>(container.data());
  container.size();
  requires sizeof(*container.data()) == 1;
};
}  // namespace detail

template <Space S = Space::host>
class Arena {
 public:
  /// Every piece starts on a 64-byte boundary; so does a query's count.
  static constexpr Index alignment = 64;

  constexpr Arena() = default;
  Arena(void* memory, Index bytes) {
    check::at_least("arena", "bytes", bytes, 0);
    if (memory == nullptr && bytes != 0) {
      fail(check::detail::about(ErrorCode::null, "arena", "memory") << " of " << bytes << " bytes has a null address");
    }
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(memory), aligned = round_up(begin);
    memory_ = static_cast<std::byte*>(memory) + (aligned - begin);
    capacity_ = bytes - static_cast<Index>(aligned - begin);
    if (capacity_ < 0) capacity_ = 0;
  }
  /// Any contiguous container of bytes: std::vector<std::byte>, std::span<std::byte>, …
  template <detail::ByteContainer Container>
  explicit Arena(Container& bytes) : Arena(bytes.data(), static_cast<Index>(bytes.size())) {}

  /// Hands out addresses that must not be used and counts them.
  static Arena counting() {
    Arena arena;
    arena.capacity_ = INT64_MAX;
    return arena;
  }

  /// `count` uninitialised T.
  template <class T>
  T* take(Index count) {
    Index bytes;
    if (count < 0 || __builtin_mul_overflow(count, static_cast<Index>(sizeof(T)), &bytes) || used_ > most - bytes) {
      fail(check::detail::about(ErrorCode::overflow, "arena", "request") << " of " << count << " elements overflows");
    }
    bytes = static_cast<Index>(round_up(static_cast<std::uintptr_t>(bytes)));
    if (bytes > capacity_ - used_) too_small("arena", "memory", bytes);
    std::byte* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(piece);
  }
  template <class T>
  MatrixView<T, S> matrix(Index rows, Index cols) {
    const Index elements = rows < 0 || cols < 0 ? -1 : check::detail::product(rows, cols);
    if (elements < 0) {
      fail(check::detail::about(ErrorCode::overflow, "arena", "request")
           << " of [" << rows << ", " << cols << "] elements overflows");
    }
    return {take<T>(elements), rows, cols};
  }
  template <class T>
  VectorView<T, S> vector(Index size) {
    return {take<T>(size), size};
  }

  Index used() const { return used_; }
  Index left() const { return capacity_ - used_; }
  std::byte* memory() const { return memory_; }
  /// Frees everything taken so far: what pointed there is dead.
  void reset() { used_ = 0; }

  /// The next `bytes` that take() would hand out, for checks that what an op reads or writes lies elsewhere.
  MatrixView<const std::byte, S> next(Index bytes) const {
    return {memory_ == nullptr ? nullptr : memory_ + used_, memory_ == nullptr ? 0 : 1, bytes};
  }

  /// Refuses to begin `op` with less than `bytes`.
  void require(const char* op, const char* argument, Index bytes) const {
    if (bytes > left()) too_small(op, argument, bytes);
  }

  /// Bytes to allocate for `bytes` of use, whatever the alignment of the allocation.
  static constexpr Index with_alignment(Index bytes) { return bytes == 0 ? 0 : bytes + alignment; }

 private:
  /// The largest sum of requests: rounding it up and adding an alignment still fits.
  static constexpr Index most = INT64_MAX - 2 * alignment;

  static constexpr std::uintptr_t round_up(std::uintptr_t v) {
    return (v + (alignment - 1)) & ~static_cast<std::uintptr_t>(alignment - 1);
  }
  [[noreturn]] void too_small(const char* op, const char* argument, Index bytes) const {
    fail(check::detail::about(ErrorCode::arena, op, argument)
         << " has " << left() << " bytes left, but " << bytes << " are needed: " << bytes - left() << " too few");
  }

  std::byte* memory_ = nullptr;
  Index capacity_ = 0;
  Index used_ = 0;
};

/// Bytes that `carve` takes from an arena.
template <Space S, class Carve>
Index carved_bytes(Carve&& carve) {
  Arena<S> counter = Arena<S>::counting();
  carve(counter);
  return counter.used();
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
