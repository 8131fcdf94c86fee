/// The five types of a computation, and the shorthand by which one scalar stands for all of them.
///
///   activation    x, y, dX, dY
///   weight        parameters as stored
///   accumulation  U = X̂ Aᵀ, sums, everything between two stores
///   gradient      gradients of parameters (float for 16-bit weights)
///   score         router logits, softmax, gate values
///
/// Example: lm::Lora<float>, lm::Lora<lm::bfloat16>, lm::Lora<lm::Precision<lm::bfloat16, float>> (float adapter on a
/// bfloat16 base).
#pragma once
#include <type_traits>

#include <loramix/core/scalars.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The type in which values of T are summed: float for 16-bit types, otherwise T itself.
template <class T>
using accumulation_t = std::conditional_t<is_16bit<T>, float, T>;

template <class Activation, class Weight = Activation,
          class Accumulation = std::common_type_t<accumulation_t<Activation>, accumulation_t<Weight>>,
          class Gradient = accumulation_t<Weight>, class Score = Accumulation>
struct Precision {
  using activation = Activation;
  using weight = Weight;
  using accumulation = Accumulation;
  using gradient = Gradient;
  using score = Score;
};

namespace detail {
template <class T>
struct precision_of {
  using type = Precision<T>;
};
template <class X, class W, class A, class G, class S>
struct precision_of<Precision<X, W, A, G, S>> {
  using type = Precision<X, W, A, G, S>;
};
}  // namespace detail

/// Precision<T> for a scalar T; a Precision stays itself.
template <class T>
using precision_t = typename detail::precision_of<T>::type;

}  // namespace LORAMIX_ABI
}  // namespace loramix
