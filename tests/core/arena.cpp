// Arenas: alignment, counting by the carving code, and clear words when memory is missing.
#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <loramix/core/arena.hpp>

#include "core/caught.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using lm::Arena, lm::ErrorCode, lm::Index;
using loramix_test::caught;
using loramix_test::check_error;

namespace {
struct alignas(64) Memory {
  std::byte bytes[4096];
};
bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; }
}  // namespace

TEST_CASE("pieces are aligned, inside, and do not overlap, wherever the memory begins") {
  Memory memory;
  for (Index shift = 0; shift < 70; ++shift) {
    Arena<> arena(memory.bytes + shift, 2048);
    CHECK(arena.left() <= 2048);
    CHECK(arena.left() > 2048 - 64);
    const Index all = arena.left();
    char* const a = arena.take<char>(1);
    double* const b = arena.take<double>(9);
    std::uint16_t* const c = arena.take<std::uint16_t>(32);
    CHECK(aligned(a));
    CHECK(aligned(b));
    CHECK(aligned(c));
    CHECK(reinterpret_cast<std::byte*>(a) >= memory.bytes + shift);
    CHECK(reinterpret_cast<std::byte*>(b) - reinterpret_cast<std::byte*>(a) == 64);
    CHECK(reinterpret_cast<std::byte*>(c) - reinterpret_cast<std::byte*>(b) == 128);
    CHECK(arena.used() == 256);
    CHECK(arena.left() == all - 256);
    CHECK(reinterpret_cast<std::byte*>(c) + 64 <= memory.bytes + shift + 2048);
  }
}

TEST_CASE("counting equals the real carve, and the real carve fits what was counted, exactly") {
  std::mt19937 random(static_cast<unsigned>(loramix_test::seed(30)));
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::vector<Index> sizes(1 + random() % 8);
    for (Index& n : sizes) n = static_cast<Index>(random() % 300);
    const auto carve = [&](Arena<>& arena) {
      std::byte* last = nullptr;
      for (const Index n : sizes) last = reinterpret_cast<std::byte*>(arena.take<float>(n));
      arena.vector<double>(sizes[0]);
      arena.matrix<char>(sizes[0], 3);
      return last;
    };
    const Index bytes = lm::carved_bytes<lm::Space::host>(carve);
    CHECK(bytes % 64 == 0);
    std::vector<std::byte> memory(static_cast<std::size_t>(Arena<>::with_alignment(bytes)));
    Arena<> arena{memory};
    CHECK(arena.left() >= bytes);
    CHECK(!caught([&] { carve(arena); }).any);
    CHECK(arena.used() == bytes);
    if (bytes == 0) continue;
    // With one granule less it does not fit.
    Memory own;
    if (bytes > 4096) continue;
    Arena<> small(own.bytes, bytes - 1);
    check_error(ErrorCode::arena, {}, [&] { carve(small); });
  }
  CHECK(lm::carved_bytes<lm::Space::host>([](Arena<>&) {}) == 0);
  CHECK(Arena<>::with_alignment(0) == 0);
  CHECK(Arena<>::with_alignment(64) == 128);
}

TEST_CASE("counting hands out null and never runs out") {
  Arena<> counting = Arena<>::counting();
  CHECK(counting.take<float>(Index{1} << 40) == nullptr);
  CHECK(counting.matrix<float>(3, 5).data == nullptr);
  CHECK(counting.matrix<float>(3, 5).rows == 3);
  CHECK(counting.used() == (Index{1} << 42) + 128);
}

TEST_CASE("too small says by how much, and takes nothing") {
  Memory memory;
  Arena<> arena(memory.bytes, 1024);
  arena.take<std::byte>(100);
  check_error(ErrorCode::arena, {"arena", "has 896 bytes left", "1024 are needed", "128 too few"},
              [&] { arena.take<float>(250); });
  CHECK(arena.used() == 128);
  check_error(ErrorCode::arena, {"loramix: shrink: work", "has 896 bytes left", "900 are needed", "4 too few"},
              [&] { arena.require("shrink", "work", 900); });
  CHECK(!caught([&] { arena.require("shrink", "work", 896); }).any);
  CHECK(!caught([&] { arena.take<std::byte>(896); }).any);
  CHECK(arena.left() == 0);
  CHECK(!caught([&] { arena.take<float>(0); }).any);
  check_error(ErrorCode::arena, {"has 0 bytes left", "64 too few"}, [&] { arena.take<char>(1); });
}

