// Scalars of a user that the composed path has never heard of.
#pragma once

#include <cmath>
#include <thread>

#include <loramix/cpu/cpu.hpp>

#include "cpu/executors.hpp"
#include "reference/dual.hpp"

namespace loramix_test {

/// A double whose arithmetic waits for the other jobs of its wave (executors.hpp): when a job has multiplied once, all
/// jobs of the wave are in the middle of theirs.
struct Meeting {
  double value;

  Meeting() = default;
  constexpr Meeting(double v) : value(v) {}

  friend Meeting operator*(Meeting a, Meeting b) {
    Rendezvous::call();
    thread_local int turns = 0;
    if (++turns % 256 == 0) std::this_thread::yield();
    return a.value * b.value;
  }
  friend Meeting operator+(Meeting a, Meeting b) {
    Rendezvous::call();
    return a.value + b.value;
  }
  friend Meeting operator-(Meeting a, Meeting b) { return a.value - b.value; }
  friend Meeting operator/(Meeting a, Meeting b) { return a.value / b.value; }
  Meeting& operator+=(Meeting b) { return *this = *this + b; }
  Meeting& operator*=(Meeting b) { return *this = *this * b; }
  friend Meeting exp(Meeting a) { return std::exp(a.value); }
  friend bool operator==(Meeting a, Meeting b) { return a.value == b.value; }
  friend bool operator<=(Meeting a, Meeting b) { return a.value <= b.value; }
};

}  // namespace loramix_test

namespace Eigen {

template <>
struct NumTraits<loramix_test::Dual<double>> : NumTraits<double> {
  using Real = loramix_test::Dual<double>;
  using NonInteger = Real;
  using Nested = Real;
  enum {
    IsComplex = 0,
    IsInteger = 0,
    IsSigned = 1,
    RequireInitialization = 0,
    ReadCost = 2,
    AddCost = 2,
    MulCost = 4
  };
};

template <>
struct NumTraits<loramix_test::Meeting> : NumTraits<double> {
  using Real = loramix_test::Meeting;
  using NonInteger = Real;
  using Nested = Real;
};

}  // namespace Eigen
