/// Row operations and token sums on the CPU: a team of one thread, chunks of rows as jobs.
#pragma once
#include <loramix/cpu/backend.hpp>
#include <loramix/cpu/dropout.hpp>
#include <loramix/ops/column_sum.hpp>
#include <loramix/ops/draw_mask.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {

namespace detail {
/// The body, for chunks of rows.
template <class E, class Body>
void run_rows(const Backend<E>& be, const Rows<Body, Space::host>& op) {
  constexpr Index chunk = 32;
  be.run(blocks_of(op.rows, chunk), [&op](Index job, Index) {
    const Index end = smaller((job + 1) * chunk, op.rows);
    for (Index t = job * chunk; t < end; ++t) op.body(SerialTeam{}, t);
  });
}
}  // namespace detail

template <class E, class Body>
Index scratch_impl(const Backend<E>&, const Rows<Body, Space::host>&) {
  return 0;
}

template <class E, class Body>
void execute_impl(const Backend<E>& be, const Rows<Body, Space::host>& op, Arena<>) {
  detail::run_rows(be, op);
}

/// Masks are drawn many columns at a time.
template <class E>
void execute_impl(const Backend<E>& be, const Rows<DrawMaskRow<Space::host>, Space::host>& op, Arena<>) {
  const auto& mask = op.body;
  be.run((op.rows + 15) / 16, [&op, &mask](Index job, Index) {
    for (Index t = job * 16; t < detail::smaller(job * 16 + 16, op.rows); ++t) {
      detail::keep_bits(mask.dropout, t, 0, mask.columns, mask.bits.row(t));
    }
  });
}

template <class E, class Acc, class Out>
Index scratch_impl(const Backend<E>&, const ColumnSum<Acc, Out, Space::host>&) {
  return 0;
}

template <class E, class Acc, class Out>
void execute_impl(const Backend<E>& be, const ColumnSum<Acc, Out, Space::host>& op, Arena<>) {
  constexpr int width = 16;
  const Index blocks = (op.out.cols + width - 1) / width;
  const detail::Crew crew(be, op.values.rows, op.out.rows * op.out.cols * Index{sizeof(Out)});
  crew.run(op.out.rows * blocks, [&op, blocks](Index job, Index) {
    const Index c = job % blocks * width, left = op.out.cols - c;
    op.template block<width>(job / blocks, c, left < width ? left : width);
  });
}

}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
