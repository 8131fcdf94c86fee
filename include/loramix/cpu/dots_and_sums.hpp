/// A backward's two products of the same rows, out of one reading, for few ranks.
///
/// Computes:    dots[t, r] = scale · Σ_c x[t, c] · W[r, c] and out[r, c] (+)= scale · Σ_t left[t, r] · x[t, c]
/// Reads:       x [T, d], W [R, d], left [T, R].
/// Writes:      dots, by pieces of the columns: parts [pieces · T, woven_rows(R)]. Adds to: out [R, d], or assigns.
/// Errors:      none: ops/expand.hpp checks.
/// Cost:        one pass over x: some tokens' rows go by dot products and then, from L2, into the sums. The dot products alone
///              (run_dots) are a pass, too.
/// Determinism: pieces depend on shapes and Tuning, on threads only whether one job makes both products of a piece.
/// Example:     ops/expand.hpp
#pragma once
#include <loramix/cpu/contract.hpp>
#include <loramix/cpu/token_sum.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

template <class W, class G>
struct DotsAndSums {
  using Sum = TokenSum<float, G, Major::row>;
  MatrixView<const W> w;  // [R, d]
  Sum sum;
  Cut pieces;               // of the columns
  MatrixView<float> parts;  // [pieces · T, woven_rows(R)]

  /// Pieces wide enough that the ends of dot products do not matter, and whose weights and sums stay near L1; none where the
  /// columns are too few.
  static Cut pieces_of(const Tuning& tuning, Index ranks, Index columns) {
    constexpr Index lanes = 4;  // that most pieces are even for; not the machine's, or sums would depend on it
    const Index usual = detail::sweep_of(tuning),
                most = smaller(usual + usual / 2, Sum::sweep_of(tuning, ranks, columns, true));
    const Cut cut(columns, lanes, most, SumPanel::step);
    return 2 * columns >= usual * cut.jobs ? cut : Cut(0, 1, 1, 1);
  }
  /// Floats of a lane.
  static Index scratch(const Tuning& tuning, Index ranks, const Cut& pieces) {
    const Index columns = round_up(blocks_of(pieces.n, larger(1, pieces.jobs)), SumPanel::step);
    return weights(columns, ranks) + Sum::scratch(tuning, ranks, columns, true);
  }

  Index tokens() const { return sum.x.rows.rows; }

  /// Both products of a piece.
  void run(Index piece, float* scratch) const {
    const WovenRows woven = weave_piece(piece, scratch);
    sum.run(0, w.rows, pieces.begin(piece), pieces.count(piece), scratch + weights(pieces.count(piece), w.rows),
            [&](Index t, Index n) { dots(piece, woven, t, n); });
  }
  /// The dot products of a piece and tokens [t, t + n).
  void run_dots(Index piece, Index t, Index n, float* scratch) const { dots(piece, weave_piece(piece, scratch), t, n); }

  /// to [R] = the dot products of a token.
  void add_up(Index t, float* to) const {
    for (Index piece = 0; piece < pieces.jobs; ++piece) {
      const float* const part = parts.row(piece * tokens() + t);
      for (Index r = 0; r < w.rows; ++r) to[r] = piece == 0 ? part[r] : to[r] + part[r];
    }
  }

 private:
  static Index weights(Index columns, Index ranks) { return round_up(columns, width) * woven_rows(ranks); }
  WovenRows weave_piece(Index piece, float* to) const {
    weave(w, pieces.begin(piece), pieces.count(piece), to, woven_rows(w.rows));
    return {to, woven_rows(w.rows)};
  }
  void dots(Index piece, const WovenRows& woven, Index t, Index n) const {
    const MatrixView<const float> x = sum.x.rows.block(t, n, pieces.begin(piece), pieces.count(piece));
    dot_all(x, woven, sum.scale, Into::set, parts.row(piece * tokens() + t), parts.stride, Ahead{n * x.stride});
  }
};

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
