// Routers and weightings, literally from MATH.md sections 2 and 3, in double: one row at a time, Jacobians written out.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/draws.hpp"

namespace loramix_test::reference {

using Row = std::vector<double>;
using Ids = std::vector<int>;

/// e^(ℓ_i/τ) / Σ e^(ℓ_j/τ); any NaN makes all NaN; nothing but −∞ makes all 0.
inline Row softmax_of(const Row& logits, double temperature) {
  const std::size_t n = logits.size();
  Row p(n, std::numeric_limits<double>::quiet_NaN());
  double top = -std::numeric_limits<double>::infinity();
  for (const double l : logits) {
    if (std::isnan(l)) return p;
    top = std::max(top, l);
  }
  if (top == -std::numeric_limits<double>::infinity()) return Row(n, 0.0);
  double sum = 0;
  for (const double l : logits) sum += std::exp((l - top) / temperature);
  for (std::size_t i = 0; i < n; ++i) p[i] = std::exp((logits[i] - top) / temperature) / sum;
  return p;
}

/// Expert indices, largest float key first, ties to the lower index, NaN last.
inline Ids descending(const Row& keys) {
  Ids order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const float x = static_cast<float>(keys[static_cast<std::size_t>(a)]);
    const float y = static_cast<float>(keys[static_cast<std::size_t>(b)]);
    return std::isnan(y) ? !std::isnan(x) : x > y;
  });
  return order;
}

struct RouteRule {
  int k = 2;
  bool sigmoid = false, renormalise = true;
  double temperature = 1, route_scale = 1, top_p = 0;
  Row bias;  // for the selection; empty: none
};

struct Route {
  Row q, p;     // the scores that weights are made of, and the full probabilities
  Ids ids;      // [k], −1 = none
  Row weights;  // [k]
};

inline Route route(const Row& logits, const RouteRule& rule) {
  const std::size_t n = logits.size();
  Route r;
  r.p = softmax_of(logits, rule.temperature);
  r.q = r.p;
  if (rule.sigmoid) {
    double sum = 0;
    for (std::size_t e = 0; e < n; ++e) sum += r.q[e] = 1 / (1 + std::exp(-logits[e]));
    for (std::size_t e = 0; e < n; ++e) r.p[e] = sum == 0 ? 0 : r.q[e] / sum;
  }
  Row keys = logits;
  if (!rule.bias.empty()) {
    for (std::size_t e = 0; e < n; ++e) {
      keys[e] = static_cast<double>(static_cast<float>(r.q[e]) + static_cast<float>(rule.bias[e]));
    }
  }
  const Ids order = descending(keys);
  double reached = 0, sum = 0;
  for (int s = 0; s < rule.k; ++s) {
    const int e = order[static_cast<std::size_t>(s)];
    const bool full = rule.top_p > 0 && reached >= rule.top_p;
    r.ids.push_back(full ? -1 : e);
    if (full) continue;
    reached += r.p[static_cast<std::size_t>(e)];
    sum += r.q[static_cast<std::size_t>(e)];
  }
  bool broken = false;
  for (const double l : logits) broken = broken || std::isnan(l);
  for (const int e : r.ids) {
    double w = e < 0 ? 0 : r.q[static_cast<std::size_t>(e)];
    if (rule.renormalise) w = sum == 0 ? 0 : w / sum;
    r.weights.push_back(broken ? std::numeric_limits<double>::quiet_NaN() : rule.route_scale * w);
  }
  return r;
}

/// dℓ_j = Σ_s dw_s ∂w_s/∂ℓ_j + Σ_i dp_i ∂p_i/∂ℓ_j, every derivative by itself.
inline Row route_backward(const Route& r, const RouteRule& rule, const Row& dw, const Row& dp) {
  const std::size_t n = r.p.size(), k = r.ids.size();
  double chosen_sum = 0, all = 0;
  for (const int e : r.ids) chosen_sum += e < 0 ? 0 : r.q[static_cast<std::size_t>(e)];
  for (const double q : r.q) all += q;
  const auto slope_of_q = [&](std::size_t i, std::size_t j) {  // ∂q_i/∂ℓ_j
    const double same = i == j ? 1 : 0;
    return rule.sigmoid ? same * r.q[i] * (1 - r.q[i]) : r.q[i] * (same - r.q[j]) / rule.temperature;
  };
  Row out(n, 0.0);
  for (std::size_t j = 0; j < n; ++j) {
    for (std::size_t s = 0; s < k; ++s) {
      if (r.ids[s] < 0 || (rule.renormalise && chosen_sum == 0)) continue;
      const std::size_t i = static_cast<std::size_t>(r.ids[s]);
      for (std::size_t m = 0; m < k; ++m) {
        if (r.ids[m] < 0) continue;
        const std::size_t l = static_cast<std::size_t>(r.ids[m]);
        const double same = s == m ? 1 : 0;
        const double of_score =
            rule.renormalise ? (same * chosen_sum - r.q[i]) / (chosen_sum * chosen_sum) : same;  // ∂w_s/∂q_l
        out[j] += dw[s] * rule.route_scale * of_score * slope_of_q(l, j);
      }
    }
    for (std::size_t i = 0; i < n; ++i) {
      if (!rule.sigmoid) out[j] += dp[i] * slope_of_q(i, j);
      if (!rule.sigmoid || all == 0) continue;
      const double same = i == j ? 1 : 0;  // p_i = q_i/Σq
      out[j] += dp[i] * (same * all - r.q[i]) / (all * all) * r.q[j] * (1 - r.q[j]);
    }
  }
  return out;
}

