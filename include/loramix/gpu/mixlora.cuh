/// The middle of a feed-forward block on the GPU (ops/mixlora.hpp), composed: for chunk after chunk of 1024 tokens and
/// expert after expert, cuBLAS products of all tokens and a row body that selects those that chose the expert.
///
/// Computes:    MixExperts, MixExpertsBackward. Nothing is read on the host: who chose whom stays on the device.
/// Reads / Writes / Adds to: as the ops say; strided views are used as they are.
/// Errors:      as the ops say, before the first launch; cuBLAS and CUDA failures (ErrorCode::device). A bad id contributes
///              nothing and sets the backend's StatusFlags.
/// Cost:        6·T·E·r·ff flop forward, 18 backward. Scratch beside cuBLAS's: widened weights, tiles [1024, ff] (three
///              forward, five backward) and [1024, 3r].
/// Determinism: sums over tokens add chunk after chunk; the order inside a chunk is cuBLAS's. Run to run the same bits.
/// Example:     tests/gpu/mixlora.cu
#pragma once
#include <loramix/gpu/staging.cuh>
#include <loramix/ops/mixlora.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

/// Row body: out[t] = (s Z1_e, s Z3_e, dZ2_e) of a token that chose expert e, else 0. A view that is empty is left out.
/// The first expert's launch also flags bad ids and clears the gradients of closed choices.
template <class Acc, class Score>
struct MixSelect {
  GateForm<Score, Space::device> gate;
  View<const Acc> z1, z3, dz2;
  Acc scale;
  Index first_token, expert, rank;
  View<Acc> out;         // [n, 3r]
  View<Score> dweights;  // [T, k] or empty

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    const Index t = first_token + i;
    const GateRow<Acc, Score, Space::device> row(gate, t);
    if (expert == 0) {
      team.each(gate.ids.cols, [&](Index s) {
        if (row.expert_at(s) < 0 && dweights.data != nullptr) dweights(t, s) = Score(0);
      });
    }
    const bool open = row.slot(expert) >= 0;
    team.each(rank, [&](Index j) {
      const Index at = expert * rank + j;
      out(i, j) = open ? scale * z1(t, at) : Acc(0);
      out(i, rank + j) = open ? scale * z3(t, at) : Acc(0);
      if (dz2.data != nullptr) out(i, 2 * rank + j) = open ? dz2(t, at) : Acc(0);
    });
  }
};

/// Row body: sum += g h and t1 = g ĥ of a token that chose expert e; t1 = 0 of the others. The first expert's clears sum.
template <class Acc, class Score>
struct MixHidden {
  GateForm<Score, Space::device> gate;
  Dropout dropout;
  Index first_token, expert;
  View<Acc> t1, t3, sum;  // [n, ff]

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    const Index t = first_token + i, slot = loramix::detail::chosen_slot(gate, t, expert);
    if (expert == 0) team.each(sum.cols, [&](Index c) { sum(i, c) = Acc(0); });
    if (slot < 0) {
      team.each(t1.cols, [&](Index c) { t1(i, c) = Acc(0); });
    } else {
      loramix::detail::mix_row(team, t1.cols, loramix::detail::MixMask{dropout, t},
                               widen<Acc>(gate.id_weights(t, slot)), t1.row(i), t3.row(i), sum.row(i));
    }
  }
};

/// Row body: its backward. Of a token that chose expert e, t1 = dt1, t3 = dt3, q = g ĥ; 0 of the others.
template <class X, class Acc, class Score>
struct MixHiddenBackward {
  GateForm<Score, Space::device> gate;
  Dropout dropout;
  Index first_token, expert;
  View<const X> dhbar;          // [T, ff]
  View<Acc> t1, t3, q, du, dv;  // [n, ff]
  View<Score> dweights;         // [T, k] or empty

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    const Index t = first_token + i, slot = loramix::detail::chosen_slot(gate, t, expert);
    if (expert == 0) team.each(du.cols, [&](Index c) { du(i, c) = dv(i, c) = Acc(0); });
    if (slot < 0) {
      team.each(t1.cols, [&](Index c) { t1(i, c) = t3(i, c) = q(i, c) = Acc(0); });
      return;
    }
    const Acc dg = loramix::detail::mix_row_backward(team, t1.cols, loramix::detail::MixMask{dropout, t},
                                                     widen<Acc>(gate.id_weights(t, slot)), dhbar.row(t), t1.row(i),
                                                     t3.row(i), q.row(i), du.row(i), dv.row(i));
    if (dweights.data != nullptr) team.once([&] { dweights(t, slot) = narrow<Score>(dg); });
  }
};

/// Room for B [ff, E·r] as Acc, row-major in the order of storage.
template <class T, class Acc, Major M>
View<Acc> carve_up(DeviceArena& arena, Index width, Index ranks) {
  return carve_widened<T, Acc>(arena, M == Major::row ? width : ranks, M == Major::row ? ranks : width);
}

