// Sums of products, against sums in double with the bound of their rounding; guards beside them; the same bits on any lanes.
#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include <loramix/core/thread_pool.hpp>

#include "cpu/on_host.hpp"

namespace loramix_test {

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

/// Whether the first `rows` of out are Σ terms (+ old) up to one rounding per addition, multiplication and store, and all else is
/// as it was.
template <class T, class Terms>
void check_sums(const Guarded<T>& out, const Guarded<T>& old, lm::Into into, Index n, Index rows, const Terms& terms) {
  const double unit = 0x1p-24, stored = std::is_same_v<T, float> ? 0x1p-24 : 0x1p-8;  // 24 and 8 bits of significand
  const Index columns = out.all.cols() - Guarded<T>::guard;
  Index wrong = 0;
  double most = 0;
  for (Index i = 0; i < out.all.rows(); ++i) {
    for (Index j = 0; i < rows && j < columns; ++j) {
      double sum = 0, size = 0;
      terms(i, j, [&](double v) { sum += v, size += std::abs(v); });
      if (into == lm::Into::add) sum += old.at(i, j), size += std::abs(old.at(i, j));
      const double rounding = static_cast<double>(n + 1) * unit * 1.01 * size;
      const double bound = rounding + stored * (std::abs(sum) + rounding);
      wrong += std::abs(out.at(i, j) - sum) <= bound ? 0 : 1;
      most = std::max(most, std::abs(sum));
    }
    for (Index j = i < rows ? columns : 0; j < out.all.cols(); ++j) wrong += out.at(i, j) == old.at(i, j) ? 0 : 1;
  }
  CHECK(wrong == 0);
  CHECK((most > 0 || rows * columns == 0 || (n == 0 && into == lm::Into::set)));
}

template <class T, class Terms>
void check_sums(const Guarded<T>& out, const Guarded<T>& old, lm::Into into, Index n, const Terms& terms) {
  check_sums(out, old, into, n, out.all.rows(), terms);
}

/// The body on 1, 2 and 3 lanes, each time from `old`: the same bits; returns the first.
template <class T, class Run>
Guarded<T> on_lanes(const Guarded<T>& old, const Run& run, const lm::cpu::Tuning& tuning = {}) {
  Guarded<T> first = old;
  run(lm::cpu::Backend<>{{}, tuning}, first.view());
  for (const Index lanes : {2, 3}) {
    lm::ThreadPool pool(lanes);
    Guarded<T> again = old;
    run(lm::cpu::Backend<lm::ThreadPool::PoolExecutor>{pool.executor(), tuning}, again.view());
    CHECK(same_bits(first.all, again.all));
  }
  return first;
}

}  // namespace loramix_test
