// MATH.md section 5 and the Shapley games of section 3 as literal sums in double. No loramix header.
#pragma once

#include <cmath>
#include <functional>
#include <vector>

#include "reference/grid.hpp"

namespace loramix_test::reference {

using Mask = std::vector<std::uint8_t>;    // per row
using Labels = std::vector<std::int32_t>;  // per row or sequence
using Chosen = Grid<std::int32_t>;         // [T, k], −1 = none
using Sequence = std::vector<Index>;       // of every token, −1 = none

inline bool in(const Mask& valid, Index t) { return valid.empty() || valid[static_cast<std::size_t>(t)] != 0; }
inline double valid_rows(const Mask& valid, Index rows) {
  double n = 0;
  for (Index t = 0; t < rows; ++t) n += in(valid, t) ? 1 : 0;
  return n;
}
inline double count_of(const Chosen& chosen, const Mask& valid, Index e) {
  double n = 0;
  for (Index t = 0; t < chosen.rows(); ++t) {
    for (Index s = 0; in(valid, t) && s < chosen.cols(); ++s) n += chosen(t, s) == e ? 1 : 0;
  }
  return n;
}
inline double importance_of(const Grid<double>& p, const Mask& valid, Index e) {
  double sum = 0;
  for (Index t = 0; t < p.rows(); ++t) sum += in(valid, t) ? p(t, e) : 0;
  return sum;
}
inline double cv2(const std::vector<double>& q) {
  const double n = static_cast<double>(q.size());
  if (q.size() < 2) return 0;
  double mean = 0, variance = 0;
  for (const double v : q) mean += v / n;
  for (const double v : q) variance += (v - mean) * (v - mean) / (n - 1);
  return variance / (mean * mean + 1e-10);
}

/// Σ_i f_i P_i times E; `divided_by_k`: MoLA.
inline double balance(const Grid<double>& p, const Chosen& chosen, const Mask& valid, bool divided_by_k) {
  const double tokens = valid_rows(valid, p.rows());
  double sum = 0;
  for (Index e = 0; tokens > 0 && e < p.cols(); ++e) {
    const double f = count_of(chosen, valid, e) / (tokens * (divided_by_k ? static_cast<double>(chosen.cols()) : 1));
    sum += f * importance_of(p, valid, e) / tokens;
  }
  return static_cast<double>(p.cols()) * sum;
}
inline double importance_cv2(const Grid<double>& p, const Mask& valid) {
  std::vector<double> q;
  for (Index e = 0; e < p.cols(); ++e) q.push_back(importance_of(p, valid, e));
  return cv2(q);
}

/// p's rows of one sequence, the others masked.
inline Mask only(const Sequence& sequence, Index b, const Mask& valid) {
  Mask mask(sequence.size());
  for (std::size_t t = 0; t < mask.size(); ++t) mask[t] = sequence[t] == b && in(valid, static_cast<Index>(t)) ? 1 : 0;
  return mask;
}
inline double localised(const Grid<double>& p, const Sequence& sequence, const Labels& types, const Mask& valid,
                        double delta) {
  std::vector<double> q;
  for (std::size_t b = 0; b < types.size(); ++b) {
    const Mask mask = only(sequence, static_cast<Index>(b), valid);
    if (valid_rows(mask, p.rows()) == 0) continue;
    for (Index e = 0; e < p.cols(); ++e) {
      const bool own = (e < p.cols() / 2 && types[b] == 1) || (e >= p.cols() / 2 && types[b] == 0);
      q.push_back((own ? 1 + delta : 1 - delta) * importance_of(p, mask, e));
    }
  }
  return cv2(q);
}
inline double sequence_wise(const Grid<double>& p, const Chosen& chosen, const Sequence& sequence, Index sequences,
                            const Mask& valid) {
  double sum = 0, n = 0;
  for (Index b = 0; b < sequences; ++b) {
    const Mask mask = only(sequence, b, valid);
    if (valid_rows(mask, p.rows()) == 0) continue;
    sum += balance(p, chosen, mask, true);
    n += 1;
  }
  return n == 0 ? 0 : sum / n;
}

inline double log_sum_exp(const Grid<double>& logits, Index t) {
  double sum = 0;
  for (Index c = 0; c < logits.cols(); ++c) sum += std::exp(logits(t, c));
  return std::log(sum);
}
inline double z_loss(const Grid<double>& logits, const Mask& valid) {
  double sum = 0;
  for (Index t = 0; t < logits.rows(); ++t) sum += in(valid, t) ? std::pow(log_sum_exp(logits, t), 2) : 0;
  const double n = valid_rows(valid, logits.rows());
  return n == 0 ? 0 : sum / n;
}
inline double cross_entropy(const Grid<double>& logits, const Labels& labels, const Mask& valid) {
  double sum = 0, n = 0;
  for (Index t = 0; t < logits.rows(); ++t) {
    const Index label = labels[static_cast<std::size_t>(t)];
    if (label < 0 || !in(valid, t)) continue;
    sum += log_sum_exp(logits, t) - logits(t, label);
    n += 1;
  }
  return n == 0 ? 0 : sum / n;
}
inline double squared_error(const Grid<double>& y, const Grid<double>& target, const Mask& valid) {
  double sum = 0, n = 0;
  for (Index t = 0; t < y.rows(); ++t) {
    for (Index c = 0; in(valid, t) && c < y.cols(); ++c) {
      sum += std::pow(y(t, c) - target(t, c), 2);
      n += 1;
    }
  }
  return n == 0 ? 0 : sum / n;
}

inline double contrastive(const Grid<double>& x, const Grid<double>& e, const Sequence& sequence, const Labels& labels,
                          const Mask& valid, double temperature, bool mean) {
  Grid<double> cosines(static_cast<Index>(labels.size()), e.rows());
  Labels counted = labels;
  for (std::size_t b = 0; b < labels.size(); ++b) {
    std::vector<double> h(static_cast<std::size_t>(x.cols()));
    double n = 0;
    for (Index t = 0; t < x.rows(); ++t) {
      if (sequence[static_cast<std::size_t>(t)] != static_cast<Index>(b) || !in(valid, t) || (n > 0 && !mean)) continue;
      for (Index j = 0; j < x.cols(); ++j) h[static_cast<std::size_t>(j)] += x(t, j);
      n += 1;
    }
    if (n == 0) counted[b] = -1;
    for (Index task = 0; task < e.rows(); ++task) {
      double dot = 0, hh = 0, ee = 0;
      for (Index j = 0; j < x.cols(); ++j) {
        const double v = n == 0 ? 0 : h[static_cast<std::size_t>(j)] / n;
        dot += v * e(task, j);
        hh += v * v;
        ee += e(task, j) * e(task, j);
      }
      const double norms = std::sqrt(hh * ee);
      cosines(static_cast<Index>(b), task) = (norms == 0 ? 0 : dot / norms) / temperature;
    }
  }
  return cross_entropy(cosines, counted, {});
}

/// Of every expert: Σ over all orders of the marginal contribution / their number.
inline std::vector<double> shapley_by_orders(Index experts, const std::function<double(std::uint64_t)>& v) {
  std::vector<double> phi(static_cast<std::size_t>(experts));
  double orders = 0;
  const std::function<void(std::uint64_t)> extend = [&](std::uint64_t before) {
    bool last = true;
    for (Index e = 0; e < experts; ++e) last = last && (before >> e & 1) != 0;
    if (last) orders += 1;
    // Every completion of an order passes here once: (n − |before| − 1)! of them share one step.
    for (Index e = 0; e < experts; ++e) {
      if ((before >> e & 1) != 0) continue;
      double completions = 1;
      Index rest = -1;
      for (Index i = 0; i < experts; ++i) rest += (before >> i & 1) == 0 ? 1 : 0;
      for (Index i = 2; i <= rest; ++i) completions *= static_cast<double>(i);
      phi[static_cast<std::size_t>(e)] += completions * (v(before | std::uint64_t{1} << e) - v(before));
      extend(before | std::uint64_t{1} << e);
    }
  };
  extend(0);
  for (double& value : phi) value /= orders;
  return phi;
}
inline double shapley_divergence(const Grid<double>& phi, const Grid<double>& logits, const Mask& valid,
                                 double temperature) {
  double sum = 0, n = 0;
  const double experts = static_cast<double>(phi.cols());
  for (Index t = 0; t < phi.rows(); ++t) {
    if (!in(valid, t)) continue;
    double mean = 0, variance = 0, target_sum = 0, own_sum = 0;
    for (Index e = 0; e < phi.cols(); ++e) mean += phi(t, e) / experts;
    for (Index e = 0; e < phi.cols(); ++e) variance += (phi(t, e) - mean) * (phi(t, e) - mean) / (experts - 1);
    const auto target = [&](Index e) { return std::exp(phi(t, e) / std::sqrt(variance) / temperature); };
    for (Index e = 0; e < phi.cols(); ++e) {
      target_sum += target(e);
      own_sum += std::exp(logits(t, e));
    }
    for (Index e = 0; e < phi.cols(); ++e) {
      const double p = target(e) / target_sum, q = std::exp(logits(t, e)) / own_sum;
      sum += p * std::log(p / q);
    }
    n += 1;
  }
  return n == 0 ? 0 : sum / n;
}

}  // namespace loramix_test::reference
