// Owning memory: zero-filled values with the semantics of values.
#include <doctest/doctest.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include <loramix/core/matrix.hpp>
#include <loramix/core/scalars.hpp>

#include "core/caught.hpp"

// Sanitizers end the program when an allocation is absurd; here that is the case under test.
// NOLINTBEGIN(bugprone-reserved-identifier, readability-identifier-naming)
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }
// NOLINTEND(bugprone-reserved-identifier, readability-identifier-naming)

namespace lm = loramix;
using lm::Buffer, lm::ErrorCode, lm::Index, lm::Matrix;
using loramix_test::check_error;

namespace {
bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; }

template <class T>
void fill(T& container) {
  for (Index i = 0; i < container.size(); ++i) container[i] = static_cast<float>(i + 1);
}
void pollute(Index size) {  // so that zeros are written, not found
  Buffer<std::uint8_t> dirty(size);
  for (std::uint8_t& b : dirty) b = 0xff;
}
template <class V>
V& alias(V& v) {
  return v;
}  // self-assignment that no compiler warns about

static_assert(std::is_nothrow_move_constructible_v<Buffer<float>> && std::is_nothrow_move_assignable_v<Buffer<float>>);
static_assert(std::is_nothrow_move_constructible_v<Matrix<float>> && std::is_nothrow_move_assignable_v<Matrix<float>>);
static_assert(std::is_convertible_v<Matrix<float>&, lm::MatrixView<float>>);
static_assert(std::is_convertible_v<const Matrix<float>&, lm::MatrixView<const float>>);
static_assert(!std::is_convertible_v<const Matrix<float>&, lm::MatrixView<float>>);
}  // namespace

TEST_CASE("a buffer is zero-filled, aligned to 64 bytes, and may be empty") {
  for (const Index size : {1, 15, 16, 17, 1000}) {
    pollute(4 * size);
    const Buffer<float> buffer(size);
    CHECK(buffer.size() == size);
    CHECK(aligned(buffer.data()));
    bool zero = true;
    for (const float v : buffer) zero = zero && v == 0.0f;
    CHECK(zero);
  }
  CHECK(Buffer<float>{}.data() == nullptr);
  CHECK(Buffer<float>(0).data() == nullptr);
  CHECK(Buffer<float>(0).size() == 0);
  const Buffer<lm::half> half(33);
  CHECK(half[32] == lm::half{0});
}

TEST_CASE("copies are deep, moves leave nothing behind, assignment to itself changes nothing") {
  Buffer<float> a(10);
  fill(a);
  Buffer<float> b = a;
  CHECK(b.data() != a.data());
  b[3] = -1;
  CHECK(a[3] == 4);
  CHECK(b[9] == 10);

  const float* const memory = a.data();
  Buffer<float> c = std::move(a);
  CHECK(c.data() == memory);
  CHECK(a.data() == nullptr);
  CHECK(a.size() == 0);
  a = c;
  CHECK(a.size() == 10);
  CHECK(a[9] == 10);
  CHECK(a.data() != c.data());
  a = std::move(b);
  CHECK(a[3] == -1);

  c = alias(c);
  CHECK(c[9] == 10);
  c = std::move(alias(c));
  CHECK(c.size() == 10);
  CHECK(c[9] == 10);
  c = Buffer<float>{};
  CHECK(c.size() == 0);
  const Buffer<float> copy_of_empty = c;
  CHECK(copy_of_empty.data() == nullptr);
}

TEST_CASE("views of buffers") {
  Buffer<float> a(4);
  a.view()[2] = 7;
  CHECK(a[2] == 7);
  CHECK(std::as_const(a).view().data == a.data());
  CHECK(a.view().size == 4);
  CHECK(a.end() - a.begin() == 4);
}

TEST_CASE("sizes that cannot be are refused with the size in the message") {
  check_error(ErrorCode::value, {"Buffer", "-1"}, [] { Buffer<float>(-1); });
  check_error(ErrorCode::overflow, {"Buffer", "9223372036854775807"}, [] { Buffer<float>{INT64_MAX}; });
  check_error(ErrorCode::overflow, {"9223372036854775807"}, [] { Buffer<char>{INT64_MAX}; });
  check_error(ErrorCode::overflow, {"1152921504606846976"}, [] { Buffer<float>(Index{1} << 60); });
  check_error(ErrorCode::overflow, {"Matrix", "[1099511627776, 1099511627776]"},
              [] { Matrix<float>(Index{1} << 40, Index{1} << 40); });
  check_error(ErrorCode::shape, {"Matrix", "[-2, -3]"}, [] { Matrix<float>(-2, -3); });
  check_error(ErrorCode::shape, {"Matrix", "[-2, 0]"}, [] { Matrix<float>(-2, 0); });
  check_error(ErrorCode::overflow, {}, [] { Matrix<double>(Index{1} << 30, Index{1} << 31); });
}

TEST_CASE("a matrix is a value with a shape, in either order") {
  Matrix<float> a(3, 4);
  CHECK(a.rows() == 3);
  CHECK(a.cols() == 4);
  CHECK(aligned(a.data()));
  a(2, 1) = 5;
  CHECK(a.data()[2 * 4 + 1] == 5);
  CHECK(std::as_const(a)(2, 1) == 5);
  const lm::MatrixView<float> view = a;
  CHECK(view.stride == 4);
  CHECK(view(2, 1) == 5);

  Matrix<float, lm::Space::host, lm::Major::column> tall(3, 4);
  tall(2, 1) = 6;
  CHECK(tall.data()[1 * 3 + 2] == 6);
  CHECK(tall.view().stride == 3);

  Matrix<float> b = a;
  b(2, 1) = -1;
  CHECK(a(2, 1) == 5);
  b = std::move(a);
  CHECK(b(2, 1) == 5);
  CHECK(b.rows() == 3);
  CHECK(a.view().empty());  // moved from: no rows, so nothing dangles
  CHECK(a.rows() == 0);
  CHECK(a.cols() == 0);
  const Matrix<float> c = std::move(b);
  CHECK(c(2, 1) == 5);
  CHECK(b.rows() == 0);
  b = c;
  b = alias(b);
  b = std::move(alias(b));
  CHECK(b.rows() == 3);
  CHECK(b.cols() == 4);
  CHECK(b(2, 1) == 5);
  CHECK(Matrix<float>(0, 7).cols() == 7);
  CHECK(Matrix<float>(0, 7).data() == nullptr);
  CHECK(Matrix<float>{}.view().empty());
}
