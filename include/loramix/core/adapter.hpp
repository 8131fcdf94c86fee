/// What an adapter is: a value with a Config and one contiguous parameter buffer, whose parameters `visit` names once,
/// in file order. Optimisers, gradient checks, files, counts, bench and demo are written against this.
///
///   Config                        aggregate; Config::fields(config, f) calls f(name, member) for every member
///   Config::of(Shape)             the configuration at a given shape and budget, for bench and demo
///   kind                          its name in files and tables
///   rebind<U, V>                  the same adapter with elements U in space V: gradients, packs, device copies
///   config(), parameters()        parameters(): the flat buffer
///   visit(self, f)                f(name, matrix view, ParameterGroup) for every parameter
///   start(fill)                   how parameters begin (adapter/initialise.hpp)
///   cost(tokens)                  flop, bytes, parameters
///   tensors(role)                 optional: how many experts share the rows of its A's, or the columns of its B's, each of
///                                 which a file holds apart; 0: they are one
///
/// A ProductAdapter is one gated product: A(), B(), scale(), dropout(), gate().
///
/// Example: adapter/lora.hpp; docs/how-to/add-an-adapter.md
#pragma once
#include <concepts>

#include <loramix/core/draws.hpp>
#include <loramix/core/matrix.hpp>
#include <loramix/core/precision.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The name by which an optimiser addresses parameters of one role, and whether they decay.
struct ParameterGroup {
  const char* name;
  bool decay = true;

  /// By the letters: equal literals need not lie at one address.
  constexpr bool is(const ParameterGroup& other) const {
    const char *a = name, *b = other.name;
    for (; *a != '\0' && *a == *b; ++a) ++b;
    return *a == *b;
  }
};

namespace group {
inline constexpr ParameterGroup A{"A"}, B{"B"}, router{"router"}, bias{"bias", false}, embedding{"embedding", false},
    scale{"scale", false}, interaction{"interaction", false};
}  // namespace group

/// The shape at which adapters are compared.
struct Shape {
  Index d_in = 0;
  Index d_out = 0;
  Index total_rank = 0;
  Index experts = 1;
};

/// What a call costs: operations, bytes of operands moved once, trainable values.
struct Cost {
  double forward_flop = 0;
  double backward_flop = 0;
  double forward_bytes = 0;   // every operand moved once
  double backward_bytes = 0;  // likewise
  Index parameters = 0;
};

/// Cost of a gated product with R_a rows of A, R ranks, n side rows; the gate gives a token `open` of the ranks, and of the rows
/// of A, unless those are shared.
template <class P>
constexpr Cost product_cost(Index tokens, Index d_in, Index d_out, Index shared_ranks, Index ranks, Index side,
                            Index open) {
  const double T = static_cast<double>(tokens), in = static_cast<double>(d_in), out = static_cast<double>(d_out);
  const double down = static_cast<double>(shared_ranks + side) * in, up = static_cast<double>(ranks) * out;
  const double flop = 2 * T *
                      (static_cast<double>((shared_ranks == ranks ? open : shared_ranks) + side) * in +
                       static_cast<double>(open) * out);
  constexpr double x = sizeof(typename P::activation), w = sizeof(typename P::weight), g = sizeof(typename P::gradient);
  return {.forward_flop = flop,
          .backward_flop = 2 * flop,
          .forward_bytes = x * T * (in + 2 * out) + w * (down + up),
          .backward_bytes = x * T * (3 * in + out) + (w + 2 * g) * (down + up),
          .parameters = (shared_ranks + side) * d_in + ranks * d_out};
}
/// The same with all ranks open.
template <class P>
constexpr Cost product_cost(Index tokens, Index d_in, Index d_out, Index shared_ranks, Index ranks, Index side) {
  return product_cost<P>(tokens, d_in, d_out, shared_ranks, ranks, side, ranks);
}

/// N parameters in one flat buffer, each beginning on a 64-byte boundary for every element type; the gaps are zero.
template <class T, Space S, int N>
class Parameters {
 public:
  explicit Parameters(const Index (&sizes)[N]) {
    for (int i = 0; i < N; ++i) {
      check::at_least("Parameters", "size", sizes[i], 0);
      Index padded;
      if (__builtin_add_overflow(sizes[i], Index{31}, &padded) ||
          __builtin_add_overflow(offset_[i], padded / 32 * 32, &offset_[i + 1])) {
        fail(check::detail::about(ErrorCode::overflow, "Parameters", "size") << " of " << sizes[i] << " overflows");
      }
    }
    buffer_ = Buffer<T, S>(offset_[N]);
  }

