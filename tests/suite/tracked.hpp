// Tracked as a scalar of the CPU backend: an adapter on it says of every result how far float may be from it.
#pragma once
#include "reference/tracked.hpp"

#include <Eigen/Core>

namespace Eigen {

template <>
struct NumTraits<loramix_test::Tracked> : NumTraits<double> {
  using Real = loramix_test::Tracked;
  using NonInteger = Real;
  using Nested = Real;
  enum {
    IsComplex = 0,
    IsInteger = 0,
    IsSigned = 1,
    RequireInitialization = 0,
    ReadCost = 3,
    AddCost = 3,
    MulCost = 3
  };
};

}  // namespace Eigen
