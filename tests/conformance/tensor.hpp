// Matrices of the conformance suite: uploaded with sentinels between their rows, read back, compared.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <loramix/core/scalars.hpp>
#include <loramix/core/views.hpp>

#include "conformance/harness.hpp"
#include "reference/grid.hpp"
#include "reference/tracked.hpp"

namespace loramix_test {

template <class T>
double to_double(T v) {
  if constexpr (lm::is_16bit<T>)
    return static_cast<double>(lm::widen<float>(v));
  else
    return static_cast<double>(v);
}

/// NaN where T has one: whoever reads it spreads it.
template <class T>
T sentinel() {
  if constexpr (lm::is_16bit<T>)
    return lm::narrow<T>(std::numeric_limits<float>::quiet_NaN());
  else if constexpr (std::numeric_limits<T>::has_quiet_NaN)
    return std::numeric_limits<T>::quiet_NaN();
  else
    return static_cast<T>(0x5a);
}

/// Half of the distance between 1 and the next number: the largest relative error of one rounding.
template <class T>
constexpr double round_off() {
  if constexpr (std::is_same_v<T, lm::bfloat16>)
    return 0x1p-8;
  else if constexpr (std::is_same_v<T, lm::half>)
    return 0x1p-11;
  else
    return static_cast<double>(std::numeric_limits<T>::epsilon()) / 2;
}

/// What rounding can lose below the smallest normal number.
template <class T>
constexpr double underflow() {
  return std::is_same_v<T, lm::half> ? 0x1p-25 : 1e-37;
}

template <class H, class T, lm::Major M = lm::Major::row>
class Tensor {
 public:
  using View = lm::MatrixView<T, H::space, M>;

  Tensor() = default;
  /// `values`, rounded to T.
  Tensor(H& harness, const Grid<double>& values, Index padding)
      : Tensor(harness, values.rows(), values.cols(), padding,
               [&](Index i, Index j) { return lm::narrow<T>(values(i, j)); }) {}
  /// Integers.
  template <class I>
    requires std::is_same_v<I, T> && std::numeric_limits<T>::is_integer Tensor(H& harness, const Grid<I>& values,
                                                                               Index padding)
        : Tensor(harness, values.rows(), values.cols(), padding, [&](Index i, Index j) { return values(i, j); }) {}
    /// An output that nobody may read before it is written.
    static Tensor poisoned(H& harness, Index rows, Index cols, Index padding) {
      return Tensor(harness, rows, cols, padding, [](Index, Index) { return sentinel<T>(); });
    }

    View view() const { return {device_, rows_, cols_, stride_}; }
    lm::VectorView<T, H::space> column() const { return {device_, rows_}; }
    lm::VectorView<T, H::space> flat() const { return {device_, rows_ * cols_}; }

    /// What was uploaded, as T holds it.
    Grid<double> values() const { return unpack(host_); }

    /// What is there now. `problem` says so if anything between the rows was written.
    Grid<double> read(H& harness, std::string& problem) const {
      std::vector<T> now(host_.size());
      harness.download(device_, now);
      const Index inner = M == lm::Major::row ? cols_ : rows_;
      for (std::size_t i = 0; i < now.size(); ++i) {
        const bool padding = stride_ != 0 && static_cast<Index>(i) % stride_ >= inner;
        if (padding && std::memcmp(&now[i], &host_[i], sizeof(T)) != 0) problem = "padding was written";
      }
      return unpack(now);
    }
    std::vector<T> bits(H& harness) const {
      std::vector<T> now(host_.size());
      harness.download(device_, now);
      return now;
    }

   private:
    template <class F>
    Tensor(H& harness, Index rows, Index cols, Index padding, const F& at)
        : rows_(rows), cols_(cols), stride_((M == lm::Major::row ? cols : rows) + padding) {
      const Index outer = M == lm::Major::row ? rows : cols;
      host_.assign(static_cast<std::size_t>(outer * stride_), sentinel<T>());
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j) host_[offset(i, j)] = at(i, j);
      }
      device_ = harness.upload(host_);
    }
    std::size_t offset(Index i, Index j) const {
      return static_cast<std::size_t>(M == lm::Major::row ? i * stride_ + j : j * stride_ + i);
    }
    Grid<double> unpack(const std::vector<T>& from) const {
      Grid<double> out(rows_, cols_);
      for (Index i = 0; i < rows_; ++i) {
        for (Index j = 0; j < cols_; ++j) out(i, j) = to_double(from[offset(i, j)]);
      }
      return out;
    }

    Index rows_ = 0, cols_ = 0, stride_ = 0;
    std::vector<T> host_;
    T* device_ = nullptr;
};

/// "" where `got` is `want` (added to `old`, or assigned) up to the rounding that Acc and Store allow; else what is wrong.
/// `zero` says whether all of it may be zero.
template <class Store, class Acc>
std::string compare(const Grid<double>& got, const Grid<Tracked>& want, const Grid<double>* old, bool zero) {
  if (got.rows() != want.rows() || got.cols() != want.cols()) return "shape";
  double largest = 0, least = INFINITY;  // of what is expected; of the tolerances
  for (Index i = 0; i < want.size(); ++i) {
    const Tracked w = old != nullptr ? Tracked((*old)[i]) + want[i] : want[i];
    largest = std::fmax(largest, std::abs(want[i].value));
    const double computed = w.bound(round_off<Acc>()) + w.bound(0x1p-53);
    const double stored = std::is_same_v<Store, Acc> ? 0 : round_off<Store>() * (std::abs(w.value) + computed);
    const double tolerance = computed + stored + underflow<Store>();
    least = std::fmin(least, tolerance);
    if (!(std::abs(got[i] - w.value) <= tolerance)) {
      char text[160];
      std::snprintf(text, sizeof text, "at (%lld, %lld) %.9g instead of %.9g, tolerance %.2g",
                    static_cast<long long>(i / want.cols()), static_cast<long long>(i % want.cols()), got[i], w.value,
                    tolerance);
      return text;
    }
  }
  if (zero || want.size() == 0) return "";
  if (largest == 0) return "the expected values are all zero: the case shows nothing";
  if (want.size() < 32) return "";  // one value, or a few, may cancel
  return least < largest ? "" : "every tolerance is larger than every expected value: the case shows nothing";
}

}  // namespace loramix_test
