// A double that knows how far another computation of the same sums may be from it.
//
// Every input of a sum of products reaches the result multiplied by at most `depth` factors (1 + δ), |δ| ≤ u, whatever
// the order of summation, so |computed − exact| ≤ γ(depth) · Σ|terms| with γ(k) = k u / (1 − k u) (Higham, Accuracy and
// Stability, chapter 3). `absolute` is that sum of absolute terms. Nothing is tuned: the tolerance follows the formula.
#pragma once

#include <cmath>

namespace loramix_test {

struct Tracked {
  double value = 0;
  double absolute = 0;
  double depth = 0;

  Tracked() = default;
  explicit Tracked(double exact) : value(exact), absolute(std::abs(exact)) {}
  Tracked(double v, double a, double d) : value(v), absolute(a), depth(d) {}

  /// An input that the code under test rounds once (a constant computed in double).
  static Tracked rounded(double v) { return {v, std::abs(v), 1}; }

  friend Tracked operator+(Tracked a, Tracked b) {
    return {a.value + b.value, a.absolute + b.absolute, deeper(a, b) + 1};
  }
  friend Tracked operator-(Tracked a, Tracked b) {
    return {a.value - b.value, a.absolute + b.absolute, deeper(a, b) + 1};
  }
  friend Tracked operator*(Tracked a, Tracked b) {
    return {a.value * b.value, a.absolute * b.absolute, a.depth + b.depth + 1};
  }
  friend Tracked operator/(Tracked a, Tracked b) {
    return {a.value / b.value, a.absolute * b.absolute / (b.value * b.value), a.depth + b.depth + 1};
  }
  friend Tracked operator-(Tracked a) { return {-a.value, a.absolute, a.depth}; }
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

  /// exp(a + δ) = exp(a)(1 + δ): the error of the argument is relative, and exp itself errs by at most 4 units.
  friend Tracked exp(Tracked a) {
    const double e = std::exp(a.value);
    return {e, e * (1 + a.absolute), a.depth + 4};
  }

  /// √(a(1 + δ)) = √a (1 + δ)^½.
  friend Tracked sqrt(Tracked a) {
    const double root = std::sqrt(a.value);
    return {root, root == 0 ? 0 : a.absolute / root, a.depth + 1};
  }
  /// Its slope is 1 − tanh².
  friend Tracked tanh(Tracked a) {
    const double t = std::tanh(a.value);
    return {t, std::abs(t) + (1 - t * t) * a.absolute, a.depth + 4};
  }
  /// Its slope is 1/(1 + a).
  friend Tracked log1p(Tracked a) {
    const double l = std::log1p(a.value);
    return {l, std::abs(l) + a.absolute / (1 + a.value), a.depth + 4};
  }

  /// Bound on the error of a computation with unit round-off u.
  double bound(double u) const {
    const double k = depth * u;
    return k < 0.5 ? k / (1 - k) * absolute : INFINITY;
  }

 private:
  static double deeper(Tracked a, Tracked b) { return a.depth < b.depth ? b.depth : a.depth; }
};

}  // namespace loramix_test
