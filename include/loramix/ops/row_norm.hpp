/// Norms of the rows of a frozen weight plus a low-rank change, without the change.
///
/// Computes:    n_i = ‖w_i + s (BA)_i‖, n_i² = ‖w_i‖² + 2s⟨(W Aᵀ)_i, B_i⟩ + s²⟨(B(AAᵀ))_i, B_i⟩, ‖w_i‖² cached. A row
///              whose terms nearly cancel (n² below 1 % of their sum) is summed directly, and n is 0 where that leaves no
///              more than rounding would: not 1e-4, nor 1e-16.
/// Source:      MATH.md section 4, DoRA; Liu et al. 2024, equation 5; huggingface/peft#3387.
/// Reads:       W [d_out, d_in], squares [d_out] = ‖w_i‖² of row_squares(), A [r, d_in], B [d_out, r].
/// Writes:      norms [d_out]; squares [d_out].
/// Errors:      shape, stride, null, alias; small workspace.
/// Cost:        2·d_out·r·d_in + 2·r²·(d_in + d_out) flop, one pass over W; scratch (d_out + r)·r values and the
///              product's.
/// Determinism: rows are independent; with B = 0 a norm is the root of its square, bit for bit.
/// Example:     tests/adapter/dora.cpp
#pragma once
#include <cmath>

#include <loramix/ops/rows.hpp>
#include <loramix/ops/shrink.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Row body: squares[i] = ‖w_i‖².
template <class W, class Acc, Space S>
struct RowSquares {
  static constexpr const char* name = "row_squares";
  MatrixView<const W, S> weights;  // [d_out, d_in]
  VectorView<Acc, S> squares;      // [d_out]

  void check() const {
    check::view(name, "weights", weights);
    check::view(name, "squares", squares);
    check::same(name, "squares", "size", squares.size, "the rows of weights", weights.rows);
    check::disjoint(name, "squares", MatrixView<Acc, S>{squares.data, 1, squares.size}, "weights", weights);
  }
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    const Acc sum = team.sum(weights.cols, [&](Index c) {
      const Acc w = widen<Acc>(weights(i, c));
      return w * w;
    });
    team.once([&] { squares[i] = sum; });
  }
};

/// ‖w_i‖² of every row: once per base weight.
template <class Backend, class W, class Acc, Space S>
void row_squares(const Backend& be, const RowSquares<W, Acc, S>& op) {
  op.check();
  for_rows<S>(be, op.weights.rows, op);
}

namespace detail {
/// n², or 0 where that is no more than what rounding (an operation's, relative) leaves of terms that cancel: ‖w‖² and ‖s BA‖²,
/// of so many ranks.
template <class Sum>
LORAMIX_HD constexpr Sum without_rounding(Sum n2, Sum squares, Sum change, Index ranks, double rounding) {
  const Sum noise = Sum(rounding * static_cast<double>(ranks + 2));
  return n2 < noise * noise * (squares + change) ? Sum(0) : n2;  // not where both are infinite
}
}  // namespace detail

/// The norms; as a row body it needs `mixed` and `gram`.
template <class Base, class W, class Acc, Space S>
struct DoraNorms {
  static constexpr const char* name = "dora_norms";
  static constexpr double rounding = detail::rounding_of<Acc>();
  MatrixView<const Base, S> weights;        // [d_out, d_in]
  VectorView<const Acc, S> squares;         // [d_out]
  MatrixView<const W, S> A;                 // [r, d_in]
  MatrixView<const W, S, Major::column> B;  // [d_out, r]
  Acc scale;
  VectorView<Acc, S> norms;    // [d_out]
  MatrixView<Acc, S> mixed{};  // [d_out, r] scratch: W Aᵀ
  MatrixView<Acc, S> gram{};   // [r, r] scratch: A Aᵀ

