/// Routers that choose: the k best experts of a token, or the shortest prefix that carries a probability.
///
/// Computes:    logits ℓ = x Wᵀ, with noise ℓ + n·(softplus(x W_noiseᵀ) + 0.01) while training; the k largest, compared as
///              float logits (as score + b with a selection bias), ties to the lower index; NaN last. Weights of the chosen:
///                softmax, renormalised     exp(ℓ/τ) / Σ over the chosen      (k = 1: weight 1, no gradient to the router)
///                softmax                   softmax(ℓ/τ) over all
///                sigmoid                   σ(ℓ), or σ(ℓ) / Σ over the chosen; times route_scale
///              top_p > 0: experts in descending order until their probabilities sum to top_p, at most k.
///              Capacity C = ⌈cf·k·T/E − 1e-6⌉ valid tokens per expert: what comes later (or weighs less) is dropped.
/// Source:      MATH.md section 2; Shazeer et al. 2017 (noise), Switch and DeepSeek-V3 (sigmoid, bias). Capacity's rounding
///              is ours.
///              jitter: the router reads x ∘ U(1 − ε, 1 + ε), the experts x (adapter/forward.hpp).
/// Reads:       router [E, d_in], or [2E, d_in] with the noise's rows below (side rows); the call's selection bias [E].
/// Writes:      State: logits, p [T, E]; ids, weights, chosen [T, k], assigned.
/// Adds to:     dh [T, E or 2E].
/// Errors:      k outside [1, E]; a temperature that is not above 0 and finite as a score; top_p, capacity or jitter out of
///              range; a selection bias that is not [E].
/// Cost:        O(T·(E + k·E)); capacity O(T·k·E), by priority O((T·k)²).
/// Determinism: a row depends on itself only, but for capacity, which depends on the batch by its nature. The same choice
///              on every device where logits agree.
/// Example:     tests/router
#pragma once
#include <cmath>

#include <loramix/core/normal.hpp>
#include <loramix/gate/softmax.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What a logit becomes before it is a weight.
enum class Scoring { softmax, sigmoid };
/// The largest number that a file may give for one.
constexpr Scoring last_of(Scoring) { return Scoring::sigmoid; }
/// Which choices an expert keeps when it is full: earlier (token, slot) first, or larger weights first.
enum class CapacityOrder { arrival, priority };
/// The largest number that a file may give for one.
constexpr CapacityOrder last_of(CapacityOrder) { return CapacityOrder::priority; }

/// How a router chooses; the defaults are MixLoRA's and MoLA's.
struct TopKRule {
  Index k = 2;
  Scoring scoring = Scoring::softmax;
  bool renormalise = true;
  double temperature = 1;  // softmax only
  double route_scale = 1;
  double top_p = 0;     // 0: all k
  double capacity = 0;  // 0: no limit
  CapacityOrder order = CapacityOrder::arrival;
  bool noise = false;  // the router has noise rows
  double jitter = 0;   // ε: the router's input times U(1 − ε, 1 + ε) while training

  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("top_k", self.k);
    f("scoring", self.scoring);
    f("renormalise", self.renormalise);
    f("temperature", self.temperature);
    f("route_scale", self.route_scale);
    f("top_p", self.top_p);
    f("capacity", self.capacity);
    f("capacity_order", self.order);
    f("router_noise", self.noise);
    f("jitter", self.jitter);
  }
};

namespace detail {

template <class T>
LORAMIX_HD T sigmoid(T z) {
  using std::exp;
  return T(1) / (T(1) + exp(-z));
}
template <class T>
LORAMIX_HD T softplus(T z) {
  using std::exp;
  using std::log1p;
  return z > T(0) ? z + log1p(exp(-z)) : log1p(exp(z));
}

/// A place in the order of choice: larger keys first, NaN last, ties to the lower index. No two indices share one.
LORAMIX_HD inline std::uint64_t choice_order(float key, Index e) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(key == 0.0f ? 0.0f : key);  // −0 ties with 0
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u, negative = (bits & 0x80000000u) != 0;
  const std::uint32_t order = nan ? 0u : negative ? ~bits : bits | 0x80000000u;
  return std::uint64_t{order} << 32 | (0xffffffffu - static_cast<std::uint32_t>(e));
}
inline constexpr std::uint64_t before_all = ~std::uint64_t{0};
LORAMIX_HD inline Index index_of(std::uint64_t order) { return 0xffffffffu - static_cast<std::uint32_t>(order); }
/// The first index that comes after `last`, by its place; keys(e) is a float.
template <Team Tm, class Keys>
LORAMIX_HD std::uint64_t next_choice(const Tm& team, Index experts, std::uint64_t last, const Keys& keys) {
  return team.maximum(experts, [&](Index e) {
    const std::uint64_t order = choice_order(keys(e), e);
    return order < last ? order : std::uint64_t{0};
  });
}

