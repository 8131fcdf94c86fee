/// Gradient clipping by the norm of everything, with a flag that says whether it is a number; gradients set to zero.
///
/// Computes:    norm = ‖g‖₂ over all given gradients together; scale = max_norm/norm where norm > max_norm, else 1;
///              g ← scale·g. A norm that is NaN or infinite: finite = false, scale 1, g stays as it is (Pascanu et al.
///              2013, algorithm 1).
/// Reads:       gradients: an adapter's, or flat views [n].
/// Writes:      the same gradients; `result` [1].
/// Errors:      null, max_norm negative or NaN; on the device a small workspace. Before any write.
/// Cost:        reads every gradient once, and once more with a write where it is scaled; no allocation. On the device
///              clip_bytes of workspace, no synchronisation: hand `result` to the optimiser's step, which then does
///              nothing where it says not finite.
/// Determinism: squares are summed in double, in at most 1024 pieces per gradient whose borders depend on its size alone,
///              added in order: the same bits for any number of threads. Float gradients cannot overflow the sum; doubles
///              above 1e154 do, and count as not finite.
/// Example:     tests/train/clip.cpp:  if (lm::clip_norm(be, grad, 1.0).finite) opt.step(be, lora, grad);
///                                     lm::zero(be, grad);
#pragma once
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <span>

#include <loramix/core/adapter.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What clipping found and did.
struct Clip {
  double norm = 0;  // before scaling
  double scale = 1;
  bool finite = true;
};

namespace detail {

inline constexpr Index clip_pieces = 1024, clip_chunk = 256;

/// Elements of a piece: a multiple of clip_chunk, so that at most clip_pieces cover `size`.
constexpr Index clip_piece(Index size) {
  return ((size + clip_pieces - 1) / clip_pieces + clip_chunk - 1) / clip_chunk * clip_chunk;
}

/// Row body: partial[row] = Σ g² over a piece.
template <class T, Space S>
struct SquareRows {
  VectorView<const T, S> g;
  Index piece;
  double* partial;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const Index begin = row * piece, end = begin + piece < g.size ? begin + piece : g.size;
    const auto square = [&](Index i) {
      const double v = i < end ? narrow<double>(g[i]) : 0;
      return v * v;
    };
    const double total = team.sum((end - begin + 3) / 4, [&](Index quarter) {
      const Index i = begin + 4 * quarter;
      return (square(i) + square(i + 1)) + (square(i + 2) + square(i + 3));
    });
    team.once([&] { partial[row] = total; });
  }
};

/// Row body, one row: adds a gradient's pieces to the sum that `result` gathers, and makes the result of it after the last.
struct ClipResultRow {
  const double* partial;
  Index pieces;
  double max_norm;
  bool first, last;
  Clip* result;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    const double sum = team.sum(pieces, [&](Index i) { return partial[i]; });
    team.once([&] {
      const double total = first ? sum : result->norm + sum;
      result->norm = last ? std::sqrt(total) : total;
      result->finite = is_finite(total);
      result->scale = last && result->finite && result->norm > max_norm ? max_norm / result->norm : 1;
    });
  }
};

/// Row body: g ← scale·g.
template <class T, Space S>
struct ScaleRows {
  VectorView<T, S> g;
  const Clip* clip;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const double scale = clip->scale;
    if (scale == 1) return;
    const Index begin = row * clip_chunk, left = g.size - begin;
    team.each(left < clip_chunk ? left : clip_chunk,
              [&](Index i) { g[begin + i] = narrow<T>(scale * narrow<double>(g[begin + i])); });
  }
};

/// Row body: g ← 0.
template <class T, Space S>
struct ZeroRows {
  VectorView<T, S> g;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const Index begin = row * clip_chunk, left = g.size - begin;
    team.each(left < clip_chunk ? left : clip_chunk, [&](Index i) { g[begin + i] = T{}; });
  }
};

}  // namespace detail