TEST_CASE("requests that overflow are refused, on a counting arena too") {
  Memory memory;
  Arena<> real(memory.bytes, 1024), counting = Arena<>::counting();
  for (Arena<>* arena : {&real, &counting}) {
    check_error(ErrorCode::overflow, {"arena", "9223372036854775807"}, [&] { arena->take<float>(INT64_MAX); });
    check_error(ErrorCode::overflow, {}, [&] { arena->take<char>(INT64_MAX); });
    check_error(ErrorCode::overflow, {}, [&] { arena->take<char>(INT64_MAX - 64); });
    check_error(ErrorCode::overflow, {"-1"}, [&] { arena->take<float>(-1); });
    check_error(ErrorCode::overflow, {}, [&] { arena->take<float>(INT64_MIN); });
    check_error(ErrorCode::overflow, {"[-2, -3]"}, [&] { arena->matrix<float>(-2, -3); });
    check_error(ErrorCode::overflow, {"[1099511627776, 1099511627776]"},
                [&] { arena->matrix<float>(Index{1} << 40, Index{1} << 40); });
    check_error(ErrorCode::overflow, {}, [&] { arena->vector<double>(Index{1} << 61); });
    CHECK(arena->used() == 0);
  }
  // Sums overflow too, and with_alignment of what was counted does not.
  CHECK(!caught([&] { counting.take<char>(Index{1} << 62); }).any);
  check_error(ErrorCode::overflow, {}, [&] { counting.take<char>(Index{1} << 62); });
  counting = Arena<>::counting();
  Index most = 0;
  for (Index step = Index{1} << 62; step != 0; step /= 2) {  // the largest count that is accepted
    Arena<> fresh = Arena<>::counting();
    if (!caught([&] { fresh.take<char>(most + step); }).any) most += step;
  }
  counting.take<char>(most);
  CHECK(counting.used() <= INT64_MAX - 64);
  CHECK(Arena<>::with_alignment(counting.used()) > counting.used());
}

TEST_CASE("workspace by value is free again on return; reserve by address stays until reset") {
  Memory memory;
  const Arena<> workspace(memory.bytes, 1024);
  float* first = nullptr;
  const auto op = [](Arena<> work) { return work.take<float>(10); };
  first = op(workspace);
  CHECK(workspace.used() == 0);
  CHECK(op(workspace) == first);

  Arena<> reserve(memory.bytes, 1024);
  const auto forward = [](Arena<>* saved) { return saved->take<float>(10); };
  first = forward(&reserve);
  CHECK(forward(&reserve) != first);
  CHECK(reserve.used() == 128);
  reserve.reset();
  CHECK(reserve.used() == 0);
  CHECK(forward(&reserve) == first);
}

TEST_CASE("made from any contiguous container of bytes; empty holds nothing") {
  std::vector<std::byte> vector(1000);
  std::array<unsigned char, 1000> array;
  std::string text(1000, ' ');
  std::span<std::byte> span(vector);
  for (const Arena<>& arena : {Arena<>{vector}, Arena<>{array}, Arena<>{text}, Arena<>{span}}) {
    CHECK(arena.left() > 1000 - 64);
    CHECK(aligned(arena.memory()));
  }
  static_assert(!std::is_constructible_v<Arena<>, std::vector<float>&>);
  std::vector<std::byte> none;
  for (Arena<> empty : {Arena<>{}, Arena<>{none}, Arena<>{nullptr, 0}}) {
    CHECK(empty.left() == 0);
    CHECK(!caught([&] { empty.take<float>(0); }).any);
    check_error(ErrorCode::arena, {"has 0 bytes left", "64 are needed"}, [&] { empty.take<char>(1); });
  }
  Memory memory;
  CHECK(Arena<>(memory.bytes + 1, 10).left() == 0);  // nothing aligned inside
  check_error(ErrorCode::value, {"-5"}, [&] { Arena<>(memory.bytes, -5); });
  check_error(ErrorCode::null, {"arena", "100"}, [] { Arena<>(nullptr, 100); });
}

TEST_CASE("matrix and vector carve contiguous views") {
  Memory memory;
  Arena<> arena(memory.bytes, 4096);
  const lm::MatrixView<float> m = arena.matrix<float>(3, 5);
  CHECK(m.rows == 3);
  CHECK(m.cols == 5);
  CHECK(m.stride == 5);
  CHECK(arena.used() == 64);
  const lm::VectorView<double> v = arena.vector<double>(7);
  CHECK(v.size == 7);
  CHECK(aligned(v.data));
  CHECK(arena.used() == 128);
  CHECK(arena.matrix<float>(0, 5).empty());
  CHECK(arena.used() == 128);
}