/// C of capacity factor cf for `tokens` valid tokens.
LORAMIX_HD inline Index expert_capacity(double cf, Index k, Index tokens, Index experts) {
  return static_cast<Index>(
      std::ceil(cf * static_cast<double>(k) * static_cast<double>(tokens) / static_cast<double>(experts) - 1e-6));
}

}  // namespace detail

/// The k best experts of every token.
template <class W, class Score, Space S = Space::host>
struct TopKGate {
  static constexpr GateFacts facts{Sparsity::k_blocks, Slots::ids | Slots::id_weights, false};
  static constexpr Space space = S;
  struct State {
    MatrixView<Score, S> logits, p;           // [T, E], noisy where noise is drawn
    MatrixView<std::int32_t, S> chosen, ids;  // [T, k], before and after capacity
    MatrixView<Score, S> weights;             // [T, k]
    MatrixView<Score, S> dp, dlogits;         // [T, E] losses add to them
  };

  MatrixView<const W, S> router;  // [E, d_in] or [2E, d_in]
  TopKRule rule;

  LORAMIX_HD Index experts() const { return rule.noise ? router.rows / 2 : router.rows; }
  double jitter() const { return rule.jitter; }
  MatrixView<const W, S> side() const { return router; }

  void check(const char* op, const GateCall<S>& call) const {
    check::at_least(op, "top-k", rule.k, 1);
    check::at_least(op, "experts", experts(), rule.k);
    const auto demand = [op](bool good, const char* what, const char* range) {
      if (!good) fail(check::detail::about(ErrorCode::value, op, what) << " must be " << range);
    };
    const double scale = rule.route_scale;
    check::above_zero(op, "temperature", static_cast<Score>(rule.temperature));
    demand(scale - scale == 0, "route_scale", "finite");
    demand(rule.top_p >= 0 && rule.top_p <= 1, "top_p", "in [0, 1]");
    demand(rule.capacity >= 0 && rule.capacity <= 1e6, "capacity", "in [0, 1e6]");
    demand(rule.jitter >= 0 && rule.jitter < 1, "jitter", "in [0, 1)");
    detail::check_optional(op, "selection bias", call.selection_bias, "the number of experts", experts());
  }
  State carve(Arena<S>& arena, Index tokens, bool training) const {
    State state;
    const auto scores = [&] { return arena.template matrix<Score>(tokens, experts()); };
    const auto choice = [&] { return arena.template matrix<std::int32_t>(tokens, rule.k); };
    state.logits = scores();
    state.p = scores();
    state.chosen = choice();
    state.ids = choice();
    state.weights = arena.template matrix<Score>(tokens, rule.k);
    if (training) {
      state.dp = scores();
      state.dlogits = scores();
    }
    return state;
  }
  GateForm<Score, S> form(const State& state, const GateCall<S>& call, Index ranks) const {
    return TopKExperts<Score, S>{state.ids, state.weights, experts()}.form(call.tokens, ranks);
  }
  GateGradient<Score, S> gradient(const State& state) const { return {.id_weights = state.weights}; }
  Scores<Score, S> scores(const State& state, MatrixView<Score, S>, MatrixView<Score, S>) const {
    return {.logits = state.logits,
            .p = state.p,
            .dlogits = state.dlogits,
            .dp = state.dp,
            .ids = state.ids,
            .weights = state.weights,
            .chosen = state.chosen};
  }

  template <class Backend>
  void forward(const Backend& be, MatrixView<Score, S> h, const State& state, const GateCall<S>& call, Arena<S>) const {
    for_rows<S>(be, call.tokens, forward_rows(h, state, call));
    if (rule.capacity > 0) for_rows<S>(be, experts(), Capacity{*this, state, call});
  }
  template <class Backend, class GradientGate>
  void backward(const Backend& be, MatrixView<Score, S> h, const State& state, const State& dstate,
                MatrixView<Score, S> dh, const GateCall<S>& call, const GradientGate&, Into, Arena<S>) const {
    for_rows<S>(be, call.tokens, backward_rows(h, state, dstate, dh, call));
  }

  /// n of (token, expert).
  LORAMIX_HD Score noise_of(const GateCall<S>& call, Index t, Index e) const {
    return Score(draw_normal(philox_key(call.key), Purpose::router_noise,
                             call.key.first_token + static_cast<std::uint64_t>(t), e));
  }

