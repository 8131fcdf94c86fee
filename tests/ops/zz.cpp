// The SVD of a product of thin matrices against Eigen's of the product itself.
#include <loramix/ops/svd.hpp>

#include <doctest/doctest.h>

#include <Eigen/SVD>
#include <random>

#include "core/caught.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using lm::Index;

namespace {

using Dense = Eigen::MatrixXd;

Dense draw(Index rows, Index cols, std::uint64_t site) {
  std::mt19937_64 engine(loramix_test::seed(site));
  std::normal_distribution<double> normal;
  Dense m(rows, cols);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) m(i, j) = normal(engine);
  }
  return m;
}
lm::MatrixView<const double, lm::Space::host, lm::Major::column> view(const Dense& m) {
  return {m.data(), m.rows(), m.cols()};
}
template <class M>
Dense dense(const M& m) {
  Dense out(m.rows(), m.cols());
  for (Index i = 0; i < m.rows(); ++i) {
    for (Index j = 0; j < m.cols(); ++j) out(i, j) = m(i, j);
  }
  return out;
}

void check(const Dense& B, const Dense& A, double scale) {
  const Dense product = scale * B * A;
  const lm::LowRankSvd svd = lm::low_rank_svd(view(B), view(A), scale);
  const Index k = svd.sigma.size();
  REQUIRE(k == std::min({B.rows(), A.cols(), B.cols()}));
  const double size = product.norm(), bound = 1e-13 * size;
  Eigen::VectorXd sigma(k);
  for (Index i = 0; i < k; ++i) {
    sigma[i] = svd.sigma[i];
    if (i > 0) CHECK(sigma[i] <= sigma[i - 1]);
  }
  CHECK((dense(svd.left) * sigma.asDiagonal() * dense(svd.right).transpose() - product).norm() <= bound);
  const Eigen::VectorXd want = product.jacobiSvd().singularValues();
  for (Index i = 0; i < k; ++i) CHECK(std::abs(sigma[i] - want[i]) <= bound);
  for (const Dense& q : {dense(svd.left), dense(svd.right)}) {  // orthonormal where σ is not 0
    for (Index i = 0; i < k; ++i) {
      for (Index j = 0; j <= i; ++j) {
        if (sigma[i] <= 1e-10 * size || sigma[j] <= 1e-10 * size) continue;
        CHECK(std::abs(q.col(i).dot(q.col(j)) - (i == j ? 1 : 0)) <= 1e-12);
      }
    }
  }
}

}  // namespace

TEST_CASE("singular values and vectors of B A are the dense product's") {
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

TEST_CASE("dependent columns, equal singular values, zeros and scales far apart") {
  Dense B = draw(17, 6, 3), A = draw(6, 13, 4);
  B.col(3) = 2 * B.col(1) - B.col(0);
  A.row(5) = A.row(2);
  check(B, A, 1);
  B.col(2).setZero();
  check(B, A, 1);
  check(Dense::Identity(17, 6), 3 * Dense::Identity(6, 13), 1);
  Dense far = draw(17, 6, 5);
  for (Index j = 0; j < 6; ++j) far.col(j) *= std::pow(10.0, -2 * static_cast<double>(j));
  check(far, A, 1);

  const lm::LowRankSvd zero = lm::low_rank_svd(view(Dense::Zero(4, 2)), view(A.topRows(2)), 1);
  for (Index i = 0; i < 2; ++i) CHECK(zero.sigma[i] == 0);
  CHECK(lm::low_rank_svd(view(Dense(4, 0)), view(Dense(0, 3)), 1).sigma.size() == 0);
  loramix_test::check_error(lm::ErrorCode::shape, {"low_rank_svd", "B", "6", "5"},
                            [&] { lm::low_rank_svd(view(B), view(A.topRows(5)), 1); });
}
