// Products of small matrices on packets, against sums in double with the bound of their rounding; every tail, both orders.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include <loramix/core/thread_pool.hpp>
#include <loramix/ops/reparam.hpp>
#include <loramix/ops/small_product.hpp>

#include "cpu/on_host.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

constexpr lm::Space host = lm::Space::host;

/// Rows with a guard behind each: what a kernel must not touch.
template <class T>
struct Guarded {
  static constexpr Index guard = 3;
  lm::Matrix<T> all;
  Guarded(Random& random, Index rows, Index cols) : all(drawn<lm::Matrix<T>>(random, rows, cols + guard)) {}
  lm::MatrixView<T> view() { return all.view().col_range(0, all.cols() - guard); }
  double at(Index i, Index j) const { return to_double(all(i, j)); }
};

/// Whether out is Σ terms (+ old) up to one rounding per addition, multiplication and store, and guards are as they were.
template <class T, class Terms>
void check_sums(const Guarded<T>& out, const Guarded<T>& old, lm::Into into, Index n, const Terms& terms) {
  const double unit = 0x1p-24, stored = std::is_same_v<T, float> ? 0x1p-24 : 0x1p-8;  // 24 and 8 bits of significand
  const Index columns = out.all.cols() - Guarded<T>::guard;
  Index wrong = 0;
  double most = 0;
  for (Index i = 0; i < out.all.rows(); ++i) {
    for (Index j = 0; j < columns; ++j) {
      double sum = 0, size = 0;
      terms(i, j, [&](double v) { sum += v, size += std::abs(v); });
      if (into == lm::Into::add) sum += old.at(i, j), size += std::abs(old.at(i, j));
      const double rounding = static_cast<double>(n + 1) * unit * 1.01 * size;
      const double bound = rounding + stored * (std::abs(sum) + rounding);
      wrong += std::abs(out.at(i, j) - sum) <= bound ? 0 : 1;
      most = std::max(most, std::abs(sum));
    }
    for (Index j = columns; j < out.all.cols(); ++j) wrong += out.at(i, j) == old.at(i, j) ? 0 : 1;
  }
  CHECK(wrong == 0);
  CHECK((most > 0 || out.all.rows() * columns == 0 || (n == 0 && into == lm::Into::set)));
}

/// The body on 1, 2 and 3 lanes, each time from `old`: the same bits; returns the last.
template <class T, class Run>
Guarded<T> on_lanes(const Guarded<T>& old, const Run& run) {
  Guarded<T> first = old;
  run(lm::cpu::Backend<>{}, first.view());
  for (const Index lanes : {2, 3}) {
    lm::ThreadPool pool(lanes);
    Guarded<T> again = old;
    run(lm::cpu::Backend<lm::ThreadPool::PoolExecutor>{pool.executor()}, again.view());
    CHECK(same_bits(first.all, again.all));
  }
  return first;
}

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
