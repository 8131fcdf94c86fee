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
#include <loramix/core/scalars.hpp>
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

/// A row body that reads rows of the op before it from wherever they are: body(team, t, rows), rows empty: where they always are.
template <class Body, class Tm, class Before>
concept ReadsBefore = requires(const Body& body, const Tm& team, const Before& before) {
  body(team, Index{0}, before);
};

/// Row body: two bodies of one row, one after the other.
template <class First, class Second>
struct InTurn {
  First first;
  Second second;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    first(team, t);
    second(team, t);
  }
  template <Team Tm, class Before>
    requires(ReadsBefore<First, Tm, Before> || ReadsBefore<Second, Tm, Before>)
  LORAMIX_HD void operator()(const Tm& team, Index t, const Before& before) const {
    run(first, team, t, before);
    run(second, team, t, before);
  }

 private:
  template <class Body, class Tm, class Before>
  LORAMIX_HD static void run(const Body& body, const Tm& team, Index t, const Before& before) {
    if constexpr (ReadsBefore<Body, Tm, Before>)
      body(team, t, before);
    else
      body(team, t);
  }
};
template <class First, class Second>
InTurn(First, Second) -> InTurn<First, Second>;

namespace detail {
/// Row t of y [T, n] (+)= value(i). Nothing in the loops is asked for each element, so that compilers make packets of them.
template <Team Tm, class Y, Space S, class F>
LORAMIX_HD void put_row(const Tm& team, MatrixView<Y, S> y, Index t, Into into, const F& value) {
  Y* const to = y.row(t);
  if (into == Into::add) {
    using Acc = decltype(value(Index{0}));
    team.each(y.cols, [=](Index i) { to[i] = narrow<Y>(widen<Acc>(to[i]) + value(i)); });
  } else {
    team.each(y.cols, [=](Index i) { to[i] = narrow<Y>(value(i)); });
  }
}

/// Whether the backend runs a row body in the launch of the op whose rows it reads: it then has
/// execute_then_impl(backend, op, work, body), the op and then the body for each of its rows.
template <class Backend>
bool rows_follow(const Backend& be) {
  if constexpr (requires { rows_follow_impl(be); })
    return rows_follow_impl(be);
  else
    return false;
}
}  // namespace detail

/// Runs `body` once per row.
template <Space S, class Backend, class Body>
void for_rows(const Backend& be, Index rows, const Body& body) {
  execute(be, Rows<Body, S>{rows, body}, Arena<S>{});
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
