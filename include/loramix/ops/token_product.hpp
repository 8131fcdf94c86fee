/// Outer products summed over tokens: the gradient of any small matrix that every token passes through.
///
/// Computes:    out (+)= leftᵀ right = Σ_t left[t, :]ᵀ right[t, :].
/// Source:      dM = Σ_t dω φᵀ and its like (MATH.md section 3).
/// Reads:       left [T, a], right [T, b].
/// Adds to:     out [a, b], or assigns with Into::set.
/// Errors:      shape, null, alias; small workspace.
/// Cost:        2·T·a·b flop.
/// Determinism: tokens in a fixed order, whatever the threads.
/// Example:     tests/ops
#pragma once
#include <loramix/ops/execute.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The op.
template <class Acc, class Out, Space S>
struct TokenProduct {
  static constexpr const char* name = "token_product";
  static constexpr Space space = S;
  MatrixView<const Acc, S> left;   // [T, a]
  MatrixView<const Acc, S> right;  // [T, b]
  MatrixView<Out, S> out;          // [a, b]
  Into into = Into::add;

  void check() const {
    check::view(name, "left", left);
    check::shape(name, "right", right, "the number of tokens", left.rows, "its columns", right.cols);
    check::shape(name, "out", out, "the columns of left", left.cols, "the columns of right", right.cols);
    check::disjoint(name, "out", out, "left", left);
    check::disjoint(name, "out", out, "right", right);
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