  // Row bodies are public: nvcc takes no private type as a kernel's argument.
  struct Forward {
    TopKGate gate;
    MatrixView<const Score, S> h;
    State state;
    GateCall<S> call;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index t) const {
      const Index E = gate.experts(), k = gate.rule.k;
      const TopKRule& r = gate.rule;
      Score* const logits = state.logits.row(t);
      Score* const p = state.p.row(t);
      const auto logit = [&](Index e) {
        return r.noise && call.key.on
                   ? h(t, e) + gate.noise_of(call, t, e) * (detail::softplus(h(t, E + e)) + Score(0.01))
                   : h(t, e);
      };
      if (E <= Tm::width) return in_registers(team, t, E, k, logit(team.place() < E ? team.place() : 0));
      team.each(E, [&](Index e) {
        logits[e] = logit(e);
        if (state.dp.data != nullptr) state.dp(t, e) = state.dlogits(t, e) = Score(0);
      });
      if (r.scoring == Scoring::softmax) {
        detail::softmax_row(team, E, logits, Score(r.temperature), p);
      } else {
        const Score sum = team.sum(E, [&](Index e) { return detail::sigmoid(logits[e]); });
        team.each(E, [&](Index e) { p[e] = sum == Score(0) ? Score(0) : detail::sigmoid(logits[e]) / sum; });
      }
      choose(team, t, E, k);
    }