  template <Major M = Major::row>
  MatrixView<T, S, M> matrix(int i, Index rows, Index cols) {
    return {buffer_.data() + offset_[i], rows, cols};
  }
  template <Major M = Major::row>
  MatrixView<const T, S, M> matrix(int i, Index rows, Index cols) const {
    return {buffer_.data() + offset_[i], rows, cols};
  }
  /// A B matrix [d_out, R] in the fast order: R rows of d_out.
  MatrixView<T, S, Major::column> rank_major(int i, Index d_out, Index ranks) {
    return matrix<Major::column>(i, d_out, ranks);
  }
  MatrixView<const T, S, Major::column> rank_major(int i, Index d_out, Index ranks) const {
    return matrix<Major::column>(i, d_out, ranks);
  }
  VectorView<T, S> flat() { return buffer_.view(); }
  VectorView<const T, S> flat() const { return buffer_.view(); }

 private:
  Buffer<T, S> buffer_;
  Index offset_[N + 1] = {};
};

namespace detail {
struct AnyVisitor {
  template <class View>
  void operator()(const char*, View, ParameterGroup) const {}
};
struct AnyField {
  template <class Field>
  void operator()(const char*, Field&) const {}
};
}  // namespace detail

/// A value type with the members above.
template <class A>
concept Adapter = std::copy_constructible<A> && requires(A& adapter, const A& constant, typename A::Config& config) {
  typename A::precision;
  typename A::element;
  { A::space } -> std::convertible_to<Space>;
  { A::kind } -> std::convertible_to<const char*>;
  { constant.config() } -> std::convertible_to<const typename A::Config&>;
  { A::Config::of(Shape{}) } -> std::convertible_to<typename A::Config>;
  A::Config::fields(config, detail::AnyField{});
  adapter.parameters().data;
  constant.parameters().data;
  A::visit(adapter, detail::AnyVisitor{});
  A::visit(constant, detail::AnyVisitor{});
  { constant.cost(Index{1}) } -> std::convertible_to<Cost>;
};

/// One gated product.
template <class A>
concept ProductAdapter = Adapter<A> && requires(const A& adapter) {
  adapter.A().rows;
  adapter.B().rows;
  adapter.gate();
  { adapter.scale() } -> std::convertible_to<double>;
  { adapter.dropout() } -> std::convertible_to<double>;
};

/// The adapter that holds an adapter's gradients: same names, same shapes.
template <Adapter A>
using gradient_t = typename A::template rebind<typename A::precision::gradient, A::space>;

/// A gradient of zeros.
template <Adapter A>
gradient_t<A> zeros_like(const A& adapter) {
  return gradient_t<A>(adapter.config());
}

/// Trainable values, without the gaps between parameters.
template <Adapter A>
Index parameter_count(const A& adapter) {
  Index count = 0;
  A::visit(adapter, [&count](const char*, auto view, ParameterGroup) { count += view.rows * view.cols; });
  return count;
}

namespace detail {

/// Names and shapes of parameters, in one number.
template <class A>
std::uint64_t layout_of(const A& adapter) {
  std::uint64_t hash = site("");
  A::visit(adapter, [&hash](const char* name, auto view, ParameterGroup) {
    hash = site(name, hash);
    hash = fold(hash, static_cast<std::uint64_t>(view.rows));
    hash = fold(hash, static_cast<std::uint64_t>(view.cols));
  });
  return hash;
}
/// Refuses the gradient of an adapter of other shapes: its buffer may be as large.
template <class A, class Gradient>
void check_gradient_of(const char* op, const A& adapter, const Gradient& grad) {
  check::same(op, "grad", "size", grad.parameters().size, "the adapter's", adapter.parameters().size);
  if (layout_of(grad) == layout_of(adapter)) return;
  fail(check::detail::about(ErrorCode::shape, op, "grad") << " has parameters of other shapes than the adapter");
}

}  // namespace detail

}  // namespace LORAMIX_ABI
}  // namespace loramix
