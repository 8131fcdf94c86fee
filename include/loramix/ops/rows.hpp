/// Row operations: a body that a team of threads runs once per row, the same source on both devices.
///
/// Computes:    body(team, t) for every t in [0, rows). The body is a struct with a LORAMIX_HD call operator.
/// Reads:       what the body reads.
/// Writes:      what the body writes; rows must not touch each other's results.
/// Errors:      rows < 0.
/// Cost:        no scratch.
/// Determinism: a row's result depends on the team's width (CPU 1, GPU 32) and on nothing else.
/// Example:     docs/how-to/add-a-gate.md
#pragma once
#include <loramix/core/team.hpp>
#include <loramix/ops/execute.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The op.
template <class Body, Space S>
struct Rows {
  static constexpr const char* name = "rows";
  static constexpr Space space = S;
  Index rows;
  Body body;

  void check() const { check::at_least(name, "rows", rows, 0); }
};

/// Runs `body` once per row.
template <Space S, class Backend, class Body>
void for_rows(const Backend& be, Index rows, const Body& body) {
  execute(be, Rows<Body, S>{rows, body}, Arena<S>{});
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
