// The checks at the door: every message names op, argument and both sizes; the alias test against sets of bytes.
#include <doctest/doctest.h>

#include <bitset>
#include <cstdint>
#include <random>
#include <vector>

#include <loramix/core/check.hpp>

#include "core/caught.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using lm::ErrorCode, lm::Index, lm::Major, lm::Space;
using loramix_test::caught;
using loramix_test::check_error;

namespace {

constexpr Index big = Index{1} << 62;

template <class T, Major M = Major::row>
using View = lm::MatrixView<T, Space::host, M>;

/// An address that is never read: checks look at no element.
template <class T>
T* somewhere(std::uintptr_t offset = 0) {
  return reinterpret_cast<T*>(std::uintptr_t{0x10000} + offset);
}

template <class A, class B>
bool overlap(A a, B b) {
  return lm::check::detail::overlap(lm::check::detail::strided(a), lm::check::detail::strided(b));
}

template <std::size_t N>
struct Bytes {  // what a view covers, byte by byte
  std::bitset<N> set;
  Index begin, end;
  template <class T, Major M>
  Bytes(View<T, M> v, std::uintptr_t origin) : begin(INT64_MAX), end(-1) {
    for (Index r = 0; r < v.rows; ++r) {
      for (Index c = 0; c < v.cols; ++c) {
        const Index at = static_cast<Index>(reinterpret_cast<std::uintptr_t>(v.data) - origin) +
                         (M == Major::row ? r * v.stride + c : c * v.stride + r) * static_cast<Index>(sizeof(T));
        for (Index b = at; b < at + static_cast<Index>(sizeof(T)); ++b) set.set(static_cast<std::size_t>(b));
        begin = at < begin ? at : begin;
        end = at + static_cast<Index>(sizeof(T)) > end ? at + static_cast<Index>(sizeof(T)) : end;
      }
    }
  }
};

}  // namespace

TEST_CASE("same and at_least name both sizes") {
  CHECK(!caught([] { lm::check::same("op", "x", "rows", 3, "the number of tokens", 3); }).any);
  check_error(ErrorCode::shape, {"loramix: shrink: x has rows 3, but the number of tokens is 4"},
              [] { lm::check::same("shrink", "x", "rows", 3, "the number of tokens", 4); });
  CHECK(!caught([] { lm::check::at_least("op", "k", 2, 2); }).any);
  check_error(ErrorCode::value, {"loramix: route: k is 1, must be at least 2"},
              [] { lm::check::at_least("route", "k", 1, 2); });
}

TEST_CASE("view refuses negative sizes, short strides, null and overflow, in that order") {
  const auto check = [](auto v) { return [v] { lm::check::view("op", "x", v); }; };
  CHECK(!caught(check(View<float>(somewhere<float>(), 3, 4))).any);
  CHECK(!caught(check(View<float>(somewhere<float>(), 3, 4, 9))).any);
  CHECK(!caught(check(View<float, Major::column>(somewhere<float>(), 4, 3, 4))).any);
  CHECK(!caught(check(View<float>(nullptr, 0, 4))).any);
  CHECK(!caught(check(View<float>(nullptr, 4, 0))).any);
  CHECK(!caught(check(View<float>(somewhere<float>(), 1, 4, 0))).any);  // the stride of one row says nothing
  CHECK(!caught(check(View<float, Major::column>(somewhere<float>(), 4, 1, 0))).any);

  check_error(ErrorCode::shape, {"loramix: op: x", "[-3, 4]"}, check(View<float>(somewhere<float>(), -3, 4)));
  check_error(ErrorCode::shape, {"loramix: op: x", "[3, -4]"}, check(View<float>(somewhere<float>(), 3, -4)));
  check_error(ErrorCode::shape, {"[-1, 0]"}, check(View<float>(nullptr, -1, 0)));
  check_error(ErrorCode::shape, {}, check(View<float>(somewhere<float>(), INT64_MIN, INT64_MIN)));
  check_error(ErrorCode::stride, {"loramix: op: x", "stride 3", "row of 4"},
              check(View<float>(somewhere<float>(), 2, 4, 3)));
  check_error(ErrorCode::stride, {"stride -4", "row of 4"}, check(View<float>(somewhere<float>(), 2, 4, -4)));
  check_error(ErrorCode::stride, {"stride 0"}, check(View<float>(somewhere<float>(), 2, 1, 0)));
  check_error(ErrorCode::stride, {"stride 4", "column of 5"},
              check(View<float, Major::column>(somewhere<float>(), 5, 2, 4)));
  check_error(ErrorCode::null, {"loramix: op: x", "[3, 4]", "null"}, check(View<float>(nullptr, 3, 4)));
  check_error(ErrorCode::null, {"[1, 7]"}, check(lm::VectorView<float>(nullptr, 7)));
  check_error(ErrorCode::shape, {"[1, -7]"}, check(lm::VectorView<float>(somewhere<float>(), -7)));
}

