/// From features into rank space: the fused contraction of shrink, and of expand's backward.
///
/// Computes:    out[t, r] = scale · Σ_k x̂[t, k] · W[r, k]
/// Reads:       x [T, d] (widened, with dropout applied, block by block), W [R, d].
/// Writes:      out [T, R], assigned.
/// Errors:      none: ops/shrink.hpp and ops/expand.hpp check.
/// Cost:        one pass over x. More than half a packet of ranks: packed weights, register tiles of tokens × ranks,
///              sweeps of one page of columns. Fewer, and T ≤ 64: dot products on the weights as they lie.
/// Determinism: an output depends on its row of x only, and not on threads.
/// Example:     ops/shrink.hpp
#pragma once
#include <loramix/cpu/dropout.hpp>
#include <loramix/cpu/panels.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// What is contracted: rows of activations, as they are or with dropout.
template <class X>
struct Input {
  MatrixView<const X> rows;
  Dropout dropout{};

  /// Whether kernels may read the rows where they lie.
  bool direct() const { return std::is_same_v<X, float> && !dropout.on(); }
  /// Row t, columns [k, k + n), as floats; k is a multiple of 8.
  void convert(Index t, Index k, Index n, float* out) const {
    const X* const from = rows.row(t) + k;
    Index i = 0;
    for (; i + width <= n; i += width) store(out + i, load(from + i));
    if (i < n) store_part(out + i, load_part(from + i, n - i), n - i);
    if (dropout.on()) drop(dropout, t, k, n, out);
  }
};

/// A contraction on packed weights.
template <class X>
struct PanelContraction {
  Input<X> x;
  PanelLayout layout;
  const float* panels;  // [layout.size()]
  float scale;
  MatrixView<float> out;  // [T, R]

  /// Tokens that share the registers' panels: rows of the widest tiles side by side.
  static constexpr Index group = larger(RegisterTile::rows_of(1), RegisterTile::rows_of(2));
  /// At most so many tokens in a job: their sums stay in L2.
  static constexpr Index most = 252;

  static Index scratch(const PanelLayout& layout, bool direct) {
    return most * layout.padded() + (direct ? 0 : group * pitch(layout));
  }

  /// Tokens [t0, t0 + n).
  void run(Index t0, Index n, float* scratch) const {
    float* const sums = scratch;
    float* const block = sums + most * layout.padded();
    for (Index i = 0; i < layout.sweeps(); ++i) {
      for (Index t = 0; t < n; t += group) sweep(i, t0 + t, smaller(group, n - t), sums + t * layout.padded(), block);
    }
    for (Index t = 0; t < n; ++t) {
      const float* const from = sums + t * layout.padded();
      float* const to = out.row(t0 + t);
      for (Index j = 0; j < out.cols; ++j) to[j] = scale * from[j];
    }
  }

 private:
  static Index pitch(const PanelLayout& layout) { return round_up(smaller(layout.sweep, layout.depth), width) + width; }

  /// Columns of sweep i for g tokens from t on.
  void sweep(Index i, Index t, Index g, float* sums, float* block) const {
    const Index k = i * layout.sweep, n = layout.columns(i);
    const float* rows = block;
    Index stride = pitch(layout);
    if (x.direct()) {
      if constexpr (std::is_same_v<X, float>) rows = x.rows.row(t) + k;
      stride = x.rows.stride;
    } else {
      for (Index m = 0; m < g; ++m) x.convert(t + m, k, n, block + m * stride);
    }
    for_panels(layout.ranks, [&](auto packets, Index begin) {
      const float* const panel = panels + layout.offset(i, begin);
      in_steps<RegisterTile::rows_of(packets)>(g, [&](auto m, Index first) {
        tile<m, packets>(n, rows + first * stride, stride, panel, sums + first * layout.padded() + begin, i == 0);
      });
    });
  }
  template <int M, int N>
  [[gnu::flatten, gnu::noinline]] void tile(Index n, const float* rows, Index stride, const float* panel, float* sums,
                                            bool first) const {
    Tile<M, N> c;
    if (first)
      c.clear();
    else
      c.load_from(sums, layout.padded());
    outer(n, Rows3<M>(rows, stride), panel, N * width, c);
    c.store_to(sums, layout.padded());
  }
};

/// A contraction on weights as they lie, by dot products: few ranks, or few tokens.
template <class X, class W>
struct DotContraction {
  Input<X> x;
  MatrixView<const W> w;  // [R, d]
  Index sweep;
  float scale;
  MatrixView<float> out;  // [T, R]

  static constexpr int columns = RegisterTile::dot_columns;
  static constexpr int rows = RegisterTile::dot_rows;
  static constexpr Index most = 63;  // tokens in a job

  static Index scratch(Index, Index depth, Index sweep) {
    return most * columns * width + rows * (round_up(smaller(sweep, depth), width) + width);
  }

  /// Tokens [t0, t0 + n), ranks [r, r + ranks), at most `columns`.
  void run(Index t0, Index n, Index r, Index ranks, float* scratch) const {
    float* const block = scratch + most * columns * width;
    const Index depth = w.cols;
    for (Index k = 0; k < depth; k += sweep) {
      const Index length = smaller(sweep, depth - k);
      in_steps<rows>(n, [&](auto m, Index t) {
        in_steps<columns>(ranks, [&](auto c, Index j) {
          tile<m, c>(t0 + t, k, length, r + j, scratch + (t * columns + j * m) * width, block);
        });
      });
    }
  }

 private:
  template <int M, int N>
  [[gnu::flatten, gnu::noinline]] void tile(Index t, Index k, Index length, Index r, float* sums, float* block) const {
    Tile<M, N> c;
    if (k == 0)
      c.clear();
    else
      c.load_from(sums, N * width);
    if (x.dropout.on()) {
      const Index pitch = round_up(length, width) + width;
      for (int m = 0; m < M; ++m) x.convert(t + m, k, length, block + m * pitch);
      dot(length, block, pitch, w.row(r) + k, w.stride, c);
    } else {
      dot(length, x.rows.row(t) + k, x.rows.stride, w.row(r) + k, w.stride, c);
    }
    if (k + sweep < w.cols)
      c.store_to(sums, N * width);
    else
      c.each([&](int m, int n, Packet& v) { out(t + m, r + n) = scale * sum(v); });
  }
};

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
