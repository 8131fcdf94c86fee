/// Weights that are made from weights before the product, and the chain rule after it: O(R·d), never O(T·…).
///
/// Computes:    MixRanks:      out (+)= in Sᵀ: B′ = B Sᵀ (MoSLoRA), and dB = dB′ S by S.transposed()
///              RankProducts:  out_jk (+)= Σ_o left_oj right_ok: dS = (dB′)ᵀ B
///              ScaleOutputs:  out_oj (+)= γ_{i(j),o} in_oj: B′_i = diag(γ_i) B_i (MultiLoRA), and dB_i from dB′_i
///              OutputProducts: out_io (+)= Σ_{j of i} left_oj right_oj: dγ
/// Source:      MATH.md section 1, "Re-parametrised weights".
/// Reads:       in, left, right [d_out, R] rank-major, S [R, R] in either order, γ [n, d_out] with R = n·r.
/// Adds to:     out [d_out, R], [R, R] or [n, d_out]; or assigns with Into::set.
/// Errors:      shape, stride, null, alias.
/// Cost:        2·R²·d_out flop for MoSLoRA, R·d_out for MultiLoRA; no scratch.
/// Determinism: every element is one sum in a fixed order, of the device and the scalars (cpu/small_product.hpp).
/// Example:     tests/adapter/moslora.cpp
#pragma once
#include <cmath>

#include <loramix/core/matrix.hpp>
#include <loramix/core/scalars.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
inline constexpr Index reparam_block = 256;  // outputs of one row of work
LORAMIX_HD constexpr Index reparam_blocks(Index d_out) { return (d_out + reparam_block - 1) / reparam_block; }

/// f(j, o) for the outputs o of row `row` of rank (or LoRA) j.
template <class Tm, class F>
LORAMIX_HD void each_output(const Tm& team, Index row, Index d_out, const F& f) {
  const Index blocks = reparam_blocks(d_out), j = row / blocks, begin = row % blocks * reparam_block;
  const Index n = d_out - begin < reparam_block ? d_out - begin : reparam_block;
  team.each(n, [&](Index i) { f(j, begin + i); });
}
template <class Acc, class Out>
LORAMIX_HD void put(Out& cell, Acc value, Into into) {
  cell = narrow<Out>(into == Into::add ? widen<Acc>(cell) + value : value);
}

/// Gram and Schmidt on the rows of a host matrix, in double: twice, which is enough.
template <class T>
void orthonormalise(MatrixView<T> rows) {
  Matrix<double> q(rows.rows, rows.cols);
  for (Index i = 0; i < rows.rows; ++i) {
    for (Index c = 0; c < rows.cols; ++c) q(i, c) = widen<double>(rows(i, c));
    for (Index k = 0; k < 2 * i; ++k) {
      double inner = 0;
      for (Index c = 0; c < rows.cols; ++c) inner += q(i, c) * q(k % i, c);
      for (Index c = 0; c < rows.cols; ++c) q(i, c) -= inner * q(k % i, c);
    }
    double squares = 0;
    for (Index c = 0; c < rows.cols; ++c) squares += q(i, c) * q(i, c);
    for (Index c = 0; c < rows.cols; ++c) {
      q(i, c) /= std::sqrt(squares);
      rows(i, c) = narrow<T>(q(i, c));
    }
  }
}
}  // namespace detail

/// out (+)= in Sᵀ.
template <class In, class W, class Acc, class Out, Space S, Major M>
struct MixRanks {
  static constexpr const char* name = "mix_ranks";
  MatrixView<const In, S, Major::column> in;  // [d_out, R]
  MatrixView<const W, S, M> mixer;            // [R, R]
  MatrixView<Out, S, Major::column> out;      // [d_out, R]
  Into into = Into::set;

  void check() const {
    check::view(name, "in", in);
    check::shape(name, "mixer", mixer, "the ranks of in", in.cols, "the ranks of in", in.cols);
    check::shape(name, "out", out, "d_out of in", in.rows, "the ranks of in", in.cols);
    check::disjoint(name, "out", out, "in", in);
    check::disjoint(name, "out", out, "mixer", mixer);
  }
  Index rows() const { return out.cols * detail::reparam_blocks(out.rows); }
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    detail::each_output(team, row, out.rows, [&](Index j, Index o) {
      Acc sum = Acc(0);
      for (Index k = 0; k < in.cols; ++k) sum += widen<Acc>(in(o, k)) * widen<Acc>(mixer(j, k));
      detail::put(out(o, j), sum, into);
    });
  }
};