template <class Acc>
struct MixScratch {
  std::byte* blas;
  View<Acc> B1, B3, A2;   // widened
  View<Acc> left;         // [chunk, 3r]
  View<Acc> t1, t3, sum;  // [chunk, ff]
};
template <class X, class W, class Acc, class Score, Major M>
MixScratch<Acc> carve(DeviceArena& arena, const Backend& be, const MixExperts<X, W, Acc, Score, Space::device, M>& op) {
  const Index tokens = op.z1.rows, width = op.u.cols, ranks = op.z1.cols;
  const auto tile = [&](Index cols) { return carve_tile<Acc>(arena, true, tokens, cols); };
  return {carve_blas(arena, be),
          carve_up<W, Acc, M>(arena, width, ranks),
          carve_up<W, Acc, M>(arena, width, ranks),
          carve_widened<W, Acc>(arena, ranks, width),
          tile(3 * (ranks / op.gate.experts)),
          tile(width),
          tile(width),
          tile(width)};
}

template <class Acc>
struct MixBackwardScratch {
  std::byte* blas;
  View<Acc> B1, B3, A2;         // widened
  View<Acc> left;               // [chunk, 3r]
  View<Acc> t1, t3, q, du, dv;  // [chunk, ff]
  View<Acc> dB1, dB3, dA2;      // sums, in the order of storage
};
template <class X, class W, class Acc, class Score, class G, Major M>
MixBackwardScratch<Acc> carve(DeviceArena& arena, const Backend& be,
                              const MixExpertsBackward<X, W, Acc, Score, G, Space::device, M>& op) {
  const Index tokens = op.z1.rows, width = op.u.cols, ranks = op.z1.cols;
  const auto tile = [&](Index cols) { return carve_tile<Acc>(arena, true, tokens, cols); };
  return {carve_blas(arena, be),
          carve_up<W, Acc, M>(arena, width, ranks),
          carve_up<W, Acc, M>(arena, width, ranks),
          carve_widened<W, Acc>(arena, ranks, width),
          tile(3 * (ranks / op.gate.experts)),
          tile(width),
          tile(width),
          tile(width),
          tile(width),
          tile(width),
          carve_up<G, Acc, M>(arena, width, ranks),
          carve_up<G, Acc, M>(arena, width, ranks),
          carve_widened<G, Acc>(arena, ranks, width)};
}

/// out = v + left B_eᵀ for the rows of a chunk.
template <class Acc, class X, Major M>
void activation(const Backend& be, const Blas& blas, View<const X> v, View<const Acc> left, View<const Acc, M> B,
                View<Acc> out) {
  for_wide_rows(be, v.rows, LoadRow<X, Acc>{v, {}, out});
  if (left.cols != 0) blas.multiply(Acc(1), left, B.transposed(), out, Into::add);
}

/// The gradient of a B, or of its transpose, whichever is row-major: expert e's rows or columns.
template <class Acc, class G, Major M>
TokenSum<Acc, G> up_gradient(View<G, M> dB, Into into, View<Acc> room, Index begin, Index ranks) {
  if (dB.data == nullptr) return {};
  if constexpr (M == Major::row) {
    return {dB.col_range(begin, ranks), into, room.col_range(begin, ranks)};
  } else {
    return {dB.transposed().row_range(begin, ranks), into, room.row_range(begin, ranks)};
  }
}
}  // namespace detail

template <class X, class W, class Acc, class Score, Major M>
Index scratch_impl(const Backend& be, const MixExperts<X, W, Acc, Score, Space::device, M>& op) {
  return carved_bytes<Space::device>([&](DeviceArena& arena) { detail::carve(arena, be, op); });
}

template <class X, class W, class Acc, class Score, Major M>
void execute_impl(const Backend& be, const MixExperts<X, W, Acc, Score, Space::device, M>& op, DeviceArena work) {
  using namespace detail;
  const MixScratch<Acc> scratch = carve(work, be, op);
  const Blas blas(be, scratch.blas);
  auto gate = op.gate;
  if (be.status != nullptr) gate.status = be.status;
  const auto B1 = load_weights(be, op.B1, scratch.B1), B3 = load_weights(be, op.B3, scratch.B3);
  const auto A2 = load_weights(be, op.A2, scratch.A2);
  const Index experts = gate.experts, r = op.z1.cols / experts;
  for_chunks(op.z1.rows, [&](Index t, Index n) {
    if (n == 0) return;
    const auto of_chunk = [n](View<Acc> tile) { return tile.row_range(0, n); };
    const auto left = of_chunk(scratch.left), t1 = of_chunk(scratch.t1), t3 = of_chunk(scratch.t3);
    const auto sum = of_chunk(scratch.sum);
    const View<const Acc> selected = left;
    for (Index e = 0; e < experts; ++e) {
      launch_rows<WarpTeam, warps_per_block>(
          be, n, MixSelect<Acc, Score>{gate, op.z1, op.z3, {}, op.scale, t, e, r, left, {}});
      activation(be, blas, op.u.row_range(t, n), selected.col_range(0, r), B1.col_range(e * r, r), t1);
      activation(be, blas, op.v.row_range(t, n), selected.col_range(r, r), B3.col_range(e * r, r), t3);
      for_wide_rows(be, n, MixHidden<Acc, Score>{gate, op.dropout, t, e, t1, t3, sum});
      blas.multiply(Acc(1), View<const Acc>(t1), A2.row_range(e * r, r).transposed(), op.z2.block(t, n, e * r, r),
                    Into::set);
    }
    store(be, View<const Acc>(sum), op.hbar.row_range(t, n), Into::set);
  });
}