/// Bytes of workspace that clip_norm takes, whatever the size of the gradients.
template <Space S>
Index clip_bytes() {
  return Arena<S>::with_alignment(carved_bytes<S>([](Arena<S>& a) { a.template take<double>(detail::clip_pieces); }));
}

/// Clips gradients [n₁], [n₂], … by their common norm and writes `result` [1], which lies where they do.
template <class Backend, class T, Space S>
void clip_norm(const Backend& be, std::span<const VectorView<T, S>> gradients, double max_norm,
               VectorView<Clip, S> result, Arena<S> work) {
  const char* const op = "clip_norm";
  for (const VectorView<T, S>& g : gradients) check::view(op, "gradient", g);
  check::view(op, "result", result);
  check::same(op, "result", "size", result.size, "the number of norms", 1);
  if (!(max_norm >= 0)) fail(check::detail::about(ErrorCode::value, op, "max_norm") << " must be at least 0");
  double* const partial = work.template take<double>(detail::clip_pieces);

  const auto gather = [&](Index pieces, bool first, bool last) {
    for_rows<S>(be, 1, detail::ClipResultRow{partial, pieces, max_norm, first, last, result.data});
  };
  if (gradients.empty()) gather(0, true, true);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const VectorView<T, S> g = gradients[i];
    const Index piece = detail::clip_piece(g.size), pieces = g.empty() ? 0 : (g.size + piece - 1) / piece;
    for_rows<S>(be, pieces, detail::SquareRows<T, S>{g, piece, partial});
    gather(pieces, i == 0, i + 1 == gradients.size());
  }
  for (const VectorView<T, S>& g : gradients) {
    for_rows<S>(be, (g.size + detail::clip_chunk - 1) / detail::clip_chunk, detail::ScaleRows<T, S>{g, result.data});
  }
}

/// An adapter's gradient, or one flat view [n]: on the device, or with the caller's workspace.
template <class Backend, Adapter G>
void clip_norm(const Backend& be, G& gradient, double max_norm, VectorView<Clip, G::space> result,
               Arena<G::space> work) {
  const auto flat = gradient.parameters();
  using View = std::remove_const_t<decltype(flat)>;
  clip_norm(be, std::span<const View>(&flat, 1), max_norm, result, work);
}

/// On the host: flat views [n₁], [n₂], … of several adapters or dense parameters, by their common norm.
template <class Backend, class T>
Clip clip_norm(const Backend& be, std::span<const VectorView<T>> gradients, double max_norm) {
  std::byte memory[detail::clip_pieces * sizeof(double) + Arena<>::alignment];
  Clip clip;
  clip_norm(be, gradients, max_norm, VectorView<Clip>(&clip, 1), Arena<>{memory, sizeof memory});
  return clip;
}
template <class Backend, class T>
Clip clip_norm(const Backend& be, std::initializer_list<VectorView<T>> gradients, double max_norm) {
  return clip_norm(be, std::span<const VectorView<T>>(gradients.begin(), gradients.size()), max_norm);
}
template <class Backend, class T>
Clip clip_norm(const Backend& be, VectorView<T> gradient, double max_norm) {
  return clip_norm(be, std::span<const VectorView<T>>(&gradient, 1), max_norm);
}

/// On the host: an adapter's gradient.
template <class Backend, Adapter G>
  requires(G::space == Space::host)
Clip clip_norm(const Backend& be, G& gradient, double max_norm) {
  return clip_norm(be, gradient.parameters(), max_norm);
}

/// A flat gradient [n] is 0 again.
template <class Backend, class T, Space S>
void zero(const Backend& be, VectorView<T, S> gradient) {
  check::view("zero", "gradient", gradient);
  for_rows<S>(be, (gradient.size + detail::clip_chunk - 1) / detail::clip_chunk, detail::ZeroRows<T, S>{gradient});
}
/// An adapter's gradient is 0 again.
template <class Backend, Adapter G>
void zero(const Backend& be, G& gradient) {
  zero(be, gradient.parameters());
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
