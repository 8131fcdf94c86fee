// Views: shapes, parts, both storage orders, const conversion, and that all of it is constexpr.
#include <doctest/doctest.h>

#include <type_traits>
#include <utility>

#include <loramix/core/views.hpp>

namespace lm = loramix;
using lm::Index, lm::Major, lm::Space;

namespace {

template <class T>
using Row = lm::MatrixView<T, Space::host, Major::row>;
template <class T>
using Column = lm::MatrixView<T, Space::host, Major::column>;

// Passed by value to kernels.
static_assert(std::is_trivially_copyable_v<Row<float>> && std::is_standard_layout_v<Row<float>>);
static_assert(std::is_trivially_copyable_v<Column<const float>>);
static_assert(std::is_trivially_copyable_v<lm::VectorView<double>>);
static_assert(std::is_same_v<Index, std::int64_t>);

// Const may be added, and nothing else: neither removed, nor the element type, the space or the order changed.
static_assert(std::is_convertible_v<Row<float>, Row<const float>>);
static_assert(!std::is_convertible_v<Row<const float>, Row<float>>);
static_assert(!std::is_convertible_v<Row<float>, Row<const double>>);
static_assert(!std::is_convertible_v<Row<float>, Column<float>>);
static_assert(!std::is_convertible_v<Row<float>, lm::MatrixView<float, Space::device>>);
static_assert(!std::is_convertible_v<Row<float>, lm::MatrixView<const float, Space::device>>);
static_assert(std::is_convertible_v<lm::VectorView<float>, lm::VectorView<const float>>);
static_assert(!std::is_convertible_v<lm::VectorView<const float>, lm::VectorView<float>>);
static_assert(!std::is_convertible_v<lm::VectorView<float>, lm::VectorView<const float, Space::device>>);
static_assert(std::is_same_v<decltype(std::declval<Row<float>>().transposed()), Column<float>>);
static_assert(std::is_same_v<decltype(std::declval<Column<float>>().transposed()), Row<float>>);
static_assert(Row<float>::major == Major::row && Column<float>::major == Major::column);
static_assert(lm::MatrixView<float, Space::device>::space == Space::device);

template <class V>
concept HasRow = requires(V v) {
  v.row(0);
};
static_assert(HasRow<Row<float>> && !HasRow<Column<float>>);

constexpr int cells[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
constexpr Row<const int> wide(cells, 3, 4);
constexpr Column<const int> tall(cells, 3, 4);

static_assert(wide.stride == 4 && tall.stride == 3);
static_assert(wide(0, 0) == 0 && wide(1, 2) == 6 && wide(2, 3) == 11);
static_assert(tall(0, 0) == 0 && tall(1, 2) == 7 && tall(2, 3) == 11);
static_assert(wide.row(2)[1] == 9);
static_assert(wide.block(1, 2, 1, 3)(1, 2) == 11 && wide.block(1, 2, 1, 3)(0, 0) == 5);
static_assert(wide.block(1, 2, 1, 3).rows == 2 && wide.block(1, 2, 1, 3).cols == 3 &&
              wide.block(1, 2, 1, 3).stride == 4);
static_assert(tall.block(1, 2, 1, 3)(0, 0) == 4 && tall.block(1, 2, 1, 3)(1, 2) == 11);
static_assert(wide.row_range(1, 2)(0, 0) == 4 && wide.row_range(1, 2).cols == 4);
static_assert(wide.col_range(3, 1)(2, 0) == 11 && wide.col_range(3, 1).rows == 3);
static_assert(tall.row_range(2, 1)(0, 1) == 5 && tall.col_range(1, 1)(0, 0) == 3);
static_assert(wide.row_range(3, 0).empty() && wide.col_range(4, 0).empty());  // one past the end is a place
static_assert(wide.block(3, 0, 0, 0).empty() && tall.block(0, 0, 4, 0).empty());
static_assert(!wide.empty() && Row<int>{}.empty() && Row<int>(nullptr, 5, 0).empty() &&
              Row<int>(nullptr, 0, 5).empty());
static_assert(wide.transposed()(3, 2) == wide(2, 3) && wide.transposed().transposed()(1, 2) == 6);
static_assert(wide.transposed().rows == 4 && wide.transposed().cols == 3 && wide.transposed().stride == 4);
static_assert(lm::VectorView<const int>(cells, 12).part(5, 3)[2] == 7 &&
              lm::VectorView<const int>(cells, 12).part(5, 3).size == 3);

}  // namespace

TEST_CASE("transposing and taking blocks commute, in both orders, for every cell") {
  int memory[5 * 7] = {};
  for (int i = 0; i < 35; ++i) memory[i] = i;
  const auto all = [](auto view) {
    for (Index r = 0; r < view.rows; ++r) {
      for (Index c = 0; c < view.cols; ++c) {
        CHECK(&view(r, c) == &view.transposed()(c, r));
        const auto block = view.block(r, view.rows - r, c, view.cols - c);
        CHECK(&block(0, 0) == &view(r, c));
        CHECK(&block(block.rows - 1, block.cols - 1) == &view(view.rows - 1, view.cols - 1));
        CHECK(&block.transposed()(0, 0) == &view(r, c));
      }
    }
  };
  all(Row<int>(memory, 5, 4, 7));
  all(Column<int>(memory, 4, 5, 7));
  const Row<int> strided(memory, 5, 4, 7);
  CHECK(strided(3, 2) == 23);
  CHECK(Column<int>(memory, 4, 5, 7)(2, 3) == 23);
}

TEST_CASE("writing through a view, reading through its const") {
  float memory[6] = {};
  const Row<float> v(memory, 2, 3);
  const Row<const float> c = v;
  v(1, 2) = 5;
  CHECK(memory[5] == 5);
  CHECK(c(1, 2) == 5);
  CHECK(c.data == memory);
  CHECK(c.stride == 3);
  const lm::VectorView<float> w(memory, 6);
  w[0] = 2;
  CHECK(lm::VectorView<const float>(w)[0] == 2);
}

TEST_CASE("parts of a null view are null: sizes are counted without memory") {
  const Row<float> none(nullptr, 8, 8);
  CHECK(none.block(2, 3, 4, 2).data == nullptr);
  CHECK(none.row_range(5, 2).data == nullptr);
  CHECK(none.col_range(5, 2).rows == 8);
  CHECK(lm::VectorView<float>(nullptr, 8).part(3, 2).data == nullptr);
  CHECK(lm::VectorView<float>(nullptr, 8).part(3, 2).size == 2);
}
