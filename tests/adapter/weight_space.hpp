// What the tests of the weight-space adapters share: grids of the literal reference, and gradients of the library against
// finite differences of the reference.
#pragma once
#include <atomic>

#include <loramix/train/gradient_check.hpp>

#include "adapter/kinds.hpp"
#include "reference/weight_space.hpp"

namespace loramix_test {

// The counter of support/allocations.hpp, which memory.cpp includes for the whole program and proves to count.
inline std::atomic<Index> allocation_count{0};
inline Index allocations() { return allocation_count.load(); }

template <class View>
reference::Values grid(View v) {
  reference::Values out(v.rows, v.cols);
  for (Index i = 0; i < v.rows; ++i) {
    for (Index j = 0; j < v.cols; ++j) out(i, j) = lm::widen<double>(v(i, j));
  }
  return out;
}
template <class T>
reference::Values grid(const lm::Matrix<T>& m) {
  return grid(m.view());
}

/// X̂ of a Batch, under its key.
template <class A>
reference::Values x_hat(const Batch<A>& b, double p) {
  return reference::dropped(grid(b.x), b.key.seed, b.key.site, b.key.step, b.key.first_token, p);
}

/// |got − want| ≤ bound everywhere, and want is not all 0.
template <class T>
void check_close(const lm::Matrix<T>& got, const reference::Values& want, double bound) {
  double largest = 0;
  for (Index i = 0; i < want.size(); ++i) {
    REQUIRE(std::abs(lm::widen<double>(got.data()[i]) - want[i]) <= bound);
    largest = std::max(largest, std::abs(want[i]));
  }
  CHECK(largest > 0);
}

/// dx and every parameter's gradient against differences of `loss`, a literal sum; `x` is what dx belongs to.
template <class A, class Loss>
void check_gradients(A& adapter, lm::gradient_t<A>& grad, lm::Matrix<double>& x, lm::Matrix<double>& dx, Loss&& loss) {
  std::vector<lm::GradientClaim> claims{{"x", {x.data(), x.rows() * x.cols()}, {dx.data(), dx.rows() * dx.cols()}}};
  A::visit(adapter, [&](const char* name, auto view, lm::ParameterGroup) {
    claims.push_back({name, {view.data, view.rows * view.cols}, {}});
  });
  std::size_t next = 1;
  lm::gradient_t<A>::visit(grad, [&](const char*, auto view, lm::ParameterGroup) {
    claims[next++].gradient = {view.data, view.rows * view.cols};
  });
  const lm::GradientReport report = lm::gradient_check(claims, loss);
  CHECK_MESSAGE(report.ok(), report.text());
  for (const lm::CheckedTensor& tensor : report.tensors) CHECK_MESSAGE(tensor.norm > 0, tensor.name);
}

/// W x of merged weights is W x + ΔY: rows of `weights` in double, against X.
inline reference::Values base_output(const reference::Values& x, const reference::Values& weights) {
  return reference::times_transposed(x, weights);
}

}  // namespace loramix_test
