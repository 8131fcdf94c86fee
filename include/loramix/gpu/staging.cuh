/// What surrounds a product of the composed path: tokens cut into chunks, values widened into scratch, dropped out,
/// summed and rounded.
///
/// Computes:    everything here is exact but for one rounding where a result narrower than the accumulation is stored.
/// Errors:      launches that CUDA refuses (ErrorCode::device).
/// Cost:        one pass over what is loaded or stored; scratch is carved by gpu/product.cuh.
/// Determinism: elementwise; TokenSum adds chunk after chunk.
/// Example:     gpu/product.cuh
#pragma once
#include <loramix/core/draws.hpp>
#include <loramix/gpu/gemm.cuh>
#include <loramix/gpu/rows.cuh>
#include <loramix/ops/gate_rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

inline constexpr Index chunk_tokens = 1024;

/// f(first token, tokens) for chunk after chunk; once with no token where there is none, so that Into::set assigns.
template <class F>
void for_chunks(Index tokens, const F& f) {
  Index begin = 0;
  do {
    f(begin, tokens - begin < chunk_tokens ? tokens - begin : chunk_tokens);
    begin += chunk_tokens;
  } while (begin < tokens);
}

template <class T, class Acc>
inline constexpr bool widened = !std::is_same_v<T, Acc>;

/// Row body: out[t, :] = x[t, :] as Acc, times keep / (1 − p̄) where dropout is on. x may be out.
template <class X, class Acc>
struct LoadRow {
  View<const X> x;
  Dropout dropout;
  View<Acc> out;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    if (!dropout.on()) {
      team.each(x.cols, [&](Index c) { out(t, c) = widen<Acc>(x(t, c)); });
      return;
    }
    const Acc kept = Acc(dropout.kept_scale());
    team.each((x.cols + 7) / 8, [&](Index block) {
      const std::uint32_t keep = dropout.keep8(t, block);
      for (Index b = 0, c = 8 * block; b < 8 && c < x.cols; ++b, ++c) {
        out(t, c) = (keep >> b & 1u) ? widen<Acc>(x(t, c)) * kept : Acc(0);
      }
    });
  }
};

/// The dropout of rows from `token` on, as seen from there.
inline Dropout from_token(Dropout dropout, Index token) {
  dropout.first_token += static_cast<std::uint64_t>(token);
  if (dropout.mask != nullptr) dropout.mask += token * dropout.mask_stride;
  return dropout;
}

/// Rows of x as Acc: in place where that is what they are, else in the first rows of `tile`.
template <class Acc, class X>
View<const Acc> load(const Backend& be, View<const X> x, const Dropout& dropout, View<Acc> tile) {
  if constexpr (!widened<X, Acc>) {
    if (!dropout.on()) return x;
  }
  const View<Acc> out = tile.row_range(0, x.rows);
  for_wide_rows(be, x.rows, LoadRow<X, Acc>{x, dropout, out});
  return out;
}

/// out (+)= values, rounded once.
template <class Acc, class Out>
void store(const Backend& be, View<const Acc> values, View<Out> out, Into into) {
  for_wide_rows(be, out.rows, loramix::detail::StoreRow<Acc, Out, Space::device>{values, out, into});
}

/// Room for a matrix of [rows, cols] as Acc, where T has to be widened.
template <class T, class Acc>
View<Acc> carve_widened(DeviceArena& arena, Index rows, Index cols) {
  return widened<T, Acc> ? arena.matrix<Acc>(rows, cols) : View<Acc>{};
}
/// Room for [the tokens of a chunk, cols].
template <class Acc>
View<Acc> carve_tile(DeviceArena& arena, bool needed, Index tokens, Index cols) {
  if (!needed) return {};
  return arena.matrix<Acc>(tokens < chunk_tokens ? tokens : chunk_tokens, cols);
}

/// A weight matrix as Acc, in its own order: in place, or widened into `room`, which holds it row-major or transposed.
template <class Acc, class W>
View<const Acc> load_weights(const Backend& be, View<const W> w, View<Acc> room) {
  return load(be, w, Dropout{}, room);
}
template <class Acc, class W>
View<const Acc, Major::column> load_weights(const Backend& be, View<const W, Major::column> w, View<Acc> room) {
  return load(be, w.transposed(), Dropout{}, room).transposed();
}

/// A gradient that sums over tokens, chunk after chunk: in place where it is Acc, else in `room`, rounded once at the end.
template <class Acc, class G>
struct TokenSum {
  View<G> out;  // null: not wanted
  Into into;
  View<Acc> room;

  bool wanted() const { return out.data != nullptr; }
  /// += α leftᵀ right.
  void add(const Blas& blas, Acc alpha, View<const Acc> left, View<const Acc> right, bool first) const {
    if constexpr (widened<G, Acc>) {
      blas.multiply(alpha, left.transposed(), right, room, first ? Into::set : Into::add);
    } else {
      blas.multiply(alpha, left.transposed(), right, out, first ? into : Into::add);
    }
  }
  void finish(const Backend& be) const {
    if constexpr (widened<G, Acc>) store(be, View<const Acc>(room), out, into);
  }
};

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