TEST_CASE("extents past 63 bits are refused; no memory is needed to ask") {
  const auto check = [](auto v) { return [v] { lm::check::view("op", "x", v); }; };
  CHECK(!caught(check(View<float>(somewhere<float>(), Index{1} << 30, Index{1} << 30))).any);
  CHECK(!caught(check(View<char>(somewhere<char>(), Index{1} << 31, Index{1} << 31))).any);
  check_error(ErrorCode::overflow, {"loramix: op: x", "[2147483648, 2147483648]"},
              check(View<float>(somewhere<float>(), Index{1} << 31, Index{1} << 31)));
  check_error(ErrorCode::overflow, {"stride 1099511627776"},
              check(View<float>(somewhere<float>(), Index{1} << 40, 1, Index{1} << 40)));
  check_error(ErrorCode::overflow, {}, check(View<float>(somewhere<float>(), INT64_MAX, INT64_MAX)));
  check_error(ErrorCode::overflow, {}, check(View<float>(nullptr, INT64_MAX, INT64_MAX)));
  check_error(ErrorCode::overflow, {}, check(View<double, Major::column>(somewhere<double>(), 1, big)));
  check_error(ErrorCode::overflow, {}, check(lm::VectorView<double>(somewhere<double>(), big)));
  CHECK(lm::check::detail::product(3, 5) == 15);
  CHECK(lm::check::detail::product(big, 2) == -1);
  CHECK(lm::check::detail::product(big, 1) == big);
}

TEST_CASE("shape checks the view, then rows, then columns") {
  const auto check = [](auto v) { return [v] { lm::check::shape("op", "u", v, "the tokens", 3, "the ranks", 4); }; };
  CHECK(!caught(check(View<float>(somewhere<float>(), 3, 4, 6))).any);
  check_error(ErrorCode::shape, {"loramix: op: u has rows 2, but the tokens is 3"},
              check(View<float>(somewhere<float>(), 2, 4)));
  check_error(ErrorCode::shape, {"loramix: op: u has columns 5, but the ranks is 4"},
              check(View<float>(somewhere<float>(), 3, 5)));
  check_error(ErrorCode::null, {"[3, 4]"}, check(View<float>(nullptr, 3, 4)));
  check_error(ErrorCode::stride, {}, check(View<float>(somewhere<float>(), 3, 4, 2)));
}

TEST_CASE("disjoint names both views and their sizes; empty views share nothing") {
  const View<float> a(somewhere<float>(), 3, 4);
  check_error(ErrorCode::alias, {"loramix: op: y [3, 4] shares memory with x [3, 4]"},
              [&] { lm::check::disjoint("op", "y", a, "x", a); });
  check_error(ErrorCode::alias, {"y [3, 4]", "w [1, 1]"},
              [&] { lm::check::disjoint("op", "y", a, "w", View<std::uint8_t>(somewhere<std::uint8_t>(47), 1, 1)); });
  CHECK(!caught([&] {
           lm::check::disjoint("op", "y", a, "w", View<std::uint8_t>(somewhere<std::uint8_t>(48), 1, 1));
         }).any);
  CHECK(!caught([&] { lm::check::disjoint("op", "y", a, "x", View<float>(somewhere<float>(), 0, 4)); }).any);
  CHECK(!caught([&] { lm::check::disjoint("op", "y", View<float>(somewhere<float>(), 3, 0), "x", a); }).any);
  CHECK(!caught([&] { lm::check::disjoint("op", "y", View<float>{}, "x", View<float>{}); }).any);
}

TEST_CASE("slices of one interleaved qkv buffer are disjoint; slices that touch are not") {
  constexpr Index tokens = 5, d = 8;
  float memory[tokens * 3 * d];
  const View<float> qkv(memory, tokens, 3 * d);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) CHECK(overlap(qkv.col_range(i * d, d), qkv.col_range(j * d, d)) == (i == j));
  }
  CHECK(overlap(qkv.col_range(0, d + 1), qkv.col_range(d, d)));
  CHECK(overlap(qkv, qkv.col_range(d, d)));
  // Slices of different token ranges, whose extents interleave.
  CHECK(!overlap(qkv.block(0, 3, 0, d), qkv.block(1, 3, d, d)));
  CHECK(overlap(qkv.block(0, 3, 0, d), qkv.block(2, 3, 0, d)));
  CHECK(!overlap(qkv.block(0, 3, 0, d), qkv.block(3, 2, 0, d)));
  CHECK(!overlap(qkv.block(2, 3, 0, d), qkv.block(0, 2, 2 * d, d)));
}

