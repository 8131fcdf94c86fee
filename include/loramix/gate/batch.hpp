/// What a batch says about its tokens beside their values: sequences, tasks, domain labels, padding.
///
/// Computes:    nothing; views that routers and losses read.
/// Reads:       groups of [T] tokens; labels [sequences]; valid [T]; selection bias [E].
/// Errors:      checked by who reads them (host): ids, offsets, sizes.
/// Cost:        none.
/// Determinism: none needed.
/// Example:     tests/gate
#pragma once
#include <loramix/core/draws.hpp>
#include <loramix/gate/form.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// All parts are optional; a router says what it needs.
template <Space S = Space::host>
struct Batch {
  Groups<S> sequences{};                       // segments of a ragged batch, Groups::by_segment
  Groups<S> tasks{};                           // the task or domain of a token, by id or by segment
  VectorView<const std::int32_t, S> labels{};  // [sequences] domain labels, −1 = none
  VectorView<const std::uint8_t, S> valid{};   // [T] 0 = padding; empty: all are valid

  LORAMIX_HD constexpr bool is_valid(Index t) const { return valid.data == nullptr || valid[t] != 0; }
};

namespace detail {

/// A view that is optional: [size] where it is given, which an address says as well as a size.
template <class T, Space S>
void check_optional(const char* op, const char* argument, VectorView<T, S> v, const char* what, Index size) {
  if (v.data == nullptr && v.size == 0) return;
  check::view(op, argument, v);
  check::same(op, argument, "size", v.size, what, size);
}

}  // namespace detail

/// One call, as a computed gate sees it.
template <Space S = Space::host>
struct GateCall {
  Index tokens = 0;
  Batch<S> batch{};
  Key key = no_draws;                           // noise is drawn where it is on
  VectorView<const float, S> selection_bias{};  // [E] what router/selection_bias.hpp keeps; empty: none
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