  void check() const {
    check::view(name, "weights", weights);
    check::shape(name, "A", A, "its rows", A.rows, "d_in of weights", weights.cols);
    check::shape(name, "B", B, "d_out of weights", weights.rows, "the rows of A", A.rows);
    check::view(name, "squares", squares);
    check::same(name, "squares", "size", squares.size, "d_out of weights", weights.rows);
    check::view(name, "norms", norms);
    check::same(name, "norms", "size", norms.size, "d_out of weights", weights.rows);
    const MatrixView<Acc, S> out{norms.data, 1, norms.size};
    check::disjoint(name, "norms", out, "weights", weights);
    check::disjoint(name, "norms", out, "squares", MatrixView<const Acc, S>{squares.data, 1, squares.size});
    check::disjoint(name, "norms", out, "A", A);
    check::disjoint(name, "norms", out, "B", B);
  }

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    const Index r = A.rows;
    const Acc cross = team.sum(r, [&](Index j) { return mixed(i, j) * widen<Acc>(B(i, j)); });
    const Acc square = team.sum(r, [&](Index j) {
      Acc row = Acc(0);
      for (Index k = 0; k < r; ++k) row += gram(j, k) * widen<Acc>(B(i, k));
      return row * widen<Acc>(B(i, j));
    });
    finish(team, i, cross, square);
  }
  /// n_i of cross = ⟨(W Aᵀ)_i, B_i⟩ and square = ⟨(B(AAᵀ))_i, B_i⟩.
  template <Team Tm>
  LORAMIX_HD void finish(const Tm& team, Index i, Acc cross, Acc square) const {
    const Acc twice = Acc(2) * scale * cross, last = scale * scale * square;
    Acc n2 = squares[i] + twice + last;
    if (!(n2 > Acc(0.01) * (squares[i] + (twice < Acc(0) ? -twice : twice) + last))) {
      n2 = team.sum(weights.cols, [&](Index c) {
        Acc change = Acc(0);
        for (Index k = 0; k < A.rows; ++k) change += widen<Acc>(B(i, k)) * widen<Acc>(A(k, c));
        const Acc w = widen<Acc>(weights(i, c)) + scale * change;
        return w * w;
      });
      n2 = detail::without_rounding(n2, squares[i], last, A.rows, rounding);
    }
    using std::sqrt;
    team.once([&] { norms[i] = sqrt(n2); });
  }
};

namespace detail {
template <class Backend, class Base, class W, class Acc, Space S>
Index dora_product_bytes(const Backend& be, const DoraNorms<Base, W, Acc, S>& op) {
  const Index r = op.A.rows, d_in = op.A.cols;
  const Index wide =
      scratch_bytes(be, Shrink<Base, W, Acc, Acc, S>{op.A, {}, {nullptr, op.weights.rows, d_in}, {}, {}, {}});
  const Index small = scratch_bytes(be, Shrink<W, W, Acc, Acc, S>{op.A, {}, {nullptr, r, d_in}, {}, {}, {}});
  return wide > small ? wide : small;
}
template <class Base, class W, class Acc, Space S>
void carve(Arena<S>& arena, DoraNorms<Base, W, Acc, S>& op) {
  op.mixed = arena.template matrix<Acc>(op.weights.rows, op.A.rows);
  op.gram = arena.template matrix<Acc>(op.A.rows, op.A.rows);
}
}  // namespace detail

/// Bytes of dora_norms inside an arena (Arena::with_alignment gives those of a buffer); reads sizes only.
template <class Backend, class Base, class W, class Acc, Space S>
Index dora_norms_bytes(const Backend& be, DoraNorms<Base, W, Acc, S> op) {
  return carved_bytes<S>([&](Arena<S>& arena) { detail::carve(arena, op); }) + detail::dora_product_bytes(be, op);
}

/// Checks, then runs.
template <class Backend, class Base, class W, class Acc, Space S>
void dora_norms(const Backend& be, DoraNorms<Base, W, Acc, S> op, Arena<S> work) {
  op.check();
  work.require(op.name, "work", dora_norms_bytes(be, op));
  detail::carve(work, op);
  execute(be, Shrink<Base, W, Acc, Acc, S>{op.A, {}, op.weights, {}, op.mixed, {}}, work);
  execute(be, Shrink<W, W, Acc, Acc, S>{op.A, {}, op.A, {}, op.gram, {}}, work);
  for_rows<S>(be, op.weights.rows, op);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
