/// Conversions of scalars.
///
/// Computes:    to = from, widened exactly or rounded once to nearest even, straight from double too.
/// Reads:       from [rows, cols], rows may be strided.
/// Writes:      to [rows, cols].
/// Errors:      shape, null, alias. Before any write.
/// Cost:        one pass; no scratch.
/// Determinism: elementwise: the same bits on every device.
/// Example:     tests/gpu/merge.cu
#pragma once
#include <type_traits>

#include <loramix/core/precision.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace detail {

/// Row body: one row.
template <class From, class To, Space S>
struct ConvertRow {
  MatrixView<const From, S> from;
  MatrixView<To, S> to;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    using Wide = std::conditional_t<std::is_same_v<From, double>, double, accumulation_t<To>>;
    team.each(to.cols, [&](Index c) { to(t, c) = narrow<To>(widen<Wide>(from(t, c))); });
  }
};

}  // namespace detail

/// to = from, for any two scalars.
template <class Backend, class From, class To, Space S>
void convert(const Backend& be, MatrixView<From, S> from, MatrixView<To, S> to) {
  using Value = std::remove_const_t<From>;
  const MatrixView<const Value, S> source = from;
  check::view("convert", "from", source);
  check::shape("convert", "to", to, "rows of from", from.rows, "columns of from", from.cols);
  check::disjoint("convert", "to", to, "from", source);
  if (!to.empty()) for_rows<S>(be, to.rows, detail::ConvertRow<Value, To, S>{source, to});
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
