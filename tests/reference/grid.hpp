// A row-major table of numbers: what the reference computes with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace loramix_test {

using Index = std::int64_t;

template <class T>
class Grid {
 public:
  Grid() = default;
  Grid(Index rows, Index cols, T value = T{})
      : rows_(rows), cols_(cols), values_(static_cast<std::size_t>(rows * cols), value) {}

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  Index size() const { return rows_ * cols_; }
  bool empty() const { return size() == 0; }
  T& operator()(Index i, Index j) { return values_[static_cast<std::size_t>(i * cols_ + j)]; }
  const T& operator()(Index i, Index j) const { return values_[static_cast<std::size_t>(i * cols_ + j)]; }
  T& operator[](Index i) { return values_[static_cast<std::size_t>(i)]; }
  const T& operator[](Index i) const { return values_[static_cast<std::size_t>(i)]; }

  template <class F>
  auto map(const F& f) const {
    Grid<decltype(f(std::declval<T>()))> out(rows_, cols_);
    for (Index i = 0; i < size(); ++i) out[i] = f((*this)[i]);
    return out;
  }
  template <class U>
  Grid<U> as() const {
    return map([](const T& v) { return U(v); });
  }

 private:
  Index rows_ = 0, cols_ = 0;
  std::vector<T> values_;
};

}  // namespace loramix_test