TEST_CASE("alias test against sets of bytes: all small strided views") {
  constexpr std::uintptr_t origin = 0x10000;
  struct Entry {
    View<std::uint8_t> view;
    std::uint64_t bytes;
    Index begin, end;
    bool one_run;
  };
  std::vector<Entry> views;
  for (Index outer = 1; outer <= 4; ++outer) {
    for (Index inner = 1; inner <= 5; ++inner) {
      for (Index stride = inner; stride <= 8; ++stride) {
        if (outer == 1 && stride != inner) continue;
        const Index extent = (outer - 1) * stride + inner;
        for (Index begin = 0; begin + extent <= 32; begin += 1) {
          const View<std::uint8_t> v(somewhere<std::uint8_t>(static_cast<std::uintptr_t>(begin)), outer, inner, stride);
          const Bytes<64> bytes(v, origin);
          views.push_back({v, bytes.set.to_ullong(), bytes.begin, bytes.end, outer == 1 || stride == inner});
        }
      }
    }
  }
  long missed = 0, invented = 0, too_shy = 0, exact = 0, shared = 0;
  for (const Entry& a : views) {
    for (const Entry& b : views) {
      const bool truth = (a.bytes & b.bytes) != 0, got = overlap(a.view, b.view);
      missed += truth && !got;
      shared += truth;
      if (a.view.stride == b.view.stride || a.one_run || b.one_run) {
        ++exact;
        invented += got && !truth;
      }
      too_shy += got && (a.end <= b.begin || b.end <= a.begin);
    }
  }
  CHECK(missed == 0);
  CHECK(invented == 0);
  CHECK(too_shy == 0);
  CHECK(exact > 100000);
  CHECK(shared > 100000);
}

TEST_CASE("alias test against sets of bytes: random views of different types, orders and strides") {
  constexpr std::size_t extent = 2048;
  constexpr std::uintptr_t origin = 0x10000;
  std::mt19937 random(static_cast<unsigned>(loramix_test::seed(20)));
  const auto below = [&](int n) { return static_cast<Index>(random() % static_cast<unsigned>(n)); };
  long missed = 0, invented = 0, shared = 0, apart = 0;
  const auto compare = [&](auto a, auto b, bool one_stride) {
    const Bytes<extent> in_a(a, origin), in_b(b, origin);
    const bool truth = (in_a.set & in_b.set).any();
    (truth ? shared : apart) += 1;
    for (const bool got : {overlap(a, b), overlap(b, a), overlap(a.transposed(), b), overlap(b, a.transposed())}) {
      missed += truth && !got;
      if (one_stride) invented += got && !truth;
    }
  };
  for (int i = 0; i < 20000; ++i) {
    const Index ra = 1 + below(6), ca = 1 + below(8), rb = 1 + below(6), cb = 1 + below(8);
    const Index sa = ca + below(8), sb = cb + below(8);
    auto* const at_a = somewhere<float>(static_cast<std::uintptr_t>(4 * below(200)));
    const std::uintptr_t at_b = static_cast<std::uintptr_t>(2 * below(400));
    compare(View<float>(at_a, ra, ca, sa), View<std::uint16_t>(somewhere<std::uint16_t>(at_b), rb, cb, sb), false);
    const Index common = (ca > cb ? ca : cb) + below(8);
    compare(View<float>(at_a, ra, ca, common), View<float>(somewhere<float>(at_b), rb, cb, common), true);
    // The same byte stride with different element types.
    compare(View<float>(at_a, ra, ca, common), View<std::uint16_t>(somewhere<std::uint16_t>(at_b), rb, cb, 2 * common),
            true);
  }
  CHECK(missed == 0);
  CHECK(invented == 0);
  CHECK(shared > 1000);
  CHECK(apart > 1000);
}

TEST_CASE("huge virtual views are compared without overflow") {
  const View<float> a(somewhere<float>(), Index{1} << 30, (Index{1} << 30) - 2, Index{1} << 30);
  CHECK(overlap(a, a));
  CHECK(!overlap(a, View<float>(a.data + ((Index{1} << 30) - 2), Index{1} << 30, 2, Index{1} << 30)));
  CHECK(overlap(a, View<float>(a.data + ((Index{1} << 30) - 3), Index{1} << 30, 2, Index{1} << 30)));
}
