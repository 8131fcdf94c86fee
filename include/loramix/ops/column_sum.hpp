/// Sums over tokens, by group.
///
/// Computes:    out[g, c] (+)= Σ_{t in group g} values[t, c], t ascending, in chunks of 256 tokens: every chunk is summed
///              by itself and the chunks are added in order.
/// Source:      MATH.md section 6, invariance (dA, dB and gate gradients are sums over tokens: reproducible).
/// Reads:       values [T, C]; groups of T tokens, or one group of all (Groups{} with out of one row).
/// Writes:      out [groups, C] (Into::set), or adds to it (Into::add).
/// Errors:      shapes; group ids on the host. On the device a bad id, or the part of a
///              segment outside [0, T), contributes nothing.
/// Cost:        T·C additions per group that a token could belong to; no scratch.
/// Determinism: the order above, whatever the threads.
/// Example:     tests/gpu, tests/conformance
#pragma once
#include <loramix/gate/form.hpp>
#include <loramix/ops/execute.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

inline constexpr Index token_chunk = 256;

/// The op.
template <class Acc, class Out, Space S>
struct ColumnSum {
  static constexpr const char* name = "column_sum";
  static constexpr Space space = S;
  MatrixView<const Acc, S> values;  // [T, C]
  Groups<S> groups;
  MatrixView<Out, S> out;  // [groups, C]
  Into into = Into::add;

  LORAMIX_HD constexpr bool all_in_one() const { return groups.per_token(); }

  void check() const {
    check::view(name, "values", values);
    check::shape(name, "out", out, "the number of groups", all_in_one() ? 1 : groups.count, "the columns of values",
                 values.cols);
    if (!all_in_one()) loramix::detail::check_groups<Acc>(name, "groups", groups, values.rows, out.rows);
    check::disjoint(name, "out", out, "values", values);
  }

  /// Columns [c, c + n) of group g; n ≤ N.
  template <int N>
  LORAMIX_HD void block(Index g, Index c, Index n) const {
    Acc total[N] = {};
    if (groups.offsets == nullptr) {
      add<N>(0, values.rows, g, c, n, total);
    } else if (groups.of_segment == nullptr) {
      add<N>(groups.offsets[g], groups.offsets[g + 1], g, c, n, total);
    } else {
      for (Index i = 0; i < groups.segments; ++i) {
        if (groups.of_segment[i] == g) add<N>(groups.offsets[i], groups.offsets[i + 1], g, c, n, total);
      }
    }
    for (Index i = 0; i < n; ++i) {
      Out& cell = out(g, c + i);
      cell = narrow<Out>(into == Into::add ? widen<Acc>(cell) + total[i] : total[i]);
    }
  }

 private:
  /// total += the tokens of [begin, end) that belong to group g, chunk by chunk.
  template <int N>
  LORAMIX_HD void add(Index begin, Index end, Index g, Index c, Index n, Acc* total) const {
    Acc chunk[N] = {};
    if (begin < 0) begin = 0;  // device offsets were not checked
    if (end > values.rows) end = values.rows;
    for (Index t = begin; t < end; ++t) {
      if (groups.ids == nullptr || groups.ids[t] == g) {
        for (Index i = 0; i < n; ++i) chunk[i] += values(t, c + i);
      }
      if ((t + 1) % token_chunk == 0 || t + 1 == end) {
        for (Index i = 0; i < n; ++i) {
          total[i] += chunk[i];
          chunk[i] = Acc{};
        }
      }
    }
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
