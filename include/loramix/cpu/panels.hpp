/// Weights in the order in which a contraction over features reads them.
///
/// Computes:    panels of a [R, d] weight: for every sweep of columns [k, k + n), for every panel of ranks, n rows of the
///              panel's ranks side by side, 16-bit values widened, zeros behind the last rank. Panels are 4, 2 or 1 packets
///              wide, the widest first.
/// Reads:       W [R, d] in either order.
/// Writes:      panels [d · R rounded up to packets].
/// Errors:      none.
/// Cost:        one pass over W; a quarter of a cycle per value where a rank's values are consecutive.
/// Determinism: a copy.
/// Example:     cpu/contract.hpp
#pragma once
#include <loramix/cpu/backend.hpp>
#include <loramix/cpu/kernels.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// f(packets of the panel, a constant; its first rank) for every panel of `ranks`.
template <int Packets = RegisterTile::wide, class F>
[[gnu::always_inline]] inline void for_panels(Index ranks, F&& f, Index begin = 0) {
  constexpr Index wide = Packets * width;
  if constexpr (Packets == 1) {
    for (; begin < ranks; begin += wide) f(std::integral_constant<int, 1>{}, begin);
  } else {
    for (; begin + wide - width < ranks; begin += wide) f(std::integral_constant<int, Packets>{}, begin);
    for_panels<Packets / 2>(ranks, f, begin);
  }
}

/// Where things lie in packed weights.
struct PanelLayout {
  Index ranks = 0;  // R
  Index depth = 0;  // d
  Index sweep = 0;  // columns of one sweep

  Index padded() const { return round_up(ranks, width); }
  Index size() const { return padded() * depth; }
  Index sweeps() const { return blocks_of(depth, sweep); }
  Index columns(Index i) const { return smaller(sweep, depth - i * sweep); }
  /// The panel that begins with rank `begin`, in sweep i.
  Index offset(Index i, Index begin) const { return i * sweep * padded() + begin * columns(i); }
};

/// to[k · step + j] = w(r + j, k0 + k) for k in [0, n), j in [0, width); ranks from R on are zero.
template <class W>
void pack_packet(MatrixView<const W> w, Index r, Index k0, Index n, float* to, Index step) {
  const Index ranks = smaller(width, w.rows - r);
  for (Index k = 0; k < n; k += width) {
    const Index columns = smaller(width, n - k);
    Packet block[width];
    unroll<width>([&](auto j) {
      block[j] = splat(0);
      if (j < ranks) {
        const W* const from = w.row(r + j) + k0 + k;
        block[j] = columns == width ? load(from) : load_part(from, columns);
      }
    });
    transpose(block);
    unroll<width>([&](auto j) {
      if (j < columns) store(to + (k + j) * step, block[j]);
    });
  }
}
template <class W>
void pack_packet(MatrixView<const W, Space::host, Major::column> w, Index r, Index k0, Index n, float* to, Index step) {
  const Index ranks = smaller(width, w.rows - r);
  for (Index k = 0; k < n; ++k) {
    const W* const from = &w(r, k0 + k);
    store(to + k * step, ranks == width ? load(from) : load_part(from, ranks));
  }
}

/// All panels, in parallel.
template <class E, class W, Major M>
void pack(const Backend<E>& be, MatrixView<const W, Space::host, M> w, const PanelLayout& layout, float* panels) {
  const Index packets = layout.padded() / width;
  be.run(layout.sweeps() * packets, [&](Index job, Index) {
    const Index i = job / packets, packet = job % packets;
    for_panels(layout.ranks, [&](auto wide, Index begin) {
      const Index inside = packet - begin / width;
      if (inside < 0 || inside >= wide) return;
      pack_packet(w, packet * width, i * layout.sweep, layout.columns(i),
                  panels + layout.offset(i, begin) + inside * width, wide * width);
    });
  });
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
