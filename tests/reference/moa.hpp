// MoA as MATH.md section 4 writes it: a router of sequences, one LoRA per sequence, the routing loss. Literal loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/grid.hpp"

namespace loramix_test::reference {

struct MoaCase {
  Index tokens, d_in, d_out, experts, rank;
  std::vector<double> x, A, B, W, b;  // [T, d_in], [E·r, d_in], [E·r, d_out] (rank by rank), [E, d_in], [E]
  std::vector<Index> offsets;         // of sequences
  std::vector<int> label;             // [sequences], −1 = none
  std::vector<int> valid;             // [T]
  std::vector<double> kept;           // [T, d_in]: 0 or 1/(1 − p̄)
  double scale;
  bool last;  // pooling: the last valid row, else the mean

  Index sequences() const { return static_cast<Index>(label.size()); }
  double at(const std::vector<double>& m, Index i, Index cols, Index j) const {
    return m[static_cast<std::size_t>(i * cols + j)];
  }

  std::vector<double> logits(Index s) const {
    std::vector<double> v(static_cast<std::size_t>(d_in), 0.0);
    double n = 0;
    for (Index t = offsets[static_cast<std::size_t>(s)]; t < offsets[static_cast<std::size_t>(s) + 1]; ++t) {
      if (valid[static_cast<std::size_t>(t)] == 0) continue;
      if (last) n = 0;
      n += 1;
      for (Index c = 0; c < d_in; ++c) {
        double& value = v[static_cast<std::size_t>(c)];
        value = (last ? 0.0 : value) + at(x, t, d_in, c);
      }
    }
    std::vector<double> l(b);
    for (Index e = 0; e < experts; ++e) {
      for (Index c = 0; n > 0 && c < d_in; ++c) {
        l[static_cast<std::size_t>(e)] += at(W, e, d_in, c) * v[static_cast<std::size_t>(c)] / n;
      }
    }
    return l;
  }
  std::vector<double> p(Index s) const {
    std::vector<double> l = logits(s);
    double sum = 0;
    for (double& v : l) sum += v = std::exp(v);
    for (double& v : l) v /= sum;
    return l;
  }
  Index expert(Index s) const {
    if (label[static_cast<std::size_t>(s)] >= 0) return label[static_cast<std::size_t>(s)];
    const std::vector<double> l = logits(s);
    Index best = 0;
    for (Index e = 1; e < experts; ++e) {
      if (l[static_cast<std::size_t>(e)] > l[static_cast<std::size_t>(best)]) best = e;
    }
    return best;
  }
  /// ΔY(t, o) with sequence s's expert e.
  double delta(Index t, Index o, Index e) const {
    double y = 0;
    for (Index j = e * rank; j < (e + 1) * rank; ++j) {
      double u = 0;
      for (Index c = 0; c < d_in; ++c) u += at(x, t, d_in, c) * at(kept, t, d_in, c) * at(A, j, d_in, c);
      y += u * at(B, j, d_out, o);
    }
    return scale * y;
  }
  Index sequence(Index t) const {
    Index s = 0;
    while (t >= offsets[static_cast<std::size_t>(s) + 1]) ++s;
    return s;
  }
  /// Mean cross-entropy over the labelled sequences.
  double routing_loss() const {
    double sum = 0, n = 0;
    for (Index s = 0; s < sequences(); ++s) {
      if (label[static_cast<std::size_t>(s)] < 0) continue;
      sum -= std::log(p(s)[static_cast<std::size_t>(label[static_cast<std::size_t>(s)])]);
      n += 1;
    }
    return n == 0 ? 0 : sum / n;
  }
};

}  // namespace loramix_test::reference