template <class X, class W, class Acc, class Score, class G, Major M>
Index scratch_impl(const Backend& be, const MixExpertsBackward<X, W, Acc, Score, G, Space::device, M>& op) {
  return carved_bytes<Space::device>([&](DeviceArena& arena) { detail::carve(arena, be, op); });
}

template <class X, class W, class Acc, class Score, class G, Major M>
void execute_impl(const Backend& be, const MixExpertsBackward<X, W, Acc, Score, G, Space::device, M>& op,
                  DeviceArena work) {
  using namespace detail;
  const MixBackwardScratch<Acc> scratch = carve(work, be, op);
  const Blas blas(be, scratch.blas);
  auto gate = op.gate;
  if (be.status != nullptr) gate.status = be.status;
  const auto B1 = load_weights(be, op.B1, scratch.B1), B3 = load_weights(be, op.B3, scratch.B3);
  const auto A2 = load_weights(be, op.A2, scratch.A2);
  const Index experts = gate.experts, ranks = op.z1.cols, r = ranks / experts;
  const auto add_up = [&](const TokenSum<Acc, G>& dB, View<const Acc> left, View<const Acc> slope, bool first) {
    if (dB.wanted()) dB.add(blas, Acc(1), M == Major::row ? slope : left, M == Major::row ? left : slope, first);
  };
  for_chunks(op.z1.rows, [&](Index t, Index n) {
    const auto of_chunk = [n](View<Acc> tile) { return tile.row_range(0, n); };
    const auto left = of_chunk(scratch.left), t1 = of_chunk(scratch.t1), t3 = of_chunk(scratch.t3);
    const auto q = of_chunk(scratch.q), du = of_chunk(scratch.du), dv = of_chunk(scratch.dv);
    const View<const Acc> selected = left, dt1 = t1, dt3 = t3, dropped = q;
    for (Index e = 0; e < experts; ++e) {
      launch_rows<WarpTeam, warps_per_block>(
          be, n, MixSelect<Acc, Score>{gate, op.z1, op.z3, op.dz2, op.scale, t, e, r, left, op.dweights});
      const auto z1 = selected.col_range(0, r), z3 = selected.col_range(r, r), dz2 = selected.col_range(2 * r, r);
      const auto B1_e = B1.col_range(e * r, r), B3_e = B3.col_range(e * r, r);
      activation(be, blas, op.u.row_range(t, n), z1, B1_e, t1);
      activation(be, blas, op.v.row_range(t, n), z3, B3_e, t3);
      blas.multiply(Acc(1), dz2, A2.row_range(e * r, r), q, Into::set);
      for_wide_rows(be, n,
                    MixHiddenBackward<X, Acc, Score>{gate, op.dropout, t, e, op.dhbar, t1, t3, q, du, dv, op.dweights});
      blas.multiply(op.scale, dt1, B1_e, op.dz1.block(t, n, e * r, r), Into::set);
      blas.multiply(op.scale, dt3, B3_e, op.dz3.block(t, n, e * r, r), Into::set);
      add_up(up_gradient(op.dB1, op.parameters, scratch.dB1, e * r, r), z1, dt1, t == 0);
      add_up(up_gradient(op.dB3, op.parameters, scratch.dB3, e * r, r), z3, dt3, t == 0);
      if (op.dA2.data != nullptr) {
        const TokenSum<Acc, G> dA2{op.dA2.row_range(e * r, r), op.parameters, scratch.dA2.row_range(e * r, r)};
        dA2.add(blas, Acc(1), dz2, dropped, t == 0);
      }
    }
    store(be, View<const Acc>(du), op.du.row_range(t, n), Into::set);
    store(be, View<const Acc>(dv), op.dv.row_range(t, n), Into::set);
  });
  const auto finish = [&](const TokenSum<Acc, G>& sum) {
    if (sum.wanted()) sum.finish(be);
  };
  finish(up_gradient(op.dB1, op.parameters, scratch.dB1, 0, ranks));
  finish(up_gradient(op.dB3, op.parameters, scratch.dB3, 0, ranks));
  if (op.dA2.data != nullptr) finish(TokenSum<Acc, G>{op.dA2, op.parameters, scratch.dA2});
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
