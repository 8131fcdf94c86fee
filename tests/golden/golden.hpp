// Tensors from tests/golden/data, by name, and adapters held against them.
#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <loramix/core/adapter.hpp>

namespace loramix_test {

namespace lm = loramix;
using lm::Index;

namespace golden {

struct Tensor {
  Index rows = 0, cols = 0;
  std::vector<double> values;

  double operator()(Index i, Index j) const { return values[static_cast<std::size_t>(i * cols + j)]; }
  lm::MatrixView<const double> view() const { return {values.data(), rows, cols}; }
  template <class T>
  std::vector<T> as() const {
    return std::vector<T>(values.begin(), values.end());
  }
};

/// One file of data.
class Table {
 public:
  explicit Table(const char* text) {
    std::istringstream in(text);
    std::string name;
    Tensor tensor;
    while (in >> name >> tensor.rows >> tensor.cols) {
      tensor.values.clear();
      std::string number;
      for (Index i = 0; i < tensor.rows * tensor.cols && in >> number; ++i) {
        tensor.values.push_back(std::strtod(number.c_str(), nullptr));
      }
      REQUIRE(static_cast<Index>(tensor.values.size()) == tensor.rows * tensor.cols);
      tensors_[name] = tensor;
    }
  }
  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  const Tensor& operator[](const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) FAIL("no golden tensor " << name);
    return found->second;
  }
  /// The variant's own, or the one that all variants share.
  const Tensor& input(const std::string& variant, const std::string& name) const {
    return (*this)[has(variant + "." + name) ? variant + "." + name : name];
  }

 private:
  std::map<std::string, Tensor> tensors_;
};

/// What every call here is given: the key of table.py.
inline constexpr lm::Key key{.seed = 42, .site = lm::site("golden"), .step = 3, .first_token = (1ull << 32) + 7};

/// Every element to 1e-10 of the largest.
template <class View>
void check(const char* what, View got, const Tensor& want) {
  CAPTURE(what);
  REQUIRE(got.rows == want.rows);
  REQUIRE(got.cols == want.cols);
  double largest = 0, error = 0;
  for (Index i = 0; i < want.rows; ++i) {
    for (Index j = 0; j < want.cols; ++j) {
      largest = std::max(largest, std::abs(want(i, j)));
      const double off = std::abs(got(i, j) - want(i, j));
      error = off <= error ? error : off;  // NaN stays
    }
  }
  CHECK(error <= 1e-10 * largest);
}
inline void check(const char* what, double got, const Tensor& want) {
  check(what, lm::MatrixView<const double>{&got, 1, 1}, want);
}

inline void put(lm::MatrixView<double> view, const Tensor& from) {
  REQUIRE(view.rows == from.rows);
  REQUIRE(view.cols == from.cols);
  for (Index i = 0; i < view.rows; ++i) std::copy_n(&from.values[std::size_t(i * view.cols)], view.cols, &view(i, 0));
}

}  // namespace golden
}  // namespace loramix_test
