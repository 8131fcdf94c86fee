/// How a router uses its experts, cheap enough to leave on.
///
/// Computes:    over valid rows (MATH.md section 5): load = how often an expert was chosen, before capacity (dense or
///              competing gates: Σ_t p); importance = Σ_t p; entropy = mean of −Σ p ln p; max violation = max/mean − 1 of
///              load; dropped choices; dead experts (load 0); CV of load and importance.
/// Reads:       a Scores, or what forward saved.
/// Writes:      RouterTelemetry, assigned: 2E + 7 numbers in the memory of the scores.
/// Errors:      shapes; small workspace.
/// Cost:        O(T·E·k); loss_workspace_bytes; no synchronisation.
/// Determinism: ops/loss.hpp
/// Example:     tests/ops/losses.cpp
#pragma once
#include <cmath>

#include <loramix/core/matrix.hpp>
#include <loramix/ops/loss.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Owns the numbers of one layer. On the device: copy values() to another's on the host, and read there.
template <class Score, Space S = Space::host>
class RouterTelemetry {
 public:
  explicit RouterTelemetry(Index experts) : experts_(experts), values_(2 * experts + 7) {}

  Index experts() const { return experts_; }
  VectorView<Score, S> values() { return values_.view(); }
  VectorView<const Score, S> values() const { return values_.view(); }
  VectorView<const Score, S> load() const { return values().part(0, experts_); }
  VectorView<const Score, S> importance() const { return values().part(experts_, experts_); }
  Score tokens() const { return at(0); }
  Score entropy() const { return at(1); }
  Score max_violation() const { return at(2); }
  Score dropped() const { return at(3); }
  Score dead() const { return at(4); }
  Score load_cv() const { return at(5); }
  Score importance_cv() const { return at(6); }

 private:
  Score at(Index i) const {
    static_assert(S == Space::host, "loramix: copy values() to a RouterTelemetry on the host to read it");
    return values_[2 * experts_ + i];
  }
  Index experts_;
  Buffer<Score, S> values_;
};

namespace detail {

/// Row body: terms(t) = load, p, entropy, dropped, 1.
template <class Score, Space S>
struct TelemetryTerms {
  Scores<Score, S> scores;
  MatrixView<Score, S> terms;  // [T, 2E + 3]

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    using std::log;
    const Index E = scores.p.cols;
    const bool in = counts(scores.valid, t);
    const MatrixView<const std::int32_t, S> chosen = choices(scores);
    team.each(E, [&](Index e) {
      const Score p = in ? scores.p(t, e) : Score(0);
      Score count = chosen.data == nullptr ? p : Score(0);
      for (Index s = 0; in && s < chosen.cols; ++s) count += chosen(t, s) == e ? Score(1) : Score(0);
      terms(t, e) = count;
      terms(t, E + e) = p;
    });
    const Score entropy = team.sum(in ? E : 0, [&](Index e) {
      const Score p = scores.p(t, e);
      return p == Score(0) ? Score(0) : Score(-p * Score(log(p)));
    });
    team.once([&] {
      Score dropped = Score(0);
      for (Index s = 0; in && scores.ids.data != nullptr && s < chosen.cols; ++s) {
        dropped += chosen(t, s) >= 0 && scores.ids(t, s) < 0 ? Score(1) : Score(0);
      }
      terms(t, 2 * E) = in ? Score(1) : Score(0);
      terms(t, 2 * E + 1) = entropy;
      terms(t, 2 * E + 2) = dropped;
    });
  }
};

/// One team: what the sums say.
template <class Score, Space S>
struct TelemetryValues {
  MatrixView<const Score, S> sums;  // [1, 2E + 3]
  VectorView<Score, S> out;         // [2E + 7]

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    using std::sqrt;
    const Index E = (out.size - 7) / 2;
    const auto load = [&](Index e) { return sums(0, e); };
    const auto importance = [&](Index e) { return sums(0, E + e); };
    const auto all = [](Index) { return true; };
    const auto of_load = squared_variation<Score>(team, E, load, all);
    const auto of_importance = squared_variation<Score>(team, E, importance, all);
    const Score top = team.maximum(E, load);
    const Score dead = team.sum(E, [&](Index e) { return load(e) == Score(0) ? Score(1) : Score(0); });
    team.each(2 * E, [&](Index i) { out[i] = sums(0, i); });
    team.once([&] {
      const Score tokens = sums(0, 2 * E);
      out[2 * E] = tokens;
      out[2 * E + 1] = tokens > Score(0) ? sums(0, 2 * E + 1) / tokens : Score(0);
      out[2 * E + 2] = of_load.mean == Score(0) ? Score(0) : top / of_load.mean - Score(1);
      out[2 * E + 3] = sums(0, 2 * E + 2);
      out[2 * E + 4] = dead;
      out[2 * E + 5] = Score(sqrt(of_load.value()));
      out[2 * E + 6] = Score(sqrt(of_importance.value()));
    });
  }
};

}  // namespace detail

/// Fills `out`.
template <class Backend, ScoreSource F>
void telemetry(const Backend& be, const F& from, RouterTelemetry<score_t<F>, space_of<F>>& out,
               Arena<space_of<F>> work) {
  using Score = score_t<F>;
  constexpr Space S = space_of<F>;
  const char* const op = "telemetry";
  const Scores<Score, S>& scores = detail::source_of<F>::scores(from);
  const Index E = scores.p.cols;
  detail::check_scores(op, "p", scores.p, "dp", scores.dp, 0, scores.valid);
  if (detail::choices(scores).data != nullptr) detail::check_choices(op, scores);
  check::same(op, "out", "experts", out.experts(), "the number of experts", E);
  const auto scratch = detail::loss_scratch<Score>(op, work, scores.p.rows, 1, 2 * E + 3, E);
  for_rows<S>(be, scores.p.rows, detail::TelemetryTerms<Score, S>{scores, scratch.terms});
  detail::sum_terms(be, scratch);
  for_rows<S>(be, 1, detail::TelemetryValues<Score, S>{scratch.sums, out.values()});
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
