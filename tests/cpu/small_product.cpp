// Products of small matrices on packets, against sums in double with the bound of their rounding; every tail, both orders.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include <loramix/ops/reparam.hpp>
#include <loramix/ops/row_norm.hpp>
#include <loramix/ops/small_product.hpp>

#include "cpu/sums.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

struct Sizes {
  Index rows, n, columns;
};
const std::vector<Sizes> sizes{{1, 1, 1}, {5, 3, 15}, {6, 64, 64}, {13, 7, 131}, {62, 62, 517}, {0, 4, 9}, {4, 0, 9}};

}  // namespace

TEST_CASE_TEMPLATE("few rows of many columns", T, float, lm::bfloat16) {
  Random random(seed(70));
  for (const Sizes& s : sizes) {
    for (const lm::Into into : {lm::Into::set, lm::Into::add}) {
      CAPTURE(s.rows);
      CAPTURE(s.columns);
      Guarded<float> left(random, s.rows, s.n), turned(random, s.n, s.rows);
      Guarded<T> right(random, s.n, s.columns), old(random, s.rows, s.columns);
      const lm::MatrixView<const float> l = left.view(), t = turned.view();
      const lm::MatrixView<const T> r = right.view();
      const auto by_row = on_lanes(old, [&](const auto& be, lm::MatrixView<T> out) {
        using Body = lm::detail::SmallProduct<float, const T, T, host, lm::Major::row>;
        lm::for_rows<host>(be, s.rows, Body{l, r, out, into});
      });
      check_sums(by_row, old, into, s.n, [&](Index i, Index j, const auto& term) {
        for (Index k = 0; k < s.n; ++k) term(left.at(i, k) * right.at(k, j));
      });
      const auto by_column = on_lanes(old, [&](const auto& be, lm::MatrixView<T> out) {
        using Body = lm::detail::SmallProduct<float, const T, T, host, lm::Major::column>;
        lm::for_rows<host>(be, s.rows, Body{t.transposed(), r, out, into});
      });
      check_sums(by_column, old, into, s.n, [&](Index i, Index j, const auto& term) {
        for (Index k = 0; k < s.n; ++k) term(turned.at(k, i) * right.at(k, j));
      });
    }
  }
}

TEST_CASE_TEMPLATE("ranks that are mixed, and their gradient", T, float, lm::bfloat16) {
  Random random(seed(71));
  for (const Sizes& s : sizes) {
    if (s.rows == 0) continue;
    for (const lm::Into into : {lm::Into::set, lm::Into::add}) {
      CAPTURE(s.rows);
      CAPTURE(s.columns);
      Guarded<T> in(random, s.rows, s.columns), mixer(random, s.rows, s.rows), other(random, s.n, s.columns);
      Guarded<float> old(random, s.rows, s.columns), products(random, s.rows, s.n);
      const lm::MatrixView<const T> i = in.view(), m = mixer.view(), o = other.view();
      const auto mixed = on_lanes(old, [&](const auto& be, lm::MatrixView<float> out) {
        lm::reparam<host>(
            be, lm::MixRanks<T, T, float, float, host, lm::Major::row>{i.transposed(), m, out.transposed(), into});
      });
      check_sums(mixed, old, into, s.rows, [&](Index j, Index c, const auto& term) {
        for (Index k = 0; k < s.rows; ++k) term(in.at(k, c) * mixer.at(j, k));
      });
      const auto dots = on_lanes(products, [&](const auto& be, lm::MatrixView<float> out) {
        lm::reparam<host>(be, lm::RankProducts<T, T, float, float, host>{i.transposed(), o.transposed(), out, into});
      });
      check_sums(dots, products, into, s.columns, [&](Index j, Index k, const auto& term) {
        for (Index c = 0; c < s.columns; ++c) term(in.at(j, c) * other.at(k, c));
      });
    }
  }
}

TEST_CASE_TEMPLATE("norms of the rows of a weight plus a low-rank change", T, float, lm::bfloat16) {
  Random random(seed(74));
  constexpr Index columns = 37;
  constexpr float scale = 1.5f;
  for (const Index rows : {1, 15, 64, 100}) {
    for (const Index ranks : {0, 1, 7, 64}) {
      CAPTURE(rows);
      CAPTURE(ranks);
      Guarded<T> weights(random, rows, columns), A(random, ranks, columns), b(random, ranks, rows);
      const Guarded<float> old(random, 2, rows);
      const auto both = on_lanes(old, [&](const auto& be, lm::MatrixView<float> out) {
        const lm::VectorView<float> squares{out.row(0), rows}, norms{out.row(1), rows};
        lm::row_squares(be, lm::RowSquares<T, float, host>{weights.view(), squares});
        const lm::DoraNorms<T, T, float, host> op{weights.view(),        squares, A.view(),
                                                  b.view().transposed(), scale,   norms};
        Scratch scratch(lm::Arena<>::with_alignment(lm::dora_norms_bytes(be, op)));
        lm::dora_norms(be, op, scratch.arena());
        CHECK(scratch.intact());
      });
      Index wrong = 0;
      for (Index i = 0; i < rows; ++i) {
        double square = 0, size = 0;  // of the row; of the terms of which its square is summed
        for (Index c = 0; c < columns; ++c) {
          double change = 0, terms = std::abs(weights.at(i, c));
          for (Index k = 0; k < ranks; ++k) {
            change += b.at(k, i) * A.at(k, c);
            terms += scale * std::abs(b.at(k, i) * A.at(k, c));
          }
          square += std::pow(weights.at(i, c) + scale * change, 2);
          size += terms * terms;
        }
        const double unit = 0x1p-24, norm = std::sqrt(square);
        const double bound = static_cast<double>(columns + 2 * ranks + 8) * unit * size / norm + unit * norm;
        wrong += std::abs(both.at(1, i) - norm) <= bound ? 0 : 1;
      }
      CHECK(wrong == 0);
    }
  }
}