   private:
    /// The same where every thread of the team has one expert, or the first one's again: `logit`.
    template <Team Tm>
    LORAMIX_HD void in_registers(const Tm& team, Index t, Index E, Index k, Score logit) const {
      const TopKRule& r = gate.rule;
      const bool soft = r.scoring == Scoring::softmax;
      const Score sigma = soft ? Score(0) : detail::sigmoid(logit);
      Score p = Score(0);
      if (soft) {
        p = detail::softmax_of(team, E, logit, Score(r.temperature));
      } else {
        const Score sum = team.sum(E, [=](Index) { return sigma; });
        p = sum == Score(0) ? Score(0) : sigma / sum;
      }
      team.each(E, [&](Index e) {
        state.logits(t, e) = logit;
        state.p(t, e) = p;
        if (state.dp.data != nullptr) state.dp(t, e) = state.dlogits(t, e) = Score(0);
      });
      const auto of = [&](Score mine, Index e) {
        return team.sum(E, [=](Index i) { return i == e ? mine : Score(0); });
      };
      const Score score = soft ? p : sigma;
      const bool biased = call.selection_bias.data != nullptr;
      const float key = biased ? static_cast<float>(score) + call.selection_bias[team.place() < E ? team.place() : 0]
                               : static_cast<float>(logit);
      Score sum = Score(0), carried = Score(0),
            weight = Score(0);  // of scores; of p, for top-p; the choice at this place's
      std::int32_t id = -1;     // the choice at this place
      std::uint64_t last = detail::before_all;
      for (Index s = 0; s < k; ++s) {
        last = detail::next_choice(team, E, last, [=](Index) { return key; });
        const Index e = detail::index_of(last);
        if (r.top_p > 0 && carried >= Score(r.top_p)) continue;
        if (r.top_p > 0) carried += of(p, e);
        const Score chosen = of(score, e);
        sum += chosen;
        if (s == team.place()) weight = chosen, id = static_cast<std::int32_t>(e);
      }
      const Score top = team.maximum(E, [=](Index) { return logit; });
      const bool broken = !(top == top);  // a NaN logit anywhere
      if (r.renormalise) weight = sum == Score(0) ? Score(0) : weight / sum;
      team.each(k, [&](Index s) {
        state.weights(t, s) = broken ? Score(NAN) : weight * Score(r.route_scale);
        state.ids(t, s) = state.chosen(t, s) = id;
      });
    }
    /// ids and weights of token t.
    template <Team Tm>
    LORAMIX_HD void choose(const Tm& team, Index t, Index E, Index k) const {
      const TopKRule& r = gate.rule;
      const Score* const logits = state.logits.row(t);
      const Score* const p = state.p.row(t);
      std::int32_t* const ids = state.ids.row(t);
      const bool biased = call.selection_bias.data != nullptr, soft = r.scoring == Scoring::softmax;
      Index kept = 0;
      Score sum = Score(0), carried = Score(0);  // of scores; of p, for top-p
      std::uint64_t last = detail::before_all;
      for (Index s = 0; s < k; ++s) {
        last = detail::next_choice(team, E, last, [&](Index e) {
          if (!biased) return static_cast<float>(logits[e]);
          return static_cast<float>(soft ? p[e] : detail::sigmoid(logits[e])) + call.selection_bias[e];
        });
        const Index e = detail::index_of(last);
        if (r.top_p > 0 && carried >= Score(r.top_p)) {
          team.once([&] { ids[s] = -1; });
          continue;
        }
        if (r.top_p > 0) carried += p[e];
        sum += gate.score(logits, p, e);
        kept = s + 1;
        team.once([&] { ids[s] = static_cast<std::int32_t>(e); });
      }
      const Score top = team.maximum(E, [&](Index e) { return logits[e]; });
      const bool broken = !(top == top);  // a NaN logit anywhere
      team.each(k, [&](Index s) {
        Score weight = s < kept ? gate.score(logits, p, ids[s]) : Score(0);
        if (r.renormalise) weight = sum == Score(0) ? Score(0) : weight / sum;
        state.weights(t, s) = broken ? logits[0] * Score(NAN) : weight * Score(r.route_scale);
        state.chosen(t, s) = ids[s];
      });
    }
  };

  /// What weights are made of: p, or σ before it is normalised.
  LORAMIX_HD Score score(const Score* logits, const Score* p, Index e) const {
    return rule.scoring == Scoring::softmax ? p[e] : detail::sigmoid(logits[e]);
  }

  struct Backward {
    TopKGate gate;
    MatrixView<const Score, S> h;
    State state, dstate;
    MatrixView<Score, S> dh;
    GateCall<S> call;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index t) const {
      const Index E = gate.experts();
      const TopKRule& r = gate.rule;
      if (E <= Tm::width) return in_registers(team, t, E);
      const Score* const p = state.p.row(t);
      Score* const dscore = dstate.p.row(t);  // of p, or of σ
      Score* const dlogits = dstate.logits.row(t);
      choice(team, t, E);  // dscore from the weights
      if (r.scoring == Scoring::softmax) {
        team.each(E, [&](Index e) { dlogits[e] = Score(0); });
        const Score* const more = state.dp.data == nullptr ? nullptr : state.dp.row(t);  // from losses
        detail::softmax_backward(
            team, E, p, [=](Index e) { return more == nullptr ? dscore[e] : dscore[e] + more[e]; },
            Score(r.temperature), dlogits);
      } else {
        const Score* const logits = state.logits.row(t);
        const Score sum = team.sum(E, [&](Index e) { return detail::sigmoid(logits[e]); });
        const bool losses = state.dp.data != nullptr && sum != Score(0);
        const Score inner = losses ? team.sum(E, [&](Index e) { return state.dp(t, e) * p[e]; }) : Score(0);
        team.each(E, [&](Index e) {
          const Score q = detail::sigmoid(logits[e]);
          const Score dq = dscore[e] + (losses ? (state.dp(t, e) - inner) / sum : Score(0));
          dlogits[e] = dq * q * (Score(1) - q);
        });
      }
      team.each(E, [&](Index e) {
        if (state.dlogits.data != nullptr) dlogits[e] += state.dlogits(t, e);
        dh(t, e) += dlogits[e];
        if (r.noise && call.key.on) {
          dh(t, E + e) += dlogits[e] * gate.noise_of(call, t, e) * detail::sigmoid(h(t, E + e));
        }
      });
    }

   private:
    /// The same where every thread of the team has one expert, and one choice.
    template <Team Tm>
    LORAMIX_HD void in_registers(const Tm& team, Index t, Index E) const {
      const TopKRule& r = gate.rule;
      const Index own = team.place() < E ? team.place() : 0;
      const Index choice = team.place() < r.k ? state.chosen(t, team.place()) : Index{-1};
      Score score = Score(0), slope = Score(0);  // of this place's choice
      if (choice >= 0) {
        score = gate.score(state.logits.row(t), state.p.row(t), choice);
        slope = dstate.weights(t, team.place());
      }
      const Score sum = r.renormalise ? team.sum(r.k, [=](Index) { return score; }) : Score(1);
      if (r.renormalise && sum != Score(0)) {
        const Score inner = team.sum(r.k, [=](Index) { return slope * (score / sum); });
        slope = (slope - inner) / sum;  // one choice: exactly dg − dg·1 = 0
      }
      Score dscore = Score(0);  // of p, or of σ
      for (Index s = 0; s < r.k && sum != Score(0); ++s) {
        const Index e = team.sum(r.k, [=](Index i) { return i == s ? choice : Index{0}; });
        const Score of_choice = team.sum(r.k, [=](Index i) { return i == s ? slope : Score(0); });
        if (e == own) dscore = Score(r.route_scale) * of_choice;
      }
      const Score p = state.p(t, own), dp = state.dp.data != nullptr ? state.dp(t, own) : Score(0);
      Score dlogit = Score(0);
      if (r.scoring == Scoring::softmax) {
        dlogit = detail::softmax_slope(team, E, p, dscore + dp, Score(r.temperature));
      } else {
        const Score q = detail::sigmoid(state.logits(t, own));
        const Score all = team.sum(E, [=](Index) { return q; });
        const Score inner = team.sum(E, [=](Index) { return dp * p; });
        if (state.dp.data != nullptr && all != Score(0)) dscore += (dp - inner) / all;
        dlogit = dscore * q * (Score(1) - q);
      }
      if (state.dlogits.data != nullptr) dlogit += state.dlogits(t, own);
      team.each(E, [&](Index e) {
        dh(t, e) += dlogit;
        if (r.noise && call.key.on) {
          dh(t, E + e) += dlogit * gate.noise_of(call, t, e) * detail::sigmoid(h(t, E + e));
        }
      });
    }
    /// The weights' gradient as one of the scores they were made of; 0 for the experts not chosen.
    template <Team Tm>
    LORAMIX_HD void choice(const Tm& team, Index t, Index E) const {
      const TopKRule& r = gate.rule;
      const auto score = [&](Index s) {
        const Index e = state.chosen(t, s);
        return e < 0 ? Score(0) : gate.score(state.logits.row(t), state.p.row(t), e);
      };
      team.each(E, [&](Index e) { dstate.p(t, e) = Score(0); });
      const Score sum = r.renormalise ? team.sum(r.k, score) : Score(1);
      if (sum == Score(0)) return;
      const Score inner =
          r.renormalise ? team.sum(r.k, [&](Index s) { return dstate.weights(t, s) * (score(s) / sum); }) : Score(0);
      team.each(r.k, [&](Index s) {  // one choice: exactly dg − dg·1 = 0
        const Index e = state.chosen(t, s);
        if (e >= 0) dstate.p(t, e) = Score(r.route_scale) * ((dstate.weights(t, s) - inner) / sum);
      });
    }
  };

  /// Row body over experts: closes the choices that expert e has no place for. Padding takes no place and keeps its own.
  struct Capacity {
    TopKGate gate;
    State state;
    GateCall<S> call;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index e) const {
      const Index k = gate.rule.k, valid = static_cast<Index>(team.sum(call.tokens, [&](Index t) {
                                     return call.batch.is_valid(t) ? Index{1} : Index{0};
                                   }));
      const Index places = detail::expert_capacity(gate.rule.capacity, k, valid, gate.experts());
      if (gate.rule.order == CapacityOrder::arrival) {
        team.once([&] {
          Index taken = 0;
          for (Index i = 0; i < call.tokens * k; ++i) {
            if (wants(i, e) && taken++ >= places) state.ids(i / k, i % k) = -1;
          }
        });
      } else {
        team.each(call.tokens * k, [&](Index i) {
          if (!wants(i, e)) return;
          Index ahead = 0;
          for (Index j = 0; j < call.tokens * k; ++j) {
            ahead += wants(j, e) && before(j, i) ? 1 : 0;
          }
          if (ahead >= places) state.ids(i / k, i % k) = -1;
        });
      }
    }

   private:
    LORAMIX_HD bool wants(Index i, Index e) const {
      const Index k = gate.rule.k;
      return state.chosen(i / k, i % k) == e && call.batch.is_valid(i / k);
    }
    /// Whether choice j has the larger weight, or came first; NaN last.
    LORAMIX_HD bool before(Index j, Index i) const {
      const Index k = gate.rule.k;
      const Score a = state.weights(j / k, j % k), b = state.weights(i / k, i % k);
      if (a == a && b == b && a != b) return a > b;
      return (a == a) != (b == b) ? a == a : j < i;
    }
  };

  bool by_token(const GateCall<S>&) const { return !(rule.capacity > 0); }
  Forward forward_rows(MatrixView<Score, S> h, const State& state, const GateCall<S>& call) const {
    return {*this, h, state, call};
  }
  Backward backward_rows(MatrixView<Score, S> h, const State& state, const State& dstate, MatrixView<Score, S> dh,
                         const GateCall<S>& call) const {
    return {*this, h, state, dstate, dh, call};
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
