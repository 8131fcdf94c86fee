// ColumnSum against literal sums: chunk boundaries, groups, Into; and the order of its additions, bit by bit.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include <loramix/core/matrix.hpp>
#include <loramix/cpu/cpu.hpp>

#include "core/caught.hpp"
#include "reference/gate_data.hpp"
#include "support/seed.hpp"

using namespace loramix_test;
namespace lm = loramix;

namespace {

const lm::cpu::Backend<> be;
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

/// The order that the header promises: chunks of 256 tokens, each summed by itself, added in order.
float in_chunks(const lm::Matrix<float>& values, const GroupData& groups, Index g, Index c) {
  float total = 0;
  for (Index chunk = 0; chunk < values.rows(); chunk += 256) {
    float sum = 0;
    for (Index t = chunk; t < std::min(chunk + 256, values.rows()); ++t) {
      if (!groups.present() || groups.of(t) == g) sum += values(t, c);
    }
    total += sum;
  }
  return total;
}

lm::Groups<> lower(const GroupData& data) {
  if (data.by == By::id) return lm::Groups<>::by_id(data.ids.data(), data.count);
  if (data.by == By::segment) return lm::Groups<>::by_segment(data.offsets.data(), data.count);
  return {};
}

}  // namespace

TEST_CASE("column sums: one group of all, ids, segments; chunk boundaries; set and add") {
  Random random(seed(90));
  for (const Index tokens : {0, 1, 5, 255, 256, 257, 700}) {
    for (const By by : {By::absent, By::id, By::segment}) {
      for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
        INFO("T ", tokens, ", groups ", static_cast<int>(by), ", into ", static_cast<int>(into));
        constexpr Index columns = 21, padding = 2;
        lm::Matrix<float> values(tokens, columns);
        for (Index i = 0; i < tokens * columns; ++i) values.data()[i] = static_cast<float>(draw(random));
        const GroupData groups = draw_groups(random, by, tokens);
        const Index rows = by == By::absent ? 1 : groups.count;
        std::vector<float> out(static_cast<std::size_t>(rows * (columns + padding)),
                               into == lm::Into::set ? nan_value : 3);
        const lm::MatrixView<float> view(out.data(), rows, columns, columns + padding);
        lm::execute(be, lm::ColumnSum<float, float, lm::Space::host>{values, lower(groups), view, into}, lm::Arena<>{});
        long wrong = 0;
        double largest = 0;
        for (Index g = 0; g < rows; ++g) {
          for (Index c = 0; c < columns; ++c) {
            const float sum = in_chunks(values, groups, g, c);
            wrong += view(g, c) == (into == lm::Into::add ? 3 + sum : sum) ? 0 : 1;
            largest = std::fmax(largest, std::abs(sum));
          }
          for (Index c = columns; c < columns + padding; ++c) {
            const float untouched = out[static_cast<std::size_t>(g * (columns + padding) + c)];
            wrong += into == lm::Into::set ? !std::isnan(untouched) : untouched != 3;
          }
        }
        CHECK(wrong == 0);
        CHECK((largest > 0) == (tokens > 0));
      }
    }
  }
}

TEST_CASE("column sums refuse wrong shapes and groups, and write nothing") {
  lm::Matrix<float> values(4, 3), out(2, 3);
  std::fill_n(out.data(), 6, 7.0f);
  const std::int32_t ids[] = {0, 1, 2, 0};
  const lm::Index offsets[] = {0, 2, 3};
  const auto refuses = [&](lm::ErrorCode code, std::initializer_list<std::string> parts, lm::Groups<> groups,
                           lm::MatrixView<float> to) {
    check_error(code, parts, [&] {
      lm::execute(be, lm::ColumnSum<float, float, lm::Space::host>{values, groups, to}, lm::Arena<>{});
    });
    for (Index i = 0; i < 6; ++i) CHECK(out.data()[i] == 7.0f);
  };
  refuses(lm::ErrorCode::shape, {"column_sum", "out", "2", "1"}, {}, out);
  refuses(lm::ErrorCode::shape, {"column_sum", "out", "2", "3"}, lm::Groups<>::by_id(ids, 3), out);
  refuses(lm::ErrorCode::value, {"column_sum", "group id 2", "token 2"}, lm::Groups<>::by_id(ids, 2), out);
  refuses(lm::ErrorCode::shape, {"column_sum", "last", "3", "4"}, lm::Groups<>::by_segment(offsets, 2), out);
  refuses(lm::ErrorCode::alias, {"column_sum", "out", "values"}, {}, {values.data() + 3, 1, 3});
}
