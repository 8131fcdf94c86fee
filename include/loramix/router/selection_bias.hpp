/// Balance without a loss: a bias that is added to scores for selection only, moved against the experts' load.
///
/// Computes:    count_load:            load[e] += the valid tokens' choices of expert e, before capacity
///              update_selection_bias: b[e] += γ·sign(mean load − load[e]), sign(0) = 0; then load = 0
///              One bias and one load per layer, the caller's; ForwardOptions::selection_bias gives the bias to the router.
/// Source:      Loss-free balancing, Wang et al. 2024 (arXiv 2408.15664); MATH.md section 2.
/// Reads:       chosen [T, k] (Scores::chosen), valid [T] or empty, γ.
/// Adds to:     load [E]; bias [E] float.
/// Errors:      shape, null; γ not finite.
/// Cost:        count_load O(T·k·E), update O(E); no scratch.
/// Determinism: counts are integers and compared exactly: the same bias for any threads and on every device.
/// Example:     tests/router
#pragma once
#include <loramix/gate/batch.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {

/// Row body over experts.
template <Space S>
struct CountLoad {
  MatrixView<const std::int32_t, S> chosen;
  VectorView<const std::uint8_t, S> valid;
  VectorView<Index, S> load;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index e) const {
    const Index k = chosen.cols, count = team.sum(chosen.rows * k, [&](Index i) {
      const bool counts = valid.data == nullptr || valid[i / k] != 0;
      return Index{counts && chosen(i / k, i % k) == e ? 1 : 0};
    });
    team.once([&] { load[e] += count; });
  }
};

/// Row body of one row. mean − load has the sign of Σ load − E·load, which is exact.
template <Space S>
struct MoveBias {
  VectorView<Index, S> load;
  VectorView<float, S> bias;
  float rate;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    const Index total = team.sum(load.size, [&](Index e) { return load[e]; });
    team.each(load.size, [&](Index e) {
      const Index gap = total - load.size * load[e];
      if (gap != 0) bias[e] += gap > 0 ? rate : -rate;
      load[e] = 0;
    });
  }
};

}  // namespace detail

/// Counts one batch's choices.
template <Space S, class Backend>
void count_load(const Backend& be, MatrixView<const std::int32_t, S> chosen, VectorView<const std::uint8_t, S> valid,
                VectorView<Index, S> load) {
  const char* const op = "count_load";
  check::view(op, "chosen", chosen);
  check::view(op, "load", load);
  detail::check_optional(op, "valid", valid, "the number of tokens", chosen.rows);
  for_rows<S>(be, load.size, detail::CountLoad<S>{chosen, valid, load});
}

/// Moves the bias by the load since the last update, and starts counting anew.
template <Space S, class Backend>
void update_selection_bias(const Backend& be, VectorView<Index, S> load, VectorView<float, S> bias, double rate) {
  const char* const op = "update_selection_bias";
  check::view(op, "load", load);
  check::view(op, "bias", bias);
  check::same(op, "bias", "size", bias.size, "the size of load", load.size);
  if (!(rate - rate == 0)) fail(check::detail::about(ErrorCode::value, op, "rate") << " must be finite");
  for_rows<S>(be, 1, detail::MoveBias<S>{load, bias, static_cast<float>(rate)});
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