/// Column i of a row of standard normals: pairs of uniforms by Box and Muller.
inline double normal(std::uint64_t key, std::uint32_t purpose, std::uint64_t row, int i) {
  const auto uniform = [&](int column) {
    const Words words = philox(key, {static_cast<std::uint32_t>(column / 4), purpose, static_cast<std::uint32_t>(row),
                                     static_cast<std::uint32_t>(row >> 32)});
    return (words[static_cast<std::size_t>(column % 4)] + 0.5) / 4294967296.0;
  };
  const double radius = std::sqrt(-2 * std::log(uniform(i / 2 * 2))), angle = 2 * M_PI * uniform(i / 2 * 2 + 1);
  return radius * (i % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

/// A noisy logit: ℓ + n·(softplus(ν) + 0.01).
inline double noisy(double logit, double raw, double n) { return logit + n * (std::log(1 + std::exp(raw)) + 0.01); }

/// ids [T][k] after capacity: C = ⌈cf·k·T/E − 1e-6⌉ places per expert for the valid tokens, by order of arrival or, with
/// `priority`, larger weights first, ties by (token, slot). Padding takes no place and keeps its choices.
inline std::vector<Ids> with_capacity(std::vector<Ids> ids, const std::vector<Row>& weights, int experts, double cf,
                                      bool priority, const std::vector<unsigned char>& valid) {
  const int k = static_cast<int>(ids[0].size()), T = static_cast<int>(ids.size());
  int tokens = 0;
  for (int t = 0; t < T; ++t) tokens += valid.empty() || valid[static_cast<std::size_t>(t)] != 0;
  const int places = static_cast<int>(std::ceil(cf * k * tokens / experts - 1e-6));
  struct Wish {
    std::size_t t, s;
    double weight;
  };
  for (int e = 0; e < experts; ++e) {
    std::vector<Wish> wanted;
    for (std::size_t t = 0; t < ids.size(); ++t) {
      if (!valid.empty() && valid[t] == 0) continue;
      for (std::size_t s = 0; s < ids[t].size(); ++s) {
        if (ids[t][s] == e) wanted.push_back({t, s, weights[t][s]});
      }
    }
    if (priority) {
      std::stable_sort(wanted.begin(), wanted.end(), [](const Wish& a, const Wish& b) {
        return std::isnan(b.weight) ? !std::isnan(a.weight) : a.weight > b.weight;
      });
    }
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      if (static_cast<int>(i) >= places) ids[wanted[i].t][wanted[i].s] = -1;
    }
  }
  return ids;
}

/// TeamLoRA: φ = softmax(S(x)), ω = M φ. h = S₁x without its bias; S₂ empty: S is linear.
struct CompetitionRow {
  Row logits, phi, omega;
};
enum class Ablation { none, identity, equal };
inline CompetitionRow competition(const Row& h, const Row& b1, const Grid<double>& S2, const Row& b2,
                                  const Grid<double>& M, Ablation ablation) {
  const std::size_t n = b2.size();
  CompetitionRow row{b2, Row(n), Row(n, 0.0)};
  for (std::size_t e = 0; e < n; ++e) {
    if (S2.empty()) row.logits[e] += h[e];
    for (std::size_t i = 0; i < b1.size(); ++i) {
      const double z = h[i] + b1[i];
      row.logits[e] += S2(static_cast<Index>(e), static_cast<Index>(i)) * z / (1 + std::exp(-z));
    }
  }
  row.phi = ablation == Ablation::equal ? Row(n, 1.0 / static_cast<double>(n)) : softmax_of(row.logits, 1);
  for (std::size_t e = 0; e < n; ++e) {
    for (std::size_t f = 0; f < n; ++f) {
      const double m =
          ablation == Ablation::identity ? (e == f ? 1 : 0) : M(static_cast<Index>(e), static_cast<Index>(f));
      row.omega[e] += m * row.phi[f];
    }
  }
  return row;
}

}  // namespace loramix_test::reference
