/// Into rank space: the first stage of the gated product, and its backward.
///
/// Computes:    U = X̂ Aᵀ,  H = X sideᵀ,  X̂ = X ∘ keep / (1 − p̄)                                          (forward)
///              dA (+)= dUᵀ X̂,  dside (+)= dHᵀ X,  dX (+)= (dU A) ∘ keep / (1 − p̄) + dH side             (backward)
/// Source:      MATH.md section 1; LoRA, Hu et al. 2021, equation 3. Side rows: a router's, which sees X, never X̂.
/// Reads:       A [R_a, d_in], side [n, d_in] (may be empty), x [T, d_in]; backward also dU [T, R_a], dH [T, n].
/// Writes:      U [T, R_a] and H [T, n], assigned. Where `select` is given, a rank that it closes may be left 0, or as it is:
///              nothing reads it, and a backend need not compute it.
/// Adds to:     dA [R_a, d_in], dside [n, d_in], dX [T, d_in], or assigns with Into::set. An empty view is not wanted.
/// Errors:      shape, stride, null, alias, overflow; small workspace.
/// Cost:        2·T·(R_a + n)·d_in flop forward, twice to three times that backward; one pass over x and one over dX.
/// Determinism: a row of U, H, dX depends on its own row only; dA, dside sum tokens in a fixed order.
/// Example:     examples/engine (tensor parallel: shrink, all-reduce, expand)
#pragma once
#include <loramix/core/draws.hpp>
#include <loramix/gate/form.hpp>
#include <loramix/ops/execute.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Forward.
template <class X, class W, class Acc, class Score, Space S>
struct Shrink {
  static constexpr const char* name = "shrink";
  static constexpr Space space = S;
  MatrixView<const W, S> A;     // [R_a, d_in]
  MatrixView<const W, S> side;  // [n, d_in]
  MatrixView<const X, S> x;     // [T, d_in]
  Dropout dropout;
  MatrixView<Acc, S> u;         // [T, R_a]
  MatrixView<Score, S> h;       // [T, n]
  GateForm<Score, S> select{};  // what will be read of U; no tokens: everything
  bool passing = false;         // only a row body in the op's own launch reads U: it need not be written

  void check() const {
    check::view(name, "A", A);
    check::view(name, "x", x);
    check::same(name, "x", "columns", x.cols, "d_in of A", A.cols);
    if (side.rows != 0) check::shape(name, "side", side, "its rows", side.rows, "d_in of A", A.cols);
    check::shape(name, "u", u, "the number of tokens", x.rows, "the rows of A", A.rows);
    if (side.rows != 0) check::shape(name, "h", h, "the number of tokens", x.rows, "the rows of side", side.rows);
    check::disjoint(name, "u", u, "x", x);
    check::disjoint(name, "u", u, "A", A);
    check::disjoint(name, "u", u, "side", side);
    check::disjoint(name, "h", h, "x", x);
    check::disjoint(name, "h", h, "A", A);
    check::disjoint(name, "h", h, "side", side);
    check::disjoint(name, "h", h, "u", u);
    if (select.tokens != 0) check_form(name, select, x.rows, A.rows);
  }
};

/// Backward.
template <class X, class W, class Acc, class Score, class G, Space S>
struct ShrinkBackward {
  static constexpr const char* name = "shrink_backward";
  static constexpr Space space = S;
  MatrixView<const W, S> A;     // [R_a, d_in]
  MatrixView<const W, S> side;  // [n, d_in]
  MatrixView<const X, S> x;     // [T, d_in]
  Dropout dropout;
  MatrixView<const Acc, S> du;    // [T, R_a]
  MatrixView<const Score, S> dh;  // [T, n]
  MatrixView<G, S> dA{};          // [R_a, d_in] or empty
  MatrixView<G, S> dside{};       // [n, d_in] or empty
  MatrixView<X, S> dx{};          // [T, d_in] or empty
  Into parameters = Into::add;
  Into input = Into::add;
  GateForm<Score, S> select{};  // where dU may differ from 0; no tokens: everywhere

  void check() const {
    check::view(name, "A", A);
    check::view(name, "x", x);
    check::same(name, "x", "columns", x.cols, "d_in of A", A.cols);
    check::shape(name, "du", du, "the number of tokens", x.rows, "the rows of A", A.rows);
    if (side.rows != 0) {
      check::shape(name, "side", side, "its rows", side.rows, "d_in of A", A.cols);
      check::shape(name, "dh", dh, "the number of tokens", x.rows, "the rows of side", side.rows);
    }
    check::view(name, "dA", dA);
    check::view(name, "dside", dside);
    check::view(name, "dx", dx);
    if (dA.data != nullptr) check::shape(name, "dA", dA, "the rows of A", A.rows, "d_in of A", A.cols);
    if (dside.data != nullptr) check::shape(name, "dside", dside, "the rows of side", side.rows, "d_in", A.cols);
    if (dx.data != nullptr) check::shape(name, "dx", dx, "the number of tokens", x.rows, "d_in of A", A.cols);
    const auto written = [this](const char* what, auto view) {
      check::disjoint(name, what, view, "x", x);
      check::disjoint(name, what, view, "A", A);
      check::disjoint(name, what, view, "side", side);
      check::disjoint(name, what, view, "du", du);
      check::disjoint(name, what, view, "dh", dh);
    };
    written("dx", dx);
    written("dA", dA);
    written("dside", dside);
    check::disjoint(name, "dA", dA, "dside", dside);
    check::disjoint(name, "dA", dA, "dx", dx);
    check::disjoint(name, "dside", dside, "dx", dx);
    if (select.tokens != 0) check_form(name, select, x.rows, A.rows);
  }
};

namespace detail {
/// Whether a backend would rather know which ranks are open before it computes U of `columns` columns; found by
/// argument-dependent lookup, no where a backend does not say. Shapes only.
template <class Backend, class Form>
bool wants_selection(const Backend& be, const Form& form, Index columns) {
  if constexpr (requires { wants_selection_impl(be, form, columns); }) {
    return wants_selection_impl(be, form, columns);
  } else {
    return false;
  }
}
}  // namespace detail

/// The op u = x Aᵀ for A [R_a, d_in], x [T, d_in], u [T, R_a], its types taken from the views: no side rows, no dropout.
template <class W, class X, class Acc, Space S>
auto make_shrink(MatrixView<W, S> A, MatrixView<X, S> x, MatrixView<Acc, S> u) {
  return Shrink<std::remove_const_t<X>, std::remove_const_t<W>, Acc, Acc, S>{A, {}, x, {}, u, {}};
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
