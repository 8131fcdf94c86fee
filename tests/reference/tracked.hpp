// A double that knows how far another computation of the same sums may be from it.
//
// Every input of a sum of products reaches the result multiplied by at most `depth` factors (1 + δ), |δ| ≤ u, whatever
// the order of summation, so |computed − exact| ≤ γ(depth) · Σ|terms| with γ(k) = k u / (1 − k u) (Higham, Accuracy and
// Stability, chapter 3). `absolute` is that sum of absolute terms. What a function that is not linear makes of the error of
// its argument no longer grows with the terms, only with the values that it meets: it goes into `carried`, in units of u, to
// first order, by the function's slope. Nothing is tuned: the tolerance follows the formula.
#pragma once

#include <cmath>

namespace loramix_test {

struct Tracked {
  double value = 0;
  double absolute = 0;
  double depth = 0;
  double carried = 0;

  Tracked() = default;
  explicit Tracked(double exact) : value(exact), absolute(std::abs(exact)) {}
  Tracked(double v, double a, double d, double c = 0) : value(v), absolute(a), depth(d), carried(c) {}

  /// An input that the code under test rounds once (a constant computed in double).
  static Tracked rounded(double v) { return {v, std::abs(v), 1}; }

  friend Tracked operator+(Tracked a, Tracked b) {
    return {a.value + b.value, a.absolute + b.absolute, deeper(a, b) + 1, a.carried + b.carried};
  }
  friend Tracked operator-(Tracked a, Tracked b) { return a + -b; }
  friend Tracked operator*(Tracked a, Tracked b) {
    return {a.value * b.value, a.absolute * b.absolute, a.depth + b.depth + 1,
            a.carried * std::abs(b.value) + b.carried * std::abs(a.value)};
  }
  friend Tracked operator/(Tracked a, Tracked b) {
    const double q = a.value / b.value, by = std::abs(b.value);
    return {q, a.absolute / by, a.depth + 1, (a.carried + std::abs(q) * b.error()) / by};
  }
  friend Tracked operator-(Tracked a) { return {-a.value, a.absolute, a.depth, a.carried}; }
  Tracked& operator+=(Tracked b) { return *this = *this + b; }
  Tracked& operator*=(Tracked b) { return *this = *this * b; }
  explicit operator double() const { return value; }
  explicit operator float() const { return static_cast<float>(value); }

  friend bool operator<(Tracked a, Tracked b) { return a.value < b.value; }
  friend bool operator>(Tracked a, Tracked b) { return a.value > b.value; }
  friend bool operator<=(Tracked a, Tracked b) { return a.value <= b.value; }
  friend bool operator>=(Tracked a, Tracked b) { return a.value >= b.value; }
  friend bool operator==(Tracked a, Tracked b) { return a.value == b.value; }
  friend bool operator!=(Tracked a, Tracked b) { return a.value != b.value; }

  // Functions themselves err by at most 4 units, a root by one.
  friend Tracked exp(Tracked a) {
    const double e = std::exp(a.value);
    return {e, e, 4, e * a.error()};
  }
  friend Tracked sqrt(Tracked a) {
    const double root = std::sqrt(a.value);
    return {root, root, 1, root == 0 ? 0 : a.error() / (2 * root)};
  }
  friend Tracked tanh(Tracked a) {
    const double t = std::tanh(a.value);
    return {t, std::abs(t), 4, (1 - t * t) * a.error()};
  }
  friend Tracked log1p(Tracked a) {
    const double l = std::log1p(a.value);
    return {l, std::abs(l), 4, a.error() / (1 + a.value)};
  }

  /// Bound on the error of a computation with unit round-off u.
  double bound(double u) const {
    const double k = depth * u;
    return k < 0.5 ? k / (1 - k) * absolute + carried * u : INFINITY;
  }

 private:
  /// In units of u, to first order.
  double error() const { return depth * absolute + carried; }
  static double deeper(Tracked a, Tracked b) { return a.depth < b.depth ? b.depth : a.depth; }
};

}  // namespace loramix_test
