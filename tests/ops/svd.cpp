// The SVD of a product of thin matrices: P diag(σ) Qᵀ is the product, P and Q are orthonormal and σ falls, which only the
// singular values do.
#include <loramix/ops/svd.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "core/caught.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using lm::Index;

namespace {

using Dense = lm::Matrix<double>;

Dense draw(Index rows, Index cols, std::uint64_t site) {
  std::mt19937_64 engine(loramix_test::seed(site));
  std::normal_distribution<double> normal;
  Dense m(rows, cols);
  for (Index i = 0; i < rows * cols; ++i) m.data()[i] = normal(engine);
  return m;
}
lm::MatrixView<const double> view(const Dense& m) { return m.view(); }
Dense identity(Index rows, Index cols) {
  Dense m(rows, cols);
  for (Index i = 0; i < std::min(rows, cols); ++i) m(i, i) = 1;
  return m;
}
void scale_column(Dense& m, Index j, double factor) {
  for (Index i = 0; i < m.rows(); ++i) m(i, j) *= factor;
}

void check(const Dense& B, const Dense& A, double scale) {
  const lm::LowRankSvd svd = lm::low_rank_svd(view(B), view(A), scale);
  const Index k = svd.sigma.size();
  REQUIRE(k == std::min({B.rows(), A.cols(), B.cols()}));
  double size = 0, gap = 0, squares = 0;
  for (Index o = 0; o < B.rows(); ++o) {
    for (Index c = 0; c < A.cols(); ++c) {
      double want = 0, got = 0;
      for (Index j = 0; j < B.cols(); ++j) want += scale * B(o, j) * A(j, c);
      for (Index i = 0; i < k; ++i) got += svd.left(o, i) * svd.sigma[i] * svd.right(c, i);
      size += want * want;
      gap += (got - want) * (got - want);
    }
  }
  size = std::sqrt(size);
  CHECK(std::sqrt(gap) <= 1e-13 * size);
  for (Index i = 0; i < k; ++i) {
    CHECK(svd.sigma[i] >= 0);
    if (i > 0) CHECK(svd.sigma[i] <= svd.sigma[i - 1]);
    squares += svd.sigma[i] * svd.sigma[i];
  }
  CHECK(std::abs(std::sqrt(squares) - size) <= 1e-13 * size);
  long wrong = 0;
  for (const auto* q : {&svd.left, &svd.right}) {  // orthonormal where σ is not 0
    for (Index i = 0; i < k; ++i) {
      for (Index j = 0; j <= i; ++j) {
        if (svd.sigma[i] <= 1e-10 * size) continue;
        double product = 0;
        for (Index r = 0; r < q->rows(); ++r) product += (*q)(r, i) * (*q)(r, j);
        wrong += !(std::abs(product - (i == j ? 1 : 0)) <= 1e-12);
      }
    }
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("singular values and vectors of B A") {
  const Index shapes[][3] = {{17, 13, 5}, {13, 17, 5}, {1, 9, 3}, {9, 1, 3},   {6, 7, 11},
                             {7, 6, 11},  {5, 5, 5},   {4, 3, 1}, {40, 60, 24}};
  for (const auto& s : shapes) {
    CAPTURE(s[0]);
    CAPTURE(s[1]);
    CAPTURE(s[2]);
    const auto site = static_cast<std::uint64_t>(s[0] * 100 + s[1]);
    check(draw(s[0], s[2], site), draw(s[2], s[1], site + 1), 1.7);
    check(draw(s[0], s[2], site), draw(s[2], s[1], site + 1), -0.3);
  }
}

TEST_CASE("a product whose singular values are known") {
  // Reflections from both sides of diag(7, 2, 0.5): B = H(u) diag, A = the first rows of H(v).
  const auto reflection = [](const Dense& v) {
    double squared = 0;
    for (Index i = 0; i < v.cols(); ++i) squared += v(0, i) * v(0, i);
    Dense h = identity(v.cols(), v.cols());
    for (Index i = 0; i < v.cols(); ++i) {
      for (Index j = 0; j < v.cols(); ++j) h(i, j) -= 2 * v(0, i) * v(0, j) / squared;
    }
    return h;
  };
  const Dense left = reflection(draw(1, 9, 1)), right = reflection(draw(1, 6, 2));
  const double want[3] = {7, 2, 0.5};
  Dense B(9, 3), A(3, 6);
  for (Index j = 0; j < 3; ++j) {
    for (Index i = 0; i < 9; ++i) B(i, j) = left(i, j) * want[2 - j];
    for (Index c = 0; c < 6; ++c) A(j, c) = right(j, c);
  }
  const lm::LowRankSvd svd = lm::low_rank_svd(view(B), view(A), -2);
  for (Index i = 0; i < 3; ++i) CHECK(std::abs(svd.sigma[i] - 2 * want[i]) <= 1e-14 * 14);
}

TEST_CASE("dependent columns, equal singular values, zeros and scales far apart") {
  Dense B = draw(17, 6, 3), A = draw(6, 13, 4);
  for (Index i = 0; i < 17; ++i) B(i, 3) = 2 * B(i, 1) - B(i, 0);
  for (Index c = 0; c < 13; ++c) A(5, c) = A(2, c);
  check(B, A, 1);
  scale_column(B, 2, 0);
  check(B, A, 1);
  check(identity(17, 6), identity(6, 13), 3);
  Dense far = draw(17, 6, 5);
  for (Index j = 0; j < 6; ++j) scale_column(far, j, std::pow(10.0, -2 * static_cast<double>(j)));
  check(far, A, 1);

  const lm::LowRankSvd zero = lm::low_rank_svd(view(Dense(4, 2)), view(draw(2, 13, 6)), 1);
  for (Index i = 0; i < 2; ++i) CHECK(zero.sigma[i] == 0);
  CHECK(lm::low_rank_svd(view(Dense(4, 0)), view(Dense(0, 3)), 1).sigma.size() == 0);
  loramix_test::check_error(lm::ErrorCode::shape, {"low_rank_svd", "B", "6", "5"},
                            [&] { lm::low_rank_svd(view(B), view(draw(5, 13, 7)), 1); });
}