/// out (+)= leftᵀ right.
template <class L, class W, class Acc, class Out, Space S>
struct RankProducts {
  static constexpr const char* name = "rank_products";
  MatrixView<const L, S, Major::column> left;   // [d_out, R]
  MatrixView<const W, S, Major::column> right;  // [d_out, R]
  MatrixView<Out, S> out;                       // [R, R]
  Into into = Into::add;

  void check() const {
    check::view(name, "left", left);
    check::shape(name, "right", right, "d_out of left", left.rows, "its ranks", right.cols);
    check::shape(name, "out", out, "the ranks of left", left.cols, "the ranks of right", right.cols);
    check::disjoint(name, "out", out, "left", left);
    check::disjoint(name, "out", out, "right", right);
  }
  Index rows() const { return out.rows * out.cols; }
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const Index j = row / out.cols, k = row % out.cols;
    const Acc sum = team.sum(left.rows, [&](Index o) { return widen<Acc>(left(o, j)) * widen<Acc>(right(o, k)); });
    team.once([&] { detail::put(out(j, k), sum, into); });
  }
};

/// out (+)= γ ∘ in, LoRA by LoRA.
template <class In, class W, class Acc, class Out, Space S>
struct ScaleOutputs {
  static constexpr const char* name = "scale_outputs";
  MatrixView<const In, S, Major::column> in;  // [d_out, n·r]
  MatrixView<const W, S> gamma;               // [n, d_out]
  MatrixView<Out, S, Major::column> out;      // [d_out, n·r]
  Into into = Into::set;

  void check() const {
    check::view(name, "in", in);
    check::shape(name, "gamma", gamma, "its rows", gamma.rows, "d_out of in", in.rows);
    check::same(name, "in", "columns", in.cols, "a multiple of the rows of gamma",
                gamma.rows == 0 ? 0 : in.cols / gamma.rows * gamma.rows);
    check::shape(name, "out", out, "d_out of in", in.rows, "the ranks of in", in.cols);
    check::disjoint(name, "out", out, "in", in);
    check::disjoint(name, "out", out, "gamma", gamma);
  }
  Index rows() const { return out.cols * detail::reparam_blocks(out.rows); }
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const Index rank = in.cols / gamma.rows;
    detail::each_output(team, row, out.rows, [&](Index j, Index o) {
      detail::put(out(o, j), widen<Acc>(gamma(j / rank, o)) * widen<Acc>(in(o, j)), into);
    });
  }
};

/// out (+)= Σ over the ranks of a LoRA of left ∘ right.
template <class L, class W, class Acc, class Out, Space S>
struct OutputProducts {
  static constexpr const char* name = "output_products";
  MatrixView<const L, S, Major::column> left;   // [d_out, n·r]
  MatrixView<const W, S, Major::column> right;  // [d_out, n·r]
  MatrixView<Out, S> out;                       // [n, d_out]
  Into into = Into::add;

  void check() const {
    check::view(name, "left", left);
    check::shape(name, "right", right, "d_out of left", left.rows, "the ranks of left", left.cols);
    check::shape(name, "out", out, "its rows", out.rows, "d_out of left", left.rows);
    check::same(name, "left", "columns", left.cols, "a multiple of the rows of out",
                out.rows == 0 ? 0 : left.cols / out.rows * out.rows);
    check::disjoint(name, "out", out, "left", left);
    check::disjoint(name, "out", out, "right", right);
  }
  Index rows() const { return out.rows * detail::reparam_blocks(out.cols); }
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const Index rank = out.rows == 0 ? 0 : left.cols / out.rows;
    detail::each_output(team, row, out.cols, [&](Index i, Index o) {
      Acc sum = Acc(0);
      for (Index j = i * rank; j < (i + 1) * rank; ++j) sum += widen<Acc>(left(o, j)) * widen<Acc>(right(o, j));
      detail::put(out(i, o), sum, into);
    });
  }
};

/// Checks one of these, then runs it.
template <Space S, class Backend, class Op>
void reparam(const Backend& be, const Op& op) {
  op.check();
  for_rows<S>(be, op.rows(), op);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
